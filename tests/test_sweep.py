"""Calibration on a quadratic, where λ̂ and the temperature of every setting are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import euler, llc

import jaxpattern as jp

KEY = jax.random.key(11)
CURVATURE = np.array([1.0, 2.0, 0.5])
DATA = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)), jnp.float32)
PLAN = jp.Plan(num_chains=8, num_burnin=100, num_draws=300, thin=10)


def loss_fn(params, batch):
    return 0.5 * jnp.sum(
        jnp.asarray(CURVATURE, jnp.float32)[None] * (params["w"][None] - batch) ** 2, 1
    )


@pytest.fixture(scope="module")
def posterior():
    return jp.localized_posterior(loss_fn, {"w": DATA.mean(0)}, DATA, nbeta=30.0, localization=10.0)


def temperature(nbeta, localization, step_size):
    """Σ h T / Σ h, T the inflation of each direction's variance by the step."""
    variance = euler.stationary_variance(
        CURVATURE, nbeta=nbeta, localization=localization, step_size=step_size
    )
    inflation = variance * (nbeta * CURVATURE + localization)
    return np.sum(CURVATURE * inflation) / np.sum(CURVATURE)


def test_settings_are_measured_and_judged(posterior):
    """λ̂ within 5 standard errors and temperatures within 0.1 of the closed forms; false alarms
    of the first 1e-5."""
    result = jp.sweep(
        KEY, posterior, PLAN,
        step_sizes=[3e-3, 2e-2, 0.2], nbetas=[30.0], localizations=[10.0, 40.0],
    )  # fmt: skip
    assert result.llc.shape == (6,)
    assert result.trace.shape == (6, 8, 300)
    for s in range(4):
        setting = dict(
            nbeta=result.nbeta[s], localization=result.localization[s],
            step_size=result.step_size[s],
        )  # fmt: skip
        exact = llc.quadratic_llc(CURVATURE, **setting)
        assert abs(result.llc[s] - exact) < 5 * result.stderr[s]
        assert result.temperature[s] == pytest.approx(temperature(**setting), abs=0.1)
    np.testing.assert_array_equal(result.healthy, [True, True, False, False, False, False])
    assert "times the temperature" in result.problems[2][0]
    assert result.problems[5] == ("all chains turned non-finite",)
    assert "healthy" in str(result)
    assert "non-finite" in str(result)


def test_a_check_that_is_lost_and_a_chain_that_never_moves_are_named(posterior):
    result = jp.sweep(
        KEY, posterior, jp.Plan(num_chains=4, num_burnin=0, num_draws=20, thin=1),
        step_sizes=[1e-3], nbetas=[0.1], localizations=[0.1],
        check=lambda p: jnp.where(jnp.sum((p["w"] - DATA.mean(0)) ** 2) > 1e-6, 0.0, 1.0),
    )  # fmt: skip
    assert not result.healthy[0]
    assert any("check kept only 0%" in problem for problem in result.problems[0])


@pytest.mark.parametrize(("changes", "match"), [
    ({"step_sizes": []}, "step_sizes is empty"),
    ({"nbetas": [0.0]}, "nbetas must be finite and above 0"),
    ({"localizations": [-1.0]}, "localizations must be finite and at least 0"),
    ({"keep": -0.1}, "keep must be finite and at least 0"),
])  # fmt: skip
def test_bad_input(posterior, changes, match):
    settings = dict(step_sizes=[1e-3], nbetas=[30.0], localizations=[10.0]) | changes
    with pytest.raises(ValueError, match=match):
        jp.sweep(KEY, posterior, PLAN, **settings)
