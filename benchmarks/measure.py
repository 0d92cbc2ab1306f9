"""How the benchmarks measure: one core, CPU seconds, both sides in turn, claims that can fail."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

PINNED = "JAXPATTERN_BENCHMARK_IS_PINNED"


def pin() -> None:
    """Hold the process to one core, the last it may use, and every library to one thread.

    CPU seconds are then those of the computation, and depend little on what else the machine does.
    The process starts itself again: an import may have made threads that know nothing of this.
    """
    if PINNED in os.environ:
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ |= {
        PINNED: "1",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": f"{flags} --xla_cpu_multi_thread_eigen=false".strip(),
    }
    os.execv(sys.executable, [sys.executable, *sys.argv])


class Timing(NamedTuple):
    """CPU seconds of one call (median), of its first call beyond that, and of every call."""

    seconds: float
    compilation: float
    all: list[float]


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, all threads of the process, and what it returned."""
    start = time.process_time()
    result = jax.block_until_ready(function())
    return time.process_time() - start, result


def in_turn(sides: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, Timing]:
    """Each side once, to compile it, and then all sides in turn, so many times."""
    first = {name: cpu_seconds(side)[0] for name, side in sides.items()}
    spent: dict[Any, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            spent[name].append(cpu_seconds(side)[0])
    medians = {name: statistics.median(times) for name, times in spent.items()}
    return {name: Timing(medians[name], first[name] - medians[name], spent[name]) for name in sides}


def peak_memory(function: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes by which the resident memory rose at its peak in a call (Linux; 0 elsewhere)."""

    def resident(field: str) -> int:
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
        return 1024 * int(line.split()[1])

    try:
        # What the allocator kept of earlier calls would hide as much of this one.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = resident("VmRSS")
    except (OSError, AttributeError):
        return 0, function()
    result = function()
    return resident("VmHWM") - before, result


class Report:
    """Rows of a benchmark, as JSON lines, and the claims that were not met."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        self.path: Path = options.out / f"{name}.jsonl"
        self.path.write_text("")
        self.figure: Path = options.out / f"{name}.png"
        self.common = {
            "benchmark": name,
            "quick": options.quick,
            "machine": platform.processor() or platform.machine(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        self.failed: list[str] = []
        self.claimed = 0

    def add(self, line: str, **row: Any) -> None:
        """Print one line of the table, and keep its row."""
        print(line, flush=True)
        with open(self.path, "a") as rows:
            rows.write(json.dumps({**self.common, **row}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def claim(self, text: str, holds: bool) -> None:
        """A claim; what is false fails the benchmark."""
        self.claimed += 1
        if not holds:
            self.failed.append(f"NOT MET: {text}")

    def add_claims(self) -> None:
        """A row that says what was claimed so far, and what of it does not hold."""
        told = f"{self.claimed - len(self.failed)} of {self.claimed} claims met"
        self.add(told, part="claims", number=self.claimed, failed=self.failed)

    def close(self) -> int:
        """Say what was not met; the exit status."""
        print("\n".join(self.failed) if self.failed else "all claims met")
        print(f"rows: {self.path}")
        return bool(self.failed)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Of independent values, such as one per seed; the error of a single one is not known."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def parser(doc: str) -> argparse.ArgumentParser:
    """What every benchmark can be told."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer draws, seeds or repeats")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser
