"""Unadjusted Langevin steps of size ε on a quadratic, exactly.

w ← w − (ε/2)[nβ ∇L_B(w) + γ(w − w*)] + √ε ξ is, on a quadratic, a linear recursion with matrix
F = I − (ε/2)P, P = nβ H + γ I, and noise ε I + (ε nβ / 2)² C / m for per-sample gradient covariance
C and batch size m drawn with replacement.
"""

import numpy as np
import numpy.typing as npt
from scipy import linalg

from . import gaussian

Array = npt.NDArray[np.float64]


def stationary_variance(
    curvature: npt.ArrayLike,
    *,
    nbeta: float,
    localization: float,
    step_size: float,
    gradient_variance: npt.ArrayLike = 0.0,
    batch_size: int = 1,
) -> Array:
    """P⁻¹ (1 + ε (nβ)² C / 4m) / (1 − εP/4) for each curvature, P = nβ h + γ."""
    precision = nbeta * np.asarray(curvature, float) + localization
    noise = step_size * nbeta**2 * np.asarray(gradient_variance, float) / (4 * batch_size)
    return (1 + noise) / (precision * (1 - step_size * precision / 4))


def stationary_covariance(
    hessian: Array,
    *,
    nbeta: float,
    localization: float,
    step_size: float,
    gradient_covariance: Array | None = None,
    batch_size: int = 1,
) -> Array:
    """The solution of Σ = F Σ Fᵀ + ε I + (ε nβ / 2)² C / m, `[d, d]`."""
    identity = np.eye(len(hessian))
    transition = identity - 0.5 * step_size * (nbeta * hessian + localization * identity)
    noise = step_size * identity
    if gradient_covariance is not None:
        noise = noise + (0.5 * step_size * nbeta) ** 2 * gradient_covariance / batch_size
    return linalg.solve_discrete_lyapunov(transition, noise)


def autocorrelation(
    curvature: npt.ArrayLike,
    *,
    nbeta: float,
    localization: float,
    step_size: float,
    lag: int = 1,
) -> Array:
    """(1 − εP/2)^lag."""
    precision = nbeta * np.asarray(curvature, float) + localization
    return (1 - 0.5 * step_size * precision) ** lag


def variance_of_mean(variance: float, correlation: float, draws: int) -> float:
    """Variance of the mean of T successive draws of a stationary AR(1) of one-step correlation r.

    (σ²/T) [1 + 2 Σ_{k=1}^{T−1} (1 − k/T) r^k].
    """
    lags = np.arange(1, draws)
    return variance / draws * (1 + 2 * float(np.sum((1 - lags / draws) * correlation**lags)))


def stationary_posterior(
    losses: gaussian.Quadratic,
    centre: Array,
    *,
    nbeta: float,
    localization: float,
    step_size: float,
    data_weights: Array | None = None,
    free: gaussian.Indices | None = None,
) -> gaussian.Posterior:
    """What a full-batch chain samples: the posterior mean, covariance (P − εP²/4)⁻¹."""
    exact = gaussian.posterior(
        losses,
        centre,
        nbeta=nbeta,
        localization=localization,
        data_weights=data_weights,
        free=free,
    )
    index = np.arange(centre.size) if free is None else free
    block = np.ix_(index, index)
    precision = np.linalg.inv(exact.covariance[block])
    covariance = np.zeros_like(exact.covariance)
    covariance[block] = np.linalg.inv(precision - 0.25 * step_size * precision @ precision)
    return gaussian.Posterior(exact.mean, covariance)


def chain_susceptibility(
    observables: gaussian.Quadratic,
    losses: gaussian.Quadratic,
    centre: Array,
    *,
    nbeta: float,
    localization: float,
    step_size: float,
    free: gaussian.Indices | None = None,
) -> Array:
    """(1/nβ) d⟨φ⟩/dh_z of the full-batch chain's own stationary law, `[K, N]`.

    The derivative that a pathwise estimate converges to at finite step; −Cov[φ, ℓ_z − L] at ε → 0.
    With D_z = ½ wᵀAw + aᵀw, G = P − εP²/4 and Σ_ε = G⁻¹: dm = −nβ P⁻¹ (Am + a),
    dP = nβ A, dΣ_ε = −Σ_ε [dP − (ε/4)(dP P + P dP)] Σ_ε and d⟨φ⟩ = (Bm + b)ᵀ dm + ½ tr(B dΣ_ε).
    """
    biased = stationary_posterior(
        losses,
        centre,
        nbeta=nbeta,
        localization=localization,
        step_size=step_size,
        free=free,
    )
    index = np.arange(centre.size) if free is None else free
    block = np.ix_(index, index)
    hessian = gaussian.mean_loss(losses).hessian[0][block]
    precision = nbeta * hessian + localization * np.eye(index.size)
    sigma = biased.covariance[block]
    relative = gaussian.relative_losses(losses)
    gradients = (relative.hessian @ biased.mean + relative.slope)[:, index]
    mean_shift = -nbeta * np.linalg.solve(precision, gradients.T).T
    change = nbeta * relative.hessian[:, index[:, None], index[None, :]]
    change = change - 0.25 * step_size * (change @ precision + precision @ change)
    sigma_shift = -sigma @ change @ sigma
    slopes = (observables.hessian @ biased.mean + observables.slope)[:, index]
    curvature = observables.hessian[:, index[:, None], index[None, :]]
    total = slopes @ mean_shift.T + 0.5 * np.einsum("kij,nji->kn", curvature, sigma_shift)
    return total / nbeta
