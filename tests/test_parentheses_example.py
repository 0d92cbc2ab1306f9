"""The example that chooses between two rules: its parts, and all of it at its smallest."""

import json

import jax
import numpy as np
import pytest

import parentheses as example
from jaxpattern.data import brackets
from jaxpattern.models import classifier


def test_training_strings_fit_both_rules_and_the_withheld_ones_do_not():
    train_set, withheld = example.make_data(example.SCALES["test"])
    strings = example.strings_of(train_set)
    category = brackets.categories(strings)
    label = np.asarray(train_set["label"]) > 0.5
    np.testing.assert_array_equal(category.nested, label)
    np.testing.assert_array_equal(category.equal_count, label)
    assert label.mean() == 0.5
    out = brackets.categories(example.strings_of(withheld))
    assert out.equal_count.all()
    assert not out.nested.any()
    for data in (train_set, withheld):
        texts = [brackets.to_text(string) for string in example.strings_of(data)]
        assert all(text[0] == "(" and text[-1] == ")" for text in texts)


def test_tilted_weights_have_the_wanted_sample_share_and_keep_the_labels():
    rng = np.random.default_rng(0)
    nested = np.arange(400) < 100
    score = rng.normal(size=400) + 3 * nested
    weights = example.tilted(score, nested, 0.4)
    assert example.sample_share(weights) == pytest.approx(0.4, abs=1e-6)
    assert weights[nested].sum() == pytest.approx(100)
    assert weights[~nested].sum() == pytest.approx(300)
    # ρ = exp(a s) up to a factor on either label.
    logs = np.log(weights[nested])
    slope = np.polyfit(score[nested], logs, 1)
    assert slope[0] > 0
    np.testing.assert_allclose(logs, np.polyval(slope, score[nested]), atol=1e-8)


def test_area_counts_pairs():
    values = np.array([3.0, 1.0, 2.0, 2.0, 0.0])
    members = np.array([True, False, True, False, False])
    # 3 beats 1, 2 and 0; 2 beats 1 and 0 and ties with 2.
    assert example.area(values, members, ~members) == pytest.approx(5.5 / 6)


def test_seeds_that_did_not_learn_count_for_neither_rule():
    def runs(*out):
        return {"accuracy": np.array([1.0, 1.0, 1.0, 0.5]), "out": np.array(out)}

    base, now = runs(0.0, 0.0, 0.5, 1.0), runs(1.0, 0.95, 1.0, 1.0)
    assert example.kinds_of(now)["NESTED"].tolist() == [True, True, True, False]
    row = example.row_of(now, base)
    assert (row["learned"], row["NESTED"]["count"], row["EQUAL-COUNT"]["count"]) == (3, 3, 0)
    assert (row["NESTED"]["gained"], row["NESTED"]["lost"]) == (3, 0)
    assert row["NESTED"]["mcnemar"] == pytest.approx(0.25)
    assert row["NESTED"]["fisher"] == pytest.approx(0.1)


def test_the_published_scale_can_be_built():
    settings = example.SCALES["paper"]
    assert (settings.model.d_model, settings.model.num_heads) == (64, 4)
    assert (max(settings.lengths), settings.strings) == (40, 200_000)
    assert settings.steps * settings.batch == 5 * settings.strings
    assert sum(settings.shares) == pytest.approx(1)
    shapes = jax.eval_shape(lambda: classifier.init(jax.random.key(0), settings.model))
    assert len(shapes["layers"]) == 3
    tiny = settings._replace(strings=400, withheld=100)
    train_set, _ = example.make_data(tiny)
    assert train_set["tokens"].shape[1] == 42 == settings.model.context


@pytest.mark.slow
def test_runs_and_goes_on_from_its_stages(tmp_path, capsys):
    arguments = ["--scale", "test", "--out", str(tmp_path)]
    first = example.main(arguments)
    assert set(first["arms"]) == set(example.ARMS)
    assert all(row["seeds"] == 4 for row in first["arms"].values())
    assert json.loads((tmp_path / "parentheses.json").read_text())["base"] == first["base"]
    assert (tmp_path / "parentheses.png").stat().st_size > 10_000

    stamp = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(stamp) == 1 + 2 + len(example.ARMS) + 1
    (tmp_path / "arm-unweighted" / "9000.npz").unlink()
    again = example.main(arguments)
    assert json.dumps(again) == json.dumps(first)
    made = {path for path, t in stamp.items() if path.stat().st_mtime_ns != t}
    assert {path.parent.name for path in made} == {"arm-unweighted"}
    capsys.readouterr()
