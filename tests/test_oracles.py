"""The oracles themselves, each checked by a second route.

Monte-Carlo checks use fixed seeds and a limit of five standard errors: a false alarm has
probability 6e-7 per number compared, below 1e-4 over the file.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import pytest
from oracles import anharmonic, euler, gaussian, inversion, llc, superposition
from scipy import integrate, linalg, optimize, special

Array = npt.NDArray[np.float64]
NBETA, LOCALIZATION = 3.0, 1.5


def model(seed: int, *, dimension: int = 4, samples: int = 6) -> tuple[gaussian.Quadratic, Array]:
    """Random positive-definite losses with linear parts and constants, and a centre."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(samples, dimension, dimension))
    hessians = roots @ roots.transpose(0, 2, 1) / dimension
    losses = gaussian.quadratics(
        hessians,
        rng.normal(size=(samples, dimension)),
        constants=rng.normal(size=samples),
        linear=rng.normal(size=(samples, dimension)),
    )
    return losses, rng.normal(size=dimension)


def observables(seed: int, *, dimension: int = 4, rows: int = 3) -> gaussian.Quadratic:
    """Random indefinite quadratics."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(rows, dimension, dimension))
    return gaussian.Quadratic(
        root + root.transpose(0, 2, 1),
        rng.normal(size=(rows, dimension)),
        rng.normal(size=rows),
    )


def values_at(functions: gaussian.Quadratic, points: Array) -> Array:
    """`[G, K]`, by the definition."""
    quadratic = np.einsum("gi,kij,gj->gk", points, functions.hessian, points)
    return quadratic / 2 + points @ functions.slope.T + functions.constant


def central_difference(function: Callable[[float], Array], step: float = 1e-4) -> Array:
    """Fourth-order df/dh at h = 0."""
    near, far = (
        (function(step) - function(-step)),
        (function(2 * step) - function(-2 * step)),
    )
    return (8 * near - far) / (12 * step)


# Gaussian model


def grid_in_two_dimensions(
    losses: gaussian.Quadratic, centre: Array, data_weights: Array
) -> tuple[Array, Array]:
    """Points and masses of the posterior by the trapezoidal rule, from the unexpanded density."""
    axis = np.linspace(-9, 9, 241) / np.sqrt(LOCALIZATION)
    points = centre + np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    loss = values_at(losses, points) @ data_weights / data_weights.sum()
    exponent = -NBETA * loss - LOCALIZATION / 2 * np.sum((points - centre) ** 2, -1)
    mass = np.exp(exponent - exponent.max())
    return points, mass / mass.sum()


def test_quadratics_are_the_shifted_form():
    rng = np.random.default_rng(0)
    hessians = np.broadcast_to(np.diag([1.0, 2.0]), (3, 2, 2))
    centres, linear = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    constants, point = rng.normal(size=3), rng.normal(size=2)
    stack = gaussian.quadratics(hessians, centres, constants=constants, linear=linear)
    moved = point - centres
    expected = np.sum(moved**2 * [0.5, 1.0], -1) + linear @ point + constants
    np.testing.assert_allclose(gaussian.evaluate(stack, point), expected, rtol=1e-13)


def test_gaussian_moments_against_quadrature():
    losses, centre = model(1, dimension=2)
    phi, rho = observables(2, dimension=2), np.array([1.0, 0.5, 2.0, 1.0, 0.0, 1.5])
    points, mass = grid_in_two_dimensions(losses, centre, rho)
    exact = gaussian.posterior(
        losses, centre, nbeta=NBETA, localization=LOCALIZATION, data_weights=rho
    )
    np.testing.assert_allclose(exact.mean, mass @ points, atol=1e-10)
    centred = points - exact.mean
    np.testing.assert_allclose(
        exact.covariance, np.einsum("g,gi,gj->ij", mass, centred, centred), atol=1e-10
    )
    phi_values, loss_values = values_at(phi, points), values_at(losses, points)
    np.testing.assert_allclose(gaussian.expectation(phi, exact), mass @ phi_values, atol=1e-9)
    relative = loss_values - (loss_values @ rho / rho.sum())[:, None]
    covariance = np.einsum("g,gk,gn->kn", mass, phi_values - mass @ phi_values, relative)
    chi = gaussian.susceptibility(
        phi, losses, centre, nbeta=NBETA, localization=LOCALIZATION, data_weights=rho
    )
    np.testing.assert_allclose(chi, -covariance, atol=1e-9)
    np.testing.assert_allclose(chi @ rho, 0, atol=1e-12)


def test_restricted_posterior_is_the_conditional_at_the_centre():
    losses, centre = model(3)
    free = np.array([0, 2])
    full = gaussian.posterior(losses, centre, nbeta=NBETA, localization=LOCALIZATION)
    part = gaussian.posterior(losses, centre, nbeta=NBETA, localization=LOCALIZATION, free=free)
    held = np.array([1, 3])
    # Conditioning N(m, Σ) by Schur complements, against conditioning the density.
    sigma = full.covariance
    gain = np.linalg.solve(sigma[np.ix_(held, held)], sigma[np.ix_(held, free)]).T
    mean = full.mean[free] + gain @ (centre - full.mean)[held]
    covariance = sigma[np.ix_(free, free)] - gain @ sigma[np.ix_(held, free)]
    np.testing.assert_allclose(part.mean[free], mean, rtol=1e-11)
    np.testing.assert_allclose(part.mean[held], centre[held], rtol=0)
    np.testing.assert_allclose(part.covariance[np.ix_(free, free)], covariance, atol=1e-12)
    assert not part.covariance[held].any()


@pytest.mark.parametrize("free", [None, np.array([0, 2])])
def test_chi_and_weight_derivatives_are_finite_differences_of_the_response(free):
    losses, centre = model(4)
    phi, rho = observables(5), np.array([1.0, 0.5, 2.0, 1.0, 0.3, 1.5])
    settings = {"nbeta": NBETA, "localization": LOCALIZATION, "free": free}

    def shifted(m):
        def at(h):
            moved = rho + h * np.eye(6)[m]
            return gaussian.response(phi, losses, centre, data_weights=moved, **settings)

        return at

    def mixed(m):
        def at(h):
            moved = (1 - h) * rho / rho.sum() + h * np.eye(6)[m]
            return gaussian.response(phi, losses, centre, data_weights=moved, **settings)

        return at

    chi = gaussian.susceptibility(phi, losses, centre, data_weights=rho, **settings)
    slope = gaussian.weight_derivative(phi, losses, centre, data_weights=rho, **settings)
    for m in range(6):
        np.testing.assert_allclose(slope[:, m], central_difference(shifted(m)), atol=1e-9)
        np.testing.assert_allclose(chi[:, m], central_difference(mixed(m)) / NBETA, atol=1e-9)


def test_both_llc_responses_are_finite_differences():
    losses, centre = model(6)
    settings = {"nbeta": NBETA, "localization": LOCALIZATION}

    def lambda_hat(moved, observed):
        phi = gaussian.excess_loss(losses, centre, observed)
        return NBETA * gaussian.response(phi, losses, centre, data_weights=moved, **settings)[0]

    fixed, direct = gaussian.llc_weight_derivative(losses, centre, **settings)
    ones = np.ones(6)
    for m, unit in enumerate(np.eye(6)):
        held = central_difference(lambda h, e=unit: lambda_hat(ones + h * e, ones))
        both = central_difference(lambda h, e=unit: lambda_hat(ones + h * e, ones + h * e))
        np.testing.assert_allclose(fixed[m], held, atol=1e-9)
        np.testing.assert_allclose(fixed[m] + direct[m], both, atol=1e-9)


def test_the_two_llc_responses_cancel_in_a_regular_model():
    losses, _ = model(7)
    mean = gaussian.mean_loss(losses)
    minimum = -np.linalg.solve(mean.hessian[0], mean.slope[0])
    fixed, direct = gaussian.llc_weight_derivative(losses, minimum, nbeta=NBETA, localization=0.0)
    np.testing.assert_allclose(fixed, -direct, atol=1e-13)
    assert np.max(np.abs(fixed)) > 0.01


def test_hybrid_form_differs_from_the_centred_form_by_the_shift_of_the_mean():
    losses, centre = model(8)
    phi, free = observables(9), np.array([1, 3])
    settings = {"nbeta": NBETA, "localization": LOCALIZATION}
    hybrid = gaussian.hybrid_susceptibility(phi, losses, centre, free=free, **settings)
    centred = gaussian.susceptibility(phi, losses, centre, free=free, **settings)
    part = gaussian.posterior(losses, centre, free=free, **settings)
    full = gaussian.posterior(losses, centre, **settings)
    relative = gaussian.relative_losses(losses)
    shift = gaussian.expectation(relative, part) - gaussian.expectation(relative, full)
    expected = centred - np.outer(gaussian.expectation(phi, part), shift)
    np.testing.assert_allclose(hybrid, expected, atol=1e-12)

    # E_C[φ D] and E_full[D] from draws: five standard errors.
    rng, draws = np.random.default_rng(10), 200_000
    restricted = centre + np.zeros((draws, 4))
    block = part.covariance[np.ix_(free, free)]
    restricted[:, free] = rng.multivariate_normal(part.mean[free], block, draws)
    everywhere = rng.multivariate_normal(full.mean, full.covariance, draws)
    products = np.einsum("gk,gn->gkn", values_at(phi, restricted), values_at(relative, restricted))
    means = values_at(phi, restricted)
    plain = values_at(relative, everywhere)
    estimate = -(products.mean(0) - np.outer(means.mean(0), plain.mean(0)))
    error = (
        products.std(0)
        + np.outer(means.std(0), np.abs(plain.mean(0)))
        + np.outer(np.abs(means.mean(0)), plain.std(0))
    ) / np.sqrt(draws)
    assert np.all(np.abs(estimate - hybrid) < 5 * error)


# Euler steps


def test_stationary_variance_is_the_fixed_point_of_the_recursion():
    h, step, variance, batch = 2.0, 0.05, 3.0, 4
    precision = NBETA * h + LOCALIZATION
    factor = 1 - step / 2 * precision
    spread = lagged = 0.0
    for _ in range(400):
        lagged = factor * spread
        spread = factor**2 * spread + step + (step / 2 * NBETA) ** 2 * variance / batch
    settings = {"nbeta": NBETA, "localization": LOCALIZATION, "step_size": step}
    exact = euler.stationary_variance(h, gradient_variance=variance, batch_size=batch, **settings)
    np.testing.assert_allclose(exact, spread, rtol=1e-12)
    np.testing.assert_allclose(euler.autocorrelation(h, **settings), lagged / spread, rtol=1e-12)
    np.testing.assert_allclose(euler.autocorrelation(h, lag=3, **settings), factor**3, rtol=1e-12)


def test_minibatch_chains_have_the_stated_variance():
    """SGLD on ½h(w − c_z)², C = h² Var c, batches with replacement: 5 standard errors, 5e-7."""
    rng, chains, h, step, batch = np.random.default_rng(11), 100_000, 2.0, 0.05, 4
    centres = rng.normal(size=20)
    centres -= centres.mean()
    w = np.zeros(chains)
    for _ in range(80):
        gradient = h * (w - centres[rng.integers(0, 20, (batch, chains))].mean(0))
        drift = NBETA * gradient + LOCALIZATION * w
        w = w - step / 2 * drift + np.sqrt(step) * rng.normal(size=chains)
    exact = euler.stationary_variance(
        h,
        nbeta=NBETA,
        localization=LOCALIZATION,
        step_size=step,
        gradient_variance=h**2 * centres.var(),
        batch_size=batch,
    )
    assert abs(w.var() - exact) < 5 * exact * np.sqrt(2 / chains)


def test_stationary_covariance_in_many_dimensions():
    rng = np.random.default_rng(12)
    hessian, noise = (root @ root.T / 3 for root in rng.normal(size=(2, 3, 3)))
    settings = {"nbeta": NBETA, "localization": LOCALIZATION, "step_size": 0.05}
    covariance = euler.stationary_covariance(
        hessian, gradient_covariance=noise, batch_size=2, **settings
    )
    transition = np.eye(3) - 0.025 * (NBETA * hessian + LOCALIZATION * np.eye(3))
    spread = np.zeros((3, 3))
    for _ in range(2000):
        spread = transition @ spread @ transition.T + 0.05 * np.eye(3)
        spread += (0.025 * NBETA) ** 2 * noise / 2
    np.testing.assert_allclose(covariance, spread, rtol=1e-10, atol=1e-12)
    diagonal = euler.stationary_covariance(
        np.diag([1.0, 2.0]),
        gradient_covariance=np.diag([0.3, 4.0]),
        batch_size=2,
        **settings,
    )
    expected = euler.stationary_variance(
        [1.0, 2.0], gradient_variance=[0.3, 4.0], batch_size=2, **settings
    )
    np.testing.assert_allclose(diagonal, np.diag(expected), atol=1e-14)


def test_variance_of_a_chain_mean_against_its_covariance_matrix():
    powers = np.abs(np.subtract.outer(np.arange(7), np.arange(7)))
    expected = np.mean(2.0 * 0.8**powers)
    np.testing.assert_allclose(euler.variance_of_mean(2.0, 0.8, 7), expected, rtol=1e-13)


@pytest.mark.parametrize("free", [None, np.array([0, 2])])
def test_chain_susceptibility_is_the_derivative_of_the_biased_expectation(free):
    losses, centre = model(13)
    phi = observables(14)
    settings = {"nbeta": NBETA, "localization": LOCALIZATION, "free": free}
    chi = euler.chain_susceptibility(phi, losses, centre, step_size=0.05, **settings)
    for m, unit in enumerate(np.eye(6)):

        def at(h, unit=unit):
            law = euler.stationary_posterior(
                losses,
                centre,
                step_size=0.05,
                data_weights=(1 - h) * np.ones(6) / 6 + h * unit,
                **settings,
            )
            return gaussian.expectation(phi, law)

        np.testing.assert_allclose(chi[:, m], central_difference(at) / NBETA, atol=1e-9)
    limit = euler.chain_susceptibility(phi, losses, centre, step_size=0.0, **settings)
    exact = gaussian.susceptibility(phi, losses, centre, **settings)
    np.testing.assert_allclose(limit, exact, atol=1e-13)


def test_stationary_posterior_solves_the_lyapunov_equation():
    losses, centre = model(15)
    settings = {"nbeta": NBETA, "localization": LOCALIZATION, "step_size": 0.05}
    law = euler.stationary_posterior(losses, centre, **settings)
    hessian = gaussian.mean_loss(losses).hessian[0]
    expected = euler.stationary_covariance(hessian, **settings)
    np.testing.assert_allclose(law.covariance, expected, atol=1e-13)


# Local learning coefficients


def test_quadratic_llc_against_the_gaussian_model_with_and_without_step_bias():
    curvature = np.array([0.0, 0.5, 2.0])
    losses = gaussian.quadratics(np.diag(curvature)[None], np.zeros((1, 3)))
    settings = {"nbeta": NBETA, "localization": LOCALIZATION}
    for step in (0.0, 0.05):
        law = euler.stationary_posterior(losses, np.zeros(3), step_size=step, **settings)
        expected = NBETA * gaussian.expectation(losses, law)[0]
        value = llc.quadratic_llc(curvature, step_size=step, **settings)
        np.testing.assert_allclose(value, expected, rtol=1e-13)


@pytest.mark.parametrize("nbeta", [1.0, 100.0])
def test_monomial_llc(nbeta):
    x = np.linspace(0, 12, 200_001)
    for power in (2, 4, 6):
        mass = np.exp(-(x**power))
        direct = np.sum(integrate.simpson(mass * x**power, x=x)) / integrate.simpson(mass, x=x)
        np.testing.assert_allclose(llc.monomial_llc([power]), direct, rtol=1e-9)
    mixed = llc.monomial_llc([2, 4], nbeta=nbeta)
    np.testing.assert_allclose(mixed, 0.75, rtol=1e-15)
    # γ > 0: the quadratic is known, and a weak localization changes nothing.
    localized = llc.monomial_llc([2], nbeta=nbeta, localization=3.0)
    exact = llc.quadratic_llc([2.0], nbeta=nbeta, localization=3.0)
    np.testing.assert_allclose(localized, exact, rtol=1e-9)
    nearly = llc.monomial_llc([2, 4, 6], nbeta=nbeta, localization=1e-9)
    np.testing.assert_allclose(nearly, 1 / 2 + 1 / 4 + 1 / 6, rtol=1e-7)

    # ∫ exp(−n w⁴ − b w²) dw = ½ √(b/n) e^x K_¼(x) with x = b²/8n; nβ⟨L⟩ = −d log Z/d log n.
    def log_evidence(scale):
        argument = 3.0**2 / (32 * nbeta * scale)
        return np.log(special.kve(0.25, argument)) - 0.5 * np.log(nbeta * scale)

    slope = central_difference(lambda h: log_evidence(1 + h), 1e-3)
    quartic = llc.monomial_llc([4], nbeta=nbeta, localization=3.0)
    np.testing.assert_allclose(quartic, -slope, rtol=1e-8)


@pytest.mark.parametrize(
    ("powers", "small", "large"),
    [((2, 2), 0.3478, 0.4105), ((2, 4), 0.2043, 0.2372), ((4, 4), 0.1368, 0.1756)],
)
def test_normal_crossing_llc(powers, small, large):
    p, q = powers
    for nbeta, tabulated in ((1e2, small), (1e4, large)):
        value = llc.normal_crossing_llc(p, q, nbeta)
        np.testing.assert_allclose(value, tabulated, atol=5.1e-5)

        # −log K = p e₁ + q e₂ with exponential e₁, e₂ has a closed density in τ.
        def state_density(tau):
            if p == q:
                return tau * np.exp(-tau / p) / p**2
            return (np.exp(-tau / q) - np.exp(-tau / p)) / (q - p)

        tau = np.linspace(0, 400, 400_001)
        energy = nbeta * np.exp(-tau)
        mass = state_density(tau) * np.exp(-energy)
        expected = integrate.simpson(mass * energy, x=tau) / integrate.simpson(mass, x=tau)
        np.testing.assert_allclose(value, expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("widths", "rank", "expected"),
    [
        ((2, 2, 2), 0, 3 / 2),
        ((2, 2, 2), 1, 2),
        ((2, 2, 2), 2, 2),
        ((4, 4, 4), 0, 6),
        ((4, 4, 4), 1, 7),
        ((4, 4, 4), 2, 15 / 2),
        ((4, 4, 4), 3, 8),
        ((4, 4, 4), 4, 8),
        ((5, 3, 5), 0, 13 / 2),
        ((5, 4, 5), 0, 8),
        ((4, 3, 8), 0, 6),
    ],
)
def test_deep_linear_llc_tabulated(widths, rank, expected):
    assert llc.deep_linear_llc(widths, rank)[0] == pytest.approx(expected, abs=1e-12)


def reduced_rank_llc(inputs: int, hidden: int, outputs: int, rank: int) -> tuple[float, int]:
    """Reduced rank regression: the four cases of Aoyagi and Watanabe (2005)."""
    m, h, n, r = inputs, hidden, outputs, rank
    if n + r <= m + h and m + r <= n + h and h + r <= m + n:
        total = -((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * (m + n) + 2 * m * n
        odd = (m + h + n + r) % 2
        return (total + odd) / 8, 1 + odd
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2, 1
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2, 1
    return m * n / 2, 1


def test_deep_linear_llc_with_one_hidden_layer_is_reduced_rank_regression():
    for widths in product(range(1, 7), repeat=3):
        for rank in range(min(widths) + 1):
            expected = reduced_rank_llc(*widths, rank)
            assert llc.deep_linear_llc(widths, rank) == pytest.approx(expected, abs=1e-12)


def fibre_codimension(widths: tuple[int, ...], rank: int) -> int:
    """Codimension of {W_N ⋯ W_1 = a matrix of rank r}, by enumerating the rank strata.

    A chain of linear maps is a sum of intervals [i, j]; its stratum has codimension
    dim End − Σ H_i² + Σ H_i H_{i+1}, Hom([a, b], [c, d]) being a line where c ≤ a ≤ d ≤ b. The
    interval [0, N] appears r times, and a point of the rank-r matrices costs r(H_0 + H_N − r).
    """
    last = len(widths) - 1
    intervals = [(i, j) for i in range(last + 1) for j in range(i, last + 1) if (i, j) != (0, last)]
    intervals.append((0, last))
    lines = np.array(
        [[int(c <= a <= d <= b) for (c, d) in intervals] for (a, b) in intervals],
        dtype=int,
    )
    euler_form = sum(h * h for h in widths) - sum(a * b for a, b in pairwise(widths))

    def strata(position: int, left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if position == len(intervals) - 1:
            if not any(left):
                yield (rank,)
            return
        i, j = intervals[position]
        for count in range(min(left[i : j + 1]) + 1):
            rest = tuple(h - count * (i <= k <= j) for k, h in enumerate(left))
            for tail in strata(position + 1, rest):
                yield (count, *tail)

    remaining = tuple(h - rank for h in widths)
    counts = np.array(list(strata(0, remaining)))
    endomorphisms = np.einsum("si,ij,sj->s", counts, lines, counts)
    return int(endomorphisms.min()) - euler_form + rank * (widths[0] + widths[-1] - rank)


def test_deep_linear_llc_is_half_the_codimension_of_the_fibre():
    """λ = C/2 for products of matrices (Lehalleur and Rimányi 2024)."""
    cases = list(product(range(1, 5), repeat=3)) + list(product(range(1, 4), repeat=4))
    seen: Counter[int] = Counter()
    for widths in [*cases, (3, 2, 2, 3, 2), (2, 2, 2, 2, 2)]:
        for rank in range(min(widths) + 1):
            value, multiplicity = llc.deep_linear_llc(widths, rank)
            assert value == pytest.approx(fibre_codimension(widths, rank) / 2, abs=1e-12)
            seen[multiplicity] += 1
    assert len(seen) >= 3


def test_deep_linear_llc_of_scalars_is_a_normal_crossing():
    # K = (x y z)²: λ = ½ with one logarithm for each further factor.
    assert llc.deep_linear_llc((1, 1, 1, 1), 0) == pytest.approx((0.5, 3))
    with pytest.raises(ValueError, match="rank 2"):
        llc.deep_linear_llc((2, 1, 2), 2)


# Anharmonic model


@pytest.mark.parametrize(("nbeta", "tabulated"), [(10.0, -0.83586), (100.0, -0.98139)])
def test_anharmonic_covariance(nbeta, tabulated):
    value = anharmonic.scaled_covariance(nbeta)
    np.testing.assert_allclose(value, tabulated, atol=5.1e-6)

    def moment(power):
        def integrand(x):
            return x**power * np.exp(-nbeta * anharmonic.potential(x, 0.5, 1.0))

        return integrate.quad(integrand, -6, 6, points=[0], epsabs=0, epsrel=1e-12, limit=400)[0]

    zero, one, two, three = (moment(power) for power in range(4))
    quad = nbeta**2 * (three / zero - one * two / zero**2)
    np.testing.assert_allclose(value, quad, rtol=1e-9)
    np.testing.assert_allclose(anharmonic.expectation(np.square, nbeta), two / zero, rtol=1e-10)


def test_anharmonic_covariance_tends_to_minus_two_alpha():
    for alpha, g in ((0.5, 1.0), (-0.3, 2.0)):
        near, far = (anharmonic.scaled_covariance(t, alpha=alpha, g=g) for t in (1e4, 1e5))
        assert abs(far + 2 * alpha) < 1e-4
        np.testing.assert_allclose((near + 2 * alpha) / (far + 2 * alpha), 10, rtol=0.02)


@pytest.mark.parametrize("localization", [0.0, 7.0])
def test_anharmonic_susceptibility_is_a_finite_difference(localization):
    options = {"alpha": 0.5, "g": 1.0, "localization": localization}
    chi = -anharmonic.covariance(np.square, np.sin, 10.0, **options)

    def tilted(h):
        return anharmonic.expectation(np.square, 10.0, tilt=lambda x: h * np.sin(x), **options)

    np.testing.assert_allclose(chi, central_difference(tilted, 1e-3) / 10.0, rtol=1e-8)


def test_anharmonic_grid_sees_both_wells():
    # α² > 2g leaves a second minimum; moments against quad over pieces.
    x, mass = anharmonic.density(4.0, alpha=2.0, g=1.0)

    def integrand(y, power):
        return y**power * np.exp(-4.0 * (anharmonic.potential(y, 2.0, 1.0) + 2.25))

    pieces = [-12, -8, -4, -2, 0, 2, 6]
    first, zero = (
        sum(
            integrate.quad(integrand, a, b, args=(power,), epsabs=0)[0] for a, b in pairwise(pieces)
        )
        for power in (1, 0)
    )
    np.testing.assert_allclose(mass @ x, first / zero, rtol=1e-8)


# Toy model of superposition


def test_feature_losses_against_quadrature_of_the_definition():
    rng = np.random.default_rng(16)
    weights, bias = rng.normal(size=(2, 4)), 0.3 * rng.normal(size=4)
    closed = superposition.feature_losses(weights, bias)
    nodes, mass = np.polynomial.legendre.leggauss(8)
    for i in range(4):
        slope = weights.T @ weights[:, i]
        kinks = -bias / slope
        edges = np.unique(np.concatenate([[0, 1], kinks[(kinks > 0) & (kinks < 1)]]))
        total = 0.0
        for low, high in pairwise(edges):
            for u, weight in zip(low + (high - low) * (nodes + 1) / 2, mass, strict=True):
                x = u * np.eye(4)[i]
                output = np.maximum(weights.T @ (weights @ x) + bias, 0)
                total += weight * (high - low) / 2 * np.sum((x - output) ** 2)
        np.testing.assert_allclose(closed[i], total, rtol=1e-12)


@pytest.mark.parametrize("slope", [-2.0, -1e-9, 0.0, 1e-9, 0.7])
@pytest.mark.parametrize("offset", [-0.5, -1e-10, 0.0, 0.4])
def test_relu_integrals(slope, offset):
    def integral(function):
        kink = [-offset / slope] if slope and 0 < -offset / slope < 1 else None
        return integrate.quad(function, 0, 1, points=kink, epsabs=1e-15, epsrel=1e-12)[0]

    square = integral(lambda u: max(slope * u + offset, 0.0) ** 2)
    moment = integral(lambda u: u * max(slope * u + offset, 0.0))
    np.testing.assert_allclose(superposition.relu_square(slope, offset), square, atol=1e-14)
    np.testing.assert_allclose(superposition.relu_moment(slope, offset), moment, atol=1e-14)


def test_feature_losses_are_batched():
    rng = np.random.default_rng(17)
    weights, bias = rng.normal(size=(5, 2, 3)), rng.normal(size=(5, 3))
    rows = [superposition.feature_losses(w, b) for w, b in zip(weights, bias, strict=True)]
    np.testing.assert_allclose(superposition.feature_losses(weights, bias), rows, rtol=1e-15)


@pytest.mark.parametrize(
    ("sides", "dead_bias", "tabulated"),
    [(5, 0.0, 0.0687436), (5, 1 / 12, 0.0617991), (6, None, 0.0481924)],
)
def test_polygon_losses(sides, dead_bias, tabulated):
    def loss(unknown):
        length, offset = unknown
        bias = np.full(6, offset)
        if dead_bias is not None:
            bias[5] = dead_bias
        return float(superposition.population_loss(superposition.polygon(sides, 6, length), bias))

    found = optimize.minimize(
        loss, [1.2, -0.3], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}
    )
    np.testing.assert_allclose(found.fun, tabulated, atol=5.1e-8)


def posterior_of_two_features(
    *, train_bias: bool, points: int, mixture: Array | None = None
) -> superposition.GridPosterior:
    return superposition.grid_posterior(
        np.array([[0.9, -0.6]]),
        np.array([-0.1, 0.05]),
        mixture=np.array([0.6, 0.4]) if mixture is None else mixture,
        nbeta=30.0,
        localization=20.0,
        train_bias=train_bias,
        points=points,
        half_width=1.3,
    )


def gram_entry(weights: Array, bias: Array) -> Array:
    """Two observables of the tiny model: a_01, and a quadratic."""
    return np.stack(
        [weights[:, 0, 0] * weights[:, 0, 1], np.sum(weights**2, (1, 2)) + bias[:, 0]],
        -1,
    )


@pytest.mark.parametrize(("train_bias", "points"), [(False, 161), (True, 25)])
def test_superposition_susceptibility_is_a_finite_difference(train_bias, points):
    mixture = np.array([0.6, 0.4])
    law = posterior_of_two_features(train_bias=train_bias, points=points)
    chi = superposition.susceptibility(gram_entry, law, mixture)
    np.testing.assert_allclose(chi @ mixture, 0, atol=1e-14)
    for i, unit in enumerate(np.eye(2)):

        def at(h, unit=unit):
            moved = posterior_of_two_features(
                train_bias=train_bias,
                points=points,
                mixture=(1 - h) * mixture + h * unit,
            )
            return superposition.expectation(gram_entry(moved.weights, moved.bias), moved)

        np.testing.assert_allclose(chi[:, i], central_difference(at, 1e-3) / 30.0, atol=1e-9)


@pytest.mark.parametrize(("train_bias", "coarse", "fine"), [(False, 81, 321), (True, 21, 29)])
def test_superposition_grid_has_converged(train_bias, coarse, fine):
    mixture = np.array([0.6, 0.4])
    first, second = (
        superposition.susceptibility(
            gram_entry,
            posterior_of_two_features(train_bias=train_bias, points=n),
            mixture,
        )
        for n in (coarse, fine)
    )
    np.testing.assert_allclose(first, second, rtol=1e-3 if train_bias else 1e-5)


def test_superposition_posterior_against_importance_sampling():
    """Draws from the localization, reweighted: five standard errors, 6e-7 a number."""
    rng, draws = np.random.default_rng(18), 200_000
    mixture = np.array([0.6, 0.4])
    law = posterior_of_two_features(train_bias=True, points=25)
    offsets = rng.normal(size=(draws, 4)) / np.sqrt(20.0)
    weights = np.array([[0.9, -0.6]]) + offsets[:, None, :2]
    bias = np.array([-0.1, 0.05]) + offsets[:, 2:]
    losses = superposition.feature_losses(weights, bias)
    importance = np.exp(-30.0 * losses @ mixture)
    importance /= importance.sum()
    values = gram_entry(weights, bias)
    exact = superposition.expectation(gram_entry(law.weights, law.bias), law)
    centred = values - importance @ values
    error = np.sqrt(importance**2 @ centred**2)
    assert np.all(np.abs(importance @ values - exact) < 5 * error)

    relative = losses - (losses @ mixture)[:, None]
    products = np.einsum("gk,gi->gki", centred, relative - importance @ relative)
    estimate = -np.tensordot(importance, products, 1)
    spread = np.sqrt(np.tensordot(importance**2, (products + estimate) ** 2, 1))
    chi = superposition.susceptibility(gram_entry, law, mixture)
    assert np.all(np.abs(estimate - chi) < 5 * spread)


def test_superposition_default_observable_is_the_loss():
    mixture = np.array([0.6, 0.4])
    law = posterior_of_two_features(train_bias=False, points=41)
    given = superposition.susceptibility(
        lambda w, b: superposition.population_loss(w, b, mixture)[:, None], law, mixture
    )
    default = superposition.susceptibility(None, law, mixture)
    np.testing.assert_allclose(default, given, atol=1e-15)


# Inversion


def problem(seed: int, *, rows: int = 2, samples: int = 9) -> tuple[Array, Array, Array]:
    """A response whose rows have weighted sum zero, a reachable target, uneven masses."""
    rng = np.random.default_rng(seed)
    mass = rng.dirichlet(5 * np.ones(samples))
    response = rng.normal(size=(rows, samples))
    response -= (response @ mass)[:, None]
    target = response @ (mass * rng.uniform(-0.5, 0.5, samples))
    return response, target, mass


def test_minimum_norm_and_ridge_by_their_dual():
    response, target, mass = problem(19)
    gram = (response * mass) @ response.T
    solution = inversion.minimum_norm(response, target, mass)
    np.testing.assert_allclose(solution, response.T @ np.linalg.solve(gram, target), atol=1e-12)
    np.testing.assert_allclose(response @ (mass * solution), target, atol=1e-13)
    sequential = optimize.minimize(
        lambda s: np.sum(mass * s**2),
        np.zeros(mass.size),
        constraints={"type": "eq", "fun": lambda s: response @ (mass * s) - target},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(solution, sequential.x, atol=1e-5)
    shifted = gram + 0.3 * np.eye(2)
    np.testing.assert_allclose(
        inversion.ridge(response, target, mass, 0.3),
        response.T @ np.linalg.solve(shifted, target),
        atol=1e-12,
    )


def test_truncated_solution_by_eigenvectors_of_the_gram_matrix():
    response, target, mass = problem(20, rows=3)
    values, vectors = np.linalg.eigh((response * mass) @ response.T)
    for keep in (1, 2, 3):
        lead = vectors[:, -keep:]
        expected = response.T @ (lead @ ((lead.T @ target) / values[-keep:]))
        solution = inversion.truncated(response, target, mass, keep)
        np.testing.assert_allclose(solution, expected, atol=1e-11)
    np.testing.assert_allclose(solution, inversion.minimum_norm(response, target, mass), atol=1e-11)


@pytest.mark.parametrize("seed", [21, 22, 23])
def test_box_minimum_norm_by_its_dual(seed):
    response, target, mass = problem(seed)
    free = inversion.minimum_norm(response, target, mass)
    # Between the narrowest feasible box and the widest active one.
    narrowest = 1 / inversion.box_reach(response, target, mass, -1.0, 1.0)
    bound = (narrowest + np.max(np.abs(free))) / 2
    solution = inversion.box_minimum_norm(response, target, mass, -bound, bound)
    assert np.sum(np.isclose(np.abs(solution), bound)) >= 1

    # The dual: s = clip(Aᵀν), whose concave objective has gradient b − A(q s).
    def negative_dual(nu):
        s = np.clip(response.T @ nu, -bound, bound)
        value = np.sum(mass * s**2) / 2 + nu @ (target - response @ (mass * s))
        return -value, response @ (mass * s) - target

    found = optimize.minimize(
        negative_dual, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-12}
    )
    np.testing.assert_allclose(solution, np.clip(response.T @ found.x, -bound, bound), atol=1e-8)
    wide = inversion.box_minimum_norm(response, target, mass, -9.0, 9.0)
    np.testing.assert_allclose(wide, free, atol=1e-12)


def test_box_ridge_by_its_optimality_conditions():
    response, target, mass = problem(24)
    free = inversion.ridge(response, target, mass, 0.01)
    bound = 0.6 * float(np.max(np.abs(free)))
    solution = inversion.box_ridge(response, target, mass, 0.01, -bound, bound)
    gradient = mass * (response.T @ (response @ (mass * solution) - target) + 0.01 * solution)
    low, high = np.isclose(solution, -bound), np.isclose(solution, bound)
    assert np.any(low | high)
    assert np.all(gradient[low] >= -1e-12)
    assert np.all(gradient[high] <= 1e-12)
    np.testing.assert_allclose(gradient[~(low | high)], 0, atol=1e-12)
    loose = inversion.box_ridge(response, target, mass, 0.01, -50.0, 50.0)
    np.testing.assert_allclose(loose, free, atol=1e-10)


def test_box_reach_by_the_support_function():
    response, direction, mass = problem(25)
    reach = inversion.box_reach(response, direction, mass, -0.4, 0.7)
    # α = min over ν with ν·b = 1 of max_s ν·A(q s), scanned over the line of such ν.
    base = direction / (direction @ direction)
    across = np.array([-direction[1], direction[0]])

    def support(t):
        slope = mass * (response.T @ (base + t * across))
        return np.sum(np.where(slope > 0, 0.7, -0.4) * slope)

    scan = np.linspace(-60, 60, 4001) / np.linalg.norm(direction) ** 2
    best = scan[np.argmin([support(t) for t in scan])]
    spacing = scan[1] - scan[0]
    found = optimize.minimize_scalar(
        support,
        bounds=(best - spacing, best + spacing),
        method="bounded",
        options={"xatol": 1e-12},
    )
    np.testing.assert_allclose(reach, found.fun, rtol=1e-6)
    inside = inversion.box_minimum_norm(response, 0.99 * reach * direction, mass, -0.4, 0.7)
    np.testing.assert_allclose(response @ (mass * inside), 0.99 * reach * direction, atol=1e-9)
    with pytest.raises(ValueError, match="found"):
        inversion.box_minimum_norm(response, 1.05 * reach * direction, mass, -0.4, 0.7)


@pytest.mark.parametrize("seed", [26, 27, 28])
def test_entropic_weights_by_their_dual(seed):
    response, target, mass = problem(seed)
    rho = inversion.entropic(response, target, mass)
    np.testing.assert_allclose(np.sum(mass * rho), 1, atol=1e-12)
    np.testing.assert_allclose(response @ (mass * (rho - 1)), target, atol=1e-12)
    wanted = target + response @ mass

    def dual(nu):
        tilted = special.softmax(response.T @ nu + np.log(mass))
        value = special.logsumexp(response.T @ nu, b=mass) - nu @ wanted
        return value, response @ tilted - wanted

    found = optimize.minimize(dual, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-11})
    expected = special.softmax(response.T @ found.x + np.log(mass)) / mass
    np.testing.assert_allclose(rho, expected, atol=1e-8)
    # No feasible direction lowers the divergence.
    rows = np.concatenate([np.ones((1, mass.size)), response]) * mass
    slopes = linalg.null_space(rows).T @ (mass * (np.log(rho) + 1))
    np.testing.assert_allclose(slopes, 0, atol=1e-12)


def test_entropic_and_minimum_norm_agree_for_small_targets():
    response, target, mass = problem(29)
    rho = inversion.entropic(response, 1e-5 * target, mass)
    s = inversion.minimum_norm(response, 1e-5 * target, mass)
    np.testing.assert_allclose(rho - 1, s, atol=1e-9)
