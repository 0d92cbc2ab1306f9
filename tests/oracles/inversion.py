"""Data-weight problems on few samples, solved by general-purpose routines in the N weights.

A `[K, N]` is a response matrix, q `[N]` the mass of its columns (sums to 1), b `[K]` the target.
The weights are ρ = 1 + s; the constraint is Σ_j q_j A_kj s_j = b_k. To keep Σ q ρ = 1 in the
problems that do not impose it, append a row of ones to A and a zero to b.
"""

import numpy as np
import numpy.typing as npt
from scipy import linalg, optimize

Array = npt.NDArray[np.float64]


def minimum_norm(response: Array, target: Array, mass: Array) -> Array:
    """min Σ q s² subject to A(q s) = b: least squares of smallest norm in t = √q s."""
    root = np.sqrt(mass)
    return linalg.lstsq(response * root, target)[0] / root


def truncated(response: Array, target: Array, mass: Array, keep: int) -> Array:
    """The minimum-norm solution in the `keep` leading singular directions of A √q."""
    root = np.sqrt(mass)
    left, values, right = linalg.svd(response * root, full_matrices=False)
    return right[:keep].T @ ((left[:, :keep].T @ target) / values[:keep]) / root


def ridge(response: Array, target: Array, mass: Array, regularization: float) -> Array:
    """min ‖A(q s) − b‖² + τ Σ q s², as one least-squares problem in N unknowns."""
    root = np.sqrt(mass)
    stacked = np.concatenate([response * root, np.sqrt(regularization) * np.eye(mass.size)])
    wanted = np.concatenate([target, np.zeros(mass.size)])
    return linalg.lstsq(stacked, wanted)[0] / root


def box_ridge(
    response: Array,
    target: Array,
    mass: Array,
    regularization: float,
    lower: float,
    upper: float,
) -> Array:
    """min ‖A(q s) − b‖² + τ Σ q s² subject to lower ≤ s ≤ upper, by an active-set method."""
    stacked = np.concatenate([response * mass, np.diag(np.sqrt(regularization * mass))])
    wanted = np.concatenate([target, np.zeros(mass.size)])
    return optimize.lsq_linear(stacked, wanted, (lower, upper), method="bvls", tol=1e-14).x


def box_minimum_norm(
    response: Array, target: Array, mass: Array, lower: float, upper: float
) -> Array:
    """min Σ q s² subject to A(q s) = b and lower ≤ s ≤ upper.

    Sequential quadratic programming finds the active set, and the equality problem on the free
    samples is then solved exactly. Raises `ValueError` if no s is feasible or the sets disagree.
    """
    scaled = response * mass
    found = optimize.minimize(
        lambda s: 0.5 * mass.size * np.sum(mass * s**2),
        np.clip(minimum_norm(response, target, mass), lower, upper),
        jac=lambda s: mass.size * mass * s,
        bounds=[(lower, upper)] * mass.size,
        constraints={
            "type": "eq",
            "fun": lambda s: scaled @ s - target,
            "jac": lambda s: scaled,
        },
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-15},
    )
    guess = np.clip(found.x, lower, upper)
    tolerance = 1e-6 * (upper - lower)
    free = (guess > lower + tolerance) & (guess < upper - tolerance)
    solution = np.where(guess <= lower + tolerance, lower, upper)
    remaining = target - scaled[:, ~free] @ solution[~free]
    solution[free] = minimum_norm(response[:, free], remaining, mass[free])
    if np.any(solution < lower) or np.any(solution > upper):
        raise ValueError(f"active set not found: {found.message}")
    if not np.allclose(scaled @ solution, target, rtol=1e-9, atol=1e-12):
        raise ValueError(f"no feasible weights found: {found.message}")
    return solution


def box_reach(response: Array, direction: Array, mass: Array, lower: float, upper: float) -> float:
    """The largest α for which A(q s) = α b has a solution in the box, by linear programming."""
    size = mass.size
    equality = np.concatenate([response * mass, -direction[:, None]], axis=1)
    cost = np.zeros(size + 1)
    cost[-1] = -1.0
    bounds = [(lower, upper)] * size + [(0.0, None)]
    found = optimize.linprog(cost, A_eq=equality, b_eq=np.zeros(len(direction)), bounds=bounds)
    if not found.success:
        raise ValueError(found.message)
    return float(found.x[-1])


def entropic(response: Array, target: Array, mass: Array) -> Array:
    """ρ of min Σ q ρ log ρ subject to Σ q ρ = 1 and Σ q A (ρ − 1) = b.

    Sequential quadratic programming in ρ, then Newton steps on the full optimality system
    log ρ_j = c + Σ_k ν_k A_kj in (ρ, c, ν) together with the constraints.
    """
    size = mass.size
    rows = np.concatenate([np.ones((1, size)), response])
    scaled = rows * mass
    wanted = scaled @ np.ones(size) + np.concatenate([[0.0], target])
    found = optimize.minimize(
        lambda rho: size * np.sum(mass * rho * np.log(rho)),
        np.ones(size),
        jac=lambda rho: size * mass * (np.log(rho) + 1),
        bounds=[(1e-9, None)] * size,
        constraints={
            "type": "eq",
            "fun": lambda rho: scaled @ rho - wanted,
            "jac": lambda rho: scaled,
        },
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    if not np.allclose(scaled @ found.x, wanted, rtol=1e-6, atol=1e-8):
        raise ValueError(f"no feasible weights found: {found.message}")

    def residual(unknown: Array) -> Array:
        logs, multipliers = unknown[:size], unknown[size:]
        return np.concatenate([logs - rows.T @ multipliers, scaled @ np.exp(logs) - wanted])

    def jacobian(unknown: Array) -> Array:
        corner = np.zeros((len(rows), len(rows)))
        return np.block([[np.eye(size), -rows.T], [scaled * np.exp(unknown[:size]), corner]])

    logs = np.log(found.x)
    start = np.concatenate([logs, linalg.lstsq(rows.T, logs)[0]])
    polished = optimize.root(residual, start, jac=jacobian, tol=1e-14)
    if np.max(np.abs(residual(polished.x))) > 1e-10:
        raise ValueError(f"optimality not reached: {polished.message}")
    return np.exp(polished.x[:size])
