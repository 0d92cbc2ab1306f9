"""The divergence rule: a chain that turns non-finite is frozen, left out, counted and named."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from jaxpattern.losses import is_counted, losses_in_chunks, steep_samples
from jaxpattern.posterior import Posterior
from jaxpattern.validation import is_concrete


class DivergenceWarning(UserWarning):
    """Some chains turned non-finite and were left out."""


class DivergenceError(FloatingPointError):
    """All chains of a component turned non-finite."""


def all_finite(tree: PyTree[Any]) -> Bool[Array, ""]:
    """Whether every number of a pytree is finite; what holds none is."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if leaf.size]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.asarray(True)


def lost_chains(trace: PyTree[Any]) -> Bool[np.ndarray, " chains"]:
    """Which chains of a trace `[chain, draw, ...]` are lost: their last draw is NaN everywhere."""
    last = [np.asarray(leaf)[:, -1] for leaf in jax.tree.leaves(trace)]
    return np.all([np.isnan(x.reshape(len(x), -1)).all(axis=1) for x in last], axis=0)


def check_alive(
    alive: Bool[Array | np.ndarray, "components chains"],
    names: tuple[str, ...],
    posterior: Posterior,
    states: PyTree[Any] = (),
) -> None:
    """The divergence rule: warn and name lost chains, raise where a component lost all.

    Args:
        alive: which chains stayed finite, and what they left.
        names: of the components.
        posterior: what was sampled.
        states: of chains that went on when what was made of them was not finite, `[component,
            chain, ...]`: where they are finite themselves, a derivative along them is not.

    Raises:
        DivergenceError: a component lost all its chains.
        FloatingPointError: their derivatives were not finite, and they are.
    """
    if not is_concrete(alive) or bool(np.asarray(alive).all()):
        return
    alive = np.asarray(alive)
    lost = {
        name: np.flatnonzero(~row).tolist()
        for name, row in zip(names, alive, strict=True)
        if not row.all()
    }
    where = "; ".join(
        f"{name}: chains {chains}" if name else f"chains {chains}" for name, chains in lost.items()
    )
    remedy = "a smaller step_size, a larger localization or a smaller nbeta keeps them"
    what = "chains turned non-finite"
    if _only_their_derivatives(alive, states):
        what = "the derivatives of chains are not finite although the chains are"
        remedy = (
            "an observable, a probe or the loss has an infinite slope, as a square root at 0 has, "
            "or is not finite; covariance() needs no slopes"
        )
    if bool(alive.any(axis=1).all()):
        warnings.warn(
            f"{what}; they are left out of every estimate ({where}): {remedy}",
            DivergenceWarning,
            stacklevel=3,
        )
        return
    if not what.startswith("chains"):
        raise FloatingPointError(f"{what} ({where}): {remedy}")
    raise DivergenceError(f"all chains turned non-finite ({where}): {_cause(posterior)}")


def _cause(posterior: Posterior) -> str:
    """What is not finite at w* already, or else what keeps chains together."""
    loss_fn, params, data = posterior.loss_fn, posterior.params, posterior.data
    rho = np.asarray(posterior.weights)
    losses = np.asarray(losses_in_chunks(loss_fn, params, data, 64))
    bad = np.flatnonzero(is_counted(np.where(np.isfinite(losses), 0, rho)))
    if len(bad):
        return f"the loss is not finite at w* for samples {bad[:5].tolist()} of data"
    counted = np.flatnonzero(is_counted(rho))
    steep = steep_samples(loss_fn, params, data, posterior.weights, counted)
    if len(steep):
        return (
            f"the gradient of the loss is not finite at w* for samples {steep[:5].tolist()} of "
            "data, as that of a square root at 0 is not; a weight of 0 excludes them"
        )
    return "take a smaller step_size, a larger localization or a smaller nbeta"


def _only_their_derivatives(alive: np.ndarray, states: PyTree[Any]) -> bool:
    """Whether the chains that are left out are finite themselves."""
    leaves = [leaf for leaf in jax.tree.leaves(states) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    finite = [np.isfinite(np.asarray(leaf)[~alive]).all() for leaf in leaves]
    return bool(finite) and all(finite)
