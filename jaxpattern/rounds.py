"""What patterning while training gives: its rounds, and how they print."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxpattern import tables
from jaxpattern.inversion.intervention import Intervention
from jaxpattern.response.result import Response
from jaxpattern.types import Params


class Round(NamedTuple):
    """One round; shifts are row → number, in units of the row, means over seeds.

    Attributes:
        response: χ under the weights of the round before.
        solution: what was solved for, relative to those; None where they were kept.
        weights: ρ that was trained on, of the shape of the losses, of mean 1.
        scale: how far from the first weights to those that were solved for the budget allowed.
        wanted: shift asked of this round, of each row that was constrained.
        predicted: shift of φ at the end of the round, by the change of the weights, to first order.
        realised: that shift: φ after training on the new weights less φ after training on the old
            ones, from the same start and with the same batches.
        realised_stderr: its standard error over seeds; NaN of one seed.
        total: φ less that of the control, which was trained on the first weights all along.
        total_stderr: its standard error over seeds.
        effective_share: (Σρ)² / (N Σρ²) of the weights, samples without weight at first aside.
    """

    response: Response
    solution: Intervention | None
    weights: Float[Array, "samples *tokens"]
    scale: float
    wanted: dict[str, float]
    predicted: dict[str, float]
    realised: dict[str, float]
    realised_stderr: dict[str, float]
    total: dict[str, float]
    total_stderr: dict[str, float]
    effective_share: float


class Pattern(NamedTuple):
    """What `pattern` returns.

    Attributes:
        params: the trained parameters; with seeds every leaf has a leading axis.
        control: those of the control.
        optimizer_state: that of the optimizer, to go on from.
        rounds: all rounds.
        target: row → shift that was wanted in all.
        hold: row → how far it might rise.
    """

    params: Params
    control: Params
    optimizer_state: PyTree[Any]
    rounds: tuple[Round, ...]
    target: dict[str, float]
    hold: dict[str, float]

    @property
    def weights(self) -> Float[Array, "samples *tokens"]:
        """The weights of the last round."""
        return self.rounds[-1].weights

    def __str__(self) -> str:
        return tables.text(describe, self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return tables.html(describe, self)


def describe(result: Pattern) -> tables.Page:
    """A line for each round and row that was targeted or held."""
    title = f"Patterning in {len(result.rounds)} rounds"
    rows = [*result.target, *result.hold]
    body = [
        [
            str(i + 1) if row == rows[0] else "",
            row,
            f"{this.wanted[row]:+.3g}" if row in this.wanted else "–",
            f"{this.predicted[row]:+.3g}",
            tables.measured(this.realised[row], this.realised_stderr[row]),
            tables.measured(this.total[row], this.total_stderr[row]),
            tables.percent(this.effective_share) if row == rows[0] else "",
        ]
        for i, this in enumerate(result.rounds)
        for row in rows
    ]
    head = ["round", "row", "wanted", "predicted", "realised", "against the control", "effective"]
    asked = [f"{row} {shift:+.3g}" for row, shift in result.target.items()]
    asked += [f"{row} at most {limit:+.3g}" for row, limit in result.hold.items()]
    notes = [
        f"Asked for, against the control: {', '.join(asked)}.",
        "Shifts of φ in the units of each row, ± one standard error over seeds: in the round by "
        "its change of the weights, and in all. Effective: the effective sample size of the "
        "weights.",
    ]
    passed = [
        row
        for row, limit in result.hold.items()
        if result.rounds[-1].total[row] > limit + 2 * np.nan_to_num(
            result.rounds[-1].total_stderr[row]
        )
    ]  # fmt: skip
    if passed:
        notes.append(f"Held rows that rose further than they might: {', '.join(passed)}.")
    if any(this.scale < 1 for this in result.rounds):
        notes.append("The budget on the effective sample size cut the change short in rounds "
                     + ", ".join(str(i + 1) for i, x in enumerate(result.rounds) if x.scale < 1)
                     + ".")  # fmt: skip
    return tables.Page(title, (tables.Grid(head, body),), tuple(notes))
