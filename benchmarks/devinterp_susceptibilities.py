"""χ of a language model, against devinterp 2.0.1: the same posterior, weights, text and machine.

Claimed: to the same per-token error of the heads' χ, the pathwise estimator needs at least 50 times
less CPU time than devinterp, at nβ = 30, γ = 300, ε = 1e-3, mini-batches of 16, four chains. The
claim is held against the covariance of devinterp's draws, without its chains over all weights. The
form it publishes adds −E[φ](E[D] − E_full[D]), D = ℓ_z − L, which is most of it here, where all
weights together move the losses far more than a head does, and φ has the level of other data in it.

A GPT-2-shaped transformer is trained on library code and carried over to torch, where logits and
losses agree to 1e-5, or to the rounding of float32 where that is more. Then

  (a) the same estimator on as many draws, ours (hybrid form) and theirs: CPU seconds, seconds,
      peak memory above what is loaded, bytes written;
  (b) the error of χ against CPU seconds, for devinterp, our covariance (centred) and pathwise.
      The error is half the mean squared difference of two seeds: noise alone, so that the hybrid
      form is not blamed for its other estimand. Beside it stands the mean squared error against one
      long pathwise reference. Errors fall as 1/√time: the gain is the ratio of error² × time, of
      the second run of each, which neither compiles nor imports;
  (c) the hybrid form on devinterp's own stored losses, through our moments, equals its χ to
      rounding.

    python benchmarks/devinterp_susceptibilities.py [--quick] [--large] [--out benchmarks/results]

writes one JSON line a row and a figure, and exits with 1 when a claim fails. `--large` takes four
layers of width 128. Needs the bench extra.
"""

from __future__ import annotations

import functools
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpattern as jp
import language_model
import measure
from jaxpattern import moments

NBETA, LOCALIZATION, STEP_SIZE, BATCH, THIN, BURNIN, CHAINS = 30.0, 300.0, 1e-3, 16, 6, 72, 4
CLAIMED = 50.0
ORDER_SEED = 1337


class Theirs(NamedTuple):
    """What devinterp returns and what it stored: χ [heads, B, T] and one tree a restriction."""

    chi: np.ndarray
    trees: dict[str, Any]
    written: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--large", action="store_true", help="four layers of width 128")
    parser.add_argument("--steps", type=int, default=None, help="training steps")
    parser.add_argument("--draws", type=int, default=None, help="draws of a chain")
    parser.add_argument("--heads", nargs="+", default=None, help="some heads instead of all")
    options = parser.parse_args(argv)
    import torch_model

    config = language_model.LARGE if options.large else language_model.GPT2
    name = "devinterp_susceptibilities" + ("_large" if options.large else "")
    report = measure.Report(name, options)
    steps = options.steps or (300 if options.quick else 1000)
    model = language_model.trained_model(config, steps, num_probes=2 * BATCH)
    logits, losses = torch_model.check_port(model.loss_fn, model.params, model.probes)
    report.add(
        f"ported: logits differ by {logits:.1e}, losses by {losses:.1e}",
        part="port", logits=logits, losses=losses,
    )  # fmt: skip
    every = list(jp.components(model.params, kinds="head"))
    heads = options.heads or (["l1h0"] if options.quick else every)
    if unknown := set(heads) - set(every):
        parser.error(f"--heads: no {', '.join(sorted(unknown))} among {', '.join(every)}")
    draws = options.draws or (30 if options.quick else 100)
    task = Task(model, heads)

    # (a) and (b): two seeds a side.
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            measured(lambda s=seed: task.devinterp(draws, s, Path(folder))) for seed in range(2)
        ]
        theirs = [run.result for run in runs]
        curve = {
            n: noise(*(truncated(t.trees, heads, n) for t in theirs))
            for n in sorted({max(2, draws // 8), draws // 4, draws // 2, draws})
        }
        check_hybrid(report, theirs[0], heads)
        order = np.argsort(probe_order(BATCH))
        centred = [covariance_of(t.trees, heads)[:, order] for t in theirs]
    share = len(heads) / (len(heads) + 1)
    without_full = [run._replace(cpu=share * run.cpu, wall=share * run.wall) for run in runs]
    sides = {
        "devinterp": Side(runs, [run.chi for run in theirs]),
        "devinterp, centred": Side(without_full, centred),
    }
    for label, estimator, num_draws in (
        ("covariance (hybrid)", jp.covariance(form="hybrid"), draws),
        ("covariance", jp.covariance(), draws),
        ("pathwise", jp.pathwise(), max(10, draws // 5)),
    ):
        ours = [
            measured(lambda s=seed, e=estimator, n=num_draws: task.jaxpattern(e, n, s))
            for seed in range(2)
        ]
        sides[label] = Side(ours, [np.asarray(run.result.chi["text"]) for run in ours])
    truth = task.jaxpattern(jp.pathwise(), 2 * draws if options.quick else draws, 9)
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
            part="side", side=label, heads=len(heads), of_heads=len(every), draws=draws,
            rms=float(np.sqrt(np.mean(best**2))), **rows[label],
        )  # fmt: skip
    pathwise = rows["pathwise"]
    for label in ("devinterp", "devinterp, centred", "covariance"):
        gains = {
            measure_of: rows[label][measure_of] * rows[label]["cpu_seconds"]
            / (pathwise[measure_of] * pathwise["cpu_seconds"])
            for measure_of in ("noise", "mse")
        }  # fmt: skip
        report.add(
            f"pathwise over {label}: {gains['noise']:.1f} times less CPU time to the same noise, "
            f"{gains['mse']:.1f} against the reference"
            + (f" (claimed {CLAIMED:g})" if label == "devinterp, centred" else ""),
            part="gain", over=label, **gains,
        )  # fmt: skip
        if label == "devinterp, centred":
            gain = min(gains.values())
            report.claim(
                f"{gain:.1f} times less CPU time than devinterp >= {CLAIMED:g}", gain >= CLAIMED
            )
    draw(report, rows, curve, draws)
    return report.close()


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


def measured(function: Any) -> Run:
    start = time.perf_counter()
    memory, (cpu, result) = measure.peak_memory(lambda: measure.cpu_seconds(function))
    return Run(result, cpu, time.perf_counter() - start, memory)


def noise(first: np.ndarray, second: np.ndarray) -> float:
    """The variance of one run, from two."""
    return float(np.mean((first - second) ** 2) / 2)


class Task:
    """χ of some heads to the tokens of held-out windows, L from other such windows."""

    def __init__(self, model: language_model.Trained, heads: Sequence[str]) -> None:
        self.model, self.heads = model, list(heads)
        self.probes, self.reference = model.probes[:BATCH], model.data[:BATCH]
        self.posterior = jp.localized_posterior(
            model.loss_fn, model.params, model.data, nbeta=NBETA, localization=LOCALIZATION
        )
        every = jp.components(model.params, kinds="head")
        self.components = {name: every[name] for name in heads}

    def jaxpattern(self, estimator: Any, draws: int, seed: int) -> jp.Response:
        """χ as measured by the library."""
        plan = jp.Plan(
            num_chains=CHAINS, num_burnin=BURNIN, num_draws=draws, thin=THIN, batch_size=BATCH
        )
        return jp.susceptibilities(
            jax.random.key(seed), self.posterior, jp.sgld(step_size=STEP_SIZE), plan,
            probes={"text": self.probes}, reference=self.reference, components=self.components,
            estimator=estimator, progress=False,
        )  # fmt: skip

    def devinterp(self, draws: int, seed: int, folder: Path) -> Theirs:
        """χ as devinterp measures it, in the order of our probes."""
        import torch
        import xarray
        from devinterp.slt.susceptibilities import susceptibilities

        import torch_model

        without_progress()
        model = torch_model.to_torch(self.model.params, self.model.loss_fn.config)
        base = folder / f"seed{seed}.zarr"
        with warnings.catch_warnings(action="ignore"):
            out = susceptibilities(
                model,
                Windows(torch.tensor(np.asarray(self.model.data), dtype=torch.long)),
                {
                    name: (Windows(torch.tensor(np.asarray(tokens), dtype=torch.long)), 1)
                    for name, tokens in (("train", self.reference), ("probes", self.probes))
                },
                {"full": None} | {head: torch_model.head_masks(model, head) for head in self.heads},
                sampling_task="train",
                lr=STEP_SIZE,
                n_beta=NBETA,
                localization=LOCALIZATION,
                num_chains=CHAINS,
                num_draws=draws,
                num_burnin_steps=BURNIN,
                num_steps_bw_draws=THIN,
                batch_size=BATCH,
                init_seed=1000 * (seed + 1),
                obs_seed=ORDER_SEED,
                match_sampling_input_ids_across_chains=False,
                loss_fn=torch_model.losses,
                output_path=base,
            )
            trees = {
                name: xarray.open_datatree(
                    folder / f"seed{seed}_{name}.zarr", engine="zarr", consolidated=False
                )
                for name in ("full", *self.heads)
            }
        order = probe_order(len(self.probes))
        stored = trees["full"].dataset["input_ids_probes"].values
        np.testing.assert_array_equal(stored, np.asarray(self.probes)[order])
        sus = out["susceptibilities"].dataset["sus"]
        chi = sus.values.T.reshape(len(self.heads), len(self.probes), -1)
        written = sum(
            file.stat().st_size
            for name in trees
            for file in (folder / f"seed{seed}_{name}.zarr").rglob("*")
            if file.is_file()
        )
        return Theirs(chi[:, np.argsort(order)], trees, written)


def without_progress() -> None:
    """devinterp draws a progress bar a chain, which no argument turns off."""
    from devinterp.slt import sampler

    sampler.trange = functools.partial(sampler.trange, disable=True)


class Windows:
    """Windows of tokens, as devinterp takes a data set."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index]}


def probe_order(count: int) -> list[int]:
    """The order in which devinterp keeps the windows of an observable."""
    return random.Random(ORDER_SEED).sample(range(count), count)


def published_hybrid(
    phi: np.ndarray, reference: np.ndarray, probes: np.ndarray, full: np.ndarray
) -> np.ndarray:
    """χ of devinterp's formula, in the precision of its arguments.

    E[φ L] − E[φ ℓ_z] − E[φ] E_full[L − ℓ_z] of draws φ, L [n], ℓ [n, *columns] of a component, and
    `full`, the mean of L − ℓ_z over draws of all weights.
    """
    axes = (slice(None), *(None,) * (probes.ndim - 1))
    return (phi * reference).mean() - (phi[axes] * probes).mean(0) - phi.mean() * full


def hybrid_from_moments(
    phi: np.ndarray, reference: np.ndarray, probes: np.ndarray, full: np.ndarray
) -> jax.Array:
    """The same χ through our streamed moments: −(Cov[φ, D] + E[φ] (E[D] − E_full[D]))."""
    shape = (slice(None), *(None,) * (probes.ndim - 1))
    deviations = jnp.asarray(probes - reference[shape])

    @jax.jit
    def stream(phi: jax.Array, deviations: jax.Array) -> moments.Moments:
        empty = moments.init(phi[0, None], deviations[0])
        return jax.lax.fori_loop(
            0, len(phi), lambda t, m: moments.update(m, phi[t, None], deviations[t]), empty
        )

    m = stream(jnp.asarray(phi), deviations)
    return -(m.comoment[0] / m.weight + m.mean_a[0] * (m.mean_b + jnp.asarray(full)))


def stored(tree: Any, draws: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """φ, L [n] and ℓ [n, B, T] of the draws of all chains that devinterp stored."""
    data = tree.dataset
    reference = data["loss_train"].values[:, :draws].mean(axis=(-2, -1)).reshape(-1)
    probes = data["loss_probes"].values[:, :draws]
    return (
        reference - data["init_loss"].values.mean(),
        reference,
        probes.reshape(-1, *probes.shape[2:]),
    )


def truncated(trees: dict[str, Any], heads: Sequence[str], draws: int) -> np.ndarray:
    """devinterp's χ from the first draws of every chain, in float64."""
    _, full_reference, full_probes = stored(trees["full"], draws)
    full = full_reference.astype(float).mean() - full_probes.astype(float).mean(0)
    return np.stack(
        [
            published_hybrid(*(x.astype(float) for x in stored(trees[head], draws)), full)
            for head in heads
        ]
    )


def covariance_of(trees: dict[str, Any], heads: Sequence[str]) -> np.ndarray:
    """−Cov[φ, ℓ_z − L] of the draws that devinterp stored, in float64."""
    chi = []
    for head in heads:
        phi, reference, probes = (x.astype(float) for x in stored(trees[head]))
        deviations = probes - reference[:, None, None]
        product = np.tensordot(phi - phi.mean(), deviations - deviations.mean(0), 1)
        chi.append(-product / (len(phi) - 1))
    return np.stack(chi)


def check_hybrid(report: measure.Report, theirs: Theirs, heads: Sequence[str]) -> None:
    """(c): our moments on devinterp's stored losses."""
    order = np.argsort(probe_order(theirs.chi.shape[1]))
    exact = truncated(theirs.trees, heads, theirs.trees["full"].dataset.sizes["draw"])[:, order]
    _, reference, probes = stored(theirs.trees["full"])
    full = (reference.astype(float).mean() - probes.astype(float).mean(0)).astype(np.float32)
    ours = np.stack(
        [np.asarray(hybrid_from_moments(*stored(theirs.trees[h]), full))[order] for h in heads]
    )
    size = float(np.abs(exact).max())
    errors = {
        "ours": float(np.abs(ours - exact).max()),
        "theirs": float(np.abs(theirs.chi - exact).max()),
    }
    report.add(
        f"hybrid form on identical draws, |χ| <= {size:.1e}: ours is off the float64 value by "
        f"{errors['ours']:.1e}, devinterp (float32) by {errors['theirs']:.1e}",
        part="hybrid", size=size, **errors,
    )  # fmt: skip
    # A float32 mean of losses of about 5 nats times φ.
    rounding = 8 * float(np.finfo(np.float32).eps) * float(np.abs(probes).max())
    report.claim(
        f"hybrid form equals devinterp's to rounding: {errors} <= {rounding:.1e}",
        max(errors.values()) <= rounding,
    )


def draw(report: measure.Report, rows: dict, curve: dict[int, float], draws: int) -> None:
    """Noise against CPU seconds; every side's line falls as 1/√time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained", dpi=120)
    ax = figure.subplots()
    if curve:
        per_step = rows["devinterp"]["cpu_seconds"] / (BURNIN + THIN * draws)
        times = [per_step * (BURNIN + THIN * n) for n in curve]
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


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
