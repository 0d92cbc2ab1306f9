"""The example that chooses which feature a toy model leaves out, at its smallest."""

import json

import numpy as np
import pytest
from pages import Page

import superposition as example


@pytest.mark.filterwarnings("ignore:the weights are predicted")
@pytest.mark.filterwarnings("ignore:the adjoint grew")
@pytest.mark.optimized
def test_runs_and_goes_on_from_its_stages(tmp_path, capsys):
    arguments = ["--scale", "test", "--out", str(tmp_path)]
    first = example.main(arguments)
    names = [row["name"] for row in first["arms"]]
    assert names == ["equal", "-0.008", "-0.008 swapped", "+0.008", "+0.008 swapped"]
    absent = first["absent"]
    down, up = (first["arms"][i]["mixture"][absent] for i in (1, 3))
    assert down < 1 / 6 < up
    swapped = first["arms"][2]["mixture"]
    assert sorted(swapped) == sorted(first["arms"][1]["mixture"])
    assert swapped[(absent + 1) % 6] == down
    assert json.loads((tmp_path / "superposition.json").read_text())["absent"] == absent
    assert (tmp_path / "superposition.png").stat().st_size > 10_000
    assert len(Page(tmp_path / "report.html").tables["response-matrix"]) == 1 + 6

    stamp = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    (tmp_path / "+0.008.npz").unlink()
    again = example.main(arguments)
    assert again == first
    assert all(
        path.stat().st_mtime_ns == t for path, t in stamp.items() if path.name != "+0.008.npz"
    )
    capsys.readouterr()


def test_a_stage_of_other_settings_is_made_again(tmp_path, capsys):
    stages = example.Stages(tmp_path, "first")
    assert stages.stage("a", lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert stages.stage("a", lambda: {"x": np.zeros(1)})["x"].tolist() == [0, 1, 2]
    other = example.Stages(tmp_path, "second")
    assert other.stage("a", lambda: {"x": np.ones(1)})["x"].tolist() == [1.0]
    assert "made again" in capsys.readouterr().out
    assert other.stage("a", lambda: {"x": np.ones(2)}, depends=1)["x"].tolist() == [1.0, 1.0]
