"""Every driver under the settings of JAX that people run with, on a case whose answer is known.

Losses ½‖w − c_z‖² make the posterior Gaussian: with precision P = nβ + γ, w̄ = Σρc/Σρ and
χ_z(w_0) = (c_z − c̄)_0 / P, which a pathwise estimate of a linear φ gives without noise.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpattern as jp

NBETA, GAMMA, SIZE = 10.0, 10.0, 8
SETTINGS = ("plain", "debug_nans", "strict", "x64", "rbg", "unsafe_rbg", "explicit_mesh")
SAMPLERS = {
    "sgld": lambda: jp.sgld(step_size=2e-2),
    "rmsprop_sgld": lambda: jp.rmsprop_sgld(step_size=2e-2),
    "sgnht": lambda: jp.sgnht(step_size=1e-2),
    "mala": lambda: jp.mala(step_size=2e-2),
}
ESTIMATORS = {
    "adjoint": lambda: jp.pathwise(window=60),
    "tangent": lambda: jp.pathwise(mode="tangent"),
    "tangent_batch": lambda: jp.pathwise(mode="tangent", probe_batch=4),
    "auto": lambda: jp.pathwise(window=60, mode="auto"),
    "covariance": jp.covariance,
    "laplace": lambda: jp.laplace(num_signs=2),
}
PLAN = jp.Plan(num_chains=4, num_burnin=60, num_draws=8, thin=4, batch_size=4)


def loss_fn(params, batch):
    return 0.5 * jnp.sum((params["w"][None] - batch["c"]) ** 2, axis=1)


def first(params):
    return params["w"][0]


@pytest.fixture(params=SETTINGS)
def setting(request):
    """The setting of the test, for as long as it runs."""
    contexts = {
        "debug_nans": lambda: jax.debug_nans(True),
        "strict": lambda: jax.numpy_dtype_promotion("strict"),
        "x64": lambda: jax.enable_x64(True),
        "rbg": lambda: jax.default_prng_impl("rbg"),
        "unsafe_rbg": lambda: jax.default_prng_impl("unsafe_rbg"),
    }
    with contexts.get(request.param, contextlib.nullcontext)():
        yield request.param


@pytest.fixture
def centres():
    return np.random.default_rng(0).normal(size=(SIZE, 2)).astype(np.float32)


@pytest.fixture
def posterior(setting, centres):
    data = {"c": jnp.asarray(centres)}
    params = {"w": jnp.asarray(centres.mean(axis=0))}
    if setting == "explicit_mesh":
        mesh = jax.make_mesh((1,), ("data",))
        spec = jax.sharding.PartitionSpec
        data = jax.device_put(data, jax.sharding.NamedSharding(mesh, spec("data")))
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, spec()))
    return jp.localized_posterior(loss_fn, params, data, nbeta=NBETA, localization=GAMMA)


def exact(centres):
    """χ of w_0 to every sample."""
    return (centres - centres.mean(axis=0))[:, 0] / (NBETA + GAMMA)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(posterior, centres, sampler):
    key = jax.random.key(1)
    plan = jp.Plan(num_chains=4, num_burnin=60, num_draws=50, thin=1)
    trace = np.asarray(
        jp.sample(key, posterior, SAMPLERS[sampler](), plan, lambda p: p["w"], progress=False)
    )
    assert trace.dtype == np.float32
    # Deviations of √(1/P) each, 200 draws of which at least a tenth are independent: five errors.
    assert np.abs(trace.mean(axis=(0, 1)) - centres.mean(axis=0)).max() < 5 * 20**-0.5 / 20**0.5
    # λ̂ = d/2 nβ/P = ½, its error from the draws; ten errors also allow for the steps' bias.
    coefficient = jp.llc(key, posterior, SAMPLERS[sampler](), plan, progress=False)
    assert abs(coefficient.mean - 0.5) < 0.25


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_susceptibilities(posterior, centres, estimator):
    probes = {"data": {"c": jnp.asarray(centres)}, "half": {"c": jnp.asarray(centres[:4])}}
    response = jp.susceptibilities(
        jax.random.key(2), posterior, jp.sgld(step_size=2e-2), PLAN, probes=probes,
        observables={"w": first, "loss": jp.mean_loss(loss_fn, probes["half"])},
        estimator=ESTIMATORS[estimator](), progress=False,
    )  # fmt: skip
    wanted = exact(centres)
    if estimator.startswith(("tangent", "auto")):
        assert abs(response.chi["data"][0]) < 0.02
        assert abs(response.chi["half"][0] - wanted[:4].mean()) < 0.02
    elif estimator == "covariance":
        error = np.abs(np.asarray(response.chi["data"][0]) - wanted)
        assert (error < 6 * np.asarray(response.stderr["data"][0]) + 1e-3).all()
    else:
        np.testing.assert_allclose(response.chi["data"][0], wanted, atol=2e-2 * np.ptp(wanted))
    grouped = response if response.columns.grouped else jp.group_mean(response)
    np.testing.assert_allclose(grouped.mass["half"], 1 / 3, rtol=1e-6)
    solution = jp.solve_weights(grouped, {"w": 1e-3}, method=jp.ridge(tau=1e-6))
    total = sum(float(grouped.mass[n] * solution.weights[n]) for n in probes)
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_hybrid(posterior, centres):
    response = jp.susceptibilities(
        jax.random.key(2), posterior, jp.sgld(step_size=2e-2), PLAN,
        probes={"data": {"c": jnp.asarray(centres)}}, components={"all": jp.by_path("*")},
        estimator=jp.covariance(form="hybrid"), progress=False,
    )  # fmt: skip
    assert np.isfinite(np.asarray(response.chi["data"])).all()


def test_solve_weights(posterior, centres):
    response = jp.susceptibilities(
        jax.random.key(2), posterior, jp.sgld(step_size=2e-2), PLAN,
        probes={"data": {"c": jnp.asarray(centres)}}, observables={"w": first},
        estimator=jp.laplace(num_signs=2), progress=False,
    )  # fmt: skip
    for method in (jp.least_norm(), jp.ridge(tau=1e-9), jp.entropic(tau=1e-9), jp.box(tau=1e-9)):
        solution = jp.solve_weights(response, {"w": 1e-3}, method=method)
        rho = np.asarray(solution.weights["data"], np.float64)
        shift = NBETA * np.mean(exact(centres) * (rho - 1))
        assert abs(shift - float(solution.predicted_shift["w"])) < 1e-4
        np.testing.assert_allclose(rho.mean(), 1.0, rtol=1e-5)


def test_measure(posterior, centres):
    measured = jp.measure(
        jax.random.key(3), posterior, jp.sgld(step_size=2e-2), PLAN,
        {
            "llc": jp.LLC(),
            "chi": jp.Chi(probes={"data": {"c": jnp.asarray(centres)}}, observables={"w": first},
                          estimator=jp.covariance()),
            "w": first,
        },
        progress=False,
    )  # fmt: skip
    assert measured["w"].shape == (4, 8)
    assert np.isfinite(np.asarray(measured["chi"].chi["data"])).all()


# optax.adamw fails under strict promotion by itself: its moments' bias correction multiplies
# integers with floats. optax.sgd obeys it.
@pytest.mark.parametrize("weighting", ["loss", "sampling"])
def test_train(setting, centres, weighting):
    weights = np.arange(SIZE) + 0.0
    optimizer = optax.sgd(0.1) if setting == "strict" else optax.adamw(0.1)
    params, history = jp.train(
        jax.random.key(4), loss_fn, {"w": jnp.zeros(2)}, {"c": jnp.asarray(centres)}, optimizer,
        num_steps=200, batch_size=8, weights=weights, weighting=weighting, progress=False,
    )  # fmt: skip
    assert not history.skipped
    wanted = (weights @ centres) / weights.sum()
    assert np.abs(np.asarray(params["w"]) - wanted).max() < 0.5


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators_make_independent_chains_of_any_chunking(centres, impl):
    data = {"c": jnp.asarray(centres)}
    posterior = jp.localized_posterior(
        loss_fn, {"w": jnp.zeros(2)}, data, nbeta=NBETA, localization=GAMMA
    )
    key = jax.random.key(0, impl=impl)
    together, apart = (
        np.asarray(
            jp.sample(
                key, posterior, jp.sgld(step_size=2e-2),
                jp.Plan(num_chains=4, num_burnin=0, num_draws=2, thin=1, chains_at_once=at_once),
                lambda p: p["w"], progress=False,
            )
        )
        for at_once in (None, 1)
    )  # fmt: skip
    np.testing.assert_array_equal(together, apart)
    assert len(np.unique(together[:, 0, 0])) == 4
