"""Growth: time and memory of a response matrix against everything it can grow in.

Claimed: memory does not grow with draws (by less than a twentieth of what storing the losses of
the probes would take), and time grows at most linearly, within 10 %, in chains, components, draws
and probes.

A small transformer, the pathwise and the covariance estimator, one thing varied at a time. Every
point is a process of its own. Memory: the peak of what is resident above what was before a run
(Linux), CPU seconds are of a run, both compiled before. Exponents are those of a power law through
the points. Two chains are advanced at a time (`Plan.chains_at_once`): all of them at once outgrow
the cache of a core, and time then grew by more than they did (exponents of 1.13 and 1.14 in
components, 1.04 and 1.13 in chains). Eight components are therefore also run as one vmapped program
without blocks, and one after the other.

    python benchmarks/growth.py [--quick] [--out benchmarks/results]

writes one JSON line a point and a figure, and exits with 1 when a claim fails.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxpattern as jp
import measure
from jaxpattern.models import transformer

START = {"chains": 2, "components": 2, "probes": 32, "draws": 24, "width": 64, "context": 32}
AT_ONCE = 2
LINEAR = ("chains", "components", "draws", "probes")
CLAIMED = 1.1  # the exponent of time in those
ESTIMATORS = {"pathwise": jp.pathwise(window=8, every=4), "covariance": jp.covariance()}
STORED = 0.05  # of the bytes of all losses, the claimed share


class Point(NamedTuple):
    """Parameters of the model, and CPU seconds and bytes of a response matrix."""

    parameters: int
    seconds: float
    memory: int


@functools.cache
def point(estimator: str, at_once: int | None = AT_ONCE, **larger: int) -> Point:
    """`measured` in a process of its own, where no earlier run left memory behind.

    With one arena: of others glibc keeps what was freed last, and its next use would not be seen.
    """
    size = START | larger | {"at_once": at_once}
    command = [sys.executable, __file__, "--point", estimator, json.dumps(size)]
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return Point(*json.loads(run.stdout))


def measured(estimator: Any, size: dict[str, Any]) -> Point:
    """A response matrix at random weights."""
    config = transformer.TransformerConfig(
        vocab_size=64, context=size["context"], num_layers=1, num_heads=8, d_model=size["width"]
    )
    loss_fn = transformer.make_loss_fn(config)
    params = transformer.init(jax.random.key(0), config)
    shape = (64 + size["probes"], size["context"] + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, 64)
    posterior = jp.localized_posterior(loss_fn, params, tokens[:64], nbeta=30.0, localization=300.0)
    heads = jp.components(params, kinds="head")
    plan = jp.Plan(
        num_chains=size["chains"], num_burnin=8, num_draws=size["draws"], thin=4, batch_size=8,
        num_batches=2, chains_at_once=size["at_once"],
    )  # fmt: skip
    probes = tokens[64:]

    def run() -> Any:
        return jp.susceptibilities(
            jax.random.key(2), posterior, jp.sgld(step_size=1e-3), plan, probes={"text": probes},
            reference=probes, estimator=estimator, progress=False,
            components={name: heads[name] for name in list(heads)[: size["components"]]},
        ).chi  # fmt: skip

    seconds = measure.in_turn({"run": run}, 3)["run"].seconds
    peaks = [measure.peak_memory(lambda: jax.block_until_ready(run()))[0] for _ in range(3)]
    memory = sorted(peaks)[1]  # now and then the allocator keeps some MiB more
    return Point(sum(leaf.size for leaf in jax.tree.leaves(params)), seconds, memory)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--axes", nargs="+", default=list(START), choices=list(START))
    options = parser.parse_args(argv)
    report = measure.Report("growth", options)
    factors = (1, 4) if options.quick else (1, 2, 4)
    curves: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for label in ["pathwise"] if options.quick else ESTIMATORS:
        for axis in options.axes:
            points = []
            for factor in factors:
                if axis == "components" and START[axis] * factor > 8:
                    continue  # it has eight heads
                larger = {axis: START[axis] * factor} if factor > 1 else {}
                found = point(label, **larger)
                x = found.parameters if axis == "width" else START[axis] * factor
                points.append((x, found.seconds, max(1, found.memory)))
            xs, seconds, memory = (list(values) for values in zip(*points, strict=True))
            time_exponent, memory_exponent = exponent(xs, seconds), exponent(xs, memory)
            name = "parameters" if axis == "width" else axis
            curves[label, name] = points
            report.add(
                f"{label:10s} {name:10s} "
                f"{xs[0]:8d} … {xs[-1]:8d}: time ∝ n^{time_exponent:.2f}, "
                f"memory ∝ n^{memory_exponent:.2f}",
                estimator=label, axis=name, points=points, time_exponent=time_exponent,
                memory_exponent=memory_exponent, claimed=CLAIMED if axis in LINEAR else None,
            )  # fmt: skip
            if axis == "draws":
                a_draw = START["chains"] * START["components"] * START["probes"] * START["context"]
                share = (memory[-1] - memory[0]) / (4 * a_draw * (xs[-1] - xs[0]))
                report.claim(
                    f"{label}: memory grew by {share:.2f} of the bytes of the losses of all draws, "
                    f"claimed {STORED:g}",
                    share <= STORED,
                )
            if axis in LINEAR:
                report.claim(
                    f"{label}: time ∝ {name}^{time_exponent:.2f}, claimed {CLAIMED:g}",
                    time_exponent <= CLAIMED,
                )
    together_or_not(report, "pathwise")
    draw(report, curves)
    return report.close()


def together_or_not(report: measure.Report, estimator: str) -> None:
    """All eight heads as one program, in blocks that the cache holds, and one after the other."""
    together = point(estimator, at_once=None, components=8)
    blocks = point(estimator, components=8)
    alone = point(estimator, components=1)
    report.add(
        f"eight heads as one program {together.seconds:.3f} CPU s, {together.memory / 2**20:.1f} "
        f"MiB; {AT_ONCE} chains at a time {blocks.seconds:.3f} CPU s, {blocks.memory / 2**20:.1f} "
        f"MiB; one head after the other {8 * alone.seconds:.3f} CPU s, "
        f"{alone.memory / 2**20:.1f} MiB",
        part="heads", together=together, blocks=blocks, in_series=alone,
    )  # fmt: skip


def draw(report: measure.Report, curves: dict) -> None:
    """Time and memory relative to the smallest point, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2)
    for (label, name), points in curves.items():
        xs, seconds, memory = (np.array(values) for values in zip(*points, strict=True))
        style = "o-" if label == "pathwise" else "s:"
        for ax, y in zip(axes, (seconds, memory), strict=True):
            ax.plot(xs / xs[0], y / y[0], style, label=f"{name}, {exponent(xs, y):.2f}")
    for ax, title in zip(axes, ("CPU seconds", "memory"), strict=True):
        ax.set(xscale="log", yscale="log", title=title, xlabel="growth of one thing")
        ax.legend(fontsize=7)
    figure.savefig(report.figure)


if __name__ == "__main__":
    measure.pin()
    if sys.argv[1:2] == ["--point"]:
        print(json.dumps(measured(ESTIMATORS[sys.argv[2]], json.loads(sys.argv[3]))))
    else:
        sys.exit(main())
