"""Quadratic losses under a Gaussian localization: the posterior, χ and the response, exactly.

p(w) ∝ exp(−nβ L(w) − γ/2 ‖w − w*‖²) with L = Σ_j ρ_j ℓ_j / Σ_j ρ_j is N(m, Σ), where
Σ = (nβ H + γ I)⁻¹ and m = Σ (γ w* − nβ g) for L(w) = ½ wᵀHw + gᵀw + const. A restricted posterior
holds some coordinates at w*: there m = w* and Σ = 0, so the same moment formulas serve both.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


class Quadratic(NamedTuple):
    """A stack of quadratics ½ wᵀAw + aᵀw + k: `hessian [N,d,d]`, `slope [N,d]`, `constant [N]`."""

    hessian: Array
    slope: Array
    constant: Array


class Posterior(NamedTuple):
    """A Gaussian, `mean [d]` and `covariance [d,d]`; held coordinates have zero covariance."""

    mean: Array
    covariance: Array


def quadratics(
    hessians: Array,
    centres: Array,
    *,
    constants: Array | None = None,
    linear: Array | None = None,
) -> Quadratic:
    """The stack ℓ_z(w) = ½ (w − c_z)ᵀ A_z (w − c_z) + b_zᵀ w + k_z in monomial form."""
    moved = np.einsum("nij,nj->ni", hessians, centres)
    constant = 0.5 * np.einsum("ni,ni->n", centres, moved)
    slope = -moved if linear is None else linear - moved
    return Quadratic(hessians, slope, constant if constants is None else constant + constants)


def evaluate(functions: Quadratic, weights: Array) -> Array:
    """Values `[N]` of the stack at one point `[d]`."""
    quadratic = np.einsum("i,nij,j->n", weights, functions.hessian, weights)
    return 0.5 * quadratic + functions.slope @ weights + functions.constant


def mean_loss(losses: Quadratic, data_weights: Array | None = None) -> Quadratic:
    """L = Σ ρ ℓ / Σ ρ, as a stack of one."""
    rho = np.ones(len(losses.constant)) if data_weights is None else data_weights
    share = rho / rho.sum()
    return Quadratic(*(np.tensordot(share, part, 1)[None] for part in losses))


def relative_losses(losses: Quadratic, data_weights: Array | None = None) -> Quadratic:
    """D_z = ℓ_z − L."""
    mean = mean_loss(losses, data_weights)
    return Quadratic(*(part - middle for part, middle in zip(losses, mean, strict=True)))


def excess_loss(losses: Quadratic, centre: Array, data_weights: Array | None = None) -> Quadratic:
    """The standard observable φ = L − L(w*), as a stack of one."""
    mean = mean_loss(losses, data_weights)
    return mean._replace(constant=mean.constant - evaluate(mean, centre))


def posterior(
    losses: Quadratic,
    centre: Array,
    *,
    nbeta: float,
    localization: float,
    data_weights: Array | None = None,
    free: Indices | None = None,
) -> Posterior:
    """The localized Gibbs posterior; with `free`, the other coordinates are held at w*."""
    mean = mean_loss(losses, data_weights)
    hessian, slope = mean.hessian[0], mean.slope[0]
    index = np.arange(centre.size) if free is None else free
    precision = nbeta * hessian[np.ix_(index, index)] + localization * np.eye(index.size)
    gradient = nbeta * (hessian @ centre + slope)[index]
    location, covariance = centre.copy(), np.zeros((centre.size, centre.size))
    location[index] -= np.linalg.solve(precision, gradient)
    covariance[np.ix_(index, index)] = np.linalg.inv(precision)
    return Posterior(location, covariance)


def expectation(functions: Quadratic, gaussian: Posterior) -> Array:
    """⟨φ⟩ = φ(m) + ½ tr(AΣ), `[K]`."""
    spread = np.einsum("nij,ji->n", functions.hessian, gaussian.covariance)
    return evaluate(functions, gaussian.mean) + 0.5 * spread


def quadratic_covariance(first: Quadratic, second: Quadratic, gaussian: Posterior) -> Array:
    """Cov[φ, ψ] = (Am + a)ᵀ Σ (Bm + b) + ½ tr(AΣBΣ), `[K, N]`."""
    sigma = gaussian.covariance
    first_gradient = first.hessian @ gaussian.mean + first.slope
    second_gradient = second.hessian @ gaussian.mean + second.slope
    first_hessian, second_hessian = first.hessian @ sigma, second.hessian @ sigma
    linear = first_gradient @ sigma @ second_gradient.T
    return linear + 0.5 * np.einsum("kij,nji->kn", first_hessian, second_hessian)


def susceptibility(
    observables: Quadratic,
    losses: Quadratic,
    centre: Array,
    *,
    nbeta: float,
    localization: float,
    data_weights: Array | None = None,
    free: Indices | None = None,
) -> Array:
    """χ_z(φ) = −Cov[φ, ℓ_z − L], `[K, N]`; with `free`, the centred form of a component."""
    gaussian = posterior(
        losses,
        centre,
        nbeta=nbeta,
        localization=localization,
        data_weights=data_weights,
        free=free,
    )
    return -quadratic_covariance(observables, relative_losses(losses, data_weights), gaussian)


def hybrid_susceptibility(
    observables: Quadratic,
    losses: Quadratic,
    centre: Array,
    *,
    nbeta: float,
    localization: float,
    free: Indices,
    data_weights: Array | None = None,
) -> Array:
    """−(E_C[φ D_z] − E_C[φ] E_full[D_z]), `[K, N]`: restricted moments, full mean of D_z."""
    restricted, full = (
        posterior(
            losses,
            centre,
            nbeta=nbeta,
            localization=localization,
            data_weights=data_weights,
            free=index,
        )
        for index in (free, None)
    )
    relative = relative_losses(losses, data_weights)
    mean = expectation(observables, restricted)[:, None]
    product = quadratic_covariance(observables, relative, restricted)
    product = product + mean * expectation(relative, restricted)
    return -(product - mean * expectation(relative, full))


def response(
    observables: Quadratic,
    losses: Quadratic,
    centre: Array,
    *,
    nbeta: float,
    localization: float,
    data_weights: Array | None = None,
    free: Indices | None = None,
) -> Array:
    """⟨φ⟩ at the weights ρ, `[K]`: differences of it are the finite response."""
    gaussian = posterior(
        losses,
        centre,
        nbeta=nbeta,
        localization=localization,
        data_weights=data_weights,
        free=free,
    )
    return expectation(observables, gaussian)


def weight_derivative(
    observables: Quadratic,
    losses: Quadratic,
    centre: Array,
    *,
    nbeta: float,
    localization: float,
    data_weights: Array | None = None,
    free: Indices | None = None,
) -> Array:
    """∂⟨φ⟩/∂ρ_m = −(nβ / Σρ) Cov[φ, ℓ_m − L] at fixed φ, `[K, N]`."""
    total = len(losses.constant) if data_weights is None else data_weights.sum()
    chi = susceptibility(
        observables,
        losses,
        centre,
        nbeta=nbeta,
        localization=localization,
        data_weights=data_weights,
        free=free,
    )
    return nbeta / total * chi


def llc_weight_derivative(
    losses: Quadratic,
    centre: Array,
    *,
    nbeta: float,
    localization: float,
    data_weights: Array | None = None,
    free: Indices | None = None,
) -> tuple[Array, Array]:
    """The two parts of ∂λ̂/∂ρ_m, each `[N]`: at fixed φ, and the direct term.

    Fixed: −((nβ)² / Σρ) Cov[L, ℓ_m − L]. Direct: (nβ / Σρ) (⟨ℓ_m − L⟩ − (ℓ_m − L)(w*)).
    """
    total = len(losses.constant) if data_weights is None else data_weights.sum()
    gaussian = posterior(
        losses,
        centre,
        nbeta=nbeta,
        localization=localization,
        data_weights=data_weights,
        free=free,
    )
    relative = relative_losses(losses, data_weights)
    covariance = quadratic_covariance(mean_loss(losses, data_weights), relative, gaussian)[0]
    direct = expectation(relative, gaussian) - evaluate(relative, centre)
    return -(nbeta**2) / total * covariance, nbeta / total * direct
