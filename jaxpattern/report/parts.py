"""What sections of a page are made of: elements, tables, colored cells, numbers on an axis.

Elements are those of `xml.etree`, which escapes every text and attribute as it writes them.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxpattern.tables import Grid, measured

Child = ET.Element | str


def tag(name: str, *children: Child, **attributes: object) -> ET.Element:
    """An element; `class_` is the attribute class, and `data_view` is data-view."""
    made = ET.Element(
        name, {key.strip("_").replace("_", "-"): str(x) for key, x in attributes.items()}
    )
    last: ET.Element | None = None
    for child in children:
        if not isinstance(child, str):
            made.append(child)
            last = child
        elif last is None:
            made.text = (made.text or "") + child
        else:
            last.tail = (last.tail or "") + child
    return made


def written(elements: Iterable[ET.Element]) -> str:
    """Their HTML."""
    return "\n".join(ET.tostring(e, encoding="unicode", method="html") for e in elements)


def table(
    header: Sequence[Child], rows: Sequence[Sequence[ET.Element | str]], *, name: str
) -> ET.Element:
    """A table that scrolls by itself where it is wider than the page; rows begin with their name.

    Args:
        header: column heads.
        rows: texts, or elements that are cells themselves.
        name: what it is called by screen readers, and its class.
    """

    def cell(child: Child, first: bool) -> ET.Element:
        if isinstance(child, ET.Element) and child.tag == "td":
            return child
        return tag("th", child, scope="row") if first else tag("td", child)

    head = tag("tr", *(tag("th", child, scope="col") for child in header))
    body = [tag("tr", *(cell(child, i == 0) for i, child in enumerate(row))) for row in rows]
    inner = tag("table", tag("thead", head), tag("tbody", *body), class_=name.replace(" ", "-"))
    return tag("div", inner, class_="wide", tabindex="0", role="region", aria_label=name)


def of_grid(grid: Grid, name: str) -> ET.Element:
    """A grid as a table."""
    return table(list(grid.header), [list(row) for row in grid.rows], name=name)


def heat(value: float, text: str, *, whole: float, own: float, weak: bool = False) -> ET.Element:
    """A cell colored by its sign and size against the whole table, or against its own row."""
    if not math.isfinite(value):
        return tag("td", text)
    sides = [min(abs(value) / top, 1.0) if top > 0 else 0.0 for top in (whole, own)]
    side = "pos" if value > 0 else "neg"
    return tag(
        "td", text, class_=f"heat {side}" + " weak" * weak,
        style=f"--all:{sides[0]:.3f};--own:{sides[1]:.3f}",
    )  # fmt: skip


class Scale(NamedTuple):
    """A power of ten that numbers are divided by, and how it is said: `10⁻³ nats`."""

    divisor: float
    unit: str


def scale_of(values: np.ndarray, unit: str) -> Scale:
    """The power of a thousand that the largest of the values has."""
    finite = np.abs(values[np.isfinite(values)])
    top = float(finite.max()) if finite.size else 0.0
    power = 3 * math.floor(math.log10(top) / 3) if top > 0 else 0
    if power == 0:
        return Scale(1.0, unit)
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return Scale(10.0**power, f"10{raised} {unit}".strip())


def largest(values: np.ndarray) -> float:
    """The largest size of those that are finite, or 0."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0


class Arm(NamedTuple):
    """Shifts under one name: row → (value, standard error), NaN where it is not known."""

    name: str
    shifts: dict[str, tuple[float, float]]


_WIDTH, _MARGIN, _LINE = 280, 20, 11


def compared(arms: Sequence[Arm], wanted: dict[str, float], unit: str) -> list[ET.Element]:
    """Arms side by side: a table, a line drawn in each row, and the first against the others.

    Args:
        arms: the first is what the others are compared with.
        wanted: row → the shift that was asked for.
        unit: of the shifts.
    """
    rows = list(dict.fromkeys(row for arm in arms for row in arm.shifts))
    pairs = np.array([arm.shifts[row] for arm in arms for row in arm.shifts], float)
    ends = pairs[:, :1] + np.nan_to_num(2 * pairs[:, 1:]) * np.array([-1, 1])
    everything = np.append(ends.ravel(), list(wanted.values()))
    scale = scale_of(np.append(pairs[:, 0], list(wanted.values())), unit)
    reach = largest(everything) or 1.0
    asked = [row for row in rows if row in wanted]
    header: list[Child] = [
        "row", _axis(reach / scale.divisor, scale.unit), *(["wanted"] if asked else []),
    ]  # fmt: skip
    header += [tag("span", _key(i), f" {arm.name}") for i, arm in enumerate(arms)]
    body: list[list[Child]] = []
    for row in rows:
        cells: list[Child] = [row, _drawn(arms, row, wanted.get(row), reach)]
        if asked:
            cells.append(f"{wanted[row] / scale.divisor:.3g}" if row in wanted else "–")
        for arm in arms:
            value, error = arm.shifts.get(row, (math.nan, math.nan))
            shown = measured(value / scale.divisor, error / scale.divisor)
            cells.append(shown if row in arm.shifts else "–")
        body.append(cells)
    said = f"Shifts in {scale.unit}, ± one standard error; drawn bars are two."
    if asked:
        said += " The dashed line is what was wanted."
    return [
        table(header, body, name="shifts"),
        tag("p", said, class_="note"),
        *(tag("p", _agreement(arms[0], arm), class_="note") for arm in arms[1:]),
    ]


def _agreement(first: Arm, other: Arm) -> str:
    """In how many rows two arms agree."""
    common = [(first.shifts[row], other.shifts[row]) for row in first.shifts if row in other.shifts]
    signs = sum(a[0] * b[0] > 0 for a, b in common)
    known = [(a, b) for a, b in common if math.isfinite(a[1]) and math.isfinite(b[1])]
    near = sum(abs(a[0] - b[0]) <= 2 * math.hypot(a[1], b[1]) for a, b in known)
    said = f"“{other.name}” beside “{first.name}”: the same sign in {signs} of {len(common)} rows"
    return said + (f", within two standard errors in {near} of {len(known)}." if known else ".")


def _place(value: float, reach: float) -> float:
    """Where on the line a value is."""
    return _WIDTH / 2 + (_WIDTH / 2 - _MARGIN) * value / reach


def _svg(height: int, label: str, *children: ET.Element) -> ET.Element:
    return tag(
        "svg", *children, viewBox=f"0 0 {_WIDTH} {height}", width=_WIDTH, height=height,
        role="img", aria_label=label,
    )  # fmt: skip


def _axis(reach: float, unit: str) -> ET.Element:
    """The ends and the middle of the line."""
    marks = []
    for value in (-reach, 0.0, reach):
        x = f"{_place(value, reach):g}"
        marks.append(tag("text", f"{value:.2g}", x=x, y=12, text_anchor="middle"))
    return tag("span", _svg(16, "axis", *marks), tag("small", unit))


def _drawn(arms: Sequence[Arm], row: str, wanted: float | None, reach: float) -> ET.Element:
    """One row: a mark with its bar for each arm, under each other."""
    height = _LINE * len(arms) + 6
    middle = f"{_WIDTH / 2:g}"
    drawn = [tag("line", x1=middle, x2=middle, y1="0", y2=height, class_="zero")]
    if wanted is not None:
        x = f"{_place(wanted, reach):.1f}"
        drawn.append(tag("line", x1=x, x2=x, y1="0", y2=height, class_="wanted"))
    for i, arm in enumerate(arms):
        value, error = arm.shifts.get(row, (math.nan, math.nan))
        if not math.isfinite(value):
            continue
        y = _LINE * (i + 0.5) + 3
        if math.isfinite(error):
            ends = [f"{_place(value + side * 2 * error, reach):.1f}" for side in (-1, 1)]
            drawn.append(
                tag(
                    "line", x1=ends[0], x2=ends[1], y1=f"{y:g}", y2=f"{y:g}", class_=f"arm a{i % 4}"
                )
            )
        drawn.append(_mark(i, _place(value, reach), y))
    return tag("td", _svg(height, f"shifts of {row}", *drawn), class_="drawn")


def _mark(i: int, x: float, y: float) -> ET.Element:
    """A circle, square, diamond or triangle: arms differ by more than their color."""
    shapes = (
        "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.5,-3.5h7v7h-7z", "M0,-5L5,0L0,5L-5,0z",
        "M0,-5L5,4L-5,4z",
    )  # fmt: skip
    return tag("path", d=shapes[i % 4], transform=f"translate({x:.1f},{y:g})", class_=f"m{i % 4}")


def _key(i: int) -> ET.Element:
    """The mark of an arm, for the head of its column."""
    return tag(
        "svg", _mark(i, 6.0, 6.0), viewBox="0 0 12 12", width="12", height="12", class_="key"
    )
