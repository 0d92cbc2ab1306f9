"""Patterning while training: it gets where it is asked to, within its budgets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Crash, often, same, stop_after

import jaxpattern as jp

RNG = np.random.default_rng(3)
MEANS = np.repeat([[0, 0], [2, 0], [0, 2]], [14, 13, 13], axis=0)
CENTERS = jnp.asarray(RNG.normal(size=(40, 2)) + MEANS, jnp.float32)
SOURCES = {"o": np.arange(14), "x": np.arange(14, 27), "y": np.arange(27, 40)}
OPTIMIZER = optax.sgd(0.1)  # one for all: it is what the programs of a run hang on
OBSERVABLES = {"w": lambda p: p["w"], "bent": lambda p: jnp.sum(jnp.tanh(p["w"]))}


def loss(params, batch):
    return 0.5 * jnp.sum((params["w"][None] - batch) ** 2, axis=1)


def keys():
    """Fresh each time: a key is used once."""
    return jax.random.split(jax.random.key(1), 3)


def run(key=None, params=None, optimizer=OPTIMIZER, **settings):
    given = dict(
        target={"w/0": 0.1}, observables=OBSERVABLES, sources=SOURCES, num_rounds=3, num_steps=40,
        batch_size=20, progress=False,
    )  # fmt: skip
    key = keys() if key is None else key
    params = {"w": jnp.zeros((3, 2))} if params is None else params
    return jp.pattern(key, loss, params, CENTERS, optimizer, **(given | settings))


@pytest.mark.parametrize("mode", ["forward", "secant"])
def test_it_gets_there_and_says_how(mode):
    """Linear in w but not in ρ: a round misses by second order, and the next makes up for it."""
    result = run(hold={"w/1": 0.01}, method=jp.least_norm(), mode=mode)
    assert len(result.rounds) == 3
    for r, this in enumerate(result.rounds):
        assert this.total["w/0"] == pytest.approx(0.1 * (r + 1) / 3, abs=0.004)
        assert this.predicted["w/0"] == pytest.approx(this.wanted["w/0"], rel=1e-3)
        assert this.realised["w/0"] == pytest.approx(this.predicted["w/0"], abs=0.004)
        assert this.total["w/1"] < 0.01 + 0.004
        assert set(this.realised) == {"w/0", "w/1", "bent"}
        assert this.response.rows == ("w/0", "w/1", "bent")
    shift = np.asarray(result.params["w"] - result.control["w"])
    np.testing.assert_allclose(shift.mean(0)[0], result.rounds[-1].total["w/0"], rtol=1e-5)
    error = shift.std(0, ddof=1)[0] / np.sqrt(3)
    assert result.rounds[-1].total_stderr["w/0"] == pytest.approx(error, rel=1e-4)
    text = str(result)
    for word in ("Patterning in 3 rounds", "w/1 at most", "±", "against the control"):
        assert word in text


def test_control_and_first_round_are_runs_of_train():
    """Round 0 has the seed's key folded with 0, as round 1 with 1, and carries the optimizer."""
    adam = optax.adam(0.05)
    result = run(optimizer=adam, num_rounds=2)
    params, state = {"w": jnp.zeros((3, 2))}, None
    weights = [None, None]
    there, kept = {"w": jnp.zeros((3, 2))}, None
    for r in range(2):
        key = jax.vmap(lambda k, r=r: jax.random.fold_in(k, r))(keys())
        other = jax.vmap(lambda k, r=r: jax.random.fold_in(k, r))(keys())
        params, history = jp.train(
            key, loss, params, CENTERS, adam, num_steps=40, batch_size=20,
            progress=False, optimizer_state=state, weights=weights[r],
        )  # fmt: skip
        state = history.optimizer_state
        there, history = jp.train(
            other, loss, there, CENTERS, adam, num_steps=40, batch_size=20,
            progress=False, optimizer_state=kept, weights=result.rounds[r].weights,
        )  # fmt: skip
        kept = history.optimizer_state
    same(result.control, params)
    same(result.params, there)
    same(result.optimizer_state, kept)


@pytest.mark.filterwarnings("ignore::jaxpattern.WeightsWarning")
def test_the_budget_on_the_effective_sample_size_holds():
    free = run(target={"w/0": 0.8})
    assert min(this.effective_share for this in free.rounds) < 0.8
    held = run(target={"w/0": 0.8}, min_effective_share=0.9)
    assert min(this.effective_share for this in held.rounds) >= 0.9
    assert any(this.scale < 1 for this in held.rounds)
    assert held.rounds[-1].total["w/0"] < free.rounds[-1].total["w/0"]
    assert "cut the change short" in str(held)


@pytest.mark.filterwarnings("ignore::jaxpattern.WeightsWarning")
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_weights_that_have_spent_the_budget_can_turn(mode):
    """From one source to another: within the budget, and predicted for the weights trained on."""
    turns = iter([{"x": 0.0, "y": 1.0}, {"x": 1.0, "y": 0.0}])

    def measure(key, params, weights):
        """A response that first says that y moves w/0, and then that x does."""
        response = jp.training_response(
            key, loss, params, CENTERS, OPTIMIZER, num_steps=40, batch_size=20, mode=mode,
            weights=weights, observables=OBSERVABLES, sources=SOURCES, progress=False,
        )  # fmt: skip
        told = {"o": 0.0, **next(turns)}
        chi = {name: jnp.full_like(x, told[name]) for name, x in response.chi.items()}
        return dataclasses.replace(response, chi=chi)

    found = run(
        target={"w/0": 50.0}, measure=measure, num_rounds=2, min_effective_share=0.95,
        method=jp.least_norm(),
    )  # fmt: skip
    shares = [this.effective_share for this in found.rounds]
    assert all(0.95 <= share < 0.96 for share in shares)
    first, second = (np.asarray(this.weights) for this in found.rounds)
    assert first[SOURCES["y"]].mean() > 1.2 > 1 > first[SOURCES["x"]].mean()
    assert second[SOURCES["x"]].mean() > 1.2 > 1 > second[SOURCES["y"]].mean()
    wanted = sum(
        told * float(np.sum((second / second.sum() - first / first.sum())[SOURCES[name]]))
        for name, told in {"o": 0.0, "x": 1.0, "y": 0.0}.items()
    )
    assert found.rounds[1].predicted["w/0"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.filterwarnings("ignore::jaxpattern.WeightsWarning")
def test_a_change_goes_no_further_than_to_weights_of_zero():
    """The next round trains, and measures, on them."""
    result = run(target={"w/0": 2.0}, method=jp.least_norm(), min_effective_share=0.05)
    for this in result.rounds:
        assert np.asarray(this.weights).min() >= 0
    assert any(this.scale < 1 for this in result.rounds)


def test_one_seed_and_one_weight_per_loss():
    result = run(
        jax.random.key(2), {"w": jnp.zeros(2)}, mode="reverse", method=jp.least_norm()
    )  # fmt: skip
    assert result.rounds[-1].total["w/0"] == pytest.approx(0.1, abs=0.004)
    assert np.isnan(result.rounds[-1].total_stderr["w/0"])
    assert len(np.unique(np.asarray(result.weights))) > 3


def test_another_response_can_be_measured():
    calls = []

    def measure(key, params, weights):
        calls.append(np.asarray(weights))
        return jp.training_response(
            key, loss, params, CENTERS, OPTIMIZER, num_steps=40, batch_size=20,
            weights=weights, observables=OBSERVABLES, sources=SOURCES, progress=False,
        )  # fmt: skip

    result = run(measure=measure)
    plain = run()
    # The weights come as a JAX array, which is normalized in float32.
    np.testing.assert_allclose(result.params["w"], plain.params["w"], rtol=1e-5)
    np.testing.assert_allclose(calls[1], plain.rounds[0].weights, rtol=1e-5)


def test_it_goes_on_after_a_crash_to_the_same_bits(tmp_path, monkeypatch):
    plain = run(num_rounds=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        with pytest.raises(Crash):
            run(num_rounds=2, checkpoint=often(tmp_path))
    again = run(num_rounds=2, checkpoint=tmp_path)
    same(again.params, plain.params)
    same(again.weights, plain.weights)
    assert (tmp_path / "round-001" / "after").is_dir()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(target={"no": 1.0}), ValueError, "unknown rows"),
        (dict(target={}), ValueError, "target"),
        (dict(hold={"w/0": 0.1}), ValueError, "in both"),
        (dict(hold="w/1"), TypeError, "hold must be"),
        (dict(hold={"w/1": -0.1}), ValueError, "at least 0"),
        (dict(min_effective_share=1.5), ValueError, "min_effective_share"),
        (dict(num_rounds=0), ValueError, "num_rounds"),
        (dict(sources={"a": [0, 40]}), ValueError, "from 0 to 39"),
        (dict(measure=lambda key: key), TypeError, "measure"),
    ],
)
def test_what_does_not_fit_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        run(**settings)
