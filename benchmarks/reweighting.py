"""Ways to choose a data mixture, on the quickstart's problem: what each buys, and at what price.

Three wishes, fixed in `WISHES`: lower the held-out loss of one source, and let that of another not
rise. Each method gives weights for the sources; all are brought to the same distance from equal
parts, KL(ρ‖1), along their own direction, and models are trained from scratch on each with equal
starts and batches. Methods measure on other seeds than those.

  response     ours: the pathwise response of trained models, inverted by `entropic()`
  training     ours: the response of the training run, `training_response`, inverted the same way
  twins        the same from twin runs, `training_response(mode="secant")`
  online       ours: `pattern` in four rounds by twin runs, which is asked for more than its budget
               allows, the effective sample size of `training`
  online, small  the same asked for little, and its four rounds brought to the distance together
  metagradient log ρ ∝ −dL(w_T)/dρ of the wished loss (backwards: the same derivative, for less)
  RegMix       a linear fit to proxy runs on random mixtures, at the cost of `training`
  DoReMi       group DRO: ρ grows with the excess loss over a reference model, averaged over
               training; it is told nothing of the wish
  DoGE         log ρ ∝ ⟨∇L of a source, ∇L of the wished loss⟩, along training
  laplace      the Gaussian approximation at w* (influence functions), inverted like ours
  permuted     the weights of `response`, each given to the next source
  random       the same, permuted at random

Of the baselines RegMix and laplace are told what is to be held, as ours are. Method a is better
than b at equal held loss by k errors when, over paired seeds, its wished loss lies lower by more
than k standard errors of the difference, and its held loss does not lie higher by more than one.
Claimed of each arm of ours (first of `training`): no baseline is better by one error, and it is
better than DoGE by two for one wish at least. Claimed of both online arms: no one-shot arm
that costs as much, or less, is better by one.

    python benchmarks/reweighting.py [--quick | --tiny] [--out benchmarks/results]

writes one JSON line per wish and method and a figure, and exits with 1 when a claim fails. What was
measured and trained is kept beside the rows: started again, it goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import jaxpattern as jp
import measure
from reweighting_methods import (
    ROUNDS,
    Mixtures,
    Wish,
    along,
    at_distance,
    divergence,
    doge,
    doremi,
    of_posterior,
    of_training,
    online,
    quickstart,
    regmix,
    slopes_of,
    small,
    solved,
    steepest,
)
from stages import Stages

# Written down before any of them was tried: source to lower, source to hold.
WISHES = (("headers", "reference"), ("docstrings", "licences"), ("tests", "library"))
DISTANCE = 0.02  # KL(ρ‖1) of all weights: an effective sample size of about 96 %
OURS = ("response", "training", "twins", "online", "online, small")


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="runs of few steps, to see it work")
    parser.add_argument("--seeds", type=int, default=8, help="models of each mixture")
    options = parser.parse_args(argv)
    settings = small(quickstart.Settings())
    seeds, measured = options.seeds, 3
    if options.quick:
        settings, seeds = settings._replace(steps=80), min(seeds, 4)
    if options.tiny:
        settings = quickstart.QUICK._replace(max_sources=None, steps=ROUNDS)
        seeds, measured = 2, 2
    report = measure.Report("reweighting", options)
    problem = Mixtures(settings, seeds, measured)
    made_with = (settings, seeds, measured, WISHES, DISTANCE, problem.sources)
    kept = Stages(options.out / "reweighting", made_with)
    wishes = [Wish(*(problem.sources.index(s) for s in wish)) for wish in WISHES]
    arms = choose(problem, wishes, kept, options.tiny)
    rows = compare(problem, wishes, arms, kept, report)
    judge(report, rows)
    report.add_claims()
    draw(report, rows)
    return report.close()


def choose(
    problem: Mixtures, wishes: list[Wish], kept: Stages, tiny: bool
) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """Weights `[rounds, sources]` and cost of each wish and method; one-shot weights do not change.

    What serves all wishes is measured once, and its cost counted for each.
    """
    count = 4 if tiny else 16
    models: list[Any] = []

    def trained() -> Any:
        """Models of equal parts, of the measured seeds."""
        if not models:
            models.append(problem.train_on(np.tile(problem.equal, (ROUNDS, 1)), problem.measured))
        return models[0]

    def posterior(estimator: Any, some: int | None) -> dict[str, Any]:
        return inverted(of_posterior(problem, trained()[0], estimator, some), 0.002)

    def inverted(response: jp.Response, by: float) -> dict[str, Any]:
        return {
            "weights": [solved(problem, response, wish, by) for wish in wishes],
            "slopes": slopes_of(problem, response), "cost": response.cost,
        }  # fmt: skip

    laplace = jp.laplace(num_signs=2, tolerance=1e-2, max_iterations=10)
    training = kept.stage("training", lambda: inverted(of_training(problem, "forward"), 0.02))
    twins = kept.stage("twins", lambda: inverted(of_training(problem, "secant"), 0.02))
    run_cost = float(training["cost"])
    number = max(2 * len(problem.measured), round(run_cost / (problem.run / 2 + problem.look)))
    fit = kept.stage("RegMix", lambda: pair("slopes", regmix(problem, number)))
    pathwise = kept.stage("response", lambda: posterior(quickstart.ESTIMATOR, None))
    gauss = kept.stage("laplace", lambda: posterior(laplace, count))
    aligned = kept.stage("DoGE", lambda: pair("pairs", doge(problem)))
    robust = kept.stage("DoReMi", lambda: pair("weights", doremi(problem, trained()[1])))
    steps = len(problem.measured) * problem.run
    arms: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for i, wish in enumerate(wishes):
        one_shot: dict[str, tuple[np.ndarray, Any]] = {
            "response": (pathwise["weights"][i], pathwise["cost"]),
            "training": (training["weights"][i], run_cost),
            "twins": (twins["weights"][i], twins["cost"]),
            "metagradient": (along(-training["slopes"][wish.lower]), 5 * steps),
            "RegMix": (steepest(fit["slopes"], wish), fit["cost"]),
            "DoReMi": (robust["weights"], robust["cost"]),
            "DoGE": (along(aligned["pairs"][wish.lower]), aligned["cost"]),
            "laplace": (gauss["weights"][i], gauss["cost"]),
        }
        ours = one_shot["response"][0]
        shuffle = np.random.default_rng(i).permutation(len(ours))
        one_shot["permuted"] = np.roll(ours, 1), 0.0
        one_shot["random"] = ours[shuffle], 0.0
        for name, (weights, cost) in one_shot.items():
            weights = at_distance(weights, DISTANCE)
            arms[i, name] = {"weights": np.tile(weights, (ROUNDS, 1)), "cost": np.asarray(cost)}
        # The first asks for more than can be had, at the sample size of `training`; the second for
        # so little that no round is held back.
        share = float(1 / np.mean(arms[i, "training"]["weights"] ** 2))
        for name, settings in {
            "online": {"by": 0.2, "share": share, "method": jp.ridge()},
            "online, small": {"by": 0.01, "share": 0.5, "method": jp.entropic()},
        }.items():
            go = partial(online, problem, wish, **settings)
            found = kept.stage(f"{name} {i}", lambda go=go: pair("weights", go()))
            arms[i, name] = found | {"weights": at_distance(found["weights"], DISTANCE)}
    return arms


def pair(name: str, found: tuple[np.ndarray, float]) -> dict[str, Any]:
    """What was found, under its name, and its cost."""
    return {name: found[0], "cost": found[1]}


def compare(
    problem: Mixtures,
    wishes: list[Wish],
    arms: dict[tuple[int, str], dict[str, np.ndarray]],
    kept: Stages,
    report: measure.Report,
) -> dict[tuple[int, str], dict[str, Any]]:
    """Trains every arm and reports what came of it, against equal parts."""

    def losses(schedule: np.ndarray) -> Callable[[], dict[str, Any]]:
        return lambda: {"losses": problem.train_on(schedule)[1]}

    equal = kept.stage("equal parts", losses(np.tile(problem.equal, (ROUNDS, 1))))["losses"]
    rows = {}
    for (i, name), arm in arms.items():
        label = name if name == "DoReMi" else f"{i} {name}"  # it knows no wish
        change = kept.stage(f"trained {label}", losses(arm["weights"]))["losses"] - equal
        wish = wishes[i]
        seen = {
            "target": change[:, wish.lower], "held": change[:, wish.hold],
            "mean": change.mean(axis=1),
        }  # fmt: skip
        lower, hold = problem.sources[wish.lower], problem.sources[wish.hold]
        row: dict[str, Any] = {"cost": float(arm["cost"]) + problem.run}
        for key, values in seen.items():
            row[key], row[f"{key}_stderr"] = measure.mean_and_error(values)
            row[f"{key}_by_seed"] = values.tolist()
        rows[i, name] = row
        told = ", ".join(f"{k} {row[k]:+.4f} ± {row[f'{k}_stderr']:.4f}" for k in seen)
        report.add(
            f"{name:12s} {lower} ↓ {hold} held: {told} nats; {row['cost']:,.0f} gradients",
            wish=i, method=name, lower=lower, hold=hold, seeds=len(equal),
            divergence=divergence(arm["weights"]),
            weights=arm["weights"].tolist(), sources=problem.sources, **row,
        )  # fmt: skip
    return rows


def better(a: dict[str, Any], b: dict[str, Any], errors: float) -> bool:
    """Whether a lowers the wished loss by so many standard errors more, at equal held loss."""
    target, held = (
        measure.mean_and_error(np.subtract(a[f"{key}_by_seed"], b[f"{key}_by_seed"]))
        for key in ("target", "held")
    )
    return target[0] < -errors * target[1] and held[0] <= held[1]


def judge(report: measure.Report, rows: dict[tuple[int, str], dict[str, Any]]) -> None:
    """The claims, of each arm of ours."""
    wishes = sorted({i for i, _ in rows})
    baselines = [name for i, name in rows if i == 0 and name not in OURS]
    for arm in OURS:
        ahead = [
            f"{name} for {WISHES[i][0]}"
            for i in wishes for name in baselines if better(rows[i, name], rows[i, arm], 1)
        ]  # fmt: skip
        report.claim(f"no baseline is better than {arm} ({', '.join(ahead)})", not ahead)
        report.claim(
            f"{arm} is better than DoGE by two errors for one wish",
            any(better(rows[i, arm], rows[i, "DoGE"], 2) for i in wishes),
        )
    for arm in OURS[-2:]:
        ahead = [
            f"{name} for {WISHES[i][0]}" for (i, name), row in rows.items()
            if name not in OURS[-2:] and row["cost"] <= rows[i, arm]["cost"]
            and better(row, rows[i, arm], 1)
        ]  # fmt: skip
        report.claim(
            f"no one-shot arm is better than {arm} for less ({', '.join(ahead)})", not ahead
        )


def draw(report: measure.Report, rows: dict[tuple[int, str], dict[str, Any]]) -> None:
    """What each method buys against what happens to the held loss, for each wish."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(WISHES))
    for (i, name), row in rows.items():
        axes[i].errorbar(
            row["held"], -row["target"], row["target_stderr"], row["held_stderr"],
            ("s" if "online" in name else "o") if name in OURS else "x", label=name, elinewidth=0.6,
        )  # fmt: skip
    for ax, (lower, hold) in zip(axes, WISHES, strict=True):
        ax.axhline(0, color="black", linewidth=0.6)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set(xlabel=f"rise on {hold}, nats", ylabel=f"fall on {lower}, nats")
    axes[-1].legend(fontsize="x-small")
    figure.savefig(report.figure)


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
