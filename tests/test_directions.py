"""Principal directions against a singular value decomposition in float64, and against noise."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config

import jaxpattern as jp

ROWS = ("l0h0", "l0h1", "l1h0", "l1h1", "l0.mlp")
SHAPES = {"code": (60, 16), "prose": (40, 24)}
K, N = len(ROWS), 60 * 16 + 40 * 24
SPLIT = 60 * 16


def response_of(signal, noise=0.0, seed=1, mass=None, rows=ROWS):
    """χ = signal + noise of the mean of two halves, in the shapes of two probe sets."""
    rng = np.random.default_rng(seed)
    halves = signal[None] + np.sqrt(2) * noise * rng.normal(size=(2, *signal.shape))
    mass = np.full(signal.shape[1], 1 / signal.shape[1]) if mass is None else mass

    def pieces(values):
        parts = (values[..., :SPLIT], values[..., SPLIT:])
        return {
            name: jnp.asarray(part.reshape(*part.shape[:-1], *shape), jnp.float32)
            for part, (name, shape) in zip(parts, SHAPES.items(), strict=True)
        }

    k = len(rows)
    return jp.Response(
        chi=pieces(halves.mean(0)), halves=pieces(halves), mass=pieces(mass),
        stderr=pieces(np.full(signal.shape, noise)),
        batches={name: jnp.zeros((2, k)) for name in SHAPES},
        nbeta=jnp.float32(30.0), mean=jnp.zeros(k), mean_stderr=jnp.zeros(k), rhat=jnp.ones(k),
        ess=jnp.ones(k), diverged=jnp.zeros((k, 2), bool), rows=rows, cost=1.0,
        num_samples=signal.shape[1],
    )  # fmt: skip


SCALES = (1e-5, 1e-4, 3e-4, 2e-5, 1e-4)


def planted(seed=0, sizes=(2.0, 1.0), scales=SCALES):
    """Low rank: two directions of samples, seen by rows of very different scale and offset."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(len(sizes), N))
    seen = rng.normal(size=(K, len(sizes))) * np.array(sizes)
    return np.array(scales)[:, None] * (seen @ samples + rng.normal(size=(K, 1)))


def rough(seed=0):
    """Two planted directions and some of everything else, so that all directions are distinct."""
    own = np.random.default_rng(seed + 7).normal(size=(K, N))
    return planted(seed) + (np.array(SCALES) * [0.1, 0.2, 0.3, 0.4, 0.5])[:, None] * own


def flat(parts):
    return np.concatenate([np.asarray(p).reshape(len(p), -1) for p in parts.values()], axis=1)


def numpy_directions(chi, mass):
    """(loadings, variances, coordinates) of the rows standardised over the samples."""
    centre = chi @ mass
    scale = np.sqrt((chi - centre[:, None]) ** 2 @ mass)
    a = (chi - centre[:, None]) / scale[:, None]
    u, s, _ = np.linalg.svd(a * np.sqrt(mass), full_matrices=False)
    for k in range(len(s)):
        large = np.flatnonzero(np.abs(u[:, k]) >= 0.9 * np.abs(u[:, k]).max())
        u[:, k] *= np.sign(u[large[0], k])
    return u.T, s**2, u.T @ a


@pytest.mark.parametrize("weighted", [False, True])
def test_matches_a_decomposition_in_float64(weighted):
    mass = np.full(N, 1 / N)
    if weighted:
        mass = np.random.default_rng(5).uniform(0, 1, N)
        mass[::7] = 0
        mass /= mass.sum()
    response = response_of(rough(), mass=mass)
    directions = jp.principal_directions(response)
    loadings, variance, coordinates = numpy_directions(np.float64(flat(response.chi)), mass)
    assert directions.rows == ROWS
    np.testing.assert_allclose(directions.variance, variance, rtol=2e-5)
    np.testing.assert_allclose(directions.explained, variance / K, rtol=2e-5)
    np.testing.assert_allclose(directions.loadings, loadings, atol=2e-5)
    np.testing.assert_allclose(flat(directions.coordinates), coordinates, atol=2e-4)
    assert {n: c.shape[1:] for n, c in directions.coordinates.items()} == SHAPES


def test_a_positive_factor_or_an_offset_of_a_row_changes_nothing():
    response = response_of(rough())
    one = jp.principal_directions(response)
    factor = jnp.array([1e-3, 7.0, 1.0, 100.0, 0.5])[:, None, None]
    offset = 10 * one.scale[:, None, None]
    moved = {n: factor * (x + offset) for n, x in response.chi.items()}
    two = jp.principal_directions(replace(response, chi=moved))
    np.testing.assert_allclose(two.loadings, one.loadings, atol=1e-4)
    np.testing.assert_allclose(two.coordinates["code"], one.coordinates["code"], atol=1e-3)


def test_the_sign_makes_the_first_of_the_largest_loadings_positive():
    response = response_of(rough())
    one = jp.principal_directions(response)
    size = np.abs(one.loadings)
    first = np.argmax(size >= 0.9 * size.max(1, keepdims=True), axis=1)
    assert (np.asarray(one.loadings)[range(K), first] > 0).all()
    # All rows reversed: the same directions, every coordinate reversed.
    other = jp.principal_directions(replace(response, chi={n: -x for n, x in response.chi.items()}))
    np.testing.assert_allclose(other.loadings, one.loadings, atol=1e-5)
    np.testing.assert_allclose(other.coordinates["prose"], -one.coordinates["prose"], atol=1e-4)
    # One row reversed: its loadings change sign, up to the sign of the direction.
    flip = jnp.array([1, 1, -1, 1, 1])
    other = jp.principal_directions(
        replace(response, chi={n: x * flip[:, None, None] for n, x in response.chi.items()})
    )
    turned = other.loadings * flip[None, :]
    side = jnp.sign(jnp.sum(turned * one.loadings, axis=1))
    np.testing.assert_allclose(turned * side[:, None], one.loadings, atol=1e-5)
    # Two rows always tie: their difference is positive in the first.
    two = jp.principal_directions(response, rows=("l0h0", "l1h1"))
    assert (np.asarray(two.loadings)[:, 0] > 0).all()


def test_padding_takes_no_part():
    response = response_of(rough())
    keep = {n: np.ones(shape) for n, shape in SHAPES.items()}
    keep["code"][:, 10:] = 0
    expected = jp.principal_directions(response, weights=keep)
    for garbage in (1e6, np.nan):
        padded = {n: jnp.where(keep[n][None] == 0, garbage, x) for n, x in response.chi.items()}
        halves = {
            n: jnp.where(keep[n][None, None] == 0, garbage, x) for n, x in response.halves.items()
        }
        given = jp.principal_directions(
            replace(response, chi=padded, stderr=padded, halves=halves), weights=keep
        )
        for name in ("loadings", "variance", "scale", "reliability", "half_cosine"):
            np.testing.assert_array_equal(getattr(given, name), getattr(expected, name))
        np.testing.assert_array_equal(
            given.coordinates["code"][..., :10], expected.coordinates["code"][..., :10]
        )
        assert np.isfinite(given.coordinates["code"]).all()
    # Columns of no weight that are finite are projected all the same.
    assert np.abs(expected.coordinates["code"][:, :, 10:]).max() > 0.5


def test_noise_is_told_from_signal():
    """Expected from noise variance n and variance V: (V − n) / (V + n) between the halves."""
    noise = 3e-4
    directions = jp.principal_directions(
        response_of(planted(scales=(1e-3,) * K, sizes=(1.5, 0.7)), noise=noise)
    )
    expected = (directions.variance - directions.noise_variance) / (
        directions.variance + directions.noise_variance
    )
    assert (np.asarray(expected[:2]) > 0.4).all()
    # Standard errors of a cosine are below 1/√N = .023; loadings differ by as much.
    np.testing.assert_allclose(directions.reliability[:2], expected[:2], atol=0.05)
    np.testing.assert_allclose(directions.half_cosine[:2], expected[:2], atol=0.08)
    # The planted rank is 2, so the rest is what the standard errors say.
    np.testing.assert_allclose(directions.noise_variance[2:], directions.variance[2:], rtol=0.15)
    assert (np.abs(directions.half_cosine[2:]) < 0.15).all()
    assert ((directions.noise_share > 0) & (directions.noise_share < 0.8)).all()


def test_noise_alone_does_not_repeat():
    cosines, reliable = [], []
    for seed in range(20):
        directions = jp.principal_directions(response_of(np.zeros((K, N)), noise=1e-3, seed=seed))
        np.testing.assert_allclose(directions.noise_variance, directions.variance, rtol=0.2)
        np.testing.assert_allclose(directions.noise_share, 1, rtol=0.1)
        cosines.append(directions.half_cosine)
        reliable.append(directions.reliability)
    # 100 cosines of standard deviation 1/√N: one beyond 4.5 of them in 1,500 runs.
    assert np.abs(cosines).max() < 4.5 / np.sqrt(N)
    assert abs(np.mean(cosines)) < 3.5 / np.sqrt(100 * N)
    assert np.abs(reliable).max() < 3 * np.sqrt(K / N)


def test_a_choice_of_rows_and_of_directions():
    response = response_of(rough())
    some = jp.principal_directions(response, 2, rows=("l1h1", "l0h0", "l0h1"))
    chi = np.float64(flat(response.chi))[[3, 0, 1]]
    loadings, variance, _ = numpy_directions(chi, np.full(N, 1 / N))
    assert some.rows == ("l1h1", "l0h0", "l0h1")
    np.testing.assert_allclose(some.loadings, loadings[:2], atol=2e-5)
    np.testing.assert_allclose(some.explained, variance[:2] / 3, rtol=2e-5)


def test_the_target_of_a_direction_is_solved_by_its_coordinates():
    signal = rough()
    response = response_of(signal - signal.mean(1, keepdims=True))
    directions = jp.principal_directions(response)
    solution = jp.solve_weights(response, directions.target(1, -0.1), method=jp.least_norm())
    unit = directions.coordinates["code"][1] / jnp.sqrt(directions.variance[1])
    np.testing.assert_allclose(solution.weights["code"], 1 - 0.1 * unit, atol=2e-3)


def test_compiled_and_stacked():
    responses = [response_of(rough(seed), noise=1e-5) for seed in range(2)]
    one = jax.jit(jp.principal_directions)(responses[0])
    expected = [jp.principal_directions(response) for response in responses]
    np.testing.assert_allclose(one.loadings, expected[0].loadings, atol=1e-5)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *responses)
    both = jax.jit(jax.vmap(jp.principal_directions))(stacked)
    for i in range(2):
        np.testing.assert_allclose(both.variance[i], expected[i].variance, rtol=1e-4)
        np.testing.assert_allclose(both.reliability[i], expected[i].reliability, atol=1e-3)


def test_directions_of_a_grouped_response_and_without_halves():
    response = response_of(rough())
    bare = jp.principal_directions(replace(response, halves={}))
    assert np.isnan(bare.reliability).all()
    assert np.isnan(bare.half_cosine).all()
    grouped = jp.principal_directions(jp.group_mean(response))
    assert grouped.loadings.shape == (2, K)
    assert grouped.coordinates["code"].shape == (2,)
    # Two columns differ in one way only.
    np.testing.assert_allclose(grouped.explained, [1, 0], atol=1e-5)


ONES = {n: np.ones(shape) for n, shape in SHAPES.items()}


def still(response):
    return replace(response, chi={n: x.at[2].set(0.25) for n, x in response.chi.items()})


def broken(response):
    return replace(response, chi={n: x.at[3, 0, 0].set(jnp.nan) for n, x in response.chi.items()})


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda r: jp.principal_directions(r, 6), ValueError, "num must be at most 5, .*got 6"),
        (lambda r: jp.principal_directions(r, 0), ValueError, "num must be at least 1, got 0"),
        (
            lambda r: jp.principal_directions(r, rows=("l0h0", "l9")),
            ValueError,
            r"rows must be some of \['l0h0'.*got \('l0h0', 'l9'\)",
        ),
        (lambda r: jp.principal_directions(r, rows=("l0h0",)), ValueError, "at least two rows"),
        (
            lambda r: jp.principal_directions(r, weights={"code": ONES["code"]}),
            ValueError,
            r"weights must name exactly \['code', 'prose'\], got \['code'\]",
        ),
        (
            lambda r: jp.principal_directions(r, weights=ONES | {"code": np.ones(60)}),
            ValueError,
            r"weights\['code'\] must have the shape of its losses, \[60, 16\], got \[60\]",
        ),
        (
            lambda r: jp.principal_directions(r, weights=ONES | {"code": -ONES["code"]}),
            ValueError,
            r"weights\['code'\] must be finite and not negative",
        ),
        (
            lambda r: jp.principal_directions(r, weights={n: 0 * x for n, x in ONES.items()}),
            ValueError,
            "weights are all zero",
        ),
        (lambda r: jp.principal_directions(still(r)), ValueError, r"rows \['l1h0'\] of χ do not"),
        (lambda r: jp.principal_directions(broken(r)), ValueError, r"finite in rows \['l1h1'\]"),
        (
            lambda r: jp.principal_directions(r).target(5),
            ValueError,
            "direction must be below 5, got 5",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(act, error, message):
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            act(response_of(rough()))
    finally:
        config.update("jaxtyping_disable", False)
