"""Results in words: small tables of text and HTML, with errors, for `print` and notebooks.

A result describes itself by a function from it to a `Page`; `text` and `html` write that out. What
cannot be read (it is traced, or a stack of many results) is said in one line and never fails.
"""

from __future__ import annotations

import html as _html
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpattern.validation import is_concrete

MAX_ROWS = 12
MAX_WIDTH = 100


class Grid(NamedTuple):
    """A table: column heads, and rows of as many cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Page(NamedTuple):
    """What is written of a result: a line, tables, and lines of words."""

    title: str
    grids: tuple[Grid, ...] = ()
    notes: tuple[str, ...] = ()


class Unreadable(Exception):
    """The values cannot be looked at; the message is the line to write instead."""


def refuse_unreadable(title: str, tree: Any, scalar: Any) -> None:
    """Stops a page whose values are traced, or a stack: `scalar` has axes where it is one.

    Raises:
        Unreadable: either is so.
    """
    leaves = jax.tree.leaves(tree)
    if not all(map(is_concrete, leaves)):
        raise Unreadable(f"{title}: traced, no numbers yet")
    if np.ndim(scalar):
        raise Unreadable(f"{title}: a stack of {' × '.join(map(str, np.shape(scalar)))}")
    if not all(hasattr(leaf, "dtype") or isinstance(leaf, int | float) for leaf in leaves):
        raise Unreadable(f"{title}: holds {type(leaves[0]).__name__}, no numbers")


def text(describe: Callable[[Any], Page], result: Any) -> str:
    """The page in lines of text."""
    page = _page(describe, result)
    lines = textwrap.wrap(page.title, MAX_WIDTH)
    for grid in page.grids:
        lines += _lines(_cut(grid, MAX_ROWS // len(page.grids)))
    for note in page.notes:
        lines += textwrap.wrap(note, MAX_WIDTH)
    return "\n".join(lines)


def html(describe: Callable[[Any], Page], result: Any, most: int = MAX_ROWS) -> str:
    """The page as plain HTML, every text escaped, with at most so many rows."""
    page = _page(describe, result)
    parts = [f"<p><b>{_html.escape(page.title)}</b></p>"]
    for grid in page.grids:
        cut = _cut(grid, most // len(page.grids))
        for tag, rows in (("th", [cut.header]), ("td", cut.rows)):
            cells = [[f"<{tag}>{_html.escape(cell)}</{tag}>" for cell in row] for row in rows]
            rows_html = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
            parts.append(f"<table><thead>{rows_html}</thead>" if tag == "th" else
                         f"<tbody>{rows_html}</tbody></table>")  # fmt: skip
    parts += [f"<p>{_html.escape(note)}</p>" for note in page.notes]
    return "".join(parts)


def together(results: Mapping[str, Any]) -> str:
    """Several results under their names as HTML; what has no page of its own as text."""
    parts = []
    for name, result in results.items():
        own = getattr(result, "_repr_html_", None)
        shown = own() if own else f"<pre>{_html.escape(str(result))}</pre>"
        parts.append(f"<h4>{_html.escape(name)}</h4>{shown}")
    return "".join(parts)


def measured(value: float, error: float | None = None) -> str:
    """`value ± error`, the error to two digits; `± ?` where it is not known."""
    value, error = float(value), math.nan if error is None else float(error)
    if not math.isfinite(error):
        return f"{value:.3g} ± ?"
    if not math.isfinite(value) or error <= 1e-6 * abs(value):
        return f"{value:.3g} ± {error:.2g}"
    top = math.floor(math.log10(max(abs(value), error)))
    place = 1 - math.floor(math.log10(error))
    if -4 <= top < 6 and place <= 7:
        digits = max(place, 0)
        return f"{value:.{digits}f} ± {error:.{digits}f}"
    digits = min(max(place + top, 0), 6)
    return f"({value / 10.0**top:.{digits}f} ± {error / 10.0**top:.{digits}f})e{top:+03d}"


def percent(share: float) -> str:
    """A share in words of a hundred."""
    return f"{100 * float(share):.3g} %"


def llc(result: Any) -> Page:
    """A local learning coefficient: λ̂, its error, chain by chain, and whether they agree."""
    title = "Local learning coefficient"
    refuse_unreadable(title, result, result.mean)
    chains = len(result.per_chain)
    lost = int(np.sum(result.diverged))
    values = [float(x) for x in result.per_chain]
    shown = [f"{x:.3g}" for x in values[:8]] + ["…"] * (len(values) > 8)
    notes = [
        f"Per chain: {', '.join(shown)} ({lost} of {chains} diverged).",
        f"R-hat {float(result.rhat):.3f} (1 where chains agree), effective sample size "
        f"{float(result.ess):.0f} draws; cost {float(result.cost):.3g} gradient equivalents.",
    ]
    if float(result.mean) < 0:
        notes.append("Negative: the parameters are not at a minimum of this loss.")
    if float(result.caveat):
        notes.append(
            "Of chains whose law is known to lack a term (the sampler's `caveat`), as that of "
            "rmsprop_sgld lacks its drift Γ unless drift=True."
        )
    return Page(
        f"{title} λ̂ = {measured(float(result.mean), float(result.stderr))} (no unit)",
        (),
        tuple(notes),
    )


def history(result: Any) -> Page:
    """A training run: its loss at a few steps, and how many steps were left out."""
    title = "Training history"
    refuse_unreadable(title, result, result.skipped)
    loss = np.asarray(result.loss)
    total = len(loss)
    if total == 0:
        return Page(f"{title}: no steps")
    span = max(1, total // 20)
    starts = sorted({int(i) for i in np.linspace(0, total - span, 6)})
    rows = [
        [f"{i + 1} to {i + span}", f"{np.mean(loss[i : i + span], dtype=np.float64):.4g}"]
        for i in starts
    ]
    skipped = int(result.skipped)
    notes = ["Loss: Σρℓ / Σρ of each step's mini-batch, averaged over the steps named."]
    if skipped:
        notes.append(f"{skipped} steps left out: loss or gradient was not finite.")
    return Page(f"{title}: {total} steps", (Grid(["steps", "loss"], rows),), tuple(notes))


def posterior(result: Any) -> Page:
    """A localized posterior: what is sampled, how far, and on which data."""
    name = getattr(result.loss_fn, "__name__", type(result.loss_fn).__name__)
    count = sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(result.params))
    part = "all parameters" if result.restriction is None else "a restricted part of the parameters"
    title = f"Localized posterior of {name}: {count:,} parameters in all, sampled are {part}"
    refuse_unreadable(title, (result.nbeta, result.localization, result.weights), result.nbeta)
    weights = np.asarray(result.weights, np.float64)
    share = weights.sum() ** 2 / np.sum(weights**2) / weights.size
    excluded = int(np.sum(weights == 0))
    per = "sample" if weights.ndim == 1 else "token"
    notes = [
        f"nβ = {float(result.nbeta):g} (inverse temperature), γ = {float(result.localization):g} "
        "(localization).",
        f"Data: {weights.shape[0]:,} samples, one loss per {per}; effective sample size "
        f"{percent(share)}, {excluded:,} losses excluded.",
    ]
    return Page(title, (), tuple(notes))


def _page(describe: Callable[[Any], Page], result: Any) -> Page:
    """The page, or the line that says why there is none."""
    try:
        return describe(result)
    except Unreadable as reason:
        return Page(str(reason))
    except (TypeError, AttributeError, ValueError, IndexError, KeyError):
        # A pytree whose leaves JAX has replaced by other objects, as it does inside.
        return Page(f"{type(result).__name__}: holds no numbers")


def _cut(grid: Grid, most: int) -> Grid:
    """At most so many rows and `MAX_WIDTH` characters; what is left out is an ellipsis."""
    rows = [list(row) for row in grid.rows]
    header = list(grid.header)
    if len(rows) > most:
        left = len(rows) - most + 1
        rows = [*rows[: most - 1], [f"… {left} more", *[""] * (len(header) - 1)]]
    widths = [max(len(cell) for cell in column) + 2 for column in zip(header, *rows, strict=True)]
    if sum(widths) > MAX_WIDTH and len(header) > 3:
        keep = 1
        while keep < len(header) and sum(widths[: keep + 1]) + 4 <= MAX_WIDTH:
            keep += 1
        keep = max(keep, 2)
        header = [*header[:keep], f"… {len(header) - keep} more"]
        rows = [[*row[:keep], ""] for row in rows]
    return Grid(header, rows)


def _lines(grid: Grid) -> list[str]:
    """Cells padded to columns, the first to the left."""
    cells = [list(grid.header), *map(list, grid.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
