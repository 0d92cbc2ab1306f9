"""Figures of settings of posterior and sampler: a calibration, and a grid that was swept."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxpattern.calibrate import Calibration
from jaxpattern.canvas import BLUE, GREEN, ORANGE, VERMILLION, Axes, Figure, figure_of, open_frame
from jaxpattern.sweep import Sweep


def calibration(settings: Calibration, *, max_columns: int = 4) -> Figure:
    """The chains of each setting that was tried, then λ̂ of all of them.

    A healthy setting is blue; any other vermillion, with the names of what is wrong above its
    panel. The proposed one has an arrow. In the lower part bars are 95 % intervals.
    """
    number = len(settings.llc)
    columns = min(max_columns, number)
    figure, panels, ax = _multiples(number, columns, 2.6)
    for s, panel in zip(range(number), panels, strict=True):
        names = dict.fromkeys(problem.split(":")[0] for problem in settings.problems[s])
        name = "→ " * (s == settings.proposed) + f"{s}" + ", given" * (s == 0) + ": "
        _chains(panel, settings, s, tuple(names), name)
    for s in map(int, np.flatnonzero(np.isfinite(settings.llc))):
        color = BLUE if settings.healthy[s] else VERMILLION
        fill = color if s == settings.proposed else "white"
        ax.errorbar(
            s, settings.llc[s], 1.96 * settings.stderr[s], fmt="o", color=color, capsize=3,
            markerfacecolor=fill,
        )  # fmt: skip
    ax.set_xticks(range(number))
    ax.set_xlabel("setting (filled: proposed)")
    ax.set_ylabel("λ̂ = nβ (⟨L⟩ − L(w*))")
    open_frame(ax)
    return figure


def sweep(sweep: Sweep, *, max_columns: int = 4) -> Figure:
    """Small multiples of a calibration: the chains of each setting, then λ̂ against the step size.

    A healthy setting is blue; any other orange, with what is wrong above its panel. In the
    lower part filled points are healthy, open ones are not, and bars are 95 % intervals.
    """
    number = len(sweep.llc)
    columns = min(max_columns, len(np.unique(sweep.step_size)))
    figure, panels, ax = _multiples(number, columns, 3.2)
    order = np.lexsort((sweep.step_size, sweep.localization, sweep.nbeta))
    for s, panel in zip(order, panels, strict=True):
        _chains(panel, sweep, int(s), sweep.problems[s])
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
    open_frame(ax)
    return figure


def _multiples(number: int, columns: int, lower: float) -> tuple[Figure, np.ndarray, Axes]:
    """So many panels for chains, and below them axes of that height in inches."""
    rows = -(-number // columns)
    figure = figure_of(max(3.1 * columns, 6.5), 2.0 * rows + lower)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.0 * rows, lower])
    top, bottom = parts
    panels = np.ravel(top.subplots(rows, columns, sharex=True, squeeze=False))
    for ax in panels[number:]:
        ax.set_visible(False)
    top.supxlabel("draw", fontsize=9)
    top.supylabel("nβ (L − L(w*))", fontsize=9)
    return figure, panels[:number], bottom.subplots()


def _chains(
    ax: Axes, settings: Calibration | Sweep, s: int, problems: tuple[str, ...], name: str = ""
) -> None:
    """The traces of one setting, under what it is and what is wrong with it."""
    color = BLUE if settings.healthy[s] else VERMILLION
    ax.plot(settings.trace[s].T, color=color, alpha=0.55, linewidth=0.8)
    if np.isfinite(settings.llc[s]):
        ax.axhline(settings.llc[s], color="black", linewidth=0.8, linestyle="--")
    if not np.isfinite(settings.trace[s]).any():
        ax.set_yticks([])
    ax.set_title(
        f"{name}ε = {settings.step_size[s]:.3g}, nβ = {settings.nbeta[s]:.4g}, "
        f"γ = {settings.localization[s]:.4g}\n"
        + ("healthy" if settings.healthy[s] else "\n".join(problems)),
        fontsize=8, color=color, loc="left",
    )  # fmt: skip
    ax.tick_params(labelsize=8)
    open_frame(ax)
