"""The tables of `docs/benchmarks.md`, from rows that were measured.

    python benchmarks/table.py [--rows benchmarks/measured] [--check]

Each benchmark writes `NAME.jsonl` under its `--out`; those in `benchmarks/measured` are the ones
that the page tells of, between marks `<!-- NAME -->`. With --check nothing is written, and the exit
status is 1 where the page says something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
Rows = list[dict[str, Any]]


def one(rows: Rows, **wanted: Any) -> dict[str, Any]:
    """The row with these values."""
    (found,) = (row for row in rows if wanted.items() <= row.items())
    return found


def number(x: float, places: int = 2) -> str:
    """So many digits that count, without an exponent for ordinary sizes."""
    return f"{float(f'{x:.{places}g}'):,.6g}"


def not_met(holds: bool) -> str:
    """What is said of a claim that does not hold."""
    return "" if holds else ", **not met**"


def susceptibilities(rows: Rows) -> str:
    gain = {row["over"]: row for row in rows if row["part"] == "gain"}
    side, hybrid = one(rows, part="side", side="pathwise"), one(rows, part="hybrid")
    theirs = one(rows, part="side", side="devinterp")
    of = f" of {side['of_heads']}" if side.get("of_heads", 0) > side["heads"] else ""
    least = {label: min(row["noise"], row["mse"]) for label, row in gain.items()}
    their, our = least["devinterp, centred"], least.get("covariance")
    return (
        f"heads: {side['heads']}{of}, draws: {side['draws']}; {number(their)} × less CPU time to "
        f"the same error with pathwise than by the centered covariance of devinterp's draws"
        f"{not_met(their >= 50)}"
        + ("" if our is None else f", {number(our)} × than our covariance")
        + f"; devinterp wrote {theirs['written'] / 2**20:.0f} MiB, we nothing; its formula equals "
        f"ours on its own draws to {hybrid['ours']:.0e}"
    )


def torch_loop(rows: Rows) -> str:
    gains = {row["side"]: row["gain"] for row in rows}
    plain, of_samples = gains["torch, autograd"], gains["torch, gradients of samples"]
    return (
        f"{number(plain)} × less CPU time to the same error with pathwise, {number(of_samples)} × "
        f"where the loop takes gradients of samples"
    )


def llc(rows: Rows) -> str:
    parts = []
    for part in dict.fromkeys(row["part"] for row in rows):
        gain = one(rows, part=part, claimed=20.0)
        sides = {row["side"]: row for row in rows if row["part"] == part and "side" in row}
        text = (
            f"{part}: {number(gain['cpu'])} × less CPU time to the same spread over "
            f"{sides['jaxpattern']['seeds']} seeds, {number(gain['gradients'])} × in gradients"
        )
        if sides["jaxpattern"]["coverage"] is not None:
            text += (
                f"; 95 % intervals hold the exact LLC in {sides['jaxpattern']['coverage']:.0%} of "
                f"runs, devinterp's in {sides['devinterp']['coverage']:.0%}"
            )
        parts.append(text)
    return "; ".join(parts)


def floor(rows: Rows) -> str:
    return ", ".join(
        f"{row['part']} {row['ratio']:.2f}"
        + (
            f" (claimed {row['claimed']:g}{not_met(row['ratio'] <= row['claimed'])})"
            if row["claimed"]
            else ""
        )
        for row in rows
    )


def growth(rows: Rows) -> str:
    axes = [row for row in rows if "axis" in row]
    exponents = "; ".join(
        f"{label}: " + ", ".join(
            f"{row['time_exponent']:.2f} in {row['axis']}"
            + not_met(row["claimed"] is None or row["time_exponent"] <= row["claimed"])
            for row in axes if row["estimator"] == label
        ) for label in dict.fromkeys(row["estimator"] for row in axes)
    )  # fmt: skip
    draws = one(axes, estimator="pathwise", axis="draws")
    (few, _, before), (many, _, after) = draws["points"][0], draws["points"][-1]
    heads = one(rows, part="heads")
    (_, together, much), (_, blocks, little) = heads["together"], heads["blocks"]
    return (
        f"exponents of time, two chains at a time (claimed 1.1 in chains, components, draws, "
        f"probes): {exponents}; "
        f"memory {before / 2**20:.0f} and {after / 2**20:.0f} MiB at {few} and {many} draws; eight "
        f"heads {together:.1f} CPU s and {much / 2**20:.0f} MiB as one program, {blocks:.1f} and "
        f"{little / 2**20:.0f} with `chains_at_once=2`, which the cache holds, "
        f"{8 * heads['in_series'][1]:.1f} s one after the other"
    )


def claims(rows: Rows) -> str:
    """How many claims were met, and which were not."""
    row = one(rows, part="claims")
    met = row["number"] - len(row["failed"])
    missed = "; ".join(text.removeprefix("NOT MET: ") for text in row["failed"])
    return f"{met} of {row['number']} claims met" + f"; **not met**: {missed}" * bool(missed)


def reweighting(rows: Rows) -> str:
    seeds = next(row["seeds"] for row in rows if "seeds" in row)
    return f"three wishes, {seeds} paired seeds, table below; {claims(rows)}"


def training_response(rows: Rows) -> str:
    found = ", ".join(
        f"{row['steps']} steps by the {row['way']} {row['ratio']:.2f} and {row['correlation']:.2f}"
        for row in rows if "way" in row
    )  # fmt: skip
    return f"realized over predicted on the targeted loss, and correlation: {found}; {claims(rows)}"


def fresh_circuit(rows: Rows) -> str:
    def told(steps: list[float | None]) -> str:
        return ", ".join("never" if x is None else f"{x:.0f}" for x in steps)

    arms = "; ".join(
        f"by the {row['observable']} {told(row['formed'])} ({number(row['steps_of_measuring'])} "
        "steps of measuring)" for row in rows
    )  # fmt: skip
    return f"steps to the circuit, four seeds: unweighted {told(rows[0]['unweighted'])}; {arms}"


def lds(rows: Rows) -> str:
    scores = ", ".join(
        f"{row['method']} {row['lds']:.2f} ± {row['lds_stderr']:.2f}" for row in rows
        if "lds" in row
    )  # fmt: skip
    return f"rank correlation: {scores}; {claims(rows)}"


def checkpoint_cost(rows: Rows) -> str:
    chains = "; ".join(
        f"{row['model']} {row['component']} {row['per_chain'] / 2**20:,.0f} MiB "
        f"({row['gradient'] / 2**20:,.0f}; {row['stack'] / 2**20:,.0f})"
        for row in rows if row["part"] == "memory"
    )  # fmt: skip
    steps = ", ".join(
        f"{row['model']} on the {row['where']} {row['ratio']:.2f}"
        + not_met(row["ratio"] <= row["claimed"])
        for row in rows if row["part"] == "step"
    )  # fmt: skip
    tails = ", ".join(f"{row['model']} {row['share']:.2f}" for row in rows if row["part"] == "tail")
    return (
        f"a chain more takes (a bare gradient of its batch; the stack it lies in) {chains}; "
        f"a step over a bare gradient of the same component (claimed 1.2): {steps}; a step on the "
        f"tail over one on the whole: {tails}"
    )


def gpu(rows: Rows) -> str:
    full = max(row["flops"] / row["peak"] for row in rows if row.get("part") == "utilisation")
    times = ", ".join(f"{row['seconds']:.0f} s in {row['dtype']}" for row in rows
                      if row.get("part") == "response")  # fmt: skip
    return f"up to {full:.0%} of the peak; 16 heads × 100,000 tokens: {times}"


COMPARED: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "devinterp_susceptibilities": (
        "χ of heads with devinterp 2.0.1, on ported weights", susceptibilities,
    ),
    "devinterp_susceptibilities_large": ("the same, four layers of width 128", susceptibilities),
    "devinterp_pythia": (
        "the same on a Pythia-14M-shaped GPT-NeoX (vocabulary cut to 4,096), one folder read by "
        "transformers for devinterp and by us", susceptibilities,
    ),
    "torch_loop": ("χ of a head with a hand-written torch loop", torch_loop),
    "devinterp_llc": ("spread and coverage of the LLC with devinterp's", llc),
    "floor": ("CPU time of each part with the bare computation, a ratio", floor),
    "training_response": (
        "change of six losses by retraining with what the training run's response predicts",
        training_response,
    ),
    "fresh_circuit": (
        "the induction circuit of fresh models under `pattern`, with unweighted data",
        fresh_circuit,
    ),
    "reweighting": (
        "mixtures from the response with metagradient, RegMix, DoReMi, DoGE, influence functions",
        reweighting,
    ),
    "lds": ("predicted and realized losses of retraining on random halves", lds),
    "growth": ("time and memory against the size of a problem", growth),
    "checkpoint_cost": (
        "memory of a chain and time of a step on checkpoints, batches of 4 × 32 tokens",
        checkpoint_cost,
    ),
    "gpu": ("FLOPs utilization, bfloat16 and a response of paper size", gpu),
}  # fmt: skip


def read(path: Path) -> Rows:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pathwise(folder: Path) -> list[str]:
    """The gains of pathwise over covariance, for which something is claimed."""
    rows = read(folder / "pathwise-2-layers.jsonl")
    return [
        "| posterior | in gradients | in seconds |",
        "|---|---|---|",
        *(
            f"| {row['setting']} | {number(row['gain_cost'], 3)} × | "
            f"{number(row['gain_seconds'], 3)} × |"
            for row in rows
            if row["claimed"]
        ),
    ]


def measured(row: dict[str, Any], key: str, factor: float = 1e3) -> str:
    """A number in 10⁻³ and its standard error."""
    return f"{factor * row[key]:+.1f} ± {factor * row[f'{key}_stderr']:.1f}"


def wishes(folder: Path) -> list[str]:
    """What each method did for each wish: change of the wished loss, of the held one, of all."""
    rows = [row for row in read(folder / "reweighting.jsonl") if "method" in row]
    labels = {row["wish"]: f"{row['lower']} ↓, {row['hold']} held" for row in rows}
    lines = [
        "| method | " + " | ".join(labels.values()) + " | gradients |",
        "|---" * (len(labels) + 2) + "|",
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [one(rows, method=name, wish=i) for i in labels]
        cells = [
            ", ".join(measured(row, key) for key in ("target", "held", "mean")) for row in mine
        ]
        cost = max(row["cost"] for row in mine)
        lines.append(f"| {name} | {' | '.join(cells)} | {number(cost)} |")
    return lines


def attributions(folder: Path) -> list[str]:
    """Score and filter of each method."""
    lines = ["| method | LDS | rise of the loss, 10⁻³ nats | gradients |", "|---|---|---|---|"]
    for row in read(folder / "lds.jsonl"):
        if "method" in row:
            score = f"{row['lds']:.3f} ± {row['lds_stderr']:.3f}" if "lds" in row else ""
            rise = measured(row, "rise") if "rise" in row else ""
            cost = number(row["cost"]) if "cost" in row else ""
            lines.append(f"| {row['method']} | {score} | {rise} | {cost} |")
    return lines


def benchmarks(folder: Path) -> list[str]:
    """One line per benchmark."""
    lines = ["| command | what is compared | found |", "|---|---|---|"]
    for name, (what, describe) in COMPARED.items():
        path, found = folder / f"{name}.jsonl", "not run yet"
        if path.exists():
            rows = read(path)
            found = describe(rows) + (" (`--quick`)" if rows[0]["quick"] else "")
        command = name.removesuffix("_large") + ".py" + " --large" * name.endswith("_large")
        lines.append(f"| `{command}` | {what} | {found} |")
    return lines


TABLES = {
    "pathwise": pathwise, "benchmarks": benchmarks, "wishes": wishes, "attributions": attributions,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "measured")
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    options = parser.parse_args(arguments)
    old = new = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        before, rest = new.split(begin)
        _, after = rest.split(end)
        lines = "\n".join(make(options.rows))
        new = f"{before}{begin}\n{lines}\n\n{end}{after}"
    if options.check:
        return int(old != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
