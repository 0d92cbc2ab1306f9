"""Inversion against NumPy and SciPy oracles, its derivatives, and what it says of bad targets."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from oracles import inversion as oracle

from jaxpattern.inversion import (
    UnreachableTargetWarning,
    WeightsWarning,
    box,
    entropic,
    least_norm,
    predict,
    ridge,
    solve_weights,
    truncated,
)
from jaxpattern.response.result import Response, group_mean

NBETA = 30.0
SHAPES = {"code": (5, 3), "prose": (9,)}
NUM_COLUMNS = 24


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make_response(
    num_rows=3, *, seed=0, chi=None, stderr=0.02, mass=None, shapes=None, dtype=None, halves=False
):
    """A response of the given χ `[K, N]` (random without), its columns cut into probe sets."""
    shapes = SHAPES if shapes is None else shapes
    rng = np.random.default_rng(seed)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    chi = rng.normal(size=(num_rows, count)) if chi is None else chi
    num_rows = len(chi)
    mass = rng.uniform(0.5, 1.5, size=count) if mass is None else np.asarray(mass)
    mass = mass / mass.sum()
    noise = 0.2 * rng.normal(size=(num_rows, count))
    batches = 0.1 * rng.normal(size=(6, num_rows))
    stderr = np.broadcast_to(stderr, chi.shape)
    dtype = jnp.result_type(float) if dtype is None else dtype

    def cut(values, leading):
        pieces, start = {}, 0
        for name, shape in shapes.items():
            stop = start + int(np.prod(shape))
            piece = values[..., start:stop].reshape(*values.shape[:leading], *shape)
            pieces[name], start = jax.device_put(piece.astype(dtype)), stop
        return pieces

    names = list(shapes)
    return Response(
        chi=cut(np.asarray(chi), 1),
        stderr=cut(stderr, 1),
        halves=cut(np.stack([chi + noise, chi - noise]), 2) if halves else {},
        batches={
            name: jax.device_put((batches + 0.1 * i).astype(dtype)) for i, name in enumerate(names)
        },
        mass=cut(mass, 0),
        nbeta=jnp.asarray(NBETA, dtype),
        mean=jnp.zeros(num_rows, dtype),
        mean_stderr=jnp.zeros(num_rows, dtype),
        rhat=jnp.ones(num_rows, dtype),
        ess=jnp.ones(num_rows, dtype),
        diverged=jnp.zeros((num_rows, 2), bool),
        diagnostics={},
        rows=tuple(f"row{k}" for k in range(num_rows)),
        cost=1.0,
        num_samples=count,
    )


def flat(pieces, leading=0):
    """All probe sets side by side, in float64."""
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(*x.shape[:leading], -1) for x in pieces.values()], -1
    )


def numpy_problem(response):
    """A = nβ χ, rows less their mean, and q in float64."""
    mass = flat(response.mass)
    return centered(float(response.nbeta) * flat(response.chi, 1), mass), mass


def centered(matrix, mass):
    """A − A q: a self-normalized loss knows no common factor of the weights."""
    return matrix - (matrix @ mass)[..., None]


def mean_weight(response, result):
    return flat(response.mass) @ flat(result.weights)


def to_target(shift):
    return {f"row{k}": value for k, value in enumerate(shift)}


def solve_quietly(*args, **kwargs):
    """The intervention, whether or not it reaches its target and stays near 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreachableTargetWarning)
        warnings.simplefilter("ignore", WeightsWarning)
        return solve_weights(*args, **kwargs)


ALL_METHODS = {
    "least_norm": least_norm(),
    "truncated": truncated(threshold=1.0),
    "ridge": ridge(),
    "box": box(lower=0.3, upper=3.0),
    "entropic": entropic(),
}
every_method = pytest.mark.parametrize("method", ALL_METHODS.values(), ids=ALL_METHODS)

SHIFT = np.array([2.0, -1.5, 1.0])


# --- the solutions -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 3, 30])
def test_least_norm_is_the_pseudo_inverse(x64, num_rows):
    response = make_response(num_rows)
    shift = np.random.default_rng(1).normal(size=num_rows)
    matrix, mass = numpy_problem(response)
    change = np.linalg.pinv(matrix * np.sqrt(mass)) @ shift / np.sqrt(mass)
    result = solve_quietly(response, to_target(shift), method=least_norm())
    np.testing.assert_allclose(flat(result.weights), 1 + change, rtol=1e-8, atol=1e-8)
    assert bool(result.converged)


def test_least_norm_of_dependent_rows_is_the_pseudo_inverse(x64):
    rng = np.random.default_rng(2)
    chi = rng.normal(size=(5, 2)) @ rng.normal(size=(2, NUM_COLUMNS))
    response = make_response(chi=chi)
    matrix, mass = numpy_problem(response)
    shift = rng.normal(size=5)
    change = np.linalg.pinv(matrix * np.sqrt(mass), rcond=1e-9) @ shift / np.sqrt(mass)
    result = solve_quietly(response, to_target(shift), method=least_norm())
    np.testing.assert_allclose(flat(result.weights) - 1, change, atol=1e-10)


def test_least_norm_keeps_rows_of_small_units_in_float32():
    response = make_response(dtype=jnp.float32)
    units = np.array([1.0, 1e-4, 1e3])
    rescaled = replace(
        response,
        chi={
            name: jnp.asarray(x * units.reshape(-1, *[1] * (x.ndim - 1)), jnp.float32)
            for name, x in response.chi.items()
        },
    )
    plain = solve_weights(response, to_target(SHIFT), method=least_norm())
    other = solve_weights(rescaled, to_target(SHIFT * units), method=least_norm())
    np.testing.assert_allclose(flat(other.weights), flat(plain.weights), atol=1e-5)


def test_truncated_at_rank_keeps_the_leading_directions(x64):
    response = make_response(5)
    matrix, mass = numpy_problem(response)
    shift = np.random.default_rng(3).normal(size=5)
    left, values, right = np.linalg.svd(matrix * np.sqrt(mass), full_matrices=False)
    change = (right[:2].T / values[:2]) @ (left[:, :2].T @ shift) / np.sqrt(mass)
    result = solve_quietly(response, to_target(shift), method=truncated(rank=2))
    np.testing.assert_allclose(flat(result.weights) - 1, change, atol=1e-11)


def test_truncated_at_the_noise_keeps_what_exceeds_it(x64):
    response = make_response(4, stderr=np.array([[0.1], [0.2], [0.4], [0.3]]))
    matrix, mass = numpy_problem(response)
    noise = (NBETA**2 * flat(response.stderr, 1) ** 2) @ mass
    shift = np.random.default_rng(4).normal(size=4)
    white = matrix * np.sqrt(mass) / np.sqrt(noise)[:, None]
    left, values, right = np.linalg.svd(white, full_matrices=False)
    threshold = float(values[1] * values[2])
    assert 0 < np.sum(values**2 > threshold) < 4
    inverse = np.where(values**2 > threshold, 1 / values, 0.0)
    change = (right.T * inverse) @ (left.T @ (shift / np.sqrt(noise))) / np.sqrt(mass)
    result = solve_quietly(response, to_target(shift), method=truncated(threshold=threshold))
    np.testing.assert_allclose(flat(result.weights) - 1, change, atol=1e-11)


def test_ridge_solves_its_normal_equations(x64):
    response = make_response(4, stderr=0.3)
    matrix, mass = numpy_problem(response)
    shift = np.random.default_rng(5).normal(size=4)
    energy = matrix * mass @ matrix.T
    noise = np.diag((NBETA**2 * flat(response.stderr, 1) ** 2) @ mass)
    for method, penalty in [
        (ridge(tau=7.0), 7.0 * np.eye(4)),
        (ridge(), 0.1 * noise),
        (ridge(noise=1.0), noise),
        (ridge(tau=7.0, noise=2.0), 7.0 * np.eye(4) + 2 * noise),
    ]:
        change = matrix.T @ np.linalg.solve(energy + penalty, shift)
        result = solve_quietly(response, to_target(shift), method=method)
        np.testing.assert_allclose(flat(result.weights) - 1, change, atol=1e-12)


def test_a_ridge_at_the_noise_halves_a_direction_of_equal_signal_and_noise(x64):
    chi = np.ones((1, NUM_COLUMNS)) * np.where(np.arange(NUM_COLUMNS) % 2, 1.0, -1.0)
    response = make_response(chi=chi, stderr=1.0, mass=np.ones(NUM_COLUMNS))
    with pytest.warns(UnreachableTargetWarning, match=r"50\.0% of the target.*'row0' gets 1 of 2"):
        result = solve_weights(response, {"row0": 2.0}, method=ridge(noise=1.0))
    np.testing.assert_allclose(result.reached, 0.5, rtol=1e-12)
    np.testing.assert_allclose(result.residual["row0"], 1.0, rtol=1e-12)


@pytest.mark.parametrize(
    "method",
    [least_norm(), ridge(), truncated(threshold=1.0), box(lower=0.5, noise=1.0), entropic()],
    ids=["least_norm", "ridge", "truncated", "box", "entropic"],
)
def test_methods_do_not_depend_on_the_units_of_the_rows(x64, method):
    units = np.array([1.0, 40.0, 0.003])
    response = make_response(stderr=0.3)
    matrix = flat(response.chi, 1)
    rescaled = make_response(
        chi=units[:, None] * matrix,
        stderr=0.3 * units[:, None],
        mass=flat(response.mass),
    )
    plain = solve_quietly(response, to_target(SHIFT), method=method)
    other = solve_quietly(rescaled, to_target(SHIFT * units), method=method)
    np.testing.assert_allclose(flat(other.weights), flat(plain.weights), atol=1e-8)
    np.testing.assert_allclose(other.reached, plain.reached, atol=1e-8)


@pytest.mark.parametrize("tau", [0.5, 30.0, 3000.0])
@pytest.mark.parametrize("bounds", [(0.0, np.inf), (0.8, 1.1), (-0.5, 3.0)])
def test_box_is_the_bounded_least_squares_solution(x64, tau, bounds):
    response = make_response()
    matrix, mass = numpy_problem(response)
    shift = 8 * SHIFT
    lower, upper = bounds
    nearest = scipy.optimize.lsq_linear(
        np.concatenate([np.diag(np.sqrt(mass)), matrix * mass / np.sqrt(tau), 1e7 * mass[None]]),
        np.concatenate([np.zeros(NUM_COLUMNS), shift / np.sqrt(tau), [0.0]]),
        bounds=(lower - 1, upper - 1),
        method="bvls",
        tol=1e-14,
    )
    method = box(lower=lower, upper=upper, tau=tau)
    result = solve_quietly(response, to_target(shift), method=method)
    # The oracle's own row for the mean leaves 1e-9 of it.
    np.testing.assert_allclose(flat(result.weights) - 1, nearest.x, atol=2e-8)
    assert bool(result.converged)


def test_box_of_a_target_in_reach_is_the_bounded_least_norm(x64):
    response = make_response()
    matrix, mass = numpy_problem(response)
    rows, wanted = np.concatenate([matrix, np.ones((1, NUM_COLUMNS))]), np.append(5 * SHIFT, 0.0)
    expected = 1 + oracle.box_minimum_norm(rows, wanted, mass, -0.7, 1.5)
    method = box(lower=0.3, upper=2.5, noise=0.0)
    result = solve_quietly(response, to_target(5 * SHIFT), method=method)
    assert np.sum(expected < 0.3 + 1e-9) > 1
    np.testing.assert_allclose(flat(result.weights), expected, atol=1e-7)


def test_box_without_active_bounds_is_least_norm(x64):
    response = make_response()
    plain = solve_weights(response, to_target(SHIFT / 10), method=least_norm())
    boxed = solve_weights(response, to_target(SHIFT / 10), method=box(noise=0.0))
    np.testing.assert_allclose(flat(boxed.weights), flat(plain.weights), atol=1e-9)


def test_entropic_is_the_least_divergence(x64):
    response = make_response()
    matrix, mass = numpy_problem(response)
    shift = 3 * SHIFT
    expected = oracle.entropic(matrix, shift, mass)
    result = solve_quietly(response, to_target(shift), method=entropic(noise=0.0))
    assert np.ptp(expected) > 0.5  # far from linear
    np.testing.assert_allclose(flat(result.weights), expected, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@given(
    seed=st.integers(0, 10**6),
    size=st.floats(0.01, 100.0),
    tau=st.floats(1.0, 1000.0),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_optimality_conditions_hold(dtype, seed, size, tau):
    with jax.enable_x64(True):
        response = make_response(seed=seed, dtype=dtype)
        matrix, mass = numpy_problem(response)
        shift = size * np.random.default_rng(seed).normal(size=3)
        results = {
            name: solve_quietly(response, to_target(shift), method=method)
            for name, method in {
                "box": box(lower=0.2, upper=2.0, tau=tau),
                "entropic": entropic(tau=tau),
            }.items()
        }
    # ρ comes from ν, and ν from what ρ leaves of the shift: together, the unique optimum.
    for name, result in results.items():
        weights = flat(result.weights)
        nu = np.array([float(result.dual[row]) for row in response.rows])
        field = nu @ matrix
        if name == "box":
            # c of mean 1: the mean of the clipped weights falls in it.
            offset = scipy.optimize.brentq(
                lambda c, u=field: mass @ np.clip(u - c, -0.8, 1.0), field.min(), field.max(),
                xtol=1e-13,
            )  # fmt: skip
            expected = np.clip(1 + field - offset, 0.2, 2.0)
        else:
            expected = np.exp(field - field.max())
            expected /= mass @ expected
        left = shift - matrix @ (mass * (weights - 1))
        eps = float(jnp.finfo(dtype).eps)
        spread = 1 + np.abs(field).max()
        np.testing.assert_allclose(weights, expected, atol=100 * eps * spread * weights.max())
        bound = np.sqrt(eps) * (np.abs(shift).max() + NBETA * 3 * weights.max())
        np.testing.assert_allclose(tau * nu, left, atol=bound)
        assert bool(result.converged)


# --- targets out of reach ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "method",
    [box(), box(lower=0.9, upper=1.1), entropic()],
    ids=["box", "narrow_box", "entropic"],
)
@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.filterwarnings("ignore::jaxpattern.inversion.WeightsWarning")
def test_a_target_out_of_reach_is_approached(dtype, method, size):
    with jax.enable_x64(True):
        # Positive columns: with weights that sum to 1, or are bounded, a row moves only so far.
        chi = np.abs(np.random.default_rng(0).normal(size=(3, NUM_COLUMNS)))
        response = make_response(chi=chi, dtype=dtype)
        with pytest.warns(UnreachableTargetWarning, match="'row0' gets"):
            result = solve_weights(response, to_target([-size, size, 0.0]), method=method)
    unknown = ("half_cosine", "predicted_stderr", "cross_fitted_shift", "cross_fitted_stderr")
    known = {name: value for name, value in vars(result).items() if name not in unknown}
    for leaf in jax.tree.leaves(known):
        if hasattr(leaf, "dtype"):
            assert np.all(np.isfinite(leaf))
    assert float(result.reached) < 1
    assert bool(result.converged) or (method, size) == (entropic(), 1e4)
    np.testing.assert_allclose(mean_weight(response, result), 1.0, rtol=1e-5)


def test_an_unreachable_box_is_as_near_as_can_be(x64):
    chi = np.abs(np.random.default_rng(0).normal(size=(3, NUM_COLUMNS)))
    response = make_response(chi=chi)
    matrix, mass = numpy_problem(response)
    shift = np.array([-40.0, 40.0, 10.0])
    unit = np.sqrt((matrix**2) @ mass)
    nearest = scipy.optimize.lsq_linear(
        np.concatenate([matrix * mass / unit[:, None], 1e7 * mass[None]]),
        np.append(shift / unit, 0.0), bounds=(-0.5, 0.5), method="bvls",
    )  # fmt: skip
    result = solve_quietly(response, to_target(shift), method=box(lower=0.5, upper=1.5))
    got = np.array([float(result.predicted_shift[row]) for row in response.rows])
    np.testing.assert_allclose(got, matrix @ (mass * nearest.x), rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [least_norm(), ridge(tau=0.0), truncated(rank=2), box(), entropic()],
    ids=["least_norm", "ridge", "truncated", "box", "entropic"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_rows_that_contradict_each_other_meet_in_the_middle(method, dtype):
    with jax.enable_x64(True):
        chi = np.random.default_rng(0).normal(size=(3, NUM_COLUMNS))
        chi[1] = chi[0]
        response = make_response(chi=chi, dtype=dtype)
        with pytest.warns(UnreachableTargetWarning):
            result = solve_weights(response, to_target([3.0, 1.0, 0.0]), method=method)
    for name in ("row0", "row1"):
        np.testing.assert_allclose(result.predicted_shift[name], 2.0, rtol=0.01)
    np.testing.assert_allclose(result.reached, 0.8, rtol=0.01)  # (2·3 + 2·1) / (9 + 1)


def test_a_row_that_nothing_moves_is_reported(x64):
    chi = np.random.default_rng(0).normal(size=(3, NUM_COLUMNS))
    chi[1] = 0.0
    response = make_response(chi=chi)
    for method in (least_norm(), ridge(), box(), entropic()):
        with pytest.warns(UnreachableTargetWarning, match="'row1' gets 0 of 1"):
            result = solve_weights(response, to_target(np.ones(3)), method=method)
        assert np.all(np.isfinite(flat(result.weights)))
        assert float(result.reached) < 0.01


def test_a_reached_target_does_not_warn(x64):
    for method in (least_norm(), box(noise=0.0), entropic(noise=0.0), ridge(tau=1e-6)):
        result = solve_weights(make_response(), to_target(SHIFT), method=method)
        np.testing.assert_allclose(result.reached, 1.0, rtol=1e-6)


def test_nothing_wanted_changes_nothing(x64):
    for method in ALL_METHODS.values():
        result = solve_weights(make_response(), to_target(np.zeros(3)), method=method)
        np.testing.assert_allclose(flat(result.weights), 1.0, atol=1e-14)
        assert float(result.reached) == 1.0


# --- what is reported ----------------------------------------------------------------------------


@every_method
def test_diagnostics_follow_from_the_weights(x64, method):
    response = make_response(halves=True)
    matrix, mass = numpy_problem(response)
    result = solve_quietly(response, to_target(8 * SHIFT), method=method, scale=1.7)
    weights = flat(result.weights)
    shift = matrix @ (mass * (weights - 1))
    for k, row in enumerate(response.rows):
        np.testing.assert_allclose(result.predicted_shift[row], shift[k], rtol=1e-9)
        np.testing.assert_allclose(
            result.residual[row], 1.7 * 8 * SHIFT[k] - shift[k], rtol=1e-7, atol=1e-9
        )
    ess = (mass @ weights) ** 2 / (mass @ weights**2) * NUM_COLUMNS
    np.testing.assert_allclose(result.effective_sample_size, ess, rtol=1e-10)
    np.testing.assert_allclose(result.negative_share, mass[weights < 0].sum(), atol=1e-12)
    np.testing.assert_allclose(result.max_weight, weights.max())
    np.testing.assert_allclose(result.min_weight, weights.min())
    energy = (matrix**2) @ mass
    wanted = 1.7 * 8 * SHIFT
    reached = np.sum(shift * wanted / energy) / np.sum(wanted**2 / energy)
    np.testing.assert_allclose(result.reached, reached, rtol=1e-9)
    halves = centered(flat(response.halves, 2), mass)
    spread = np.abs(NBETA * (halves[0] - halves[1]) @ (mass * (weights - 1))) / 2
    for k, row in enumerate(response.rows):
        np.testing.assert_allclose(result.predicted_stderr[row], spread[k], rtol=1e-9)
    assert {name: x.shape for name, x in result.weights.items()} == SHAPES


def test_scale_moves_along_a_fixed_direction(x64):
    response = make_response()
    once = solve_weights(response, to_target(SHIFT), method=box(lower=0.9, tau=1.0, noise=0.0))
    back = solve_weights(response, to_target(SHIFT), method=box(lower=0.9, tau=1.0), scale=-0.5)
    np.testing.assert_allclose(flat(back.weights) - 1, -0.5 * (flat(once.weights) - 1), atol=1e-14)
    np.testing.assert_allclose(back.reached, once.reached, rtol=1e-12)


def test_untargeted_rows_are_free_or_held(x64):
    response = make_response()
    free = solve_weights(response, {"row1": 2.0}, method=least_norm())
    held = solve_weights(response, {"row1": 2.0}, method=least_norm(), untargeted="hold")
    alone = make_response(chi=flat(response.chi, 1)[1:2], mass=flat(response.mass))
    single = solve_weights(alone, {"row0": 2.0}, method=least_norm())
    np.testing.assert_allclose(flat(free.weights), flat(single.weights), atol=1e-12)
    assert list(free.predicted_shift) == ["row0", "row1", "row2"]
    assert abs(float(free.predicted_shift["row0"])) > 0.05
    assert float(free.dual["row0"]) == 0.0
    for row in ("row0", "row2"):
        np.testing.assert_allclose(held.predicted_shift[row], 0.0, atol=1e-12)
    assert list(held.residual) == ["row1"]


def test_half_cosine_compares_the_solutions_of_the_halves(x64):
    response = make_response(halves=True)
    mass = flat(response.mass)
    result = solve_weights(response, to_target(SHIFT), method=least_norm())
    changes = [
        np.linalg.pinv(NBETA * half * np.sqrt(mass)) @ SHIFT
        for half in centered(flat(response.halves, 2), mass)
    ]
    cosine = changes[0] @ changes[1] / np.linalg.norm(changes[0]) / np.linalg.norm(changes[1])
    assert cosine < 0.99
    np.testing.assert_allclose(result.half_cosine, cosine, rtol=1e-10)


def test_without_halves_there_is_no_error_bar(x64):
    result = solve_weights(make_response(), to_target(SHIFT), method=least_norm())
    assert np.isnan(float(result.half_cosine))
    assert all(np.isnan(float(x)) for x in result.predicted_stderr.values())
    assert np.all(np.isfinite(flat(result.weights)))


def test_a_grouped_response_gives_one_weight_per_probe_set(x64):
    response = group_mean(make_response(1, halves=True))
    own = jnp.asarray(np.random.default_rng(3).normal(size=(6, 1)))
    response = replace(response, batches=response.batches | {"prose": own})
    mass = np.array([float(response.mass[name]) for name in SHAPES])
    chi = np.array([float(response.chi[name][0]) for name in SHAPES])
    # One degree of freedom: q₁ s₁ + q₂ s₂ = 0.
    change = 0.1 / NBETA / (chi[0] - chi[1]) / mass * [1, -1]
    result = solve_weights(response, {"row0": 0.1}, method=least_norm())
    assert {name: x.shape for name, x in result.weights.items()} == {"code": (), "prose": ()}
    np.testing.assert_allclose([float(x) for x in result.weights.values()], 1 + change)
    # A diverged chain leaves NaN in its batches: they do not count.
    response = replace(
        response, batches={name: x.at[2, 0].set(jnp.nan) for name, x in response.batches.items()}
    )
    result = solve_weights(response, {"row0": 0.1}, method=least_norm())
    batches = np.stack([np.asarray(response.batches[name]) for name in SHAPES], axis=-1)
    shifts = NBETA * batches @ (mass * change)
    expected = np.nanstd(shifts, axis=0, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(result.predicted_stderr["row0"], expected[0], rtol=1e-9)


def test_the_covariance_of_columns_is_in_the_error_of_a_grouped_prediction(x64):
    """Two groups of equal mass that fluctuate together: what is moved between them is exact."""
    response = group_mean(make_response(1, shapes={"a": (4,), "b": (4,)}, halves=True))
    draws = jnp.asarray(np.random.default_rng(0).normal(size=(6, 1)))
    response = replace(
        response,
        mass={name: jnp.asarray(0.5) for name in "ab"},
        batches={"a": draws, "b": draws + 1.0},
    )

    def swap(matrix, mass, shift, noise):
        return least_norm()(matrix, mass, shift, noise)._replace(
            change=jnp.asarray([0.5, -0.5], matrix.dtype)
        )

    result = solve_quietly(response, {"row0": 1.0}, method=swap)
    np.testing.assert_allclose(result.predicted_stderr["row0"], 0.0, atol=1e-12)


# --- transformations -----------------------------------------------------------------------------


def weights_of(method, response, chi, shift):
    """All weights as one vector, a function of χ `[K, N]` and the target."""
    pieces, start = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        pieces[name] = chi[:, start : start + size].reshape(-1, *shape)
        start += size
    result = solve_quietly(replace(response, chi=pieces), to_target(shift), method=method)
    return jnp.concatenate([w.reshape(-1) for w in result.weights.values()])


def check_derivatives(function, args, seed=0, step=1e-6, rtol=1e-6):
    """Forward and reverse mode against a central difference, along a random direction."""
    rng = np.random.default_rng(seed)
    direction = tuple(jnp.asarray(rng.normal(size=np.shape(x))) for x in args)
    cotangent = jnp.asarray(rng.normal(size=jax.eval_shape(function, *args).shape))

    @jax.jit
    def both_modes(args, direction):
        _, forward = jax.jvp(function, args, direction)
        return forward, jax.vjp(function, *args)[1](cotangent)

    forward, pulled = both_modes(args, direction)
    high, low = (
        function(*(x + sign * step * d for x, d in zip(args, direction, strict=True)))
        for sign in (1, -1)
    )
    difference = np.asarray((high - low) / (2 * step))
    size = np.abs(difference).max()
    assert size > 1e-3
    np.testing.assert_allclose(forward, difference, atol=rtol * size)
    backward = sum(jnp.sum(g * d) for g, d in zip(pulled, direction, strict=True))
    np.testing.assert_allclose(
        backward, cotangent @ forward, atol=1e-9 * size * np.abs(cotangent).sum()
    )


@every_method
def test_derivatives_by_chi_and_target(x64, method):
    response = make_response(3, stderr=0.6)
    chi, shift = jnp.asarray(flat(response.chi, 1)), jnp.asarray(8 * SHIFT)
    check_derivatives(lambda c, s: weights_of(method, response, c, s), (chi, shift))


def test_derivatives_by_the_settings_of_a_method(x64):
    response = make_response()
    shift = 8 * SHIFT
    chi = jnp.asarray(flat(response.chi, 1))

    def solve(tau, lower):
        return weights_of(box(lower=lower, tau=tau), response, chi, shift)

    check_derivatives(solve, (jnp.asarray(5.0), jnp.asarray(0.7)))


def test_least_norm_derivative_at_rank_deficient_chi(x64):
    """Along χ = L R with L, R of full rank 2, the rank stays 2: the Golub–Pereyra derivative."""
    response = make_response(4)
    rng = np.random.default_rng(6)
    left, right = jnp.asarray(rng.normal(size=(4, 2))), jnp.asarray(rng.normal(size=(2, 24)))
    shift = jnp.asarray(rng.normal(size=4))
    check_derivatives(
        lambda a, b, s: weights_of(least_norm(), response, a @ b, s), (left, right, shift)
    )


def test_least_norm_derivative_with_more_rows_than_columns(x64):
    response = make_response(30)
    chi = jnp.asarray(flat(response.chi, 1))
    shift = jnp.asarray(np.random.default_rng(7).normal(size=30))
    check_derivatives(
        lambda c, s: weights_of(least_norm(), response, c, s), (chi, shift), step=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("method", [least_norm(), truncated(rank=2)], ids=["all", "two"])
def test_derivatives_at_repeated_singular_values(x64, method):
    response = make_response(4, mass=np.ones(NUM_COLUMNS))
    random = np.random.default_rng(8).normal(size=(NUM_COLUMNS, 4))
    rows, _ = np.linalg.qr(np.concatenate([np.ones((NUM_COLUMNS, 1)), random], axis=1))
    chi = jnp.asarray(np.array([3.0, 3.0, 1.0, 1.0])[:, None] * rows[:, 1:].T)
    shift = jnp.asarray([1.0, 2.0, -1.0, 0.5])
    check_derivatives(lambda c, s: weights_of(method, response, c, s), (chi, shift))


def test_loss_of_a_target_can_be_descended_under_grad(x64):
    """The gradient reaches through every diagnostic without a NaN."""
    response = make_response(halves=True)

    def total(shift):
        result = solve_weights(response, to_target(shift), method=entropic())
        return result.effective_sample_size + result.reached + result.predicted_stderr["row0"]

    gradient = jax.grad(total)(jnp.asarray(SHIFT))
    step = 1e-5
    for k in range(3):
        shift = np.array([SHIFT, SHIFT])
        shift[:, k] += [step, -step]
        high, low = (float(total(s)) for s in shift)
        np.testing.assert_allclose(gradient[k], (high - low) / (2 * step), rtol=1e-5)


@every_method
def test_jit_and_vmap_give_the_same(x64, method):
    response = make_response()
    shifts = jnp.stack([jnp.asarray(SHIFT), jnp.asarray(-9 * SHIFT)])

    @jax.jit
    @jax.vmap
    def solve(shift):
        return solve_weights(response, to_target(shift), method=method)

    mapped = solve(shifts)
    for i, shift in enumerate(shifts):
        one = solve_quietly(response, to_target(shift), method=method)
        for got, expected in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(got[i], expected, atol=1e-9)


def test_responses_and_settings_can_be_vmapped(x64):
    responses = [make_response(seed=seed) for seed in (0, 1)]
    leaves = [jax.tree.leaves(response) for response in responses]
    structure = jax.tree.structure(responses[0])
    taus = jnp.asarray([1.0, 50.0])

    def solve(leaves, tau):
        response = jax.tree.unflatten(structure, leaves)
        return solve_weights(response, to_target(SHIFT), method=ridge(tau=tau))

    mapped = jax.vmap(solve)([jnp.stack(pair) for pair in zip(*leaves, strict=True)], taus)
    for i, response in enumerate(responses):
        one = solve_quietly(response, to_target(SHIFT), method=ridge(tau=float(taus[i])))
        np.testing.assert_allclose(mapped.weights["code"][i], one.weights["code"], atol=1e-12)


def test_settings_do_not_compile_again():
    for one, other in [
        (ridge(tau=0.1), ridge()),
        (truncated(rank=1), truncated(rank=2)),
        (box(upper=2.0, tau=1.0), box(lower=0.5)),
        (entropic(noise=1.0), entropic()),
    ]:
        assert jax.tree.structure(one) == jax.tree.structure(other)


def test_a_method_of_ones_own(x64):
    def steepest(matrix, mass, shift, noise, *, length):
        """Along Aᵀdμ, without solving anything."""
        solution = least_norm()(matrix, mass, shift, noise)
        return solution._replace(change=length * shift @ matrix)

    response = make_response()
    result = solve_quietly(response, to_target(SHIFT), method=Partial(steepest, length=0.01))
    expected = 1 + 0.01 * SHIFT @ numpy_problem(response)[0]
    np.testing.assert_allclose(flat(result.weights), expected)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: solve_weights(r, {"nope": 1.0}), ValueError, r"\['nope'\].*'row0', 'row1'"),
        (lambda r: solve_weights(r, {}), ValueError, "target is empty"),
        (lambda r: solve_weights(r, [1.0]), TypeError, "target"),
        (lambda r: solve_weights(r, {"row0": np.nan}), ValueError, r"target\['row0'\].*finite"),
        (lambda r: solve_weights(r, {"row0": "up"}), TypeError, "target"),
        (lambda r: solve_weights(r, {"row0": np.ones(2)}), TypeError, "target"),
        (lambda r: solve_weights(r, {"row0": 1.0}, scale=0.0), ValueError, "scale must not be 0"),
        (lambda r: solve_weights(r, {"row0": 1.0}, scale=np.inf), ValueError, "scale.*finite"),
        (
            lambda r: solve_weights(r, {"row0": 1.0}, method=truncated(rank=2)),
            ValueError,
            "rank must be at most 1.*got 2",
        ),
        (
            lambda r: solve_weights(r, {"row0": 1.0}, method=truncated(rank=4), untargeted="hold"),
            ValueError,
            "rank must be at most 3.*got 4",
        ),
        (lambda r: truncated(rank=0), ValueError, "rank must be at least 1, got 0"),
        (lambda r: truncated(rank=1.5), TypeError, "rank"),
        (lambda r: truncated(threshold=-1.0), ValueError, "threshold.*at least 0"),
        (lambda r: ridge(tau=-1.0), ValueError, "tau must be finite and at least 0, got -1"),
        (lambda r: box(tau=-1.0), ValueError, "tau must be"),
        (lambda r: entropic(noise=-1.0), ValueError, "noise must be"),
        (lambda r: box(lower=1.0, upper=1.0), ValueError, "lower must be below upper"),
        (lambda r: box(lower=1.2, upper=2.0), ValueError, "lower must be at most 1"),
        (lambda r: box(upper=0.9), ValueError, "upper must be at least 1"),
        (lambda r: box(lower=np.nan), ValueError, "lower must be below upper"),
        (
            lambda r: solve_weights(
                replace(r, chi={**r.chi, "prose": r.chi["prose"].at[0, 0].set(jnp.nan)}),
                {"row0": 1.0},
            ),
            ValueError,
            r"chi\['prose'\] must be finite",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    response = make_response()
    with pytest.raises(error, match=message):
        call(response)


def test_untargeted_and_method_are_checked_even_without_a_type_checker():
    response = make_response()
    with pytest.raises(Exception, match="untargeted"):
        solve_weights(response, {"row0": 1.0}, untargeted="fixed")
    with pytest.raises(Exception, match="method"):
        solve_weights(response, {"row0": 1.0}, method="ridge")


@pytest.mark.parametrize(
    "method",
    [ridge(), truncated(), box(noise=1.0), entropic(noise=0.5)],
    ids=["ridge", "truncated", "box", "entropic"],
)
def test_a_method_of_the_noise_needs_noise(method):
    with pytest.raises(ValueError, match=r"response\.stderr must not be all zero"):
        solve_weights(make_response(stderr=0.0), {"row0": 1.0}, method=method)
    with pytest.raises(ValueError, match=r"response\.stderr\['code'\] must be finite"):
        solve_weights(make_response(stderr=np.nan), {"row0": 1.0}, method=method)


@pytest.mark.parametrize("stderr", [0.0, np.nan])
def test_other_methods_do_without_noise(x64, stderr):
    for method in (ridge(tau=0.1), truncated(rank=3), least_norm(), box(), entropic()):
        result = solve_weights(make_response(stderr=stderr), to_target(SHIFT), method=method)
        np.testing.assert_allclose(result.predicted_shift["row0"], SHIFT[0], rtol=0.01)


# -- what a response predicts of any weights -----------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_predictions_of_solved_weights_are_the_solutions(grouped):
    response = make_response(halves=True, dtype=jnp.float32)
    response = group_mean(response) if grouped else response
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solve_weights(response, {response.rows[0]: 0.01}, method=least_norm())
    found = predict(response, solution.weights)
    for row in response.rows:
        np.testing.assert_allclose(
            found[row].value, solution.predicted_shift[row], rtol=1e-4, atol=1e-7
        )
        np.testing.assert_allclose(
            found[row].stderr, solution.predicted_stderr[row], rtol=1e-4, atol=1e-7
        )


def test_predictions_of_any_weights():
    """dμ = nβ Σ_j χ_j q_j (ρ_j / Σ q ρ − 1) in float64, with a number for a whole probe set."""
    response = make_response(dtype=jnp.float32)
    weights = {"code": 3.0, "prose": np.linspace(0.1, 2.0, 9)}
    flat = np.concatenate([np.full(15, 3.0), weights["prose"]])
    mass, chi = (
        np.concatenate([np.asarray(x[n], np.float64).reshape(*lead, -1) for n in SHAPES], -1)
        for x, lead in ((response.mass, ()), (response.chi, (3,)))
    )
    wanted = NBETA * chi @ (mass * (flat / (mass @ flat) - 1))
    found = predict(response, weights)
    got = [float(found[row].value) for row in response.rows]
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    # Twice the weights are the same weights.
    doubled = predict(response, {name: 2 * np.asarray(x) for name, x in weights.items()})
    np.testing.assert_allclose(
        [float(doubled[row].value) for row in response.rows], got, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"code": 1.0}, "must name exactly"), ({"code": np.ones(4), "prose": 1.0}, "have the shape")],
)
def test_predictions_of_weights_that_do_not_fit(weights, message):
    with pytest.raises(ValueError, match=message):
        predict(make_response(dtype=jnp.float32), weights)
