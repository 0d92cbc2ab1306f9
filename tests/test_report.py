"""Pages of results: what they hold, what they say to bad arguments, that they load nothing."""

import os
import stat
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config
from pages import Page, number, unpacked
from test_inversion import make_response, solve_quietly

import jaxpattern as jp
from jaxpattern.report import write

TOKENS = {
    "code": [
        *[["<b>", "if", " x", "\n"]] * 4,
        ["</script>", "<script>alert(1)</script>", "&amp;", "é"],
    ],
    "prose": [f"text {i}" for i in range(9)],
}  # fmt: skip


@pytest.fixture(scope="module")
def response():
    return replace(make_response(3, halves=True), ess=jnp.full(3, 80.0))


@pytest.fixture
def untyped():
    """Without annotations checked, so that the function's own words are heard."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def test_the_matrix_is_the_response_of_probe_sets(response, tmp_path):
    path = jp.report(response, tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    page = Page(path)
    head, *rows = page.tables["response-matrix"]
    assert head == ["row", "code", "prose"]
    assert [row[0] for row in rows] == list(response.rows)
    for k, row in enumerate(rows):
        for name, cell in zip(head[1:], row[1:], strict=True):
            mass = np.float64(response.mass[name]).ravel()
            effect = 30.0 * np.float64(response.chi[name][k]).ravel() @ mass
            # Six groups of draws, none lost.
            groups = np.float64(response.batches[name][:, k])
            error = 30.0 * mass.sum() * groups.std(ddof=1) / np.sqrt(6)
            got, rounding = number(cell)
            assert abs(got[0] - effect) < rounding[0] + 1e-5
            assert abs(got[1] - error) < rounding[1] + 1e-5
    assert "nats" in page.text
    assert "more weight raises" in page.text


def test_the_page_carries_chi_to_the_bit(response, tmp_path):
    losses = {"code": np.random.default_rng(2).gamma(2.0, size=(5, 3)).astype(np.float32)}
    mass = {"code": response.mass["code"].at[0, 1].set(0), "prose": response.mass["prose"]}
    page = Page(
        jp.report(
            replace(response, mass=mass), tmp_path / "page.html", tokens=TOKENS, losses=losses
        )
    )
    (view,), rows = page.data["views"], range(3)
    for name, shape in (("code", [5, 3]), ("prose", [9, 1])):
        probe = view["probes"][name]
        assert probe["shape"] == shape
        for kind, parts in (("values", response.chi), ("errors", response.stderr)):
            wanted = np.asarray(parts[name], np.float32).reshape(3, -1)
            np.testing.assert_array_equal([unpacked(probe[kind][k]) for k in rows], wanted)
        words = page.data["tokens"][name]
        found = [words["vocabulary"][i] for i in unpacked(words["ids"], "<i4")]
        assert found == [token for line in TOKENS[name] for token in np.atleast_1d(line).tolist()]
    assert unpacked(view["probes"]["code"]["counted"], "u1").tolist() == [1, 0] + 13 * [1]
    assert view["probes"]["prose"]["counted"] is None
    np.testing.assert_array_equal(unpacked(page.data["losses"]["code"]), losses["code"].ravel())
    directions = jp.principal_directions(replace(response, mass=mass))
    np.testing.assert_allclose(view["directions"]["loadings"], directions.loadings, atol=1e-5)
    shown = page.tables["directions"]
    assert float(shown[1][1].rstrip("%")) == pytest.approx(
        100 * float(directions.explained[0]), abs=0.06
    )
    got = [[float(x) for x in row[1:]] for row in shown[5:]]
    np.testing.assert_allclose(got, np.asarray(directions.loadings).T, atol=0.0051)


def test_text_is_text(response, tmp_path):
    rows = ("<img src=x onerror=alert(1)>", "a & b", "\u2028")
    page = Page(
        jp.report(
            replace(response, rows=rows), tmp_path / "p.html", tokens=TOKENS, title="<i>title</i>"
        )
    )
    assert [name for name, _ in page.tags].count("script") == 2
    assert not {"img", "i", "b"} & {name for name, _ in page.tags} - {"b"}
    assert page.tables["response-matrix"][1][0] == rows[0]
    data = page.source.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028") & set(data)
    assert "<script>alert(1)</script>" in page.data["tokens"]["code"]["vocabulary"]


def test_nothing_is_loaded(response, tmp_path):
    page = Page(jp.report(response, tmp_path / "page.html"))
    assert "http://" not in page.source
    assert "https://" not in page.source
    loads = [(n, v) for n, a in page.tags for k, v in a.items() if k in ("src", "href", "action")]
    assert loads == [("link", "data:,")]
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_verdicts_and_health_are_in_words(response, tmp_path):
    page = Page(jp.report(response, tmp_path / "page.html"))
    assert "Fine: nothing found that speaks against it." in page.text
    assert [row[1] for row in page.tables["chains"][1:]] == ["fine"] * 3
    doubtful = replace(
        response, rhat=jnp.array([1.0, 1.5, 1.01]),
        diverged=jnp.array([[False, False], [False, False], [True, False]]),
        diagnostics={
            "drift": jnp.array([0.1, 0.2, 9.0]), "drift_size": jnp.array([0.1, 0.1, 2.5]),
            "spread": jnp.ones(3),
            "growth": jnp.array([[[1.0, 2.0]], [[0.5, jnp.nan]], [[7.0, 3.0]]]),
        },
    )  # fmt: skip
    page = Page(jp.report(doubtful, tmp_path / "page.html"))
    head, *rows = page.tables["chains"]
    assert "Careful: row1: the chains disagree (R-hat 1.50)" in page.text
    assert [row[1] for row in rows][:2] == ["fine", "the chains disagree (R-hat 1.50)"]
    assert "drifting (by 2.5" in rows[2][1]
    column = {name: [row[i] for row in rows] for i, name in enumerate(head)}
    assert column["R-hat"] == ["1.000", "1.500", "1.010"]
    assert column["growth"] == ["2", "0.5", "7"]
    assert column["drift"] == ["0.1", "0.1", "2.5"]
    assert column["lost chains"] == ["0 of 2", "0 of 2", "1 of 2"]


def test_why_there_are_no_directions_is_said(response, tmp_path):
    path = tmp_path / "page.html"
    still = {name: x.at[1].set(0.25) for name, x in response.chi.items()}
    page = Page(jp.report(replace(response, chi=still), path))
    assert "None: rows ['row1'] of χ do not vary over the columns." in page.text
    lost = {**response.chi, "prose": response.chi["prose"].at[0, 3].set(jnp.nan)}
    page = Page(jp.report(replace(response, chi=lost), path))
    assert "None: χ is not finite at columns of nonzero weight." in page.text
    assert "directions" not in page.tables
    page = Page(jp.report(make_response(1, halves=True), path))
    assert "Principal directions" not in page.text


def test_an_intervention_beside_what_came(response, tmp_path):
    grouped = jp.group_mean(response)
    solution = solve_quietly(grouped, {"row0": 0.05})
    realised = {"again": {"row0": (0.04, 0.01), "row2": (-0.3, 0.2)}, "retrained": {"row1": 0.5}}
    path = tmp_path / "page.html"
    page = Page(jp.report([grouped, solution], path, realised=realised))
    head, *rows = page.tables["shifts"]
    assert head[2:] == ["wanted", "predicted, cross-fitted", "again", "retrained"]
    power = -3 if "10⁻³" in head[1] else 0
    for row in rows:
        crossed = solution.cross_fitted_shift[row[0]], solution.cross_fitted_stderr[row[0]]
        given = [crossed, *(realised[arm].get(row[0]) for arm in head[4:])]
        for cell, pair in zip(row[3:], given, strict=True):
            if pair is None:
                assert cell == "–"
                continue
            value, error = pair if isinstance(pair, tuple) else (pair, np.nan)
            got, rounding = number(cell)
            scaled = np.array([float(value), float(error)]) / 10.0**power
            np.testing.assert_allclose(got, scaled, atol=max(rounding) + 1e-4, equal_nan=True)
    assert float(rows[0][2]) * 10.0**power == pytest.approx(0.05, rel=6e-3)
    assert [row[2] for row in rows[1:]] == ["–", "–"]
    assert "“again” beside “predicted, cross-fitted”: the same sign in" in page.text
    weights = {row[0]: float(row[1]) for row in page.tables["weights"][1:]}
    for name, weight in weights.items():
        assert weight == pytest.approx(float(solution.weights[name]), rel=6e-3)
    assert page.data["views"] == []
    # One shift for each row is a run by itself.
    page = Page(jp.report(solution, path, realised={"row0": (0.04, 0.01)}))
    assert page.tables["shifts"][0][-1] == "realized"


def test_weights_of_single_losses(response, tmp_path):
    solution = solve_quietly(response, {"row0": 0.05})
    page = Page(jp.report(solution, tmp_path / "page.html", tokens={"code": TOKENS["code"]}))
    (view,) = page.data["views"]
    assert (view["center"], view["probes"]["code"]["errors"]) == (1, None)
    np.testing.assert_array_equal(
        unpacked(view["probes"]["code"]["values"][0]), np.float32(solution.weights["code"]).ravel()
    )


def test_training_runs_side_by_side(tmp_path):
    arms = {
        "predicted": {"a": (0.1, 0.01), "b": (-0.2, 0.02)},
        "weighted": {"a": (0.115, 0.01), "b": (-0.5, 0.02)},
        "permuted": {"a": (-0.01, 0.01), "b": (0.0, 0.02)},
    }
    page = Page(jp.report(arms, tmp_path / "page.html", unit="bits"))
    head, *rows = page.tables["shifts"]
    assert [name for name in head[2:]] == list(arms)
    assert "10⁻³ bits" in head[1]
    assert rows[1] == ["b", "", "-200 ± 20", "-500 ± 20", "0 ± 20"]
    assert (
        "“weighted” beside “predicted”: the same sign in 2 of 2 rows, within two standard errors "
        "in 1 of 2." in page.text
    )
    assert "“permuted” beside “predicted”: the same sign in 0 of 2 rows" in page.text


def test_rounds_of_patterning(response, tmp_path):
    solution = solve_quietly(response, {"row0": 0.05})
    shifts = {"row0": -0.1, "row1": 0.2}
    rounds = [
        jp.Round(
            response=response, solution=solution, weights=jnp.ones(4), scale=1.0,
            wanted={"row0": -0.1}, predicted=shifts, realised={n: 2 * x for n, x in shifts.items()},
            realised_stderr=dict.fromkeys(shifts, 0.01), total=shifts,
            total_stderr=dict.fromkeys(shifts, 0.01), effective_share=0.9,
        )
    ] * 2  # fmt: skip
    found = jp.Pattern({}, {}, (), tuple(rounds), {"row0": -0.2}, {})
    page = Page(jp.report(found, tmp_path / "page.html"))
    assert len(page.tables["shifts"]) == 2 * 3
    assert page.tables["shifts"][1][2:] == ["-100", "-100 ± ?", "-200 ± 10"]
    assert "Round 2" in page.text


def test_tokens_as_numbers(response, tmp_path):
    data = np.random.default_rng(0).integers(97, 123, (5, 4))
    tokens = {"code": data, "prose": [list(b"caf\xc3\xa9"), *([98] * i for i in range(1, 9))]}
    page = Page(jp.report(response, tmp_path / "page.html", tokens=tokens))
    kept = page.data["tokens"]
    found = [kept["code"]["vocabulary"][i] for i in unpacked(kept["code"]["ids"], "<i4")]
    assert found == [chr(i) for i in data.ravel()]
    assert kept["code"]["length"] == 4
    assert kept["prose"]["vocabulary"][0] == "café"
    page = Page(
        jp.report(
            response, tmp_path / "page.html", tokens={"code": jnp.asarray(data[:, 1:] * 100)},
            decode=lambda ids: f"<{ids[0] // 100}>",
        )
    )  # fmt: skip
    kept = page.data["tokens"]["code"]
    assert kept["length"] == 3
    assert kept["vocabulary"][0] == f"<{data[0, 1]}>"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"tokens": {"cod": []}}, ValueError, r"names \['cod'\], .* are \['code', 'prose'\]"),
        ({"tokens": ["a"]}, TypeError, "tokens must map probe sets to values, got list"),
        ({"tokens": {"code": "abc"}}, TypeError, r"\['code'\] must be rows of tokens, got str"),
        (
            {"tokens": {"code": [["a"] * 5] * 5}},
            ValueError,
            r"\['code'\] must be 5 rows of 4 tokens \(or 3, one for each loss\), got 5 rows of 5",
        ),
        ({"tokens": {"code": [["a"] * 4] * 2}}, ValueError, "must be 5 rows .*, got 2 rows of 4"),
        (
            {"tokens": {"code": [["a"] * 4] * 4 + [["a"] * 3]}},
            ValueError,
            "must have rows of one length, got 3 and 4",
        ),
        ({"tokens": {"prose": ["a"] * 3}}, ValueError, "must be 9 texts .*, got 3 rows"),
        ({"tokens": {"code": np.ones((5, 4))}}, TypeError, r"\[0\] must be a row .* float64\[4\]"),
        ({"tokens": {"code": np.full((5, 4), 300)}}, ValueError, "decode must be given"),
        ({"decode": "utf-8", "tokens": {}}, TypeError, "decode must be a function"),
        ({"losses": {"code": np.ones(3)}}, ValueError, r"must have .* \[5, 3\], got \[3\]"),
        ({"realised": {"row0": 1.0}}, ValueError, "belongs to one Intervention, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(untyped, response, tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        jp.report(response, tmp_path / "page.html", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("realised", "error", "message"),
    [
        ({}, ValueError, "realised must hold rows"),
        ({"row0": 0.1, "arm": {"row0": 0.1}}, ValueError, "realised must hold rows, or names"),
        ({"rowX": 0.1}, ValueError, r"some of the rows \['row0', 'row1', 'row2'\], got \['rowX'\]"),
        ({"arm": {"row0": (1, 2, 3)}}, TypeError, r"\['arm'\]\['row0'\] must be a number or"),
        ({"row0": (0.1, -1.0)}, ValueError, "its error not negative"),
        ({"row0": float("nan")}, ValueError, "must be finite"),
        ([1], TypeError, "realised must map rows"),
    ],
)
def test_what_came_is_checked(untyped, response, tmp_path, realised, error, message):
    solution = solve_quietly(response, {"row0": 0.05})
    with pytest.raises(error, match=message):
        jp.report(solution, tmp_path / "page.html", realised=realised)


def test_results_that_cannot_be_shown(untyped, response, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    with pytest.raises(TypeError, match=r"result must be a Response, .* got SimpleNamespace"):
        jp.report(SimpleNamespace(), path)
    with pytest.raises(ValueError, match="result is empty"):
        jp.report([], path)
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), response)
    with pytest.raises(ValueError, match="stack of several of Response"):
        jp.report(stack, path)
    with pytest.raises(TypeError, match="under jit"):
        jax.jit(lambda chi: jp.report(replace(response, chi=chi), path))(response.chi)
    with pytest.raises(ValueError, match="one column per probe set; report the response before"):
        jp.report(jp.group_mean(response), path, tokens=TOKENS)
    other = make_response(2, shapes={"code": (4, 3)}, halves=True)
    with pytest.raises(ValueError, match=r"'code' of different shapes, \[5, 3\] and \[4, 3\]"):
        jp.report([response, other], path)
    monkeypatch.setattr(write, "MAX_BYTES", 500)
    with pytest.raises(ValueError, match=r"the page would hold .* at most 0 can be looked at"):
        jp.report(response, path)
    assert not list(tmp_path.iterdir())


def test_where_it_cannot_be_written_is_said_first(response, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_check", lambda results: pytest.fail("work before the check"))
    with pytest.raises(FileNotFoundError, match=r"cannot be written: .*Its folder must exist"):
        jp.report(response, tmp_path / "no" / "page.html")
    with pytest.raises(IsADirectoryError, match=r"must be a file such as .*report.html"):
        jp.report(response, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot be written"):
        jp.report(response, tmp_path / "file" / "page.html")


def test_a_page_is_replaced_as_a_whole(response, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(write, "_page", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            jp.report(response, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    mask = os.umask(0o027)
    try:
        jp.report(response, tmp_path / "other.html")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "other.html").stat().st_mode) == 0o640
    assert len(list(tmp_path.iterdir())) == 2
