"""One step of a sampler as a smooth function of its state and of the gradient it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxpattern.chains.kernel import position_of
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.samplers import Sampler
from jaxpattern.types import Position


def given_step(
    sampler: Sampler,
    posterior: Posterior,
    key: Key[Array, ""],
    state: PyTree[Array],
    gradient: Position,
) -> PyTree[Array]:
    """K(s, g): a step of the sampler with g in the place of the gradient it asks for.

    Raises:
        TypeError: the step is not a function of one gradient at the position of its state, so that
            it cannot be differentiated this way.
    """
    given = _GivenGradient(posterior, position_of(state), [])
    try:
        new = sampler(given).step(key, state, gradient)
    except _Elsewhere as error:
        raise TypeError(_refusal(sampler, "it asks for one elsewhere")) from error
    except AttributeError as error:
        raise TypeError(_refusal(sampler, f"it asks for more than gradients ({error})")) from error
    if len(given.asked) != 1:
        raise TypeError(_refusal(sampler, f"its step takes {len(given.asked)} of them"))
    return new


class _Elsewhere(Exception):
    """A gradient was asked for away from the position of the state."""


def _refusal(sampler: Sampler, why: str) -> str:
    return (
        "pathwise differentiates samplers whose step takes one loss gradient, at the position of "
        f"its state; {sampler.name} does not: {why}. Use estimator=covariance()"
    )


@dataclass(frozen=True, eq=False)
class _GivenGradient:
    """A posterior whose loss gradient is what stands in the place of the mini-batch."""

    posterior: Posterior
    position: Position
    asked: list[None]

    @property
    def nbeta(self) -> Any:
        """nβ of the posterior."""
        return self.posterior.nbeta

    @property
    def localization(self) -> Any:
        """γ of the posterior."""
        return self.posterior.localization

    @property
    def center(self) -> Position:
        """The position of w*."""
        return self.posterior.center

    def minibatch(self, key: Key[Array, ""], size: int | None) -> Minibatch:
        """A mini-batch of the posterior."""
        return self.posterior.minibatch(key, size)

    def loss_gradient(self, position: Position, minibatch: Position) -> Position:
        """g, which holds at the position of the state and nowhere else."""
        here = jax.tree.leaves(self.position)
        there = jax.tree.leaves(position)
        if len(here) != len(there) or any(a is not b for a, b in zip(here, there, strict=True)):
            raise _Elsewhere
        self.asked.append(None)
        return minibatch

    def grad_estimator(self, position: Position, minibatch: Position) -> Position:
        """−nβ g − γ (w − w*)."""
        return self.posterior.drift(position, self.loss_gradient(position, minibatch))


class Floats(NamedTuple):
    """The floating-point leaves of a state, and how to put them back."""

    leaves: list[Array]
    rebuild: Callable[[list[Array]], PyTree[Array]]


def floats_of(state: PyTree[Array]) -> Floats:
    """What of a state can be differentiated; counters stay as they are."""
    leaves, treedef = jax.tree.flatten(state)
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def rebuild(floats: list[Array]) -> PyTree[Array]:
        values = iter(floats)
        merged = [next(values) if f else leaf for f, leaf in zip(inexact, leaves, strict=True)]
        return jax.tree.unflatten(treedef, merged)

    return Floats([leaf for leaf, f in zip(leaves, inexact, strict=True) if f], rebuild)
