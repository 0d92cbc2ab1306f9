"""Verdicts: healthy chains set off nothing, each kind of unhealthy ones sets off its own words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxpattern as jp
from jaxpattern import verdict

KEY = jax.random.key(0)
CENTERS = jnp.asarray([1.0, 0.5, -0.5, -1.0])


def loss_fn(params, batch):
    return 0.5 * (params["w"][0] - batch) ** 2


def posterior(nbeta=10.0, localization=10.0):
    return jp.localized_posterior(
        loss_fn, {"w": jnp.zeros(1)}, CENTERS, nbeta=nbeta, localization=localization
    )


HEALTHY = jp.Plan(num_chains=4, num_burnin=100, num_draws=100, thin=20)


def chi(sampler, plan, estimator=None, **settings):
    return jp.susceptibilities(
        KEY, posterior(**settings), sampler, plan, probes={"x": CENTERS}, estimator=estimator,
        observables={"w": lambda p: p["w"][0], "w2": lambda p: p["w"][0] ** 2}, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "estimator", [jp.covariance(), jp.pathwise(), jp.pathwise(mode="tangent")], ids=repr
)
def test_healthy_chains(estimator, recwarn):
    response = chi(jp.sgld(step_size=1e-2), HEALTHY, estimator)
    assert response.verdict == "nothing found that speaks against it"
    assert not [w for w in recwarn if issubclass(w.category, jp.UnreliableWarning)]


def test_a_chain_shorter_than_its_memory():
    with pytest.warns(jp.UnreliableWarning, match=r"% of the adjoint is left"):
        chi(jp.sgld(step_size=1e-4), jp.Plan(num_burnin=100, thin=1), jp.pathwise())


def test_a_step_too_large():
    with pytest.warns(jp.UnreliableWarning, match=r"εP = 2"):
        lam = jp.llc(KEY, posterior(), jp.sgld(step_size=0.1), HEALTHY, progress=False)
    assert "smaller step_size" in lam.verdict
    with pytest.raises(ValueError, match=r"εγ = 3"):
        jp.llc(KEY, posterior(), jp.sgld(step_size=0.3), HEALTHY, progress=False)


def test_chains_that_do_not_move():
    with pytest.warns(jp.UnreliableWarning, match="never changed"):
        jp.llc(KEY, posterior(), jp.mala(step_size=1e5), HEALTHY, progress=False)


def test_chains_that_drift():
    plan = jp.Plan(num_chains=4, num_burnin=0, num_draws=100, thin=1)
    with pytest.warns(jp.UnreliableWarning, match="drifting|disagree"):
        jp.llc(KEY, posterior(), jp.sgld(step_size=1e-5), plan, progress=False)


def test_a_trend_and_none():
    """White noise sets off the trend about once in 1e8 times; a line of its own size always."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(4, 200))
    alive = np.ones(4, bool)
    flat = verdict.trend(noise, alive, 5)
    steep = verdict.trend(noise + np.linspace(0, 4, 200), alive, 5)
    assert flat.t < verdict.TREND < steep.t
    # A line through means of five groups is a little less steep than one through all draws.
    assert 0.7 * 4 / 1.54 < steep.size < 1.3 * 4 / 1.54
    many = [verdict.trend(rng.normal(size=(4, 60)), alive, 5).t for _ in range(300)]
    assert np.mean(np.asarray(many) > stats.t.isf(0.025, 4 * 4 - 1)) < 0.12  # two-sided 5 %


def test_traced_values_have_no_verdict():
    seen = []

    def run(nbeta):
        seen.append(chi(jp.sgld(step_size=1e-2), jp.Plan(num_draws=8), nbeta=nbeta).verdict)
        return nbeta

    jax.jit(run)(jnp.asarray(10.0))
    assert seen == ["nothing found that speaks against it"]


def test_intervals_are_students():
    response = chi(jp.sgld(step_size=1e-2), HEALTHY, jp.covariance())
    low, high = response.interval(0.9)
    groups = int(response.diagnostics["groups"][0])
    assert groups == HEALTHY.num_chains * HEALTHY.batches
    half = stats.t.ppf(0.95, groups - 1) * np.asarray(response.stderr["x"])
    np.testing.assert_allclose(high["x"] - low["x"], 2 * half, rtol=1e-4)
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="level"):
            response.interval(level)
