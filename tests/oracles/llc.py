"""Local learning coefficients λ̂ = nβ (⟨L⟩ − L(w*)) with known values."""

from collections.abc import Sequence
from itertools import combinations
from math import ceil

import numpy as np
import numpy.typing as npt
from scipy import integrate

Array = npt.NDArray[np.float64]


def quadratic_llc(
    curvature: npt.ArrayLike,
    *,
    nbeta: float,
    localization: float,
    step_size: float = 0.0,
) -> float:
    """½ Σ_i nβ h_i / [P_i (1 − εP_i/4)] with P_i = nβ h_i + γ; ε = 0 is the exact posterior."""
    scaled = nbeta * np.asarray(curvature, float)
    precision = scaled + localization
    return 0.5 * float(np.sum(scaled / (precision * (1 - 0.25 * step_size * precision))))


def monomial_llc(
    powers: Sequence[float], *, nbeta: float = 1.0, localization: float = 0.0
) -> float:
    """nβ⟨L⟩ for L = Σ_i |w_i|^{p_i} centred at 0: Σ_i 1/p_i at γ = 0, else by quadrature."""
    if localization == 0.0:
        return float(sum(1 / power for power in powers))

    def one(power: float) -> float:
        # In units of the narrower of the two scales the integrand is of order one.
        scale = min(nbeta ** (-1 / power), localization**-0.5)

        def density(x: float) -> float:
            return float(
                np.exp(-nbeta * (scale * x) ** power - localization * (scale * x) ** 2 / 2)
            )

        def moment(x: float) -> float:
            return nbeta * (scale * x) ** power * density(x)

        top, bottom = (
            integrate.quad(f, 0, 40, epsabs=0, epsrel=1e-12, limit=200)[0]
            for f in (moment, density)
        )
        return top / bottom

    return sum(one(power) for power in powers)


def log_spaced_rule(smallest: float = 1e-12, order: int = 16) -> tuple[Array, Array]:
    """Nodes and weights on [0, 1]: Gauss–Legendre on panels that halve towards 0."""
    points, weights = np.polynomial.legendre.leggauss(order)
    edges = np.concatenate([[0.0], 2.0 ** np.arange(np.floor(np.log2(smallest)), 1)])
    width = np.diff(edges)[:, None]
    nodes = edges[:-1, None] + width * (points + 1) / 2
    return nodes.ravel(), (width * weights / 2).ravel()


def normal_crossing_llc(first_power: float, second_power: float, nbeta: float) -> float:
    """nβ⟨K⟩ for K = |x|^p |y|^q, uniform prior on [−1, 1]²; if p = q, λ is 1/log nβ away."""
    nodes, weights = log_spaced_rule()
    energy = nbeta * np.multiply.outer(nodes**first_power, nodes**second_power)
    mass = np.multiply.outer(weights, weights) * np.exp(-energy)
    return float(np.sum(mass * energy) / np.sum(mass))


def deep_linear_llc(widths: Sequence[int], rank: int) -> tuple[float, int]:
    """λ and multiplicity of W_N ⋯ W_1 of widths H_0 … H_N at a truth of rank r (Aoyagi 2024).

    M_i = H_i − r. The subset Σ of ℓ + 1 layers has max_Σ M < min_rest M, Σ_Σ M ≥ ℓ max_Σ M and
    Σ_Σ M < ℓ min_rest M. With S = Σ_Σ M, M = ⌈S/ℓ⌉, a = S − (M − 1)ℓ,
    λ = [−r² + r(H_0 + H_N)]/2 + a(ℓ − a)/4ℓ − (ℓ(ℓ − 1)/4)(S/ℓ)² + ½ Σ_{i<j∈Σ} M_i M_j
    and the multiplicity is a(ℓ − a) + 1.
    """
    excess = [width - rank for width in widths]
    if min(excess) < 0:
        raise ValueError(f"rank {rank} exceeds the narrowest of the widths {tuple(widths)}")
    everything = range(len(excess))
    found: set[tuple[float, int]] = set()
    for size in range(2, len(excess) + 1):
        count = size - 1
        for subset in combinations(everything, size):
            inside = [excess[i] for i in subset]
            outside = [excess[i] for i in everything if i not in subset]
            least = min(outside) if outside else np.inf
            total = sum(inside)
            if not (max(inside) < least and count * max(inside) <= total < count * least):
                continue
            rest = total - (ceil(total / count) - 1) * count
            pairs = sum(a * b for a, b in combinations(inside, 2))
            value = (
                (-(rank**2) + rank * (widths[0] + widths[-1])) / 2
                + rest * (count - rest) / (4 * count)
                - count * (count - 1) / 4 * (total / count) ** 2
                + pairs / 2
            )
            found.add((value, rest * (count - rest) + 1))
    (answer,) = found
    return answer
