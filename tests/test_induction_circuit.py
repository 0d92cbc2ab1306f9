"""The induction demonstration at its tiniest: every stage, what it keeps, and going on."""

import json

import jax
import numpy as np
import pytest

import induction_circuit as example

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.slow

ARMS = ["up", "down", "permuted up", "permuted down", "repeated bigram", "gzip", "gradient"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("induction")
    arguments = ["--scale", "test", "--out", str(out), "--seeds", "1", "--arms", *ARMS]
    # Nearly all of the time is compilation of programs that run for a moment.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield example.main(arguments), out
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def test_it_keeps_every_stage(run):
    result, out = run
    stages = {path.name for path in out.glob("*.npz")}
    assert stages > {"data.npz", "base.npz", "response.npz", "gradient.npz"}
    assert stages > {"again.npz", "second_round.npz"}
    assert len(stages) == 8  # and those of the two groups of heads
    assert {path.stem for path in (out / "runs").glob("*.npz")} == {
        f"{arm.replace(' ', '_')}-{example.FIRST_SEED}" for arm in ["unweighted", *ARMS]
    }
    for picture in ("induction_circuit", "directions", "tokens"):
        assert (out / f"{picture}.png").stat().st_size > 10_000
    written = json.loads((out / "report.json").read_text())
    assert set(written["arms"]) == {"unweighted", *ARMS}
    assert result["arms"]["unweighted"]["loss_ratio"] == [1.0]


def test_weights_have_one_histogram_when_permuted_and_one_sample_size_among_baselines(run):
    arms = run[0]["arms"]
    for arm in ("up", "down"):
        share = arms[arm]["sample_share"]
        assert 0 < share < 1
        assert arms[f"permuted {arm}"]["sample_share"] == pytest.approx(share, rel=1e-4)
    # A class of a third of the tokens cannot have less than that.
    for arm in ("gzip", "gradient"):
        assert arms[arm]["sample_share"] == pytest.approx(arms["up"]["sample_share"], rel=1e-2)


def test_a_second_call_goes_on_and_adds_a_seed(run, capsys):
    result, out = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    arguments = ["--scale", "test", "--out", str(out), "--seeds", "2", "--arms", "up"]
    more = example.main(arguments)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    assert {path: after[path] for path in before} == before
    assert {path.stem for path in set(after) - set(before)} == {
        f"{arm}-{example.FIRST_SEED + 1}" for arm in ("unweighted", "up")
    }
    assert more["arms"]["up"]["loss_ratio"][0] == result["arms"]["up"]["loss_ratio"][0]
    assert "made again" not in capsys.readouterr().out


def test_formation_is_the_first_record_above_the_threshold():
    prefix = np.zeros((4, 2, 2))
    prefix[2:, 1, 0] = 0.4
    assert example.formation(np.array([0, 10, 20, 30]), prefix) == 20
    assert example.formation(np.array([0, 10, 20, 30]), 0 * prefix) == np.inf


def test_exact_statistics():
    few, many = np.arange(8.0), np.full(8, np.inf)
    assert example.sign_test(few, many) == 1 / 256
    assert example.sign_test(many, many) == 1
    # Of eight pairs only the extremes cover the median with 95 %: 1 − 2/2⁸ = 99.2 %.
    assert example.median_interval(few) == (3.5, 0, 7)
    assert example.median_interval(np.arange(9.0)) == (4, 1, 7)


def test_weights_of_a_wanted_sample_size():
    score = np.random.default_rng(0).normal(size=4000)
    for share in (0.5, 0.8):
        weights = example.at_share(score, share)
        assert example.sample_share(weights) == pytest.approx(share, rel=1e-3)
        assert weights.mean() == pytest.approx(1, rel=1e-5)
        assert weights.min() >= 0
    assert example.area(score, score > 0) == 1
    assert example.area(-score, score > 0) == 0


def test_the_part_of_a_score_that_is_in_context():
    tokens = np.random.default_rng(0).integers(0, 4, size=(2000, 33))
    bigram = np.random.default_rng(1).normal(size=(4, 4))[tokens[:, :-1], tokens[:, 1:]]
    before = np.pad(tokens[:, :-2], ((0, 0), (1, 0)), constant_values=4)
    trigram = np.random.default_rng(3).normal(size=(5, 4, 4))
    trigram = trigram[before, tokens[:, :-1], tokens[:, 1:]]
    rest = np.random.default_rng(2).normal(size=bigram.shape)
    found = example.in_context(5 * bigram + trigram + rest, tokens)
    assert np.corrcoef(found.ravel(), rest.ravel())[0, 1] > 0.99
    for part in (bigram, trigram):
        assert abs(np.corrcoef(found.ravel(), part.ravel())[0, 1]) < 0.02
    # Up to bigrams alone, trigrams stay.
    found = example.in_context(5 * bigram + trigram, tokens, 2)
    own = example.in_context(trigram, tokens, 2)
    assert np.corrcoef(found.ravel(), own.ravel())[0, 1] > 0.99
    assert np.corrcoef(found.ravel(), trigram.ravel())[0, 1] > 0.8


def test_weights_beside_a_score_leave_it_alone():
    held, score = np.random.default_rng(0).normal(size=(2, 100, 64))
    weights = example.beside(example.at_share(score + held, 0.6), held)
    for level in np.array_split(np.argsort(held.ravel()), example.STRATA):
        assert weights.ravel()[level].mean() == pytest.approx(1, rel=1e-5)
    assert np.corrcoef(weights.ravel(), score.ravel())[0, 1] > 0.5


def test_the_published_scale_can_be_built():
    settings = example.SCALES["paper"]
    assert settings.model.d_model == 256
    assert settings.model.num_layers * settings.model.num_heads == 16
    assert settings.probe_windows * settings.model.context >= 5_000
    assert settings.measure_at % settings.record_every == 0
    assert settings.measured_windows <= settings.windows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--arms", "sideways"], "['sideways'] are none of unweighted, up"),
        (["--scale", "large"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(capsys, options, message):
    with pytest.raises(SystemExit):
        example.parse(options)
    assert message in capsys.readouterr().err
