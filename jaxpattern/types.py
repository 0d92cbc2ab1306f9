"""Names for the pytrees that pass through the package."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array, Float, PyTree

Params: TypeAlias = PyTree
"""A pytree of floating-point arrays: the weights w."""

Position: TypeAlias = PyTree
"""What a chain moves: the weights, or the part of them that a restriction selects."""

Batch: TypeAlias = Any
"""A pytree of arrays with one leading sample axis."""

Losses: TypeAlias = Float[Array, "samples *tokens"]
"""Losses of a batch, `[B]` or `[B, T]`."""

LossFn: TypeAlias = Callable[[Params, Batch], Losses]
"""A pure function of weights and batch that returns one loss a sample or token, unreduced."""

Observable: TypeAlias = Callable[[Params], Float[Array, ""]]
"""A scalar function φ of the weights."""


class SamplingAlgorithm(NamedTuple):
    """A sampler on a posterior: init and step, in the shape of blackjax.

    Not its class itself: importing blackjax starts a backend of JAX, after which processes can no
    longer join (`jaxpattern.start`).
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
