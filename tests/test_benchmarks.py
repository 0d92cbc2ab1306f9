"""What the benchmarks compute beside the library: the torch port, the formula of devinterp."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import devinterp_draws as devinterp
import floor
import fresh_circuit
import growth
import jaxpattern as jp
import lds
import lds_methods
import measure
import reweighting
import reweighting_methods
import stages
import table
import training_response
from jaxpattern.models import transformer

CONFIG = transformer.TransformerConfig(
    vocab_size=16, context=8, num_layers=2, num_heads=2, d_model=8, mlp_width=16,
    positions="learned",
)  # fmt: skip


def stored_losses(draws=200):
    """Losses of the size of a language model's, that hardly move, and a φ with an offset."""
    rng = np.random.default_rng(0)
    probes = 3 + 1e-3 * rng.normal(size=(draws, 4, 5))
    reference = 3.2 + 1e-3 * rng.normal(size=draws) + 0.5 * (probes.mean((1, 2)) - 3)
    full = reference.mean() - probes.mean(0) + 1e-4 * rng.normal(size=(4, 5))
    return reference - 3.1, reference, probes, full


def test_the_hybrid_form_is_that_of_devinterp():
    arguments = stored_losses()
    wanted = devinterp.published_hybrid(*arguments)
    ours = devinterp.hybrid_from_moments(*(np.asarray(x, np.float32) for x in arguments))
    # Losses of 3 are stored with an error of 1.2e-7, and multiplied by φ of 0.1.
    np.testing.assert_allclose(ours, wanted, atol=5e-8)
    assert np.abs(wanted).max() > 1e-6


def test_the_covariance_of_stored_draws():
    rng = np.random.default_rng(1)
    shapes = {"loss_train": (2, 6, 3, 5), "loss_probes": (2, 6, 4, 5)}
    losses = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    arrays = losses | {"init_loss": np.array([0.3, 0.5])}
    tree = SimpleNamespace(dataset={n: SimpleNamespace(values=x) for n, x in arrays.items()})
    (chi,) = devinterp.covariance_of({"l0h0": tree}, ["l0h0"])
    level = losses["loss_train"].mean((2, 3)).ravel()
    deviations = losses["loss_probes"].reshape(12, 20) - level[:, None]
    wanted = -np.cov(level, deviations.T)[0, 1:].reshape(4, 5)
    np.testing.assert_allclose(chi, wanted, rtol=1e-10)


def test_a_false_claim_fails_and_rows_are_kept(tmp_path, capsys):
    options = measure.parser("A test.").parse_args(["--quick", "--out", str(tmp_path)])
    report = measure.Report("test", options)
    report.add("a line", ratio=2.0)
    report.claim("1 < 2", True)
    assert report.close() == 0
    report.claim("2 < 1", False)
    assert report.close() == 1
    (row,) = report.rows()
    assert row["ratio"] == 2.0
    assert row == json.loads((tmp_path / "test.jsonl").read_text())
    assert "NOT MET: 2 < 1" in capsys.readouterr().out


LATE = """
import os
import jax.numpy as jnp
print(jnp.ones(3).sum())  # threads are there before the process is pinned
import measure
measure.pin()
print(*(sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads Linux's list of threads")
def test_every_thread_is_held_to_one_core(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    folder = os.path.dirname(measure.__file__)
    env = {k: v for k, v in os.environ.items() if k != measure.PINNED} | {"PYTHONPATH": folder}
    out = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert set(out[-1].split()) == {f"[{max(os.sched_getaffinity(0))}]"}


@pytest.mark.parametrize("part", [floor.moment_update, floor.inversion])
def test_both_sides_of_the_floor_run(part):
    timing = measure.in_turn(part(3, 64, 20), repeats=2)
    assert set(timing) == {"jaxpattern", "bare"}
    assert all(len(side.all) == 2 and min(side.all) >= 0 for side in timing.values())


def test_mixtures_are_brought_to_one_distance():
    weights = np.array([0.5, 1.5, 0.8, 1.2])
    for distance in (0.01, 0.2):
        tilted = reweighting.at_distance(weights, distance)
        assert reweighting.divergence(tilted) == pytest.approx(distance, rel=1e-6)
        assert tilted.mean() == pytest.approx(1)
        assert (np.argsort(tilted) == np.argsort(weights)).all()


def test_the_steepest_way_that_holds():
    """To first order, none of the same length falls further where the held loss may not rise."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        slopes = rng.normal(size=(4, 4))
        logs = np.log(reweighting_methods.steepest(slopes, reweighting_methods.Wish(2, 0)))
        way = logs - logs.mean()
        fall, held = slopes[2] @ way, slopes[0] @ way
        assert held <= 1e-12
        other = rng.normal(size=(500, 4))
        other -= other.mean(axis=1, keepdims=True)
        other *= np.linalg.norm(way) / np.linalg.norm(other, axis=1, keepdims=True)
        assert fall <= (other[other @ slopes[0] <= 0] @ slopes[2]).min() + 1e-12


def test_better_at_equal_held_loss():
    def row(target, held):
        return {"target_by_seed": target, "held_by_seed": held}

    base = row([0.0, 0.1, 0.2], [0.0, 0.1, 0.2])
    lower = row([-0.1, 0.0, 0.12], [0.0, 0.1, 0.2])  # lower by .1, .1, .08: by 14 errors
    assert reweighting.better(lower, base, 13)
    assert not reweighting.better(lower, base, 15)
    assert not reweighting.better(base, lower, 0)
    assert not reweighting.better(row([-0.1, 0.0, 0.12], [0.1, 0.21, 0.31]), base, 1)


def test_what_took_long_is_kept_for_the_same_settings(tmp_path):
    def kept(**settings):
        return stages.Stages(tmp_path, settings).stage

    found = kept(steps=3)("name", lambda: {"x": np.arange(3.0), "cost": 2.0})
    np.testing.assert_array_equal(found["x"], np.arange(3.0))
    assert float(found["cost"]) == 2.0
    again = kept(steps=3)("name", lambda: pytest.fail("made again"))
    np.testing.assert_array_equal(again["x"], np.arange(3.0))
    assert kept(steps=4)("name", lambda: {"x": np.ones(2)})["x"].shape == (2,)


def test_rank_correlations_and_their_ceiling():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 40, 3))
    a[:5] = a[0]  # ties
    wanted = [scipy.stats.spearmanr(a[:, k], b[:, k]).statistic for k in range(3)]
    np.testing.assert_allclose(lds.spearman(a, b), wanted, rtol=1e-12)
    # Two seeds of as much noise as signal agree by ½, their mean correlates with the truth by √⅔;
    # ranks of normal variables by a little less, (6/π) asin(r/2).
    truth = rng.normal(size=(100_000, 1, 1))
    realised = truth + rng.normal(size=(100_000, 2, 1))
    agreement = 6 / np.pi * np.arcsin(0.25)
    wanted = np.sqrt(2 * agreement / (1 + agreement))
    np.testing.assert_allclose(lds.ceiling(realised), wanted, atol=0.01)  # five errors


def test_attributions_by_gradients():
    rng = np.random.default_rng(4)
    held, data = rng.normal(size=(3, 50)), rng.normal(size=(8, 50))
    wanted = [[-x @ y / np.sqrt((x @ x) * (y @ y)) for y in data] for x in held]
    np.testing.assert_allclose(lds_methods.cosine(held, data), wanted, rtol=1e-12)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (50, 12)) / np.sqrt(12)
    few, many = held @ signs, data @ signs
    gram = many @ many.T
    inner = np.linalg.inv(gram + np.trace(gram) / 12 * np.eye(8))  # the same, by windows
    np.testing.assert_allclose(lds_methods.trak(held, data, 12), -few @ many.T @ inner, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [reweighting, lds])
def test_benchmarks_of_data_run(benchmark, tmp_path):
    benchmark.main(["--tiny", "--out", str(tmp_path)])
    name = benchmark.__name__
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert (tmp_path / f"{name}.png").exists()
    if benchmark is reweighting:
        arms = [row for row in rows if "method" in row]
        assert len(arms) == 3 * 12
        for row in arms:
            assert np.mean(row["weights"], axis=1) == pytest.approx(np.ones(4), abs=1e-4)
            assert row["cost"] > 0
            assert np.isfinite([row["target"], row["held"], row["mean"]]).all()
    else:
        assert [row["method"] for row in rows[:2]] == ["ceiling", "random"]
        assert all(abs(row["lds"]) <= 1 for row in rows if "lds" in row)


@pytest.mark.slow
def test_the_benchmark_of_the_training_response_runs(tmp_path):
    training_response.main(["--tiny", "--out", str(tmp_path)])
    lines = (tmp_path / "training_response.jsonl").read_text().splitlines()
    *ways, claims = map(json.loads, lines)
    assert [row["way"] for row in ways] == ["derivative", "twins"]
    assert ways[0]["realized"] == ways[1]["realized"]
    assert np.isfinite([row["predicted"] for row in ways]).all()
    assert claims["number"] == 4


@pytest.mark.slow
def test_the_benchmark_of_the_fresh_circuit_runs(tmp_path):
    assert fresh_circuit.main(["--tiny", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "fresh_circuit.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert min(row["shares"]) >= 0.6 - 1e-6
        assert np.shape(row["weights"]) == (4, 10)
        assert row["steps_of_measuring"] == 2 * 4 * 2 * (21 + 3)


def test_exponents_of_power_laws():
    x = [1.0, 2.0, 4.0]
    assert growth.exponent(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)


@pytest.mark.torch
def test_the_torch_model_is_the_same():
    import torch_model

    loss_fn = transformer.make_loss_fn(CONFIG)
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 16)
    worst = torch_model.check_port(loss_fn, transformer.init(jax.random.key(0), CONFIG), tokens)
    assert max(worst) <= 1e-5


@pytest.mark.torch
def test_the_masks_select_one_head():
    import torch_model

    params = transformer.init(jax.random.key(0), CONFIG)
    model = torch_model.to_torch(params, CONFIG)
    masks = torch_model.head_masks(model, "l1h0")
    model.load_state_dict(
        {n: x * ~masks[n] if n in masks else x for n, x in model.state_dict().items()}
    )
    wanted = jax.tree.map(jnp.copy, params)
    for name in "qkvo":
        attn = wanted["layers"]["1"]["attn"]
        attn[name] = attn[name].at[0].set(0.0)
    jax.tree.map(np.testing.assert_array_equal, torch_model.from_torch(model), wanted)


@pytest.mark.torch
def test_masks_of_a_neox_select_what_the_component_holds(tmp_path):
    """A head is moved in a folder by us; its masks are where the tensors of torch differ."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    import lm_models

    import devinterp_pythia as pythia

    folder = lm_models.folder_of("pythia", tmp_path / "start")
    model = jp.lm.load(folder)
    head = jp.component(model, "l1h2")
    moved = head.embed(jax.tree.map(lambda x: x + 1, head.select(model.params)), model.params)
    jp.lm.save(model, tmp_path / "moved", moved)
    before, after = (pythia.torch_model(f) for f in (folder, tmp_path / "moved"))
    masks = pythia.head_masks(before, "l1h2")
    for name, x in before.named_parameters():
        changed = (x != after.get_parameter(name)).numpy(force=True)
        wanted = masks[name].numpy() if name in masks else np.zeros(x.shape, bool)
        np.testing.assert_array_equal(changed, wanted, err_msg=name)


@pytest.mark.torch
@pytest.mark.slow
def test_the_pythia_benchmark_runs(tmp_path, capsys):
    for name in ("devinterp", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import devinterp_pythia as pythia

    pythia.main(["--tiny", "--out", str(tmp_path)])
    rows = table.read(tmp_path / "devinterp_pythia.jsonl")
    capsys.readouterr()
    (hybrid,) = (row for row in rows if row["part"] == "hybrid")
    assert max(hybrid["ours"], hybrid["theirs"]) <= 1e-6
    assert hybrid["size"] > 0
    assert {row["over"] for row in rows if row["part"] == "gain"} == {
        "devinterp", "devinterp, centred",
    }  # fmt: skip
