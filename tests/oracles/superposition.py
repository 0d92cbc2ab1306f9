"""The toy model of superposition x̂ = ReLU(WᵀWx + b), its losses per feature and its posterior.

One feature i ~ p_i is active with size u ~ U[0, 1], so the population loss is L = Σ_i p_i ℓ_i with
ℓ_i = ∫₀¹ [(u − ReLU(a_ii u + b_i))² + Σ_{j≠i} ReLU(a_ij u + b_j)²] du and a_ij = W_i·W_j.
Leading axes of `weights [..., m, c]` and `bias [..., c]` are a batch of parameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _active(slope: Array, offset: Array) -> tuple[Array, Array]:
    """The part [start, stop] of [0, 1] where slope·u + offset is positive."""
    end = slope + offset
    crosses = (offset > 0) != (end > 0)
    root = np.divide(-offset, slope, out=np.zeros(np.shape(crosses)), where=crosses)
    start = np.where(offset > 0, 0.0, np.where(crosses, root, 1.0))
    stop = np.where(end > 0, 1.0, np.where(crosses, root, start))
    return start, stop


def relu_square(slope: npt.ArrayLike, offset: npt.ArrayLike) -> Array:
    """I₃(a, b) = ∫₀¹ ReLU(au + b)² du = (s − r)(v_r² + v_r v_s + v_s²)/3, active on [r, s]."""
    a, b = np.broadcast_arrays(np.asarray(slope, float), np.asarray(offset, float))
    start, stop = _active(a, b)
    low, high = np.maximum(a * start + b, 0), np.maximum(a * stop + b, 0)
    return (stop - start) * (low**2 + low * high + high**2) / 3


def relu_moment(slope: npt.ArrayLike, offset: npt.ArrayLike) -> Array:
    """∫₀¹ u ReLU(au + b) du, by Simpson's rule, which is exact on the active part."""
    a, b = np.broadcast_arrays(np.asarray(slope, float), np.asarray(offset, float))
    start, stop = _active(a, b)
    middle = (start + stop) / 2
    total = sum(
        weight * u * np.maximum(a * u + b, 0) for weight, u in ((1, start), (4, middle), (1, stop))
    )
    return (stop - start) * total / 6


def feature_losses(weights: Array, bias: Array) -> Array:
    """ℓ_i = 1/3 − 2∫₀¹ u ReLU(a_ii u + b_i) du + Σ_j I₃(a_ij, b_j), `[..., c]`."""
    gram = np.einsum("...mi,...mj->...ij", weights, weights)
    offset = np.broadcast_to(bias[..., None, :], gram.shape)
    own = np.einsum("...ii->...i", gram)
    return 1 / 3 - 2 * relu_moment(own, bias) + relu_square(gram, offset).sum(-1)


def population_loss(weights: Array, bias: Array, mixture: Array | None = None) -> Array:
    """L = Σ_i p_i ℓ_i, uniform p by default."""
    losses = feature_losses(weights, bias)
    return losses.mean(-1) if mixture is None else losses @ mixture


def polygon(sides: int, features: int, length: float) -> Array:
    """W of shape `[2, features]`: `sides` columns on a regular polygon, the rest zero."""
    angle = 2 * np.pi * np.arange(sides) / sides
    weights = np.zeros((2, features))
    weights[:, :sides] = length * np.stack([np.cos(angle), np.sin(angle)])
    return weights


class GridPosterior(NamedTuple):
    """A posterior on a tensor grid: `weights [G,m,c]`, `bias [G,c]`, `losses [G,c]`, `mass [G]`."""

    weights: Array
    bias: Array
    losses: Array
    mass: Array


def grid_posterior(
    weights: Array,
    bias: Array,
    *,
    mixture: Array,
    nbeta: float,
    localization: float,
    train_bias: bool = True,
    points: int = 41,
    half_width: float | None = None,
) -> GridPosterior:
    """exp(−nβ Σ p_i ℓ_i − γ/2 ‖w − w*‖²) around (weights `[m, c]`, bias `[c]`), for 2–4 parameters.

    Trapezoidal in each parameter on w* ± `half_width`, 6/√γ by default. With `train_bias` false the
    bias is held at w*. The error is seen by changing `points` and `half_width`.
    """
    count = weights.size + (bias.size if train_bias else 0)
    reach = 6 / np.sqrt(localization) if half_width is None else half_width
    axis = np.linspace(-reach, reach, points)
    offsets = np.stack(np.meshgrid(*[axis] * count, indexing="ij"), -1).reshape(-1, count)
    grid_weights = weights + offsets[:, : weights.size].reshape(-1, *weights.shape)
    moved = offsets[:, weights.size :] if train_bias else np.zeros((len(offsets), bias.size))
    grid_bias = bias + moved
    losses = feature_losses(grid_weights, grid_bias)
    exponent = -nbeta * losses @ mixture - 0.5 * localization * np.sum(offsets**2, -1)
    mass = np.exp(exponent - exponent.max())
    return GridPosterior(grid_weights, grid_bias, losses, mass / mass.sum())


def expectation(values: Array, posterior: GridPosterior) -> Array:
    """⟨f⟩ for values `[G, ...]` on the grid."""
    return np.tensordot(posterior.mass, values, 1)


def susceptibility(
    observables: Callable[[Array, Array], Array] | None,
    posterior: GridPosterior,
    mixture: Array,
) -> Array:
    """χ_i(φ) = −Cov[φ, ℓ_i − L], `[K, c]`; observables (W, b) → `[G, K]`, or None for φ = L."""
    relative = posterior.losses - (posterior.losses @ mixture)[:, None]
    values = (
        (posterior.losses @ mixture)[:, None]
        if observables is None
        else observables(posterior.weights, posterior.bias)
    )
    values = values - expectation(values, posterior)
    relative = relative - expectation(relative, posterior)
    return -np.einsum("g,gk,gi->ki", posterior.mass, values, relative)
