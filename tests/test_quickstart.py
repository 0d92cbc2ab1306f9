"""The quickstart: what it writes, and what it says to bad arguments."""

import json
import math

import matplotlib.image
import pytest
from pages import Page, number

import quickstart
from jaxpattern.data import text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "new" / "folder"
    return quickstart.main(["--quick", "--out", str(out)]), out


def test_it_writes_a_picture_and_the_weights(run):
    result, out = run
    assert {path.name for path in out.iterdir()} == {
        "quickstart.png",
        "weights.json",
        "report.html",
    }
    image = matplotlib.image.imread(out / "quickstart.png")
    height, width, _ = image.shape
    assert width > 1000
    assert height > 300
    assert image[..., :3].std() > 0.05
    written = json.loads((out / "weights.json").read_text())
    assert written["weights"] == result["weights"]


def test_the_weights_are_a_mixture(run):
    result, _ = run
    weights = result["weights"]
    assert set(weights) <= set(text.SOURCES)
    assert len(weights) >= 2
    assert min(weights.values()) >= 0
    assert sum(weights.values()) / len(weights) == pytest.approx(1, abs=1e-4)
    assert 0 < result["effective_sample_share"] <= 1 + 1e-6


def test_the_file_says_what_was_asked_predicted_and_found(run):
    _, out = run
    written = json.loads((out / "weights.json").read_text())
    sources = set(written["weights"])
    for kind in ("predicted_shift", "realised_shift", "retrained_shift"):
        assert set(written[kind]) == sources
        for entry in written[kind].values():
            assert math.isfinite(entry["value"])
            assert entry["stderr"] >= 0
    assert len(written["target"]) == 2
    assert min(written["target"].values()) < 0
    assert len(written["data_sha256"]) == 64
    assert written["settings"]["quick"] is True
    assert written["settings"]["seed"] == 0


def test_the_page_says_what_the_file_says(run):
    result, out = run
    head, *rows = Page(out / "report.html").tables["shifts"]
    scale = 1e-3 if "10⁻³" in head[1] else 1e-6 if "10⁻⁶" in head[1] else 1.0
    column = head.index("sampled again")
    for row in rows:
        entry = result["realised_shift"][row[0]]
        (value, error), rounding = number(row[column])
        assert scale * value == pytest.approx(entry["value"], abs=scale * rounding[0])
        assert scale * error == pytest.approx(entry["stderr"], abs=scale * rounding[1])


def test_a_folder_that_cannot_be_written_is_said_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(quickstart, "load_text", lambda *_: pytest.fail("work"))
    with pytest.raises(SystemExit, match=r"--out .*file.out cannot be written: Not a directory"):
        quickstart.main(["--quick", "--out", str(tmp_path / "file" / "out")])


def test_your_own_folder(run, tmp_path, capfd):
    corpus = text.python_corpus(30_000, min_bytes=20_000)
    # As many sources of the same names as before: nothing is compiled again.
    names = sorted(run[0]["weights"])
    for name in names:
        for i, document in enumerate(corpus[name]):
            path = tmp_path / "text" / name / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(document)
    options = ["--text", str(tmp_path / "text"), "--lower", names[1], "--hold", names[0]]
    options += ["--by", "1e-5", "--seed", "1", "--out", str(tmp_path / "out"), "--training"]
    result = quickstart.main(["--quick", *options])
    assert set(result["predicted_by_training"]) == set(names)
    for name, shift in result["predicted_by_training"].items():
        assert math.isfinite(shift["value"]), name
        assert shift["stderr"] > 0
    assert list(result["weights"]) == names
    assert result["target"] == {names[1]: -1e-5, names[0]: 0.0}
    assert f"lowers {names[1]!r} by 1e-05 nats and holds {names[0]!r}" in capfd.readouterr().out
    assert result["settings"]["text"] == str(tmp_path / "text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lower", "poetry"], "--lower 'poetry' is not a source; there are library"),
        (["--hold", "poetry"], "--hold 'poetry' is not a source"),
        (["--lower", "library", "--hold", "library"], "are the same source, 'library'"),
        (["--by", "0"], "--by must be a positive number of nats, got 0"),
        (["--by", "-0.1"], "--by must be a positive number"),
        (["--by", "nan"], "--by must be a positive number"),
        (["--text", "no/such/folder"], "folder must be an existing folder"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        quickstart.main(["--quick", "--out", str(tmp_path), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
