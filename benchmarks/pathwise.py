"""Pathwise against covariance: error for compute, on a trained language model and real text.

Claimed, at nβ = 30, γ = 300, ε = 1e-3, for the per-token χ of the excess loss:
  * restricted to a head: at least 20 times less compute at equal error;
  * all weights, mini-batches of 16: at least 50 times less;
  * a pathwise step costs at most 4 bare gradients of the same mini-batch.

Both estimators run in this process on the same posterior. Each is compared with one long pathwise
reference; its mean squared error over the columns, less the reference's own, times its compute is
what it would take to bring the error to a given size (errors fall as 1/√compute). The ratio is
given for gradient equivalents and for seconds without compilation. That the reference is right is
checked, too: the covariance estimates must scatter around it as their own standard errors say.

    python benchmarks/pathwise.py [--quick] [--beyond] [--layers 2] [--out benchmarks/results]

writes one JSON line a setting and exits with 1 when a claim fails. `--beyond` adds settings in
which the gain is expected to shrink; nothing is claimed of them. `combined` is the mean squared
error of the best linear combination of both estimators over that of pathwise alone, its weight
fitted to the very errors it is judged by: a lower bound of what any combination leaves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpattern as jp
import language_model

BATCH = 16

# name, head or None for all weights, nβ, γ, ε, least gain claimed
CLAIMED: list[tuple[str, str | None, float, float, float, float]] = [
    ("head l1h0", "l1h0", 30.0, 300.0, 1e-3, 20.0),
    ("head l0h2", "l0h2", 30.0, 300.0, 1e-3, 20.0),
    ("all weights", None, 30.0, 300.0, 1e-3, 50.0),
]
BEYOND: list[tuple[str, str | None, float, float, float, float]] = [
    ("head l1h0, γ = 50", "l1h0", 30.0, 50.0, 6e-3, 0.0),
    ("head l1h0, γ = 10", "l1h0", 30.0, 10.0, 6e-3, 0.0),
    ("head l1h0, nβ = 300", "l1h0", 300.0, 300.0, 5e-4, 0.0),
    ("head l1h0, nβ = 1000", "l1h0", 1000.0, 300.0, 2e-4, 0.0),
    ("all weights, γ = 100", None, 30.0, 100.0, 1e-3, 0.0),
    ("all weights, nβ = 100", None, 100.0, 300.0, 3e-4, 0.0),
]


def head(name: str) -> jp.Restriction:
    """The weights of one attention head, such as l1h0."""
    layer, index = name[1:].split("h")
    return jp.by_slice({f"layers/{layer}/attn/{w}": (0, int(index)) for w in "qkvo"})


def measure(
    setting: tuple, loss_fn: Any, params: Any, data: jax.Array, probes: jax.Array, scale: int
) -> dict:
    """One row of the table."""
    name, where, nbeta, localization, step_size, claimed = setting
    posterior = jp.localized_posterior(
        loss_fn, params, data, nbeta=nbeta, localization=localization
    )
    if where is not None:
        posterior = jp.restrict(posterior, head(where))
    sampler = jp.sgld(step_size=step_size)
    relaxation = 2 / (step_size * localization)
    thin = 3 * max(1, round(relaxation * 0.3))
    phi = jp.excess_loss(loss_fn, probes, params)

    def runner(estimator: Any, num_draws: int, num_chains: int) -> Callable[[int], jp.Response]:
        plan = jp.Plan(
            num_chains=num_chains, num_burnin=10 * thin, num_draws=num_draws, thin=thin,
            batch_size=BATCH, num_batches=5,
        )  # fmt: skip
        return lambda seed: jp.susceptibilities(
            jax.random.key(seed), posterior, sampler, plan, observables={"L": phi},
            probes={"text": probes}, reference=probes, estimator=estimator, progress=False,
        )  # fmt: skip

    truth = runner(jp.pathwise(), 80 * scale, 8)(0)
    best, error = np.asarray(truth.chi["text"][0]), np.asarray(truth.stderr["text"][0])
    row: dict[str, Any] = {
        "setting": name, "nbeta": nbeta, "localization": localization, "step_size": step_size,
        "thin": thin, "batch_size": BATCH, "columns": best.size, "claimed": claimed,
        "reference": {"estimator": truth.estimator, "rms": float(np.sqrt(np.mean(best**2))),
                      "stderr": float(np.sqrt(np.mean(error**2))),
                      "growth": float(truth.diagnostics["growth"].max()),
                      "tail": float(truth.diagnostics["tail"][0, -1]),
                      "truncated": float(truth.diagnostics["truncated"].max())},
    }  # fmt: skip
    misses: dict[str, np.ndarray] = {}
    draws = {"covariance": 100 * scale, "pathwise": 20 * scale}
    for label, estimator in (("covariance", jp.covariance()), ("pathwise", jp.pathwise())):
        run = runner(estimator, draws[label], 4)
        responses = [run(1)]
        start = time.perf_counter()
        responses.append(jax.block_until_ready(run(2)))
        seconds = time.perf_counter() - start
        chis = [np.asarray(response.chi["text"][0]) for response in responses]
        misses[label] = np.stack([chi - best for chi in chis]).ravel()
        errors = [np.asarray(response.stderr["text"][0]) for response in responses]
        row[label] = {
            "mse": float(np.mean([np.mean((chi - best) ** 2 - error**2) for chi in chis])),
            "reported": float(np.mean([np.mean(e**2) for e in errors])),
            "seed_correlation": float(np.corrcoef([chi.ravel() for chi in chis])[0, 1]),
            "cost": responses[1].cost, "seconds": seconds, "rhat": float(responses[1].rhat[0]),
        }  # fmt: skip
    for unit in ("cost", "seconds"):
        row[f"gain_{unit}"] = (row["covariance"]["mse"] * row["covariance"][unit]) / (
            row["pathwise"]["mse"] * row["pathwise"][unit]
        )
    # What the best linear combination of both, on the same chains, could save of the variance.
    a, b = misses["covariance"], misses["pathwise"]
    spread = np.mean((a - b) ** 2)
    best_share = np.clip(np.mean(b * (b - a)) / spread, 0, 1)
    row["combined"] = float(np.mean((b + best_share * (a - b)) ** 2) / np.mean(b**2))
    row["consistent"] = row["covariance"]["mse"] / row["covariance"]["reported"]
    steps = (10 + draws["pathwise"]) * thin
    row["step"] = row["pathwise"]["seconds"] / step_seconds(posterior, None, steps, thin // 2)
    row["floor"] = row["pathwise"]["seconds"] / step_seconds(posterior, probes, steps, thin // 2)
    return row


def step_seconds(
    posterior: jp.Posterior, probes: jax.Array | None, num_steps: int, every: int
) -> float:
    """Seconds of so many mini-batch gradients in each of four chains, and with probes also of a
    Hessian-vector product of a quarter of each mini-batch and a jvp of the probes every few steps:
    what a pathwise step cannot do without."""

    def gradient(w: Any, batch: Any) -> Any:
        return posterior.loss_gradient(w, batch)

    @jax.jit
    def run(key: jax.Array) -> Any:
        def chain(key: jax.Array) -> Any:
            def step(t: jax.Array, carry: Any) -> Any:
                w, v = carry
                batch = posterior.minibatch(jax.random.fold_in(key, t), BATCH)
                w = jax.tree.map(lambda x, g: x - 1e-9 * g, w, gradient(w, batch))
                if probes is not None:
                    part = jax.tree.map(lambda x: x[: BATCH // 4], batch)
                    product = jax.jvp(lambda w: gradient(w, part), (w,), (v,))[1]
                    v = jax.tree.map(lambda x, h: x - 1e-9 * h, v, product)
                return w, v

            def block(i: jax.Array, carry: Any) -> Any:
                w, v, total = carry
                w, v = jax.lax.fori_loop(every * i, every * (i + 1), step, (w, v))
                if probes is not None:
                    total = total + jax.jvp(lambda w: posterior.losses(w, probes), (w,), (v,))[1]
                return w, v, total

            shape = (1,) if probes is None else (probes.shape[0], probes.shape[1] - 1)
            start = (posterior.center, posterior.center, jnp.zeros(shape))
            return jax.lax.fori_loop(0, num_steps // every, block, start)

        return jax.vmap(chain)(jax.random.split(key, 4))

    jax.block_until_ready(run(jax.random.key(0)))
    start = time.perf_counter()
    jax.block_until_ready(run(jax.random.key(1)))
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the draws")
    parser.add_argument("--beyond", action="store_true", help="settings without a claim, too")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    config = dataclasses.replace(language_model.PATHWISE, num_layers=options.layers)
    loss_fn, params, data, probes = language_model.trained_model(config, 800, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with open(options.out / f"pathwise-{options.layers}-layers.jsonl", "w") as rows:
        for setting in CLAIMED + (BEYOND if options.beyond else []):
            row = measure(setting, loss_fn, params, data, probes, 1 if options.quick else 4)
            row |= {
                "layers": options.layers,
                "machine": platform.processor() or platform.machine(),
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
                "seed": options.seed,
                "draws": "quick" if options.quick else "full",
            }
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            print(
                f"{row['setting']:24s} gain {row['gain_cost']:7.1f} in gradients, "
                f"{row['gain_seconds']:7.1f} in seconds (claimed {row['claimed']:g}); "
                f"step {row['step']:.2f} gradients, {row['floor']:.2f} of its floor; "
                f"combined/pathwise mse {row['combined']:.3f}; "
                f"covariance mse/reported {row['consistent']:.2f}, "
                f"growth {row['reference']['growth']:.2f}, tail {row['reference']['tail']:.1e}",
                flush=True,
            )
            if row["claimed"]:
                gain = min(row["gain_cost"], row["gain_seconds"])
                if gain < row["claimed"]:
                    failed.append(f"{row['setting']}: gain {gain:.1f} < {row['claimed']:g}")
                if row["step"] > 4:
                    failed.append(f"{row['setting']}: a step costs {row['step']:.2f} gradients")
    print("\n".join(failed) if failed else "all claims met")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
