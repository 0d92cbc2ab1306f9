"""Ways to invert χ: each is a function of the rows that returns s = ρ − 1 and its dual ν.

A method made here is a small pytree that can be called, whose leaves are its settings: it passes
through `jit` without compiling again for another ridge, and can be vmapped over one. A user's own
method is one file: any function, `Partial` of one, or pytree of the shape of `InversionMethod`.

In all of them A = nβ χ is K×N with rows of q-weighted mean zero, q the mass of the columns (sum 1),
and the weights ρ = 1 + s are to shift the rows by Σ_j q_j A_kj s_j = dμ_k with Σ_j q_j s_j = 0. The
ridge T is in units of G = A diag(q) Aᵀ, the energy with which rows respond. The noise energy of a
row is D_k = Σ_j q_j (nβ stderr_kj)².
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
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
from jaxpattern.pytrees import register_pytree
from jaxpattern.validation import check_count, check_number, is_concrete

_HIGHEST = jax.lax.Precision.HIGHEST

NOISE_SHARE = 0.1
"""The multiple of D that T is by default.

The measured Ĝ holds D on its diagonal already, so T = 0 shrinks as errors that are independent
from column to column deserve, and T = D shrinks twice. Errors that columns share, as those of
chains do, need more. Over simulated responses of both kinds (seven settings), the error of the
weights was at most 1.12 times that of the best ridge at 0.1, 1.2 at 0.3, 1.6 at 1 and 2.0 at 0.
"""


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
    """A function from the response of the rows and the wanted shift to a change of weights.

    Two attributes are asked for if it has them: `needs_noise`, a bool: standard errors of χ that
    are missing or all zero are refused; `check_rows(num_rows)`, which raises `ValueError` where
    its settings do not fit that many rows. Weights whose mean is not 1 are divided by it.
    """

    def __call__(
        self,
        matrix: Float[Array, "rows columns"],
        mass: Float[Array, " columns"],
        shift: Float[Array, " rows"],
        noise: Float[Array, " rows"],
        /,
    ) -> Solution:
        """s and ν for A, q, dμ and the noise energies D of the rows."""


class Penalty(NamedTuple):
    """T = max(τ + noise · D, eps^(2/3) G_kk); D counts as 0 where χ has no standard errors.

    Attributes:
        tau: τ.
        noise: multiple of D.
        required: whether standard errors that are missing are an error.
    """

    tau: Any
    noise: Any
    required: Any

    def diagonal(self, noise: Array, energy: Array) -> Array:
        known = jnp.where(jnp.isfinite(noise), noise, 0.0)
        return jnp.maximum(self.tau + self.noise * known, _least_penalty(energy))


def _penalty(tau: Any, noise: Any, *, required: bool = False) -> Penalty:
    """The settings all methods share: without either, T = `NOISE_SHARE` · D."""
    if tau is not None:
        check_number("tau", tau, minimum=0.0)
    if noise is not None:
        check_number("noise", noise, minimum=0.0)
        required = is_concrete(noise) and float(noise) > 0
    default = NOISE_SHARE if tau is None else 0.0
    return Penalty(
        tau=0.0 if tau is None else tau,
        noise=default if noise is None else noise,
        required=required and (noise is not None or tau is None),
    )


@register_pytree
@dataclass(frozen=True)
class _LeastNorm:
    def __call__(self, matrix: Array, mass: Array, shift: Array, noise: Array, /) -> Solution:
        energy = widest(gram(matrix, mass))
        size = energy.shape[0]
        # Independent rows have a plain inverse, found most exactly with the rows brought to unit
        # length: then no row is taken for rounding error because its units are small.
        unit = jax.lax.stop_gradient(unit_rows(jnp.diag(energy)))
        scaled, rank = spectral_inverse(unit[:, None] * energy * unit[None, :], size, 0.0)
        pseudo, _ = spectral_inverse(energy, size, 0.0)
        inverse = jnp.where(rank == size, unit[:, None] * scaled * unit[None, :], pseudo)
        return _linear(matrix, jnp.matmul(inverse, widest(shift), precision=_HIGHEST))


def least_norm() -> InversionMethod:
    """The smallest change that makes the shift: min Σ_j q_j s_j² s.t. Σ_j q_j A_kj s_j = dμ_k.

    s = Aᵀ G⁺ dμ with G = A diag(q) Aᵀ; with equal masses this is s = N A⁺ dμ. A shift outside the
    range of A is missed by the least squares of its rows. Directions whose eigenvalue is zero up
    to rounding are dropped; the derivative is that at constant rank.

    Returns:
        A method.

    References:
        Wang & Murfet 2026, arXiv 2601.13548.
    """
    return _LeastNorm()


@register_pytree
@dataclass(frozen=True)
class _TruncatedAtRank:
    rank: Any

    def check_rows(self, num_rows: int) -> None:
        if is_concrete(self.rank) and int(self.rank) > num_rows:
            raise ValueError(
                f"rank must be at most {num_rows}, the rows in the problem, got {self.rank}"
            )

    def __call__(self, matrix: Array, mass: Array, shift: Array, noise: Array, /) -> Solution:
        inverse, _ = spectral_inverse(widest(gram(matrix, mass)), self.rank, 0.0)
        return _linear(matrix, jnp.matmul(inverse, widest(shift), precision=_HIGHEST))


@register_pytree
@dataclass(frozen=True)
class _TruncatedAtNoise:
    threshold: Any

    @property
    def needs_noise(self) -> bool:
        return True

    def __call__(self, matrix: Array, mass: Array, shift: Array, noise: Array, /) -> Solution:
        energy = widest(gram(matrix, mass))
        size = energy.shape[0]
        # A row known better than rounding counts as known to rounding.
        least = rounding(size, matrix.dtype) * jax.lax.stop_gradient(jnp.diag(energy))
        unit = unit_rows(jnp.maximum(widest(noise), least))
        scaled = unit[:, None] * energy * unit[None, :]
        inverse, _ = spectral_inverse(scaled, size, self.threshold)
        return _linear(matrix, unit * jnp.matmul(inverse, unit * widest(shift), precision=_HIGHEST))


def truncated(
    *, rank: int | None = None, threshold: float | Float[Array, ""] = 1.0
) -> InversionMethod:
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
        return _TruncatedAtNoise(threshold)
    check_count("rank", rank, minimum=1)
    return _TruncatedAtRank(int(rank))


@register_pytree
@dataclass(frozen=True)
class _Ridge:
    penalty: Penalty

    @property
    def needs_noise(self) -> bool:
        return is_concrete(self.penalty.required) and bool(self.penalty.required)

    def __call__(self, matrix: Array, mass: Array, shift: Array, noise: Array, /) -> Solution:
        energy = gram(matrix, mass)
        penalty = self.penalty.diagonal(noise, jnp.diag(energy))
        return _linear(matrix, dual.solve_positive(energy + jnp.diag(penalty), shift))


def ridge(
    *positional: Any,
    tau: float | Float[Array, ""] | None = None,
    noise: float | Float[Array, ""] | None = None,
) -> InversionMethod:
    """Shrunken least norm: min Σ_j q_j s_j² + rᵀ T⁻¹ r, r the part of dμ that is not reached.

    s = Aᵀ (G + T)⁻¹ dμ with T = τI + noise · diag(D), D from χ's own standard errors. The default
    T = 0.1 D does not depend on the units of the rows. The measured G holds about D of noise
    itself, which shrinks too: the default is what errors shared by the columns need on top.

    Args:
        tau: τ ≥ 0, in units of G; raised to at least eps^(2/3) of G's diagonal.
        noise: multiple of the noise energy D; 0.1 without `tau`, else 0.

    Returns:
        A method.

    Raises:
        ValueError: `tau` or `noise` is negative; on use with noise, all standard errors are zero.

    References:
        Wang, Donoway & Murfet 2026, arXiv 2609.00699.
    """
    if positional:
        if len(positional) > 1 or tau is not None:
            raise TypeError(f"ridge takes tau and noise by keyword, got {positional!r}")
        warnings.warn("write ridge(tau=…): tau is a keyword", DeprecationWarning, stacklevel=2)
        tau = positional[0]
    return _Ridge(_penalty(tau, noise, required=True))


@register_pytree
@dataclass(frozen=True)
class _Box:
    lower: Any
    upper: Any
    penalty: Penalty

    @property
    def needs_noise(self) -> bool:
        return is_concrete(self.penalty.required) and bool(self.penalty.required)

    def __call__(self, matrix: Array, mass: Array, shift: Array, noise: Array, /) -> Solution:
        bounds = (jnp.asarray(x - 1.0, matrix.dtype) for x in (self.lower, self.upper))
        return _by_dual(dual.Box(*bounds), self.penalty, matrix, mass, shift, noise=noise)


def box(
    *,
    lower: float | Float[Array, ""] = 0.0,
    upper: float | Float[Array, ""] = jnp.inf,
    tau: float | Float[Array, ""] | None = None,
    noise: float | Float[Array, ""] | None = None,
) -> InversionMethod:
    """The smallest change within bounds: min ½ Σ_j q_j s_j² s.t. lower ≤ ρ ≤ upper and the shift.

    ρ_j = clip(1 + (Aᵀν)_j − c, lower, upper), c such that Σ_j q_j ρ_j = 1, with ν the minimizer of
    the dual (`dual_root`) under T = τI + noise · diag(D). A shift that no weights within the
    bounds make is approached as near as can be.

    Args:
        lower: smallest weight, at most 1.
        upper: largest weight, at least 1; may be infinite.
        tau: τ ≥ 0, in units of G; raised to at least eps^(2/3) of G's diagonal.
        noise: multiple of the noise energy D; 0.1 without `tau` where χ has standard errors,
            else 0.

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
    return _Box(lower, upper, _penalty(tau, noise))


@register_pytree
@dataclass(frozen=True)
class _Entropic:
    penalty: Penalty

    @property
    def needs_noise(self) -> bool:
        return is_concrete(self.penalty.required) and bool(self.penalty.required)

    def __call__(self, matrix: Array, mass: Array, shift: Array, noise: Array, /) -> Solution:
        return _by_dual(dual.Entropic(), self.penalty, matrix, mass, shift, noise=noise)


def entropic(
    *,
    tau: float | Float[Array, ""] | None = None,
    noise: float | Float[Array, ""] | None = None,
) -> InversionMethod:
    """The weights of least divergence: min Σ_j q_j ρ_j log ρ_j s.t. Σ_j q_j ρ_j = 1 and the shift.

    ρ_j = exp((Aᵀν)_j) / Σ_i q_i exp((Aᵀν)_i), positive and normalized by construction, with ν the
    minimizer of the dual (`dual_root`) under T = τI + noise · diag(D). A shift out of reach is
    approached as near as can be; the weights then gather on few columns, which the effective
    sample size shows and a larger T prevents. Far out of reach, where all weight goes to one
    column or two, `converged` may be false.

    Args:
        tau: τ ≥ 0, in units of G; raised to at least eps^(2/3) of G's diagonal.
        noise: multiple of the noise energy D; 0.1 without `tau` where χ has standard errors,
            else 0.

    Returns:
        A method.

    Raises:
        ValueError: `tau` or `noise` is negative; on use with `noise`, all standard errors are
            zero.
    """
    return _Entropic(_penalty(tau, noise))


def _by_dual(
    link: dual.Link, penalty: Penalty, matrix: Array, mass: Array, shift: Array, *, noise: Array
) -> Solution:
    diagonal = penalty.diagonal(noise, energies(matrix, mass)).astype(matrix.dtype)
    nu, converged = dual.dual_root(dual.DualProblem(link, matrix, mass, shift, diagonal))
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
