"""Traces of anything computed from the parameters along the chains."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from jaxpattern import tables
from jaxpattern.chains.divergence import check_alive, lost_chains
from jaxpattern.chains.kernel import position_of
from jaxpattern.chains.loop import run_chains
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.record import Trace
from jaxpattern.chains.run import make_run
from jaxpattern.diagnostics import summarize
from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.runtime.host import host_for
from jaxpattern.types import Params
from jaxpattern.validation import as_pytree_function, check_function

if TYPE_CHECKING:
    import xarray


class Draws(dict[str, Any]):
    """A dictionary of traces `[chain, draw, ...]`, as `observe` named them."""

    def to_arviz(self) -> xarray.DataTree:
        """The traces as ArviZ takes them; see `export.to_arviz`."""
        from jaxpattern import export

        return export.to_arviz(self)

    def __str__(self) -> str:
        return tables.text(_page, self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.html(_page, self)


def _page(draws: Draws) -> tables.Page:
    """Each trace: its shape, and its mean with error, R-hat and ESS where it is one number."""
    title = "Traces of chains"
    leaves = jax.tree_util.tree_leaves_with_path(draws)
    tables.refuse_unreadable(title, draws, 0)
    alive = ~lost_chains(draws)
    body = []
    for path, leaf in leaves:
        health = [""] * 3
        if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
            groups = Plan(len(alive), 0, leaf.shape[1]).batches
            found = summarize(leaf, num_batches=groups, alive=alive)
            mean = tables.measured(float(found.mean), float(found.stderr))
            health = [mean, f"{float(found.rhat):.3f}", f"{float(found.ess):.0f}"]
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        body.append([name, " × ".join(map(str, leaf.shape[2:])) or "number", *health])
    chains, draws_each = leaves[0][1].shape[:2]
    title = f"{title}: {len(body)} of {chains} chains × {draws_each} draws"
    notes = [f"{int((~alive).sum())} chains were lost and count nowhere."] * (not alive.all())
    return tables.Page(
        title, (tables.Grid(["trace", "shape", "mean", "R-hat", "ESS"], body),), tuple(notes)
    )


def _flatten(draws: Draws) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    names = tuple(sorted(draws))
    return [(jax.tree_util.DictKey(name), draws[name]) for name in names], names


jax.tree_util.register_pytree_with_keys(
    Draws, _flatten, lambda names, leaves: Draws(zip(names, leaves, strict=True))
)


def as_draws(kept: PyTree[Array]) -> PyTree[Array]:
    """A dictionary of traces as `Draws`; anything else as it is."""
    return Draws(kept) if type(kept) is dict else kept


@register_pytree
@dataclass(frozen=True, eq=False)
class Observed(Trace):
    """Keeps `observe(params)` of every draw."""

    observe: Callable[[Params], PyTree[Array]]

    def value(
        self, posterior: Posterior, state: PyTree[Any], key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """(observe(w), nothing)."""
        del key, batch_size
        return _arrays(self.observe(posterior.embed(position_of(state)))), ()


def observed(observe: Callable[[Params], PyTree[Array]], posterior: Posterior) -> Observed:
    """The recorder of a user's function, checked.

    Raises:
        TypeError, ValueError: it is no function of the parameters that returns floating point.
    """
    check_function("observe", observe, "a function of params", num_arguments=1)
    _check_trace(jax.eval_shape(lambda p: _arrays(observe(p.embed(p.center))), posterior))
    return Observed(as_pytree_function(observe))


def _arrays(values: PyTree[Any]) -> PyTree[Array]:
    """What `observe` returns, as arrays."""
    for leaf in jax.tree.leaves(values):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise TypeError(f"observe must return arrays, got {type(leaf).__name__}")
    return jax.tree.map(jnp.asarray, values)


def _check_trace(shapes: PyTree[Any]) -> None:
    """Something to record, in which NaN can mark a lost chain."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    if not leaves:
        raise ValueError("observe returned an empty pytree; there is nothing to record")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"observe{jax.tree_util.keystr(path)} must return floating point, so that NaN can "
                f"mark draws of a lost chain, got {leaf.dtype}; convert it"
            )


def sample(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    observe: Callable[[Params], PyTree[Array]],
    *,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    mesh: Mesh | None = None,
) -> PyTree[Float[Array, "chains draws ..."]]:
    """Traces of anything computed from the weights along the chains.

    Args:
        key: typed key.
        posterior: what to sample.
        sampler: `sgld(...)`, …, or any function of the posterior to a `SamplingAlgorithm`.
        plan: lengths and numbers.
        observe: pure function of the full weights that returns a pytree of floating-point arrays.
        progress: show a progress line. Without it the whole run is one pure function.
        checkpoint: a folder, or a `Checkpoint`, where the run is kept; called again with the same
            arguments after an interruption, it goes on from there to the same bits.
        mesh: where it runs, see `jaxpattern.mesh`; None: the current mesh, or one device.

    Returns:
        The pytree of `observe`, its leaves with leading axes `[chain, draw]`; a dictionary also
        has `.to_arviz()`. Draws of a chain that diverged are NaN from there on, and a
        `DivergenceWarning` names it.

    Raises:
        DivergenceError: all chains diverged.
        CheckpointError: the folder belongs to another run, or cannot be used.
        Interrupted: a signal stopped a run with a folder, after it was saved.
        TypeError, ValueError: an argument does not fit.
    """
    run = make_run(key, posterior, sampler, plan)
    recorder = observed(observe, posterior)
    with host_for(
        "sample",
        checkpoint=checkpoint,
        mesh=mesh,
        progress=progress,
        run=run,
        posterior=posterior,
        observe=observe,
    ) as host:
        chains = run_chains(run, recorder, host)
    check_alive(chains.alive, ("",), posterior)
    return as_draws(jax.tree.map(lambda leaf: leaf[0], chains.kept))
