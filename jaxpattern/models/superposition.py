"""The toy model of superposition, with its population loss in closed form.

Features x ∈ R^c pass through a bottleneck of m < c dimensions, x̂ = ReLU(WᵀW x + b). One feature i
is active at a time, with probability p_i and size u ~ U[0, 1]. With a_ji = W_j·W_i the expected
squared error given that i is active needs no sampling:

    ℓ_i = 1/3 − 2 J(a_ii, b_i) + I(a_ii, b_i) + Σ_{j≠i} I(a_ji, b_j)
    I(a, b) = ∫₀¹ ReLU(au + b)² du,    J(a, b) = ∫₀¹ u ReLU(au + b) du

and the population loss is L = Σ_i p_i ℓ_i. One *sample* is an active feature, so the mixture p is
the data, and susceptibilities to it are free of data noise.

Source: Chen, Lau, Mendel, Wei & Murfet 2023, arXiv 2310.06301.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpattern.validation import check_count, check_key, check_number

_SMALLEST_SLOPE = 1e-12

# Squared radius and bias of least loss for one corner of a k-gon; both derivatives vanish here.
_CORNERS = {
    5: (1.3699757667570207, -0.28229728312677194),
    6: (1.7437897902832034, -0.6181351318682151),
    7: (2.0978444561384393, -0.9669063393796629),
    8: (2.4038942414048488, -1.291192644692491),
    9: (2.6150474977565090, -1.5423209213697027),
}


def _segment(a: Array, b: Array) -> tuple[Array, Array, Array, Array]:
    """Where the line au + b crosses 0 in [0, 1]: (rises through it, falls through it, a, b/a).

    The slope is replaced by 1 where the line does not cross, and b/a by 0, so that no branch that
    is not taken divides by zero. Where it does cross, |b/a| ≤ 1. Crossings flatter than 1e-12
    count as none, which changes the integrals by less than 1e-12.
    """
    steep = jnp.abs(a) > _SMALLEST_SLOPE
    rises = steep & (b <= 0) & (a + b > 0)
    falls = steep & (b > 0) & (a + b <= 0)
    slope = jnp.where(rises | falls, a, 1.0)
    return rises, falls, slope, jnp.where(rises | falls, b, 0.0) / slope


def relu_square_integral(a: Float[Array, "*s"], b: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """I(a, b) = ∫₀¹ ReLU(au + b)² du = (ReLU(a+b)³ − ReLU(b)³) / 3a, also at a = 0.

    The quotient is never formed: it is b² + ab + a²/3 if the line stays above 0, (a+b)² (1 + b/a)/3
    if it rises through 0, −b² (b/a)/3 if it falls through 0, and else 0.

    Args:
        a: slopes.
        b: intercepts, same shape.

    Returns:
        The integrals, same shape; twice differentiable almost everywhere, never NaN.
    """
    rises, falls, _, ratio = _segment(a, b)
    above = (b > 0) & ~falls
    square = b * b + a * b + a * a / 3
    crossing = jnp.where(rises, jnp.square(a + b) * (1 + ratio) / 3, -b * b * ratio / 3)
    return jnp.where(above, square, jnp.where(rises | falls, crossing, 0.0))


def relu_product_integral(a: Float[Array, "*s"], b: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """J(a, b) = ∫₀¹ u ReLU(au + b) du, in the same four cases.

    a/3 + b/2 if the line stays above 0, (1 + b/a)² (2a − b)/6 if it rises through 0, b (b/a)²/6 if
    it falls through 0, and else 0.

    Args:
        a: slopes.
        b: intercepts, same shape.

    Returns:
        The integrals, same shape; twice differentiable almost everywhere, never NaN.
    """
    rises, falls, _, ratio = _segment(a, b)
    above = (b > 0) & ~falls
    crossing = jnp.where(rises, jnp.square(1 + ratio) * (2 * a - b) / 6, b * jnp.square(ratio) / 6)
    return jnp.where(above, a / 3 + b / 2, jnp.where(rises | falls, crossing, 0.0))


def feature_losses(params: Mapping[str, Array]) -> Float[Array, " c"]:
    """ℓ_i of every feature: the expected squared error while feature i alone is active.

    Args:
        params: `{"W": [m, c], "b": [c]}`.

    Returns:
        Losses `[c]`; the population loss of a mixture p is `p @ feature_losses(params)`.
    """
    w_MxC, b_C = params["W"], params["b"]
    a_CxC = jnp.matmul(w_MxC.T, w_MxC, precision=jax.lax.Precision.HIGHEST)
    own_C = jnp.diagonal(a_CxC)
    bias_CxC = jnp.broadcast_to(b_C[:, None], a_CxC.shape)
    squares_C = jnp.sum(relu_square_integral(a_CxC, bias_CxC), axis=0)
    return 1 / 3 - 2 * relu_product_integral(own_C, b_C) + squares_C


def loss_fn(params: Mapping[str, Array], features: Int[Array, " B"]) -> Float[Array, " B"]:
    """The closed loss ℓ_i of each active feature i of a batch.

    Args:
        params: `{"W": [m, c], "b": [c]}`.
        features: index of the active feature of each sample, `[B]`.

    Returns:
        Losses `[B]`; a feature outside 0 … c − 1 gives NaN.
    """
    return feature_losses(params).at[features].get(mode="fill", fill_value=jnp.nan)


def init(key: Array, *, num_features: int, num_dimensions: int = 2) -> dict[str, Array]:
    """Random weights W ~ N(0, 1/m), b = 0.

    Args:
        key: typed random key.
        num_features: c.
        num_dimensions: m.

    Returns:
        `{"W": [m, c], "b": [c]}`, float32.
    """
    check_key(key)
    check_count("num_features", num_features, minimum=1)
    check_count("num_dimensions", num_dimensions, minimum=1)
    weights = jax.random.normal(key, (num_dimensions, num_features)) * num_dimensions**-0.5
    return {"W": weights, "b": jnp.zeros(num_features)}


def polygon(k: int, c: int, *, unused_bias: float = 0.0) -> dict[str, Array]:
    """The k-gon: features 0 … k − 1 at the corners of a regular polygon, the others at 0.

    A critical point of L for uniform features in the plane: corners at radius √s with bias β where
    the loss of one corner, 1/3 − 2 J(s, β) + Σ_{j<k} I(s cos 2πj/k, β), is least. Up to k = 4 that
    is s = 1, β = 0, without loss. An unused feature has loss 1/3; an output that is always on, at
    `unused_bias` = 1/2c, lowers L by 1/4c² for each of them.

    Args:
        k: number of corners, from 1 to 9 and at most c.
        c: number of features.
        unused_bias: b_j of the features that are not represented.

    Returns:
        `{"W": [2, c], "b": [c]}`, float32.
    """
    check_count("k", k, minimum=1)
    check_count("c", c, minimum=1)
    if k > min(c, 9):
        raise ValueError(f"k must be at most 9 and at most c = {c}, got {k}")
    check_number("unused_bias", unused_bias, minimum=-jnp.inf, exclusive=True)
    square, bias = _CORNERS.get(k, (1.0, 0.0))
    angle = 2 * jnp.pi * jnp.arange(k) / k
    corners = square**0.5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    weights = jnp.zeros((2, c)).at[:, :k].set(corners)
    return {"W": weights, "b": jnp.full(c, unused_bias).at[:k].set(bias)}
