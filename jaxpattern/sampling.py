"""Chains: one compiled loop a chunk, components × chains vmapped, the divergence rule.

A chain runs `num_burnin` steps, then `num_draws` times `thin` steps and a record. A *recorder* says
what is kept of a draw: its `value` is computed from the position, its `update` adds the value to
an accumulator of fixed size. Traces and streamed moments are recorders; so is whatever a user
writes against `Recorder`.

Divergence: a draw whose position or value is not finite ends its chain. The chain is frozen, its
further draws have weight zero, the chain is left out of every estimate, and it is named in the
result and in a `DivergenceWarning`. When all chains of a component are lost, `DivergenceError`.

Randomness: chain c of component k uses fold_in(fold_in(key, k), c), and step t folds in t. Bits
therefore do not depend on chunking, on other chains, or on where a chain runs. Antithetic chains
2c and 2c + 1 are mirrored twins (see `Posterior`), which share the key of chain c.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from tqdm import tqdm

from jaxpattern.losses import losses_in_chunks
from jaxpattern.posterior import Posterior, Target
from jaxpattern.restriction import Restriction
from jaxpattern.runtime.checkpoint import Checkpoint, Store, open_store
from jaxpattern.runtime.mesh import (
    fetch,
    is_first_process,
    over_lanes,
    pad_lanes,
    put,
    resolve_mesh,
)
from jaxpattern.runtime.mesh import (
    loop_bounds as loop_bounds,
)
from jaxpattern.types import Params, Position
from jaxpattern.validation import (
    as_pytree_function as as_pytree_function,
)
from jaxpattern.validation import (
    check_count,
    check_function,
    check_key,
    check_number,
    is_concrete,
)

_PROGRESS_CHUNKS = 50
_WANTED_BATCHES = 20


@dataclass(frozen=True)
class Plan:
    """How many chains, how long, how dense.

    Attributes:
        num_chains: independent chains, all started at w*.
        num_burnin: steps thrown away at the start of a chain.
        num_draws: draws kept of a chain.
        thin: steps from draw to draw.
        batch_size: samples of the data in a step, drawn with replacement; None: all of them.
        num_batches: batches of draws a chain is cut into for standard errors. By default as many
            as make 20 over all chains. A batch should span many relaxation times.
        chunk: samples evaluated at a time in passes over probes and data, where memory is short.
        chains_at_once: chains (of all components) that a device advances together while its
            others wait, where memory is short; None: all it has.
    """

    num_chains: int = 4
    num_burnin: int = 100
    num_draws: int = 100
    thin: int = 1
    batch_size: int | None = None
    num_batches: int | None = None
    chunk: int | None = None
    chains_at_once: int | None = None

    def __post_init__(self) -> None:
        check_count("num_chains", self.num_chains, minimum=1)
        check_count("num_burnin", self.num_burnin, minimum=0)
        check_count("num_draws", self.num_draws, minimum=2)
        check_count("thin", self.thin, minimum=1)
        for name in ("batch_size", "num_batches", "chunk", "chains_at_once"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), minimum=1)
        if self.batches > self.num_draws:
            raise ValueError(
                f"num_batches must be at most num_draws = {self.num_draws}, got {self.num_batches}"
            )
        if self.batches * self.num_chains < 2:
            raise ValueError("num_chains × num_batches must be at least 2 for a standard error")

    @property
    def batches(self) -> int:
        """Batches of draws in a chain."""
        return self.batches_over(self.num_chains)

    def batches_over(self, num_independent: int) -> int:
        """Batches of draws in a chain, where so many chains (or pairs of twins) are independent."""
        if self.num_batches is not None:
            return self.num_batches
        return min(-(-_WANTED_BATCHES // num_independent), self.num_draws)

    @property
    def num_steps(self) -> int:
        """Sampler steps of a chain."""
        return self.num_burnin + self.num_draws * self.thin


class DivergenceWarning(UserWarning):
    """Some chains turned non-finite and were left out."""


class DivergenceError(FloatingPointError):
    """All chains of a component turned non-finite."""


@runtime_checkable
class Recorder(Protocol):
    """What is kept of a chain. A pytree, so that its arrays pass through `jit` as arguments."""

    def init(self, posterior: Posterior, plan: Plan) -> PyTree[Array]:
        """The empty accumulator."""

    def value(
        self, posterior: Posterior, state: PyTree[Array], key: Key[Array, ""], plan: Plan
    ) -> PyTree[Array]:
        """What is computed at a draw; `position_of(state)` is where the chain is."""

    def update(
        self,
        accumulator: PyTree[Array],
        value: PyTree[Array],
        draw: Int[Array, ""],
        alive: Bool[Array, ""],
        plan: Plan,
    ) -> PyTree[Array]:
        """The accumulator with the value of a draw; a dead chain adds nothing."""


class Chain(NamedTuple):
    """A chain between two chunks: sampler state, whether it is finite, and what was recorded."""

    state: PyTree[Array]
    alive: Bool[Array, "*chains"]
    accumulator: PyTree[Array]


class Kernel(NamedTuple):
    """A sampling algorithm in one shape: init(position, key) and step(key, state)."""

    init: Callable[[Position, Key[Array, ""]], PyTree[Array]]
    step: Callable[[Key[Array, ""], PyTree[Array]], PyTree[Array]]
    takes_minibatch: bool


def position_of(state: PyTree[Array]) -> Position:
    """The position in a sampler's state: its field of that name, or the state itself."""
    return getattr(state, "position", state)


def build_kernel(posterior: Target, sampler: Any, plan: Plan) -> Kernel:
    """The kernel of a sampler on a posterior, with mini-batches drawn inside its steps.

    Raises:
        TypeError: the sampler does not return a blackjax `SamplingAlgorithm`, its step takes
            neither (key, state) nor (key, state, minibatch), or (when it is traced) the step does
            not return a state like the one it was given.
    """
    algorithm = sampler(posterior)
    if not (hasattr(algorithm, "init") and hasattr(algorithm, "step")):
        raise TypeError(
            "sampler must be a function Posterior -> SamplingAlgorithm, such as "
            f"jp.sgld(step_size=1e-3); it returned {type(algorithm).__name__}"
        )
    required = [
        parameter
        for parameter in inspect.signature(algorithm.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]

    def full_data_step(key: Key[Array, ""], state: Any) -> Any:
        out = algorithm.step(key, state)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                "the sampler's step(key, state) must return (state, info), "
                f"got {type(out).__name__}"
            )
        return _like(out[0], state)

    def minibatch_step(key: Key[Array, ""], state: Any) -> Any:
        batch_key, step_key = jax.random.split(key)
        minibatch = posterior.minibatch(batch_key, plan.batch_size)
        return _like(algorithm.step(step_key, state, minibatch), state)

    if len(required) not in (2, 3):
        raise TypeError(
            "the sampler's step must take (key, state) or (key, state, minibatch); it requires "
            f"{[parameter.name for parameter in required]}: bind the others first"
        )
    return Kernel(
        init=lambda position, key: algorithm.init(position, key),
        step=full_data_step if len(required) == 2 else minibatch_step,
        takes_minibatch=len(required) == 3,
    )


def _like(new: PyTree[Array], old: PyTree[Array]) -> PyTree[Array]:
    """The new state, if it has the structure, shapes and dtypes of the old one."""
    specs = [
        jax.tree.map(lambda x: (jnp.result_type(x).name, jnp.shape(x)), state)
        for state in (old, new)
    ]
    if specs[0] != specs[1]:
        raise TypeError(
            "the sampler's step must return a state like the one it was given, "
            f"{specs[0]}, got {specs[1]}"
        )
    return new


@dataclass(frozen=True)
class Streams:
    """The random streams of one chain."""

    init: Key[Array, ""]
    step: Key[Array, ""]
    record: Key[Array, ""]


def streams_of(key: Key[Array, ""]) -> Streams:
    """The streams of the chain with this key."""
    return Streams(*(jax.random.fold_in(key, stream) for stream in range(3)))


def _init(posterior: Posterior, sampler: Any, plan: Plan, key: Key[Array, ""]) -> Chain:
    """The chain at w*, with nothing recorded."""
    state = build_kernel(posterior, sampler, plan).init(posterior.centre, streams_of(key).init)
    # Without weak types, which a state that was saved does not have.
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)
    return Chain(state=state, alive=jnp.asarray(True), accumulator=())


def _start(
    posterior: Posterior, sampler: Any, recorder: Recorder, plan: Plan, key: Key[Array, ""]
) -> Chain:
    chain = _init(posterior, sampler, plan, key)
    return chain._replace(accumulator=recorder.init(posterior, plan))


def _burn(
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    chain: Chain,
    key: Key[Array, ""],
    start: int | Array,
    stop: int | Array,
) -> Chain:
    """Steps [start, stop) of the burn-in."""
    kernel, streams = build_kernel(posterior, sampler, plan), streams_of(key)
    state = jax.lax.fori_loop(
        start,
        stop,
        lambda t, state: kernel.step(jax.random.fold_in(streams.step, t), state),
        chain.state,
    )
    return chain._replace(state=state)


def _draw(
    posterior: Posterior,
    sampler: Any,
    recorder: Recorder,
    plan: Plan,
    chain: Chain,
    key: Key[Array, ""],
    start: int | Array,
    stop: int | Array,
) -> Chain:
    """Draws [start, stop), with `thin` steps before each."""
    kernel, streams = build_kernel(posterior, sampler, plan), streams_of(key)

    def draw(d: Array, chain: Chain) -> Chain:
        first = plan.num_burnin + d * plan.thin
        state = jax.lax.fori_loop(
            0,
            plan.thin,
            lambda i, state: kernel.step(jax.random.fold_in(streams.step, first + i), state),
            chain.state,
        )
        position = position_of(state)
        record_key = jax.random.fold_in(streams.record, d)
        value = recorder.value(posterior, state, record_key, plan)
        alive = chain.alive & all_finite((position, value))
        return Chain(
            state=jax.tree.map(partial(jnp.where, alive), state, chain.state),
            alive=alive,
            accumulator=recorder.update(chain.accumulator, value, d, alive, plan),
        )

    return jax.lax.fori_loop(start, stop, draw, chain)


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every number of a pytree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


class Lane(NamedTuple):
    """One chain of one component: what tells it from the others."""

    key: Key[Array, "*lanes"]
    mirror: Float[Array, "*lanes"] | None
    restriction: Restriction | None


def make_lanes(
    key: Key[Array, ""],
    restrictions: Restriction | None,
    component_ids: tuple[int, ...],
    plan: Plan,
    antithetic: bool,
) -> Lane:
    """All chains of some components in a row; twins share a key."""
    keys = chain_keys(key, component_ids, plan.num_chains, antithetic).reshape(-1)
    mirror = (-1.0) ** jnp.arange(plan.num_chains) if antithetic else None
    return Lane(
        key=keys,
        mirror=None if mirror is None else jnp.tile(mirror, len(component_ids)),
        restriction=jax.tree.map(
            lambda leaf: jnp.repeat(leaf, plan.num_chains, axis=0), restrictions
        ),
    )


def unpack(lanes: PyTree[Array], num_components: int, num_chains: int) -> PyTree[Array]:
    """`[lane, ...]` → `[component, chain, ...]`, without what only fills up the devices."""
    total = num_components * num_chains
    return jax.tree.map(
        lambda leaf: leaf[:total].reshape(num_components, num_chains, *leaf.shape[1:]), lanes
    )


def over_chains(
    function: Callable,
    posterior: Posterior,
    shared: Any,
    lanes: Lane,
    plan: Plan,
    mesh: Mesh | None,
) -> Callable:
    """`function(posterior of the lane, shared, key, *args)` over all lanes."""

    def one(shared: Any, lane: Lane, *args: Any) -> Any:
        component, rest = shared
        if lane.mirror is not None:
            component = replace(component, mirror=lane.mirror)
        if lane.restriction is not None:
            component = replace(component, restriction=lane.restriction)
        return function(component, rest, lane.key, *args)

    mapped = over_lanes(one, mesh, plan.chains_at_once)
    return lambda *args: mapped((posterior, shared), lanes, *args)


@partial(jax.jit, static_argnames=("plan", "mesh"))
def _start_all(posterior, sampler, recorder, lanes, plan, mesh):  # type: ignore[no-untyped-def]
    def start(p: Posterior, shared: Any, key: Key[Array, ""]) -> Chain:
        sampler, recorder = shared
        return _start(p, sampler, recorder, plan, key)

    return over_chains(start, posterior, (sampler, recorder), lanes, plan, mesh)()


@partial(jax.jit, static_argnames=("plan", "mesh"))
def _init_all(posterior, sampler, lanes, plan, mesh):  # type: ignore[no-untyped-def]
    init = lambda p, sampler, key: _init(p, sampler, plan, key)  # noqa: E731
    return over_chains(init, posterior, sampler, lanes, plan, mesh)()


@partial(jax.jit, static_argnames=("plan", "mesh", "static_bounds"))
def _burn_all(posterior, sampler, chains, lanes, bounds, plan, mesh, static_bounds=None):  # type: ignore[no-untyped-def]
    def burn(p: Posterior, shared: Any, key: Key[Array, ""], chain: Chain) -> Chain:
        sampler, bounds = shared
        return _burn(p, sampler, plan, chain, key, *(static_bounds or bounds))

    return over_chains(burn, posterior, (sampler, bounds), lanes, plan, mesh)(chains)


@partial(jax.jit, static_argnames=("plan", "mesh", "static_bounds"))
def _draw_all(posterior, sampler, recorder, chains, lanes, bounds, plan, mesh, static_bounds=None):  # type: ignore[no-untyped-def]
    def draw(p: Posterior, shared: Any, key: Key[Array, ""], chain: Chain) -> Chain:
        sampler, recorder, bounds = shared
        return _draw(p, sampler, recorder, plan, chain, key, *(static_bounds or bounds))

    return over_chains(draw, posterior, (sampler, recorder, bounds), lanes, plan, mesh)(chains)


def chain_keys(
    key: Key[Array, ""], component_ids: tuple[int, ...], num_chains: int, antithetic: bool = False
) -> Key[Array, "components chains"]:
    """fold_in(fold_in(key, component), chain); twins share a key."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    chains = jnp.arange(num_chains, dtype=jnp.uint32) // (2 if antithetic else 1)
    components = fold(key, jnp.asarray(component_ids, jnp.uint32))
    return jax.vmap(lambda component: fold(component, chains))(components)


def _settle(posterior: Posterior) -> Posterior:
    """The posterior without Python numbers and weak types, for which all is compiled again."""
    dtype = posterior.weights.dtype
    return replace(
        posterior,
        params=jax.tree.map(lambda x: jnp.asarray(x, x.dtype), posterior.params),
        nbeta=jnp.asarray(posterior.nbeta, dtype),
        localization=jnp.asarray(posterior.localization, dtype),
    )


def run_chains(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    recorder: Recorder,
    *,
    restrictions: Restriction | None = None,
    component_ids: tuple[int, ...] = (0,),
    antithetic: bool = False,
    label: str = "sampling",
    progress: bool = True,
    store: Store | None = None,
    mesh: Mesh | None = None,
) -> Chain:
    """All chains of some components of equal shape, as one program.

    Args:
        key: typed key.
        posterior: the posterior; unrestricted where `restrictions` are given.
        sampler: a function of the posterior that returns a `SamplingAlgorithm`.
        plan: lengths and numbers.
        recorder: what to keep of each draw.
        restrictions: one `Restriction` whose leaves carry a leading component axis.
        component_ids: what each component folds into the key.
        antithetic: chains 2c and 2c + 1 are mirrored twins.
        label: what the progress line says.
        progress: show a progress line, and compute in chunks. Off, or when traced by `vmap` or
            `grad`, all draws are one loop of static length, which reverse mode can run through.
        store: where the chains are kept between chunks.
        mesh: where the chains are dealt out.

    Returns:
        A `Chain` without `state`, whose leaves have leading axes `[component, chain]`.
    """
    finish = partial(unpack, num_components=len(component_ids), num_chains=plan.num_chains)
    posterior, sampler, recorder = put((_settle(posterior), sampler, recorder), mesh)
    lanes = make_lanes(key, restrictions, component_ids, plan, antithetic)
    lanes = put(pad_lanes(lanes, mesh, plan.chains_at_once), mesh, "chain")
    total = plan.num_burnin + plan.num_draws
    stage = (store or Store()).stage(
        label,
        total,
        final=lambda chains: chains._replace(state=()),
        lanes=len(component_ids) * plan.num_chains,
    )
    done, chains = stage.resume(
        partial(_start_all, posterior, sampler, recorder, lanes, plan, mesh), mesh
    )
    burn = partial(_burn_all, posterior, sampler)
    draw = partial(_draw_all, posterior, sampler, recorder)
    arguments = jax.tree.leaves((lanes, posterior, sampler, recorder))
    if not (progress or stage.saves) or not all(map(is_concrete, arguments)):
        chains = burn(chains, lanes, None, plan, mesh, (0, plan.num_burnin))
        chains = draw(chains, lanes, None, plan, mesh, (0, plan.num_draws))
        return fetch(finish(chains._replace(state=())), mesh)
    progress = progress and is_first_process()
    phases = ((burn, 0, plan.num_burnin, 1), (draw, plan.num_burnin, plan.num_draws, plan.thin))
    with tqdm(
        total=plan.num_steps, desc=label, unit="step", leave=False, disable=not progress
    ) as bar:
        for advance, before, total, thin in phases:
            bar.update(min(max(done - before, 0), total) * thin)
            size = max(1, -(-total * thin * _PROGRESS_CHUNKS // plan.num_steps))
            size = -(-total // size) if total else 1
            for start, stop in stage.chunks(max(done - before, 0), total, size):
                chains = advance(chains, lanes, loop_bounds(start, stop, mesh), plan, mesh)
                jax.block_until_ready(chains)
                bar.update((stop - start) * thin)
                stage.save(before + stop, chains)
    return fetch(finish(chains._replace(state=())), mesh)


def burn_in(
    lanes: Lane,
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    num_steps: int,
    *,
    num_lanes: int,
    label: str,
    store: Store | None,
    mesh: Mesh | None,
) -> PyTree[Array]:
    """The states of all lanes after some steps of their burn-in, on the mesh."""
    stage = (store or Store()).stage(label, num_steps, lanes=num_lanes)
    start_all = partial(_init_all, posterior, sampler, lanes, plan, mesh)
    done, chains = stage.resume(start_all, mesh)
    burn = partial(_burn_all, posterior, sampler)
    if not stage.saves and num_steps:
        return burn(chains, lanes, None, plan, mesh, (0, num_steps)).state
    for start, stop in stage.chunks(done, num_steps, num_steps):
        chains = burn(chains, lanes, loop_bounds(start, stop, mesh), plan, mesh)
        stage.save(stop, jax.block_until_ready(chains))
    return chains.state


def check_alive(
    alive: Bool[Array, "components chains"], names: tuple[str, ...], posterior: Posterior
) -> None:
    """The divergence rule: warn and name lost chains, raise where a component lost all."""
    if not is_concrete(alive) or bool(alive.all()):
        return
    lost = {
        name: [int(c) for c in jnp.flatnonzero(~row)]
        for name, row in zip(names, alive, strict=True)
        if not bool(row.all())
    }
    where = "; ".join(
        f"{name}: chains {chains}" if name else f"chains {chains}" for name, chains in lost.items()
    )
    if bool(alive.any(axis=1).all()):
        warnings.warn(
            f"chains turned non-finite and are left out of every estimate ({where}); "
            "a smaller step_size, a larger localization or a smaller nbeta keeps them",
            DivergenceWarning,
            stacklevel=3,
        )
        return
    losses = losses_in_chunks(posterior.loss_fn, posterior.params, posterior.data, 64)
    bad = jnp.flatnonzero(~jnp.isfinite(losses).reshape(len(losses), -1).all(axis=1))
    reason = (
        f"the loss is not finite at w* for samples {[int(i) for i in bad[:5]]} of data"
        if len(bad)
        else "take a smaller step_size, a larger localization or a smaller nbeta"
    )
    raise DivergenceError(f"all chains turned non-finite ({where}): {reason}")


def check_run(key: Any, posterior: Any, sampler: Any, plan: Any) -> None:
    """What every driver takes, checked before any sampling."""
    check_key(key)
    if not isinstance(posterior, Posterior):
        raise TypeError(
            f"posterior must come from localized_posterior, got {type(posterior).__name__}"
        )
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    check_number("posterior.nbeta", posterior.nbeta, minimum=0.0, exclusive=True)
    check_number("posterior.localization", posterior.localization, minimum=0.0)
    wanted = "a function Posterior -> SamplingAlgorithm, such as jp.sgld(step_size=1e-3)"
    check_function("sampler", sampler, wanted, num_arguments=1)
    if plan.batch_size is not None and plan.batch_size > posterior.num_samples:
        raise ValueError(
            f"plan.batch_size must be at most the {posterior.num_samples} samples of data, "
            f"got {plan.batch_size}"
        )

    def start(posterior: Posterior) -> tuple[Position, Position]:
        kernel = build_kernel(posterior, sampler, plan)
        return posterior.centre, position_of(kernel.init(posterior.centre, key))

    centre, position = jax.eval_shape(start, posterior)
    if jax.tree.structure(centre) != jax.tree.structure(position):  # type: ignore[operator]
        raise TypeError(
            "the state of the sampler must be the position, or have it as `position`; "
            f"wanted {jax.tree.structure(centre)}, got {jax.tree.structure(position)}"
        )


def write_draw(
    trace: Array, value: Array, *, draw: Int[Array, ""], alive: Bool[Array, ""]
) -> Array:
    """The trace with one draw written; NaN where the chain is lost."""
    return trace.at[draw].set(jnp.where(alive, value, jnp.nan))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class _Trace:
    """Records every draw of `observe(params)`."""

    observe: Callable[[Params], PyTree[Array]]

    def init(self, posterior: Posterior, plan: Plan) -> PyTree[Array]:
        shapes = jax.eval_shape(lambda p: _arrays(self.observe(p.embed(p.centre))), posterior)
        return jax.tree.map(lambda s: jnp.zeros((plan.num_draws, *s.shape), s.dtype), shapes)

    def value(
        self, posterior: Posterior, state: PyTree[Array], key: Key[Array, ""], plan: Plan
    ) -> PyTree[Array]:
        del key, plan
        return _arrays(self.observe(posterior.embed(position_of(state))))

    def update(
        self,
        accumulator: PyTree[Array],
        value: PyTree[Array],
        draw: Int[Array, ""],
        alive: Bool[Array, ""],
        plan: Plan,
    ) -> PyTree[Array]:
        del plan
        return jax.tree.map(partial(write_draw, draw=draw, alive=alive), accumulator, value)


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
        The pytree of `observe`, its leaves with leading axes `[chain, draw]`. Draws of a chain
        that diverged are NaN from there on, and a `DivergenceWarning` names it.

    Raises:
        DivergenceError: all chains diverged.
        CheckpointError: the folder belongs to another run, or cannot be used.
        Interrupted: a signal stopped a run with a folder, after it was saved.
        TypeError, ValueError: an argument does not fit.
    """
    check_run(key, posterior, sampler, plan)
    mesh = resolve_mesh(mesh)
    check_function("observe", observe, "a function of params", num_arguments=1)
    recorder = _Trace(as_pytree_function(observe))
    _check_trace(jax.eval_shape(lambda p: _arrays(observe(p.embed(p.centre))), posterior))
    with open_store(
        checkpoint, "sample", key=key, posterior=posterior, sampler=sampler, plan=plan,
        observe=observe,
    ) as store:  # fmt: skip
        chains = run_chains(
            key, posterior, as_pytree_function(sampler), plan, recorder,
            progress=progress, store=store, mesh=mesh,
        )  # fmt: skip
    check_alive(chains.alive, ("",), posterior)
    return jax.tree.map(lambda leaf: leaf[0], chains.accumulator)
