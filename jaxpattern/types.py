"""Names for the pytrees that pass through the package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Float, PyTree

Params: TypeAlias = PyTree
"""A pytree of floating-point arrays: the parameters w."""

Position: TypeAlias = PyTree
"""What a chain moves: the parameters, or the part of them that a restriction selects."""

Batch: TypeAlias = Any
"""A pytree of arrays with one leading sample axis."""

Losses: TypeAlias = Float[Array, "samples *tokens"]
"""Losses of a batch, `[B]` or `[B, T]`."""

LossFn: TypeAlias = Callable[[Params, Batch], Losses]
"""A pure function of parameters and batch that returns one loss per sample or token, unreduced."""

Observable: TypeAlias = Callable[[Params], Float[Array, ""]]
"""A function φ of the parameters, a scalar or `[K]`."""


class SamplingAlgorithm(NamedTuple):
    """A sampler on a posterior: init and step, in the shape of blackjax.

    Not its class itself: importing blackjax starts a backend of JAX, after which processes can no
    longer join (`jaxpattern.start`).
    """

    init: Callable[..., Any]
    step: Callable[..., Any]


def import_blackjax() -> Any:
    """blackjax, which computes when it is imported: not before it is used, nor within a trace.

    A backend of JAX that has started cannot be joined to other processes any more.
    """
    with jax.ensure_compile_time_eval():
        return importlib.import_module("blackjax")
