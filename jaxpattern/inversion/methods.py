"""Ways to invert χ: each is a function of the rows that returns s = ρ − 1 and its dual ν.

A method made here is a `jax.tree_util.Partial` whose leaves are its settings, so that it passes
through `jit` without compiling again for another ridge, and can be vmapped over one. A user's own
method is any hashable function, or `Partial` of one, of the shape of `InversionMethod`.

In all of them A = nβ χ is K×N, q the mass of the columns, and the weights ρ = 1 + s are to shift
the rows by Σ_j q_j A_kj s_j = dμ_k. The ridge T is in units of G = A diag(q) Aᵀ, the energy with
which rows respond. The noise energy of a row is D_k = Σ_j q_j (nβ stderr_kj)².
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from jaxpattern.inversion import dual
from jaxpattern.inversion.spectral import (
    energies,
    gram,
    rounding,
    spectral_inverse,
    unit_rows,
    widest,
)
from jaxpattern.validation import check_count, check_number, is_concrete

_HIGHEST = jax.lax.Precision.HIGHEST


class Solution(NamedTuple):
    """What a method returns.

    Attributes:
        change: s = ρ − 1.
        dual: ν, in units of one over those of A.
        converged: whether ν is the answer up to rounding.
    """

    change: Float[Array, " columns"]
    dual: Float[Array, " rows"]
    converged: Bool[Array, ""]


@runtime_checkable
class InversionMethod(Protocol):
    """A function from the response of the rows and the wanted shift to a change of weights."""

    def __call__(
        self,
        matrix: Float[Array, "rows columns"],
        mass: Float[Array, " columns"],
        shift: Float[Array, " rows"],
        noise: Float[Array, " rows"],
        /,
    ) -> Solution:
        """s and ν for A, q, dμ and the noise energies D of the rows."""


def least_norm() -> Partial:
    """The smallest change that makes the shift: min Σ_j q_j s_j² s.t. Σ_j q_j A_kj s_j = dμ_k.

    s = Aᵀ G⁺ dμ with G = A diag(q) Aᵀ; with equal masses this is s = N A⁺ dμ. A shift outside the
    range of A is missed by the least squares of its rows. Directions whose eigenvalue is zero up
    to rounding are dropped; the derivative is that at constant rank.

    Returns:
        A method.

    References:
        Wang & Murfet 2026, arXiv 2601.13548.
    """
    return Partial(_least_norm)


def _least_norm(matrix: Array, mass: Array, shift: Array, noise: Array) -> Solution:
    energy = widest(gram(matrix, mass))
    size = energy.shape[0]
    # Independent rows have a plain inverse, found most exactly with the rows brought to unit
    # length: then no row is taken for rounding error because its units are small.
    unit = jax.lax.stop_gradient(unit_rows(jnp.diag(energy)))
    scaled, rank = spectral_inverse(unit[:, None] * energy * unit[None, :], size, 0.0)
    pseudo, _ = spectral_inverse(energy, size, 0.0)
    inverse = jnp.where(rank == size, unit[:, None] * scaled * unit[None, :], pseudo)
    return _linear(matrix, jnp.matmul(inverse, widest(shift), precision=_HIGHEST))


def truncated(*, rank: int | None = None, threshold: float | Float[Array, ""] = 1.0) -> Partial:
    """The least-norm change made of the leading directions only.

    With `rank`, s = Aᵀ V_r Λ_r⁻¹ V_rᵀ dμ of the leading eigenvectors of G. Without, rows are first
    brought to unit noise, Ĝ = D^{−1/2} G D^{−1/2}, and of its directions those are kept whose
    eigenvalue exceeds `threshold`: s = Aᵀ D^{−1/2} V f(Λ) Vᵀ D^{−1/2} dμ, which does not depend on
    the units of the rows. A direction of pure noise has an eigenvalue of about 1.

    Args:
        rank: number of directions to keep, 1 to the number of rows in the problem.
        threshold: smallest eigenvalue kept, in units of the noise energy; unused with `rank`.

    Returns:
        A method.

    Raises:
        ValueError: `rank` is below 1 or `threshold` negative; on use, `rank` exceeds the number
            of rows, or standard errors are needed and all zero.
    """
    if rank is None:
        check_number("threshold", threshold, minimum=0.0)
        return Partial(_truncated_at_noise, threshold=threshold)
    check_count("rank", rank, minimum=1)
    return Partial(_truncated_at_rank, rank=int(rank))


def _truncated_at_rank(
    matrix: Array, mass: Array, shift: Array, noise: Array, *, rank: Any
) -> Solution:
    inverse, _ = spectral_inverse(widest(gram(matrix, mass)), rank, 0.0)
    return _linear(matrix, jnp.matmul(inverse, widest(shift), precision=_HIGHEST))


def _truncated_at_noise(
    matrix: Array, mass: Array, shift: Array, noise: Array, *, threshold: Any
) -> Solution:
    energy = widest(gram(matrix, mass))
    size = energy.shape[0]
    # A row known better than rounding counts as known to rounding.
    least = rounding(size, matrix.dtype) * jax.lax.stop_gradient(jnp.diag(energy))
    unit = unit_rows(jnp.maximum(widest(noise), least))
    inverse, _ = spectral_inverse(unit[:, None] * energy * unit[None, :], size, threshold)
    return _linear(matrix, unit * jnp.matmul(inverse, unit * widest(shift), precision=_HIGHEST))


def ridge(tau: float | Float[Array, ""] | None = None) -> Partial:
    """Shrunken least norm: min Σ_j q_j s_j² + rᵀ T⁻¹ r, r the part of dμ that is not reached.

    s = Aᵀ (G + T)⁻¹ dμ, with T = τI, or without `tau` T = diag(D) from χ's own standard errors.
    The automatic T does not depend on the units of the rows, and shrinks by half a direction
    whose signal has no more energy than its noise.

    Args:
        tau: τ ≥ 0, in units of G; raised to at least eps^(2/3) of G's diagonal.

    Returns:
        A method.

    Raises:
        ValueError: `tau` is negative; on use without `tau`, all standard errors are zero.

    References:
        Wang, Donoway & Murfet 2026, arXiv 2609.00699.
    """
    if tau is None:
        return Partial(_ridge_at_noise)
    check_number("tau", tau, minimum=0.0)
    return Partial(_ridge, tau=tau)


def _ridge_at_noise(matrix: Array, mass: Array, shift: Array, noise: Array) -> Solution:
    return _ridge_solution(matrix, mass, shift, noise)


def _ridge(matrix: Array, mass: Array, shift: Array, noise: Array, *, tau: Any) -> Solution:
    return _ridge_solution(matrix, mass, shift, jnp.full_like(shift, tau))


def _ridge_solution(matrix: Array, mass: Array, shift: Array, penalty: Array) -> Solution:
    energy = gram(matrix, mass)
    penalty = jnp.maximum(penalty, _least_penalty(jnp.diag(energy)))
    return _linear(matrix, dual.solve_positive(energy + jnp.diag(penalty), shift))


def box(
    *,
    lower: float | Float[Array, ""] = 0.0,
    upper: float | Float[Array, ""] = jnp.inf,
    tau: float | Float[Array, ""] | None = None,
    noise: float | Float[Array, ""] = 0.0,
) -> Partial:
    """The smallest change within bounds: min ½ Σ_j q_j s_j² s.t. lower ≤ ρ ≤ upper and the shift.

    ρ_j = clip(1 + (Aᵀν)_j, lower, upper), with ν the minimiser of the dual (`dual_root`) under
    T = τI + noise · diag(D). A shift that no weights within the bounds make is approached as near
    as can be, rows measured in units of their own response √G_kk where T is left to its default.

    Args:
        lower: smallest weight, at most 1.
        upper: largest weight, at least 1; may be infinite.
        tau: τ ≥ 0, in units of G; raised to at least eps^(2/3) of G's diagonal, the default.
        noise: multiple of the noise energy D to add to T; 1 shrinks as `ridge()` does.

    Returns:
        A method.

    Raises:
        ValueError: bounds are not lower ≤ 1 ≤ upper with lower < upper, or `tau` or `noise` is
            negative; on use with `noise`, all standard errors are zero.
    """
    for name, bound in {"lower": lower, "upper": upper}.items():
        if isinstance(bound, str | bytes) or jnp.ndim(bound) != 0:
            raise TypeError(f"{name} must be a number, got {bound!r}")
    if is_concrete(lower) and is_concrete(upper) and not lower < upper:
        raise ValueError(f"lower must be below upper, got lower={lower:g}, upper={upper:g}")
    if is_concrete(lower) and lower > 1:
        raise ValueError(f"lower must be at most 1, the weight of unchanged data, got {lower:g}")
    if is_concrete(upper) and upper < 1:
        raise ValueError(f"upper must be at least 1, the weight of unchanged data, got {upper:g}")
    return Partial(_box, lower=lower, upper=upper, **_penalties(tau, noise))


def _box(
    matrix: Array,
    mass: Array,
    shift: Array,
    noise: Array,
    *,
    lower: Any,
    upper: Any,
    **penalties: Any,
) -> Solution:
    bounds = (jnp.asarray(bound - 1.0, matrix.dtype) for bound in (lower, upper))
    link = dual.Box(*bounds)
    return _by_dual(link, matrix, mass, shift, noise, **penalties)


def entropic(
    *,
    tau: float | Float[Array, ""] | None = None,
    noise: float | Float[Array, ""] = 0.0,
) -> Partial:
    """The weights of least divergence: min Σ_j q_j ρ_j log ρ_j s.t. Σ_j q_j ρ_j = 1 and the shift.

    ρ_j = exp((Aᵀν)_j) / Σ_i q_i exp((Aᵀν)_i), positive and normalised by construction, with ν the
    minimiser of the dual (`dual_root`) under T = τI + noise · diag(D). A shift out of reach is
    approached as near as can be; the weights then gather on few columns, which the effective
    sample size shows and a larger T prevents. Far out of reach, where all weight goes to one
    column or two, `converged` may be false.

    Args:
        tau: τ ≥ 0, in units of G; raised to at least eps^(2/3) of G's diagonal, the default.
        noise: multiple of the noise energy D to add to T; 1 shrinks as `ridge()` does.

    Returns:
        A method.

    Raises:
        ValueError: `tau` or `noise` is negative; on use with `noise`, all standard errors are
            zero.
    """
    return Partial(_entropic, **_penalties(tau, noise))


def _entropic(matrix: Array, mass: Array, shift: Array, noise: Array, **penalties: Any) -> Solution:
    return _by_dual(dual.Entropic(), matrix, mass, shift, noise, **penalties)


def _penalties(tau: Any, noise: Any) -> dict[str, Any]:
    if tau is not None:
        check_number("tau", tau, minimum=0.0)
    check_number("noise", noise, minimum=0.0)
    return {"tau": 0.0 if tau is None else tau, "noise_share": noise}


def _by_dual(
    link: dual.Link,
    matrix: Array,
    mass: Array,
    shift: Array,
    noise: Array,
    *,
    tau: Any,
    noise_share: Any,
) -> Solution:
    noise = noise_share * jnp.where(noise_share > 0, noise, 0.0)
    least = _least_penalty(energies(matrix, mass))
    penalty = jnp.maximum(tau + noise, least).astype(matrix.dtype)
    problem = dual.Problem(link, matrix, mass, shift, penalty)
    nu, converged = dual.dual_root(problem)
    field = jnp.matmul(nu, matrix, precision=_HIGHEST)
    return Solution(link.change(field, mass), nu, converged)


def _least_penalty(energy: Array) -> Array:
    """The smallest T used, eps^(2/3) of G's diagonal: it keeps ν unique where rows depend.

    A row's ν then stays below eps^(−2/3), and its rounding error below eps^(1/3), while a target
    in reach loses a share of eps^(2/3) times the condition number of the rows.
    """
    share = float(jnp.finfo(energy.dtype).eps) ** (2 / 3)
    least: Array = jax.lax.stop_gradient(share / unit_rows(energy) ** 2)
    return least


def _linear(matrix: Array, nu: Array) -> Solution:
    """s = Aᵀν."""
    nu = nu.astype(matrix.dtype)
    change = jnp.matmul(nu, matrix, precision=_HIGHEST)
    return Solution(change, nu, jnp.all(jnp.isfinite(nu)))


METHODS_OF_NOISE = (_ridge_at_noise, _truncated_at_noise)
"""The methods that cannot do without standard errors."""
