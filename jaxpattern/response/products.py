"""Hessian products: where a chain's derivative meets second derivatives of the loss."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxpattern.types import Position


def hessian_products(
    gradient: Callable[[Position], Position], at: Position, directions: Position
) -> Position:
    """∇²L(w) v of every direction v, `[K, ...]`, from the gradient of the loss.

    One forward-mode derivative for each v, which shares the gradient itself and keeps nothing of a
    pass for the next: what `jax.linearize` keeps would grow with the samples.
    """
    return jax.vmap(lambda v: jax.jvp(gradient, (at,), (v,))[1])(directions)
