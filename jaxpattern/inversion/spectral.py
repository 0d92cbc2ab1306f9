"""The pseudo-inverse of a Gram matrix on its leading directions, with a derivative that is right.

Autodiff through an eigendecomposition divides by differences of eigenvalues, and is wrong where
two of them meet. The pseudo-inverse itself is smooth there, and so is the derivative below.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


def gram(
    matrix: Float[Array, "rows columns"], mass: Float[Array, " columns"]
) -> Float[Array, "rows rows"]:
    """G = A diag(q) Aᵀ."""
    return jnp.matmul(matrix * mass[None, :], matrix.T, precision=_HIGHEST)


def energies(
    matrix: Float[Array, "rows columns"], mass: Float[Array, " columns"]
) -> Float[Array, " rows"]:
    """The diagonal of G, Σ_j q_j A_kj²."""
    return jnp.sum(matrix**2 * mass[None, :], axis=1)


def unit_rows(diagonal: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """The factors 1/√G_kk that bring rows to unit length; 1 for a row of zeros."""
    positive = diagonal > 0
    return jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, diagonal, 1.0)), 1.0)


def widest(x: Array) -> Array:
    """The array in float64 where the backend has it enabled, else in its own precision."""
    return x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))


def rounding(num_rows: int, dtype: Any) -> float:
    """The share of a Gram matrix's largest eigenvalue below which one is zero up to rounding."""
    return 4 * max(num_rows, 4) * float(jnp.finfo(dtype).eps)


@jax.custom_jvp
def spectral_inverse(
    matrix: Float[Array, "rows rows"],
    rank: Int[Array, ""] | int,
    threshold: Float[Array, ""] | float,
) -> tuple[Float[Array, "rows rows"], Int[Array, ""]]:
    """V f(Λ) Vᵀ of a symmetric V Λ Vᵀ: f(λ) = 1/λ on the directions kept, 0 on the others.

    Kept are, of the `rank` leading directions, those with λ > `threshold` (an absolute number;
    one below the largest eigenvalue's rounding error is raised to that).

    Returns:
        The inverse, and the number of directions kept.
    """
    _, vectors, inverse = _leading_inverse(matrix, rank, threshold)
    product = jnp.matmul(vectors * inverse[None, :], vectors.T, precision=_HIGHEST)
    return product, jnp.sum(inverse > 0)


@spectral_inverse.defjvp
def _spectral_inverse_jvp(primals: Any, tangents: Any) -> Any:
    # Daleckii–Krein: with M = V Λ Vᵀ, d[V f(Λ) Vᵀ] = V (Φ ∘ Vᵀ dM V) Vᵀ, where Φ holds the divided
    # differences Φ_ij = (f_i − f_j) / (λ_i − λ_j). With f = 1/λ on kept directions, 0 on others:
    #   both kept      (1/λ_i − 1/λ_j) / (λ_i − λ_j) = −1 / (λ_i λ_j) = −f_i f_j,
    #   i kept, j not  f_i / (λ_i − λ_j),
    #   neither        0.
    # No term divides by the difference of two kept eigenvalues, which may be equal. Between kept
    # and dropped there is a gap wherever the function is differentiable at all. At λ_j = 0 these
    # are the terms of Golub & Pereyra (1973) for the derivative of a pseudo-inverse at constant
    # rank; a perturbation that raises the rank acts in neither × neither and is not seen.
    matrix, rank, threshold = primals
    direction = tangents[0]
    values, vectors, inverse = _leading_inverse(matrix, rank, threshold)
    kept = inverse > 0
    mixed = kept[:, None] ^ kept[None, :]
    gap = jnp.where(mixed, values[:, None] - values[None, :], 1.0)
    divided = jnp.where(
        mixed,
        (inverse[:, None] - inverse[None, :]) / gap,
        -inverse[:, None] * inverse[None, :],
    )
    symmetric = (direction + direction.T) / 2
    inner = jnp.linalg.multi_dot([vectors.T, symmetric, vectors], precision=_HIGHEST)
    tangent = jnp.linalg.multi_dot([vectors, divided * inner, vectors.T], precision=_HIGHEST)
    primal = spectral_inverse(matrix, rank, threshold)
    return primal, (tangent, np.zeros((), dtype=jax.dtypes.float0))


def _leading_inverse(
    matrix: Array, rank: Array | int, threshold: Array | float
) -> tuple[Array, ...]:
    """Eigenvalues, eigenvectors, and 1/λ on the directions kept."""
    values, vectors = jnp.linalg.eigh(matrix)
    size = matrix.shape[0]
    floor = jnp.maximum(threshold, rounding(size, matrix.dtype) * values[-1])
    kept = (jnp.arange(size) >= size - rank) & (values > floor)
    return values, vectors, jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
