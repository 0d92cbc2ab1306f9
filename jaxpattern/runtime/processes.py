"""Several processes as one program: start-up, what they agree on, and data each of them feeds.

Every process runs the same script. `start()` joins them; from there on `jax.devices()` are those
of all of them, a `mesh()` spans them, and drivers return the same result to each. The first
process alone shows progress and writes files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpattern.runtime.mesh import axis_size
from jaxpattern.types import Batch
from jaxpattern.validation import batch_length, check_count

E = TypeVar("E", bound=Exception)


class ProcessError(RuntimeError):
    """The processes of a run did not find each other."""


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    wait_seconds: int = 300,
    heartbeat_seconds: int = 100,
) -> None:
    """Join the processes of a run; to be called before anything else of JAX.

    Without arguments the environment says who takes part: a TPU pod, Slurm, Open MPI or
    Kubernetes, as JAX finds them, or the variables `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. A run of one process needs no call, and with
    nothing in the environment a call changes nothing.

    When a process dies, the others are stopped with a message after `heartbeat_seconds` at most;
    with `checkpoint=` the same call goes on from the last state saved.

    Args:
        coordinator: address `host:port` of process 0.
        num_processes: how many take part.
        process_id: which one this is.
        wait_seconds: how long to wait for the others to appear.
        heartbeat_seconds: how long a process may be silent.

    Raises:
        ProcessError: the others did not appear in time, or the environment contradicts itself.
        TypeError, ValueError: an argument does not fit, or only some are given.
    """
    check_count("wait_seconds", wait_seconds, minimum=1)
    check_count("heartbeat_seconds", heartbeat_seconds, minimum=2)
    explicit = (coordinator, num_processes, process_id)
    if any(x is not None for x in explicit) and not all(x is not None for x in explicit):
        raise ValueError(
            "coordinator, num_processes and process_id must be given together, got "
            f"{coordinator!r}, {num_processes!r}, {process_id!r}"
        )
    if coordinator is None:
        coordinator, num_processes, process_id = _from_environment()
    if num_processes is not None:
        check_count("num_processes", num_processes, minimum=1)
        check_count("process_id", process_id, minimum=0)
        assert process_id is not None
        if process_id >= num_processes:
            raise ValueError(
                f"process_id must be below num_processes = {num_processes}, got {process_id}"
            )
    if coordinator is None and not _cluster_found():
        return
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=wait_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
        )
    except Exception as error:  # of XLA's own class, or a RuntimeError
        who = f"process {process_id} of {num_processes}" if coordinator else "this process"
        raise ProcessError(
            f"{who} could not join the others at {coordinator or 'the address of the cluster'} "
            f"within {wait_seconds} s; see that all of them run, and reach that address: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def _from_environment() -> tuple[str | None, int | None, int | None]:
    """The variables, all or none of them."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, number, index = map(os.environ.get, names)
    if address is None or number is None or index is None:
        if address is None and number is None and index is None:
            return None, None, None
        raise ProcessError(f"{', '.join(names)} must be set together, got {address, number, index}")
    try:
        return address, int(number), int(index)
    except ValueError as error:
        raise ProcessError(f"{names[1]} and {names[2]} must be integers: {error}") from None


def _cluster_found() -> bool:
    """Whether JAX recognises the cluster it runs on."""
    from jax._src.clusters import ClusterEnv

    return any(
        kind.is_env_present() for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method
    )


def from_processes(mesh: Mesh, batch: Batch) -> Batch:
    """One batch from the samples that each process holds, in the order of the processes.

    Drivers take it as they take any data or probes; probes stay where they are.

    Args:
        mesh: the mesh of the drivers. Its processes must lie along `data`, or each hold the whole.
        batch: the samples of this process, equally many in each.

    Raises:
        ValueError: they do not divide among the devices of this process.
    """
    size = batch_length("batch", batch)
    data = axis_size(mesh, "data")
    parts = data // min(jax.process_count(), data)
    if size % parts:
        raise ValueError(f"batch must have a multiple of {parts} samples a process, got {size}")
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def join(leaf: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(join, batch)


def from_first(function: Callable[[], bytes], error: type[E]) -> bytes:
    """What the function returns in the first process, in all of them; or the error it raises."""
    if jax.process_count() == 1:
        return function()
    message = b""
    if jax.process_index() == 0:
        try:
            message = b"+" + function()
        except Exception as failure:
            message = b"-" + str(failure).encode()
            _broadcast(message)
            raise
    message = _broadcast(message)
    if message[:1] == b"-":
        raise error(message[1:].decode())
    return message[1:]


def _broadcast(message: bytes) -> bytes:
    length = _whole(multihost_utils.broadcast_one_to_all(_halves(len(message))))
    content = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        content = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes()


def _halves(number: int) -> np.ndarray:
    """A number of up to 62 bits as two of 31: without 64-bit types no other passes through JAX."""
    return np.asarray([number >> 31, number & (2**31 - 1)], np.int32)


def _whole(halves: np.ndarray) -> int:
    high, low = map(int, halves)
    return high << 31 | low


def largest(*values: float) -> tuple[float, ...]:
    """The largest of each number over all processes."""
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.process_allgather(np.asarray(values, np.float32)).max(axis=0))
