"""The LLC where it is known: regular, singular and deep linear models, and what its error says.

Statistical checks use fixed keys and allow five standard errors. Errors come from C ≥ 50 chains or
G ≥ 50 batches, so that a false alarm has probability below 8e-6 a number, and fewer than 30 numbers
are compared. Each check also bounds the error itself.
"""

from dataclasses import dataclass, replace

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import euler
from oracles import llc as oracle

import jaxpattern as jp
from jaxpattern.chains.loop import run_chains
from jaxpattern.chains.record import Trace
from jaxpattern.chains.run import make_run
from jaxpattern.runtime.host import Host

CURVATURE = np.array([0.5, 1.0, 4.0])
NBETA, LOCALIZATION, STEP = 20.0, 10.0, 0.02
OFFSETS = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float) / 2
LEVELS = np.array([0.5, 3.5, 1.0, 3.0])


def shifted_quadratic(params, batch):
    """ℓ_z = k_z + ½ Σ_i h_i (w_i − c_zi)²; the mean of c is 0, and so is w*."""
    curvature = jnp.asarray(CURVATURE, jnp.float32)[None]
    shifted = params["w"][None] - batch["centre"]
    return batch["level"] + 0.5 * jnp.sum(curvature * shifted**2, axis=1)


def quadratic_posterior(copies=1, *, nbeta=NBETA):
    data = {
        "centre": jnp.tile(jnp.asarray(OFFSETS, jnp.float32), (copies, 1)),
        "level": jnp.tile(jnp.asarray(LEVELS, jnp.float32), copies),
    }
    return jp.localized_posterior(
        shifted_quadratic,
        {"w": jnp.zeros(3)},
        data,
        nbeta=nbeta,
        localization=LOCALIZATION,
    )


def assert_llc(result, expected, *, power=0.02, warmup=0):
    """λ̂ within five standard errors, taken over chains, which are below a few per cent of it."""
    chains = np.asarray(result.trace[:, warmup:], np.float64).mean(1)
    error = chains.std(ddof=1) / np.sqrt(len(chains))
    assert error < power * expected
    assert abs(chains.mean() - expected) < 5 * error, (chains.mean(), expected, error)


def test_quadratic_with_step_bias():
    # The step adds 29 % to the stiffest direction, and 12 % to λ̂.
    step = 0.01
    result = jp.llc(
        jax.random.key(0),
        quadratic_posterior(),
        jp.sgld(step_size=step),
        jp.Plan(num_chains=100, num_burnin=0, num_draws=1100, thin=3, num_batches=1),
        progress=False,
    )
    expected = oracle.quadratic_llc(
        CURVATURE, nbeta=NBETA, localization=LOCALIZATION, step_size=step
    )
    assert_llc(result, expected, warmup=100)
    # The whole trace starts at w*; 1 % of it is not yet stationary.
    assert abs(result.mean - expected) < 5 * result.stderr + 0.01 * expected
    np.testing.assert_allclose(result.per_chain, result.trace.mean(1), rtol=1e-5)
    np.testing.assert_allclose(result.mean, result.per_chain.mean(), rtol=1e-5)
    spread = np.std(result.per_chain, ddof=1) / 10
    np.testing.assert_allclose(result.stderr, spread, rtol=1e-4)
    assert result.per_chain.shape == (100,)
    assert not np.any(result.diverged)
    assert result.rhat < 1.01


def minibatch_llc(step, batch_size):
    variance = euler.stationary_variance(
        CURVATURE,
        nbeta=NBETA,
        localization=LOCALIZATION,
        step_size=step,
        gradient_variance=CURVATURE**2 * OFFSETS.var(0),
        batch_size=batch_size,
    )
    return 0.5 * NBETA * float(np.sum(CURVATURE * variance))


@dataclass(frozen=True)
class Unpaired(Trace):
    """L_B(w_t) − L(w*): the level of the mini-batch stays in it."""

    def value(self, posterior, state, key, batch_size):
        minibatch = posterior.minibatch(key, batch_size)
        return posterior.loss(state, minibatch) - posterior.loss(posterior.center), ()


jax.tree_util.register_static(Unpaired)


def test_the_paired_baseline_cuts_the_variance():
    """Same chains, same mini-batches: λ̂ with L_B(w*) taken off, and with L(w*)."""
    posterior, sampler = quadratic_posterior(), jp.sgld(step_size=STEP)
    plan = jp.Plan(num_chains=400, num_burnin=0, num_draws=150, thin=2, batch_size=4)
    paired = jp.llc(jax.random.key(1), posterior, sampler, plan, progress=False)
    run = make_run(jax.random.key(1), posterior, sampler, plan)
    chains = run_chains(run, Unpaired(), Host())
    traces = (paired.trace, NBETA * chains.kept[0])
    means = [np.asarray(trace[:, 20:], np.float64).mean(1) for trace in traces]
    expected = minibatch_llc(STEP, 4)
    for values in means:
        error = values.std(ddof=1) / 20
        assert abs(values.mean() - expected) < 5 * error
    ratio = np.var(means[0]) / np.var(means[1])
    # The ratio of two variances of 400 independent chains has a relative error below 10 %.
    assert ratio < 1 / 3, f"variance ratio {ratio:.3f}"


@pytest.mark.parametrize("powers", [(2, 2), (4, 4), (2, 6)])
def test_monomials_at_every_temperature(powers):
    def loss(params, batch):
        x, y = params["w"]
        return batch * (x ** powers[0] + y ** powers[1])

    # A posterior with no localization at all; the scale of w is (nβ)^(−1/p).
    nbeta = 10.0
    posterior = jp.localized_posterior(
        loss, {"w": jnp.zeros(2)}, jnp.ones(1), nbeta=nbeta, localization=0.0
    )
    result = jp.llc(
        jax.random.key(2),
        posterior,
        jp.mala(step_size=0.1),
        jp.Plan(num_chains=100, num_burnin=0, num_draws=1100, thin=5, num_batches=1),
        progress=False,
    )
    assert_llc(result, oracle.monomial_llc(powers), warmup=100)


def triangle_wave(u):
    """R folded onto [−1, 1] with slopes ±1: flat in u is uniform in w."""
    return jnp.abs((u - 1) % 4 - 2) - 1


@pytest.mark.parametrize(
    ("powers", "tabulated"), [((2, 2), 0.3478), ((2, 4), 0.2043), ((4, 4), 0.1368)]
)
@pytest.mark.optimized
def test_normal_crossings_under_a_uniform_prior(powers, tabulated):
    """nβ⟨x^p y^q⟩ at nβ = 100 on [−1, 1]², far from its limit 1/max(p, q)."""

    def loss(params, batch):
        x, y = triangle_wave(params["w"])
        return batch * x ** powers[0] * y ** powers[1]

    posterior = jp.localized_posterior(
        loss, {"w": jnp.zeros(2)}, jnp.ones(1), nbeta=100.0, localization=0.0
    )
    result = jp.llc(
        jax.random.key(3),
        posterior,
        jp.mala(step_size=0.08),
        jp.Plan(num_chains=200, num_burnin=0, num_draws=1700, thin=6, num_batches=1),
        progress=False,
    )
    assert oracle.normal_crossing_llc(*powers, 100.0) == pytest.approx(tabulated, abs=6e-5)
    assert_llc(result, tabulated, warmup=200)


@pytest.mark.parametrize("free", [[0], [1, 2]])
def test_restricted_llc_counts_only_its_own_directions(free):
    mask = np.isin(np.arange(3), free)
    result = jp.llc(
        jax.random.key(4),
        jp.restrict(quadratic_posterior(), jp.by_mask({"w": mask})),
        jp.sgld(step_size=STEP),
        jp.Plan(num_chains=100, num_burnin=0, num_draws=1100, thin=3),
        progress=False,
    )
    expected = oracle.quadratic_llc(
        CURVATURE[free], nbeta=NBETA, localization=LOCALIZATION, step_size=STEP
    )
    assert_llc(result, expected, warmup=100)


def test_temperatures_vmapped_are_temperatures_one_by_one():
    plan = jp.Plan(num_chains=3, num_burnin=0, num_draws=40, thin=1, batch_size=2)
    posterior, sampler = quadratic_posterior(), jp.sgld(step_size=STEP)

    def run(nbeta):
        tempered = replace(posterior, nbeta=nbeta)
        return jp.llc(jax.random.key(5), tempered, sampler, plan, progress=False)

    temperatures = jnp.asarray([1.0, 10.0, 40.0])
    together = jax.vmap(run)(temperatures)
    assert together.per_chain.shape == (3, 3)
    for i, nbeta in enumerate(temperatures):
        alone = run(nbeta)
        np.testing.assert_allclose(together.trace[i], alone.trace, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(together.mean[i], alone.mean, rtol=1e-4)
        np.testing.assert_allclose(together.stderr[i], alone.stderr, rtol=1e-3)


def deep_linear_loss(params, batch):
    """½ ‖W₂W₁ − T‖², the population loss for white inputs."""
    product = jnp.matmul(params["last"], params["first"], precision="highest")
    return 0.5 * jnp.sum((product[None] - batch) ** 2, axis=(1, 2))


def finite_deep_linear_llc(widths, nbeta, localization):
    """nβ⟨½‖W₂W₁‖²⟩ at rank 0 and γ > 0, exactly, for two hidden units.

    Given W₁ of singular values s, W₂ is Gaussian of precision γ + nβ s² along each, so that
    λ̂ = (H₂/2) E[Σ nβ s²/(γ + nβ s²)] under the density
    |s₁² − s₂²| (s₁ s₂)^{H₀−2} e^{−γ‖s‖²/2} Π (γ + nβ s²)^{−H₂/2}.
    """
    grid = np.linspace(np.log(1e-7), np.log(12 / np.sqrt(localization)), 3001)
    s = np.exp(grid)
    share = nbeta * s**2 / (localization + nbeta * s**2)
    one = grid * (widths[0] - 1) - localization * s**2 / 2
    one = np.exp(one - widths[2] / 2 * np.log(localization + nbeta * s**2))
    mass = np.abs(s[:, None] ** 2 - s[None] ** 2) * one[:, None] * one[None]
    return widths[2] / 2 * float(np.sum(mass * (share[:, None] + share[None])) / np.sum(mass))


def deep_linear_result(widths, rank, nbeta):
    first = jnp.eye(widths[1], widths[0]) * (jnp.arange(widths[1]) < rank)[:, None]
    last = jnp.eye(widths[2], widths[1]) * (jnp.arange(widths[1]) < rank)[None]
    params = {"first": first, "last": last}
    posterior = jp.localized_posterior(
        deep_linear_loss, params, (last @ first)[None], nbeta=nbeta, localization=1.0
    )

    # The step follows the stiffest direction; thirty of them cross the flattest.
    def sampler(posterior):
        return blackjax.hmc(
            posterior.logdensity,
            step_size=0.5 * nbeta**-0.5,
            inverse_mass_matrix=jnp.ones(first.size + last.size),
            num_integration_steps=30,
        )

    plan = jp.Plan(num_chains=100, num_burnin=0, num_draws=400, thin=1, num_batches=1)
    return jp.llc(jax.random.key(7), posterior, sampler, plan, progress=False)


@pytest.mark.parametrize("widths", [(2, 2, 2), (3, 2, 3)])
def test_deep_linear_network_of_rank_zero(widths):
    """At nβ = 100 and γ = 1 λ̂ is some 10 % below λ; multiplicity one, it gets there as a power."""
    learning_coefficient, multiplicity = oracle.deep_linear_llc(widths, 0)
    assert multiplicity == 1
    limit = finite_deep_linear_llc(widths, 1e8, 1.0)
    assert limit == pytest.approx(learning_coefficient, rel=0.01)
    expected = finite_deep_linear_llc(widths, 100.0, 1.0)
    assert expected < 0.97 * learning_coefficient
    assert_llc(deep_linear_result(widths, 0, 100.0), expected, warmup=50)


@pytest.mark.parametrize("nbeta", [100.0, 1000.0])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.slow
def test_deep_linear_network_of_full_and_of_partial_rank(rank, nbeta):
    """2-2-2: both have λ = 2. Rank 2 has multiplicity one, and is there at nβ = 100. Rank 1 has
    multiplicity two, and lags by about 1/log nβ."""
    learning_coefficient, multiplicity = oracle.deep_linear_llc((2, 2, 2), rank)
    assert (learning_coefficient, multiplicity) == (2.0, {1: 2, 2: 1}[rank])
    result = deep_linear_result((2, 2, 2), rank, nbeta)
    if rank == 2:
        # The curvature of the orbit of true parameters shifts λ̂ by O(γ/√nβ) of it.
        assert abs(result.mean - 2.0) < 5 * result.stderr + 0.02
        assert result.stderr < 0.03
    else:
        lag = (2.0 - result.mean) * np.log(nbeta)
        error = 5 * result.stderr * np.log(nbeta)
        assert 0.5 - error < lag < 2.0 + error


@pytest.mark.optimized
def test_intervals_cover():
    """λ̂ ± 1.96 standard errors holds the exact λ̂ in 90 to 98 % of 400 independent runs.

    The exact value is that of the chain, with step bias and mini-batch temperature. A run is
    typical: four chains, thinned to an autocorrelation of about a half, mini-batches. With 20
    batches Student's t makes it 93.5 %; the limits are 2.8 and 3.7 binomial errors away.
    """
    posterior, sampler = quadratic_posterior(copies=4), jp.sgld(step_size=STEP)
    plan = jp.Plan(num_chains=4, num_burnin=0, num_draws=500, thin=3, batch_size=8)

    def run(key):
        result = jp.llc(key, posterior, sampler, plan, progress=False)
        return result.mean, result.stderr

    # Chains start at w*: that takes less than .3 % off λ̂, a tenth of a run's standard error.
    keys = jax.random.split(jax.random.key(6), 400)
    mean, stderr = map(np.asarray, jax.jit(jax.vmap(run))(keys))
    expected = minibatch_llc(STEP, 8)
    coverage = np.mean(np.abs(mean - expected) < 1.96 * stderr)
    error = np.sqrt(coverage * (1 - coverage) / len(mean))
    assert 0.90 < coverage < 0.98, f"coverage {coverage:.3f} ± {error:.3f}"
    # The reported error is the spread over runs, and no run is far out.
    np.testing.assert_allclose(np.sqrt(np.mean(stderr**2)), mean.std(ddof=1), rtol=0.2)
    assert abs(mean.mean() - expected) < 5 * mean.std(ddof=1) / 20 < 0.02 * expected
