"""The README: its example runs as it stands, and its commands and files are there."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import jaxpattern as jp
import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (
    'python -m pip install -e ".[plot]" && python examples/quickstart.py',
    'python -m pip install -e ".[test]" && python -m pytest',
)


def example():
    return re.search(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL).group(1)


def steered(program, capfd):
    """What the program leaves. Seed and order of data are shared, so that weights change it."""
    scope = {}
    exec(compile(program, "README.md", "exec"), scope)
    printed = capfd.readouterr().out
    assert "realized" in printed
    assert "nan" not in printed
    assert isinstance(scope["solution"], jp.Intervention)
    phi = scope["held_out"]["docstrings"]
    assert float(phi(scope["steered"])) < float(phi(scope["params"]))
    return scope


@pytest.mark.optimized
def test_example_runs_and_steers(capfd):
    """With fewer and shorter windows, smaller batches and fewer steps of training."""
    program = example()
    for number, smaller, times in (
        ('"num_steps": 300', '"num_steps": 60', 1), ("128", "24", 3), (" 33,", " 17,", 2),
        ('"batch_size": 64', '"batch_size": 16', 1), ("batch_size=64", "batch_size=16", 1),
    ):  # fmt: skip
        assert program.count(number) == times
        program = program.replace(number, smaller)
    steered(program, capfd)


@pytest.mark.slow
def test_example_as_it_stands(capfd):
    scope = steered(example(), capfd)
    shift = scope["solution"].predicted_shift
    assert float(shift["docstrings"]) == pytest.approx(-0.01, rel=1e-2)
    for source, change in scope["realized"].items():
        assert np.sign(change) == np.sign(float(shift[source]))
        assert np.sign(change) == np.sign(float(scope["by_training"][source].value))


def measured(name):
    return json.loads((ROOT / "docs" / "measured" / f"{name}.json").read_text(encoding="utf-8"))


def test_numbers_are_those_measured():
    run = measured("readme")
    for source in ("docstrings", "library"):
        found = run["realized"][source], run["training"][source][0], run["posterior"][source][0]
        for value in found:
            assert f"{value:+.3f}".replace("-", "−") in README, (source, value)
    without = {
        arm["name"]: (arm["without"], arm["seeds"]) for arm in measured("superposition")["arms"]
    }
    assert without["equal"] == (10, 64)
    assert (without["-0.012"], without["+0.016"]) == ((56, 64), (0, 64))
    assert "10 of 64 fresh seeds drop one chosen feature" in README
    assert "56 and none" in README
    predicted, retrained = (
        measured("quickstart")[k] for k in ("predicted_shift", "retrained_shift")
    )
    assert retrained["headers"]["value"] < 5 * predicted["headers"]["value"] < 0  # many times


def test_commands_are_in_the_readme():
    for command in COMMANDS:
        assert command in README


def test_what_the_readme_points_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README)
    local = [a or b for a, b in links if not (a or b).startswith("http")]
    assert "docs/quickstart.png" in local
    for target in local:
        assert (ROOT / target).exists(), target


def test_it_is_read_in_five_minutes():
    assert len(README.split()) <= 900


def test_the_picture_above_is_that_of_the_quickstart():
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", README, re.MULTILINE)
    assert pictures == ["docs/quickstart.png"]
    before, _ = README.split("the picture above")
    assert pictures[0] in before
    assert "examples/quickstart.py" in before


def test_benchmarks_are_those_measured():
    assert table.main(["--check"]) == 0


def test_every_module_in_the_table_exists():
    pages = [ROOT / "docs" / page for page in ("reference/index.md", "benchmarks.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    rows = re.findall(r"^\| `([\w/.]+)` \|", text, re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        assert any((ROOT / folder / row).exists() for folder in ("jaxpattern", "benchmarks")), row
