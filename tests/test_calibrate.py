"""Settings proposed where all is known (a Gaussian), and bad starts that are named and repaired."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import llc

import jaxpattern as jp
from jaxpattern import plot

CURVATURE = np.array([1.0, 2.0, 0.5])
DATA = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)), jnp.float32)
BUDGET = 8 * 4 * 40 * 600  # 600 steps of 8 settings of 4 chains on 40 samples


def loss_fn(params, batch):
    stiffness = jnp.asarray(CURVATURE, jnp.float32)
    return 0.5 * jnp.sum(stiffness[None] * (params["w"][None] - batch) ** 2, 1)


def gaussian(nbeta=30.0, localization=10.0):
    return jp.localized_posterior(
        loss_fn, {"w": DATA.mean(0)}, DATA, nbeta=nbeta, localization=localization
    )


def calibrated(posterior, seed=0, **settings):
    return jp.calibrate(jax.random.key(seed), posterior, **({"budget": BUDGET} | settings))


def named(settings, s=0):
    return {problem.split(":")[0] for problem in settings.problems[s]}


def repaired(settings):
    """Healthy, ε in its range, burn-in of six relaxation times."""
    assert settings.verdict == "healthy"
    i = settings.proposed
    assert 0.1 < settings.stiffness[i] < 0.3
    assert float(settings.sampler.settings["step_size"]) == pytest.approx(settings.step_size[i])
    assert float(settings.posterior.nbeta) == pytest.approx(settings.nbeta[i])
    assert float(settings.posterior.localization) == pytest.approx(settings.localization[i])
    assert settings.plan.num_burnin >= 6 * settings.relaxation[i] - 0.01
    return i


def test_known_answers():
    """λ̂ of short and long runs within 3 and 4.5 errors of 20 groups: false alarms of .7 % each of
    3 seeds, and 2e-4 each of 18 short runs.
    """
    for seed in range(3):
        settings = calibrated(gaussian(), seed)
        assert repaired(settings) == 0  # what is given and healthy stays
        precision = settings.nbeta * CURVATURE.max() + settings.localization
        np.testing.assert_allclose(settings.stiffness, settings.step_size * precision, rtol=0.02)
        np.testing.assert_allclose(
            settings.relaxation, 2 / (settings.step_size * settings.localization), rtol=1e-5
        )
        for s in range(len(settings.llc)):
            exact = llc.quadratic_llc(
                CURVATURE, nbeta=settings.nbeta[s], localization=settings.localization[s],
                step_size=settings.step_size[s],
            )  # fmt: skip
            if settings.healthy[s]:
                assert abs(settings.llc[s] - exact) < 4.5 * settings.stderr[s]
        lam = jp.llc(
            jax.random.key(100 + seed), settings.posterior, settings.sampler, settings.plan,
            progress=False,
        )  # fmt: skip
        exact = llc.quadratic_llc(
            CURVATURE, nbeta=30.0, localization=10.0, step_size=settings.step_size[0]
        )
        assert abs(float(lam.mean) - exact) < 3 * float(lam.stderr)


def test_a_step_a_hundred_times_too_large():
    good = 0.2 / (30 * CURVATURE.max() + 10)
    settings = calibrated(gaussian(), sampler=jp.sgld(step_size=100 * good))
    assert named(settings) == {"step too large"}
    assert "εP = 20 in the stiffest direction" in settings.problems[0][0]
    assert repaired(settings) == 1
    assert settings.step_size[1] == pytest.approx(good, rel=0.02)
    assert (settings.nbeta[1], settings.localization[1]) == (30, 10)


@pytest.mark.parametrize("localization", [1e-5, 0.0])
def test_next_to_no_localization(localization):
    settings = calibrated(gaussian(localization=localization))
    assert named(settings) == {"not settled"}
    i = repaired(settings)
    assert settings.localization[i] > 0.1
    assert settings.nbeta[i] == 30


def test_data_that_do_not_act():
    settings = calibrated(gaussian(nbeta=1e-3))
    assert named(settings) == {"too little signal"}
    i = repaired(settings)
    assert settings.nbeta[i] * CURVATURE.max() > settings.localization[i]


def test_a_basin_that_is_left_and_one_that_holds():
    """w* in the upper of two wells, under a barrier of .4; the other is 1.4 lower, at 1."""

    def wells(params, batch):
        w = params["w"]
        well = jnp.where(w < 0.2, 5 * w**2, 0.4 - 5 * (w - 0.4) ** 2)
        return jnp.sum(jnp.where(w < 0.6, well, 0.2 + 10 * (w - 1.0) ** 2 - 1.6)) + 0 * batch

    posterior = jp.localized_posterior(
        wells, {"w": jnp.zeros(2)}, jnp.zeros(8), nbeta=4.0, localization=1.0
    )
    settings = calibrated(posterior)
    assert "left the basin" in named(settings)
    i = repaired(settings)
    assert settings.localization[i] > 10


def test_nothing_healthy_is_said():
    slope = jp.localized_posterior(
        lambda p, batch: 3 * jnp.sum(p["w"]) + 0 * batch, {"w": jnp.zeros(2)}, jnp.zeros(8),
        nbeta=30.0, localization=10.0,
    )  # fmt: skip
    settings = calibrated(slope)
    assert not settings.healthy.any()
    assert settings.verdict.startswith("no setting tried is healthy; this is the least bad, with: ")
    assert "left the basin: the loss falls below that of w*" in settings.verdict
    assert settings.verdict in str(settings).replace("\n", " ")


def test_a_check_mini_batches_kinks_and_a_component():
    """400 samples, of which 32 a step; |w − c| has no second derivative that says anything."""
    centers = jnp.asarray(np.random.default_rng(1).normal(size=(400, 2)), jnp.float32)
    posterior = jp.localized_posterior(
        lambda p, batch: jnp.sum(jnp.abs(p["w"][None] - batch), 1),
        {"w": jnp.median(centers, axis=0), "other": jnp.zeros(5)}, centers,
        nbeta=60.0, localization=20.0,
    )  # fmt: skip
    part = jp.restrict(posterior, jp.by_path("w"))
    settings = calibrated(part, budget=8 * 4 * 400 * 600, batch_size=400)
    repaired(settings)
    # Curvature of the mean loss: twice the density of a normal at its median, .8 in each direction.
    # Of the kinks of 400 samples some 30 lie within a step: 20 %, and the larger counts.
    precision = settings.stiffness[0] / settings.step_size[0]
    assert 0.8 < precision / (60 * 0.8 + 20) < 1.6
    lost = calibrated(
        part, budget=8 * 4 * 32 * 600,
        check=lambda p: jnp.where(jnp.all(p["w"] == jnp.median(centers, axis=0)), 1.0, 0.0),
    )  # fmt: skip
    assert lost.plan.batch_size == 32
    assert "left the basin: the check keeps 0% of its value at w*" in lost.problems[0]


def test_it_prints_draws_and_repeats():
    settings = calibrated(gaussian(), sampler=jp.sgld(step_size=0.3))
    shown = str(settings)
    assert shown.startswith("Proposed: nβ = 30, γ = 10, sgld(step_size=0.00")
    assert "Plan(num_chains=4, num_burnin=420, num_draws=100, thin=35)" in shown.replace("\n", " ")
    for words in ("0 given", "1 →", "step too large", "Setting 0: ", "gradient equivalents"):
        assert words in shown
    assert "step too large" in settings._repr_html_()
    figure = plot.calibration(settings)
    assert len(figure.subfigs) == 2
    figure.canvas.draw()
    again = calibrated(gaussian(), sampler=jp.sgld(step_size=0.3))
    np.testing.assert_array_equal(settings.trace, again.trace)


@pytest.mark.parametrize(("changes", "match"), [
    ({"sampler": jp.sgnht}, "Langevin sampler, got sgnht"),
    ({"sampler": lambda posterior: None}, "function of step_size"),
    ({"sampler": 3}, "function of step_size"),
    ({"sampler": jp.make_sampler(lambda posterior: None)}, "step_size among its settings"),
    ({"budget": 100.0}, "at least 51200 gradient equivalents"),
    ({"budget": -1.0}, "budget must be finite and above 0"),
    ({"num_chains": 1}, "num_chains must be at least 2"),
    ({"batch_size": 50}, "at most the 40 samples"),
])  # fmt: skip
def test_bad_input(changes, match):
    with pytest.raises((TypeError, ValueError), match=match):
        calibrated(gaussian(), **changes)


def test_it_refuses_to_be_traced():
    posterior = gaussian()
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda key: jp.calibrate(key, posterior).llc)(jax.random.key(0))
