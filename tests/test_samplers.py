"""Samplers: their laws on quadratics, which are known exactly, and their update equations.

Statistical checks use fixed keys and allow five standard errors: a false alarm has probability
6e-7 per number compared. Where an error is estimated from C independent chains, it is Student's t
with C − 1 ≥ 127 degrees of freedom, and the probability 2e-6. There are fewer than 100 such
numbers in this file.
"""

from dataclasses import replace
from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.base import SamplingAlgorithm
from oracles import euler

import jaxpattern as jp

pytestmark = pytest.mark.optimized  # long chains of small models

CURVATURE = np.array([1.0, 3.0])
CENTRES = np.array([[0.5, -1.0], [1.5, 1.0], [1.0, -0.5], [1.0, 0.5]])
TRAINED = np.array([1.4, -0.3])
NBETA, LOCALIZATION = 20.0, 10.0
PRECISION = NBETA * CURVATURE + LOCALIZATION
MEAN = (NBETA * CURVATURE * CENTRES.mean(0) + LOCALIZATION * TRAINED) / PRECISION


def shifted_quadratic(params, batch):
    """ℓ_z = ½ Σ_i h_i (w_i − c_zi)²: the gradient noise h_i (c_i − c_zi) is the same at every w."""
    return 0.5 * jnp.sum(batch["curvature"] * (params["w"][None] - batch["centre"]) ** 2, axis=1)


def quadratic_posterior(
    centres=CENTRES, trained=TRAINED, *, nbeta=NBETA, localization=LOCALIZATION, dtype=jnp.float32
):
    centres = np.asarray(centres, np.float32)
    data = {"centre": centres, "curvature": np.broadcast_to(np.float32(CURVATURE), centres.shape)}
    params = {"w": jnp.asarray(trained, dtype)}
    return jp.localized_posterior(
        shifted_quadratic, params, data, nbeta=nbeta, localization=localization
    )


def read(params):
    return params["w"]


def draw(key, posterior, sampler, plan, *, warmup=0):
    """Positions `[chain, draw, d]` in float64, without the first `warmup` draws."""
    run = jax.jit(lambda key, posterior: jp.sample(key, posterior, sampler, plan, read))
    trace = run(key, posterior)
    return np.asarray(trace[:, warmup:], np.float64)


def assert_law(trace, mean, variance, *, bias=0.0, power=0.025):
    """Mean and variance of draws, against errors from the spread of independent chains.

    `bias` is what the sampler's step is allowed, relative to the variance; `power` bounds the
    standard error, so that a factor of two cannot hide in it.
    """
    chains = trace.shape[0]
    for values, expected, allowed in (
        (trace, mean, 0.0),
        ((trace - mean) ** 2, variance, bias * variance),
    ):
        means = values.mean(1)
        error = means.std(0, ddof=1) / np.sqrt(chains)
        scale = np.sqrt(variance) if values is trace else variance
        assert np.all(error < power * scale), (error, scale)
        np.testing.assert_array_less(np.abs(means.mean(0) - expected), 5 * error + allowed)


def hamiltonian(posterior):
    """A user's own MCMC algorithm: step(key, state)."""
    return blackjax.hmc(
        posterior.logdensity,
        step_size=0.12,
        inverse_mass_matrix=jnp.ones(2),
        num_integration_steps=8,
    )


def stochastic_hamiltonian(posterior):
    """A user's own stochastic-gradient algorithm: its step size is bound."""
    algorithm = blackjax.sghmc(posterior.grad_estimator, num_integration_steps=20, alpha=8.0)

    def step(key, state, minibatch):
        return algorithm.step(key, state, minibatch, 0.004)

    return SamplingAlgorithm(algorithm.init, step)


STEP = 0.02
EULER = euler.stationary_variance(CURVATURE, nbeta=NBETA, localization=LOCALIZATION, step_size=STEP)
# A loop of steps that is not there need not be compiled: draws are dropped instead of burnt.
PLAN = jp.Plan(num_chains=128, num_burnin=0, num_draws=500, thin=4)
WARMUP = 100
# The momentum samplers of blackjax take explicit Euler steps of length h = √(ε/2). A step feeds
# the kinetic energy of direction i at a rate hP_i, against a loss at the rate of the friction:
# temperatures are off by h(P_i − P̄)/α, and variances by αh/2 besides. 2 % covers both here.
SAMPLERS = {
    "sgld": (jp.sgld(step_size=STEP), EULER, PLAN, 0.0),
    # With e = 1000 the preconditioner is 1/e to within √v̂/e < 0.2 %.
    "rmsprop_sgld": (
        jp.rmsprop_sgld(step_size=1000 * STEP, stability=1000.0),
        EULER,
        PLAN,
        0.005,
    ),
    "sgnht": (
        jp.sgnht(step_size=8e-6, friction=4.0),
        1 / PRECISION,
        replace(PLAN, thin=60),
        0.02,
    ),
    "mala": (jp.mala(step_size=0.04), 1 / PRECISION, PLAN, 0.0),
    "hmc": (hamiltonian, 1 / PRECISION, replace(PLAN, thin=1), 0.0),
    "sghmc": (
        stochastic_hamiltonian,
        1 / PRECISION,
        replace(PLAN, thin=1),
        0.02,
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_from_the_posterior(name):
    sampler, variance, plan, bias = SAMPLERS[name]
    # blackjax.sghmc draws its momentum and its noise from one key.
    with jax.debug_key_reuse(name != "sghmc" and jax.config.jax_debug_key_reuse):
        trace = draw(jax.random.key(1), quadratic_posterior(), sampler, plan, warmup=WARMUP)
    assert trace.shape == (plan.num_chains, plan.num_draws - WARMUP, 2)
    assert_law(trace, MEAN, variance, bias=bias)


@pytest.mark.parametrize("batch_size", [None, 4, 1])
def test_sgld_has_the_exact_law_with_step_bias_and_minibatch_temperature(batch_size):
    # Centres of ±1: gradient variance h² exactly, and no more than Gaussian kurtosis.
    centres = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    step = 0.03
    variance = euler.stationary_variance(
        CURVATURE,
        nbeta=NBETA,
        localization=LOCALIZATION,
        step_size=step,
        gradient_variance=0.0 if batch_size is None else CURVATURE**2,
        batch_size=batch_size or 1,
    )
    plan = jp.Plan(num_chains=256, num_burnin=0, num_draws=4100, thin=1, batch_size=batch_size)
    posterior = quadratic_posterior(centres, np.zeros(2))
    trace = draw(jax.random.key(2), posterior, jp.sgld(step_size=step), plan, warmup=100)
    correlation = euler.autocorrelation(
        CURVATURE, nbeta=NBETA, localization=LOCALIZATION, step_size=step
    )
    for i, (sigma2, r) in enumerate(zip(variance, correlation, strict=True)):
        x = trace[:, :, i]
        # Monte-Carlo errors of an AR(1) process, exact for Gaussian innovations; those of
        # mini-batches have lighter tails. x² has autocorrelation r² and variance 2σ⁴.
        for values, expected, spread, memory in (
            (x, 0.0, sigma2, r),
            (x**2, sigma2, 2 * sigma2**2, r**2),
        ):
            error = np.sqrt(euler.variance_of_mean(spread, memory, x.shape[1]) / 256)
            assert abs(values.mean() - expected) < 5 * error
        # The error of the variance is below 1 %; the step adds 37 % to the second coordinate's
        # and mini-batches of one multiply it by 28.
        assert error < 0.01 * sigma2
        # One step's autocorrelation, by least squares: variance (1 − r²)/n.
        measured = np.sum(x[:, 1:] * x[:, :-1]) / np.sum(x[:, :-1] ** 2)
        assert abs(measured - r) < 5 * np.sqrt((1 - r**2) / x[:, 1:].size) < 0.01


def batch_of(posterior, size=2):
    return posterior.minibatch(jax.random.key(9), size)


def numpy_gradient(posterior, minibatch, w):
    """∇L_B in float64, of the shifted quadratic."""
    batch, weights = jax.tree.map(lambda x: np.asarray(x, np.float64), minibatch)
    gradients = batch["curvature"] * (w - batch["centre"])
    return weights @ gradients / len(weights)


def numpy_noise(key):
    return np.asarray(jax.random.normal(key, (2,)), np.float64)


def test_one_sgld_step_is_the_formula():
    posterior = quadratic_posterior().reweight(jnp.asarray([0.5, 1.0, 2.0, 1.0]))
    minibatch, step = batch_of(posterior), 0.01
    algorithm = jp.sgld(step_size=step)(posterior)
    start = {"w": jnp.asarray([0.7, -0.2])}
    moved = algorithm.step(jax.random.key(3), algorithm.init(start), minibatch)
    w = np.array([0.7, -0.2])
    drift = NBETA * numpy_gradient(posterior, minibatch, w) + LOCALIZATION * (w - TRAINED)
    expected = w - step / 2 * drift + np.sqrt(step) * numpy_noise(jax.random.key(3))
    np.testing.assert_allclose(moved["w"], expected, rtol=1e-5)


def test_one_mala_step_proposes_by_the_formula():
    posterior, step = quadratic_posterior(), 1e-4
    algorithm = jp.mala(step_size=step)(posterior)
    start = {"w": jnp.asarray([0.7, -0.2])}
    state, info = algorithm.step(jax.random.key(3), algorithm.init(start))
    assert bool(info.is_accepted)
    w = np.array([0.7, -0.2])
    gradient = CURVATURE * (w - CENTRES.mean(0))
    mean = w - step / 2 * (NBETA * gradient + LOCALIZATION * (w - TRAINED))
    noise = (np.asarray(state.position["w"], np.float64) - mean) / np.sqrt(step)
    proposal_key = jax.random.split(jax.random.key(3))[0]
    # Positions of size 1 are rounded at 1e-7, and √ε = .01.
    np.testing.assert_allclose(noise, numpy_noise(proposal_key), atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"initial_square": 0.0, "bias_correction": False},
        {"decay": 0.5, "stability": 0.02, "initial_square": 3.0},
    ],
)
def test_rmsprop_sgld_is_the_recursion(settings):
    posterior, step = quadratic_posterior(), 0.004
    algorithm = jp.rmsprop_sgld(step_size=step, **settings)(posterior)
    options = {"decay": 0.99, "stability": 0.1, "initial_square": 1.0, "bias_correction": True}
    options |= settings
    state = algorithm.init({"w": jnp.asarray(TRAINED, jnp.float32)}, jax.random.key(0))
    w, v = TRAINED.copy(), np.full(2, options["initial_square"])
    advance = jax.jit(algorithm.step)
    for t in range(6):
        minibatch = posterior.minibatch(jax.random.key(100 + t), 2)
        state = advance(jax.random.key(t), state, minibatch)
        g = numpy_gradient(posterior, minibatch, w)
        v = options["decay"] * v + (1 - options["decay"]) * g**2
        corrected = v / (1 - options["decay"] ** (t + 1)) if options["bias_correction"] else v
        rate = step / (np.sqrt(corrected) + options["stability"])
        drift = NBETA * g + LOCALIZATION * (w - TRAINED)
        w = w - rate / 2 * drift + np.sqrt(rate) * numpy_noise(jax.random.key(t))
    # A few steps amplify a rounding error of 1e-7 by no more than 1/√v̂ a step.
    np.testing.assert_allclose(state.position["w"], w, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(state.square_average["w"], v, rtol=1e-4, atol=1e-7)


def test_sgnht_is_the_recursion():
    posterior, step, friction = quadratic_posterior(), 0.004, 1.5
    algorithm = jp.sgnht(step_size=step, friction=friction)(posterior)
    state = algorithm.init({"w": jnp.asarray(TRAINED, jnp.float32)}, jax.random.key(0))
    w, p, xi = TRAINED.copy(), np.asarray(state.momentum["w"], np.float64), friction
    h = np.sqrt(step / 2)
    advance = jax.jit(algorithm.step)
    for t in range(6):
        minibatch = posterior.minibatch(jax.random.key(100 + t), 2)
        state = advance(jax.random.key(t), state, minibatch)
        gradient = numpy_gradient(posterior, minibatch, w)
        force = -NBETA * gradient - LOCALIZATION * (w - TRAINED)
        w = w + h * p
        p = (1 - xi * h) * p + h * force
        p = p + np.sqrt(2 * friction * h) * numpy_noise(jax.random.key(t))
        xi = xi + h * (p @ p / 2 - 1)
    np.testing.assert_allclose(state.position["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.momentum["w"], p, rtol=1e-4)
    np.testing.assert_allclose(state.xi, xi, rtol=1e-5)


def doubled_loss(params, batch):
    return 2 * shifted_quadratic(params, batch)


@pytest.mark.parametrize(
    "sampler",
    [
        jp.sgld(step_size=0.01),
        jp.sgnht(step_size=1e-3),
        jp.mala(step_size=0.05),
        # The preconditioner is of the loss, so e and v₋₁ double with it and ε with them.
        (
            jp.rmsprop_sgld(step_size=1e-3),
            jp.rmsprop_sgld(step_size=2e-3, stability=0.2, initial_square=4.0),
        ),
    ],
    ids=["sgld", "sgnht", "mala", "rmsprop_sgld"],
)
def test_twice_the_loss_at_half_the_temperature_gives_the_same_bits(sampler):
    first, second = sampler if isinstance(sampler, tuple) else (sampler, sampler)
    posterior = quadratic_posterior()
    twice = replace(posterior, loss_fn=doubled_loss, nbeta=posterior.nbeta / 2)
    plan = jp.Plan(num_chains=2, num_burnin=0, num_draws=20, thin=2, batch_size=2)
    one = draw(jax.random.key(4), posterior, first, plan)
    two = draw(jax.random.key(4), twice, second, plan)
    assert np.ptp(one) > 0
    np.testing.assert_array_equal(one, two)


def test_sampled_trace_is_a_loop_over_blackjax():
    posterior, step = quadratic_posterior(), 0.01
    plan = jp.Plan(num_chains=2, num_burnin=3, num_draws=5, thin=2, batch_size=3)
    trace = draw(jax.random.key(5), posterior, jp.sgld(step_size=step), plan)
    data = jax.tree.map(jnp.asarray, posterior.data)

    def gradient(w, index):
        batch = jax.tree.map(lambda x: x[index], data)
        mean = jax.grad(lambda p: jnp.mean(shifted_quadratic(p, batch)))(w)
        return {"w": -NBETA * mean["w"] - LOCALIZATION * (w["w"] - jnp.float32(TRAINED))}

    kernel = blackjax.sgld(gradient)
    advance = jax.jit(lambda key, w, index: kernel.step(key, w, index, step / 2))
    for chain in range(plan.num_chains):
        component = jax.random.fold_in(jax.random.key(5), 0)
        steps = jax.random.fold_in(jax.random.fold_in(component, chain), 1)
        w, kept = {"w": jnp.asarray(TRAINED, jnp.float32)}, []
        for t in range(plan.num_steps):
            index_key, noise_key = jax.random.split(jax.random.fold_in(steps, t))
            index = jax.random.randint(index_key, (plan.batch_size,), 0, len(CENTRES))
            w = advance(noise_key, w, index)
            kept.append(w["w"])
        expected = np.stack(kept)[plan.num_burnin + plan.thin - 1 :: plan.thin]
        np.testing.assert_allclose(trace[chain], expected, rtol=1e-5)


def test_bfloat16_parameters_sample_the_law_of_float32():
    # √ε = .0016 is below the spacing of bfloat16 at 1, .0039: a position kept in bfloat16 would
    # lose most of the noise. Positions are float32; only what the loss sees is rounded.
    trained, nbeta, localization, step = np.ones(2), 300.0, 100.0, 2.5e-6
    centres = np.ones((4, 2))
    plan = jp.Plan(num_chains=512, num_burnin=0, num_draws=180, thin=100)
    variance = euler.stationary_variance(
        CURVATURE, nbeta=nbeta, localization=localization, step_size=step
    )
    build = partial(quadratic_posterior, centres, trained, nbeta=nbeta, localization=localization)
    assert build(dtype=jnp.bfloat16).center["w"].dtype == jnp.float32
    for dtype in (jnp.bfloat16, jnp.float32):
        trace = draw(
            jax.random.key(6), build(dtype=dtype), jp.sgld(step_size=step), plan, warmup=80
        )
        # Rounding to spacing u adds at most u²/12 = 5e-6 to what is seen, .6 % of the variance.
        assert_law(trace, trained, variance, bias=0.006, power=0.04)


def test_step_size_is_a_leaf():
    """One sampler vmapped over step sizes has the step bias of each."""
    steps = jnp.asarray([0.005, 0.03])
    posterior = quadratic_posterior()
    plan = jp.Plan(num_chains=128, num_burnin=0, num_draws=600, thin=4)

    def run(step):
        sampler = jp.sgld(step_size=step)
        return jp.sample(jax.random.key(7), posterior, sampler, plan, read, progress=False)

    traces = np.asarray(jax.vmap(run)(steps), np.float64)
    for step, trace in zip(np.asarray(steps, np.float64), traces, strict=True):
        variance = euler.stationary_variance(
            CURVATURE, nbeta=NBETA, localization=LOCALIZATION, step_size=step
        )
        assert_law(trace[:, 100:], MEAN, variance)


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_the_drift_of_the_preconditioner_restores_the_posterior(decay):
    """⟨w²⟩ of nβ (w²/2 + w⁴/4) + γ w²/2 by quadrature; without Γ it is 20 to 50 % too large."""
    x = np.linspace(-6.0, 6.0, 200_001)
    p = np.exp(-4 * (x**2 / 2 + x**4 / 4) - x**2 / 2)
    wanted = float((p * x**2).sum() / p.sum())
    posterior = jp.localized_posterior(
        lambda p, b: 0.5 * p["w"] ** 2 + 0.25 * p["w"] ** 4 + 0 * b,
        {"w": jnp.zeros(())}, jnp.zeros(2), nbeta=4.0, localization=1.0,
    )  # fmt: skip

    def second_moment(drift):
        sampler = jp.rmsprop_sgld(step_size=3e-3, decay=decay, stability=0.5, drift=drift)
        plan = jp.Plan(num_chains=64, num_burnin=4000, num_draws=200, thin=100)
        run = jax.jit(lambda key: jp.sample(key, posterior, sampler, plan, read) ** 2)
        means = np.asarray(run(jax.random.key(5)), np.float64).mean(axis=1)
        return means.mean(), means.std(ddof=1) / np.sqrt(len(means))

    mean, error = second_moment(True)
    # What is left is of the order of a step of the memory: 1/(1 − decay) over a relaxation time.
    assert abs(mean - wanted) < 4 * error + 0.03 * wanted
    mean, error = second_moment(False)
    assert mean - wanted > 0.15 * wanted


def test_what_is_known_to_be_wrong_with_a_sampler_is_said():
    posterior = quadratic_posterior()
    plan = jp.Plan(2, num_burnin=2, num_draws=4, thin=1)
    measure = partial(
        jp.susceptibilities, jax.random.key(0), posterior, plan=plan,
        observables={"first": lambda p: p["w"][0]},
        probes={"all": posterior.data}, estimator=jp.covariance(), progress=False,
    )  # fmt: skip
    assert "without the drift Γ" in measure(sampler=jp.rmsprop_sgld(step_size=1e-4)).estimator
    assert "Γ" not in measure(sampler=jp.rmsprop_sgld(step_size=1e-4, drift=True)).estimator
    assert "Γ" not in measure(sampler=jp.sgld(step_size=1e-4)).estimator
    for drift in (False, True):
        sampler = jp.rmsprop_sgld(step_size=1e-4, drift=drift)
        lam = jp.llc(jax.random.key(0), posterior, sampler, plan, progress=False)
        assert ("lacks its drift Γ" in " ".join(str(lam).split())) == (not drift)
