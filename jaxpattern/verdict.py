"""Whether a result can be trusted, in words.

What is looked at, for each row: whether its chains moved, agree (R-hat), have settled (a trend over
time) and left enough independent draws; how much of the adjoint the window or the chain cuts off;
whether the covariance of the very same draws points the same way; how stiff the posterior is for
the step. Thresholds are such that healthy chains set off none of them in one of thousands of rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.special

RHAT = 1.2
ESS = 10.0
TREND = 6.0
REMAINDER = 0.1
STIFF = 1.0
HEAT = 0.5
GRAIN = 0.3
JUMP = 1.2  # smooth losses .001 to .02, kinks .02 to .9, jumps 1.3 to 100
LEAP = 0.1
UNSTABLE = 4.0
SLOPE = 0.4
GROWTH = 30.0  # transformers whose perturbations grew 52 times realized .57 of the prediction
_RARE = 1e-4
PILOT = ("stiffness", "heat", "spacing", "grain", "jump", "leap")


class UnreliableWarning(UserWarning):
    """A result cannot be trusted, for the reasons that it names."""


class UnreliableError(RuntimeError):
    """A result cannot be trusted, and `on_unreliable="raise"` was asked for."""


class Trend(NamedTuple):
    """Change of a trace from its start to its end by a straight line: t value, and size.

    `size` is in standard deviations of the trace.
    """

    t: Any
    size: Any


def trend(trace: Any, alive: Any, num_batches: int) -> Trend:
    """The straight line through the means of groups of draws of `[chains, draws]`.

    Its error is from what the line leaves; each chain has its own level.
    """
    xp = np if isinstance(trace, np.ndarray) else jnp
    draws = trace.shape[1]
    number = min(max(num_batches, 4), draws)
    edges = np.arange(number + 1) * draws // number
    means = xp.stack([xp.mean(trace[:, a:b], axis=1) for a, b in pairwise(edges)], axis=1)
    means = xp.where(alive[:, None], means, 0.0)
    time = np.linspace(-0.5, 0.5, number).astype(trace.dtype)
    chains = xp.maximum(xp.sum(alive), 1)
    centered = means - xp.mean(means, axis=1, keepdims=True)
    squares = float(np.sum(time**2)) * chains
    slope = xp.sum(centered * time[None]) / squares
    rest = xp.where(alive[:, None], centered - slope * time[None], 0.0)
    freedom = xp.maximum(chains * (number - 1) - 1, 1)
    error = xp.sqrt(xp.sum(rest**2) / freedom / squares)
    spread = xp.where(alive[:, None], trace - xp.mean(trace, axis=1, keepdims=True), 0.0)
    deviation = xp.sqrt(xp.sum(spread**2) / (chains * draws))
    tiny = np.finfo(np.dtype(trace.dtype)).tiny
    return Trend(
        xp.abs(slope) / xp.maximum(error, tiny), xp.abs(slope) / xp.maximum(deviation, tiny)
    )


def unsettled(
    *, rhat: float, ess: float, spread: float, drift: float, size: float, groups: float = 0.0
) -> list[str]:
    """What is wrong with the chains behind one number, whose error is from so many groups."""
    if spread == 0:
        return ["it never changed: the chains do not move, or it does not depend on them"]
    found = []
    if drift > TREND and size > 0.5:
        found.append(
            f"it is still drifting (by {size:.1f} of its standard deviations over the draws): more "
            "burn-in, or a larger step"
        )
    if rhat > RHAT:
        found.append(f"the chains disagree (R-hat {rhat:.2f})")
    elif ess < ESS:
        found.append(f"there are only about {ess:.0f} independent draws")
    elif ess < groups:
        found.append(
            f"its error is from {groups:.0f} groups of draws, of which only about {ess:.0f} are "
            "independent: the error is too small. A larger thin, or a smaller num_batches"
        )
    return found


def before(known: Mapping[str, Any]) -> list[str]:
    """What is wrong with posterior, step and mini-batches, by what a pilot found (see `PILOT`)."""
    of = {name: float(known.get(name, np.nan)) for name in PILOT}
    found = []
    if of["stiffness"] > STIFF:
        if of["stiffness"] >= UNSTABLE:
            outcome = "chains leave for infinity from 4 on"
        else:
            outcome = f"its variance is {1 / (1 - of['stiffness'] / 4):.1f} times the right one"
        found.append(
            f"the step is too large for the stiffest direction (εP = {of['stiffness']:.2g}; "
            f"{outcome}): take a smaller step_size"
        )
    if of["heat"] > HEAT:
        found.append(
            f"the noise of mini-batches adds {of['heat']:.0%} to the temperature in the stiffest "
            "direction: take a larger batch_size or a smaller step_size"
        )
    if of["spacing"] > 1:
        found.append(
            f"parameters narrower than float32 lie {of['spacing']:.1g} times as far apart as the "
            "posterior is wide: the loss does not see what the chain does. Give float32 parameters"
        )
    if of["grain"] > GRAIN:
        found.append(
            f"the loss is rounded to {of['grain']:.2g} of a temperature (1/nβ): its differences "
            "are noise. Take a smaller nbeta, or float64"
        )
    if of["jump"] > JUMP and of["leap"] > LEAP:
        found.append(
            f"the loss jumps: over a relaxation time it changes by {of['leap']:.2g} temperatures "
            "(1/nβ) that no gradient shows, as with routing, rounding, sorting or thresholds. The "
            "chain samples another law; make the loss continuous, or sample with mala"
        )
    return found


def chaotic(growth: float, horizon: float) -> list[str]:
    """What is wrong with the derivative of a training run."""
    if not growth > GROWTH:
        return []
    return [
        f"a small change of the parameters grows {growth:.2g} times along the run: the response is "
        f"that of ever smaller changes of the weights. Up to about {horizon:.0f} steps it can be "
        "trusted; fewer steps or a smaller learning rate help, and mode='secant' measures what "
        "changes of a given width do"
    ]


def left_out(skipped: float) -> list[str]:
    """What is wrong with the steps of a training run."""
    if not skipped > 0:
        return []
    return [f"{skipped:.0f} steps had a loss or gradient that was not finite and were left out"]


def disagree(slope: float, error: float, groups: float) -> bool:
    """Whether the covariance of the same draws contradicts a pathwise row."""
    if not (np.isfinite(slope) and error > 0) or groups < 3:
        return False
    limit = -scipy.special.stdtrit(groups - 1, _RARE) * error
    return bool(abs(slope - 1) > max(SLOPE, float(limit)))


def say(title: str, findings: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Findings by row as one text; rows with the same findings are named together."""
    together: dict[tuple[str, ...], list[str]] = {}
    for row, found in findings:
        if found:
            together.setdefault(tuple(found), []).append(row)
    if not together:
        return "nothing found that speaks against it"
    lines = []
    for found, rows in together.items():
        named = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
        lines.append(f"{named}: " * bool(named) + "; ".join(found))
    return f"{title}: " + ". ".join(lines)


def warn(text: str, stacklevel: int = 3) -> None:
    """The verdict as a warning."""
    warnings.warn(text, UnreliableWarning, stacklevel=stacklevel + 1)
