"""The folder of a run: whose it is, which process holds it, and what is in it.

A folder belongs to one run. `manifest.json` says what the run depends on, `lock` is held by the
process that works on it, and each loop of the run has a folder of its own, with one checkpoint for
each position that is kept, named by its digits.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxpattern.runtime.fingerprint import differences

_FORMAT = 2
_SHOWN = 8


class CheckpointError(RuntimeError):
    """A folder cannot be used: it belongs to another run, is in use, or cannot be written."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written, or was damaged and an older one was taken."""


class Interrupted(KeyboardInterrupt):
    """A run with a checkpoint folder was stopped by a signal, after it had saved its state."""


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
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


def claim(folder: Path, lines: dict[str, str], writable: bool) -> None:
    """Make the folder that of this run, or see that it is."""
    path = folder / "manifest.json"
    if path.exists():
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version, old = manifest["format"], dict(manifest["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {short(error)}") from error
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
        sync(folder)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint folder {folder} cannot be written to: {error}"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a loop, newest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if path.name.isdigit()), reverse=True)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest, and what an interrupted or damaged save has left."""
    kept = checkpoints(folder)[:keep]
    for path in folder.iterdir() if folder.is_dir() else ():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def sync(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free(folder: Path) -> int:
    """Bytes that can still be written."""
    return shutil.disk_usage(folder).free


def short(error: BaseException) -> str:
    """The gist of an error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
