"""One step of a sampler as a smooth function of its state and of the gradient it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.types import Position


@dataclass(frozen=True)
class GivenGradient:
    """A posterior whose loss gradient is what stands in the place of the mini-batch.

    `sampler(GivenGradient(posterior)).step(key, state, g)` is then the step K(state, g) itself,
    for any sampler that asks the posterior for one gradient a step.
    """

    posterior: Posterior

    @property
    def nbeta(self) -> Any:
        """nβ of the posterior."""
        return self.posterior.nbeta

    @property
    def localization(self) -> Any:
        """γ of the posterior."""
        return self.posterior.localization

    @property
    def centre(self) -> Position:
        """The position of w*."""
        return self.posterior.centre

    def minibatch(self, key: Key[Array, ""], size: int | None) -> Minibatch:
        """A mini-batch of the posterior."""
        return self.posterior.minibatch(key, size)

    def loss_gradient(self, position: Position, minibatch: Position) -> Position:
        """g."""
        del position
        return minibatch

    def grad_estimator(self, position: Position, minibatch: Position) -> Position:
        """−nβ g − γ (w − w*)."""
        return self.posterior.drift(position, minibatch)


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
