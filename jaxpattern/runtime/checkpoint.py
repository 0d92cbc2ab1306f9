"""Checkpoints: a driver that was stopped goes on where it was, to the same bits.

A folder belongs to one run. `manifest.json` says what the run depends on (see
`jaxpattern.runtime.fingerprint`), `lock` is held by the process that works on it, and each
compiled loop of the run, a *stage*, has a folder of its own, with one Orbax checkpoint for each
position it keeps: the two newest, and of a stage that is complete and followed by another only the
last.

A state is saved as full arrays on the host with a checksum, so that it can go on with any number
of devices. Randomness is a function of the run's key and the number of the step, and a loop gives
the same bits however it is cut into chunks, so nothing else needs to be kept.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpattern.runtime.fingerprint import differences, digest, fingerprint
from jaxpattern.runtime.mesh import is_first_process, put_as, to_host
from jaxpattern.runtime.processes import from_first, largest
from jaxpattern.validation import check_number, is_concrete

_FORMAT = 1
_SHOWN = 8
_LONGEST_CHUNK = 2.0  # seconds: how soon a signal is answered

State = TypeVar("State")


class CheckpointError(RuntimeError):
    """A folder cannot be used: it belongs to another run, is in use, or cannot be written."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written, or was damaged and an older one was taken."""


class Interrupted(KeyboardInterrupt):
    """A run with a checkpoint folder was stopped by a signal, after it had saved its state."""


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
        folder: made if it does not exist. It belongs to one run: another is refused.
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


class Stage:
    """One loop of a run, whose position counts from 0 to `total`. Without a folder a no-op."""

    def __init__(
        self, store: Store, name: str, total: int, final: Callable[[Any], Any], lanes: int | None
    ) -> None:
        self._store, self._name, self._total, self._final = store, name, total, final
        self._lanes = lanes
        self._folder = store.folder / name if store.folder is not None else None

    @property
    def saves(self) -> bool:
        """Whether there is a folder to save to."""
        return self._folder is not None

    def resume(self, start: Callable[[], State], mesh: Mesh | None = None) -> tuple[int, State]:
        """The newest state that can be read, with its position; else the start, at 0.

        A state goes where the start lies on the mesh, with lanes to fill up its devices.
        """
        if self._folder is None:
            return 0, start()
        found = from_first(self._newest, CheckpointError)
        if not found:
            state = start()
            check_not_traced(state)
            return 0, state
        header, content = found.split(b"\n", 1)
        about = json.loads(header)
        position = about["position"]
        shapes = jax.eval_shape(lambda: self._portable(start()))
        if position == self._total:
            shapes = jax.eval_shape(self._final, shapes)
        leaves, structure = jax.tree.flatten(shapes)
        if about["leaves"] != [_spec(leaf) for leaf in leaves]:
            raise CheckpointError(
                f"{self._folder} holds a state of other arrays than this run has; it was written "
                "by another version of the program: use another folder"
            )
        restored = _unpack(np.frombuffer(content, np.uint8), leaves, about["keys"])
        state = jax.tree.unflatten(structure, restored)
        if position == self._total:
            return position, state
        like = jax.eval_shape(start) if mesh is None else start()
        return position, jax.tree.map(_put_like, state, like)

    def _portable(self, state: Any) -> Any:
        """A state without the lanes that only fill up the devices of a mesh."""
        if self._lanes is None:
            return state
        return jax.tree.map(lambda leaf: leaf[: self._lanes], state)

    def _newest(self) -> bytes:
        """The newest checkpoint that can be read, what it says of itself first; or nothing."""
        assert self._folder is not None
        for path in _checkpoints(self._folder):
            try:
                about, content = self._read(path)
            except Exception as error:  # Orbax and TensorStore have no common class of errors
                warnings.warn(
                    f"the checkpoint {path} is damaged and left out ({_short(error)}); the one "
                    "before it is taken, or the start",
                    CheckpointWarning,
                    stacklevel=6,
                )
                if self._store.writable:
                    path.rename(path.with_suffix(".damaged"))
                continue
            if about["position"] < self._total:
                self._store.check_writable()
            return json.dumps(about).encode() + b"\n" + content.tobytes()
        self._store.check_writable()
        return b""

    def chunks(self, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
        """Pieces of [start, stop): of a size, or with a folder of a time."""
        if self._folder is not None:
            size = 1
        longest = min(_LONGEST_CHUNK, self._store.every / 2)
        while start < stop:
            end = min(start + size, stop)
            self._store.saving, before = 0.0, time.monotonic()
            yield start, end
            (elapsed,) = largest(time.monotonic() - before - self._store.saving)
            if self._folder is not None:
                size = 2 * size if elapsed < longest / 2 else max(1, size // 2)
            start = end

    def save(self, position: int, state: Any) -> None:
        """Save the state if it is complete or it is time; or if a signal came, and then stop."""
        if self._folder is None:
            return
        store, before = self._store, time.monotonic()
        done = position == self._total
        late = before - store.last_save >= store.every
        number, due = map(int, largest(float(store.signal), float(late)))
        if not (done or number or due):
            return
        state = self._portable(state)
        saved = self._write(position, self._final(state) if done else state)
        store.last_save = time.monotonic()
        store.saving = store.last_save - before
        if number:
            name = signal.Signals(number).name
            outcome = (
                f"its state is in {store.folder}; the same call goes on from there"
                if saved
                else f"and its last state could not be saved in {store.folder}"
            )
            store.signal = 0
            raise Interrupted(f"the run was stopped by {name}, {outcome}")

    def drop_history(self) -> None:
        """Keep only the last checkpoint of a stage that is complete."""
        if self._folder is not None and is_first_process():
            _prune(self._folder, 1)

    def _read(self, path: Path) -> tuple[dict[str, Any], np.ndarray]:
        from orbax.checkpoint import v1 as ocp

        with _context():
            about = ocp.metadata(path).custom_metadata
            if about["run"] != self._store.run:
                raise ValueError("it is of another run")
            content = np.asarray(ocp.load(path)[0])
        if about["checksum"] != digest(content.data):
            raise ValueError("its checksum is wrong")
        return about, content

    def _write(self, position: int, state: Any) -> bool:
        """Whether it could be saved; a warning says why not."""
        leaves = jax.tree.leaves(state)
        check_not_traced(leaves)
        # One array of bytes: Orbax refuses arrays of size zero, and of several that cannot be
        # read or written it leaves tasks behind.
        content = np.frombuffer(b"".join(_to_host(leaf).tobytes() for leaf in leaves), np.uint8)
        about = {
            "run": self._store.run,
            "position": position,
            "leaves": [_spec(leaf) for leaf in leaves],
            "keys": {
                str(i): str(jax.random.key_impl(x)) for i, x in enumerate(leaves) if _is_key(x)
            },
            "checksum": digest(content.data),
        }
        saved = from_first(lambda: bytes([self._keep(position, about, content)]), CheckpointError)
        return bool(saved[0])

    def _keep(self, position: int, about: dict[str, Any], content: np.ndarray) -> bool:
        from orbax.checkpoint import v1 as ocp

        assert self._folder is not None
        path = self._folder / f"{position:012d}"
        try:
            self._folder.mkdir(exist_ok=True)
            with _context():
                ocp.save(path, [content], custom_metadata=about, overwrite=True)
            _sync(self._folder)
        except Exception as error:  # a full disk is an OSError here and a ValueError there
            kept = [str(int(p.name)) for p in _checkpoints(self._folder)]
            warnings.warn(
                f"the state of {self._name!r} at {position} could not be saved in "
                f"{self._store.folder}, where {_free(self._folder)} ({_short(error)}); the run "
                f"goes on, and what it saved before is as it was "
                f"(positions {', '.join(kept) or 'none'})",
                CheckpointWarning,
                stacklevel=6,
            )
            for rest in self._folder.glob(f"{path.name}.*"):
                shutil.rmtree(rest, ignore_errors=True)
            return False
        _prune(self._folder, 2)
        return True


class Store:
    """What the stages of one run share. Without a folder nothing is saved."""

    def __init__(
        self, folder: Path | None = None, every: float = 0.0, run: str = "", writable: bool = True
    ) -> None:
        self.folder, self.every, self.run, self.writable = folder, every, run, writable
        self.signal = 0
        self.last_save = time.monotonic()
        self.saving = 0.0
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

    def check_writable(self) -> None:
        """There is something left to compute, and so to save."""
        if not self.writable:
            raise CheckpointError(
                f"checkpoint folder {self.folder} cannot be written to, and its run is not "
                "complete; make it writable, or copy it"
            )


@contextmanager
def open_store(
    checkpoint: str | os.PathLike[str] | Checkpoint | None, driver: str, **arguments: Any
) -> Iterator[Store | None]:
    """The store of one run, locked, with signals caught; without a folder none.

    Args:
        checkpoint: a folder, a `Checkpoint`, or None.
        driver: which function runs.
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
    with ExitStack() as stack:

        def claim() -> bytes:
            writable = stack.enter_context(_locked(folder))
            _claim(folder, lines, writable)
            return bytes([writable])

        writable = bool(from_first(claim, CheckpointError)[0])
        run = digest(json.dumps(lines, sort_keys=True).encode())
        store = Store(folder, float(checkpoint.every_seconds), run, writable)
        stack.enter_context(_signals(store))
        yield store


@contextmanager
def _context() -> Iterator[None]:
    """Orbax as the first process alone uses it.

    Folders are made before it starts threads, which would wait minutes for one that cannot be.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    if jax.process_count() == 1:
        with context:
            yield
        return
    context.multiprocessing.active_processes = {0}
    context.multiprocessing.barrier_sync_key_prefix = "jaxpattern"
    # Orbax 0.12.8 compares the path in all processes even where one is active.
    execution: Any = importlib.import_module(
        "orbax.checkpoint.experimental.v1._src.saving.execution"
    )
    check = execution._check_directory_consistency
    execution._check_directory_consistency = lambda directory: None
    try:
        with context:
            yield
    finally:
        execution._check_directory_consistency = check


def _put_like(leaf: jax.Array, like: Any) -> jax.Array:
    """A leaf where another lies, with copies of its last lane up to the same length."""
    if leaf.shape != like.shape:
        leaf = leaf[jnp.minimum(jnp.arange(like.shape[0]), leaf.shape[0] - 1)]
    return leaf if like.sharding is None else put_as(leaf, like.sharding)


def check_not_traced(values: Any) -> None:
    """Values that can be written to a disk."""
    if not all(map(is_concrete, jax.tree.leaves(values))):
        raise TypeError(
            "checkpoint cannot be given under jit, vmap or grad, where there are no numbers to "
            "save: call the driver outside of them, or without checkpoint"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder for this process; yields whether it can be written to.

    The lock is the kernel's (flock): it ends with the process, however that dies.
    """
    import fcntl

    path = folder / "lock"
    writable = True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        writable = False
        try:
            lock = open(path, encoding="utf-8")  # noqa: SIM115
        except OSError:
            raise CheckpointError(
                f"checkpoint folder {folder} cannot be written to: {error}"
            ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise CheckpointError(
                f"checkpoint folder {folder} is in use by {lock.read() or 'another process'}"
            ) from None
        if writable:
            with suppress(OSError):  # a full disk
                os.ftruncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield writable


def _claim(folder: Path, lines: dict[str, str], writable: bool) -> None:
    """Make the folder that of this run, or see that it is."""
    path = folder / "manifest.json"
    if path.exists():
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version, old = manifest["format"], dict(manifest["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {_short(error)}") from error
        if version != _FORMAT:
            raise CheckpointError(f"{path} has format {version}, this version reads {_FORMAT}")
        changed = differences(old, lines)
        if changed:
            more = f"\n  and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise CheckpointError(
                f"checkpoint folder {folder} belongs to another run; use another folder, or the "
                "arguments it was made with:\n  " + "\n  ".join(changed[:_SHOWN]) + more
            )
        return
    others = sorted({p.name for p in folder.iterdir()} - {"lock", "manifest.tmp"})
    if others:
        raise CheckpointError(
            f"checkpoint folder {folder} holds other files ({', '.join(others[:3])}) and no "
            "manifest.json; use an empty or a new folder"
        )
    try:
        if not writable:
            raise OSError("it is read-only")
        with open(folder / "manifest.tmp", "w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "run": lines}, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "manifest.tmp", path)
        _sync(folder)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint folder {folder} cannot be written to: {error}"
        ) from error


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


def _checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, newest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if path.name.isdigit()), reverse=True)


def _prune(folder: Path, keep: int) -> None:
    """Delete all but the newest, and what an interrupted or damaged save has left."""
    kept = _checkpoints(folder)[:keep]
    for path in folder.iterdir() if folder.is_dir() else ():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _spec(leaf: Any) -> list[Any]:
    return [str(leaf.dtype), list(leaf.shape)]


def _to_host(leaf: Any) -> np.ndarray:
    return to_host(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _unpack(content: np.ndarray, like: list[Any], keys: dict[str, str]) -> list[jax.Array]:
    """The leaves of a state from their bytes, one after the other."""
    leaves, start = [], 0
    for i, leaf in enumerate(like):
        raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        size = raw.size * raw.dtype.itemsize
        array = jnp.asarray(content[start : start + size].view(raw.dtype).reshape(raw.shape))
        leaves.append(
            jax.random.wrap_key_data(array, impl=keys[str(i)]) if _is_key(leaf) else array
        )
        start += size
    return leaves


def _free(folder: Path) -> str:
    """How much room there is."""
    try:
        return f"{shutil.disk_usage(folder.parent).free / 2**20:.1f} MiB are free"
    except OSError as error:
        return str(error)


def _short(error: BaseException) -> str:
    """The gist of an error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
