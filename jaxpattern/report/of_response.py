"""The section of a response: what χ is, the matrix, directions, the chains, and every column."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxpattern.report.given import packed
from jaxpattern.report.parts import Child, heat, largest, scale_of, table, tag
from jaxpattern.response.directions import PrincipalDirections, principal_directions
from jaxpattern.response.result import Response, describe, doubts, effects
from jaxpattern.tables import measured

MAX_DIRECTIONS = 8
LEAST = 1e-3  # share of the variance of a direction that is listed

_SAMPLED = (
    "Each row is an expectation ⟨φ⟩ over the network's posterior: the loss on some held-out text, "
    "or how much a component of the network matters. "
)
_TRAINED = (
    "Each row is φ at the end of training, a mean over seeds: the loss on some held-out text. "
)
_MEANING = (
    "χ says how it answers to the training data, of which a column is one loss, or the mean of a "
    "probe set. Raising the weight ρ of a column from 1 to 2 moves ⟨φ⟩ by nβ·q·χ, to first order; "
    "q is the column's share of the data."
)


def section(response: Response, unit: str) -> tuple[list[ET.Element], dict[str, Any] | None]:
    """The section, and the numbers of its columns where each is one loss."""
    title, _, notes = describe(response)
    fine, trained = not any(doubts(response)), "horizon" in response.diagnostics
    directions = _directions(response)
    parts = [
        tag("h2", title),
        tag("p", tag("strong", "Fine: " if fine else "Careful: "),
            f"{response.verdict.removeprefix('χ: ')}.",
            class_="verdict " + ("fine" if fine else "doubt")),
        tag("p", (_TRAINED if trained else _SAMPLED) + _MEANING),
        tag("p", tag("span", "χ > 0", class_="heat pos", style="--v:1"),
            " more weight raises ⟨φ⟩. ",
            tag("span", "χ < 0", class_="heat neg", style="--v:1"),
            f" more weight lowers it. χ is in units of φ ({unit}) times those of a loss."),
        tag("p", *notes[1:-1], class_="note"),
        tag("h3", "Response matrix"),
        *_matrix(response, unit),
        tag("h3", "Training runs" if trained else "Chains"),
        *_health(response, unit),
    ]  # fmt: skip
    if isinstance(directions, str):
        parts += [tag("h3", "Principal directions"), tag("p", directions, class_="note")]
    elif directions is not None:
        parts += [tag("h3", "Principal directions"), *_loadings(directions)]
    if response.columns.grouped:
        return parts, None
    return parts, _view(response, None if isinstance(directions, str) else directions, unit)


def _matrix(response: Response, unit: str) -> list[ET.Element]:
    """nβ q χ of each row and probe set."""
    effect, error = effects(response)
    names = response.columns.names
    if set(names) == set(response.rows):  # in the same order, so that the diagonal is one
        order = [names.index(row) for row in response.rows]
        names, effect, error = response.rows, effect[:, order], error[:, order]
    scale = scale_of(effect, unit)
    whole = largest(effect)
    body: list[list[Child]] = []
    for row, values, errors in zip(response.rows, effect, error, strict=True):
        cells: list[Child] = [row]
        for value, sigma in zip(values, errors, strict=True):
            shown = measured(value / scale.divisor, sigma / scale.divisor)
            weak = bool(abs(value) < 2 * sigma)
            cells.append(heat(value, shown, whole=whole, own=largest(values), weak=weak))
        body.append(cells)
    said = (
        f"By how much ⟨φ⟩ of a row moves, in {scale.unit}, when the weight of a whole probe set "
        "goes from 1 to 2: nβ·q·χ ± one standard error. Italic: within two errors of zero."
    )
    return [
        tag("p", said, class_="note"),
        _by_row(),
        table(["row", *names], body, name="response matrix"),
    ]


def _by_row() -> ET.Element:
    box = tag("input", type="checkbox", class_="by-row")
    return tag("label", box, " color each row by its own largest value", class_="control")


def _health(response: Response, unit: str) -> list[ET.Element]:
    """Row by row: R-hat, effective sample size, drift, growth and what speaks against it."""
    known = {name: _worst(x) for name, x in response.diagnostics.items()}
    columns = [
        (head, known[name], digits, meaning)
        for name, head, digits, meaning in _DIAGNOSTICS
        if name in known and np.shape(known[name]) == (len(response.rows),)
        and np.isfinite(known[name]).any()
    ]  # fmt: skip
    lost = np.asarray(response.diverged).sum(axis=-1)
    chains = np.shape(response.diverged)[-1]
    mean, stderr = np.asarray(response.mean), np.asarray(response.mean_stderr)
    rhat, ess = np.asarray(response.rhat), np.asarray(response.ess)
    body: list[list[Child]] = []
    for k, (row, found) in enumerate(zip(response.rows, doubts(response), strict=True)):
        cells: list[Child] = [
            row,
            tag("td", "; ".join(found) if found else "fine", class_="doubt" if found else "words"),
            measured(float(mean[k]), float(stderr[k])),
            _said(rhat[k], ".3f"),
            _said(ess[k], ".0f"),
            *(_said(values[k], digits) for _, values, digits, _ in columns),
            f"{int(lost[k])} of {chains}",
        ]
        body.append(cells)
    meanings = [
        ("R-hat", "1 where chains agree; above 1.2 they do not."),
        ("ESS", "effective number of independent draws, over all chains."),
        *((head, meaning) for head, _, _, meaning in columns),
        ("lost chains", "chains that diverged; they count in no number."),
    ]
    header = ["row", "in words", f"⟨φ⟩, {unit}", *(head for head, _ in meanings)]
    listed = [
        tag(kind, word) for pair in meanings for kind, word in zip(("dt", "dd"), pair, strict=True)
    ]
    return [
        table(header, body, name="chains"),
        tag("details", tag("summary", "What these columns mean"), tag("dl", *listed)),
    ]


_DIAGNOSTICS = (
    ("drift_size", "drift", ".2g", "a trend over the draws, in standard deviations of the trace."),
    ("drift", "drift, t", ".2g", "the same over its own error; above 6 it is a trend."),
    ("stiffness", "εP", ".2g", "step size times the largest curvature; above 1 the step is too "
     "large, from 4 on chains leave for infinity."),
    ("remainder", "left in window", ".2g", "share of the response that the window or the chain "
     "cuts off; above 0.1 χ is incomplete."),
    ("slope", "covariance / χ", ".2g", "what the covariance of the same draws says, as a multiple "
     "of χ; near 1 where both agree."),
    ("growth", "growth", ".2g", "how many times a small change of the parameters grows along the "
     "run, at worst."),
    ("horizon", "horizon", ".0f", "number of steps for which the derivative can be trusted."),
    ("residual", "residual", ".2g", "what the linear solves leave; above 0.1 they failed."),
)  # fmt: skip


def _said(value: Any, digits: str) -> str:
    return format(float(value), digits) if math.isfinite(float(value)) else "–"


def _worst(values: Any) -> np.ndarray:
    """The largest of each row, over chains and the like."""
    array = np.asarray(values, np.float64)
    flat = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
    empty = ~np.isfinite(flat).any(axis=1)
    return np.where(empty, np.nan, np.max(np.where(np.isfinite(flat), flat, -np.inf), axis=1))


def _directions(response: Response) -> PrincipalDirections | str | None:
    """The leading directions, or why there are none; None where there is nothing to decompose."""
    columns = response.columns
    mass = {name: np.asarray(response.mass[name]) for name in columns.names}
    most = min(len(response.rows), sum(int(np.sum(x > 0)) for x in mass.values()), MAX_DIRECTIONS)
    if most < 2:
        return None
    if not all(np.isfinite(np.asarray(response.chi[n])[:, x > 0]).all() for n, x in mass.items()):
        return "None: χ is not finite at columns of nonzero weight."
    found = _decomposed(response, num=most)
    scale, center = np.asarray(found.scale), np.asarray(found.center)
    still = scale <= 10 * np.finfo(scale.dtype).eps * np.abs(center)
    if still.any():
        names = [row for row, no in zip(response.rows, still, strict=True) if no]
        return f"None: rows {names} of χ do not vary over the columns."
    kept = slice(max(int(np.sum(np.asarray(found.explained) > LEAST)), 1))
    return replace(
        found,
        **{name: jax.device_put(np.asarray(getattr(found, name))[kept]) for name in
           ("loadings", "variance", "explained", "noise_variance", "reliability", "half_cosine")},
    )  # fmt: skip


# One program; what it cannot check while it is traced is checked above.
_decomposed = jax.jit(principal_directions, static_argnames="num")


def _loadings(directions: PrincipalDirections) -> list[ET.Element]:
    """Directions side by side: what they explain, how far they repeat, and their loadings."""
    loadings = np.asarray(directions.loadings, np.float64)
    top = largest(loadings)
    about: Sequence[tuple[str, Any, str]] = (
        ("variance explained", np.asarray(directions.explained), ".1%"),
        ("of that, noise", _ratio(directions.noise_variance, directions.variance), ".0%"),
        ("reliability", np.asarray(directions.reliability), ".2f"),
        ("agreement of two halves", np.asarray(directions.half_cosine), ".2f"),
    )
    body: list[list[Child]] = [
        [name, *(_said(x, form) for x in values)] for name, values, form in about
    ]
    for k, row in enumerate(directions.rows):
        cells = [
            heat(x, f"{x:+.2f}", whole=top, own=largest(loadings[:, k])) for x in loadings[:, k]
        ]
        body.append([row, *cells])
    said = (
        "What columns have in common in how they act, each row of χ standardized over the columns. "
        "A column of positive coordinate raises, with more weight, the rows of positive loading. "
        "Reliability: cosine between two halves of the draws; near 0 is noise."
    )
    heads = [f"{k}" for k in range(len(loadings))]
    return [tag("p", said, class_="note"), table(["direction", *heads], body, name="directions")]


def _ratio(part: Any, whole: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.minimum(np.asarray(part, np.float64) / np.asarray(whole, np.float64), 1.0)


def _view(response: Response, directions: PrincipalDirections | None, unit: str) -> dict[str, Any]:
    """χ and its error of every row and column, row by row, as `page.js` reads them."""
    probes = {
        name: {
            "shape": [len(mass), mass[0].size if len(mass) else 0],
            "values": [packed(row, "f4") for row in np.asarray(response.chi[name])],
            "errors": [packed(row, "f4") for row in np.asarray(response.stderr[name])],
            "counted": None if (mass > 0).all() else packed(mass > 0, "u1"),
        }
        for name, mass in ((name, np.asarray(response.mass[name])) for name in response.chi)
    }
    view: dict[str, Any] = {
        "title": "Tokens" if any(len(s) > 1 for s in response.columns.shapes) else "Samples",
        "symbol": "χ", "unit": f"{unit} × loss", "center": 0, "rows": list(response.rows),
        "probes": probes,
    }  # fmt: skip
    if directions is not None:
        view["directions"] = {
            "rows": [response.rows.index(row) for row in directions.rows],
            "center": np.asarray(directions.center, np.float64).tolist(),
            "scale": np.asarray(directions.scale, np.float64).tolist(),
            "loadings": np.asarray(directions.loadings, np.float64).tolist(),
        }
    return view
