"""Figures of responses, weights, shifts and sweeps, with matplotlib, which is optional.

Install it with `pip install "jaxpattern[plot]"`.
Each function draws on the axes it is given, or on a figure of its own, and returns the figure:
`plot.response_matrix(response).savefig("response.png")`. Nothing here touches pyplot, so no window
opens and no figure stays in memory. Colours are those of Okabe and Ito, and a diverging map from
blue to red, which colour-blind readers tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpattern.inversion import Intervention
from jaxpattern.response.result import Response
from jaxpattern.sweep import Sweep

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        'jaxpattern.plot needs matplotlib, which is optional: pip install "jaxpattern[plot]"'
    ) from error

BLUE, ORANGE, VERMILLION, GREEN, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#7A7A7A"


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
        ax = _figure(1.9 + 1.05 * columns, 1.5 + 0.62 * rows).subplots()
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
    return _root(ax)


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
        ax = _figure(5.0, 1.3 + 0.38 * len(names)).subplots()
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
    _open(ax)
    ax.tick_params(axis="y", length=0)
    return _root(ax)


def shifts(
    predicted: Mapping[str, Any],
    realised: Mapping[str, Any],
    errors: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
    *,
    target: Mapping[str, Any] | None = None,
    ax: Axes | None = None,
    unit: str = "nats",
) -> Figure:
    """The predicted shift of each row beside the realised one.

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
        ax = _figure(5.5, 1.5 + 0.5 * len(names)).subplots()
    everything = np.array([float(s[name]) for s in (predicted, realised) for name in names])
    scale, prefix = _unit_scale(everything)
    place = np.arange(len(names))
    styles = (
        ("predicted", predicted, BLUE, "o", -0.13),
        ("realised", realised, VERMILLION, "s", 0.13),
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
    ax.set_title("Predicted and realised", loc="left")
    ax.legend(frameon=False, fontsize=9, loc="best")
    _open(ax)
    ax.tick_params(axis="y", length=0)
    return _root(ax)


def sweep(sweep: Sweep, *, max_columns: int = 4) -> Figure:
    """Small multiples of a calibration: the chains of each setting, then λ̂ against the step size.

    A healthy setting is blue; any other orange, with what is wrong above its panel. In the
    lower part filled points are healthy, open ones are not, and bars are 95 % intervals.
    """
    number = len(sweep.llc)
    columns = min(max_columns, len(np.unique(sweep.step_size)))
    rows = -(-number // columns)
    figure = _figure(max(3.1 * columns, 6.5), 2.0 * rows + 3.2)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.0 * rows, 3.2])
    top, bottom = parts
    panels = np.ravel(top.subplots(rows, columns, sharex=True, squeeze=False))
    for ax in panels[number:]:
        ax.set_visible(False)
    order = np.lexsort((sweep.step_size, sweep.localization, sweep.nbeta))
    for s, ax in zip(order, panels, strict=False):
        colour = BLUE if sweep.healthy[s] else VERMILLION
        ax.plot(sweep.trace[s].T, color=colour, alpha=0.55, linewidth=0.8)
        if np.isfinite(sweep.llc[s]):
            ax.axhline(sweep.llc[s], color="black", linewidth=0.8, linestyle="--")
        if not np.isfinite(sweep.trace[s]).any():
            ax.set_yticks([])
        ax.set_title(
            f"ε = {sweep.step_size[s]:.3g}, nβ = {sweep.nbeta[s]:.4g}, "
            f"γ = {sweep.localization[s]:.4g}\n"
            + ("healthy" if sweep.healthy[s] else "\n".join(sweep.problems[s])),
            fontsize=8, color=colour, loc="left",
        )  # fmt: skip
        ax.tick_params(labelsize=8)
        _open(ax)
    top.supxlabel("draw", fontsize=9)
    top.supylabel("nβ (L − L(w*))", fontsize=9)
    ax = bottom.subplots()
    colours = (BLUE, ORANGE, GREEN, VERMILLION, "#CC79A7", "#56B4E9", "black")
    pairs = sorted(
        {(float(n), float(g)) for n, g in zip(sweep.nbeta, sweep.localization, strict=True)}
    )
    for i, (nbeta, localization) in enumerate(pairs):
        chosen = (
            (sweep.nbeta == nbeta) & (sweep.localization == localization) & np.isfinite(sweep.llc)
        )
        order = np.flatnonzero(chosen)[np.argsort(sweep.step_size[chosen])]
        colour, label = colours[i % len(colours)], f"nβ = {nbeta:.4g}, γ = {localization:.4g}"
        x, y, error = sweep.step_size[order], sweep.llc[order], 1.96 * sweep.stderr[order]
        ax.errorbar(x, y, error, color=colour, capsize=3, linewidth=1, label=label)
        for kind, fill in ((sweep.healthy[order], colour), (~sweep.healthy[order], "white")):
            ax.plot(x[kind], y[kind], "o", color=colour, markerfacecolor=fill, markersize=6)
    ax.set_xscale("log")
    ax.set_xlabel("step size ε")
    ax.set_ylabel("λ̂ = nβ (⟨L⟩ − L(w*))")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _open(ax)
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _root(ax: Axes) -> Figure:
    """The whole figure, also where the axes lie in a part of one."""
    return ax.figure if isinstance(ax.figure, Figure) else ax.figure.figure


def _open(ax: Axes) -> None:
    """No frame on the right and at the top."""
    ax.spines[["right", "top"]].set_visible(False)


def _unit_scale(values: np.ndarray) -> tuple[float, str]:
    """The factor that brings small numbers to a readable size, and how an axis says it."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if not np.isfinite(largest) or largest == 0 or largest >= 0.1:
        return 1.0, ""
    return (1e3, "10⁻³ ") if largest >= 1e-4 else (1e6, "10⁻⁶ ")
