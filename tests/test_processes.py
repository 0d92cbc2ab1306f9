"""Several real processes on one machine: the same bits, and bounded trouble."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import checkpoint_program as program
import jax
import numpy as np
import pytest
from support import near, same

import jaxpattern as jp
from jaxpattern.runtime import processes

PROGRAM = Path(__file__).with_name("process_program.py")


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def explicit_environment(address, number, index):
    return {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number),
            "JAX_PROCESS_ID": str(index)}  # fmt: skip


def slurm_environment(address, number, index):
    """What srun sets in a task; JAX makes the port of the job's number."""
    del address
    return {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(number), "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index)}  # fmt: skip


def launch(
    folder, driver, *rest, number=2, devices=2, indices=None, environment=None,
    cluster=explicit_environment,
):  # fmt: skip
    """Start the processes of a run."""
    address = free_address()
    folder.mkdir(exist_ok=True)
    started = []
    for index in indices if indices is not None else range(number):
        variables = cluster(address, number, index) if environment else {}
        command = [sys.executable, PROGRAM, "" if environment else address, str(number),
                   str(index), str(devices), driver, folder, *rest]  # fmt: skip
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables | (environment or {}),
            )
        )  # fmt: skip
    return started


def finish(processes, seconds=240):
    """Exit statuses and what was said; nothing outlives a test."""
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [process.returncode for process in processes], said


def leaves(folder, index):
    with np.load(folder / f"result-{index}.npz") as file:
        return [file[name] for name in file.files]


@pytest.mark.parametrize(
    "driver",
    [pytest.param(d, marks=() if d == "sample" else pytest.mark.slow) for d in program.DRIVERS],
)
def test_two_processes_give_the_bits_of_one(driver, tmp_path):
    """2 processes × 2 devices, found through the environment, against 4 devices of one."""
    codes, said = finish(launch(tmp_path, driver, environment={"WAIT": "60"}))
    assert codes == [0, 0], said
    wanted = program.DRIVERS[driver](mesh=jp.mesh(devices=jax.devices()[:4]))
    for index in range(2):
        same(leaves(tmp_path, index), wanted)


@pytest.mark.slow
def test_slurm_is_found(tmp_path):
    processes = launch(tmp_path, "sample", environment={"WAIT": "60"}, cluster=slurm_environment)
    codes, said = finish(processes)
    assert codes == [0, 0], said
    wanted = program.sample(mesh=jp.mesh(devices=jax.devices()[:4]))
    for index in range(2):
        same(leaves(tmp_path, index), wanted)


@pytest.mark.slow
def test_each_process_feeds_its_own_probes(tmp_path):
    codes, said = finish(launch(tmp_path, "fed", devices=1))
    assert codes == [0, 0], said
    wanted = jp.susceptibilities(
        program.key(), program.posterior(), program.SAMPLER, program.PLAN,
        probes={"p": jax.tree.map(lambda x: x[:4], program.DATA)},
        observables={"a": lambda params: params["a"].sum()}, estimator=jp.covariance(),
        progress=False,
    )  # fmt: skip
    for index in range(2):
        near(leaves(tmp_path, index), jax.tree.leaves(wanted))


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_the_run_goes_on(tmp_path):
    """Process 1 is killed in mid-run; process 0 says so and stops, and both together go on."""
    began = time.monotonic()
    processes = launch(tmp_path, "sample", "die")
    codes, said = finish(processes, seconds=120)
    assert codes[1] == -9
    assert codes[0] != 0
    assert any(word in said[0] for word in ("closed by peer", "heartbeat", "unavailable")), said[0]
    assert time.monotonic() - began < 120
    assert not list(tmp_path.glob("result-*"))
    codes, said = finish(launch(tmp_path, "sample", "keep"))
    assert codes == [0, 0], said
    wanted = program.sample(mesh=jp.mesh(devices=jax.devices()[:4]))
    for index in range(2):
        same(leaves(tmp_path, index), wanted)


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_missing_process(index, tmp_path):
    """The other never comes."""
    ((code,), (said,)) = finish(
        launch(tmp_path, "sample", indices=[index], environment={"WAIT": "2"}), seconds=90
    )
    assert code not in (0, None)
    assert "ProcessError: " in said or "DEADLINE_EXCEEDED" in said, said


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", 2, None), "must be given together"),
        (("localhost:1", 2, 2), "process_id must be below num_processes = 2, got 2"),
        (("localhost:1", 0, 0), "num_processes must be at least 1"),
    ],
)
def test_start_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        jp.start(*arguments)


def test_half_an_environment(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(jp.ProcessError, match="must be set together"):
        jp.start()


def test_a_single_process_needs_no_others():
    jp.start()
    assert jax.process_count() == 1


def test_shares_must_divide():
    mesh = jp.mesh(data=8)
    with pytest.raises(ValueError, match="batch must have a multiple of 8 samples a process"):
        jp.from_processes(mesh, program.DATA)
    fed = jp.from_processes(mesh, np.arange(16.0, dtype=np.float32))
    np.testing.assert_array_equal(np.asarray(fed), np.arange(16.0))


def test_messages_between_processes_may_pass_two_gibibytes(monkeypatch):
    """As process 1 sees it: the length comes first, then as many bytes."""
    length, sent = 2**31 + 2**30 + 5, []

    def broadcast(content):
        sent.append((content.dtype, content.shape))
        return np.asarray([length >> 31, length & (2**31 - 1)], np.int32) if len(sent) == 1 else b""

    class Zeros:
        def __init__(self, size, dtype):
            self.shape, self.dtype = (size,), np.dtype(dtype)

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(processes.np, "zeros", Zeros)
    processes._broadcast(b"")
    assert sent == [(np.int32, (2,)), (np.uint8, (length,))]


@pytest.mark.parametrize("length", [0, 5, 2**31 - 1, 2**31, 2**33 + 2**31 - 1])
def test_the_halves_of_a_length_make_it_up(length):
    halves = processes._halves(length)
    assert halves.dtype == np.int32
    assert processes._whole(halves) == length
