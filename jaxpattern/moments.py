"""Streaming co-moments of a few numbers with many, exact under merging, O(K·N) memory.

Welford's update and Chan's merge keep centred sums, so that a covariance of 1e-6 between losses
of size 3 survives float32 (the textbook E[ab] − E[a]E[b] does not). References: Welford 1962;
Chan, Golub & LeVeque 1983.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class Moments(NamedTuple):
    """Total weight of the draws, means, and Σ (a − ā)(b − b̄)ᵀ of a `[K]` with a tree b."""

    weight: Float[Array, ""]
    mean_a: Float[Array, " rows"]
    mean_b: PyTree[Float[Array, "..."]]
    comoment: PyTree[Float[Array, "rows ..."]]


def init(a: Float[Array, " rows"], b: PyTree[Float[Array, "..."]]) -> Moments:
    """Moments of no draws, for values of these shapes."""
    return Moments(
        weight=jnp.zeros((), a.dtype),
        mean_a=jnp.zeros_like(a),
        mean_b=jax.tree.map(jnp.zeros_like, b),
        comoment=jax.tree.map(lambda leaf: jnp.zeros((*a.shape, *leaf.shape), leaf.dtype), b),
    )


def update(
    moments: Moments,
    a: Float[Array, " rows"],
    b: PyTree[Float[Array, "..."]],
    weight: Float[Array, ""] | float = 1.0,
) -> Moments:
    """One more draw: n' = n + w, ā' = ā + (w/n')(a − ā), C' = C + w (a − ā)(b − b̄')ᵀ.

    A draw of weight 0 changes nothing, whatever its values.
    """
    count = moments.weight + weight
    share = jnp.where(weight > 0, weight / jnp.maximum(count, 1e-30), 0.0)
    keep = weight > 0
    delta_a = jnp.where(keep, a - moments.mean_a, 0.0)
    delta_b = jax.tree.map(lambda x, mean: jnp.where(keep, x - mean, 0.0), b, moments.mean_b)
    return Moments(
        weight=count,
        mean_a=moments.mean_a + share * delta_a,
        mean_b=jax.tree.map(lambda mean, d: mean + share * d, moments.mean_b, delta_b),
        comoment=jax.tree.map(
            lambda c, d: c + outer(weight * (1 - share) * delta_a, d), moments.comoment, delta_b
        ),
    )


def merge(left: Moments, right: Moments) -> Moments:
    """Moments of both sets of draws: C = C₁ + C₂ + (n₁n₂/n)(ā₂ − ā₁)(b̄₂ − b̄₁)ᵀ."""
    count = left.weight + right.weight
    share = right.weight / jnp.maximum(count, 1e-30)
    delta_a = right.mean_a - left.mean_a
    delta_b = jax.tree.map(jnp.subtract, right.mean_b, left.mean_b)
    return Moments(
        weight=count,
        mean_a=left.mean_a + share * delta_a,
        mean_b=jax.tree.map(lambda mean, d: mean + share * d, left.mean_b, delta_b),
        comoment=jax.tree.map(
            lambda c1, c2, d: c1 + c2 + outer(left.weight * share * delta_a, d),
            left.comoment,
            right.comoment,
            delta_b,
        ),
    )


def finalize(moments: Moments) -> PyTree[Float[Array, "rows ..."]]:
    """The unbiased covariance of independent draws, C / (n − 1)."""
    return jax.tree.map(lambda c: c / (moments.weight - 1), moments.comoment)


def outer(a: Float[Array, " rows"], b: Float[Array, "*columns"]) -> Float[Array, "rows *columns"]:
    """a ⊗ b."""
    return a.reshape(a.shape + (1,) * b.ndim) * b[None]
