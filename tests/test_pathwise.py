"""Pathwise, tangent and Laplace estimators: exact against autodiff, right against closed forms."""

import itertools
import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config
from oracles import anharmonic, euler, gaussian, superposition

import jaxpattern as jp
from jaxpattern.chains.kernel import build_kernel, position_of, streams_of
from jaxpattern.chains.lanes import ComponentGroup, make_lanes
from jaxpattern.models import superposition as toy

KEY = jax.random.key(20)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def tiny_network(num_samples=6):
    """A nonlinear regression with few weights, in the current default precision."""
    rng = np.random.default_rng(0)
    data = {
        "x": jnp.asarray(rng.normal(size=(num_samples, 3))),
        "y": jnp.asarray(rng.normal(size=num_samples)),
    }
    params = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=4))}
    return params, data


def network_loss(params, batch):
    return 0.5 * (jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2


OBSERVABLES = {
    "cubic": lambda p: jnp.sum(p["a"] ** 2 * p["b"][None]),
    "sine": lambda p: jnp.sum(jnp.sin(p["b"]) + jnp.cos(p["a"]).sum(0)),
}


class Tilted:
    """A posterior whose loss is L + Σ_z h_z (ℓ_z − L), mini-batches being those of L alone."""

    def __init__(self, posterior, probes, tilt):
        self.posterior, self.probes, self.tilt = posterior, probes, tilt
        self.nbeta, self.localization = posterior.nbeta, posterior.localization
        self.center, self.minibatch = posterior.center, posterior.minibatch

    def loss_gradient(self, position, minibatch):
        posterior = self.posterior

        def added(w):
            return jnp.sum(self.tilt * (posterior.losses(w, self.probes) - posterior.loss(w)))

        gradient = posterior.loss_gradient(position, minibatch)
        return jax.tree.map(jnp.add, gradient, jax.grad(added)(position))

    def grad_estimator(self, position, minibatch):
        return self.posterior.drift(position, self.loss_gradient(position, minibatch))


def expectation_of_chains(posterior, sampler, plan, probes, antithetic, tilt):
    """The mean of the observables over all draws of all chains, by a plain loop of the sampler."""

    def chain(key, posterior):
        kernel = build_kernel(Tilted(posterior, probes, tilt), sampler, plan.batch_size)
        streams = streams_of(key)

        def step(state, t):
            state = kernel.step(jax.random.fold_in(streams.step, t), state)
            params = posterior.embed(position_of(state))
            return state, jnp.stack([phi(params) for phi in OBSERVABLES.values()])

        state = kernel.init(posterior.center, streams.init)
        _, values = jax.lax.scan(step, state, jnp.arange(plan.num_steps))
        return jnp.mean(values[plan.num_burnin + plan.thin - 1 :: plan.thin], axis=0)

    lanes = make_lanes(ComponentGroup(), plan, antithetic, None)
    keys = jax.vmap(lambda lane: lane.key(KEY))(lanes)
    if not antithetic:
        return jnp.mean(jax.vmap(partial(chain, posterior=posterior))(keys), axis=0)
    twins = [replace(posterior, mirror=jnp.asarray((-1.0) ** c)) for c in range(plan.num_chains)]
    return jnp.mean(jnp.stack([chain(key, p) for key, p in zip(keys, twins, strict=True)]), axis=0)


SAMPLERS = {
    "sgld": jp.sgld(step_size=1e-3),
    "rmsprop": jp.rmsprop_sgld(step_size=1e-3),
    "rmsprop without correction": jp.rmsprop_sgld(
        step_size=1e-3, initial_square=0.0, bias_correction=False
    ),
    "sgnht": jp.sgnht(step_size=1e-3, friction=3.0),
}


MINIBATCHES = jp.Plan(num_chains=2, num_burnin=0, num_draws=2, thin=3, batch_size=4)
BURN_IN = jp.Plan(num_chains=1, num_burnin=3, num_draws=4, thin=1, batch_size=None)
PART = jp.by_slice({"a": (1, [0, 2])})
FAST_CASES = [
    ("sgld", None, MINIBATCHES, True),
    ("sgnht", None, BURN_IN, False),
    ("rmsprop", PART, MINIBATCHES, True),
]
EXACT_CASES = [
    pytest.param(*case, marks=() if case in FAST_CASES else pytest.mark.slow)
    for case in itertools.product(SAMPLERS, (None, PART), (MINIBATCHES, BURN_IN), (False, True))
]


@pytest.mark.parametrize(("name", "restriction", "plan", "antithetic"), EXACT_CASES)
def test_equals_reverse_mode_through_the_whole_chain(x64, name, restriction, plan, antithetic):
    sampler = SAMPLERS[name]
    params, data = tiny_network()
    posterior = jp.localized_posterior(network_loss, params, data, nbeta=20.0, localization=30.0)
    if restriction is not None:
        posterior = jp.restrict(posterior, restriction)
    response = jp.susceptibilities(
        KEY, posterior, sampler, plan,
        observables=OBSERVABLES, probes={"all": data}, reference=data,
        estimator=jp.pathwise(
            window=100, every=1, antithetic=antithetic, hessian_batch=6, growth_limit=1e6,
            product="autodiff",
        ),
        progress=False,
    )  # fmt: skip
    expectation = partial(expectation_of_chains, posterior, sampler, plan, data, antithetic)
    exact = jax.jit(jax.jacrev(expectation))(jnp.zeros(6))
    np.testing.assert_allclose(response.chi["all"], exact / 20.0, rtol=1e-9, atol=1e-14)


def test_tangents_equal_the_adjoint_on_the_same_chain(x64):
    sampler = SAMPLERS["rmsprop"]
    params, data = tiny_network()
    posterior = jp.localized_posterior(network_loss, params, data, nbeta=20.0, localization=30.0)
    probes = {
        # Out of alphabetical order: jit hands dictionaries back sorted.
        "second": jax.tree.map(lambda x: x[:4], data),
        "first": jax.tree.map(lambda x: x[4:], data),
    }
    plan = jp.Plan(num_chains=2, num_burnin=2, num_draws=4, thin=2, batch_size=3)
    run = partial(
        jp.susceptibilities, KEY, posterior, sampler, plan,
        observables=OBSERVABLES, probes=probes, reference=data, progress=False,
    )  # fmt: skip
    adjoint = jp.group_mean(
        run(
            estimator=jp.pathwise(
                window=50, every=1, hessian_batch=3, product="autodiff", growth_limit=1e6
            )
        )
    )
    tangent = run(estimator=jp.pathwise(mode="tangent", product="autodiff"))
    assert tangent.estimator.startswith("pathwise (tangent, autodiff's Hessian)")
    for name in probes:
        np.testing.assert_allclose(tangent.chi[name], adjoint.chi[name], rtol=1e-9)
        np.testing.assert_allclose(tangent.stderr[name], adjoint.stderr[name], rtol=1e-6)
        np.testing.assert_allclose(tangent.mass[name], adjoint.mass[name], rtol=1e-9)


def test_auto_takes_the_cheaper_mode_and_says_which():
    params, data = tiny_network()
    posterior = jp.localized_posterior(network_loss, params, data, nbeta=20.0, localization=300.0)
    plan = jp.Plan(num_chains=2, num_burnin=2, num_draws=100, thin=2, batch_size=3)
    sampler = SAMPLERS["sgld"]
    many = {f"phi{i}": OBSERVABLES["sine"] for i in range(8)}
    run = partial(jp.susceptibilities, KEY, posterior, sampler, plan, progress=False)
    auto = jp.pathwise(mode="auto")
    assert (
        run(observables=many, probes={"all": data}, estimator=auto).estimator
        == "pathwise (tangent, one-sided secants)"
    )
    groups = {f"z{i}": jax.tree.map(lambda x, i=i: x[i : i + 1], data) for i in range(6)}
    chosen = run(observables={"one": OBSERVABLES["sine"]}, probes=groups, estimator=auto)
    assert chosen.estimator.startswith("pathwise (adjoint")
    assert chosen.chi["z0"].shape == (1,)


def gaussian_problem(num_samples=8, dim=3, seed=0):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(num_samples, dim, dim))
    hessians = factors @ factors.transpose(0, 2, 1) / dim + 0.3 * np.eye(dim)
    centres = 0.3 * rng.normal(size=(num_samples, dim))
    losses = gaussian.quadratics(hessians, centres)
    centre = np.linalg.solve(hessians.sum(0), np.einsum("nij,nj->i", hessians, centres))
    data = {"A": jnp.asarray(hessians, jnp.float32), "c": jnp.asarray(centres, jnp.float32)}
    return losses, centre, data


def gaussian_loss(params, batch):
    error = params["w"][None] - batch["c"]
    return 0.5 * jnp.einsum("bi,bij,bj->b", error, batch["A"], error)


OBSERVED = gaussian.Quadratic(
    np.stack([np.diag([1.0, 2.0, -1.0]), np.eye(3)]),
    np.array([[0.0, 0, 0], [1, 1, 1]]),
    np.zeros(2),
)


def observed(k):
    a, b = (
        jnp.asarray(OBSERVED.hessian[k], jnp.float32),
        jnp.asarray(OBSERVED.slope[k], jnp.float32),
    )
    return lambda p: 0.5 * p["w"] @ a @ p["w"] + b @ p["w"]


@pytest.mark.parametrize("every", [1, 5])
def test_gaussian_model(every):
    """False alarms: 16 columns at 5 standard errors with 39 degrees of freedom, 2e-4."""
    losses, centre, data = gaussian_problem()
    posterior = jp.localized_posterior(
        gaussian_loss, {"w": jnp.asarray(centre, jnp.float32)}, data, nbeta=30.0, localization=10.0
    )
    plan = jp.Plan(num_chains=8, num_burnin=100, num_draws=200, thin=20, num_batches=5)
    response = jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=4e-3), plan,
        observables={"a": observed(0), "b": observed(1)}, probes={"all": data},
        estimator=jp.pathwise(window=200, every=every), progress=False,
    )  # fmt: skip
    exact = euler.chain_susceptibility(
        OBSERVED, losses, centre, nbeta=30.0, localization=10.0, step_size=4e-3
    )
    error = np.asarray(response.chi["all"]) - exact
    assert np.all(np.abs(error) < 5 * np.asarray(response.stderr["all"]))
    assert np.mean(np.asarray(response.stderr["all"])) < 0.1 * np.mean(np.abs(exact))
    assert response.diagnostics["growth"].max() <= 1.0
    assert response.diagnostics["truncated"].max() == 0.0


def test_restricted_gaussian_components_in_one_program():
    """False alarms: 16 columns at 5 standard errors with 39 degrees of freedom, 2e-4."""
    losses, centre, data = gaussian_problem()
    posterior = jp.localized_posterior(
        gaussian_loss, {"w": jnp.asarray(centre, jnp.float32)}, data, nbeta=30.0, localization=10.0
    )
    free = {"first": [0, 1], "second": [0, 2]}
    plan = jp.Plan(num_chains=8, num_burnin=100, num_draws=200, thin=10, num_batches=5)
    response = jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=4e-3), plan, probes={"all": data},
        components={name: jp.by_slice({"w": (0, index)}) for name, index in free.items()},
        estimator=jp.pathwise(window=150), progress=False,
    )  # fmt: skip
    assert response.rows == ("first", "second")
    for k, index in enumerate(free.values()):
        exact = euler.chain_susceptibility(
            gaussian.excess_loss(losses, centre), losses, centre,
            nbeta=30.0, localization=10.0, step_size=4e-3, free=np.array(index),
        )[0]  # fmt: skip
        error = np.asarray(response.chi["all"][k]) - exact
        assert np.all(np.abs(error) < 5 * np.asarray(response.stderr["all"][k]))


def test_linear_observables_have_no_noise():
    """Where φ and ℓ_z − L are linear and L is quadratic, every chain gives χ exactly."""
    rng = np.random.default_rng(1)
    slopes = rng.normal(size=(6, 3))
    slopes -= slopes.mean(0)
    data = jnp.asarray(slopes, jnp.float32)
    loss = lambda p, b: 0.5 * jnp.sum(p["w"] ** 2) + b @ p["w"]  # noqa: E731
    posterior = jp.localized_posterior(
        loss, {"w": jnp.zeros(3)}, data, nbeta=30.0, localization=10.0
    )
    plan = jp.Plan(num_chains=2, num_burnin=10, num_draws=4, thin=5, batch_size=2)
    response = jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=0.02), plan, observables={"sum": lambda p: p["w"].sum()},
        probes={"all": data}, reference=data, estimator=jp.pathwise(window=60, every=1),
        progress=False,
    )  # fmt: skip
    exact = -slopes.sum(axis=1) / (30 + 10)
    # Draws less than 60 steps from the start have short windows: ten relaxation times take 24.
    np.testing.assert_allclose(response.chi["all"][0][:], exact, rtol=2e-2)
    late = jp.Plan(num_chains=2, num_burnin=80, num_draws=4, thin=5, batch_size=2)
    response = jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=0.02), late, observables={"sum": lambda p: p["w"].sum()},
        probes={"all": data}, reference=data, estimator=jp.pathwise(window=60, every=1),
        progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(response.chi["all"][0], exact, rtol=1e-5)
    assert response.stderr["all"].max() < 1e-6 * np.abs(exact).max()


def test_window_reaches_the_full_derivative():
    _, centre, data = gaussian_problem()
    posterior = jp.localized_posterior(
        gaussian_loss, {"w": jnp.asarray(centre, jnp.float32)}, data, nbeta=30.0, localization=30.0
    )
    plan = jp.Plan(num_chains=2, num_burnin=120, num_draws=20, thin=5)
    chi, tails = [], []
    for window in (None, 120, 5):
        response = jp.susceptibilities(
            KEY, posterior, jp.sgld(step_size=4e-3), plan,
            observables={"a": observed(0), "b": observed(1)}, probes={"all": data},
            estimator=jp.pathwise(window=window, every=1), progress=False,
        )  # fmt: skip
        chi.append(np.asarray(response.chi["all"]))
        tails.append(float(response.diagnostics["tail"][:, -1].max()))
    scale = np.abs(chi[1]).max(axis=1, keepdims=True)
    assert np.max(np.abs(chi[0] - chi[1]) / scale) < 0.01
    assert np.max(np.abs(chi[2] - chi[1]) / scale) > 0.05
    assert tails[0] < 0.02 < tails[2]


@pytest.mark.optimized
def test_anharmonic_table():
    """t² Cov[x², x] at t = 10, where the model is far from Gaussian. False alarms: 6e-7."""
    alpha, g, t = 0.5, 1.0, 10.0
    signs = jnp.array([1.0, -1.0])

    def loss(p, b):
        x = p["x"]
        return 0.5 * x**2 + alpha / 6 * x**3 + g / 24 * x**4 + b * x

    posterior = jp.localized_posterior(loss, {"x": jnp.zeros(())}, signs, nbeta=t, localization=0.0)
    plan = jp.Plan(num_chains=192, num_burnin=600, num_draws=200, thin=20, num_batches=1)
    step = 0.01
    response = jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=step), plan,
        observables={"square": lambda p: p["x"] ** 2}, probes={"tilt": signs},
        estimator=jp.pathwise(window=300, every=5), progress=False,
    )  # fmt: skip
    exact = anharmonic.scaled_covariance(t, alpha=alpha, g=g)
    measured = -(t**2) * np.asarray(response.chi["tilt"][0])
    stderr = t**2 * np.asarray(response.stderr["tilt"][0])
    assert stderr.max() < 0.05
    # The step bias of the variance is εt/4 / (1 − εt/4) = 2.6 %; χ here is cubic in it.
    assert abs(measured[0] - exact) < 5 * stderr[0] + 0.08 * abs(exact)
    np.testing.assert_allclose(measured[0], -measured[1], rtol=1e-4)


@pytest.mark.optimized
def test_coverage_of_nominal_95_percent_intervals():
    """300 repetitions × 8 columns; the share that covers is within 90 and 98 %.

    20 batches in 4 independent pairs of chains, for which Student's t makes it 93.5 %.
    """
    losses, centre, data = gaussian_problem()
    posterior = jp.localized_posterior(
        gaussian_loss, {"w": jnp.asarray(centre, jnp.float32)}, data, nbeta=30.0, localization=30.0
    )
    plan = jp.Plan(num_chains=8, num_burnin=60, num_draws=80, thin=10)
    exact = euler.chain_susceptibility(
        OBSERVED, losses, centre, nbeta=30.0, localization=30.0, step_size=4e-3
    )[0]

    @jax.jit
    @jax.vmap
    def measure(key):
        response = jp.susceptibilities(
            key, posterior, jp.sgld(step_size=4e-3), plan, observables={"a": observed(0)},
            probes={"all": data}, estimator=jp.pathwise(window=100, every=5), progress=False,
        )  # fmt: skip
        return response.chi["all"][0], response.stderr["all"][0]

    chi, stderr = measure(jax.random.split(KEY, 300))
    covered = np.abs(np.asarray(chi) - exact) < 1.96 * np.asarray(stderr)
    assert 0.90 < covered.mean() < 0.98, f"covered {covered.mean():.3f} of {covered.size}"


def saddle():
    """A loss that curves down along one axis, faster than the localization holds."""
    data = jnp.asarray(np.random.default_rng(3).normal(size=(6, 2)), jnp.float32)

    def loss(p, b):
        w = p["w"]
        return 0.5 * w[1] ** 2 + 2 * jnp.cos(2 * w[0]) + 0.1 * b @ w

    return jp.localized_posterior(
        loss, {"w": jnp.zeros(2)}, data, nbeta=30.0, localization=1.0
    ), data


def test_growth_is_noticed_and_cut():
    posterior, data = saddle()
    plan = jp.Plan(num_chains=2, num_burnin=0, num_draws=4, thin=3)
    run = partial(
        jp.susceptibilities, KEY, posterior, jp.sgld(step_size=2e-3), plan,
        observables={"first": lambda p: p["w"][0]}, probes={"all": data}, progress=False,
    )  # fmt: skip
    with pytest.warns(jp.GrowthWarning, match="cut there"):
        response = run(estimator=jp.pathwise(window=12, growth_limit=1.5))
    assert response.diagnostics["truncated"].max() > 0
    assert response.diagnostics["growth"].max() > 1.5
    assert np.isfinite(np.asarray(response.chi["all"])).all()
    with pytest.warns(jp.GrowthWarning, match="by covariance instead"):
        fallback = run(estimator=jp.pathwise(window=12, growth_limit=1.5, on_growth="covariance"))
    plain = run(estimator=jp.covariance())
    np.testing.assert_array_equal(fallback.chi["all"], plain.chi["all"])
    np.testing.assert_array_equal(fallback.stderr["all"], plain.stderr["all"])
    assert fallback.cost > response.cost


def test_growth_of_tangents_is_noticed():
    """δ of an expanding direction outgrows what was put into it; in a contracting chain not."""
    posterior, data = saddle()
    sampler = jp.sgld(step_size=2e-3)
    run = partial(
        jp.susceptibilities, KEY, posterior, sampler, jp.Plan(4, num_burnin=0, num_draws=4, thin=3),
        observables={"first": lambda p: p["w"][0]}, probes={"all": data[:1]}, progress=False,
    )  # fmt: skip
    with pytest.warns(jp.GrowthWarning, match="tangents grew past 1"):
        response = run(estimator=jp.pathwise(mode="tangent", growth_limit=1.0))
    assert response.diagnostics["growth"].shape == (1, 4, 4)
    params, data = tiny_network()
    posterior = jp.localized_posterior(network_loss, params, data, nbeta=20.0, localization=300.0)
    settled = jp.susceptibilities(
        KEY, posterior, sampler, jp.Plan(4, num_burnin=5, num_draws=4, thin=3),
        observables=OBSERVABLES, probes={"all": data}, progress=False,
        estimator=jp.pathwise(mode="tangent", growth_limit=1.0),
    )  # fmt: skip
    assert settled.diagnostics["growth"].max() < 1


def test_the_curvature_of_the_response_is_a_derivative_through_the_estimate(x64):
    """∂χ/∂ρ along a direction of the data weights, against differences on the same chain."""
    params, data = tiny_network()
    posterior = jp.localized_posterior(network_loss, params, data, nbeta=20.0, localization=30.0)
    plan = jp.Plan(num_chains=2, num_burnin=4, num_draws=4, thin=2)

    def chi(rho):
        return jp.susceptibilities(
            KEY, posterior.reweight(rho), jp.sgld(step_size=1e-3), plan, observables=OBSERVABLES,
            probes={"all": data}, estimator=jp.pathwise(window=20, every=1, product="central"),
            progress=False,
        ).chi["all"]  # fmt: skip

    direction = jnp.asarray(np.random.default_rng(5).normal(size=6))
    _, curvature = jax.jvp(chi, (jnp.ones(6),), (direction,))
    h = 1e-4
    difference = (chi(1 + h * direction) - chi(1 - h * direction)) / (2 * h)
    np.testing.assert_allclose(curvature, difference, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("free", [None, [0, 2]], ids=["all", "part"])
def test_laplace_on_the_gaussian_model(free):
    """Exact up to the noise of the trace; false alarms: 16 columns at 5 standard errors, 3e-5."""
    losses, centre, data = gaussian_problem()
    posterior = jp.localized_posterior(
        gaussian_loss, {"w": jnp.asarray(centre, jnp.float32)}, data, nbeta=30.0, localization=10.0
    )
    if free is not None:
        posterior = jp.restrict(posterior, jp.by_slice({"w": (0, free)}))
    response = jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=1e-3), jp.Plan(chunk=3),
        observables={"a": observed(0), "b": observed(1)}, probes={"all": data},
        estimator=jp.laplace(num_signs=2000, tolerance=1e-6), progress=False,
    )  # fmt: skip
    exact = gaussian.susceptibility(
        OBSERVED, losses, centre, nbeta=30.0, localization=10.0,
        free=None if free is None else np.array(free),
    )  # fmt: skip
    error = np.asarray(response.chi["all"]) - exact
    assert np.all(np.abs(error) < 5 * np.asarray(response.stderr["all"]) + 1e-6)
    assert response.diagnostics["residual"].max() < 1e-3
    assert np.isnan(response.mean_stderr).all()


@pytest.mark.parametrize(("arguments", "match"), [
    ({"window": 0}, "window must be at least 1"),
    ({"every": 1.5}, "every must be an integer"),
    ({"growth_limit": 0.5}, "growth_limit must be finite and at least 1"),
    ({"on_growth": "ignore"}, "on_growth must be"),
    ({"mode": "backward"}, "mode must be"),
    ({"probe_batch": 0}, "probe_batch must be at least 1"),
])  # fmt: skip
def test_bad_settings(arguments, match, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises((ValueError, TypeError), match=match):
        jp.pathwise(**arguments)


def test_a_metropolis_kernel_and_an_unknown_relaxation_time_are_refused():
    params, data = tiny_network()
    posterior = jp.localized_posterior(network_loss, params, data, nbeta=20.0, localization=0.0)
    run = partial(
        jp.susceptibilities, KEY, posterior, plan=jp.Plan(), observables=OBSERVABLES,
        probes={"all": data}, estimator=jp.pathwise(),
    )  # fmt: skip
    with pytest.raises(TypeError, match="mala is not: use estimator=covariance"):
        run(sampler=jp.mala(step_size=1e-3))
    with pytest.raises(ValueError, match="window must be given"):
        run(sampler=jp.sgld(step_size=1e-3))


def test_diverged_chains_are_left_out():
    """A chain that explodes is named, and the others give a finite answer."""
    data = jnp.zeros(4)

    def wall(p, b):
        w = p["w"]
        return 0.5 * w @ w + jnp.where(w[0] > 0.25, jnp.nan, 0.0) * w[0] + 0.0 * b

    posterior = jp.localized_posterior(
        wall, {"w": jnp.zeros(2)}, data, nbeta=30.0, localization=30.0
    )
    plan = jp.Plan(num_chains=16, num_burnin=20, num_draws=10, thin=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        response = jp.susceptibilities(
            KEY, posterior, jp.sgld(step_size=4e-3), plan,
            observables={"n": lambda p: p["w"] @ p["w"]}, probes={"all": data},
            estimator=jp.pathwise(window=20), progress=False,
        )  # fmt: skip
    lost = int(response.diverged.sum())
    assert 0 < lost < 16
    assert any(isinstance(w.message, jp.DivergenceWarning) for w in caught)
    assert np.isfinite(np.asarray(response.chi["all"])).all()
    assert np.isfinite(np.asarray(response.stderr["all"])).all()


@pytest.mark.parametrize("estimator", [
    jp.covariance(reweight_observable=True), jp.pathwise(reweight_observable=True, window=150),
], ids=["covariance", "pathwise"])  # fmt: skip
def test_the_llc_with_its_own_loss_reweighted(estimator):
    """Both conventions of ∂λ̂/∂ρ on the Gaussian model, whose chain has a small step here.

    False alarms: 8 columns at 5 standard errors with 39 degrees of freedom, 1e-4.
    """
    losses, centre, data = gaussian_problem()
    posterior = jp.localized_posterior(
        gaussian_loss, {"w": jnp.asarray(centre, jnp.float32)}, data, nbeta=30.0, localization=10.0
    )
    plan = jp.Plan(num_chains=8, num_burnin=200, num_draws=200, thin=20, num_batches=5)
    response = jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=2e-3), plan, probes={"all": data},
        components={"all": jp.by_path("*")}, estimator=estimator, progress=False,
    )  # fmt: skip
    fixed, direct = gaussian.llc_weight_derivative(losses, centre, nbeta=30.0, localization=10.0)
    measured = 30.0**2 / 8 * np.asarray(response.chi["all"][0])
    stderr = 30.0**2 / 8 * np.asarray(response.stderr["all"][0])
    # The step inflates variances by εP/4, 3 % at the stiffest direction.
    slack = 0.06 * np.maximum(np.abs(fixed), np.abs(direct)).max()
    assert np.all(np.abs(measured - fixed - direct) < 5 * stderr + slack)
    assert np.max(np.abs(direct) / (5 * stderr + slack)) > 1.5


def test_the_direct_term_needs_excess_losses():
    params, data = tiny_network()
    posterior = jp.localized_posterior(network_loss, params, data, nbeta=20.0, localization=30.0)
    for estimator in (
        jp.covariance(reweight_observable=True),
        jp.pathwise(reweight_observable=True),
    ):
        with pytest.raises(ValueError, match="rows must be excess losses"):
            jp.susceptibilities(
                KEY, posterior, SAMPLERS["sgld"], jp.Plan(), observables=OBSERVABLES,
                probes={"all": data}, estimator=estimator,
            )  # fmt: skip


@pytest.mark.optimized
def test_toy_model_of_superposition():
    """χ to the mixture of features, by quadrature on a grid. False alarms: 4 columns, 5e-6."""
    mixture = np.array([0.6, 0.4])
    weights, bias = np.array([[0.9, -0.6]]), np.array([-0.1, 0.05])
    params = {"W": jnp.asarray(weights, jnp.float32), "b": jnp.asarray(bias, jnp.float32)}
    features = jnp.arange(2)
    posterior = jp.localized_posterior(
        toy.loss_fn, params, features, nbeta=30.0, localization=20.0,
        weights=jnp.asarray(mixture, jnp.float32),
    )  # fmt: skip
    plan = jp.Plan(num_chains=384, num_burnin=400, num_draws=80, thin=20, num_batches=2)
    response = jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=1e-3), plan, probes={"features": features},
        observables={
            "overlap": lambda p: p["W"][0, 0] * p["W"][0, 1],
            "norm": lambda p: jnp.sum(p["W"] ** 2) + p["b"][0],
        },
        estimator=jp.pathwise(window=300), progress=False,
    )  # fmt: skip
    law = superposition.grid_posterior(
        weights, bias, mixture=mixture, nbeta=30.0, localization=20.0, points=25, half_width=1.3
    )

    def observables(weights, bias):
        overlap = weights[:, 0, 0] * weights[:, 0, 1]
        return np.stack([overlap, np.sum(weights**2, (1, 2)) + bias[:, 0]], -1)

    expected = superposition.susceptibility(observables, law, mixture)
    chi, stderr = (np.asarray(x["features"]) for x in (response.chi, response.stderr))
    # The step widens a direction of precision P ≈ 60 by εP/4 = 1.5 %, and χ with it.
    assert np.all(np.abs(chi - expected) < 5 * stderr + 0.03 * np.abs(expected).max())
    assert np.all(stderr < 0.025 * np.abs(expected).max())


def test_twins_mirror_each_other_exactly_where_the_law_is_symmetric():
    data = jnp.zeros((4, 3))
    loss = lambda p, b: jnp.sum((p["w"][None] - b) ** 2, axis=1)  # noqa: E731
    posterior = jp.localized_posterior(
        loss, {"w": jnp.zeros(3)}, data, nbeta=30.0, localization=10.0
    )
    for sampler in SAMPLERS.values():
        kernels = [
            build_kernel(
                replace(posterior, mirror=jnp.asarray(sign)), sampler, MINIBATCHES.batch_size
            )
            for sign in (1.0, -1.0)
        ]
        paths = []
        for kernel, sign in zip(kernels, (1.0, -1.0), strict=True):
            twin = replace(posterior, mirror=jnp.asarray(sign))
            state = kernel.init(twin.center, jax.random.fold_in(KEY, 9))
            for t in range(4):
                state = kernel.step(jax.random.fold_in(KEY, t), state)
            paths.append(np.asarray(twin.embed(position_of(state))["w"]))
        np.testing.assert_array_equal(paths[0], -paths[1])
        assert np.abs(paths[0]).min() > 1e-4


def test_part_of_the_curvature_is_right_on_average():
    """Over all orders of a mini-batch, H from its first sample averages to H of the mini-batch."""
    params, data = tiny_network()
    posterior = jp.localized_posterior(network_loss, params, data, nbeta=20.0, localization=30.0)
    plan = jp.Plan(num_chains=1024, num_burnin=0, num_draws=4, thin=5, batch_size=4, num_batches=1)
    measure = partial(
        jp.susceptibilities, KEY, posterior, jp.sgld(step_size=4e-3), plan,
        observables=OBSERVABLES, probes={"all": data}, reference=data, progress=False,
    )  # fmt: skip
    settings = {"window": 20, "every": 1, "antithetic": False}
    whole = measure(estimator=jp.pathwise(**settings, hessian_batch=4))
    part = measure(estimator=jp.pathwise(**settings, hessian_batch=1))
    # The chains are the same: what differs has less noise than the estimate itself.
    difference = np.abs(np.asarray(part.chi["all"] - whole.chi["all"]))
    assert np.all(difference < 5 * np.asarray(part.stderr["all"]))
    assert np.all(np.asarray(part.stderr["all"]) < 0.02 * np.abs(whole.chi["all"]).max())


def test_bfloat16_weights():
    """The same response as in float32, to the precision of losses computed in bfloat16."""
    params, data = tiny_network(24)
    plan = jp.Plan(num_chains=16, num_burnin=40, num_draws=8, thin=10, batch_size=8)
    chi = {}
    for dtype in ("float32", "bfloat16"):
        # Weights that both can hold, so that both posteriors have the same centre.
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype("bfloat16").astype(dtype), params)
        posterior = jp.localized_posterior(network_loss, cast, data, nbeta=20.0, localization=100.0)
        response = jp.susceptibilities(
            KEY, posterior, jp.sgld(step_size=1e-3), plan, observables=OBSERVABLES,
            probes={"all": data}, reference=data, estimator=jp.pathwise(), progress=False,
        )  # fmt: skip
        chi[dtype] = np.asarray(response.chi["all"])
        assert response.chi["all"].dtype == jnp.float32
    error = np.linalg.norm(chi["bfloat16"] - chi["float32"]) / np.linalg.norm(chi["float32"])
    assert 0 < error < 0.05, error
