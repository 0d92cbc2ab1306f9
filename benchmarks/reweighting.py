"""Ways to choose a data mixture, on the quickstart's problem: what each buys, and at what price.

The wish: lower the held-out loss of one source, hold that of another. Each method gives weights for
the sources; all are brought to the same distance from equal parts, KL(ρ‖1), along their own
direction, and models are trained from scratch on each with equal starts and batches. What is bought
is the fall of the wished loss, what is paid the rise of the unweighted loss, the mean over sources.

  response   ours: the pathwise response of the losses to the sources, inverted by `entropic()`
  laplace    the same from the Gaussian approximation at w* (influence functions)
  DoGE       gradient alignment: log ρ ∝ ⟨∇L of a source, ∇L of the wished loss⟩, along training
  DoReMi     group DRO: ρ grows with the excess loss over a reference model, averaged over training;
             it is told nothing of the wish
  permuted   ours with the sources permuted

Claimed: ours lowers the wished loss by more than two standard errors, and no other lowers it more
while it pays less.

    python benchmarks/reweighting.py [--quick] [--out benchmarks/results]

writes one JSON line a method and a figure, and exits with 1 when a claim fails.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpattern as jp
import measure
from jaxpattern.models import make_loss_fn, transformer


def load_quickstart() -> Any:
    """The example as a module."""
    path = Path(__file__).parents[1] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Mixtures:
    """The problem: sources, models of equal parts, and training on other parts."""

    def __init__(self, tiny: bool, quick: bool, seeds: int | None) -> None:
        self.quickstart = load_quickstart()
        settings = self.quickstart.QUICK if tiny else self.quickstart.Settings()
        if quick and not tiny:
            settings = settings._replace(seeds=2, steps=200)
        self.settings = settings = settings._replace(seeds=seeds or settings.seeds)
        self.train, self.held_out = self.quickstart.load_text(self.quickstart.parse([]), settings)
        self.sources = list(self.train)
        self.loss_fn = make_loss_fn(settings.model)
        self.data = jnp.concatenate(list(self.train.values()))
        self.seeds = jax.random.split(jax.random.key(0), settings.seeds)
        self.start = jax.vmap(lambda key: transformer.init(key, settings.model))(self.seeds)
        self.observables = {s: jp.mean_loss(self.loss_fn, self.held_out[s]) for s in self.sources}
        self.all_losses = jax.jit(
            jax.vmap(lambda p: jnp.stack([phi(p) for phi in self.observables.values()]))
        )
        self.equal, self.equal_loss = self.train_on(np.ones(len(self.sources)))
        ranked = np.argsort(self.equal_loss[0])
        self.lower, self.hold = self.sources[ranked[-1]], self.sources[ranked[0]]

    def train_on(
        self, weights: np.ndarray, start: Any = None, steps: int | None = None
    ) -> tuple[Any, np.ndarray]:
        """Models of a mixture, and their held-out losses [seeds, sources]."""
        settings = self.settings
        mixture = dict(zip(self.sources, weights.tolist(), strict=True))
        schedule = optax.cosine_decay_schedule(settings.learning_rate, steps or settings.steps)
        params, _ = jp.train(
            self.seeds, self.loss_fn, self.start if start is None else start, self.data,
            optax.adamw(schedule), num_steps=steps or settings.steps,
            batch_size=settings.batch_size, progress=False,
            weights=self.quickstart.token_weights(mixture, self.train),
        )  # fmt: skip
        return params, np.asarray(self.all_losses(params))

    def from_response(self, estimator: Any, count: int | None) -> np.ndarray:
        """The entropic weights of a measured response, from so many windows of each source."""
        settings = self.settings
        params = jax.tree.map(lambda leaf: leaf[0], self.equal)
        probes = {s: x[:count] for s, x in self.train.items()}
        posterior = jp.localized_posterior(
            self.loss_fn, params, jnp.concatenate(list(probes.values())), nbeta=settings.nbeta,
            localization=settings.localization,
        )  # fmt: skip
        response = jp.susceptibilities(
            jax.random.key(1), posterior, jp.sgld(step_size=settings.step_size), settings.measure,
            observables=self.observables, probes=probes, estimator=estimator, progress=False,
        )  # fmt: skip
        with warnings.catch_warnings(action="ignore", category=jp.UnreachableTargetWarning):
            solution = jp.solve_weights(
                jp.group_mean(response), {self.lower: -0.002, self.hold: 0.0}, method=jp.entropic()
            )
        return np.array([float(solution.weights[s]) for s in self.sources])

    def doge(self, rounds: int = 4) -> np.ndarray:
        """exp of the alignment of gradients, averaged over a run of seed 0 on equal parts."""
        alignment = np.zeros(len(self.sources))
        models, wish = self.start, self.observables[self.lower]
        for _ in range(rounds):
            models, _ = self.train_on(
                np.ones(len(self.sources)), models, self.settings.steps // rounds
            )
            params = jax.tree.map(lambda leaf: leaf[0], models)
            wanted = jax.grad(wish)(params)
            for i, source in enumerate(self.sources):
                some = jp.mean_loss(self.loss_fn, self.train[source][:64])
                alignment[i] += float(optax.tree.vdot(jax.grad(some)(params), wanted)) / rounds
        return np.exp(alignment - alignment.mean())

    def doremi(self, rounds: int = 4, rate: float = 1.0) -> np.ndarray:
        """Exponentiated gradient on the excess losses of a proxy model, averaged over rounds."""
        weights, total, models = np.ones(len(self.sources)), 0.0, self.start
        for _ in range(rounds):
            models, losses = self.train_on(weights, models, self.settings.steps // rounds)
            excess = np.maximum((losses - self.equal_loss).mean(0), 0.0)
            weights = weights * np.exp(rate * excess)
            weights = weights / weights.mean()
            total = total + weights / rounds
        return np.asarray(total)


def divergence(weights: np.ndarray) -> float:
    """KL(ρ‖1) of weights of mean 1."""
    return float(np.mean(weights * np.log(weights)))


def at_distance(weights: np.ndarray, distance: float) -> np.ndarray:
    """ρ ∝ exp(t log ρ) with t where KL(ρ‖1) is the one wanted."""
    logs = np.log(weights)
    low, high = 0.0, 1.0

    def tilt(t: float) -> np.ndarray:
        tilted = np.exp(t * logs - np.max(t * logs))
        return tilted / tilted.mean()

    while divergence(tilt(high)) < distance and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(tilt(middle)) < distance else (low, middle)
    return tilt(high)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="the quickstart's tiniest setting")
    parser.add_argument("--seeds", type=int, default=None, help="models a mixture")
    options = parser.parse_args(argv)
    report = measure.Report("reweighting", options)
    problem = Mixtures(options.tiny, options.quick, options.seeds)
    count = 8 if options.tiny else 32
    ours = problem.from_response(load_quickstart().ESTIMATOR, None)
    methods = {
        "response": ours,
        "laplace": problem.from_response(jp.laplace(num_signs=4, max_iterations=30), count),
        "DoGE": problem.doge(),
        "DoReMi": problem.doremi(),
        "permuted": np.roll(ours, 1),
    }
    lower = problem.sources.index(problem.lower)
    rows: dict[str, dict[str, Any]] = {}
    for name, weights in methods.items():
        weights = at_distance(weights, divergence(ours))
        _, losses = problem.train_on(weights)
        change = losses - problem.equal_loss
        wish, price = change[:, lower], change.mean(axis=1)
        error = [float(x.std(ddof=1) / len(x) ** 0.5) for x in (wish, price)]
        gained, paid = -float(wish.mean()), float(price.mean())
        rows[name] = {
            "weights": dict(zip(problem.sources, weights.tolist(), strict=True)),
            "gained": gained, "gained_stderr": error[0], "paid": paid, "paid_stderr": error[1],
            "gained_per_paid": gained / paid if paid > 0 else None,
        }  # fmt: skip
        report.add(
            f"{name:9s} {problem.lower} falls by {gained:+.4f} ± {error[0]:.4f}, the unweighted "
            f"loss rises by {paid:+.4f} ± {error[1]:.4f} nats"
            + (f": {gained / paid:.2f} for one" if paid > 0 else ""),
            method=name, lower=problem.lower, hold=problem.hold, seeds=problem.settings.seeds,
            divergence=divergence(weights), **rows[name],
        )  # fmt: skip
    mine = rows["response"]
    report.claim(
        f"{problem.lower} falls by {mine['gained']:.4f} > 2 × {mine['gained_stderr']:.4f}",
        mine["gained"] > 2 * mine["gained_stderr"],
    )
    for name, row in rows.items():
        better = row["gained"] > mine["gained"] and row["paid"] < mine["paid"]
        report.claim(f"{name} lowers the wished loss more and pays less", not better)
    draw(report, rows)
    return report.close()


def draw(report: measure.Report, rows: dict[str, dict[str, Any]]) -> None:
    """What each method buys against what it pays."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained", dpi=120)
    ax = figure.subplots()
    for name, row in rows.items():
        ax.errorbar(
            row["paid"], row["gained"], row["gained_stderr"], row["paid_stderr"], "o", label=name
        )
    ax.axhline(0, color="black", linewidth=0.6)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set(xlabel="rise of the unweighted loss, nats", ylabel="fall of the wished loss, nats")
    ax.legend()
    figure.savefig(report.figure)


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
