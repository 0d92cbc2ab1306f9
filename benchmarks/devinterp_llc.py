"""The local learning coefficient against devinterp 2.0.1: spread over seeds, and coverage.

Claimed: for the same spread over seeds the library needs at least 20 times less CPU time; and its
reported intervals, mean ± 1.96 stderr, hold the exact LLC in at least 85 % of the runs.

  regression  linear, 8 features, where the posterior is Gaussian and the LLC known exactly;
  language    a GPT-2-shaped model trained on library code (spread only).

Both sides take the same posterior, steps, mini-batches and chains. devinterp's interval is its mean
± 1.96 of its standard deviation over chains, by the root of their number; it averages the burn-in,
and subtracts the loss at w* of other mini-batches, which are here all the data once for the
regression and its default 32 for the language model. Gains are var × CPU seconds and var ×
gradients, theirs over ours; every run is compiled before it is timed.

In gradients nothing is won on the regression, and nothing can be by this estimator: the spread is
that of the chain itself (2/√112 = 0.19: d/2 = 4 is the variance of the LLC of a draw, and 11,200
steps forget themselves in 100), the same on both sides, and ours pays two forward passes more a
draw. Pairing pays where the loss of a mini-batch varies more than the posterior, as in `language`.

    python benchmarks/devinterp_llc.py [--quick] [--out benchmarks/results]

writes one JSON line a row and a figure, and exits with 1 when a claim fails. Needs the bench extra.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpattern as jp
import language_model
import measure

CLAIMED = 20.0
COVERAGE = 0.85


class Problem(NamedTuple):
    """A posterior, its sampler and plan, and model, data and loss of it in torch."""

    posterior: jp.Posterior
    step_size: float
    plan: jp.Plan
    torch: Callable[[], tuple[Any, Any, Any]]
    init_batches: int
    exact: float | None


def squared_loss(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    return 0.5 * (x @ params - y) ** 2


def regression() -> Problem:
    """y = x·w + noise; w* is the least-squares solution, the LLC ½ Σ nβ h / (nβ h + γ)."""
    rng = np.random.default_rng(0)
    count, features, batch, nbeta, localization = 4096, 8, 64, 100.0, 1.0
    x = rng.normal(size=(count, features))
    y = x @ rng.normal(size=features) + rng.normal(size=count)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    curvature = nbeta * np.linalg.eigvalsh(x.T @ x / count)
    data = tuple(jnp.asarray(a, jnp.float32) for a in (x, y))
    posterior = jp.localized_posterior(
        squared_loss, jnp.asarray(best, jnp.float32), data, nbeta=nbeta, localization=localization
    )

    def in_torch() -> tuple[Any, Any, Any]:
        import torch

        model = torch.nn.Linear(features, 1, bias=False)
        model.weight.data = torch.tensor(best, dtype=torch.float32)[None]
        inputs, targets = (torch.tensor(np.asarray(a)) for a in data)

        def loss(model: Any, ids: Any) -> Any:
            rows = ids[:, 0]
            return 0.5 * (model(inputs[rows]) - targets[rows, None]) ** 2

        # devinterp takes tokens: the first is the number of a row, the second says nothing.
        ids = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.long)], 1)
        return model, ids, loss

    # A loss forgets itself in about 50 steps: a batch of draws, a fifth of a chain, is ten times
    # as long. Draws are dense, as the noise of the mini-batches that measure them averages out.
    plan = jp.Plan(num_chains=4, num_burnin=300, num_draws=1400, thin=2, batch_size=batch)
    exact = 0.5 * float(np.sum(curvature / (curvature + localization)))
    return Problem(posterior, 2e-4, plan, in_torch, count // batch, exact)


def language(steps: int) -> Problem:
    """The trained language model."""
    model = language_model.trained_model(language_model.GPT2, steps)
    posterior = jp.localized_posterior(
        model.loss_fn, model.params, model.data, nbeta=30.0, localization=300.0
    )

    def in_torch() -> tuple[Any, Any, Any]:
        import torch

        import torch_model

        torch_model.check_port(model.loss_fn, model.params, model.probes)
        ids = torch.tensor(np.asarray(model.data), dtype=torch.long)
        return torch_model.to_torch(model.params, model.loss_fn.config), ids, torch_model.losses

    plan = jp.Plan(num_chains=4, num_burnin=24, num_draws=48, thin=2, batch_size=16)
    return Problem(posterior, 1e-3, plan, in_torch, 32, None)


class Runs(NamedTuple):
    """Estimates of several seeds, their standard errors, CPU seconds and gradients of one run."""

    means: np.ndarray
    stderr: np.ndarray
    cpu: float
    gradients: float


def ours(problem: Problem, seeds: int) -> Runs:
    """The library, one run a seed."""
    sampler = jp.sgld(step_size=problem.step_size)

    def run(seed: int) -> Any:
        return jp.llc(
            jax.random.key(seed), problem.posterior, sampler, problem.plan, progress=False
        )

    run(0)
    timed = [measure.cpu_seconds(lambda s=seed: run(s)) for seed in range(seeds)]
    results = [result for _, result in timed]
    return Runs(
        np.array([float(r.mean) for r in results]),
        np.array([float(r.stderr) for r in results]),
        float(np.median([cpu for cpu, _ in timed])),
        results[0].cost,
    )


def theirs(problem: Problem, seeds: int) -> Runs:
    """devinterp, one run a seed."""
    from devinterp.slt.llc import llc

    from devinterp_susceptibilities import Windows, without_progress

    without_progress()
    model, ids, loss = problem.torch()
    plan = problem.plan

    def run(seed: int, folder: str) -> Any:
        return llc(
            model, Windows(ids), {}, lr=problem.step_size, n_beta=float(problem.posterior.nbeta),
            localization=float(problem.posterior.localization), loss_fn=loss,
            num_chains=plan.num_chains, num_draws=plan.num_draws, num_burnin_steps=plan.num_burnin,
            num_steps_bw_draws=plan.thin, batch_size=plan.batch_size,
            num_init_loss_batches=problem.init_batches, init_seed=1000 * seed,
            output_path=Path(folder) / f"{seed}.zarr",
        ).load()  # fmt: skip

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        run(seeds, folder)
        timed = [measure.cpu_seconds(lambda s=seed: run(s, folder)) for seed in range(seeds)]
    results = [result for _, result in timed]
    steps = plan.num_steps + problem.init_batches / 3
    return Runs(
        np.array([float(r.llc_mean) for r in results]),
        np.array([float(r.llc_std) for r in results]) / plan.num_chains**0.5,
        float(np.median([cpu for cpu, _ in timed])),
        plan.num_chains * plan.batch_size * steps,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=None, help="runs a side")
    options = parser.parse_args(argv)
    report = measure.Report("devinterp_llc", options)
    seeds = options.seeds or (20 if options.quick else 100)
    problems = [("regression", regression(), seeds)]
    if not options.quick:
        problems.append(("language", language(1000), max(8, seeds // 10)))
    pictures = []
    for name, problem, count in problems:
        sides = {"devinterp": theirs(problem, count), "jaxpattern": ours(problem, count)}
        pictures.append((name, problem.exact, sides))
        for side, runs in sides.items():
            coverage = None
            if problem.exact is not None:
                coverage = float(np.mean(np.abs(runs.means - problem.exact) <= 1.96 * runs.stderr))
            report.add(
                f"{name:10s} {side:10s} LLC {runs.means.mean():7.3f}, spread over {count} seeds "
                f"{runs.means.std(ddof=1):6.3f}, reported error {np.mean(runs.stderr):6.3f}, "
                f"{runs.cpu:7.3f} CPU s"
                + ("" if coverage is None else f"; exact {problem.exact:.3f}, held {coverage:.0%}"),
                part=name, side=side, seeds=count, mean=float(runs.means.mean()),
                spread=float(runs.means.std(ddof=1)), reported=float(runs.stderr.mean()),
                cpu_seconds=runs.cpu, gradients=runs.gradients, coverage=coverage,
                exact=problem.exact,
            )  # fmt: skip
        gains = {
            unit: float(
                sides["devinterp"].means.var(ddof=1) * getattr(sides["devinterp"], unit)
                / (sides["jaxpattern"].means.var(ddof=1) * getattr(sides["jaxpattern"], unit))
            )
            for unit in ("cpu", "gradients")
        }  # fmt: skip
        report.add(
            f"{name:10s} gain {gains['cpu']:.1f} in CPU seconds, {gains['gradients']:.1f} in "
            f"gradients (claimed {CLAIMED:g})",
            part=name, claimed=CLAIMED, **gains,
        )  # fmt: skip
        report.claim(f"{name}: gain {gains['cpu']:.1f} >= {CLAIMED:g}", gains["cpu"] >= CLAIMED)
        if problem.exact is not None:
            mine = sides["jaxpattern"]
            held = float(np.mean(np.abs(mine.means - problem.exact) <= 1.96 * mine.stderr))
            report.claim(f"{name}: covered {held:.0%} >= {COVERAGE:.0%}", held >= COVERAGE)
    draw(report, pictures)
    return report.close()


def draw(report: measure.Report, pictures: list[tuple[str, float | None, dict[str, Runs]]]) -> None:
    """Every run with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(pictures), 3.5), layout="constrained", dpi=120)
    for ax, (name, exact, sides) in zip(
        np.ravel(figure.subplots(1, len(pictures))), pictures, strict=True
    ):
        for side, (label, runs) in enumerate(sides.items()):
            order = np.argsort(runs.means)
            place = side + 0.9 * np.arange(len(order)) / len(order)
            ax.errorbar(
                place, runs.means[order], 1.96 * runs.stderr[order], fmt=".", linewidth=0.7,
                label=label,
            )  # fmt: skip
        if exact is not None:
            ax.axhline(exact, color="black", linewidth=0.8)
        ax.set(title=name, ylabel="LLC, 95 % intervals", xticks=[])
        ax.legend()
    figure.savefig(report.figure)


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
