"""Weights as they are trained on: mean 1, excluded losses, composed rounds, exact re-solutions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian
from test_inversion import flat, make_response, numpy_problem, solve_quietly, to_target

import jaxpattern as jp

METHODS = {
    "default": None,
    "least_norm": jp.least_norm(),
    "truncated": jp.truncated(rank=1),
    "ridge": jp.ridge(),
    "box": jp.box(lower=0.3, upper=3.0),
    "entropic": jp.entropic(),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def mean_weight(response, solution):
    return flat(response.mass) @ flat(solution.weights)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("size", [0.1, 1e4])
def test_every_method_keeps_the_mean_of_a_mixture(method, groups, size):
    """As many targets as groups: one more than there are degrees of freedom."""
    shapes = {f"s{g}": (3, 2) for g in range(groups)}
    response = jp.group_mean(make_response(groups, shapes=shapes, seed=groups, dtype=jnp.float32))
    shift = size * np.random.default_rng(1).normal(size=groups)
    solution = solve_quietly(response, to_target(shift), method=method, scale=0.7)
    np.testing.assert_allclose(mean_weight(response, solution), 1.0, atol=2e-5 * size**0.5 + 1e-5)
    matrix, mass = numpy_problem(response)
    # What a loss divided by the mean weight does, which is what was predicted.
    got = [float(solution.predicted_shift[row]) for row in response.rows]
    expected = matrix @ (mass * flat(solution.weights)) / mean_weight(response, solution)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("method", [None, jp.least_norm()])
def test_two_groups_have_one_degree_of_freedom(method):
    response = jp.group_mean(make_response(2))
    with pytest.warns(jp.UnreachableTargetWarning, match="2 groups have 1 degree of freedom"):
        jp.solve_weights(response, {"row0": 0.2, "row1": 0.2}, method=method)
    one = jp.group_mean(make_response(1, shapes={"all": (4,)}))
    with pytest.warns(jp.UnreachableTargetWarning, match="1 groups have 0 degrees"):
        solution = jp.solve_weights(one, {"row0": 0.2})
    np.testing.assert_allclose(solution.weights["all"], 1.0, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::jaxpattern.inversion.UnreachableTargetWarning")
def test_large_and_negative_weights_are_said():
    response = jp.group_mean(make_response(1))
    target = {"row0": 60.0}
    with pytest.warns(jp.WeightsWarning, match=r"from -\S+ to \S+: \d+\.\d+% of the data have neg"):
        negative = jp.solve_weights(response, target, method=jp.ridge())
    assert negative.min_weight < 0
    with pytest.warns(jp.WeightsWarning, match="is no more than a direction"):
        solution = jp.solve_weights(response, target)
    assert min(float(w) for w in solution.weights.values()) >= 0


def test_a_mean_in_the_rows_is_no_degree_of_freedom(x64):
    """χ relative to another reference: the same weights, the same predictions."""
    response = make_response(3)
    moved = replace(response, chi={name: x + 5.0 for name, x in response.chi.items()})
    for method in METHODS.values():
        one, two = (solve_quietly(r, to_target([2.0, -1.0, 0.5]), method=method)
                    for r in (response, moved))  # fmt: skip
        np.testing.assert_allclose(flat(two.weights), flat(one.weights), atol=1e-7)
        np.testing.assert_allclose(two.predicted_shift["row1"], one.predicted_shift["row1"])


# --- predictions by draws that the weights were not fitted to ------------------------------------


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_cross_fitted_is_one_half_by_the_other(x64, scale):
    response = make_response(2, halves=True, stderr=0.3)
    mass = flat(response.mass)
    halves = 30.0 * flat(response.halves, 2)
    halves = halves - (halves @ mass)[..., None]
    noise = np.diag((30.0**2 * flat(response.stderr, 1) ** 2) @ mass)
    shift = np.array([2.0, -1.0])
    change = [scale * a.T @ np.linalg.solve(a * mass @ a.T + 0.1 * noise, shift) for a in halves]
    ways = np.stack([halves[1] @ (mass * change[0]), halves[0] @ (mass * change[1])])
    spread = np.abs((halves[0] - halves[1]) @ (mass * (change[0] + change[1]) / 2)) / 2
    solution = solve_quietly(response, to_target(shift), method=jp.ridge(), scale=scale)
    got = [float(solution.cross_fitted_shift[row]) for row in response.rows]
    np.testing.assert_allclose(got, ways.mean(0), rtol=1e-9)
    error = np.hypot((ways[0] - ways[1]) / 2, spread)
    got = [float(solution.cross_fitted_stderr[row]) for row in response.rows]
    np.testing.assert_allclose(got, error, rtol=1e-9)
    bare = solve_quietly(replace(response, halves={}), to_target(shift))
    assert all(np.isnan(float(x)) for x in bare.cross_fitted_shift.values())


def noisy(seed, level, size=200):
    """χ of a planted row, and its noisy measurement."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(1, size))
    truth -= truth.mean()
    halves = truth + np.sqrt(2) * level * rng.normal(size=(2, 1, size))
    response = make_response(chi=halves.mean(0), shapes={"a": (size,)}, mass=np.ones(size),
                             stderr=level)  # fmt: skip
    return truth, replace(response, halves={"a": jnp.asarray(halves)})


def test_cross_fitted_predictions_hold_where_plain_ones_do_not(x64):
    """Noise of the size of χ: the plain prediction is twice what is realized, this one is not."""
    plain, crossed, realized, covered = [], [], [], []
    for seed in range(40):
        truth, response = noisy(seed, 1.0)
        solution = solve_quietly(response, {"row0": 1.0}, method=jp.least_norm())
        real = float(30.0 * truth[0] @ (flat(solution.weights) - 1) / 200)
        shift = float(solution.cross_fitted_shift["row0"])
        error = float(solution.cross_fitted_stderr["row0"])
        plain.append(float(solution.predicted_shift["row0"]))
        crossed.append(shift)
        realized.append(real)
        covered.append(abs(shift - real) < 4 * error)
    # Realized G / (G + D) = ½; halves hold twice the noise, G / (G + 2D) = ⅓, a lower bound.
    np.testing.assert_allclose(np.mean(plain), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.mean(realized), 0.5, atol=0.03)
    np.testing.assert_allclose(np.mean(crossed), 1 / 3, atol=0.03)


def test_weights_fitted_to_noise_are_said(x64):
    _, response = noisy(0, 10.0)
    with pytest.warns(jp.UnreachableTargetWarning, match="they are fitted to noise"):
        jp.solve_weights(response, {"row0": 1.0}, method=jp.least_norm())


# --- excluded and weighted columns ----------------------------------------------------------------


def weighted(rho, garbage):
    """A response of the given masses, `garbage` where they are 0."""
    rho = np.asarray(rho, float)
    clean = make_response(3, mass=rho, halves=True, stderr=0.05)
    bad = {name: np.asarray(x) == 0 for name, x in clean.mass.items()}

    def spoil(parts):
        return {n: jnp.where(np.broadcast_to(bad[n], x.shape), garbage, x)
                for n, x in parts.items()}  # fmt: skip

    return replace(
        clean, chi=spoil(clean.chi), stderr=spoil(clean.stderr), halves=spoil(clean.halves)
    )


RHO = np.random.default_rng(0).uniform(0.5, 2.0, 24) * (np.arange(24) % 5 > 0)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_excluded_column_may_be_anything(x64, method):
    target = to_target([2.0, -1.0, 0.5])
    zero, nan = (solve_quietly(weighted(RHO, g), target, method=method) for g in (0.0, np.nan))
    for one, two in zip(jax.tree.leaves(zero), jax.tree.leaves(nan), strict=True):
        np.testing.assert_array_equal(one, two)
    used = RHO > 0
    assert np.all(flat(nan.weights)[~used] == 0)
    assert np.all(np.isfinite(flat(nan.weights)))
    assert nan.min_weight == flat(nan.weights)[used].min()
    np.testing.assert_allclose(mean_weight(weighted(RHO, 0.0), nan), 1.0, atol=1e-9)
    # The same as without those columns.
    full = make_response(3, mass=RHO, halves=True, stderr=0.05)
    less = make_response(chi=flat(full.chi, 1)[:, used], shapes={"a": (int(used.sum()),)},
                         mass=RHO[used], stderr=0.05)  # fmt: skip
    only = solve_quietly(less, target, method=jp.ridge() if method is None else method)
    np.testing.assert_allclose(flat(nan.weights)[used], flat(only.weights), atol=1e-7)


def test_group_means_are_of_the_weighted_data(x64):
    response = weighted(RHO, np.nan)
    grouped = jp.group_mean(response)
    chi, mass = flat(weighted(RHO, 0.0).chi, 1), RHO / RHO.sum()
    for name, part in (("code", slice(0, 15)), ("prose", slice(15, 24))):
        q = mass[part]
        np.testing.assert_allclose(grouped.chi[name], chi[:, part] @ q / q.sum(), rtol=1e-9)
        np.testing.assert_allclose(grouped.mass[name], q.sum(), rtol=1e-12)
    assert grouped.columns.grouped
    assert grouped.columns.loss_shapes == ((5, 3), (9,))
    assert jp.group_mean(grouped).loss_shapes == grouped.loss_shapes


def test_a_whole_probe_set_may_be_excluded(x64):
    rho = RHO * (np.arange(24) < 15)
    grouped = jp.group_mean(weighted(rho, np.nan))
    assert float(grouped.mass["prose"]) == 0
    solution = solve_quietly(grouped, {"row0": 0.1})
    np.testing.assert_allclose(solution.weights["code"], 1.0)
    assert float(solution.weights["prose"]) == 0


# --- exact re-solutions ---------------------------------------------------------------------------

CENTER, SETTING = np.zeros(3), {"nbeta": 3.0, "localization": 2.0}


def quadratics(seed=0, count=12):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(count, 3, 3))
    hessians = root @ root.transpose(0, 2, 1) / 3
    return gaussian.quadratics(hessians, rng.normal(size=(count, 3)))


def exact_response(losses, observables, rho, shapes):
    """The response as it is measured under base weights ρ₀: masses in proportion to them."""
    chi = gaussian.susceptibility(observables, losses, CENTER, data_weights=rho, **SETTING)
    response = make_response(chi=chi, mass=rho, shapes=shapes, stderr=0.0)
    return replace(response, nbeta=jnp.asarray(SETTING["nbeta"]))


def realized(losses, observables, rho):
    return gaussian.response(observables, losses, CENTER, data_weights=rho, **SETTING)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_predictions_are_the_exact_re_solution_to_first_order(x64, grouped, base):
    losses, observables = quadratics(), quadratics(1, 2)
    rho = np.random.default_rng(2).uniform(0.2, 3.0, 12) if base else np.ones(12)
    shapes = {"b": (4,), "a": (3,), "c": (5,)}
    response = exact_response(losses, observables, rho, shapes)
    response = jp.group_mean(response) if grouped else response
    probes = {name: np.zeros(shape) for name, shape in shapes.items()}
    ends = np.cumsum([0, 4, 3, 5])
    base_of = {n: rho[i:j] for n, i, j in zip(shapes, ends[:-1], ends[1:], strict=True)}
    before, errors = realized(losses, observables, rho), []
    for size in (1e-2, 1e-3):
        target = {"row0": size, "row1": -size / 2}
        solution = solve_quietly(response, target, method=jp.least_norm())
        trained = solution.over(probes, base_of if grouped else None)
        np.testing.assert_allclose(np.mean(trained), 1.0, rtol=1e-9)
        shift = realized(losses, observables, np.asarray(trained)) - before
        predicted = np.array([float(x) for x in solution.predicted_shift.values()])
        np.testing.assert_allclose(predicted, list(target.values()), rtol=1e-6)
        errors.append(np.abs(shift - predicted).max() / size)
    # Off by what is of second order: a tenth of the shift, a tenth of the relative error.
    assert errors[1] < 0.02
    assert errors[1] < 0.2 * errors[0]


def test_two_rounds_compose(x64):
    losses, observables, shapes = quadratics(), quadratics(1, 2), {"b": (4,), "a": (3,), "c": (5,)}
    probes = {name: np.zeros(shape) for name, shape in shapes.items()}
    total = np.ones(12)
    start = realized(losses, observables, total)
    for goal in (0.05, 0.08):
        response = exact_response(losses, observables, total, shapes)
        left = start + np.array([goal, 0.0]) - realized(losses, observables, total)
        solution = solve_quietly(response, to_target(left), method=jp.least_norm())
        own = flat(solution.weights)
        total = np.asarray(jp.compose_weights(total, own))
        # `over` knows the base weights: they are the masses of the columns.
        np.testing.assert_allclose(solution.over(probes), total, rtol=1e-9)
    reached = realized(losses, observables, total) - start
    np.testing.assert_allclose(reached, [0.08, 0.0], atol=0.002)


def test_composed_weights():
    base, rho = {"a": np.array([0.0, 2.0])}, {"a": np.array([np.nan, 3.0])}
    np.testing.assert_array_equal(jp.compose_weights(base, rho)["a"], [0.0, 2.0])
    with pytest.raises(ValueError, match=r"same shapes, got \[2\] and \[3\]"):
        jp.compose_weights(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="must be alike"):
        jp.compose_weights({"a": np.ones(2)}, {"b": np.ones(2)})


# --- weights over the losses ----------------------------------------------------------------------


def test_over_follows_the_order_of_the_probes(x64):
    shapes = {"code": (3, 4), "prose": (5, 4)}
    response = make_response(1, shapes=shapes, mass=np.ones(32))
    probes = {"prose": {"x": np.zeros((5, 7))}, "code": {"x": np.zeros((3, 7))}}
    each = solve_quietly(response, {"row0": 1.0})
    expected = np.concatenate([each.weights["prose"], each.weights["code"]])
    np.testing.assert_allclose(each.over(probes), expected, rtol=1e-12)
    mixture = solve_quietly(jp.group_mean(response), {"row0": 0.1})
    weights = mixture.over(probes)
    assert weights.shape == (8, 4)
    np.testing.assert_allclose(weights[:5], float(mixture.weights["prose"]), rtol=1e-12)
    np.testing.assert_allclose(weights[5:], float(mixture.weights["code"]), rtol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda s: s.over(probes))(mixture), weights, rtol=1e-12)
    # Shares of the data that the sizes of the probes do not mirror are in the weights.
    shared = solve_quietly(jp.group_mean(response, {"code": 9.0, "prose": 1.0}), {"row0": 0.1})
    code = float(jnp.sum(shared.over(probes)[5:])) / 32
    np.testing.assert_allclose(code, 0.9 * float(shared.weights["code"]), rtol=1e-9)


@pytest.mark.parametrize(
    ("shapes", "probes", "message"),
    [
        ({"a": (3,), "b": (2,)}, {"a": 3}, r"probes must name exactly \['a', 'b'\], got \['a'\]"),
        ({"a": (3,), "b": (2,)}, {"a": 3, "b": 4}, r"probes\['b'\] must hold the 2 .*got 4"),
        ({"a": (3, 5), "b": (2, 6)}, {"a": 3, "b": 2}, "must be of one length"),
    ],
)
def test_over_refuses_other_probes(shapes, probes, message):
    solution = solve_quietly(jp.group_mean(make_response(1, shapes=shapes)), {"row0": 0.01})
    with pytest.raises(ValueError, match=message):
        solution.over({name: np.zeros(size) for name, size in probes.items()})


def test_over_needs_the_shapes():
    grouped = replace(jp.group_mean(make_response(1)), loss_shapes=())
    with pytest.raises(ValueError, match="without the shapes of its losses"):
        solve_quietly(grouped, {"row0": 0.01}).over({"code": np.zeros(5), "prose": np.zeros(9)})


def test_old_names_warn():
    with pytest.warns(DeprecationWarning, match="UnreachableTargetWarning"):
        assert jp.UnreachableTarget is jp.UnreachableTargetWarning
    with pytest.warns(DeprecationWarning, match="tau is a keyword"):
        assert jp.ridge(2.0) == jp.ridge(tau=2.0)
