"""Does the response of the training run say what retraining does? The quickstart's problem.

Eight models are trained from scratch on the quickstart's six sources, on equal parts and on one
mixture, with equal starts and batches. The change of each held-out loss is predicted from the runs
on equal parts alone, by the derivative (`training_response`, forwards) and by twin runs
(`mode="secant"`), after 200 steps and after 400. Beside the change realized stands its odd part,
that of the mixture less that of its opposite, over two: what a linear prediction can be of.

Claimed of each length and way: the loss of `headers`, whose weight changes most, moves within 25 %
of what was predicted, and predictions correlate with what is realized, over the six losses, by 0.9.

    python benchmarks/training_response.py [--quick | --tiny] [--out benchmarks/results]

writes one JSON line per length and way, and exits with 1 when a claim fails.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxpattern as jp
import measure
from jaxpattern.models import make_loss_fn, transformer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart

# Written down before any model was trained.
MIXTURE = {
    "library": 0.94, "tests": 0.92, "docstrings": 0.95, "reference": 1.01, "headers": 1.33,
    "licences": 0.85,
}  # fmt: skip
TARGET = "headers"
WAYS = {"derivative": "forward", "twins": "secant"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="runs of few steps, to see it work")
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args(argv)
    settings, lengths = quickstart.Settings(), (200,) if options.quick else (200, 400)
    if options.tiny:
        settings, lengths = quickstart.QUICK._replace(max_sources=None), (4,)
    report = measure.Report("training_response", options)
    for steps in lengths:
        compare(Runs(settings._replace(steps=steps), 2 if options.tiny else options.seeds), report)
    report.add_claims()
    return report.close()


class Runs:
    """Training runs of one length, from the same starts and with the same batches."""

    def __init__(self, settings: Any, seeds: int) -> None:
        self.settings = settings
        self.train, held_out = quickstart.load_text(quickstart.parse([]), settings)
        self.data = np.concatenate(list(self.train.values()))
        self.loss_fn = make_loss_fn(settings.model)
        self.observe = quickstart.make_observable(self.loss_fn, held_out)
        self.look = jax.jit(jax.vmap(self.observe))
        self.keys = jax.random.split(jax.random.key(2027), seeds)
        starts = [transformer.init(key, settings.model) for key in self.keys]
        self.start = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
        self.optimizer = optax.adamw(
            optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
        )
        self.mixture = {name: MIXTURE.get(name, 1.0) for name in self.train}

    def losses(self, scale: float) -> np.ndarray:
        """Held-out losses `[seeds, sources]` after a share of the way to the mixture."""
        weights = {name: 1 + scale * (rho - 1) for name, rho in self.mixture.items()}
        params, _ = jp.train(
            *self.setup, **self.length, weights=quickstart.token_weights(weights, self.train)
        )
        return np.asarray(self.look(params), np.float64)

    def response(self, mode: str) -> jp.Response:
        """From the runs on equal parts."""
        return jp.training_response(
            *self.setup, **self.length, mode=mode, sources=quickstart.rows_of(self.train),
            observables={"loss": self.observe},
        )  # fmt: skip

    @property
    def setup(self) -> tuple[Any, ...]:
        """What `train` and `training_response` share."""
        return self.keys, self.loss_fn, self.start, self.data, self.optimizer

    @property
    def length(self) -> dict[str, Any]:
        """And by name."""
        size = self.settings.batch_size
        return {"num_steps": self.settings.steps, "batch_size": size, "progress": False}


def compare(runs: Runs, report: measure.Report) -> None:
    """What each way predicts beside what is realized."""
    names, steps = list(runs.train), runs.settings.steps
    equal, there, opposite = (runs.losses(scale) for scale in (0.0, 1.0, -1.0))
    realized = told(there - equal)
    odd = told((there - opposite) / 2)
    for way, mode in WAYS.items():
        response = runs.response(mode)
        shifts = jp.predict(response, runs.mixture).values()
        predicted = [[float(shift.value), float(shift.stderr)] for shift in shifts]
        ratio, odd_ratio = (
            values[names.index(TARGET)][0] / predicted[names.index(TARGET)][0]
            for values in (realized, odd)
        )
        correlation, odd_correlation = (
            float(np.corrcoef(np.array(predicted)[:, 0], np.array(values)[:, 0])[0, 1])
            for values in (realized, odd)
        )
        print(f"{steps} steps, by the {way}: 10⁻³ nats a byte, predicted, realized, its odd part")
        for name, *each in zip(names, predicted, realized, odd, strict=True):
            cells = [f"{1e3 * value:+7.1f} ± {1e3 * error:4.1f}" for value, error in each]
            print(f"  {name:12}" + "  ".join(cells))
        report.add(
            f"  realized/predicted on {TARGET} {ratio:.2f}, correlation {correlation:.3f}; odd "
            f"part {odd_ratio:.2f}, {odd_correlation:.3f}; {response.verdict}",
            steps=steps, way=way, seeds=len(equal), sources=names, mixture=runs.mixture,
            predicted=predicted, realized=realized, odd=odd, ratio=ratio, correlation=correlation,
            odd_ratio=odd_ratio, odd_correlation=odd_correlation, cost=response.cost,
            verdict=response.verdict,
        )  # fmt: skip
        report.claim(
            f"{steps} steps, {way}: {TARGET} within 25 % ({ratio:.2f})", abs(ratio - 1) <= 0.25
        )
        report.claim(
            f"{steps} steps, {way}: correlation at least 0.9 ({correlation:.3f})",
            correlation >= 0.9,
        )


def told(values: np.ndarray) -> list[tuple[float, float]]:
    """Mean and error over seeds, of each source."""
    return [measure.mean_and_error(column) for column in values.T]


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
