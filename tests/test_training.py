"""The re-weighted training loop against closed forms and an independent loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpattern as jp

KEY = jax.random.key(7)
RNG = np.random.default_rng(0)
CENTRES = jnp.asarray(RNG.normal(size=(50, 3)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.uniform(0, 2, size=50), jnp.float32)
START = {"w": jnp.zeros(3)}


def three_keys():
    """Fresh each time: a key is used once."""
    return jax.random.split(jax.random.key(8), 3)


def loss_fn(params, batch):
    return 0.5 * jnp.sum((params["w"][None] - batch) ** 2, axis=1)


def token_loss(params, batch):
    """One loss a token: tokens are the coordinates."""
    return 0.5 * (params["w"][None] - batch) ** 2


def settled(**settings):
    """Weights after steps that shrink to nothing, so that the mean over batches is left."""
    rate = optax.polynomial_schedule(0.3, 1e-3, 1.0, 3000)
    return jp.train(
        KEY, loss_fn, START, CENTRES, optax.sgd(rate),
        num_steps=3000, batch_size=25, progress=False, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("weighting", ["loss", "sampling"])
def test_the_minimum_is_that_of_the_weighted_data(weighting):
    """Five standard deviations of the averaged batches, about 0.01; false alarms 1e-6."""
    params, history = settled(weights=WEIGHTS, weighting=weighting)
    wanted = (WEIGHTS[:, None] * CENTRES).sum(0) / WEIGHTS.sum()
    unweighted = CENTRES.mean(0)
    assert np.abs(np.asarray(params["w"] - wanted)).max() < 0.05
    assert np.abs(np.asarray(wanted - unweighted)).max() > 0.1
    assert int(history.skipped) == 0


def test_steps_are_those_of_a_hand_loop():
    optimizer = optax.adamw(1e-2)
    params, history = jp.train(
        KEY, loss_fn, START, CENTRES, optimizer,
        num_steps=7, batch_size=10, weights=WEIGHTS, progress=False,
    )  # fmt: skip
    hand, state = START, optimizer.init(START)
    for t in range(7):
        index = jax.random.randint(jax.random.fold_in(KEY, t), (10,), 0, 50)
        rho, batch = WEIGHTS[index], CENTRES[index]

        def objective(params, rho=rho, batch=batch):
            return jnp.sum(rho * loss_fn(params, batch)) / jnp.sum(rho)

        value, gradient = jax.value_and_grad(objective)(hand)
        np.testing.assert_allclose(history.loss[t], value, rtol=1e-5)
        updates, state = optimizer.update(gradient, state, hand)
        hand = optax.apply_updates(hand, updates)
    np.testing.assert_allclose(params["w"], hand["w"], rtol=1e-5)


def test_token_weights_of_zero_exclude():
    """Coordinates of weight zero never move; the others reach their weighted mean."""
    weights = jnp.zeros((50, 3)).at[:, 0].set(WEIGHTS)
    for weighting in ("loss", "sampling"):
        params, _ = jp.train(
            KEY, token_loss, START, CENTRES, optax.sgd(optax.linear_schedule(0.3, 1e-3, 2000)),
            num_steps=2000, batch_size=25, weights=weights, weighting=weighting, progress=False,
        )  # fmt: skip
        wanted = jnp.sum(WEIGHTS * CENTRES[:, 0]) / WEIGHTS.sum()
        np.testing.assert_allclose(params["w"][0], wanted, atol=0.05)
        np.testing.assert_array_equal(params["w"][1:], 0.0)


def test_seeds_at_once_chunks_and_vmap_give_the_same_bits():
    settings = dict(optimizer=optax.adam(1e-2), num_steps=101, batch_size=20)
    metrics = lambda p: {"sum": p["w"].sum()}  # noqa: E731
    stacked = {"w": jnp.zeros((3, 3))}
    together, history = jp.train(
        three_keys(), loss_fn, stacked, CENTRES, metrics=metrics, **settings
    )
    for i in range(3):
        alone, record = jp.train(
            three_keys()[i], loss_fn, START, CENTRES, metrics=metrics, progress=False, **settings
        )
        np.testing.assert_allclose(together["w"][i], alone["w"], rtol=1e-6)
        np.testing.assert_array_equal(history.step[i], record.step)
        np.testing.assert_allclose(history.metrics["sum"][i], record.metrics["sum"], rtol=1e-5)
    mapped = jax.vmap(
        lambda key: jp.train(key, loss_fn, START, CENTRES, progress=False, **settings)[0]
    )(three_keys())
    np.testing.assert_allclose(mapped["w"], together["w"], rtol=1e-6)
    chunked, _ = jp.train(three_keys()[0], loss_fn, START, CENTRES, progress=True, **settings)
    whole, _ = jp.train(three_keys()[0], loss_fn, START, CENTRES, progress=False, **settings)
    np.testing.assert_array_equal(chunked["w"], whole["w"])
    np.testing.assert_array_equal(np.asarray(history.step[0])[[0, 1, -1]], [0, 6, 101])


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    poisoned = CENTRES.at[3].set(jnp.inf)
    good = lambda p, b: jnp.where(jnp.isinf(b[:, 0]), 0.0, 1.0) * 0.0 + loss_fn(p, b)  # noqa: E731
    with pytest.raises(ValueError, match="not finite at params"):
        jp.train(KEY, good, START, poisoned, optax.sgd(0.1), num_steps=5, batch_size=5)

    def brittle(params, batch):
        """Finite at the start, and nowhere else for one of the samples."""
        away = jnp.abs(params["w"]).sum() > 0
        return loss_fn(params, batch) + jnp.where(
            away & (batch[:, 0] == CENTRES[3, 0]), jnp.inf, 0.0
        )

    with pytest.warns(UserWarning, match="steps had a loss or gradient that was not finite"):
        params, history = jp.train(
            KEY, brittle, START, CENTRES, optax.sgd(0.1), num_steps=60, batch_size=5, progress=False
        )
    assert np.isfinite(np.asarray(params["w"])).all()
    assert int(history.skipped) == int(np.sum(~np.isfinite(np.asarray(history.loss)))) > 0


@pytest.mark.parametrize(("changes", "match"), [
    ({"batch_size": 51}, "batch_size must be at most the 50 samples, got 51"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"num_steps": 0}, "num_steps must be at least 1"),
    ({"weights": jnp.ones(49)}, r"weights must have the shape of the losses, \[50\], got \[49\]"),
    ({"weights": jnp.zeros(50)}, "weights must have a positive sum, got 0"),
    ({"weights": WEIGHTS - 0.1, "weighting": "sampling"}, "weights must not be negative"),
    ({"record_every": 0}, "record_every must be at least 1"),
])  # fmt: skip
def test_bad_input(changes, match):
    settings = {"num_steps": 5, "batch_size": 5} | changes
    with pytest.raises(ValueError, match=match):
        jp.train(KEY, loss_fn, START, CENTRES, optax.sgd(0.1), **settings)


def test_keys_and_parameters_of_seeds_must_match():
    with pytest.raises(ValueError, match="params must have a leading axis of 3"):
        jp.train(
            three_keys(), loss_fn, {"w": jnp.zeros((2, 3))}, CENTRES, optax.sgd(0.1),
            num_steps=5, batch_size=5,
        )  # fmt: skip
