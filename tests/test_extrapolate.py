"""Regression of coordinates on features: the ridge in closed form, and an honest held-out R²."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config

import jaxpattern as jp

B, T, F = 60, 20, 8
SCALES = np.geomspace(1e-3, 1e3, F)


def problem(noise=0.0, seed=0):
    """(features, coordinates) with a linear part of variance 1; features differ in scale."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, T, F))
    b = rng.normal(size=F)
    c = x @ (b / np.linalg.norm(b)) + noise * rng.normal(size=(B, T)) + 2
    return (x * SCALES + 5 * SCALES).astype(np.float32), c.astype(np.float32)


def regress(features, coordinates, **settings):
    """With the same sequences held out each time."""
    return jp.regress_coordinates(jax.random.key(3), features, coordinates, **settings)


def test_a_linear_coordinate_is_predicted_on_other_sequences():
    features, coordinates = problem()
    regression = regress(features, coordinates)
    assert regression.held_out.sum() == 12
    assert regression.penalty == 1e-4
    assert regression.held_out_r2 > 0.9999
    predicted = jax.jit(lambda r, x: r.predict(x))(regression, jnp.asarray(features))
    np.testing.assert_allclose(predicted, coordinates, atol=0.01)
    np.testing.assert_allclose(regression.predict(jnp.asarray(features[0, 0])), predicted[0, 0])


def test_is_the_ridge_of_the_training_sequences():
    features, coordinates = problem(noise=1.0)
    weights = np.random.default_rng(1).uniform(0, 1, (B, T))
    regression = regress(features, coordinates, weights=weights, penalties=(0.3,))
    kept = ~regression.held_out
    x, c = (np.float64(v[kept]).reshape(kept.sum() * T, -1) for v in (features, coordinates))
    q = weights[kept].reshape(-1, 1) / weights[kept].sum()
    mean, scale = (q * x).sum(0), np.sqrt((q * x**2).sum(0) - (q * x).sum(0) ** 2)
    # Ridge as least squares with rows √τ added.
    design = np.concatenate([np.sqrt(q) * (x - mean) / scale, np.sqrt(0.3) * np.eye(F)])
    wanted = np.concatenate([np.sqrt(q) * (c - (q * c).sum()), np.zeros((F, 1))])
    b = np.linalg.lstsq(design, wanted)[0][:, 0] / scale
    np.testing.assert_allclose(regression.coefficients, b, rtol=1e-5)
    intercept = (q * c).sum() - mean @ b
    np.testing.assert_allclose(regression.intercept, intercept, rtol=1e-5)
    x, c, q = (np.float64(v[~kept]) for v in (features, coordinates, weights))
    rest = (q * (c - intercept - x @ b) ** 2).sum()
    base = (q * (c - (weights[kept] * coordinates[kept]).sum() / weights[kept].sum()) ** 2).sum()
    assert regression.held_out_r2 == pytest.approx(1 - rest / base, rel=1e-5)


def test_r2_is_the_share_that_is_signal():
    """Signal of variance 1 and noise of variance σ²: 1 / (1 + σ²); the fit costs F / 960."""
    scores = [regress(*problem(1.0, seed)) for seed in range(12)]
    r2 = np.array([s.held_out_r2 for s in scores])
    stderr = np.array([s.held_out_stderr for s in scores])
    assert np.mean(r2) == pytest.approx(0.5, abs=4 * r2.std() / np.sqrt(12) + F / 960)
    # Errors on 240 tokens each: their mean is that of the spread to a quarter or so.
    assert 0.5 < stderr.mean() / r2.std() < 2


def test_noise_is_not_predicted():
    rng = np.random.default_rng(4)
    for seed in range(5):
        features, _ = problem(seed=seed)
        regression = regress(features, rng.normal(size=(B, T)))
        assert regression.held_out_r2 < 0.03


def test_what_only_a_sequence_knows_is_not_generalised():
    """Features that name the sequence explain its mean within it, and nothing beyond it."""
    of_sequence = np.random.default_rng(2).normal(size=(B, 1)) * np.ones((B, T))
    names = np.broadcast_to(np.eye(B)[:, None], (B, T, B))
    regression = regress(names, of_sequence)
    kept = ~regression.held_out
    inside = np.asarray(regression.predict(jnp.asarray(names, jnp.float32)))[kept]
    assert np.corrcoef(inside.ravel(), of_sequence[kept].ravel())[0, 1] > 0.99
    assert regression.held_out_r2 < 0.05


def test_many_useless_features_ask_for_a_larger_penalty():
    features, coordinates = problem(noise=1.0)
    useless = np.random.default_rng(3).normal(size=(B, T, 400))
    features = np.concatenate([features, useless], axis=-1)
    regression = regress(features, coordinates)
    assert regression.penalty >= 0.1
    assert regression.penalty == (1e-4, 1e-3, 1e-2, 1e-1, 1.0)[regression.fold_r2.argmax()]
    small = regress(features, coordinates, penalties=(1e-4,))
    assert regression.held_out_r2 > small.held_out_r2


def test_padding_is_not_looked_at():
    features, coordinates = problem(noise=0.5)
    weights = np.ones((B, T))
    weights[:, 15:] = 0
    weights[7] = 0
    expected = regress(features, coordinates, weights=weights)
    features[weights == 0] = np.nan
    coordinates[weights == 0] = np.inf
    given = regress(features, coordinates, weights=weights)
    np.testing.assert_array_equal(given.coefficients, expected.coefficients)
    assert given.held_out_r2 == expected.held_out_r2
    assert not given.held_out[7]
    assert given.held_out.sum() == 12


GOOD = problem()


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (
            lambda: regress(GOOD[0][:, 1:], GOOD[1]),
            ValueError,
            r"features must be \[B, T, F\].*got shapes \[60, 19, 8\] and \[60, 20\]",
        ),
        (
            lambda: regress(*GOOD, weights=np.ones(T)),
            ValueError,
            r"weights must be \[B, T\] = \[60, 20\].*got shape \[20\]",
        ),
        (
            lambda: regress(GOOD[0], GOOD[1] * np.nan),
            ValueError,
            "coordinates must be finite",
        ),
        (
            lambda: regress(*(part[:5] for part in GOOD)),
            ValueError,
            "held_out must leave out at least 2 .*5 sequences, got 0.2",
        ),
        (
            lambda: regress(*GOOD, held_out=1.0),
            ValueError,
            "keep at least folds = 5 of the 60 sequences, got 1",
        ),
        (
            lambda: regress(*GOOD, penalties=(0.0,)),
            ValueError,
            "penalties must be finite and above 0, got 0",
        ),
        (lambda: regress(*GOOD, penalties=()), ValueError, "penalties is"),
        (
            lambda: regress(GOOD[0], np.ones((B, T))),
            ValueError,
            "coordinates do not vary",
        ),
        (lambda: jp.regress_coordinates(0, *GOOD), TypeError, "key must be a typed key"),
    ],
)  # fmt: skip
def test_bad_input_is_named(act, error, message):
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            act()
    finally:
        config.update("jaxtyping_disable", False)
