"""The re-weighted training loop against closed forms and an independent loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import same

import jaxpattern as jp
from jaxpattern.lottery import draw, make_lottery

KEY = jax.random.key(7)
RNG = np.random.default_rng(0)
CENTRES = jnp.asarray(RNG.normal(size=(50, 3)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.uniform(0, 2, size=50), jnp.float32)
START = {"w": jnp.zeros(3)}
SGD = optax.sgd(0.1)  # one for all: it is what the programs of a run hang on
SETTLING = optax.sgd(optax.polynomial_schedule(0.3, 1e-3, 1.0, 3000))


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
    return jp.train(
        KEY, loss_fn, START, CENTRES, SETTLING,
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
    for at_once in (1, 2):
        waiting, _ = jp.train(
            three_keys(), loss_fn, stacked, CENTRES, seeds_at_once=at_once, **settings
        )
        np.testing.assert_allclose(waiting["w"], together["w"], rtol=1e-6)
    chunked, _ = jp.train(three_keys()[0], loss_fn, START, CENTRES, progress=True, **settings)
    whole, _ = jp.train(three_keys()[0], loss_fn, START, CENTRES, progress=False, **settings)
    np.testing.assert_array_equal(chunked["w"], whole["w"])
    np.testing.assert_array_equal(np.asarray(history.step[0])[[0, 1, -1]], [0, 6, 101])


def test_no_seed_at_once_is_refused():
    stacked = {"w": jnp.zeros((3, 3))}
    with pytest.raises(ValueError, match="seeds_at_once must be"):
        jp.train(
            three_keys(), loss_fn, stacked, CENTRES, SGD, num_steps=2, batch_size=5,
            seeds_at_once=0,
        )  # fmt: skip


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    poisoned = CENTRES.at[3].set(jnp.inf)
    good = lambda p, b: jnp.where(jnp.isinf(b[:, 0]), 0.0, 1.0) * 0.0 + loss_fn(p, b)  # noqa: E731
    with pytest.raises(ValueError, match="not finite at params"):
        jp.train(KEY, good, START, poisoned, SGD, num_steps=5, batch_size=5)

    def brittle(params, batch):
        """Finite at the start, and nowhere else for one of the samples."""
        away = jnp.abs(params["w"]).sum() > 0
        return loss_fn(params, batch) + jnp.where(
            away & (batch[:, 0] == CENTRES[3, 0]), jnp.inf, 0.0
        )

    with pytest.warns(UserWarning, match="steps had a loss or gradient that was not finite"):
        params, history = jp.train(
            KEY, brittle, START, CENTRES, SGD, num_steps=60, batch_size=5, progress=False
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
        jp.train(KEY, loss_fn, START, CENTRES, SGD, **settings)


def test_keys_and_parameters_of_seeds_must_match():
    with pytest.raises(ValueError, match="params must have a leading axis of 3"):
        jp.train(
            three_keys(), loss_fn, {"w": jnp.zeros((2, 3))}, CENTRES, SGD,
            num_steps=5, batch_size=5,
        )  # fmt: skip


# Samples drawn by weight


def test_a_lottery_has_the_probabilities_of_its_weights():
    """χ² of 10⁶ draws with 9 degrees of freedom; false alarms 1e-6."""
    weights = np.asarray([3.0, 0.0, 1e-3, 1.0, 0.5, 0.0, 7.0, 2.0, 0.1, 1.0, 4.0, 1.0], np.float32)
    index = np.asarray(draw(KEY, make_lottery(jnp.asarray(weights)), 10**6))
    counts = np.bincount(index, minlength=12)
    expected = 10**6 * weights.astype(np.float64) / weights.sum(dtype=np.float64)
    kept = weights > 0
    assert counts[~kept].sum() == 0
    chi = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi < 45.1


@pytest.mark.optimized
def test_no_entry_of_weight_zero_is_drawn_and_no_other_is_lost():
    rng = np.random.default_rng(0)
    weights = rng.random(2**20).astype(np.float32) ** 4
    weights[rng.random(2**20) < 0.5] = 0.0
    lottery = make_lottery(jnp.asarray(weights))
    assert (weights[np.asarray(draw(KEY, lottery, 2**20))] > 0).all()
    sums = np.asarray(lottery.entries).astype(np.int64)
    tickets = np.diff(sums, axis=1, prepend=0).ravel()
    np.testing.assert_array_equal(tickets > 0, weights > 0)
    blocks = np.diff(np.asarray(lottery.blocks).astype(np.int64)[0], prepend=0)
    probability = tickets / np.repeat(sums[:, -1], sums.shape[1])
    probability *= np.repeat(blocks / blocks.sum(), sums.shape[1])
    wanted = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    np.testing.assert_allclose(probability, wanted, rtol=1e-5, atol=1e-5 / 2**20)


@pytest.mark.optimized
def test_every_one_of_many_samples_can_be_drawn():
    """Of 2²⁴ equal weights half of those drawn are odd, to 5 standard deviations."""
    index = np.asarray(draw(KEY, make_lottery(jnp.ones(2**24)), 10**6))
    assert abs((index % 2).mean() - 0.5) < 5 * 0.5 / 1000
    assert len(np.unique(index)) > 0.96 * 10**6


def test_excluded_samples_may_be_anything():
    poisoned = CENTRES.at[3].set(jnp.nan)
    weights = WEIGHTS.at[3].set(0.0)
    clean, wanted = settled_on(CENTRES, weights)
    got, history = settled_on(poisoned, weights)
    assert int(history.skipped) == 0
    np.testing.assert_array_equal(got["w"], clean["w"])
    np.testing.assert_array_equal(history.loss, wanted.loss)


def settled_on(data, weights):
    return jp.train(
        KEY, loss_fn, START, data, SGD, num_steps=50, batch_size=5, weights=weights,
        progress=False,
    )  # fmt: skip


# Stochastic losses


def noisy_loss(params, batch, key):
    return 0.0 * loss_fn(params, batch) + jax.random.uniform(key, batch.shape[:1])


def test_a_stochastic_loss_gets_another_key_at_each_step():
    """One that belongs to the step alone, and not to the draw of its batch."""

    def run(key):
        _, history = jp.train(
            key, noisy_loss, START, CENTRES, SGD, num_steps=20, batch_size=5,
            progress=False,
        )  # fmt: skip
        return history.loss

    losses = np.asarray(run(jax.random.key(1)))
    wanted = [
        jax.random.uniform(
            jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 2**32 - 1), t), (5,)
        ).mean()
        for t in range(20)
    ]
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    assert len(set(losses.tolist())) == 20
    np.testing.assert_array_equal(losses, run(jax.random.key(1)))


def test_an_argument_with_a_default_is_left_alone():
    def scaled(params, batch, scale=2.0):
        return scale * loss_fn(params, batch)

    _, history = jp.train(
        KEY, scaled, START, CENTRES, optax.sgd(0.0), num_steps=1, batch_size=50, progress=False
    )
    index = jax.random.randint(jax.random.fold_in(KEY, 0), (50,), 0, 50)
    np.testing.assert_allclose(
        history.loss[0], 2 * loss_fn(START, CENTRES[index]).mean(), rtol=1e-6
    )


# A run that is continued


@pytest.mark.parametrize("seeds", [None, 3])
def test_a_run_is_continued_from_the_state_of_its_optimizer(seeds):
    """Samples are all the same, so that it does not matter which are drawn."""
    data = jnp.broadcast_to(CENTRES[:1], (8, 3))

    def key(i):
        one = jax.random.key(i)
        return one if seeds is None else jax.random.split(one, seeds)

    start = START if seeds is None else {"w": jnp.zeros((seeds, 3))}
    settings = dict(loss_fn=loss_fn, data=data, optimizer=optax.adam(0.1), batch_size=4,
                    progress=False)  # fmt: skip
    whole, history = jp.train(key(0), params=start, num_steps=10, **settings)
    half, first = jp.train(key(1), params=start, num_steps=5, **settings)
    rest, second = jp.train(
        key(2), params=half, num_steps=5, optimizer_state=first.optimizer_state, **settings
    )
    same(rest, whole)
    same(second.optimizer_state, history.optimizer_state)
    fresh, _ = jp.train(key(2), params=half, num_steps=5, **settings)
    assert np.abs(np.asarray(fresh["w"] - whole["w"])).max() > 1e-3
    with pytest.raises(ValueError, match="optimizer_state must be one of optimizer"):
        jp.train(key(3), params=start, num_steps=5, optimizer_state=optax.EmptyState(), **settings)


# Why steps are left out


def test_the_cause_of_steps_left_out_is_named():
    many = jnp.concatenate([jnp.zeros((2000, 3)), jnp.full((1, 3), jnp.nan)])

    def run(loss_fn, data, optimizer, **settings):
        with pytest.warns(UserWarning, match="were left out") as caught:
            jp.train(
                KEY, loss_fn, START, data, optimizer, num_steps=60, progress=False,
                **{"batch_size": 500} | settings,
            )  # fmt: skip
        return str(caught[0].message)

    said = run(loss_fn, many, SGD)
    assert "not finite at params as they were given for 1 samples of data" in said
    assert "[2000]" in said
    assert "learning rate" not in said
    kink = lambda params, batch: jnp.sqrt(jnp.abs(params["w"].sum())) + 0.0 * batch[:, 0]  # noqa: E731
    said = run(kink, CENTRES, SGD, batch_size=5)
    assert "in 60 of them the loss was finite and its gradient was not" in said
    assert "learning rate" not in said
