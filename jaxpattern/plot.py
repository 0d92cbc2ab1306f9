"""Figures of responses, directions, tokens, weights, shifts and settings, with matplotlib.

It is optional: `pip install "jaxpattern[plot]"`.
Each function draws on the axes it is given, or on a figure of its own, and returns the figure:
`plot.response_matrix(response).savefig("response.png")`. Nothing here touches pyplot, so no window
opens and no figure stays in memory. Colours are those of Okabe and Ito, and a diverging map from
blue to red, which colour-blind readers tell apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxpattern.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Axes,
    Figure,
    figure_of,
    open_frame,
    root_of,
)
from jaxpattern.inversion import Intervention
from jaxpattern.plot_settings import calibration as calibration
from jaxpattern.plot_settings import sweep as sweep
from jaxpattern.plot_tokens import tokens as tokens
from jaxpattern.response.directions import PrincipalDirections
from jaxpattern.response.result import Response


def response_matrix(response: Response, *, ax: Axes | None = None, unit: str = "nats") -> Figure:
    """A heat map of nβ q χ: the shift of each row when a probe set's relative weight rises by 1.

    Each cell holds the value and its standard error; those within two standard errors of zero are
    in grey. Colours are symmetric about zero. Where rows and columns have the
    same names they come in the same order.

    Args:
        response: from `group_mean`.
        ax: where to draw.
        unit: of the observables.

    Raises:
        ValueError: the response has a column a loss.
    """
    names = tuple(response.chi)
    if any(np.ndim(response.chi[name]) != 1 for name in names):
        raise ValueError("response has a column for each loss; give group_mean(response)")
    if set(names) == set(response.rows):
        names = response.rows
    factor = np.array([float(response.nbeta) * float(response.mass[name]) for name in names])
    shift = np.stack([np.asarray(response.chi[name]) for name in names], axis=1) * factor
    error = np.stack([np.asarray(response.stderr[name]) for name in names], axis=1) * factor
    rows, columns = shift.shape
    if ax is None:
        ax = figure_of(1.9 + 1.05 * columns, 1.5 + 0.62 * rows).subplots()
    scale, prefix = _unit_scale(shift)
    limit = float(np.max(np.abs(shift))) * scale or 1.0
    image = ax.imshow(shift * scale, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for k in range(rows):
        for g in range(columns):
            value, sigma = shift[k, g] * scale, error[k, g] * scale
            known = not abs(value) < 2 * sigma
            dark = abs(value) > 0.55 * limit
            ax.text(
                g, k, f"{value:+.2f}\n± {sigma:.2f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black" if known else GREY,
            )  # fmt: skip
    ax.set_xticks(range(columns), names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(rows), response.rows)
    ax.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("more weight on")
    ax.set_ylabel("moves the expectation of")
    ax.set_title("Response nβ q χ", loc="left")
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
    bar.set_label(f"shift when the weight doubles ({prefix}{unit})")
    bar.outline.set_visible(False)
    return root_of(ax)


def weights(intervention: Intervention, *, ax: Axes | None = None) -> Figure:
    """Bars of the data weights ρ, one a probe set, from the line ρ = 1 of unchanged data.

    Where a probe set has a weight a loss, the bar is their mean and a line spans the middle 90 %.
    """
    names = tuple(intervention.weights)
    if set(names) == set(intervention.predicted_shift):
        names = tuple(intervention.predicted_shift)
    values = [np.ravel(np.asarray(intervention.weights[name])) for name in names]
    means = np.array([value.mean() for value in values])
    if ax is None:
        ax = figure_of(5.0, 1.3 + 0.38 * len(names)).subplots()
    place = np.arange(len(names))
    colours = [BLUE if mean >= 1 else ORANGE for mean in means]
    ax.barh(place, means - 1, left=1, color=colours, height=0.65)
    ends = means
    if any(value.size > 1 for value in values):
        spans = np.array([np.quantile(value, [0.05, 0.95]) for value in values])
        ax.hlines(place, spans[:, 0], spans[:, 1], color="black", linewidth=1)
        ends = np.where(means >= 1, np.maximum(means, spans[:, 1]), np.minimum(means, spans[:, 0]))
    for k, (mean, end) in enumerate(zip(means, ends, strict=True)):
        side = 1 if mean >= 1 else -1
        ax.annotate(
            f"{mean:.2f}", (end, k), (4 * side, 0), textcoords="offset points",
            va="center", ha="left" if side > 0 else "right", fontsize=9,
        )  # fmt: skip
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(place, names)
    ax.invert_yaxis()
    least, most = min(1.0, *ends), max(1.0, *ends)
    room = 0.25 * (most - least) or 0.1
    ax.set_xlim(least - room, most + room)
    ax.set_xlabel("weight ρ (unchanged data: 1)")
    ax.set_title("Data weights", loc="left")
    open_frame(ax)
    ax.tick_params(axis="y", length=0)
    return root_of(ax)


def shifts(
    predicted: Mapping[str, Any],
    realised: Mapping[str, Any],
    errors: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
    *,
    target: Mapping[str, Any] | None = None,
    ax: Axes | None = None,
    unit: str = "nats",
) -> Figure:
    """The predicted shift of each row beside the realized one.

    Args:
        predicted: row → shift, such as `Intervention.predicted_shift`.
        realised: row → shift, of the same rows.
        errors: (of predicted, of realised), row → standard error; bars are 95 % intervals.
        target: row → wanted shift, for the rows that have one.
        ax: where to draw.
        unit: of the observables.

    Raises:
        ValueError: predicted and realised have other rows.
    """
    names = tuple(predicted)
    if set(names) != set(realised):
        raise ValueError(
            f"predicted and realised must have the same rows, got {sorted(predicted)} "
            f"and {sorted(realised)}"
        )
    if ax is None:
        ax = figure_of(5.5, 1.5 + 0.5 * len(names)).subplots()
    everything = np.array([float(s[name]) for s in (predicted, realised) for name in names])
    scale, prefix = _unit_scale(everything)
    place = np.arange(len(names))
    styles = (
        ("predicted", predicted, BLUE, "o", -0.13),
        ("realized", realised, VERMILLION, "s", 0.13),
    )
    ax.axvline(0, color="black", linewidth=0.8)
    for which, (label, values, colour, marker, offset) in enumerate(styles):
        spread = None
        if errors is not None:
            spread = [1.96 * scale * float(errors[which][name]) for name in names]
        ax.errorbar(
            [scale * float(values[name]) for name in names], place + offset, xerr=spread,
            fmt=marker, color=colour, markersize=6, capsize=3, label=label,
        )  # fmt: skip
    for k, name in enumerate(names):
        if target is not None and name in target:
            wanted = scale * float(target[name])
            ax.vlines(
                wanted, k - 0.38, k + 0.38, color=GREEN, linewidth=3, alpha=0.6,
                label="target" if name == next(iter(target)) else "_",
            )  # fmt: skip
    ax.set_yticks(place, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    bars = "" if errors is None else ", bars 95 %"
    ax.set_xlabel(f"shift ({prefix}{unit}{bars})")
    ax.set_title("Predicted and realized", loc="left")
    ax.legend(frameon=False, fontsize=9, loc="best")
    open_frame(ax)
    ax.tick_params(axis="y", length=0)
    return root_of(ax)


def loadings(
    directions: PrincipalDirections, num: int | None = None, *, ax: Axes | None = None
) -> Figure:
    """A heat map of the loadings of each principal direction on the rows of the response.

    A direction is labelled by its share of the variance and by the cosine between the coordinates
    of two halves of the draws; those below one half are in grey.

    Args:
        directions: from `principal_directions`.
        num: only the first so many.
        ax: where to draw.
    """
    values = np.asarray(directions.loadings)[:num]
    number, rows = values.shape
    if ax is None:
        ax = figure_of(3.2 + 0.45 * rows, 1.5 + 0.36 * number).subplots()
    image = ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for k in range(number):
        for i in range(rows):
            ax.text(
                i, k, f"{values[k, i]:+.1f}".replace("+0.", "+.").replace("-0.", "−."),
                ha="center", va="center", fontsize=7,
                color="white" if abs(values[k, i]) > 0.55 else "black",
            )  # fmt: skip
    reliability = np.asarray(directions.reliability)
    labels = []
    for k in range(number):
        known = np.isfinite(reliability[k])
        split = f", split {reliability[k]:.2f}" if known else ""
        labels.append(f"{k + 1}  ({100 * float(directions.explained[k]):.1f} %{split})")
    ax.set_yticks(range(number), labels)
    for k, label in enumerate(ax.get_yticklabels()):
        label.set_color(GREY if reliability[k] < 0.5 else "black")
    ax.set_xticks(range(rows), directions.rows, rotation=60, ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("Loadings of principal directions", loc="left")
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    return root_of(ax)


def heads(
    values: Mapping[str, Any] | np.ndarray | Array,
    *,
    ax: Axes | None = None,
    label: str = "",
    limit: float | None = None,
) -> Figure:
    """A heat map of one number a head, layers by heads.

    Colours are symmetric about zero.

    Args:
        values: `[layer, H]`, such as `prefix_matching_score` returns, or named values such as
            `dict(zip(directions.rows, directions.loadings[1]))`, of which those named like a head
            (`l0h1`) are drawn.
        ax: where to draw.
        label: what the numbers are.
        limit: number at the ends of the colour scale, by default the largest magnitude.

    Raises:
        ValueError: no value is named like a head, or the array is not `[layer, H]`.
    """
    grid = _head_grid(values) if isinstance(values, Mapping) else np.asarray(values, float)
    if grid.ndim != 2 or grid.size == 0:
        raise ValueError(f"values must be [layer, H], got shape {list(grid.shape)}")
    layers, number = grid.shape
    if ax is None:
        ax = figure_of(1.9 + 0.55 * number, 1.3 + 0.5 * layers).subplots()
    limit = limit or float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
    image = ax.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for layer, head in zip(*np.nonzero(np.isfinite(grid)), strict=True):
        value = grid[layer, head]
        ax.text(
            head, layer, f"{value:.2f}", ha="center", va="center", fontsize=8,
            color="white" if abs(value) > 0.55 * limit else "black",
        )  # fmt: skip
    ax.set_xticks(range(number))
    ax.set_yticks(range(layers))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return root_of(ax)


def _head_grid(values: Mapping[str, Any]) -> np.ndarray:
    """Values of heads by layer and head, NaN where there is none."""
    found = {}
    for name, value in values.items():
        match = re.fullmatch(r"l(\d+)h(\d+)", name)
        if match:
            found[int(match[1]), int(match[2])] = float(value)
    if not found:
        raise ValueError(f"values must be named like heads, l0h0, l0h1, …, got {list(values)}")
    grid = np.full(np.max(list(found), axis=0) + 1, np.nan)
    for place, value in found.items():
        grid[place] = value
    return grid


def _unit_scale(values: np.ndarray) -> tuple[float, str]:
    """The factor that brings small numbers to a readable size, and how an axis says it."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if not np.isfinite(largest) or largest == 0 or largest >= 0.1:
        return 1.0, ""
    return (1e3, "10⁻³ ") if largest >= 1e-4 else (1e6, "10⁻⁶ ")
