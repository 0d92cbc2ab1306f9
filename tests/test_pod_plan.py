"""The programs compile for a TPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "pod_plan.py"


LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.libtpu
@pytest.mark.parametrize(("given", "programs"), [
    ("built in", ["sampling", "pathwise", "training"]),
    ("config.json", ["training"]),
    pytest.param("config.json", ["sampling", "pathwise"], marks=pytest.mark.slow),
])  # fmt: skip
def test_small_programs_compile_for_four_chips(given, programs, tmp_path):
    """In a process of its own: libtpu writes to stderr as it likes."""
    more = []
    if given == "config.json":
        (tmp_path / given).write_text(json.dumps(LLAMA))
        more = ["--config", tmp_path / given]
    run = subprocess.run(
        [sys.executable, PROGRAM, "--quick", "--chips", "4", "--out", tmp_path, "--only",
         *programs, *more],
        capture_output=True, text=True, check=False,
        # What was compiled for chips that are not there cannot be read back.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "pod_plan.jsonl").read_text().splitlines()]
    compiled = {row["program"]: row for row in rows if "program" in row}
    assert list(compiled) == programs
    assert all(row["fits"] for row in compiled.values())
    if "pathwise" in programs:
        assert compiled["pathwise"]["collectives"] == {}
    if "training" in programs:
        assert sum(compiled["training"]["collectives"].values()) > 0
