"""Interrupted runs: resumed to the same bits, whatever stopped them and wherever."""

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import checkpoint_program as program
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_program import DRIVERS
from jaxtyping import config
from support import Crash, doomed, interrupted, often, same, stop_after

import jaxpattern as jp
from jaxpattern.runtime import host
from jaxpattern.runtime.checkpoint import Stage, open_store
from jaxpattern.runtime.fingerprint import differences, fingerprint

PROGRAM = Path(program.__file__)
KEPT = ("manifest.json", "lock")


@pytest.fixture(scope="module")
def wanted():
    """The results of runs without a folder."""
    results = {}

    def of(driver):
        if driver not in results:
            # Where two component groups are compiled, chunks save compiling a loop of all draws.
            chunks = {"progress": True} if driver in ("covariance", "tangent") else {}
            results[driver] = DRIVERS[driver](**chunks)
        return results[driver]

    return of


def positions(folder):
    """Stage → positions it holds."""
    return {
        stage.name: sorted(int(p.name) for p in stage.iterdir() if p.name.isdigit())
        for stage in sorted(folder.iterdir())
        if stage.is_dir()
    }


# The same bits


@pytest.mark.parametrize(
    "driver", [pytest.param(d, marks=pytest.mark.slow) if d == "tangent" else d for d in DRIVERS]
)
def test_stopped_at_every_boundary(driver, wanted, tmp_path, monkeypatch):
    """Each process computes one chunk and dies; the last one finds all done and computes none."""
    for _ in range(40):
        try:
            with monkeypatch.context() as patch:
                calls = stop_after(patch, 1)
                got = DRIVERS[driver](checkpoint=often(tmp_path))
            break
        except Crash:
            continue
    assert calls == []
    same(got, wanted(driver))
    assert all(len(kept) == 1 for kept in list(positions(tmp_path).values())[:-1])
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == set(KEPT)


@pytest.mark.parametrize("driver", ["sample", "train"])
def test_chunks_do_not_change_a_bit(driver, wanted, tmp_path, monkeypatch):
    """Chunks of random sizes, and a process that dies now and then."""
    rng = random.Random(5)

    monkeypatch.setattr(
        host._Pace, "reach", lambda pace, position, total, steps: position + rng.randint(1, 3)
    )
    crashes = 0
    while True:
        try:
            with monkeypatch.context() as patch:
                stop_after(patch, rng.randint(1, 2))
                got = DRIVERS[driver](checkpoint=often(tmp_path))
            break
        except Crash:
            crashes += 1
    assert 1 < crashes < 10
    same(got, wanted(driver))


def test_chunks_grow_until_they_take_their_time(tmp_path):
    """A run that is fast against the interval is cut into few chunks."""
    with host.host_for(
        "test", checkpoint=jp.Checkpoint(tmp_path, 60.0), mesh=None, progress=False
    ) as here:
        sizes = []

        def advance(state, a, b):
            sizes.append(b - a)
            return state + (b - a)

        assert here.loop("loop", 1000, lambda: jnp.zeros(()), advance) == 1000
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256, 489]


def test_a_long_interval_saves_only_the_end(wanted, tmp_path):
    same(DRIVERS["llc"](checkpoint=tmp_path), wanted("llc"))
    assert positions(tmp_path) == {"000-LLC": [9]}


def test_two_newest_are_kept(monkeypatch, tmp_path):
    interrupted(monkeypatch, "llc", tmp_path, saves=5)
    assert positions(tmp_path) == {"000-LLC": [4, 5]}


def test_a_lost_chain_stays_lost(tmp_path, monkeypatch):
    """NaN before the interruption: the warning and the numbers are those of the whole run."""

    def run(**settings):
        return jp.llc(
            program.key(), program.posterior(), doomed(step=6, share=0.5),
            replace(program.PLAN, num_chains=6), progress=False, **settings,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Crash):
            run(checkpoint=often(tmp_path))
    with pytest.warns(jp.DivergenceWarning, match="chains") as caught:
        got = run(checkpoint=tmp_path)
    with pytest.warns(jp.DivergenceWarning, match="chains") as expected:
        whole = run()
    assert str(caught[0].message) == str(expected[0].message)
    assert 0 < int(whole.diverged.sum()) < 6
    same(got, whole)
    assert np.isnan(np.asarray(got.trace)).any()


def test_states_with_keys_and_empty_arrays(tmp_path):
    state = {
        "key": jax.random.key(1, impl="rbg"),
        "keys": jax.random.split(jax.random.key(2), 3),
        "none": jnp.zeros((2, 0)),
        "half": jnp.asarray([1.5, -0.0, jnp.nan], jnp.bfloat16),
        "flag": jnp.asarray(True),
    }
    for attempt in range(2):
        with open_store(often(tmp_path), "test") as store:
            stage = store.stage("loop", 2)
            position, got = stage.resume(lambda: state)
            assert position == attempt
            stage.save(1, got)
    assert jax.random.key_impl(got["key"]) == "rbg"
    as_data = lambda t: {**t, "key": jax.random.key_data(t["key"]),  # noqa: E731
                         "keys": jax.random.key_data(t["keys"])}  # fmt: skip
    same(as_data(got), as_data(state))


# Processes that are killed


def start(driver, folder, devices=1):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    parent = folder.parent
    # To a file: nobody empties a pipe while the process is watched.
    with open(parent / "errors", "w") as errors:
        return subprocess.Popen(
            [sys.executable, PROGRAM, driver, folder, parent / "log", parent / "result.npz", "0"],
            env=environment, stdout=errors, stderr=errors,
        )  # fmt: skip


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def chunks_of(log):
    return sum(line.startswith("computed") for line in lines(log))


def kill_and_resume(driver, folder, kills, seed):
    """Kill a run that many times at random moments, then let it end; returns its log."""
    rng, log = random.Random(seed), folder.parent / "log"
    killed = 0
    for attempt in range(3 * kills + 3):
        wanted = chunks_of(log) + rng.randint(1, 3)
        process = start(driver, folder, devices=1 + attempt % 3)
        early = killed % 7 == 3  # some die while they start
        if killed < kills:
            while process.poll() is None and not early and chunks_of(log) < wanted:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 2.0 if early else 0.3))
            process.kill()
        if process.wait(timeout=300) == 0:
            break
        assert process.returncode == -signal.SIGKILL, (folder.parent / "errors").read_text()
        killed += 1
    assert process.returncode == 0
    return killed


def check_log(log, kills):
    """Nothing before the last save is computed again."""
    saved, computed = {}, 0
    for line in lines(log):
        event, stage, position = line.split()
        if event == "resumed":
            assert int(position) >= saved.get(stage, 0)
        elif event == "computed":
            computed += 1
            assert int(position) > saved.get(stage, 0)
        else:
            saved[stage] = int(position)
    # One chunk at most is lost to each kill.
    assert sum(saved.values()) <= computed <= sum(saved.values()) + kills


def check_result(folder, wanted):
    with np.load(folder.parent / "result.npz") as file:
        same([file[name] for name in file.files], jax.tree.leaves(wanted))


def test_killed_processes(wanted, tmp_path):
    """On 1, 2 and 3 devices in turn."""
    killed = kill_and_resume("llc", tmp_path / "run", kills=3, seed=1)
    check_log(tmp_path / "log", killed)
    check_result(tmp_path / "run", wanted("llc"))


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
def test_killed_processes_of_every_driver(driver, wanted, tmp_path):
    """At least twenty kills, over as many runs from the start as it takes."""
    total, seed = 0, 0
    while total < 20:
        seed += 1
        for name in ("log", "result.npz"):
            (tmp_path / name).unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        killed = kill_and_resume(driver, tmp_path / "run", kills=20 - total, seed=seed)
        check_log(tmp_path / "log", killed)
        check_result(tmp_path / "run", wanted(driver))
        total += killed
    print(f"{driver}: {total} kills in {seed} runs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(number, wanted, tmp_path, monkeypatch):
    """At the next boundary, although the interval is far from over."""
    save, seen = Stage.save, []

    def signalled(stage, position, state):
        seen.append(position)
        if len(seen) == 2:
            os.kill(os.getpid(), number)
        save(stage, position, state)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "save", signalled)
        with pytest.raises(jp.Interrupted, match=rf"{number.name}.*the same call goes on"):
            DRIVERS["llc"](checkpoint=tmp_path)
    assert signal.getsignal(number) is before
    (saved,) = positions(tmp_path).values()
    assert saved == seen[1:]
    same(DRIVERS["llc"](checkpoint=tmp_path), wanted("llc"))


@pytest.fixture
def interruptible():
    """SIGINT raises, also where the tests run in the background and it was left to be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_that_meet_no_chunk(tmp_path, interruptible):
    """One that comes after the last chunk is not lost, and a second one acts at once."""
    store = open_store(often(tmp_path), "test")
    noted = store.__enter__()
    os.kill(os.getpid(), signal.SIGINT)
    assert noted.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        store.__exit__(None, None, None)
    with open_store(often(tmp_path), "test") as store:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        store.signal = 0


def test_other_threads_can_keep_runs_too(wanted, tmp_path):
    """They catch no signals."""
    with ThreadPoolExecutor(1) as pool:
        same(pool.submit(DRIVERS["train"], checkpoint=tmp_path).result(), wanted("train"))


def test_sigterm_of_a_process(tmp_path):
    process = start("train", tmp_path / "run")
    while process.poll() is None and not chunks_of(tmp_path / "log"):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    if process.wait(timeout=120) == 0:
        pytest.skip("the run was over before the signal came")
    errors = (tmp_path / "errors").read_text()
    assert "jaxpattern.runtime.folder.Interrupted: the run was stopped by SIGTERM" in errors
    last = int(lines(tmp_path / "log")[-1].split()[-1])
    assert positions(tmp_path / "run")["000-training"][-1] == last


# Damaged checkpoints


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def damage_zero(path):
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_zero, Path.unlink])
def test_a_damaged_checkpoint_falls_back(damage, wanted, tmp_path, monkeypatch):
    """Whichever of its files is damaged, the one before is taken, and the result is the same."""
    interrupted(monkeypatch, "train", tmp_path / "run", saves=5)
    newest = Path("000-training", f"{5:012d}")
    files = sorted(p for p in (tmp_path / "run" / newest).rglob("*") if p.is_file())
    noticed = 0
    for i, file in enumerate(files):
        if not file.stat().st_size:
            continue
        copy = tmp_path / f"copy{i}"
        shutil.copytree(tmp_path / "run", copy)
        damage(copy / newest / file.relative_to(tmp_path / "run" / newest))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            same(DRIVERS["train"](checkpoint=copy), wanted("train"))
        said = [str(w.message) for w in caught if w.category is jp.CheckpointWarning]
        assert all("is damaged and left out" in message for message in said)
        noticed += len(said)
    assert noticed == sum(file.stat().st_size > 0 for file in files)


def test_any_bit_of_a_large_array_is_looked_at(tmp_path):
    """Orbax alone loads flipped numbers without a word."""
    state = {"w": jax.random.normal(jax.random.key(0), (200, 300)), "b": jnp.zeros(3)}

    def resume():
        with open_store(often(tmp_path), "test") as store:
            return store.stage("loop", 9).resume(lambda: jax.tree.map(jnp.zeros_like, state))

    with open_store(often(tmp_path), "test") as store:
        store.stage("loop", 9).save(1, state)
    position, got = resume()
    assert position == 1
    same(got, state)
    large = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    assert large.stat().st_size > 200_000
    damage_flip(large)
    with pytest.warns(jp.CheckpointWarning, match=r"damaged and left out.*checksum of .* wrong"):
        assert resume()[0] == 0


def test_states_of_optimizers_and_their_types(tmp_path):
    """Restored as what they are: named tuples, counts, schedules."""
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.zeros(2)}
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(0.1, 0.0, 9)))
    state = optimizer.init(params)
    _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    with open_store(often(tmp_path), "test") as store:
        store.stage("loop", 2).save(1, state)
    with open_store(often(tmp_path), "test") as store:
        _, got = store.stage("loop", 2).resume(lambda: optimizer.init(params))
    assert jax.tree.structure(got) == jax.tree.structure(state)
    same(got, state)


def test_a_save_that_orbax_cannot_do_is_a_warning(tmp_path, monkeypatch):
    """Whatever fails within it, the checkpoint before is as it was and nothing is left behind."""
    from orbax.checkpoint import v1 as ocp

    def failing(path, content, **settings):
        Path(path).mkdir()
        (Path(path) / "half").write_text("")
        raise ValueError("quota exceeded")

    with open_store(often(tmp_path), "test") as store:
        stage = store.stage("loop", 9)
        stage.save(1, jnp.ones(3))
        monkeypatch.setattr(ocp, "save", failing)
        with pytest.warns(jp.CheckpointWarning, match=r"quota exceeded.*positions 1\)"):
            stage.save(2, jnp.ones(3))
    assert [p.name for p in (tmp_path / "000-loop").iterdir()] == [f"{1:012d}"]


def test_all_checkpoints_damaged_starts_again(wanted, tmp_path, monkeypatch):
    interrupted(monkeypatch, "train", tmp_path, saves=5)
    for path in tmp_path.glob("000-training/*"):
        shutil.rmtree(path / "state")
    with pytest.warns(jp.CheckpointWarning) as caught:
        same(DRIVERS["train"](checkpoint=tmp_path), wanted("train"))
    assert len(caught) == 2


def test_a_damaged_manifest_is_refused(tmp_path, monkeypatch):
    interrupted(monkeypatch, "train", tmp_path)
    damage_truncate(tmp_path / "manifest.json")
    with pytest.raises(jp.CheckpointError, match=r"manifest.json cannot be read"):
        DRIVERS["train"](checkpoint=tmp_path)


def test_another_format_is_refused(tmp_path, monkeypatch):
    interrupted(monkeypatch, "train", tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(jp.CheckpointError, match="has format 99, this version reads 2"):
        DRIVERS["train"](checkpoint=tmp_path)


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB that is full after some saves."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(path):
    """Write until there is no space."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return path


def test_a_full_disk_does_not_stop_a_run(small_disk, wanted, monkeypatch):
    """It warns, goes on, leaves what was saved as it was, and saves again when there is room."""
    interrupted(monkeypatch, "train", small_disk / "run")
    before = positions(small_disk / "run")
    filler = fill(small_disk / "filler")
    with pytest.warns(
        jp.CheckpointWarning, match=r"could not be saved.*where 0.0 MiB are free"
    ) as caught:
        same(DRIVERS["train"](checkpoint=often(small_disk / "run")), wanted("train"))
    assert len(caught) == 6
    assert positions(small_disk / "run") == before
    assert "positions 3, 2" in str(caught[-1].message)
    filler.unlink()
    same(DRIVERS["train"](checkpoint=often(small_disk / "run")), wanted("train"))
    assert positions(small_disk / "run") == {"000-training": [8, 9]}


def test_a_full_disk_at_the_start_is_refused(small_disk):
    fill(small_disk / "filler")
    with pytest.raises(jp.CheckpointError, match=r"cannot be written to.*No space left"):
        DRIVERS["train"](checkpoint=small_disk / "run")


def test_read_only_folders(small_disk, wanted, monkeypatch):
    """What is complete can be read from one; what is not is refused before any work."""
    same(DRIVERS["train"](checkpoint=small_disk / "done"), wanted("train"))
    interrupted(monkeypatch, "train", small_disk / "half")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    same(DRIVERS["train"](checkpoint=small_disk / "done"), wanted("train"))
    for folder in ("half", "new"):
        with pytest.raises(jp.CheckpointError, match="cannot be written to"):
            DRIVERS["train"](checkpoint=small_disk / folder)


# Whose folder it is


def test_a_second_process_is_refused(tmp_path):
    """While the first one lives, and no longer."""
    holder = subprocess.Popen(
        [sys.executable, "-c", (
            "import fcntl, sys, time\n"
            "lock = open(sys.argv[1], 'a+')\n"
            "fcntl.flock(lock, fcntl.LOCK_EX)\n"
            "lock.write('process 7 on there')\n"
            "lock.flush()\n"
            "print('held', flush=True)\n"
            "time.sleep(600)\n"
        ), str(tmp_path / "lock")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(jp.CheckpointError, match="is in use by process 7 on there"):
        DRIVERS["train"](checkpoint=tmp_path)
    holder.kill()
    holder.communicate()
    DRIVERS["train"](checkpoint=tmp_path)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("\\documentclass")
    with pytest.raises(jp.CheckpointError, match=r"holds other files \(thesis.tex\)"):
        DRIVERS["train"](checkpoint=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "\\documentclass"


def test_another_driver_is_refused(tmp_path):
    DRIVERS["llc"](checkpoint=tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != "lock"}
    with pytest.raises(jp.CheckpointError, match="driver: 'llc' there, 'sample' here"):
        DRIVERS["sample"](checkpoint=tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != "lock"}


def other_loss(params, batch):
    return 0.25 * (batch["x"] @ params["a"] + params["b"].sum() - batch["y"]) ** 2


SCALE = 2.0


def scaled_loss(params, batch):
    return SCALE * program.loss_fn(params, batch)


def closed_over(scale):
    return lambda params, batch: scale * program.loss_fn(params, batch)


BASE = {
    "loss_fn": program.loss_fn, "params": program.PARAMS, "data": program.DATA, "weights": None,
    "nbeta": 6.0, "localization": 10.0, "sampler": program.SAMPLER, "plan": program.PLAN,
    "estimator": jp.covariance(), "components": program.COMPONENTS, "reference": None,
    "observables": {"f": program.weights_of}, "probes": {"p": program.DATA}, "seed": 3,
}  # fmt: skip


def fingerprint_of(**changes):
    """What `susceptibilities` is told apart by, without a run."""
    s = BASE | changes
    posterior = jp.localized_posterior(
        s["loss_fn"], s["params"], s["data"],
        nbeta=s["nbeta"], localization=s["localization"], weights=s["weights"],
    )  # fmt: skip
    names = ("sampler", "plan", "estimator", "components", "reference", "observables", "probes")
    return fingerprint(
        key=jax.random.key(s["seed"]), posterior=posterior, **{name: s[name] for name in names}
    )


def moved(tree, amount=1e-6):
    return jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(amount), tree)


@pytest.mark.parametrize(("changes", "path"), [
    ({"seed": 4}, "key"),
    ({"params": moved(program.PARAMS)}, "posterior.params.a"),
    ({"data": moved(program.DATA)}, "posterior.data.x"),
    ({"weights": jnp.arange(5.0)}, "posterior.weights"),
    ({"nbeta": 7.0}, "posterior.nbeta"),
    ({"localization": 7.0}, "posterior.localization"),
    ({"loss_fn": other_loss}, "posterior.loss_fn"),
    ({"sampler": jp.sgld(step_size=0.02)}, "sampler.algorithm.step_size"),
    ({"sampler": jp.rmsprop_sgld(step_size=0.01)}, "sampler.algorithm"),
    ({"plan": replace(program.PLAN, thin=3)}, "plan.thin"),
    ({"plan": replace(program.PLAN, num_draws=8)}, "plan.num_draws"),
    ({"estimator": jp.covariance(form="hybrid")}, "estimator.form"),
    ({"estimator": jp.pathwise(window=3)}, "estimator"),
    ({"observables": {"g": program.weights_of}}, "observables.g"),
    ({"observables": {"f": lambda p: p["b"]}}, "observables.f"),
    ({"observables": {"f": jp.mean_loss(program.loss_fn, program.DATA)}}, "observables.f"),
    ({"probes": {"r": program.DATA}}, "probes.r"),
    ({"probes": {"p": moved(program.DATA)}}, "probes.p.x"),
    ({"reference": program.DATA}, "reference"),
    ({"components": None}, "components"),
    ({"components": {"a": jp.by_slice({"a": (0, 1)}), "b": jp.by_path("b")}},
     "components.a.select"),
])  # fmt: skip
def test_everything_that_matters_tells_runs_apart(changes, path):
    changed = differences(fingerprint_of(), fingerprint_of(**changes))
    assert path in {line.split(":")[0] for line in changed}


def test_settings_of_a_function_tell_runs_apart(monkeypatch):
    """What a loss closes over, its globals, and arrays that an observable holds."""
    changed = differences(
        fingerprint_of(loss_fn=closed_over(1.0)), fingerprint_of(loss_fn=closed_over(2.0))
    )
    assert changed == ["posterior.loss_fn.scale: 1.0 there, 2.0 here"]
    before = fingerprint_of(loss_fn=scaled_loss)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    (line,) = differences(before, fingerprint_of(loss_fn=scaled_loss))
    assert line == "posterior.loss_fn.SCALE: 2.0 there, 3.0 here"
    pair = (
        fingerprint_of(observables={"f": jp.mean_loss(program.loss_fn, batch)})
        for batch in (program.DATA, program.DATA | {"x": moved(program.DATA["x"])})
    )
    (line,) = differences(*pair)
    assert line.startswith("observables.f.batch.x: float32[5, 3] ")


def test_the_code_of_a_users_module_and_class_tell_runs_apart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = "class Model:\n    scale = 2\n    def __call__(self, x):\n        return {} * x\n"
    seen = []
    for factor in ("2", "33"):
        (tmp_path / "users_model.py").write_text(source.format(factor))
        importlib.invalidate_caches()
        sys.modules.pop("users_model", None)
        module = importlib.import_module("users_model")
        seen.append(fingerprint(module=module, model=module.Model()))
    sys.modules.pop("users_model")
    changed = {line.split(":")[0] for line in differences(*seen)}
    assert changed == {"module", "model.Model.__call__"}


def test_settings_of_training_tell_runs_apart():
    one, two = (fingerprint(optimizer=optax.adamw(rate)) for rate in (1e-3, 1e-2))
    (line,) = differences(one, two)
    assert line.startswith("optimizer.update")
    assert line.endswith("step_size: -0.001 there, -0.01 here")
    schedules = (optax.linear_schedule(0.1, 0.0, steps) for steps in (10, 20))
    assert len(differences(*(fingerprint(optimizer=optax.sgd(s)) for s in schedules))) == 1


def test_a_fingerprint_is_the_same_in_another_process():
    """No address, no order of a set, no count of calls gets into it."""
    code = (
        "import json, test_checkpoint as t\n"
        "from jaxpattern.runtime.fingerprint import fingerprint\n"
        "import optax, checkpoint_program as program\n"
        "lines = t.fingerprint_of(loss_fn=t.scaled_loss, estimator=t.jp.pathwise())\n"
        "lines |= fingerprint(optimizer=optax.adamw(1e-3), vocabulary=t.among)\n"
        "print(json.dumps(lines))\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=PROGRAM.parent, check=True, capture_output=True,
            text=True, env=os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert outputs[0] == outputs[1]


def among(word):
    return word in {"many", "words", "in", "a", "set"}


def test_weights_of_another_run_are_refused(tmp_path, monkeypatch):
    """The message names what differs, and nothing else."""
    interrupted(monkeypatch, "train", tmp_path)
    settings = dict(num_steps=9, batch_size=3, metrics=program.weights_of, record_every=2)
    with pytest.raises(jp.CheckpointError) as error:
        jp.train(
            program.key(), program.loss_fn, program.PARAMS, program.DATA, program.OPTIMIZER,
            weights=jnp.arange(5.0), checkpoint=tmp_path, progress=False, **settings,
        )  # fmt: skip
    message = str(error.value).splitlines()
    assert len(message) == 2
    assert message[1].startswith("  weights: float32[5] ")


# Where it makes no sense


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_traced_runs_are_refused(transform, tmp_path):
    def run(nbeta):
        posterior = replace(program.posterior(), nbeta=nbeta)
        return jp.llc(
            program.key(), posterior, program.SAMPLER, program.PLAN, checkpoint=tmp_path / "run"
        ).mean

    with pytest.raises(TypeError, match="checkpoint cannot be given under jit, vmap or grad"):
        transform(run)(jnp.ones(2) if transform is jax.vmap else 1.0)
    assert not (tmp_path / "run").exists()


def test_bad_folders():
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(TypeError, match="checkpoint must be a folder, got 7"):
            DRIVERS["train"](checkpoint=7)
    finally:
        config.update("jaxtyping_disable", False)
    with pytest.raises(ValueError, match="checkpoint must be a folder, got an empty name"):
        DRIVERS["train"](checkpoint="")


def test_bad_intervals(tmp_path):
    with pytest.raises(ValueError, match="every_seconds must be finite and at least 0"):
        jp.Checkpoint(tmp_path, every_seconds=-1)
