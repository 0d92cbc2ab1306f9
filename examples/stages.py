"""Where an example writes: a folder that can be written to, and stages that are kept in it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def writable(folder: Path) -> Path:
    """The folder, made if it is not there; ends the program with a message where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise SystemExit(
            f"--out {folder} cannot be written: {error.strerror or error}. Give another folder."
        ) from None


class Stages:
    """A folder with one `.npz` of arrays for each stage, and a note of what it was made with."""

    def __init__(self, folder: Path, settings: Any) -> None:
        self.folder, self.settings = writable(folder), repr(settings)
        self.start = time.perf_counter()

    def title(self, words: str) -> None:
        """Say which stage this is, and how long it took to come here."""
        print(f"\n[{time.perf_counter() - self.start:5.0f} s] {words}", flush=True)

    def stage(
        self, name: str, compute: Callable[[], Mapping[str, Any]], **depends: Any
    ) -> dict[str, np.ndarray]:
        """The arrays of a stage: read if they were made with these settings, computed if not."""
        said = json.dumps(depends, sort_keys=True, default=str)
        fingerprint = hashlib.sha256(f"{self.settings} {said}".encode()).hexdigest()
        path = self.folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as stored:
                if str(stored["fingerprint"]) == fingerprint:
                    return {key: stored[key] for key in stored.files if key != "fingerprint"}
            print(f"   {path.name} was made with other settings, and is made again", flush=True)
        arrays = {key: np.asarray(value) for key, value in compute().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that an interrupted run leaves no half of a file.
        with open(path.with_suffix(".part"), "wb") as part:
            np.savez(part, fingerprint=fingerprint, **arrays)
        os.replace(part.name, path)
        return arrays
