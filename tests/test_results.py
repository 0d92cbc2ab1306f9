"""Results in files: the same bits back, and a clear word on files that cannot be trusted."""

import io
import json
import pickle
import zipfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpattern as jp
from jaxpattern.results import _checksum

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def response():
    columns = {"p/q": array(2, 3), "χ token": array(2, 3, 4).at[0, 0, 0].set(jnp.nan)}
    return jp.Response(
        chi=columns,
        stderr={name: jnp.abs(x) for name, x in columns.items()},
        halves={name: jnp.stack([x, x]) for name, x in columns.items()},
        batches={name: array(5, 2) for name in columns},
        mass={"p/q": jnp.full(3, 1 / 15), "χ token": jnp.full((3, 4), 1 / 15)},
        nbeta=jnp.float32(30.0),
        mean=array(2),
        mean_stderr=jnp.abs(array(2)),
        rhat=jnp.asarray([1.0, jnp.inf]),
        ess=jnp.asarray([-0.0, 7.5], jnp.bfloat16),
        diverged=jnp.asarray([[True, False], [False, False]]),
        rows=("head/prose", "head/code"),
        cost=1.25e9,
        num_samples=15,
        estimator="pathwise (adjoint, window 4, every 2)",
        diagnostics={"tail": array(2, 0), "truncated": jnp.zeros((2, 4, 3), bool)},
    )


@pytest.fixture(scope="module")
def results(response):
    small = replace(
        response,
        chi={"p": array(2, 6)}, stderr={"p": jnp.full((2, 6), 0.1)}, halves={}, batches={},
        mass={"p": jnp.full(6, 1 / 6)},
    )  # fmt: skip
    lam = jp.LocalLearningCoefficient(
        mean=array(), stderr=array(), per_chain=array(3), rhat=array(), ess=array(),
        trace=array(3, 5).at[1, 2:].set(jnp.nan), diverged=jnp.asarray([False, True, False]),
        cost=12.0,
    )  # fmt: skip
    return {
        "response": response,
        "group mean": jp.group_mean(response),
        "intervention": jp.solve_weights(small, {"head/prose": -0.01}, method=jp.least_norm()),
        "llc": lam,
    }


@pytest.mark.parametrize("name", ["response", "group mean", "intervention", "llc"])
def test_the_same_bits_come_back(name, results, tmp_path):
    result = results[name]
    jp.save(tmp_path / "result.npz", result)
    back = jp.load(tmp_path / "result.npz")
    assert type(back) is type(result)
    assert jax.tree.structure(back) == jax.tree.structure(result)
    for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(result), strict=True):
        assert isinstance(got, type(wanted))
        got, wanted = np.asarray(got), np.asarray(wanted)
        assert (got.dtype, got.shape, got.tobytes()) == (
            wanted.dtype,
            wanted.shape,
            wanted.tobytes(),
        )
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]


def test_float64_stays_float64(results, tmp_path):
    with jax.enable_x64(True):
        lam = results["llc"]._replace(mean=jnp.asarray(1 / 3, jnp.float64))
        jp.save(tmp_path / "x", lam)
        assert jp.load(tmp_path / "x").mean.dtype == jnp.float64
    assert float(jp.load(tmp_path / "x").mean) == 1 / 3


def test_a_file_says_where_its_numbers_are_from(response, tmp_path):
    jp.save(tmp_path / "x.npz", response, provenance={"model": "toy", "seed": 3})
    about = jp.results.provenance(tmp_path / "x.npz")
    assert about["kind"] == "Response"
    assert about["units"]["chi"] == "observable × loss (nats), no factor nβ"
    assert about["jaxpattern"] == jp.__version__
    assert (about["model"], about["seed"]) == ("toy", 3)
    assert set(about) >= {"jax", "backend", "saved"}
    # Readable without this package, and without pickle.
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        chi = [file[name] for name in file.files if name.endswith("chi p q")]
    np.testing.assert_array_equal(chi[0], response.chi["p/q"])


@pytest.fixture
def saved(results, tmp_path):
    jp.save(tmp_path / "x.npz", results["llc"])
    return tmp_path / "x.npz"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(share, saved):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(jp.ResultFileError, match="is damaged"):
        jp.load(saved)


def test_any_byte_that_is_changed_is_noticed_or_means_nothing(saved, results):
    """Some bytes of an archive, such as its times, carry no number."""
    content, noticed = saved.read_bytes(), 0
    positions = RNG.choice(len(content), size=150, replace=False)
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        saved.write_bytes(bytes(damaged))
        try:
            back = jp.load(saved)
        except jp.ResultFileError:
            noticed += 1
        else:
            for got, wanted in zip(back, results["llc"], strict=True):
                np.testing.assert_array_equal(got, wanted)
    assert noticed > len(positions) / 2


def rewritten(path, change):
    """The file with another header, sealed as `save` seals it."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(json.loads(arrays.pop("header").tobytes())["header"])
    text = json.dumps(header | change)
    sealed = json.dumps({"header": text, "checksum": _checksum(text, arrays)}).encode()
    np.savez(path, header=np.frombuffer(sealed, np.uint8), **arrays)


@pytest.mark.parametrize(("change", "match"), [
    ({"format": 2}, r"has format 2, written by jaxpattern \S+; this version reads 1"),
    ({"kind": "Trace"}, "holds a 'Trace', which this version does not know"),
    ({"content": {}}, r"holds the fields \[\], a LocalLearningCoefficient has"),
])  # fmt: skip
def test_other_versions(change, match, saved):
    rewritten(saved, change)
    with pytest.raises(jp.ResultFileError, match=match):
        jp.load(saved)


def test_files_of_others(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.save(tmp_path / "plain.npy", np.ones(3))
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("header.npy", b"nothing")
    for path in tmp_path.iterdir():
        with pytest.raises(jp.ResultFileError, match=r"no result of this package|is damaged"):
            jp.load(path)
    with pytest.raises(FileNotFoundError):
        jp.load(tmp_path / "missing.npz")


def test_pickles_in_an_archive_are_not_run(tmp_path):
    stream = io.BytesIO()
    np.savez(stream, header=np.asarray([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "x.npz").write_bytes(stream.getvalue())
    with pytest.raises(jp.ResultFileError, match="allow_pickle=False"):
        jp.load(tmp_path / "x.npz")


def test_a_failed_save_leaves_the_file_as_it_was(saved, results, monkeypatch):
    before = saved.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        jp.save(saved, results["llc"])
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["x.npz"]


def test_bad_results(results, tmp_path):
    with pytest.raises(TypeError):
        jp.save(tmp_path / "x", {"chi": jnp.ones(3)})
    with pytest.raises(TypeError, match="provenance must be what JSON can hold"):
        jp.save(tmp_path / "x", results["llc"], provenance={"loss": jnp.ones(3)})

    def traced(mean):
        jp.save(tmp_path / "x", results["llc"]._replace(mean=mean))
        return mean

    with pytest.raises(TypeError, match="cannot be saved under jit"):
        jax.jit(traced)(jnp.ones(()))
    assert not list(tmp_path.iterdir())
