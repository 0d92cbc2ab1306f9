"""Bayesian influence: exact on linear regression, the draws' own covariance, its errors, its words.

Statistical checks use fixed keys; the limit of five standard errors is passed by chance once in
30,000 numbers for 20 groups of draws, and once in a million for 100.
"""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_program import DRIVERS
from jaxtyping import config
from oracles import euler, gaussian
from support import doomed, interrupted, near, often, same

import jaxpattern as jp
from jaxpattern.chains.run import make_run
from jaxpattern.response import influence_estimate
from jaxpattern.response.influence import BIF

NBETA, LOCALIZATION, STEP, DIMENSION = 4.0, 2.0, 0.06, 3


def regression(number=7, seed=0):
    """Inputs and targets of a linear regression, and w* at which no residual is 0."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(number, DIMENSION)), rng.normal(size=number), rng.normal(size=DIMENSION)


X, Y, CENTRE = regression()


def loss_fn(params, batch):
    x, y = batch
    return 0.5 * (x @ params["w"] - y) ** 2


def rows(start, stop):
    return jnp.asarray(X[start:stop], jnp.float32), jnp.asarray(Y[start:stop], jnp.float32)


def posterior():
    params = {"w": jnp.asarray(CENTRE, jnp.float32)}
    return jp.localized_posterior(
        loss_fn, params, rows(0, len(Y)), nbeta=NBETA, localization=LOCALIZATION
    )


def exact_covariance():
    """Cov[½u², ½v²] = ½ Σ_uv² + m_u m_v Σ_uv of Gaussian residuals u, v (Isserlis), `[N, N]`.

    For the law of the full-batch chain, whose covariance of w is (P − εP²/4)⁻¹.
    """
    losses = gaussian.Quadratic(np.einsum("ni,nj->nij", X, X), -Y[:, None] * X, 0.5 * Y**2)
    law = euler.stationary_posterior(
        losses, CENTRE, nbeta=NBETA, localization=LOCALIZATION, step_size=STEP
    )
    mean, sigma = X @ law.mean - Y, X @ law.covariance @ X.T
    return 0.5 * sigma**2 + np.outer(mean, mean) * sigma


def pearson(covariance):
    scale = np.sqrt(np.diag(covariance))
    return covariance / np.outer(scale, scale)


SAMPLER = jp.sgld(step_size=STEP)
LONG = jp.Plan(num_chains=50, num_burnin=20, num_draws=1500, thin=4, num_batches=4)
SETS = {"queries": {"all": rows(0, 7)}, "probes": {"front": rows(0, 4), "back": rows(4, 7)}}
run = partial(jp.influence, progress=False)


def joined(result, part="influence"):
    return np.concatenate([getattr(result, part)["all"][p] for p in ("front", "back")], axis=-1)


@pytest.mark.parametrize("correlation", [False, True])
def test_linear_regression(correlation):
    """−Cov as published, +Pearson's correlation as devinterp has it, both with errors."""
    result = run(jax.random.key(0), posterior(), SAMPLER, LONG, **SETS, correlation=correlation)
    covariance = exact_covariance()
    wanted = pearson(covariance) if correlation else -covariance
    value, error = joined(result), joined(result, "stderr")
    moving = error > 1e-6  # a loss beside itself has correlation 1 without an error
    assert moving.sum() == (42 if correlation else 49)
    assert (np.abs(value - wanted) < 5 * np.maximum(error, 1e-6)).all()
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(wanted**2))
    assert result.verdict.startswith("nothing")


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.optimized
def test_intervals_cover(correlation):
    """Of 300 short runs 95 % of the 95 % intervals hold the truth, give or take 3 %.

    49 or 42 pairs of a run are dependent, some ten of them are not: the standard error of the
    share is below 0.6 %. Intervals of 20 groups that are not long against the relaxation time, and
    of skewed estimates, cover a little less.
    """
    plan = jp.Plan(num_chains=4, num_burnin=20, num_draws=300, thin=4, num_batches=5)

    def one(key):
        result = run(key, posterior(), SAMPLER, plan, **SETS, correlation=correlation)
        parts = result.influence["all"], result.stderr["all"]
        return [jnp.concatenate([x[p] for p in ("front", "back")], axis=-1) for x in parts]

    value, error = jax.lax.map(one, jax.random.split(jax.random.key(1), 300), batch_size=50)
    covariance = exact_covariance()
    wanted = pearson(covariance) if correlation else -covariance
    off = ~np.eye(7, dtype=bool) if correlation else np.ones((7, 7), bool)
    factor = 2.093  # Student's t of 19 degrees of freedom
    held = (np.abs(value - wanted[None]) < factor * error)[:, off].mean()
    assert 0.91 < held < 0.97, held


# The covariance of the very draws. Losses per token, sets of different lengths, padding.

TOKENS = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)}
PLAN = jp.Plan(num_chains=3, num_burnin=4, num_draws=11, thin=2, num_batches=2)


def token_loss(params, tokens):
    logits = params["w"][tokens[:, :-1]] @ params["w"].T
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], 2)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def text(number, length, seed):
    return jnp.asarray(np.random.default_rng(seed).integers(5, size=(number, length)))


A, B, C = text(3, 5, 2), text(2, 4, 3), text(4, 5, 4)
PADDING = jnp.ones((3, 4)).at[0, 2:].set(0).at[2].set(0)


def token_posterior():
    data = jnp.concatenate([A, C])
    return jp.localized_posterior(token_loss, TOKENS, data, nbeta=3.0, localization=3.0)


def token_run(plan=PLAN, **settings):
    asked = {"queries": {"a": A, "b": B}, "probes": {"c": C, "a": A}} | settings
    return run(jax.random.key(5), token_posterior(), jp.sgld(step_size=0.1), plan, **asked)


def recorded(plan=PLAN):
    """Losses along the same chains, `[draws of all chains, B, T]` in float64."""
    trace = jp.sample(
        jax.random.key(5), token_posterior(), jp.sgld(step_size=0.1), plan,
        lambda p: {"a": token_loss(p, A), "b": token_loss(p, B), "c": token_loss(p, C)},
        progress=False,
    )  # fmt: skip
    return {n: np.asarray(x, np.float64).reshape(-1, *x.shape[2:]) for n, x in trace.items()}


def at_level(losses, level, weights):
    w = np.ones(losses.shape[1:]) if weights is None else np.asarray(weights, float)
    if level == "loss":
        return np.where(w > 0, losses, 0)
    axes = (2,) if level == "sample" else (1, 2)
    total = w.sum(tuple(i - 1 for i in axes))
    return (w * losses).sum(axes) / np.where(total > 0, total, 1)


def numpy_influence(a, b, correlation):
    """As NumPy has it, over the draws of all chains at once."""
    shape = (*a.shape[1:], *b.shape[1:])
    a, b = (x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(0) for x in (a, b))
    if not correlation:
        return -(a.T @ b).reshape(shape) / (len(a) - 1)
    scale = np.sqrt(np.outer((a**2).sum(0), (b**2).sum(0)))
    return np.divide(a.T @ b, scale, out=np.zeros_like(scale), where=scale > 0).reshape(shape)


LEVELS = [("loss", "loss"), ("set", "loss"), ("sample", "sample"), ("set", "set")]


def both_forms(asked, **changes):
    """Covariances and correlations of one set of chains."""
    whole = make_run(jax.random.key(5), token_posterior(), jp.sgld(step_size=0.1), PLAN)
    losses = replace(asked.recorder(whole), **changes)
    chains = jp.run_chains(whole, losses.on(None), jp.Host())
    return {form: replace(losses, correlation=form).result(whole, chains) for form in (False, True)}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("levels", LEVELS, ids="-".join)
def test_it_is_the_covariance_of_the_draws(levels, padded):
    weights = {"a": PADDING if padded else None, "b": None, "c": None}
    given = {"a": PADDING} if padded else None
    query, probe = levels
    asked = BIF(
        {"a": A, "b": B}, {"c": C, "a": A}, query_level=query, probe_level=probe,
        query_weights=given, probe_weights=given,
    )  # fmt: skip
    trace = recorded()
    for correlation, result in both_forms(asked).items():
        for q, parts in result.influence.items():
            for p, got in parts.items():
                wanted = numpy_influence(
                    at_level(trace[q], query, weights[q]), at_level(trace[p], probe, weights[p]),
                    correlation,
                )  # fmt: skip
                assert got.shape == wanted.shape == result.stderr[q][p].shape
                # 33 draws of float32 losses of size 1 that move by about 0.1.
                np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("level", ["loss", "set"])
def test_both_ways_of_keeping_give_the_same(level):
    """Draws, or co-moments of groups of them; 11 draws make groups of 5 and 6."""
    asked = BIF({"a": A}, {"c": C, "a": A}, query_level=level, probe_level=level)
    draws, sums = (both_forms(asked, keeps_draws=keeps) for keeps in (True, False))
    for form in (False, True):
        near(draws[form].influence, sums[form].influence, places=200)
        # The error of a correlation of exactly 1 is rounding: an absolute bound.
        near(draws[form].stderr["a"]["c"], sums[form].stderr["a"]["c"], places=200)
        one, two = (result[form].stderr["a"]["a"] for result in (draws, sums))
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_draws():
    """More draws than a group's co-moments hold: co-moments, of a size without draws in it."""
    whole = partial(make_run, jax.random.key(5), token_posterior(), jp.sgld(step_size=0.1))
    asked = BIF({"a": A}, {"c": C})  # 12 × 16
    few = asked.recorder(whole(replace(PLAN, num_draws=12)))
    assert few.keeps_draws  # 6 · 28 < 12 · 16
    many = asked.recorder(whole(replace(PLAN, num_draws=1000)))
    assert not many.keeps_draws
    kept, _ = jax.eval_shape(lambda: many.value(token_posterior(), TOKENS, jax.random.key(0), None))
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) == 2  # the mean of each set


def test_blocks_of_queries(monkeypatch):
    """One query at a time, four at a time with a rest, all at once."""
    wanted = token_run()
    for block in (1, 4 * 6 * 28):  # 6 groups, 28 probes
        monkeypatch.setattr(influence_estimate, "_BLOCK", block)
        influence_estimate.estimate.clear_cache()
        got = token_run()
        near((got.influence, got.stderr), (wanted.influence, wanted.stderr), places=20)
    influence_estimate.estimate.clear_cache()


def test_many_rows_are_right():
    """40,000 queries of few draws, where jax on CPU has been wrong (tests/test_environment.py)."""
    rng = np.random.default_rng(0)
    many = jnp.asarray(rng.normal(size=(40_000, 3)), jnp.float32), jnp.zeros(40_000)
    plan = jp.Plan(num_chains=2, num_burnin=0, num_draws=6, num_batches=2)
    few = rows(0, 2)
    result = run(
        jax.random.key(0), posterior(), SAMPLER, plan, queries={"many": many},
        probes={"few": few, "many": (many[0][:1], many[1][:1])},
    )  # fmt: skip
    trace = jp.sample(
        jax.random.key(0), posterior(), SAMPLER, plan,
        lambda p: {"many": loss_fn(p, many), "few": loss_fn(p, few)}, progress=False,
    )  # fmt: skip
    flat = {n: np.asarray(x, float).reshape(12, -1) for n, x in trace.items()}
    wanted = numpy_influence(flat["many"], flat["few"], False)
    got = np.asarray(result.influence["many"]["few"])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_chi_is_influence_from_its_mean_over_the_data():
    """χ_z(ℓ_q) = BIF(z, q) − Σ_j q_j BIF(j, q), of the same chains."""
    key, data = partial(jax.random.key, 3), rows(0, 7)
    plan = jp.Plan(num_chains=3, num_burnin=10, num_draws=20, thin=3)
    result = run(key(), posterior(), SAMPLER, plan, queries={"q": rows(0, 2)}, probes={"z": data})
    response = jp.susceptibilities(
        key(), posterior(), SAMPLER, plan, probes={"z": data}, estimator=jp.covariance(),
        observables={"q": lambda p: loss_fn(p, rows(0, 2))}, progress=False,
    )  # fmt: skip
    bif = np.asarray(result.influence["q"]["z"])
    np.testing.assert_allclose(
        response.chi["z"], bif - bif.mean(1, keepdims=True), rtol=0, atol=1e-5 * np.abs(bif).max()
    )


@pytest.mark.torch
@pytest.mark.parametrize("correlation", [False, True])
def test_devinterp_computes_the_same(correlation):
    """Its own function on losses of the same draws, but for the sign of its covariance."""
    published = pytest.importorskip("devinterp.slt.bif")
    import xarray

    trace = recorded()["a"].reshape(3, 11, *A[:, 1:].shape)
    data = xarray.DataTree(xarray.Dataset({
        "loss_a": (("chain", "draw", "batch_a", "token_pos"), trace),
        "input_ids_a": (("batch_a", "token"), np.asarray(A)),
    }))  # fmt: skip
    theirs = published.compute_bif(data, compute_covariance=not correlation, device="cpu")
    theirs = theirs["influences"].transpose(
        "batch_1", "target_position", "batch_2", "target_position_T"
    )
    ours = token_run(queries={"a": A}, probes={"a": A}, correlation=correlation)
    sign = 1 if correlation else -1
    np.testing.assert_allclose(
        sign * np.asarray(ours.influence["a"]["a"]),
        theirs,
        rtol=0,
        atol=3e-6 * np.abs(theirs).max(),
    )


# As the other drivers.


def small(correlation=False, **settings):
    return token_run(correlation=correlation, **settings)


@pytest.mark.parametrize("correlation", [False, True])
def test_measured_with_others(correlation):
    asked = {
        "bif": jp.BIF({"a": A}, {"c": C}, correlation=correlation),
        "grouped": jp.BIF({"a": A}, {"c": C}, query_level="set", probe_level="set"),
        "llc": jp.LLC(),
    }
    sampler = jp.sgld(step_size=0.1)
    found = jp.measure(jax.random.key(5), token_posterior(), sampler, PLAN, asked, progress=False)
    alone = token_run(queries={"a": A}, probes={"c": C}, correlation=correlation)
    same(found["bif"], alone)
    assert found["grouped"].influence["a"]["c"].shape == ()


def test_a_run_in_a_folder_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(DRIVERS, "influence", small)
    interrupted(monkeypatch, "influence", tmp_path)
    same(small(checkpoint=often(tmp_path)), small())
    # The other form asks for nothing new.
    same(small(True, checkpoint=often(tmp_path)), small(True))


@pytest.mark.parametrize("axes", [{"chain": 4}, {"chain": 2, "data": 2}])
def test_on_a_mesh(axes):
    count = int(np.prod(list(axes.values())))
    settings = {"queries": {"a": C}, "probes": {"b": B, "a": C}}
    got = small(mesh=jp.mesh(devices=jax.devices()[:count], **axes), **settings)
    near(got, small(**settings), places=200)


def test_under_transformations():
    def at(nbeta):
        whole = replace(token_posterior(), nbeta=nbeta)
        return run(
            jax.random.key(5), whole, jp.sgld(step_size=0.1), PLAN, queries={"a": A},
            probes={"c": C},
        )  # fmt: skip

    stack = jax.jit(jax.vmap(at))(jnp.array([3.0, 5.0]))
    assert stack.influence["a"]["c"].shape == (2, 3, 4, 4, 4)
    near(
        stack.influence["a"]["c"][0],
        token_run(queries={"a": A}, probes={"c": C}).influence["a"]["c"],
        places=200,
    )
    with pytest.raises(TypeError, match="is a stack; take one of them first"):
        stack.top()


def test_lost_chains_count_nowhere():
    plan = replace(PLAN, num_chains=6)
    sampler = doomed(step=6, share=0.5, step_size=0.1)
    with pytest.warns(jp.DivergenceWarning):
        trace = jp.sample(
            jax.random.key(5), token_posterior(), sampler, plan, lambda p: token_loss(p, A),
            progress=False,
        )  # fmt: skip
    living = ~np.isnan(trace).any(axis=(1, 2, 3))
    assert 0 < living.sum() < 6
    with pytest.warns(jp.DivergenceWarning):
        result = run(
            jax.random.key(5), token_posterior(), sampler, plan, queries={"a": A}, probes={"a": A}
        )
    losses = np.asarray(trace, float)[living].reshape(-1, 3, 4)
    wanted = numpy_influence(losses, losses, False)
    np.testing.assert_allclose(
        result.influence["a"]["a"], wanted, rtol=0, atol=3e-6 * np.abs(wanted).max()
    )
    np.testing.assert_array_equal(result.diverged[0], ~living)


def test_shares_of_rows_and_columns():
    whole = make_run(jax.random.key(5), token_posterior(), jp.sgld(step_size=0.1), PLAN)
    total = float(PADDING.sum()) + 6
    for level, wanted in (("loss", PADDING), ("sample", PADDING.sum(1)), ("set", PADDING.sum())):
        asked = BIF(
            {"a": A, "b": B}, {"c": C}, query_level=level, query_weights={"a": PADDING}
        )  # fmt: skip
        losses = asked.recorder(whole)
        mass = losses._mass(losses.queries)
        np.testing.assert_allclose(mass["a"], np.asarray(wanted) / total, rtol=1e-6)
        np.testing.assert_allclose(sum(float(q.sum()) for q in mass.values()), 1, rtol=1e-6)


def test_a_batch_on_both_sides_is_evaluated_once():
    calls = []

    def counted(params, tokens):
        calls.append(tokens.shape)
        return token_loss(params, tokens)

    whole = replace(token_posterior(), loss_fn=counted)
    whole = make_run(jax.random.key(0), whole, jp.sgld(step_size=0.1), PLAN)
    losses = BIF({"x": A}, {"y": A}).recorder(whole)
    assert list(losses.problem.probes) == ["queries/x"]
    other = BIF({"x": A}, {"y": A}, probe_weights={"y": PADDING}).recorder(whole)
    assert list(other.problem.probes) == ["queries/x", "probes/y"]


def test_chains_that_do_not_move_are_doubted():
    plan = replace(PLAN, num_batches=1)
    with pytest.warns(jp.UnreliableWarning, match="influence: queries/a.*it never changed"):
        result = run(
            jax.random.key(5), token_posterior(), jp.mala(step_size=1e6), plan,
            queries={"a": A}, probes={"c": C}, correlation=True,
        )  # fmt: skip
    assert np.isnan(result.influence["a"]["c"]).all()  # a correlation of what stands still


# In words.


@pytest.fixture(scope="module")
def known():
    """A result whose numbers are set by hand: query (1, 2) and its largest entries."""
    result = small(queries={"a": A}, probes={"c": C, "a": A})
    values = {"c": np.full((3, 4, 4, 4), 1e-3), "a": np.full((3, 4, 3, 4), -1e-3)}
    values["c"][1, 2, 3, 0] = 0.5
    values["c"][1, 2, 0, 1] = -0.7
    values["a"][1, 2, 1, 2] = -9.0  # itself
    values["a"][0, 0, 2, 1] = -0.6
    influence = {"a": {n: jnp.asarray(x, jnp.float32) for n, x in values.items()}}
    errors = jax.tree.map(lambda x: jnp.full(x.shape, 0.01), influence)
    return replace(result, influence=influence, stderr=errors)


def test_the_largest_are_listed(known):
    best = known.top(3)
    assert [(p.query, p.query_place, p.probe, p.probe_place) for p in best] == [
        ("a", (1, 2), "c", (0, 1)), ("a", (0, 0), "a", (2, 1)), ("a", (1, 2), "c", (3, 0)),
    ]  # fmt: skip
    assert [p.helps for p in best] == [True, True, False]
    assert [p.influence for p in best] == pytest.approx([-0.7, -0.6, 0.5])
    assert best[0].stderr == pytest.approx(0.01)
    assert known.top(1, query="a", place=(0,))[0].probe_place == (2, 1)
    assert known.top(1, helps=False)[0].influence == pytest.approx(0.5)
    assert len(known.top(10_000)) == 12 * (16 + 12) - 12
    positive = replace(known, correlation=True)
    assert [p.helps for p in positive.top(3)] == [False, False, True]
    assert positive.top(1, helps=True)[0].influence == pytest.approx(0.5)


def test_excluded_losses_are_not_listed():
    result = small(
        queries={"a": A}, probes={"a": A}, query_weights={"a": PADDING},
        probe_weights={"a": PADDING},
    )  # fmt: skip
    assert {p.query_place[0] for p in result.top(1000)} == {0, 1}


def test_as_sentences(known):
    lines = known.words(3).splitlines()
    assert lines[0] == "-0.7000 ± 0.0100  more weight on c[0, 1] lowers the loss of a[1, 2]"
    assert lines[2] == "0.5000 ± 0.0100  more weight on c[3, 0] raises the loss of a[1, 2]"
    letters = "abcde"
    shown = known.words(1, tokens={"c": C, "a": A}, decode=lambda t: "".join(letters[i] for i in t))
    row = [letters[int(i)] for i in C[0]]
    assert f"c[0, 1] “{row[0]}{row[1]}⟦{row[2]}⟧{row[3]}{row[4]}”" in shown
    with pytest.raises(ValueError, match="tokens"):
        known.words(1, tokens={"other": A})


def test_printed(known):
    page = " ".join(str(known).split())
    assert page.startswith(
        "Bayesian influence −Cov[ℓ_q, ℓ_z] of 2 probe sets (28 columns) on 1 query"
    )
    assert re.search(r"a\[1, 2\] +c\[0, 1\] +-0.7000 ± 0.0100 +lowers it", page)
    assert "Negative: more weight on the probe lowers the loss of the query" in page
    assert "Positive: more weight on" in " ".join(str(replace(known, correlation=True)).split())
    assert "+Corr[ℓ_q, ℓ_z]" in str(replace(known, correlation=True))
    assert "<table>" in known._repr_html_()


def test_intervals(known):
    low, high = known.interval(0.9)
    width = np.asarray(high["a"]["c"] - low["a"]["c"])
    # 6 groups: Student's t of 5 degrees of freedom.
    np.testing.assert_allclose(width, 2 * 2.01505 * 0.01, rtol=1e-4)


def test_in_files(known, tmp_path):
    jp.save(tmp_path / "bif.npz", known)
    back = jp.load(tmp_path / "bif.npz")
    assert jax.tree.structure(back) == jax.tree.structure(known)
    same(back, known)


def test_as_xarray():
    pytest.importorskip("xarray")
    result = small()
    data = result.to_xarray()
    axes = ("query", "query_sample", "query_token", "probe", "sample", "token")
    assert data["influence"].dims == axes
    for q, parts in result.influence.items():
        for p, values in parts.items():
            for index in np.ndindex(*values.shape):
                place = dict(zip(axes[1:3] + axes[4:], index, strict=True))
                one = data.sel(query=q, probe=p, **place)
                assert float(one["influence"]) == float(values[index])
                assert float(one["stderr"]) == float(result.stderr[q][p][index])
    numbers = sum(x.size for parts in result.influence.values() for x in parts.values())
    assert int(data["influence"].notnull().sum()) == numbers
    assert data.attrs["form"] == "−Cov[ℓ_q, ℓ_z]"
    assert data["influence"].attrs["units"] == "loss² (nats²)"
    grouped = small(query_level="set", probe_level="sample").to_xarray()
    assert grouped["influence"].dims == ("query", "probe", "sample")


@pytest.fixture
def annotations_unchecked():
    """What a user meets, who has no beartype in front of the package."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("settings", "error", "match"), [
    ({"queries": {}}, ValueError, "queries is empty; give at least one set"),
    ({"probes": {}}, ValueError, "probes is empty; give at least one set"),
    ({"queries": A}, TypeError, "queries must map names to values"),
    ({"queries": {"a": A.astype(float)}}, ValueError, r"queries\['a'\] must be like the data"),
    ({"probes": {"a": A[0]}}, ValueError, r"probes\['a'\] must be like the data"),
    ({"query_level": "token"}, ValueError, "query_level must be one of .*got 'token'"),
    ({"correlation": 1}, TypeError, "correlation must be True or False, got 1"),
    ({"query_weights": {"z": 1}}, ValueError, r"query_weights names \['z'\], the queries are"),
    ({"probe_weights": {"c": np.ones(4)}}, ValueError, r"probes/c.* must have the shape of"),
])  # fmt: skip
def test_bad_input(settings, error, match, annotations_unchecked):
    with pytest.raises(error, match=match):
        small(**settings)


@pytest.mark.parametrize(("settings", "match"), [
    ({"num": 0}, "num must be at least 1"),
    ({"place": (0,)}, r"give query, one of \['a'\]"),
    ({"query": "z"}, r"query must be one of \['a'\], got 'z'"),
    ({"query": "a", "place": (3,)}, r"place must lie in the losses \[3, 4\] of 'a', got \(3,\)"),
    ({"query": "a", "place": (0, 0, 0)}, "place must lie in the losses"),
])  # fmt: skip
def test_bad_questions(settings, match, known):
    with pytest.raises(ValueError, match=match):
        known.top(**settings)
