"""Checkpoints: a driver that was stopped goes on where it was, to the same bits.

Each loop of a run, a *stage*, keeps the two newest of its states, and once it is complete and
followed by another, only the last. Randomness is a function of the run's key and the number of the
step, and a loop gives the same bits however it is cut into chunks, so nothing but the state needs
to be kept.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpattern.losses import first_losses
from jaxpattern.runtime import archive
from jaxpattern.runtime.fingerprint import about, digest, fingerprint
from jaxpattern.runtime.folder import (
    CheckpointError,
    CheckpointWarning,
    Interrupted,
    checkpoints,
    claim,
    free,
    locked,
    prune,
    short,
    sync,
)
from jaxpattern.runtime.mesh import is_first_process
from jaxpattern.runtime.processes import from_first, largest
from jaxpattern.validation import check_number, is_concrete

_WITNESSES = 8

State = TypeVar("State")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state, and how often it saves it.

    A driver that is called again with the same arguments and folder goes on from the last state
    saved, and gives the bits of a run that was never stopped. A run that is complete returns at
    once. On SIGTERM and SIGINT the state is saved (within about two seconds, or a segment of the
    pathwise adjoint) and `Interrupted` is raised; a second signal takes effect at once.

    A save that fails, on a full disk say, leaves the earlier ones as they were: the run goes on,
    warns, and tries again after the next interval.

    Attributes:
        folder: made if it does not exist. It belongs to one run: another is refused. All processes
            of a run must see it.
        every_seconds: least time between two saves; 0 saves after every draw, step or segment.
    """

    folder: str | os.PathLike[str]
    every_seconds: float | int = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike):
            raise TypeError(f"checkpoint must be a folder, got {self.folder!r:.80}")
        if not os.fspath(self.folder):
            raise ValueError("checkpoint must be a folder, got an empty name")
        check_number("every_seconds", self.every_seconds, minimum=0.0)


class Store:
    """The folder of one run, its clock, and the signals that came."""

    def __init__(self, folder: Path, every: float, run: str, writable: bool = True) -> None:
        self.folder, self.every, self.run, self.writable = folder, every, run, writable
        self.signal = 0
        self._last_save = time.monotonic()
        self._stages: list[Stage] = []

    def stage(
        self,
        label: str,
        total: int,
        final: Callable[[Any], Any] = lambda state: state,
        lanes: int | None = None,
    ) -> Stage:
        """The next loop of the run; `final` is what is needed of its last state.

        With `lanes` the leaves of its states have a leading axis, of which so many count.
        """
        if self._stages:
            self._stages[-1].drop_history()
        words = "".join(c if c.isascii() and c.isalnum() else " " for c in label).split()
        name = "-".join([f"{len(self._stages):03d}", *words])[:80]
        self._stages.append(Stage(self, name, total, final, lanes))
        return self._stages[-1]

    def due(self) -> tuple[int, bool]:
        """The signal that came, and whether it is time to save; the same in all processes."""
        late = time.monotonic() - self._last_save >= self.every
        number, due = largest(float(self.signal), float(late))
        return int(number), bool(due)

    def note_save(self) -> None:
        """The interval to the next save begins."""
        self._last_save = time.monotonic()

    def stop(self, number: int, saved: bool) -> None:
        """End the run, as the signal asked."""
        outcome = (
            f"its state is in {self.folder}; the same call goes on from there"
            if saved
            else f"and its last state could not be saved in {self.folder}"
        )
        self.signal = 0
        raise Interrupted(f"the run was stopped by {signal.Signals(number).name}, {outcome}")

    def check_writable(self) -> None:
        """There is something left to compute, and so to save."""
        if not self.writable:
            raise CheckpointError(
                f"checkpoint folder {self.folder} cannot be written to, and its run is not "
                "complete; make it writable, or copy it"
            )


class Stage:
    """One loop of a run, whose position counts from 0 to `total`."""

    def __init__(
        self, store: Store, name: str, total: int, final: Callable[[Any], Any], lanes: int | None
    ) -> None:
        self.name = name
        self._store, self._total, self._final, self._lanes = store, total, final, lanes
        self._folder = store.folder / name

    def resume(self, start: Callable[[], State], mesh: Mesh | None = None) -> tuple[int, State]:
        """The newest state that can be read, with its position; else the start, at 0.

        A state goes where the start lies on the mesh, with lanes to fill up its devices. That of a
        complete stage is `final` of the last.
        """
        names = json.loads(from_first(self._names, CheckpointError))
        # On a mesh the start says where arrays lie; without one its shapes are enough.
        like = (start() if mesh is not None else jax.eval_shape(start)) if names else None
        for name in names:
            found = self._read(self._folder / name, like)
            if found is not None:
                if found[0] < self._total:
                    self._store.check_writable()
                return found
        self._store.check_writable()
        state = start()
        check_not_traced(state)
        return 0, state

    def save(self, position: int, state: Any) -> None:
        """Save the state if it is complete or it is time; or if a signal came, and then stop."""
        done = position == self._total
        number, due = self._store.due()
        if not (done or number or due):
            return
        state = self._final(state) if done else state
        check_not_traced(state)
        saved = self._write(self._folder / f"{position:012d}", position, state)
        self._store.note_save()
        if number:
            self._store.stop(number, saved)

    def drop_history(self) -> None:
        """Keep only the last checkpoint of a stage that is complete."""
        if is_first_process():
            prune(self._folder, 1)

    def _names(self) -> bytes:
        return json.dumps([path.name for path in checkpoints(self._folder)]).encode()

    def _make_room(self, size: int) -> bytes:
        """A place to write to; found out here, where no process waits for another."""
        self._folder.mkdir(exist_ok=True)
        if free(self._folder) < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return b""

    def _read(self, path: Path, like: Any) -> tuple[int, Any] | None:
        """A checkpoint, or None and a warning where it is damaged."""

        def look() -> dict[str, Any]:
            header = archive.read_about(path)
            if header["run"] != self._store.run:
                raise ValueError("it is of another run")
            return header

        header, failure = _together(look)
        if header is not None:
            if header["position"] == self._total:
                known = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(like))
                like = self._final(like) if known else jax.eval_shape(self._final, like)
            if header["leaves"] != archive.describe(like, self._lanes):
                raise CheckpointError(
                    f"{self._folder} holds a state of other arrays than this run has; it was "
                    "written by another version of the program: use another folder"
                )
            state, failure = _together(lambda: archive.read(path, like, self._lanes, header))
            if failure is None:
                return header["position"], state
        if is_first_process():
            warnings.warn(
                f"the checkpoint {path} is damaged and left out ({short(failure)}); the one "
                "before it is taken, or the start",
                CheckpointWarning,
                stacklevel=2,
            )
            if self._store.writable:
                path.rename(path.with_suffix(".damaged"))
        return None

    def _write(self, path: Path, position: int, state: Any) -> bool:
        """Whether it could be saved; a warning says why not."""
        part = path.with_suffix(".part")

        def write() -> None:
            from_first(lambda: self._make_room(archive.size(state)), OSError)
            header = {"run": self._store.run, "position": position}
            archive.write(part, state, self._lanes, header)

        _, failure = _together(write)
        if failure is None:
            _, failure = _together(lambda: from_first(lambda: self._keep(part, path), OSError))
        if failure is None or not is_first_process():
            return failure is None
        prune(self._folder, 2)
        kept = [str(int(p.name)) for p in checkpoints(self._folder)]
        folder = self._store.folder
        warnings.warn(
            f"the state of {self.name!r} at {position} could not be saved in {folder}, where "
            f"{free(self._folder.parent) / 2**20:.1f} MiB are free ({short(failure)}); the run "
            f"goes on, and what it saved before is as it was (positions "
            f"{', '.join(kept) or 'none'})",
            CheckpointWarning,
            stacklevel=2,
        )
        return False

    def _keep(self, part: Path, path: Path) -> bytes:
        """What was written counts from here on."""
        shutil.rmtree(path, ignore_errors=True)  # of the same position, saved twice
        part.rename(path)
        sync(self._folder)
        prune(self._folder, 2)
        return b""


def _together(function: Callable[[], Any]) -> tuple[Any, Any]:
    """What it returns and None; or None and the error, where it fails in one process or more."""
    value, failure = None, None
    try:
        value = function()
    except Exception as error:  # Orbax and TensorStore have no common class of errors
        failure = error
    (failed,) = largest(float(failure is not None))
    if not failed:
        return value, None
    return None, failure or OSError("another process could not")


@contextmanager
def open_store(
    checkpoint: str | os.PathLike[str] | Checkpoint | None,
    driver: str,
    losses: Callable[[], np.ndarray] | None = None,
    **arguments: Any,
) -> Iterator[Store | None]:
    """The store of one run, locked, with signals caught; without a folder none.

    Args:
        checkpoint: a folder, a `Checkpoint`, or None.
        driver: which function runs.
        losses: some losses at the start, `[samples, ...]`, which tell runs apart where the code of
            a loss cannot be followed; by default those of the argument `posterior`.
        arguments: all that its result depends on.

    Raises:
        CheckpointError: the folder belongs to another run, holds other files, is in use by
            another process, or cannot be written to.
        TypeError: an argument is traced by jit, vmap or grad.
    """
    if checkpoint is None:
        yield None
        return
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    check_not_traced(arguments)
    folder = Path(checkpoint.folder).absolute()
    lines = fingerprint(driver=driver, **arguments)
    if losses is None and "posterior" in arguments:
        start = arguments["posterior"]
        losses = partial(first_losses, start.loss_fn, start.params, start.data)
    if losses is not None:
        lines["losses at the start"] = _witness(losses(), arguments)
    with ExitStack() as stack:

        def hold() -> bytes:
            writable = stack.enter_context(locked(folder))
            claim(folder, lines, writable)
            return bytes([writable])

        writable = bool(from_first(hold, CheckpointError)[0])
        if not (folder / "manifest.json").exists():
            raise CheckpointError(
                f"checkpoint folder {folder} is not seen by process {jax.process_index()}; take "
                "one on a file system that all processes share"
            )
        run = digest((folder / "manifest.json").read_bytes())
        store = Store(folder, float(checkpoint.every_seconds), run, writable)
        stack.enter_context(_signals(store))
        yield store


def _witness(losses: np.ndarray, arguments: Any) -> str:
    """The mean of the losses and some of them, as exactly as another machine repeats them."""
    rows = losses.reshape(len(losses), -1).astype(np.float64)
    known = np.isfinite(rows)
    means = np.where(known, rows, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    chosen = means[np.linspace(0, len(means) - 1, min(len(means), _WITNESSES)).astype(int)]
    kinds = [x.dtype for x in jax.tree.leaves(arguments) if hasattr(x, "dtype")]
    narrow = any(jnp.issubdtype(kind, jnp.floating) and kind.itemsize < 4 for kind in kinds)
    return about([means.mean(), *chosen], 3e-2 if narrow else 1e-3)


def check_not_traced(values: Any) -> None:
    """Values that can be written to a disk."""
    if not all(map(is_concrete, jax.tree.leaves(values))):
        raise TypeError(
            "checkpoint cannot be given under jit, vmap or grad, where there are no numbers to "
            "save: call the driver outside of them, or without checkpoint"
        )


@contextmanager
def _signals(store: Store) -> Iterator[None]:
    """Note SIGTERM and SIGINT for the next chunk; a second one acts as it did before.

    Only the main thread of a program can catch signals: in others they act at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def note(number: int, frame: Any) -> None:
        del frame
        store.signal = number
        restore()

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
        yield
    finally:
        restore()
        if store.signal:  # it came after the last chunk
            signal.raise_signal(store.signal)
