"""What results say of themselves: few lines, values with errors, and never an exception."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_inversion import make_response, solve_quietly

import jaxpattern as jp
from jaxpattern import tables


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (-0.012341, 0.00056, "-0.01234 ± 0.00056"),
        (1234.5, 12.0, "1234 ± 12"),
        (3.2, 0.4, "3.20 ± 0.40"),
        (-1.23e-6, 4.5e-8, "(-1.230 ± 0.045)e-06"),
        (5e7, 1e6, "(5.00 ± 0.10)e+07"),
        (0.0, 0.25, "0.00 ± 0.25"),
        (0.5, None, "0.5 ± ?"),
        (0.5, np.nan, "0.5 ± ?"),
        (np.nan, 0.1, "nan ± 0.1"),
        (0.5, 0.0, "0.5 ± 0"),
        (0.0996, 2e-9, "0.0996 ± 2e-09"),
    ],
)
def test_values_with_errors(value, error, said):
    assert tables.measured(value, error) == said


def llc():
    return jp.LocalLearningCoefficient(
        mean=jnp.float32(-3.2), stderr=jnp.float32(0.4), per_chain=jnp.array([3.0, jnp.nan]),
        rhat=jnp.float32(1.01), ess=jnp.float32(40.0), trace=jnp.zeros((2, 5)),
        diverged=jnp.array([False, True]), cost=1200.0,
    )  # fmt: skip


def test_a_response_says_what_a_doubled_weight_does():
    response = jp.group_mean(make_response(2, halves=True))
    said = str(response)
    assert repr(response) == said
    row = next(line for line in said.splitlines() if line.startswith("row1"))
    factor = 30.0 * float(response.mass["code"])
    value, error = (factor * float(x["code"][1]) for x in (response.chi, response.stderr))
    assert tables.measured(value, error) in row
    for word in ("2 rows", "2 probe sets", "one per probe set", "standard error", "R-hat", "code"):
        assert word in said
    # The same numbers before grouping, and no error where there are no batches.
    ungrouped = str(make_response(2, halves=True))
    assert tables.measured(value, error) in ungrouped
    assert "24 columns, one per loss" in ungrouped
    assert "± ?" in str(replace(make_response(2), batches={}))


def test_an_intervention_leads_with_the_cross_fitted_shift():
    solution = solve_quietly(make_response(2, halves=True), {"row0": 1.0})
    said = str(solution)
    head = next(line for line in said.splitlines() if "wanted shift" in line)
    assert head.index("cross-fitted") < head.index("plain prediction")
    row = next(line for line in said.splitlines() if line.startswith("row0"))
    assert row.split()[1] == "1"
    shift, error = (x["row0"] for x in (solution.cross_fitted_shift, solution.cross_fitted_stderr))
    assert tables.measured(float(shift), float(error)) in row
    assert "cross-fitted" not in str(solve_quietly(make_response(2), {"row0": 1.0}))


def test_big_results_are_cut():
    shapes = {f"source number {g}": (2,) for g in range(40)}
    response = make_response(60, shapes=shapes, halves=True)
    for result in (response, solve_quietly(response, {"row0": 0.1})):
        lines = str(result).splitlines()
        assert len(lines) <= 22
        assert all(len(line) <= tables.MAX_WIDTH for line in lines)
        assert any("… " in line and "more" in line for line in lines)


def test_what_cannot_be_read_is_said():
    response = make_response(2, halves=True)
    said = []

    def watch(chi):
        inner = replace(response, chi=chi)
        said.append(str(inner))
        said.append(repr(solve_quietly(inner, {"row0": 1.0})))
        return chi

    jax.jit(watch)(response.chi)
    assert all("traced" in line for line in said)
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), response)
    assert "a stack of 2" in str(stack)
    assert stack.columns == response.columns
    solutions = jax.vmap(lambda r: solve_quietly(r, {"row0": 1.0}))(stack)
    assert "a stack of 2" in str(solutions)
    with pytest.raises(ValueError, match="stack of several"):
        solutions.over({name: np.zeros(s) for name, s in (("code", 5), ("prose", 9))})
    assert tables.text(tables.llc, llc()._replace(mean=object())).endswith("no numbers")


def test_pages_of_other_results():
    said = tables.text(tables.llc, llc())
    assert "λ̂ = -3.20 ± 0.40" in said
    assert "1 of 2 diverged" in said
    assert "not at a minimum" in said
    history = jp.History(
        loss=jnp.linspace(2.0, 1.0, 200),
        step=jnp.zeros(0),
        metrics={},
        skipped=jnp.int32(3),
        optimizer_state=(),
    )
    said = tables.text(tables.history, history)
    assert "200 steps" in said
    assert "3 steps left out" in said
    assert "1 to 10" in said

    def squared_error(params, batch):
        return (batch @ params) ** 2

    posterior = jp.localized_posterior(
        squared_error, jnp.ones(3), jnp.ones((8, 3)), nbeta=30.0, localization=5.0,
        weights=np.arange(8.0),
    )  # fmt: skip
    for word in ("squared_error", "nβ = 30", "γ = 5", "8 samples", "1 losses excluded"):
        assert word in str(posterior)
    assert "stack" in str(replace(posterior, nbeta=jnp.ones(4)))
    jax.jit(lambda n: said_of(replace(posterior, nbeta=n)))(1.0)


def said_of(posterior):
    assert "traced" in repr(posterior)
    return posterior.nbeta


def test_html_is_escaped():
    response = replace(make_response(2), rows=("<b>bold</b>", "a & b"))
    written = response._repr_html_()
    assert "&lt;b&gt;bold" in written
    assert "<b>bold" not in written
    assert "a &amp; b" in written
    assert written.count("<tr>") == 3


def test_other_results_in_notebooks():
    directions = jp.principal_directions(make_response(3, halves=True))
    written = directions._repr_html_()
    assert written.count("<tr>") == 4
    first = int(np.argmax(np.abs(directions.loadings[0])))
    assert f"{directions.rows[first]} {float(directions.loadings[0, first]):+.2f}" in written
    assert "reliability" in str(directions)
    together = jp.Measured({"<a>": llc(), "trace": "x < y"}, None)
    written = together._repr_html_()
    assert "<h4>&lt;a&gt;</h4><p><b>Local learning coefficient" in written
    assert "<pre>x &lt; y</pre>" in written
    numbers = np.arange(1.0, 21.0)
    problems = (("bad",),) * 5 + ((),) * 15
    swept = jp.Sweep(*[numbers] * 8, np.zeros((20, 1, 1)), numbers > 5, problems)
    written = swept._repr_html_()
    assert written.count("<tr>") == 21
    assert written.count("<td>bad</td>") == 5
    assert "15 of 20 settings are healthy" in written


# --- columns --------------------------------------------------------------------------------------


def test_columns_join_split_and_mean():
    columns = make_response(1).columns
    assert (columns.names, columns.size, columns.grouped) == (("code", "prose"), 24, False)
    flat = np.random.default_rng(0).normal(size=(2, 3, 24)).astype(np.float32)
    parts = columns.split(jnp.asarray(flat))
    assert {name: x.shape for name, x in parts.items()} == {
        "code": (2, 3, 5, 3),
        "prose": (2, 3, 9),
    }
    np.testing.assert_array_equal(columns.join(dict(reversed(parts.items()))), flat)
    mass = np.where(np.arange(24) % 4, np.arange(24.0), 0).astype(np.float32)
    flat[..., mass == 0] = np.nan
    means = columns.mean(jnp.asarray(flat), jnp.asarray(mass))
    for g, part in enumerate((slice(0, 15), slice(15, 24))):
        used = mass[part] > 0
        expected = flat[..., part][..., used] @ mass[part][used] / mass[part].sum()
        np.testing.assert_allclose(means[..., g], expected, rtol=1e-5, atol=1e-6)
    assert columns.group().grouped
    assert hash(columns) == hash(make_response(2).columns)


def test_mean_losses_are_the_mean_loss_of_each_batch():
    def loss_fn(params, batch):
        return (batch - params) ** 2

    batches = {"b": jnp.array([1.0, 2.0]), "a": jnp.array([3.0])}
    losses = jp.mean_losses(loss_fn, batches, weights={"b": np.array([1.0, 3.0])})
    assert list(losses) == ["b", "a"]
    np.testing.assert_allclose(losses["b"](jnp.float32(0.0)), (1 + 3 * 4) / 4)
    np.testing.assert_allclose(losses["a"](jnp.float32(0.0)), 9.0)
    with pytest.raises(ValueError, match=r"weights names \['c'\]"):
        jp.mean_losses(loss_fn, batches, weights={"c": np.ones(2)})
    with pytest.raises(ValueError, match="batches is empty"):
        jp.mean_losses(loss_fn, {})
