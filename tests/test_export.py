"""Results as xarray, ArviZ, pandas, files and data loaders read them: the same numbers, named."""

import builtins
import importlib
import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_program import PLAN, SAMPLER, key, posterior, weights_of
from support import doomed

import jaxpattern as jp
from jaxpattern import export

RNG = np.random.default_rng(0)
ROWS = ("up", "head/down", "flat")
SHAPES = {
    "grouped": {"code": (), "prose": ()},
    "samples": {"code": (4,), "prose": (4,)},
    "tokens": {"code": (4, 3), "prose": (4, 3)},
    "ragged": {"code": (4, 3), "prose": (2, 5), "χ/short": (3, 1)},
    "mixed": {"code": (4,), "prose": (2, 3)},
}


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def make_response(shapes):
    K, size = len(ROWS), sum(int(np.prod(s)) for s in shapes.values())
    mass = {name: jnp.full(shape, 1 / size) for name, shape in shapes.items()}
    return jp.Response(
        chi={name: array(K, *shape) for name, shape in shapes.items()},
        stderr={name: jnp.abs(array(K, *shape)) for name, shape in shapes.items()},
        halves={name: array(2, K, *shape) for name, shape in shapes.items()},
        batches={name: array(5, K) for name in shapes},
        mass=mass, nbeta=jnp.float32(30.0), mean=array(K), mean_stderr=jnp.abs(array(K)),
        rhat=jnp.ones(K), ess=jnp.full(K, 50.0, jnp.bfloat16),
        diverged=jnp.zeros((K, 2), bool).at[0, 1].set(True),
        rows=ROWS, cost=12.0, num_samples=size, estimator="covariance (centered)",
        diagnostics={"drift": jnp.ones(K), "tail": array(K, 6)},
    )  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_a_response_comes_back_column_by_column(kind):
    """Every χ, error and mass is found under its row, probe set, sample and token, and no other."""
    shapes = SHAPES[kind]
    response = make_response(shapes)
    dataset = response.to_xarray()
    depth = max(map(len, shapes.values()))
    axes = ("sample", "token")[:depth]
    assert dataset["chi"].dims == ("row", "probe", *axes)
    assert dataset["mass"].dims == ("probe", *axes)
    for name, shape in shapes.items():
        for row, label in enumerate(ROWS):
            for index in np.ndindex(*shape):
                place = dict(zip(axes, (*index, 0), strict=False))
                one = dataset.sel(row=label, probe=name, **place)
                assert float(one["chi"]) == float(response.chi[name][(row, *index)])
                assert float(one["stderr"]) == float(response.stderr[name][(row, *index)])
                assert float(one["mass"]) == float(response.mass[name][index])
        whole = dataset["chi"].sel(probe=name)
        assert int(whole.notnull().sum()) == len(ROWS) * int(np.prod(shape))
        assert float(dataset["mass"].sel(probe=name).sum()) == pytest.approx(
            float(response.mass[name].sum()), rel=1e-6
        )
    assert list(dataset["row"].values) == list(ROWS)
    np.testing.assert_array_equal(dataset["diverged"], response.diverged)
    np.testing.assert_array_equal(dataset["batches"].sel(probe="prose"), response.batches["prose"])
    np.testing.assert_array_equal(dataset["diagnostic_tail"], response.diagnostics["tail"])


def test_units_and_where_numbers_come_from():
    response = make_response(SHAPES["tokens"])
    dataset = response.to_xarray()
    assert dataset["chi"].attrs["units"] == "observable × loss (nats), no factor nβ"
    assert dataset["nbeta"].attrs["units"] == "1 / loss (nats)"
    assert dataset.attrs["jaxpattern"] == jp.__version__
    assert dataset.attrs["jax"] == jax.__version__
    assert dataset.attrs["estimator"] == "covariance (centered)"
    assert dataset.attrs["verdict"] == response.verdict
    assert dataset["ess"].dtype == np.float32  # bfloat16 is known to few readers
    plain = (str, int, float)  # what netCDF can hold
    assert all(isinstance(value, plain) for value in dataset.attrs.values())


def test_the_mean_over_tokens_leaves_out_what_is_not_there():
    response = make_response(SHAPES["ragged"])
    dataset = response.to_xarray()
    chi, mass = dataset["chi"], dataset["mass"]
    mean = (chi * mass).sum(("sample", "token")) / mass.sum(("sample", "token"))
    grouped = jp.group_mean(response)
    for name in response.chi:
        # Float32 sums of at most 15 numbers.
        np.testing.assert_allclose(mean.sel(probe=name), grouped.chi[name], rtol=0, atol=1e-6)


def test_responses_without_numbers():
    response = make_response(SHAPES["samples"])
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), response)
    with pytest.raises(ValueError, match=r"response is a stack of \(2,\) results; take one"):
        stack.to_xarray()
    with pytest.raises(TypeError, match="response has no numbers under jit"):
        jax.jit(lambda r: r.to_xarray())(response)


TRACES = {
    "slow": lambda x, y: np.cumsum(x, axis=1),
    "normal": lambda x, y: x,
    "apart": lambda x, y: x + np.arange(4)[:, None],
    "skewed": lambda x, y: np.exp(2 * x),
    "anticorrelated": lambda x, y: x[:, 1:] - 0.7 * x[:, :-1],
}


@pytest.mark.parametrize("kind", TRACES)
@pytest.mark.parametrize("draws", [40, 101])
def test_rhat_and_ess_are_those_of_arviz(kind, draws):
    arviz_stats = pytest.importorskip("arviz_stats")
    rng = np.random.default_rng(draws)
    trace = TRACES[kind](rng.normal(size=(4, draws)), None).astype(np.float32)
    tree = jp.Draws({"x": jnp.asarray(trace)}).to_arviz()
    ours = jp.summarize(trace, num_batches=5)
    assert float(arviz_stats.rhat(tree)["x"]) == pytest.approx(float(ours.rhat), rel=1e-6)
    assert float(arviz_stats.ess(tree)["x"]) == pytest.approx(float(ours.ess), rel=1e-6)


def test_traces_of_a_run():
    trace = jp.sample(
        key(), posterior(), SAMPLER, PLAN, lambda p: {"a": p["a"], "b": {"sum": p["b"].sum()}},
        progress=False,
    )  # fmt: skip
    assert isinstance(trace, jp.Draws)
    assert isinstance(trace, dict)
    group = trace.to_arviz()["posterior"]
    assert group["a"].dims == ("chain", "draw", "a_dim_0")
    np.testing.assert_array_equal(group["a"], trace["a"])
    np.testing.assert_array_equal(group["b.sum"], trace["b"]["sum"])
    assert group.attrs["jaxpattern"] == jp.__version__
    twice = jax.jit(lambda t: jax.tree.map(lambda x: 2 * x, t))(trace)
    assert isinstance(twice, jp.Draws)
    np.testing.assert_array_equal(twice["a"], 2 * trace["a"])


def test_traces_in_words():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3, 0.1, size=(4, 50)), jnp.float32)
    draws = jp.Draws({"norm": x, "w": {"a": jnp.zeros((4, 50, 3, 2))}})
    title, head, norm, rest = str(draws).splitlines()
    assert title == "Traces of chains: 2 of 4 chains × 50 draws"
    assert head.split() == ["trace", "shape", "mean", "R-hat", "ESS"]
    own = jp.summarize(x, num_batches=5)
    assert norm.split()[:3] == ["norm", "number", f"{float(own.mean):.4f}"]
    assert norm.split()[-2:] == [f"{float(own.rhat):.3f}", f"{float(own.ess):.0f}"]
    assert rest.split() == ["w.a", "3", "×", "2"]
    lost = jp.Draws({"norm": x.at[1, 20:].set(jnp.nan)})
    assert "1 chains were lost and count nowhere" in str(lost)
    assert "nan" not in str(lost)
    assert "<table>" in draws._repr_html_()
    assert str(jp.Draws()) == "Draws: holds no numbers"


def test_traces_without_names():
    trace = jp.sample(key(), posterior(), SAMPLER, PLAN, weights_of, progress=False)
    np.testing.assert_array_equal(export.to_arviz(trace)["posterior"]["trace"], trace)


def test_traces_of_a_coefficient():
    lam = jp.llc(key(), posterior(), SAMPLER, PLAN, progress=False)
    np.testing.assert_array_equal(lam.to_arviz()["posterior"]["llc"], lam.trace)


def test_lost_chains_are_left_out():
    plan = replace(PLAN, num_chains=6)
    with pytest.warns(jp.DivergenceWarning):
        trace = jp.sample(
            key(), posterior(), doomed(step=6, share=0.5), plan, lambda p: {"a": p["a"]},
            progress=False,
        )  # fmt: skip
    lost = np.flatnonzero(np.isnan(trace["a"]).any(axis=(1, 2)))
    assert 0 < len(lost) < 6
    group = trace.to_arviz()["posterior"]
    assert group.attrs["lost_chains"] == lost.tolist()
    living = np.setdiff1d(np.arange(6), lost)
    np.testing.assert_array_equal(group["chain"], living)
    np.testing.assert_array_equal(group["a"], np.asarray(trace["a"])[living])


@pytest.mark.parametrize(("trace", "match"), [
    ({"a": np.zeros(3)}, r"trace must have leaves \[chain, draw, ...\]"),
    ({"a": np.zeros((2, 5)), "b": np.zeros((2, 6))}, "of the same chains and draws"),
    ({"draw": np.zeros((2, 5))}, "trace needs names that differ, also from chain and draw: draw"),
    ({}, r"trace must have leaves"),
])  # fmt: skip
def test_what_is_no_trace(trace, match):
    with pytest.raises(ValueError, match=match):
        jp.Draws(trace).to_arviz()


# Weights.


def solve(response):
    with warnings.catch_warnings():  # χ is noise here, and the weights say so
        warnings.simplefilter("ignore", jp.WeightsWarning)
        warnings.simplefilter("ignore", jp.UnreachableTargetWarning)
        return jp.solve_weights(response, {"up": 0.05}, method=jp.entropic())


@pytest.fixture(scope="module")
def solutions():
    found = {kind: make_response(shapes) for kind, shapes in SHAPES.items() if kind != "grouped"}
    found["grouped"] = jp.group_mean(found["ragged"])
    return {kind: solve(response) for kind, response in found.items()}


@pytest.mark.parametrize("kind", ["grouped", "samples", "tokens", "ragged", "mixed"])
def test_weights_as_a_table(kind, solutions):
    pandas = pytest.importorskip("pandas")
    solution = solutions[kind]
    table = solution.to_dataframe()
    axes = [axis for axis in ("sample", "token") if axis in table]
    assert len(table) == solution.columns.size
    assert len(axes) == max(map(len, solution.columns.shapes))
    for line in table.to_dict("records"):
        depth = np.ndim(solution.weights[line["probe"]])
        index = tuple(int(line[axis]) for axis in axes[:depth])
        assert all(pandas.isna(line[axis]) for axis in axes[depth:])
        assert line["weight"] == float(solution.weights[line["probe"]][index])
        assert line["share"] == float(solution.mass[line["probe"]][index])
    assert table["share_then"].sum() == pytest.approx(1, abs=1e-6)
    assert not table.duplicated(["probe", *axes]).any()


@pytest.mark.parametrize("kind", ["grouped", "samples", "tokens", "ragged", "mixed"])
def test_weights_in_files(kind, solutions, tmp_path):
    """Both files hold the weights of `over`, to the last bit."""
    solution = solutions[kind]
    wanted = solution.by_probe()
    solution.write(tmp_path / "weights.json")
    solution.write(tmp_path / "weights.npz")
    written = json.loads((tmp_path / "weights.json").read_text(encoding="utf-8"))
    assert written["provenance"]["jaxpattern"] == jp.__version__
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(wanted) == set(written["weights"])
        for name, weights in wanted.items():
            np.testing.assert_array_equal(arrays[name], weights)
            np.testing.assert_array_equal(np.float32(written["weights"][name]), weights)
    total = sum(float(x.sum()) for x in wanted.values())
    # The method's own tolerance on Σqρ = 1.
    assert total / sum(x.size for x in wanted.values()) == pytest.approx(1, abs=1e-4)


def test_names_that_numpy_reserves(tmp_path):
    solution = solve(make_response({"file": (3,), "allow_pickle": (2,), "a/b": (2,)}))
    solution.write(tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz") as arrays:
        assert set(arrays.files) == {"file", "allow_pickle", "a/b"}


def test_other_files(solutions, tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .json or .npz, got 'weights.csv'"):
        solutions["samples"].write(tmp_path / "weights.csv")


@pytest.mark.parametrize("kind", ["samples", "tokens"])
def test_weights_over_is_by_probe_in_a_row(kind, solutions):
    solution = solutions[kind]
    probes = {name: np.zeros(shape) for name, shape in SHAPES[kind].items()}
    parts = solution.by_probe()
    np.testing.assert_array_equal(solution.over(probes), jnp.concatenate(list(parts.values())))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_column_of_a_hugging_face_dataset(solutions):
    datasets = pytest.importorskip("datasets")
    shapes, solution = SHAPES["ragged"], solutions["ragged"]
    wanted = solution.by_probe()
    rows = {
        name: datasets.Dataset.from_dict({"n": list(range(s[0]))}) for name, s in shapes.items()
    }
    splits = solution.add_to(datasets.DatasetDict(rows))
    assert isinstance(splits, datasets.DatasetDict)
    whole = solution.add_to(datasets.concatenate_datasets(list(rows.values())), column="rho")
    flat = [row for x in wanted.values() for row in np.asarray(x)]
    for i, row in enumerate(flat):
        np.testing.assert_array_equal(np.float32(whole[i]["rho"]), row)
    for name, weights in wanted.items():
        assert splits[name].column_names == ["n", "weight"]
        got = [splits[name][i]["weight"] for i in range(len(weights))]
        np.testing.assert_array_equal(np.float32(got), weights)
        assert rows[name].column_names == ["n"]
    with pytest.raises(ValueError, match=r"dataset must have the 9 samples of the response, got 4"):
        solution.add_to(rows["code"])
    with pytest.raises(ValueError, match=r"dataset must have the splits .*got \['code'\]"):
        solution.add_to(datasets.DatasetDict({"code": rows["code"]}))
    with pytest.raises(TypeError, match=r"dataset must be a datasets.Dataset, got list"):
        solution.add_to([1, 2])


# One line each, as `docs/howto/export.md` has them.


def test_optax_losses():
    """The gradient is that of the weighted loss of `jp.train`."""
    from jaxpattern.losses import weighted_mean

    logits, labels, rho = array(6, 5), jnp.asarray(RNG.integers(5, size=6)), jnp.abs(array(6))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    loss = jnp.average(losses, weights=rho)
    wanted = weighted_mean(losses, rho * (6 / rho.sum()))
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_probabilities(shape):
    rho = np.abs(RNG.normal(size=shape))
    got = export.probabilities(jnp.asarray(rho, jnp.float32))
    wanted = np.float32(rho).astype(float).reshape(5, -1).sum(axis=1)
    np.testing.assert_allclose(got, wanted / wanted.sum(), rtol=1e-12)


def test_negative_weights_are_not_drawn_by():
    with pytest.raises(ValueError, match=r"weights must not be negative.*got -2 among them"):
        export.probabilities(np.array([3.0, -2.0]))


@pytest.mark.torch
def test_a_torch_sampler(solutions):
    """Samples come as often as they weigh; 4 standard errors of a binomial, one in 2,000 each."""
    import torch

    probes = {name: np.zeros(shape) for name, shape in SHAPES["tokens"].items()}
    rho, number = solutions["tokens"].over(probes), 20_000
    generator = torch.Generator().manual_seed(0)
    sampler = torch.utils.data.WeightedRandomSampler(
        export.probabilities(rho), num_samples=number, generator=generator
    )
    data = torch.utils.data.TensorDataset(torch.arange(len(rho)))
    loader = torch.utils.data.DataLoader(data, batch_size=1000, sampler=sampler)
    drawn = np.concatenate([batch[0].numpy() for batch in loader])
    wanted = np.asarray(rho).sum(axis=1) / np.asarray(rho).sum()
    count = np.bincount(drawn, minlength=len(rho))
    assert len(drawn) == number
    assert (np.abs(count - number * wanted) < 4 * np.sqrt(number * wanted * (1 - wanted))).all()


def test_grain(solutions):
    grain = pytest.importorskip("grain")
    probes = {name: np.zeros(shape) for name, shape in SHAPES["tokens"].items()}
    rho = np.asarray(solutions["tokens"].over(probes))
    records = [{"tokens": np.full(4, i)} for i in range(len(rho))]
    data = grain.MapDataset.source(records).map_with_index(lambda i, x: {**x, "weight": rho[i]})
    for batch in data.shuffle(seed=0).batch(4):
        np.testing.assert_array_equal(batch["weight"], rho[batch["tokens"][:, 0]])


def test_grain_mixtures(solutions):
    grain = pytest.importorskip("grain")
    then = solutions["grouped"].to_dataframe().set_index("probe")["share_then"]
    sources = {name: grain.MapDataset.source([name] * 5).repeat() for name in then.index}
    mixed = grain.MapDataset.mix([sources[name] for name in then.index], weights=list(then))
    drawn = [mixed[i] for i in range(3000)]
    for name, share in then.items():
        assert drawn.count(name) / 3000 == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize(("module", "call"), [
    ("xarray", lambda: make_response(SHAPES["samples"]).to_xarray()),
    ("arviz_base", lambda: jp.Draws({"a": np.zeros((2, 5))}).to_arviz()),
    ("pandas", lambda: solve(make_response(SHAPES["samples"])).to_dataframe()),
])  # fmt: skip
def test_a_package_that_is_missing_is_named(module, call, monkeypatch):
    real = importlib.import_module

    def missing(name, *args):
        if name == module:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf'needs {module}.*pip install "jaxpattern\[export\]"'):
        call()


def test_files_and_loaders_need_no_package(monkeypatch, solutions, tmp_path):
    real = builtins.__import__

    def bare(name, *args, **settings):
        if name.split(".")[0] in ("xarray", "arviz_base", "pandas", "datasets"):
            raise ImportError(name)
        return real(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", bare)
    solutions["tokens"].write(tmp_path / "weights.npz")
    assert export.probabilities(np.ones(3)).sum() == pytest.approx(1)
