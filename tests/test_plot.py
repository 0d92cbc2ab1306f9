"""Figures: that they are drawn without a warning, say what they show, and are not blank."""

import builtins
import importlib
import io
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxpattern as jp
from jaxpattern import plot
from jaxpattern.inversion import solve_weights

SOURCES = ("prose", "code", "tables")


def render(figure):
    """The figure as pixels; drawing is where most warnings come from."""
    stream = io.BytesIO()
    figure.savefig(stream, format="rgba", dpi=60)
    pixels = np.frombuffer(stream.getvalue(), np.uint8)
    assert pixels.size > 4 * 200 * 100
    assert len(np.unique(pixels)) > 10
    return figure


def texts(figure):
    return "\n".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def make_response(columns=(), rows=("prose", "code"), scale=1e-3):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)  # noqa: E731
    K, size = len(rows), int(np.prod(columns, dtype=int))
    share = jnp.full(columns, 1 / (3 * size), jnp.float32)
    return jp.Response(
        chi={s: draw(K, *columns) for s in SOURCES},
        stderr={s: 0.2 * jnp.abs(draw(K, *columns)) for s in SOURCES},
        halves={s: draw(2, K, *columns) for s in SOURCES},
        batches={s: draw(8, K) for s in SOURCES},
        mass=dict.fromkeys(SOURCES, share),
        nbeta=jnp.float32(30.0),
        mean=draw(K), mean_stderr=draw(K), rhat=jnp.ones(K), ess=jnp.ones(K),
        diverged=jnp.zeros((K, 4), bool), rows=rows, cost=1.0, num_samples=3 * size,
        **EXTRA,
    )  # fmt: skip


# Fields of a response that figures do not look at.
EXTRA = {
    name: value
    for name, value in {"diagnostics": {}, "estimator": "covariance"}.items()
    if name in jp.Response.__dataclass_fields__
}


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-3, 1.0])
def test_response_matrix_holds_values_and_errors(scale):
    response = make_response(scale=scale)
    figure = render(plot.response_matrix(response))
    written = texts(figure)
    assert all(name in written for name in (*SOURCES, *response.rows))
    assert written.count("±") == 6
    if scale == 1.0:
        value = float(10 * response.chi["code"][1])
        assert f"{value:+.2f}" in written
    image = figure.axes[0].images[0]
    assert image.norm.vmin == -image.norm.vmax


def test_response_matrix_wants_a_grouped_response():
    with pytest.raises(ValueError, match=r"give group_mean\(response\)"):
        plot.response_matrix(make_response(columns=(5,)))


@pytest.mark.filterwarnings("ignore::jaxpattern.inversion.UnreachableTargetWarning")
@pytest.mark.parametrize("columns", [(), (5,), (5, 4)])
def test_weights_are_bars(columns):
    solution = solve_weights(make_response(columns), {"prose": -1e-3}, method=jp.ridge(tau=0.0))
    figure = render(plot.weights(solution))
    assert len(figure.axes[0].patches) == 3
    means = [f"{float(jnp.mean(solution.weights[s])):.2f}" for s in SOURCES]
    assert all(mean in texts(figure) for mean in means)


def test_shifts_show_both_and_the_target():
    predicted, realised = {"a": -0.01, "b": 0.002}, {"b": 0.001, "a": -0.008}
    errors = ({"a": 0.001, "b": 0.001}, {"a": 0.002, "b": 0.0005})
    figure = render(plot.shifts(predicted, realised, errors, target={"b": 0.0}))
    for word in ("predicted", "realized", "target", "10⁻³ nats", "95 %"):
        assert word in texts(figure)
    render(plot.shifts(predicted, realised, unit="bits"))
    with pytest.raises(ValueError, match="must have the same rows"):
        plot.shifts(predicted, {"a": 0.0})


@pytest.mark.filterwarnings("ignore::jaxpattern.inversion.UnreachableTargetWarning")
def test_figures_fit_axes_that_are_given():
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    response = make_response()
    assert plot.response_matrix(response, ax=left) is figure
    solution = solve_weights(response, {"prose": -1e-3}, method=jp.ridge(tau=0.0))
    assert plot.weights(solution, ax=middle) is figure
    assert plot.shifts(solution.predicted_shift, {"prose": 0.0, "code": 0.0}, ax=right) is figure
    render(figure)


@pytest.mark.parametrize("settings", [1, 5])
def test_sweep_marks_what_is_wrong(settings):
    rng = np.random.default_rng(1)
    healthy = np.arange(settings) != 4
    llc = np.where(healthy, 3.0 + np.arange(settings), np.nan)
    trace = llc[:, None, None] + rng.normal(size=(settings, 2, 30))
    unknown = np.full(settings, np.nan)
    result = jp.Sweep(
        step_size=np.geomspace(1e-4, 1e-3, settings),
        nbeta=np.where(np.arange(settings) % 2, 100.0, 30.0),
        localization=np.full(settings, 300.0),
        llc=llc, stderr=np.full(settings, 0.1), rhat=np.ones(settings), temperature=unknown,
        kept=unknown, trace=trace, healthy=healthy,
        problems=tuple(() if ok else ("all chains turned non-finite",) for ok in healthy),
    )  # fmt: skip
    figure = render(plot.sweep(result))
    assert texts(figure).count("healthy") == healthy.sum()
    assert ("all chains turned non-finite" in texts(figure)) == (settings == 5)


def test_loadings_name_directions_and_rows():
    response = make_response(columns=(7, 5), rows=("l0h0", "l0h1", "l1h0", "embed"))
    directions = jp.principal_directions(response)
    figure = render(plot.loadings(directions))
    written = texts(figure)
    assert all(row in written for row in directions.rows)
    assert f"{100 * float(directions.explained[0]):.1f} %, split" in written
    assert len(figure.axes[0].get_yticks()) == 4
    assert len(plot.loadings(directions, 2).axes[0].get_yticks()) == 2
    without = jp.principal_directions(replace(response, halves={}))
    assert "split" not in texts(render(plot.loadings(without)))


def test_heads_are_a_grid_of_layers():
    scores = jnp.array([[0.1, 0.9, 0.2], [0.0, 0.3, 0.4]])
    figure = render(plot.heads(scores, label="prefix matching"))
    assert all(word in texts(figure) for word in ("0.90", "layer", "head", "prefix matching"))
    named = {"l0h0": 0.1, "l0h1": -0.9, "l1h1": 0.3, "embed": 7.0, "l0": 5.0}
    figure = render(plot.heads(named))
    image = figure.axes[0].images[0]
    np.testing.assert_allclose(np.ma.filled(image.get_array(), 0), [[0.1, -0.9], [0, 0.3]])
    assert image.norm.vmax == -image.norm.vmin == 0.9
    with pytest.raises(ValueError, match=r"named like heads.*\['embed'\]"):
        plot.heads({"embed": 1.0})
    with pytest.raises(ValueError, match=r"\[layer, H\], got shape \[3\]"):
        plot.heads(np.zeros(3))


def test_tokens_are_text_on_colours():
    """Of each sequence the first token has no colour, and lines break as the text does."""
    text = "if x:\n\treturn 日本 $x$\x00 "
    tokens = np.array([[ord(c) for c in text]] * 2)
    coordinates = np.linspace(-1, 1, tokens.size - 2).reshape(2, -1)
    coordinates[1, -1] = np.nan
    decode = lambda tokens: "".join(map(chr, tokens))  # noqa: E731
    figure = plot.tokens(coordinates, tokens, decode=decode, width=12, label="induction")
    figure.savefig(io.BytesIO())
    boxes = figure.axes[0].collections[0]
    assert len(boxes.get_paths()) == tokens.size - 3
    colours = boxes.get_facecolors()
    assert colours[0, 2] > colours[0, 0]  # blue below zero
    assert colours[-1, 0] > colours[-1, 2]  # red above
    drawn = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in figure.axes[0].texts}
    assert drawn[0.5, 0] == "i"
    assert drawn[0.5, 5] == "↵"
    assert drawn[1.5, 4] == "r"
    assert drawn[1.5, 11] == "·"
    assert drawn[2.5, 2] == "$"
    assert (4.5, 0) in drawn  # the next sequence, after a line left free
    assert "induction" in texts(figure)
    render(plot.tokens(np.zeros((1, 3)), np.full((1, 4), 65)))
    with pytest.raises(ValueError, match="decode must be given"):
        plot.tokens(coordinates, tokens)


def test_a_long_token_goes_on_in_the_next_line():
    figure = plot.tokens(np.ones((1, 1)), np.array([[0, 1]]), decode=lambda t: "ab" * 5, width=8)
    places = [(t.get_text(), t.get_position()) for t in figure.axes[0].texts]
    assert places == [
        ("abababab", (0, 0.5)),
        ("ab", (0, 1.5)),
        ("ababab", (2, 1.5)),
        ("abab", (0, 2.5)),
    ]
    assert len(figure.axes[0].collections[0].get_paths()) == 2


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in ("plot", "plot_settings", "canvas"):
        monkeypatch.delitem(sys.modules, f"jaxpattern.{name}")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "jaxpattern\[plot\]"'):
        importlib.import_module("jaxpattern.plot")
