"""χ by covariance: streamed moments, exact susceptibilities, responses, errors that cover.

Statistical checks use fixed keys. Where one number is compared with its standard error from G
batches, the limit is five standard errors: a false alarm has probability 3e-5 for G = 20 (Student's
t with G − 1 degrees of freedom) and 1e-6 for G ≥ 100, per number. Each such check also bounds the
error itself, so that a wrong sign or a wrong factor cannot hide in it.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from oracles import anharmonic, euler, gaussian, superposition

import jaxpattern as jp
from jaxpattern import moments
from jaxpattern.models import superposition as toy

susceptibilities = partial(jp.susceptibilities, estimator=jp.covariance())

NBETA, LOCALIZATION, STEP = 4.0, 2.0, 0.06
DIMENSION, SAMPLES = 4, 6


def random_model(seed=0):
    """Positive-definite losses with linear parts, three indefinite observables, and a centre."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(SAMPLES, DIMENSION, DIMENSION))
    losses = gaussian.quadratics(
        roots @ roots.transpose(0, 2, 1) / DIMENSION,
        rng.normal(size=(SAMPLES, DIMENSION)),
        constants=rng.normal(size=SAMPLES),
        linear=rng.normal(size=(SAMPLES, DIMENSION)),
    )
    root = rng.normal(size=(3, DIMENSION, DIMENSION))
    observables = gaussian.Quadratic(
        (root + root.transpose(0, 2, 1)) / 4, rng.normal(size=(3, DIMENSION)), rng.normal(size=3)
    )
    return losses, observables, rng.normal(size=DIMENSION) / 2


LOSSES, OBSERVABLES, CENTRE = random_model()
exact = partial(euler.stationary_posterior, LOSSES, CENTRE, nbeta=NBETA)
exact = partial(exact, localization=LOCALIZATION, step_size=STEP)


def flat(params):
    return jnp.concatenate([params["a"], params["b"].reshape(-1)])


def evaluate(functions, w):
    hessian, slope, constant = functions
    quadratic = jnp.einsum("i,nij,j->n", w, hessian, w, precision="highest")
    return 0.5 * quadratic + jnp.matmul(slope, w, precision="highest") + constant


def quadratic_loss(params, batch):
    return evaluate(batch, flat(params))


def single(stack):
    return tuple(jnp.asarray(part, jnp.float32) for part in stack)


def observable(row):
    part = single(jax.tree.map(lambda x: x[row : row + 1], OBSERVABLES))
    return lambda params: evaluate(part, flat(params))[0]


def quadratic_posterior(losses=LOSSES):
    params = {
        "a": jnp.asarray(CENTRE[:2], jnp.float32),
        "b": jnp.asarray(CENTRE[2:].reshape(2, 1), jnp.float32),
    }
    return jp.localized_posterior(
        quadratic_loss, params, single(losses), nbeta=NBETA, localization=LOCALIZATION
    )


PHI = {f"phi{row}": observable(row) for row in range(3)}
PROBES = {
    "first": single(jax.tree.map(lambda x: x[:4], LOSSES)),
    "rest": single(jax.tree.map(lambda x: x[4:], LOSSES)),
}
SAMPLER = jp.sgld(step_size=STEP)
# The slowest direction relaxes in 2/εP < 17 steps; a batch of 500 draws spans 120 such times.
# Chains start at w* and are not burnt in: the first 20 of 10,000 steps are within the error, and a
# loop that is not there need not be compiled.
LONG = jp.Plan(num_chains=50, num_burnin=0, num_draws=2500, thin=4, num_batches=5)


def concatenate(parts):
    return np.concatenate([np.asarray(parts["first"]), np.asarray(parts["rest"])], axis=-1)


def chain_chi(law, losses=LOSSES, observables=OBSERVABLES):
    return -gaussian.quadratic_covariance(observables, gaussian.relative_losses(losses), law)


def assert_close(response, expected, *, power=0.02):
    """χ within five standard errors, which are a few per cent of the typical size of χ."""
    chi, stderr = concatenate(response.chi), concatenate(response.stderr)
    assert np.all(np.abs(chi - expected) < 5 * stderr), (chi - expected) / stderr
    assert np.sqrt(np.mean(stderr**2)) < power * np.sqrt(np.mean(expected**2))


# --- streamed moments -----------------------------------------------------------------------------


def stream(a, b, weights=None):
    first = (jnp.asarray(a[0]), jax.tree.map(lambda x: jnp.asarray(x[0]), b))
    weights = jnp.ones(len(a)) if weights is None else weights

    def add(state, row):
        return moments.update(state, row[0], row[1], weight=row[2]), None

    rows = (jnp.asarray(a), jax.tree.map(jnp.asarray, b), jnp.asarray(weights, jnp.float32))
    return jax.lax.scan(add, moments.init(*first), rows)[0]


def numpy_covariance(a, b, weights=None):
    """Σ w (a − ā)(b − b̄)ᵀ / (Σw − 1) in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64).reshape(len(b), -1)
    w = np.ones(len(a)) if weights is None else np.asarray(weights, np.float64)
    a, b = (x - np.average(x, axis=0, weights=w) for x in (a, b))
    return np.einsum("t,tk,tn->kn", w, a, b) / (w.sum() - 1)


def losses_near_three(draws=4000):
    """Losses 3 ± 1e-3 in float32, correlated."""
    rng = np.random.default_rng(1)
    common = rng.normal(size=(draws, 1))
    a = 3 + 1e-3 * (common + rng.normal(size=(draws, 2)))
    b = 3 + 1e-3 * (common + rng.normal(size=(draws, 3)))
    return a.astype(np.float32), b.astype(np.float32)


def test_streamed_covariance_survives_float32():
    a, b = losses_near_three()
    expected = numpy_covariance(a, b)
    streamed = moments.finalize(stream(a, b))
    # Rounding of losses of size 3 is 1e-7 of each, 1e-4 of their spread, and random.
    np.testing.assert_allclose(streamed, expected, rtol=1e-3)
    textbook = np.einsum("tk,tn->kn", a, b) / np.float32(len(a)) - np.outer(a.mean(0), b.mean(0))
    assert np.max(np.abs(textbook - expected)) > 0.5 * np.max(np.abs(expected))


@pytest.mark.parametrize("cut", [0, 1, 1000, 3999, 4000])
def test_merged_moments_are_those_of_all_draws(cut):
    a, b = losses_near_three()
    tree = {"x": b[:, :2].reshape(-1, 2, 1), "y": b[:, 2:]}

    def part(start, stop):
        if start == stop:
            return moments.init(jnp.zeros(2), jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), tree))
        return stream(a[start:stop], jax.tree.map(lambda x: x[start:stop], tree))

    merged = moments.merge(part(0, cut), part(cut, 4000))
    covariance = moments.finalize(merged)
    assert merged.weight == 4000
    assert covariance["x"].shape == (2, 2, 1)
    np.testing.assert_allclose(merged.mean_a, a.mean(0, dtype=np.float64), rtol=1e-6)
    measured = np.concatenate([covariance["x"][..., 0], covariance["y"]], axis=1)
    np.testing.assert_allclose(measured, numpy_covariance(a, b), rtol=2e-3)


def test_draws_of_weight_zero_count_for_nothing():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(50, 2)).astype(np.float32), rng.normal(size=(50, 3)).astype(np.float32)
    weights = rng.choice([0.0, 1.0, 0.5, 2.0], size=50)
    weights[:2] = 0.0
    expected = numpy_covariance(a, b, weights)
    a[weights == 0], b[weights == 0] = np.nan, np.inf
    streamed = stream(a, b, weights)
    np.testing.assert_allclose(streamed.weight, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(moments.finalize(streamed), expected, rtol=2e-5, atol=1e-6)


# --- exact susceptibilities -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_response():
    return susceptibilities(
        jax.random.key(0),
        quadratic_posterior(),
        SAMPLER,
        LONG,
        probes=PROBES,
        observables=PHI,
        progress=False,
    )


def test_susceptibility_of_a_gaussian(full_response):
    assert full_response.rows == ("phi0", "phi1", "phi2")
    assert full_response.chi["first"].shape == (3, 4)
    assert full_response.halves["rest"].shape == (2, 3, 2)
    law = exact()
    assert_close(full_response, chain_chi(law))
    mean = gaussian.expectation(OBSERVABLES, law)
    errors = np.abs(full_response.mean - mean) / full_response.mean_stderr
    assert np.all(errors < 5), errors
    assert np.all(full_response.mean_stderr < 0.01)
    assert np.all(np.asarray(full_response.rhat) < 1.01)


def test_halves_are_two_independent_estimates(full_response):
    expected = chain_chi(exact())
    halves, stderr = concatenate(full_response.halves), concatenate(full_response.stderr)
    # Half the draws have √2 times the error.
    assert np.all(np.abs(halves - expected) < 5 * np.sqrt(2) * stderr)
    # Their difference has twice the error of the whole: 18 correlated numbers, between the 1e-4
    # quantiles of one (χ²: 1e-8 to 15).
    ratio = np.mean(((halves[0] - halves[1]) / (2 * stderr)) ** 2)
    assert 0.01 < ratio < 15
    np.testing.assert_allclose(
        halves.mean(0), concatenate(full_response.chi), atol=0.2 * stderr.max()
    )


def test_rows_of_an_exact_susceptibility_sum_to_zero(full_response):
    mass = np.concatenate([full_response.mass["first"], full_response.mass["rest"]])
    np.testing.assert_allclose(mass.sum(), 1, rtol=1e-6)
    # Σ_z q_z D_z = 0 at every draw when the probes are the data, so this holds without error.
    np.testing.assert_allclose(concatenate(full_response.chi) @ mass, 0, atol=1e-5)


COMPONENTS = {
    # Two of one shape, which run together, around one of another.
    "a0": jp.by_slice({"a": (0, 0)}),
    "b": jp.by_path("b"),
    "a1": jp.by_slice({"a": (0, 1)}),
    "mask": jp.by_mask({"a": np.array([True, False]), "b": np.array([[False], [True]])}),
}
FREE = {"a0": [0], "b": [2, 3], "a1": [1], "mask": [0, 3]}


@pytest.mark.parametrize("form", ["centered", "hybrid"])
@pytest.mark.optimized
def test_components_have_their_own_susceptibilities(form):
    posterior = quadratic_posterior()
    response = susceptibilities(
        jax.random.key(1),
        posterior,
        SAMPLER,
        LONG,
        probes=PROBES,
        observables=PHI,
        components=COMPONENTS,
        estimator=jp.covariance(form=form),
        progress=False,
    )
    assert response.rows == tuple(f"{name}/phi{row}" for name in COMPONENTS for row in range(3))
    relative = gaussian.relative_losses(LOSSES)
    expected = []
    for name in COMPONENTS:
        law = exact(free=np.array(FREE[name]))
        chi = chain_chi(law)
        if form == "hybrid":
            shift = gaussian.expectation(relative, law) - gaussian.expectation(relative, exact())
            chi = chi - gaussian.expectation(OBSERVABLES, law)[:, None] * shift
        expected.append(chi)
    assert_close(response, np.concatenate(expected), power=0.03)


def test_components_default_to_their_excess_loss():
    response = susceptibilities(
        jax.random.key(2),
        quadratic_posterior(),
        SAMPLER,
        LONG,
        probes=PROBES,
        components={"b": COMPONENTS["b"]},
        progress=False,
    )
    assert response.rows == ("b",)
    law, phi = exact(free=np.array([2, 3])), gaussian.excess_loss(LOSSES, CENTRE)
    assert_close(response, chain_chi(law, observables=phi))
    error = abs(response.mean[0] - gaussian.expectation(phi, law)[0])
    assert error < 5 * response.mean_stderr[0] < 0.05


def test_reference_stands_for_the_loss():
    """χ_z = −Cov[φ, ℓ_z − L_ref] with the posterior that of the data."""
    reference = jax.tree.map(lambda x: x[:2], LOSSES)
    response = susceptibilities(
        jax.random.key(3),
        quadratic_posterior(),
        SAMPLER,
        LONG,
        probes=PROBES,
        observables={"phi0": PHI["phi0"]},
        reference=single(reference),
        progress=False,
    )
    mean = gaussian.mean_loss(reference)
    relative = gaussian.Quadratic(*(x - y for x, y in zip(LOSSES, mean, strict=True)))
    phi = jax.tree.map(lambda x: x[:1], OBSERVABLES)
    assert_close(response, -gaussian.quadratic_covariance(phi, relative, exact()), power=0.03)


# --- the estimate as arithmetic -------------------------------------------------------------------


def test_streamed_estimates_are_those_of_the_whole_trace():
    """χ, its error, its halves and the mean of a group, from all draws at once in float64."""
    plan = jp.Plan(num_chains=4, num_burnin=0, num_draws=60, thin=2, num_batches=3)
    posterior, key = quadratic_posterior(), jax.random.key(4)
    response = susceptibilities(
        key, posterior, SAMPLER, plan, probes=PROBES, observables=PHI, progress=False
    )
    trace = jp.sample(key, posterior, SAMPLER, plan, flat, progress=False)
    w = np.asarray(trace, np.float64).reshape(-1, DIMENSION)
    phi = np.stack([gaussian.evaluate(OBSERVABLES, x) for x in w])
    relative = np.stack([gaussian.evaluate(gaussian.relative_losses(LOSSES), x) for x in w])
    phi_0, relative_0 = phi - phi.mean(0), relative - relative.mean(0)
    products = -phi_0[:, :, None] * relative_0[:, None, :]
    chi = products.sum(0) / (len(w) - 1)
    np.testing.assert_allclose(concatenate(response.chi), chi, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(response.mean, phi.mean(0), rtol=1e-5)
    # Twelve batches of twenty draws.
    batches = products.reshape(12, 20, 3, SAMPLES).mean(1)
    bessel = len(w) / (len(w) - 1)
    stderr = bessel * batches.std(0, ddof=1) / np.sqrt(12)
    np.testing.assert_allclose(concatenate(response.stderr), stderr, rtol=1e-4, atol=1e-5)
    halves = np.stack(
        [np.cov(phi[i].T, relative[i].T, ddof=0)[:3, 3:] for i in (slice(120), slice(120, None))]
    )
    np.testing.assert_allclose(concatenate(response.halves), -bessel * halves, rtol=1e-3, atol=1e-4)
    grouped = jp.group_mean(response)
    for name, columns in (("first", slice(4)), ("rest", slice(4, None))):
        means = bessel * batches[:, :, columns].mean(2)
        np.testing.assert_allclose(response.batches[name], means, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grouped.chi[name], chi[:, columns].mean(1), rtol=1e-4, atol=1e-5)
        expected = means.std(0, ddof=1) / np.sqrt(12)
        np.testing.assert_allclose(grouped.stderr[name], expected, rtol=1e-4, atol=1e-5)
        assert grouped.mass[name] == pytest.approx({"first": 4 / 6, "rest": 2 / 6}[name])


def test_an_observable_of_several_rows():
    """Losses as observables: χ is their covariance with each other, in float64 from all draws."""
    plan = jp.Plan(num_chains=4, num_burnin=0, num_draws=60, thin=2, num_batches=3)
    posterior, key = quadratic_posterior(), jax.random.key(4)
    observables = {"loss": lambda params: quadratic_loss(params, PROBES["first"]), **PHI}
    response = susceptibilities(
        key, posterior, SAMPLER, plan, probes=PROBES, observables=observables, progress=False
    )
    assert response.rows == ("loss/0", "loss/1", "loss/2", "loss/3", "phi0", "phi1", "phi2")
    trace = jp.sample(key, posterior, SAMPLER, plan, flat, progress=False)
    w = np.asarray(trace, np.float64).reshape(-1, DIMENSION)
    losses = np.stack([gaussian.evaluate(LOSSES, x) for x in w])
    phi = np.stack([gaussian.evaluate(OBSERVABLES, x) for x in w])
    level = losses.mean(axis=1, keepdims=True)
    rows = np.concatenate([losses[:, :4], phi], axis=1)
    covariance = np.cov(rows.T, (losses - level).T)[:7, 7:]
    np.testing.assert_allclose(concatenate(response.chi), -covariance, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(response.mean, rows.mean(0), rtol=1e-5)
    # Row by row what one function per loss gives.
    single_rows = {
        f"l{k}": lambda params, k=k: quadratic_loss(params, PROBES["first"])[k] for k in range(4)
    }
    apart = susceptibilities(
        key, posterior, SAMPLER, plan, probes=PROBES, observables=single_rows, progress=False
    )
    np.testing.assert_allclose(
        concatenate(apart.stderr), concatenate(response.stderr)[:4], rtol=1e-4, atol=1e-6
    )


def test_group_mean_takes_the_shares_of_the_data(full_response):
    grouped = jp.group_mean(full_response, {"first": 1.0, "rest": 3.0})
    assert grouped.mass["first"] == pytest.approx(0.25)
    assert grouped.mass["rest"] == pytest.approx(0.75)
    np.testing.assert_array_equal(grouped.chi["rest"], jp.group_mean(full_response).chi["rest"])
    expected = chain_chi(exact())[:, 4:].mean(1)
    assert np.all(np.abs(grouped.chi["rest"] - expected) < 5 * grouped.stderr["rest"])
    assert np.all(grouped.stderr["rest"] < 0.03 * np.sqrt(np.mean(expected**2)))
    assert full_response.num_samples == 6


def largest_array(function, *args):
    """Elements of the largest array that a program computes anywhere."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (getattr(v.aval, "size", 0) for v in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


def test_memory_of_the_columns_does_not_grow_with_the_draws():
    many = jax.tree.map(lambda x: jnp.tile(x, (100,) + (1,) * (x.ndim - 1)), single(LOSSES))
    posterior = quadratic_posterior()

    def run(num_draws, key):
        plan = jp.Plan(num_chains=2, num_burnin=0, num_draws=num_draws, thin=1, num_batches=4)
        response = susceptibilities(
            key,
            posterior,
            SAMPLER,
            plan,
            probes={"many": many},
            observables={"phi0": PHI["phi0"]},
            progress=False,
        )
        return response.chi, response.stderr

    few, more = (largest_array(partial(run, n), jax.random.key(0)) for n in (50, 500))
    assert few == more


# --- responses ------------------------------------------------------------------------------------


@pytest.mark.optimized
def test_response_to_reweighted_data():
    """⟨φ⟩ under weights ρ is exact, and nβ Σ q χ (ρ − 1) predicts its shift to first order."""
    rng = np.random.default_rng(5)
    rho = 1 + 0.6 * rng.uniform(-1, 1, size=SAMPLES)
    rho *= SAMPLES / rho.sum()
    posterior = quadratic_posterior().reweight(jnp.asarray(rho, jnp.float32))
    values = jp.sample(
        jax.random.key(6),
        posterior,
        jp.mala(step_size=0.3),
        replace(LONG, num_draws=2100),
        lambda params: jnp.stack([phi(params) for phi in PHI.values()]),
        progress=False,
    )
    means = np.asarray(values[:, 100:], np.float64).mean(1)
    expected = gaussian.response(
        OBSERVABLES, LOSSES, CENTRE, nbeta=NBETA, localization=LOCALIZATION, data_weights=rho
    )
    unmoved = gaussian.response(OBSERVABLES, LOSSES, CENTRE, nbeta=NBETA, localization=LOCALIZATION)
    stderr = means.std(0, ddof=1) / np.sqrt(len(means))
    # 50 chains: five standard errors are a false alarm of 8e-6 a number.
    assert np.all(np.abs(means.mean(0) - expected) < 5 * stderr)
    assert np.all(5 * stderr < 0.2 * np.abs(expected - unmoved).max())


def test_first_order_prediction_is_the_weight_derivative():
    response = susceptibilities(
        jax.random.key(7),
        quadratic_posterior(),
        jp.mala(step_size=0.3),
        LONG,
        probes=PROBES,
        observables=PHI,
        progress=False,
    )
    derivative = gaussian.weight_derivative(
        OBSERVABLES, LOSSES, CENTRE, nbeta=NBETA, localization=LOCALIZATION
    )
    change = np.random.default_rng(5).uniform(-0.1, 0.1, size=SAMPLES)
    mass = np.concatenate([response.mass["first"], response.mass["rest"]])
    scale = float(response.nbeta) * mass * change
    predicted, expected = concatenate(response.chi) @ scale, derivative @ change
    # The errors of the columns add up at most.
    limit = 5 * concatenate(response.stderr) @ np.abs(scale)
    assert np.all(np.abs(predicted - expected) < limit)
    assert np.all(limit < 0.3 * np.abs(expected).max())


# --- posteriors that are not Gaussian -------------------------------------------------------------


def tilted_potential(params, batch):
    """½x² + α/6 x³ + g/24 x⁴ + h x, h from the batch."""
    x = params["x"]
    return x**2 / 2 + x**3 / 12 + x**4 / 24 + batch * x


@pytest.mark.parametrize("nbeta", [10.0, 100.0])
@pytest.mark.optimized
def test_anharmonic_susceptibility(nbeta):
    """−Cov[x², D] with D = ±x: exactly zero in the Gaussian approximation."""
    data = jnp.asarray([1.0, -1.0])
    posterior = jp.localized_posterior(
        tilted_potential, {"x": jnp.zeros(())}, data, nbeta=nbeta, localization=0.0
    )
    # ε of one posterior variance.
    response = susceptibilities(
        jax.random.key(8),
        posterior,
        jp.mala(step_size=1.0 / nbeta),
        jp.Plan(num_chains=400, num_burnin=0, num_draws=1500, thin=3, num_batches=2),
        probes={"tilt": data},
        observables={"square": lambda params: params["x"] ** 2},
        progress=False,
    )
    scaled = nbeta**2 * np.asarray(response.chi["tilt"][0])
    stderr = nbeta**2 * np.asarray(response.stderr["tilt"][0])
    table = {10.0: 0.83586, 100.0: 0.98139}[nbeta]
    assert -anharmonic.scaled_covariance(nbeta) == pytest.approx(table, abs=1e-5)
    assert np.all(np.abs(scaled - [table, -table]) < 5 * stderr)
    assert np.all(stderr < 0.05 * table)


@pytest.mark.optimized
def test_susceptibility_to_the_mixture_of_features():
    """The toy model of superposition: two features in one dimension, by quadrature on a grid."""
    mixture, nbeta, localization = np.array([0.6, 0.4]), 30.0, 20.0
    params = {"W": jnp.asarray([[0.9, -0.6]]), "b": jnp.asarray([-0.1, 0.05])}
    features = jnp.arange(2)
    posterior = jp.localized_posterior(
        toy.loss_fn,
        params,
        features,
        nbeta=nbeta,
        localization=localization,
        weights=jnp.asarray(mixture, jnp.float32),
    )
    response = susceptibilities(
        jax.random.key(9),
        posterior,
        jp.mala(step_size=0.02),
        jp.Plan(num_chains=100, num_burnin=0, num_draws=1500, thin=4, num_batches=2),
        probes={"features": features},
        observables={
            "overlap": lambda p: p["W"][0, 0] * p["W"][0, 1],
            "norm": lambda p: jnp.sum(p["W"] ** 2) + p["b"][0],
        },
        progress=False,
    )
    law = superposition.grid_posterior(
        np.array([[0.9, -0.6]]),
        np.array([-0.1, 0.05]),
        mixture=mixture,
        nbeta=nbeta,
        localization=localization,
        points=25,
        half_width=1.3,
    )

    def observables(weights, bias):
        overlap = weights[:, 0, 0] * weights[:, 0, 1]
        return np.stack([overlap, np.sum(weights**2, (1, 2)) + bias[:, 0]], -1)

    expected = superposition.susceptibility(observables, law, mixture)
    chi, stderr = (np.asarray(x["features"]) for x in (response.chi, response.stderr))
    assert np.all(np.abs(chi - expected) < 5 * stderr), (chi, expected, stderr)
    assert np.all(stderr < 0.06 * np.abs(expected).max())
    np.testing.assert_allclose(chi @ mixture, 0, atol=1e-6)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["centered", "hybrid"])
@pytest.mark.optimized
def test_intervals_cover(form):
    """χ ± 1.96 standard errors holds the exact χ in 90 to 98 % of 300 independent runs.

    A run is typical: four chains, thinned to an autocorrelation of about a half, 20 batches, for
    which Student's t makes it 93.5 %. The columns of a run are correlated, so the error of the
    measured coverage is taken over runs. It is .006: a false alarm is five of them away.
    """
    plan = jp.Plan(num_chains=4, num_burnin=0, num_draws=400, thin=5)
    posterior = quadratic_posterior()
    components = {"b": COMPONENTS["b"]} if form == "hybrid" else None

    def run(key):
        response = susceptibilities(
            key,
            posterior,
            SAMPLER,
            plan,
            probes=PROBES,
            observables=PHI,
            components=components,
            estimator=jp.covariance(form=form),
            progress=False,
        )
        return response.chi, response.stderr

    keys = jax.random.split(jax.random.key(10), 300)
    chi, stderr = map(concatenate, jax.jit(jax.vmap(run))(keys))
    if form == "centered":
        expected = chain_chi(exact())
    else:
        law, relative = exact(free=np.array([2, 3])), gaussian.relative_losses(LOSSES)
        shift = gaussian.expectation(relative, law) - gaussian.expectation(relative, exact())
        expected = chain_chi(law) - gaussian.expectation(OBSERVABLES, law)[:, None] * shift
    covered = np.mean(np.abs(chi - expected) < 1.96 * stderr, axis=(1, 2))
    coverage, error = covered.mean(), covered.std(ddof=1) / np.sqrt(len(covered))
    assert 0.90 < coverage < 0.98, f"{form}: coverage {coverage:.3f} ± {error:.3f}"
    # The reported error is the spread over runs.
    ratio = np.sqrt(np.mean(stderr**2, axis=0)) / chi.std(0, ddof=1)
    assert np.all((ratio > 0.8) & (ratio < 1.2)), ratio
