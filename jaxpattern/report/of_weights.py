"""The section of an intervention: its weights, and the shifts wanted, predicted and realized."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpattern.inversion.intervention import Intervention, describe
from jaxpattern.report.given import packed
from jaxpattern.report.parts import Arm, Child, compared, heat, table, tag


def section(
    solution: Intervention, realised: list[Arm], unit: str
) -> tuple[list[ET.Element], dict[str, Any] | None]:
    """The section, and ρ of every column where each is one loss."""
    title, (weights, _), notes = describe(solution)
    arms, wanted = predicted(solution)
    if realised and math.isfinite(float(solution.half_cosine)):
        arms = arms[:1]  # the plain prediction would be one more thing to look at
    parts = [
        tag("h2", title),
        tag("p", "The weight ρ multiplies a loss in what is trained on, Σρℓ / Σρ; 1 is the weight "
            "it has now."),
        table(list(weights.header), [_colored(row) for row in weights.rows], name="weights"),
        tag("h3", "Shifts: wanted, predicted" + ", realized" * bool(realised)),
        *compared([*arms, *realised], wanted, unit),
        *(tag("p", note, class_="note") for note in notes[1:]),
    ]  # fmt: skip
    return parts, None if solution.columns.grouped else _view(solution)


def _colored(row: Sequence[str]) -> list[Child]:
    """The mean weight, the second cell, colored by how far it is from 1."""
    change = float(row[1]) - 1
    return [row[0], heat(change, row[1], whole=1.0, own=1.0), *row[2:]]


def predicted(solution: Intervention) -> tuple[list[Arm], dict[str, float]]:
    """The cross-fitted prediction where there is one, the plain one, and what was wanted."""

    def arm(name: str, shifts: Mapping[str, Any], errors: Mapping[str, Any]) -> Arm:
        return Arm(name, {row: (float(x), float(errors[row])) for row, x in shifts.items()})

    plain = arm("predicted", solution.predicted_shift, solution.predicted_stderr)
    wanted = {row: float(rest) + plain.shifts[row][0] for row, rest in solution.residual.items()}
    crossed = arm(
        "predicted, cross-fitted", solution.cross_fitted_shift, solution.cross_fitted_stderr
    )
    if not all(math.isfinite(value) for value, _ in crossed.shifts.values()):
        return [plain], wanted
    return [crossed, plain._replace(name="predicted, plain")], wanted


def arms_of(name: str, given: Mapping[str, Any], rows: tuple[str, ...] | None) -> list[Arm]:
    """Shifts that someone measured: row → shift or (shift, error), or several such by name.

    Raises:
        TypeError: it is not such a mapping.
        ValueError: it is empty, or names a row that is not known.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name} must map rows to (value, standard error), or names to such mappings, got "
            f"{type(given).__name__}"
        )
    nested = [isinstance(value, Mapping) for value in given.values()]
    if not given or (any(nested) and not all(nested)):
        raise ValueError(f"{name} must hold rows, or names of mappings of rows, got {given!r:.80}")
    arms = []
    for arm, shifts in (given if any(nested) else {"realized": given}).items():
        where = f"{name}[{arm!r}]" if any(nested) else name
        unknown = [] if rows is None else [row for row in shifts if row not in rows]
        if unknown or not shifts:
            known = "rows" if rows is None else f"some of the rows {list(rows)}"
            raise ValueError(f"{where} must hold {known}, got {unknown or 'nothing'}")
        arms.append(
            Arm(str(arm), {row: _pair(f"{where}[{row!r}]", x) for row, x in shifts.items()})
        )
    return arms


def _pair(name: str, given: Any) -> tuple[float, float]:
    """A value and its error, NaN where it is not given."""
    try:
        pair = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        pair = np.zeros(0)
    if pair.shape not in ((), (2,)):
        raise TypeError(f"{name} must be a number or (value, standard error), got {given!r:.80}")
    value, error = (float(pair), math.nan) if pair.ndim == 0 else map(float, pair)
    if not math.isfinite(value) or error < 0:
        raise ValueError(f"{name} must be finite, its error not negative, got {given!r:.80}")
    return value, error


def _view(solution: Intervention) -> dict[str, Any]:
    """ρ of every column, as `page.js` reads it."""
    probes = {}
    for name, weights in solution.weights.items():
        values, mass = np.asarray(weights), np.asarray(solution.mass[name])
        probes[name] = {
            "shape": [len(values), values[0].size if len(values) else 0],
            "values": [packed(values, "f4")],
            "errors": None,
            "counted": None if (mass > 0).all() else packed(mass > 0, "u1"),
        }
    return {
        "title": "Weight of every column", "symbol": "ρ", "unit": "", "center": 1,
        "rows": ["weight ρ"], "probes": probes,
    }  # fmt: skip
