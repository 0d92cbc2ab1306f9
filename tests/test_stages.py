"""What the examples keep between runs."""

import pytest

import stages


def test_a_folder_that_cannot_be_written_ends_the_program(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"--out .*file cannot be written: File exists"):
        stages.Stages(tmp_path / "file", None)


def test_a_stage_of_other_settings_is_made_again(tmp_path, capsys):
    first, other = (stages.Stages(tmp_path, {"setting": value}) for value in (1, 2))
    assert first.stage("name", lambda: {"x": 1}) == {"x": 1}
    assert first.stage("name", lambda: {"x": 2}) == {"x": 1}
    assert "made again" not in capsys.readouterr().out
    assert first.stage("name", lambda: {"x": 3}, step=5) == {"x": 3}
    assert other.stage("name", lambda: {"x": 4}, step=5) == {"x": 4}
    assert "made again" in capsys.readouterr().out


def test_an_interrupted_stage_leaves_the_one_before(tmp_path):
    store = stages.Stages(tmp_path, None)
    store.stage("name", lambda: {"x": 1})

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.stage("name", interrupted, step=1)
    assert store.stage("name", lambda: {"x": 2}) == {"x": 1}
