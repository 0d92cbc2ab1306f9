"""The response of a training run from twin runs: what retraining does, at the width asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Crash, often, same, stop_after
from test_training_run import (
    ADAM,
    BASE,
    DATA,
    ROWS,
    RUN,
    SOURCES,
    key,
    keys,
    network,
    phi,
    respond,
    slopes,
    start,
    starts,
)

import jaxpattern as jp


@pytest.mark.parametrize("width", [0.05, 1.0])
def test_it_is_the_difference_of_retraining(width):
    """Run for run, sources without weight included."""
    response = respond(key(), mode="secant", width=width)
    found = slopes(response)
    for g, index in enumerate(SOURCES.values()):
        ends = []
        for sign in (1, -1):
            params, _ = jp.train(
                key(), network, start(), DATA, ADAM, progress=False,
                weights=BASE.at[index].multiply(1 + sign * width), **RUN,
            )  # fmt: skip
            ends.append(phi(params))
        wanted = (ends[0] - ends[1]) / (2 * width)
        np.testing.assert_allclose(found[:, g], wanted, rtol=1e-4, atol=2e-6 / width)
    params, _ = jp.train(key(), network, start(), DATA, ADAM, weights=BASE, progress=False, **RUN)
    np.testing.assert_allclose(response.mean, phi(params), rtol=1e-5)
    assert response.rows == ROWS
    assert float(response.nbeta) == 1
    assert "nothing found" in response.verdict


def test_of_narrow_twins_it_is_the_derivative():
    """O(δ²): a third of the width leaves a ninth of the difference."""
    exact = slopes(respond(key()))
    wide, narrow = (
        np.abs(slopes(respond(key(), mode="secant", width=width)) - exact).max()
        for width in (0.15, 0.05)
    )
    assert wide < 0.02 * np.abs(exact).max()
    assert 7 < wide / narrow < 11


def test_kinks_count():
    """A median: the second derivative of |w − x| is 0 but at x, and autodiff sees none of it."""
    data = jnp.asarray(np.random.default_rng(1).normal(size=2000), jnp.float32)
    upper = np.flatnonzero(np.asarray(data) > 0.3)
    lower = np.setdiff1d(np.arange(2000), upper)

    def loss(params, batch):
        return jnp.abs(params["w"] - batch)

    def slope(mode):
        response = jp.training_response(
            jax.random.split(jax.random.key(0), 8), loss, {"w": jnp.zeros(8)}, data,
            optax.sgd(0.05), num_steps=300, batch_size=200, mode=mode, progress=False,
            observables={"w": lambda p: p["w"]}, sources={"upper": upper, "lower": lower},
        )  # fmt: skip
        mass = float(response.mass["upper"])
        return mass * float(response.chi["upper"][0]), mass * float(response.stderr["upper"][0])

    def median(factor):
        rho = np.ones(2000)
        rho[upper] = factor
        order = np.argsort(data)
        return float(data[order][np.searchsorted(np.cumsum(rho[order]), rho.sum() / 2)])

    wanted = (median(1.25) - median(0.75)) / 0.5
    found, error = slope("secant")
    assert found == pytest.approx(wanted, abs=3 * error)
    assert error < wanted / 20
    assert abs(slope("forward")[0] - wanted) > wanted / 2


def test_where_the_derivative_grows_without_bound_it_is_that_of_finite_changes():
    """A double well left with a step beyond stability: a chaotic run."""

    def loss(params, batch):
        return 0.25 * (params["w"] ** 2 - 1) ** 2 + 0.01 * batch * params["w"]

    rng = np.random.default_rng(0)
    data = jnp.asarray(np.concatenate([rng.normal(1, 1, 20), rng.normal(-1, 1, 20)]), jnp.float32)
    setup = dict(
        num_steps=60, batch_size=8, observables={"w": lambda p: p["w"]}, progress=False,
        sources={"up": np.arange(20), "down": np.arange(20, 40)},
    )  # fmt: skip

    def respond(mode):
        return jp.training_response(
            jax.random.split(jax.random.key(1), 64), loss, {"w": jnp.full(64, 0.5)}, data,
            optax.sgd(1.9), mode=mode, **setup,
        )  # fmt: skip

    with pytest.warns(jp.UnreliableWarning, match="mode='secant'"):
        derivative = respond("forward")
    twins = respond("secant")
    assert "nothing found" in twins.verdict
    assert set(twins.diagnostics) == {"skipped", "groups"}
    assert float(twins.stderr["up"][0]) < 0.1 * float(derivative.stderr["up"][0])


def test_a_lost_twin_loses_its_seed():
    """With less weight on the source, the parameter of the first seed ends beyond the edge."""

    def loss(params, batch):
        return -batch * params["w"]

    setup = dict(num_steps=12, batch_size=3, progress=False)
    first, data = {"w": jnp.asarray([0.0, 9.0, 9.0])}, jnp.asarray([1.0, 1.0, -1.0])
    low, plain = (
        jp.train(keys(), loss, first, data, optax.sgd(0.1), weights=w, **setup)[0]["w"][0]
        for w in (jnp.asarray([0.8, 0.8, 1.0]), None)
    )
    edge = float(low + plain) / 2
    setup |= dict(mode="secant", width=0.2, sources={"up": [0, 1], "down": [2]})

    def respond(key, first):
        return jp.training_response(
            key, loss, first, data, optax.sgd(0.1), **setup,
            observables={"log": lambda p: jnp.log(p["w"] - edge)},
        )  # fmt: skip

    response = respond(keys(), first)
    np.testing.assert_array_equal(response.diverged[0], [True, False, False])
    assert np.isnan(response.batches["up"][0, 0])
    assert np.isfinite(response.batches["up"][1:]).all()
    assert np.isfinite(response.chi["up"]).all()
    with pytest.raises(jp.DivergenceError, match="smaller width"):
        respond(keys()[0], {"w": first["w"][0]})


def test_it_goes_on_after_a_crash_to_the_same_bits(tmp_path, monkeypatch):
    plain = respond(keys(), starts(), mode="secant")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Crash):
            respond(keys(), starts(), mode="secant", checkpoint=often(tmp_path))
    again = respond(keys(), starts(), mode="secant", checkpoint=tmp_path)
    same(again.chi, plain.chi)
    same(again.mean, plain.mean)
    with pytest.raises(jp.CheckpointError, match="width"):
        respond(keys(), starts(), mode="secant", width=0.5, checkpoint=often(tmp_path))


def test_seeds_are_dealt_out_and_weights_can_be_vmapped():
    mesh = jp.mesh(chain=4, data=2)
    plain = respond(keys(), starts(), mode="secant")
    dealt = respond(keys(), starts(), mode="secant", mesh=mesh)
    np.testing.assert_allclose(slopes(dealt), slopes(plain), rtol=1e-3, atol=1e-5)
    mapped = jax.vmap(
        lambda w: respond(jax.random.key(5), weights=w, mode="secant", progress=False).chi["a"]
    )(jnp.stack([BASE, jnp.ones(60)]))
    np.testing.assert_allclose(mapped[0], respond(key(), mode="secant").chi["a"], rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(width=0.1), ValueError, "width is for mode='secant'"),
        (dict(mode="reverse", width=0.1), ValueError, "width is for mode='secant'"),
        (dict(mode="secant", width=1.5), ValueError, "at most 1"),
        (dict(mode="secant", width=0.0), ValueError, "width"),
        (dict(mode="secant", width="wide"), TypeError, "width"),
        (dict(mode="secant", num_snapshots=3), ValueError, "mode='reverse'"),
    ],
)
def test_what_does_not_fit_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        respond(key(), **settings)
