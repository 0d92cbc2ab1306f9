"""χ of one task by devinterp and by the library: CPU seconds, error, memory, and the gain.

The error is half the mean squared difference of two seeds: noise alone, so that a form is not
blamed for its other estimand. Beside it stands the mean squared error against one long pathwise
reference. Errors fall as 1/√time: the gain is the ratio of error² × time, of the second run of
each, which neither compiles nor imports.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import devinterp_draws as stored
import jaxpattern as jp
import measure

CLAIMED = 50.0


class Setting(NamedTuple):
    """How both sides sample."""

    nbeta: float = 30.0
    localization: float = 300.0
    step_size: float = 1e-3
    batch: int = 16
    thin: int = 6
    burnin: int = 72
    chains: int = 4


class Task(NamedTuple):
    """χ of some heads to the tokens of held-out windows, L from other windows; as both take it.

    `torch_model()` is the model with the same weights, `masks(model, head)` those of a head, and
    `losses(model, tokens)` one loss for each next token.
    """

    setting: Setting
    loss_fn: Any
    params: Any
    data: Any
    probes: Any
    components: Mapping[str, jp.Restriction]
    torch_model: Callable[[], Any]
    masks: Callable[[Any, str], dict[str, Any]]
    losses: Callable[[Any, Any], Any]

    @property
    def heads(self) -> list[str]:
        return list(self.components)

    @property
    def reference(self) -> Any:
        return self.data[: self.setting.batch]

    def ours(self, estimator: Any, draws: int, seed: int) -> jp.Response:
        """χ as measured by the library."""
        import jax

        s = self.setting
        posterior = jp.localized_posterior(
            self.loss_fn, self.params, self.data, nbeta=s.nbeta, localization=s.localization
        )
        plan = jp.Plan(
            num_chains=s.chains, num_burnin=s.burnin, num_draws=draws, thin=s.thin,
            batch_size=s.batch,
        )  # fmt: skip
        return jp.susceptibilities(
            jax.random.key(seed), posterior, jp.sgld(step_size=s.step_size), plan,
            probes={"text": self.probes}, reference=self.reference, components=self.components,
            estimator=estimator, progress=False,
        )  # fmt: skip

    def theirs(self, draws: int, seed: int, folder: Path) -> stored.Theirs:
        """χ as devinterp measures it, in the order of our probes."""
        import torch
        import xarray
        from devinterp.slt.susceptibilities import susceptibilities

        stored.without_progress()
        model, s = self.torch_model(), self.setting
        base = folder / f"seed{seed}.zarr"

        def windows(tokens: Any) -> stored.Windows:
            return stored.Windows(torch.tensor(np.asarray(tokens), dtype=torch.long))

        with warnings.catch_warnings(action="ignore"):
            out = susceptibilities(
                model,
                windows(self.data),
                {"train": (windows(self.reference), 1), "probes": (windows(self.probes), 1)},
                {"full": None} | {head: self.masks(model, head) for head in self.heads},
                sampling_task="train",
                lr=s.step_size,
                n_beta=s.nbeta,
                localization=s.localization,
                num_chains=s.chains,
                num_draws=draws,
                num_burnin_steps=s.burnin,
                num_steps_bw_draws=s.thin,
                batch_size=s.batch,
                init_seed=1000 * (seed + 1),
                obs_seed=stored.ORDER_SEED,
                match_sampling_input_ids_across_chains=False,
                loss_fn=self.losses,
                output_path=base,
            )
            trees = {
                name: xarray.open_datatree(
                    folder / f"seed{seed}_{name}.zarr", engine="zarr", consolidated=False
                )
                for name in ("full", *self.heads)
            }
        order = stored.probe_order(len(self.probes))
        np.testing.assert_array_equal(
            trees["full"].dataset["input_ids_probes"].values, np.asarray(self.probes)[order]
        )
        sus = out["susceptibilities"].dataset["sus"]
        chi = sus.values.T.reshape(len(self.heads), len(self.probes), -1)
        written = sum(
            file.stat().st_size
            for name in trees
            for file in (folder / f"seed{seed}_{name}.zarr").rglob("*")
            if file.is_file()
        )
        return stored.Theirs(chi[:, np.argsort(order)], trees, written)


class Run(NamedTuple):
    """A result with CPU and wall seconds, and the peak of memory above where it started."""

    result: Any
    cpu: float
    wall: float
    memory: int


class Side(NamedTuple):
    """Two runs of one estimator, of which the first compiles, and the χ of each."""

    runs: list[Run]
    chi: list[np.ndarray]


def measured(function: Callable[[], Any]) -> Run:
    start = time.perf_counter()
    memory, (cpu, result) = measure.peak_memory(lambda: measure.cpu_seconds(function))
    return Run(result, cpu, time.perf_counter() - start, memory)


def noise(first: np.ndarray, second: np.ndarray) -> float:
    """The variance of one run, from two."""
    return float(np.mean((first - second) ** 2) / 2)


def compare(
    report: measure.Report,
    task: Task,
    draws: int,
    estimators: Mapping[str, tuple[Any, int]],
    truth_draws: int,
    **said: Any,
) -> None:
    """Rows of both sides and of the gains, the claims, and a figure.

    Args:
        report: where they go.
        task: what is measured.
        draws: of a chain, on devinterp's side.
        estimators: label → ours, and its draws; `"pathwise"` must be there.
        truth_draws: of the pathwise reference.
        said: more fields of the rows of the sides.
    """
    heads = task.heads
    with tempfile.TemporaryDirectory() as folder:
        runs = [measured(lambda s=seed: task.theirs(draws, s, Path(folder))) for seed in range(2)]
        theirs = [run.result for run in runs]
        curve = {
            n: noise(*(stored.truncated(t.trees, heads, n) for t in theirs))
            for n in sorted({max(2, draws // 8), max(2, draws // 4), max(2, draws // 2), draws})
        }
        stored.check_hybrid(report, theirs[0], heads)
        order = np.argsort(stored.probe_order(len(task.probes)))
        centred = [stored.covariance_of(t.trees, heads)[:, order] for t in theirs]
    share = len(heads) / (len(heads) + 1)
    without_full = [run._replace(cpu=share * run.cpu, wall=share * run.wall) for run in runs]
    sides = {
        "devinterp": Side(runs, [run.chi for run in theirs]),
        "devinterp, centred": Side(without_full, centred),
    }
    for label, (estimator, number) in estimators.items():
        ours = [
            measured(lambda s=seed, e=estimator, n=number: task.ours(e, n, s)) for seed in range(2)
        ]
        sides[label] = Side(ours, [np.asarray(run.result.chi["text"]) for run in ours])
    truth = task.ours(jp.pathwise(), truth_draws, 9)
    best, error = (np.asarray(x["text"]) for x in (truth.chi, truth.stderr))

    rows = {}
    for label, side in sides.items():
        first, second = side.runs
        cpu, compilation = second.cpu, first.cpu - second.cpu
        mse = float(np.mean([(chi - best) ** 2 - error**2 for chi in side.chi]))
        memory = first.memory
        written = theirs[0].written if label.startswith("devinterp") else 0
        rows[label] = {
            "cpu_seconds": cpu, "wall_seconds": second.wall, "compilation": compilation,
            "peak_memory": memory, "written": written, "noise": noise(*side.chi), "mse": mse,
        }  # fmt: skip
        report.add(
            f"{label:20s} {cpu:8.1f} CPU s (+ {compilation:.1f} the first time), "
            f"{memory / 2**20:6.0f} MiB, {written / 2**20:6.1f} MiB written; "
            f"noise {noise(*side.chi) ** 0.5:.2e}, rms against reference "
            f"{max(mse, 0.0) ** 0.5:.2e}, seeds correlate "
            f"{np.corrcoef(*(chi.ravel() for chi in side.chi))[0, 1]:.2f}",
            part="side", side=label, heads=len(heads), draws=draws,
            rms=float(np.sqrt(np.mean(best**2))), **said, **rows[label],
        )  # fmt: skip
    gains(report, rows)
    draw(report, rows, curve, task.setting, draws)


def gains(report: measure.Report, rows: Mapping[str, Mapping[str, float]]) -> None:
    """By how much less CPU time pathwise comes to the same error."""
    pathwise = rows["pathwise"]
    for label, row in rows.items():
        if label in ("pathwise", "covariance (hybrid)"):
            continue
        gain = {
            kind: row[kind] * row["cpu_seconds"] / (pathwise[kind] * pathwise["cpu_seconds"])
            for kind in ("noise", "mse")
        }
        report.add(
            f"pathwise over {label}: {gain['noise']:.1f} times less CPU time to the same noise, "
            f"{gain['mse']:.1f} against the reference"
            + (f" (claimed {CLAIMED:g})" if label == "devinterp, centred" else ""),
            part="gain", over=label, **gain,
        )  # fmt: skip
        if label == "devinterp, centred":
            least = min(gain.values())
            report.claim(
                f"{least:.1f} times less CPU time than devinterp >= {CLAIMED:g}", least >= CLAIMED
            )


def draw(
    report: measure.Report, rows: Mapping[str, Any], curve: Mapping[int, float], s: Setting,
    draws: int,
) -> None:  # fmt: skip
    """Noise against CPU seconds; every side's line falls as 1/√time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained", dpi=120)
    ax = figure.subplots()
    per_step = rows["devinterp"]["cpu_seconds"] / (s.burnin + s.thin * draws)
    times = [per_step * (s.burnin + s.thin * n) for n in curve]
    ax.plot(times, [v**0.5 for v in curve.values()], "s-", label="devinterp, first draws")
    for label, row in rows.items():
        (points,) = ax.plot(row["cpu_seconds"], row["noise"] ** 0.5, "o", label=label)
        times = row["cpu_seconds"] * np.array([0.1, 10])
        ax.plot(
            times, (row["noise"] * row["cpu_seconds"] / times) ** 0.5, ":", color=points.get_color()
        )
    ax.set(xscale="log", yscale="log", xlabel="CPU seconds", ylabel="standard error of χ, a token")
    ax.legend()
    figure.savefig(report.figure)
