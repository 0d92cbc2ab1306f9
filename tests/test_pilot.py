"""What a look before the run tells apart: smooth, bent and jumping losses, heat, rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpattern as jp
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.pilot import fly
from jaxpattern.chains.run import make_run
from jaxpattern.response.products import BEND
from jaxpattern.verdict import JUMP, LEAP

SAMPLES = 240
RNG = np.random.default_rng(505)
X = RNG.standard_normal((SAMPLES, 2)).astype(np.float32)
Y = (np.sin(1.5 * X[:, 0]) * X[:, 1]).astype(np.float32)
PARAMS = {
    "a": RNG.standard_normal((2, 3)).astype(np.float32),
    "b": RNG.standard_normal(3).astype(np.float32),
    "c": RNG.standard_normal(3).astype(np.float32),
}
OUTPUTS = {
    "tanh": lambda h, c: jnp.tanh(h) @ c,
    "gelu": lambda h, c: jax.nn.gelu(h) @ c,
    "relu": lambda h, c: jax.nn.relu(h) @ c,
    "max-pooling": lambda h, c: jnp.max(h * c[None], -1),
    "top-1 routing": lambda h, c: jnp.take_along_axis(
        jnp.tanh(h) * c[None], jnp.argmax(h, -1)[:, None], 1
    )[:, 0],
    "rounding": lambda h, c: (
        (jnp.tanh(h) + jax.lax.stop_gradient(jnp.round(4 * jnp.tanh(h)) / 4 - jnp.tanh(h))) @ c
    ),
}
SMOOTH, BENT, JUMPING = (
    ("tanh", "gelu"),
    ("relu", "max-pooling", "absolute error"),
    ("top-1 routing", "rounding"),
)


def network(kind, **settings):
    def loss(params, batch):
        output = OUTPUTS.get(kind, OUTPUTS["tanh"])
        error = output(batch["x"] @ params["a"] + params["b"][None], params["c"]) - batch["y"]
        return jnp.abs(error) if kind == "absolute error" else 0.5 * error**2

    settings = {"nbeta": 100.0, "localization": 30.0} | settings
    return jp.localized_posterior(loss, PARAMS, {"x": X, "y": Y}, **settings)


def flown(posterior, step_size=1e-4, seed=0, sampler=jp.sgld, **plan):
    plan = jp.Plan(num_burnin=1, thin=1, **plan)
    run = make_run(jax.random.key(seed), posterior, sampler(step_size=step_size), plan)
    return fly(run, ComponentGroup())


@pytest.mark.parametrize("kind", [*SMOOTH, *BENT, *JUMPING])
def test_smooth_bent_and_jumping_losses(kind):
    pilot = flown(network(kind))
    assert (pilot.bend < BEND) == (kind in SMOOTH)
    assert (pilot.jump > JUMP and pilot.leap > LEAP) == (kind in JUMPING)


@pytest.mark.parametrize(("kind", "product"), [("tanh", "one-sided secants"), ("relu", "secants")])
def test_one_sided_differences_only_where_gradients_hardly_bend(kind, product):
    posterior = network(kind)
    response = jp.susceptibilities(
        jax.random.key(0), posterior, jp.sgld(step_size=1e-4),
        jp.Plan(num_chains=2, num_burnin=4, num_draws=4, thin=2),
        observables={"c": lambda p: p["c"]}, probes={"all": posterior.data},
        estimator=jp.pathwise(window=4, on_unreliable="warn"), progress=False,
    )  # fmt: skip
    assert response.estimator.endswith(f", {product})")


@pytest.mark.filterwarnings("ignore::jaxpattern.UnreliableWarning")
def test_an_llc_over_a_loss_that_jumps_says_so():
    plan = jp.Plan(num_chains=2, num_burnin=20, num_draws=20, thin=2)
    run = lambda kind, sampler: jp.llc(  # noqa: E731
        jax.random.key(1), network(kind), sampler, plan, progress=False
    )
    assert "the loss jumps" in run("top-1 routing", jp.sgld(step_size=1e-4)).verdict
    assert "jumps" not in run("relu", jp.sgld(step_size=1e-4)).verdict
    # A Metropolis step sees the loss itself.
    assert "jumps" not in run("top-1 routing", jp.mala(step_size=1e-4)).verdict


def test_heat_of_small_batches_is_that_of_a_gaussian():
    """(ε/4) (nβ)² Var[∂ℓ] / B of a loss with independent slopes; a thermostat takes it away."""
    slopes = np.random.default_rng(1).normal(size=64).astype(np.float32)
    posterior = jp.localized_posterior(
        lambda p, b: 0.5 * p["w"][0] ** 2 + b * p["w"][0],
        {"w": jnp.zeros(1)}, jnp.asarray(slopes - slopes.mean()), nbeta=200.0, localization=1.0,
    )  # fmt: skip
    pilot = flown(posterior, step_size=1e-3, batch_size=2)
    drawn = 64  # as many as are looked at, with replacement
    wanted = 1e-3 / 4 * 200.0**2 * np.var(slopes) / 2
    np.testing.assert_allclose(pilot.heat, wanted, rtol=4 * np.sqrt(2 / drawn))
    assert flown(posterior, step_size=1e-3).heat == 0
    assert flown(posterior, step_size=1e-3, batch_size=2, sampler=jp.sgnht).heat == 0
    with pytest.warns(jp.UnreliableWarning, match="mini-batches adds .* to the temperature"):
        jp.llc(
            jax.random.key(0), posterior, jp.sgld(step_size=1e-3),
            jp.Plan(num_chains=4, num_burnin=200, num_draws=200, thin=10, batch_size=2),
            progress=False,
        )  # fmt: skip


def test_a_loss_rounded_to_more_than_a_temperature():
    posterior = jp.localized_posterior(
        lambda p, b: 1e3 + 0.5 * (p["w"][0] - b) ** 2, {"w": jnp.zeros(1)},
        jnp.asarray([-1.0, 1.0]), nbeta=1e6, localization=1.0,
    )  # fmt: skip
    with pytest.warns(jp.UnreliableWarning, match="rounded to .* of a temperature"):
        jp.llc(
            jax.random.key(0), posterior, jp.sgld(step_size=1e-7),
            jp.Plan(num_chains=4, num_burnin=100, num_draws=100, thin=10), progress=False,
        )  # fmt: skip


def test_an_infinite_slope_of_an_observable_is_no_divergence():
    """√0: 0 everywhere, with a slope of no value."""
    posterior = jp.localized_posterior(
        lambda p, b: 0.5 * jnp.sum((p["w"][None] - b) ** 2, -1), {"w": jnp.zeros(2)},
        jnp.asarray([[-1.0, 0.0], [1.0, 0.0]]), nbeta=10.0, localization=1.0,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="derivatives of chains are not finite") as caught:
        jp.susceptibilities(
            jax.random.key(0), posterior, jp.sgld(step_size=1e-2),
            jp.Plan(num_chains=2, num_burnin=4, num_draws=4, thin=2),
            observables={"root": lambda p: jnp.sqrt(p["w"][0] - p["w"][0])},
            probes={"all": posterior.data}, estimator=jp.pathwise(window=4), progress=False,
        )  # fmt: skip
    assert not isinstance(caught.value, jp.DivergenceError)


def test_a_negative_llc_is_no_minimum():
    data = jnp.asarray([-1.0, 1.0])
    posterior = jp.localized_posterior(
        lambda p, b: 0.5 * (p["w"][0] - 2 - b) ** 2, {"w": jnp.zeros(1)}, data,
        nbeta=10.0, localization=10.0,
    )  # fmt: skip
    plan = jp.Plan(num_chains=4, num_burnin=200, num_draws=50, thin=20)
    with pytest.warns(jp.UnreliableWarning, match="not at a minimum"):
        jp.llc(jax.random.key(0), posterior, jp.sgld(step_size=1e-2), plan, progress=False)


def test_mini_batches_that_heat_the_chain_speak_against_covariances_alone():
    """A derivative of the chain has no such bias to first order: χ of a linear φ is exact."""
    slopes = np.asarray([-1.0, 1.0] * 32, np.float32)
    posterior = jp.localized_posterior(
        lambda p, b: 0.5 * p["w"][0] ** 2 + b * p["w"][0],
        {"w": jnp.zeros(1)}, jnp.asarray(slopes), nbeta=200.0, localization=1.0,
    )  # fmt: skip
    plan = jp.Plan(num_chains=4, num_burnin=2500, num_draws=100, thin=20, batch_size=2)
    measure = lambda estimator: jp.susceptibilities(  # noqa: E731
        jax.random.key(0), posterior, jp.sgld(step_size=1e-3), plan, progress=False,
        observables={"w": lambda p: p["w"][0]}, probes={"all": posterior.data},
        estimator=estimator,
    )  # fmt: skip
    response = measure(jp.pathwise())
    assert "temperature" not in response.verdict
    np.testing.assert_allclose(response.chi["all"][0], -slopes / 201.0, rtol=0.02)
    with pytest.warns(jp.UnreliableWarning, match="mini-batches adds .* to the temperature"):
        measure(jp.covariance())
