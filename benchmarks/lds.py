"""Linear datamodeling score: do predicted effects of training windows order what retraining finds?

A small language model is trained on windows of real text, and again on random halves of them. Each
method gives every window an effect on every held-out loss; a half is predicted by the sum of the
effects of its windows. The score is Spearman's rank correlation, over the halves, of predicted and
realized held-out losses, averaged over held-out windows (Park et al. 2023), with a bootstrap error
over halves. Methods look at models of other seeds than those that are retrained. Retraining is
noisy itself: `ceiling` is what a prediction that knew the mean over all seeds would score, from how
well the seeds agree (√ of the Spearman-Brown reliability).

  pathwise, covariance   χ of the localized posterior, the second at 1.85 times the cost
  Laplace                influence functions, `jp.laplace`
  cosine                 of the gradients
  TRAK-like              gradients on random directions, whitened
  metagradient           the response of the training run, backwards

The filter: the tenth of the windows that a method finds most helpful to a held-out window is left
out; how much its loss rises, against a tenth at random.

Claimed: pathwise scores no less than covariance at its greater cost, by one standard error of the
difference, nor than Laplace by two; leaving out what pathwise finds most helpful raises the loss by
two standard errors more than leaving out at random.

    python benchmarks/lds.py [--quick | --tiny] [--out benchmarks/results]

writes one JSON line per method and a figure, and exits with 1 when a claim fails. What was measured
and trained is kept beside the rows: started again, it goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats

import jaxpattern as jp
import measure
from lds_methods import (
    TINY,
    Attribution,
    Settings,
    Windows,
    cosine,
    covariance_plan,
    gradients,
    metagradient,
    of_posterior,
    trak,
)
from stages import Stages

RESAMPLED = 300
MORE = 1.85  # cost of covariance over that of pathwise: it has the benefit


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="runs of few steps, to see it work")
    options = parser.parse_args(argv)
    settings = TINY if options.tiny else Settings()
    if options.quick:
        settings = settings._replace(halves=min(50, settings.halves))
    report = measure.Report("lds", options)
    problem = Windows(settings)
    kept = Stages(options.out / "lds", settings)
    effects = attribute(problem, kept)

    rng = np.random.default_rng(1)
    size = settings.windows
    halves = np.zeros((settings.halves, size))
    for half in halves:
        half[rng.permutation(size)[: size // 2]] = 1.0
    realized = kept.stage("halves", lambda: {"losses": problem.retrain(halves)})["losses"]
    scores = score(effects, halves, realized)
    rises = filtered(problem, effects, kept, rng)
    tell(report, problem, effects, scores, rises, realized)
    judge(report, scores, rises)
    report.add_claims()
    draw(report, scores, rises)
    return report.close()


def attribute(problem: Windows, kept: Stages) -> dict[str, Attribution]:
    """Effects and cost of every method."""
    settings, models = problem.settings, []

    def trained() -> Any:
        if not models:
            models.append(problem.train(problem.measured))
        return models[0]

    def make(method: Callable[[], Attribution]) -> Callable[[], dict[str, Any]]:
        return lambda: method()._asdict()

    def of_gradients(method: Callable[..., np.ndarray]) -> Attribution:
        found = [method(*pair) for pair in gradients(problem, trained())]
        return Attribution(
            np.mean(found, axis=0), settings.measured * float(settings.windows + settings.held_out)
        )

    def found(name: str, method: Callable[[], Attribution]) -> Attribution:
        return Attribution(**kept.stage(name, make(method)))

    laplace = jp.laplace(num_signs=2, tolerance=1e-2, max_iterations=6)
    pathwise = found(
        "pathwise", lambda: of_posterior(problem, trained(), jp.pathwise(), settings.plan)
    )
    longer = covariance_plan(problem, MORE * float(pathwise.cost))
    return {
        "pathwise": pathwise,
        "covariance": found(
            "covariance", lambda: of_posterior(problem, trained(), jp.covariance(), longer)
        ),
        "Laplace": found(
            "Laplace", lambda: of_posterior(problem, trained(), laplace, settings.plan)
        ),
        "cosine": found("cosine", lambda: of_gradients(cosine)),
        "TRAK-like": found(
            "TRAK-like", lambda: of_gradients(lambda a, b: trak(a, b, settings.projected))
        ),
        "metagradient": found("metagradient", lambda: metagradient(problem)),
    }


def spearman(predicted: np.ndarray, realized: np.ndarray) -> np.ndarray:
    """Rank correlations over the first axis, `[R, K]` with `[R, K]`."""
    a, b = (scipy.stats.rankdata(x, axis=0) for x in (predicted, realized))
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))


def ceiling(realized: np.ndarray) -> np.ndarray:
    """√ of the reliability of the mean over seeds, for each held-out window, `[R, S, K]`."""
    seeds = realized.shape[1]
    pairs = [
        spearman(realized[:, i], realized[:, j]) for i in range(seeds) for j in range(i + 1, seeds)
    ]
    agreement = np.clip(np.mean(pairs, axis=0), 0, 1)
    return np.sqrt(seeds * agreement / (1 + (seeds - 1) * agreement))


def score(
    effects: dict[str, Attribution], halves: np.ndarray, realized: np.ndarray
) -> dict[str, np.ndarray]:
    """LDS of each method, and the ceiling: the estimate, and then resampled halves, `[1 + B]`."""
    rng = np.random.default_rng(2)
    count = len(halves)
    rows = [np.arange(count), *(rng.integers(0, count, (RESAMPLED, count)))]
    mean = realized.mean(axis=1)
    found = {
        name: np.array(
            [spearman((halves @ it.effects.T)[r], mean[r]).mean() for r in rows]
        )
        for name, it in effects.items()
    }  # fmt: skip
    return found | {"ceiling": np.array([ceiling(realized[r]).mean() for r in rows])}


def filtered(
    problem: Windows, effects: dict[str, Attribution], kept: Stages, rng: Any
) -> dict[str, np.ndarray]:
    """Rise of a held-out loss without its most helpful tenth, of each held-out window tried."""
    settings = problem.settings
    tenth, tried = max(1, settings.windows // 10), range(settings.filtered)
    names = [*effects, "random"]
    rho = np.ones((len(names), settings.filtered, settings.windows))
    for row, name in zip(rho, names, strict=True):
        for k in tried:
            helpful = (
                rng.permutation(settings.windows)
                if name == "random"
                else np.argsort(effects[name].effects[k])
            )
            row[k, helpful[:tenth]] = 0.0
    flat = np.concatenate([np.ones((1, settings.windows)), rho.reshape(-1, settings.windows)])
    losses = kept.stage("filter", lambda: {"losses": problem.retrain(flat)})["losses"].mean(axis=1)
    rise = (losses[1:] - losses[0]).reshape(len(names), settings.filtered, -1)
    found = {name: np.array([rise[i, k, k] for k in tried]) for i, name in enumerate(names)}
    # A tenth at random is one for all held-out windows: the mean over all tenths has less noise.
    found["random"] = rise[-1][:, : settings.filtered].mean(axis=0)
    return found


def tell(
    report: measure.Report,
    problem: Windows,
    effects: dict[str, Attribution],
    scores: dict[str, np.ndarray],
    rises: dict[str, np.ndarray],
    realized: np.ndarray,
) -> None:
    """A row for each method."""
    settings = problem.settings
    spread = realized.mean(axis=1).std(axis=0).mean()
    for name in ("ceiling", "random", *effects):
        row: dict[str, Any] = {}
        told = name.ljust(12)
        if name in scores:
            row |= {"lds": float(scores[name][0]), "lds_stderr": float(scores[name][1:].std())}
            told += f" LDS {row['lds']:+.3f} ± {row['lds_stderr']:.3f}"
        if name in rises:
            rise, error = measure.mean_and_error(rises[name])
            row |= {
                "rise": rise,
                "rise_stderr": error,
                "rise_by_window": rises[name].tolist(),
            }
            told += f"  filtered {row['rise']:+.4f} ± {row['rise_stderr']:.4f} nats"
        if name in effects:
            row["cost"] = float(effects[name].cost)
            told += f"  {row['cost']:,.0f} gradients"
        report.add(
            told, method=name, halves=settings.halves, windows=settings.windows,
            held_out=settings.held_out, seeds=settings.retrained, measured=settings.measured,
            spread=float(spread), loss=float(realized.mean()), **row,
        )  # fmt: skip


def judge(
    report: measure.Report, scores: dict[str, np.ndarray], rises: dict[str, np.ndarray]
) -> None:
    """The claims."""
    for name, errors in (("covariance", 1), ("Laplace", 2)):
        less = scores["pathwise"] - scores[name]
        report.claim(f"pathwise scores no less than {name}", less[0] > -errors * less[1:].std())
    more, error = measure.mean_and_error(rises["pathwise"] - rises["random"])
    report.claim(
        f"without what pathwise finds helpful the loss rises by {more:.4f} > 2 × {error:.4f} more "
        "than at random", more > 2 * error,
    )  # fmt: skip


def draw(
    report: measure.Report, scores: dict[str, np.ndarray], rises: dict[str, np.ndarray]
) -> None:
    """Scores, and rises of the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    names = [name for name in scores if name != "ceiling"]
    left.barh(names, [scores[n][0] for n in names], xerr=[scores[n][1:].std() for n in names])
    left.axvline(scores["ceiling"][0], color="black", linestyle=":", label="ceiling")
    left.set(xlabel="rank correlation over halves (LDS)")
    left.legend(fontsize="small")
    height, error = 1e3 * np.transpose([measure.mean_and_error(x) for x in rises.values()])
    right.barh(list(rises), height, xerr=error)
    right.set(xlabel="rise without the most helpful tenth, 10⁻³ nats")
    for ax in (left, right):
        ax.invert_yaxis()
    figure.savefig(report.figure)


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
