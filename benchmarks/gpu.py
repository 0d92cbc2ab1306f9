"""On a GPU: model FLOPs utilisation, bfloat16, how many chains fit, and a response of paper size.

Nothing is claimed, and without a GPU nothing is run: the benchmark says so and exits with 0.

  utilisation  SGLD steps of 2, 4, 8, … chains × heads until memory is full, in float32 and in
               bfloat16; 6 FLOPs a parameter and token, over the peak of the device (--peak, in
               FLOP/s, where it is not in the list)
  response     the published model's shape (2 layers of 8 heads, d 256, context 1024, vocabulary
               5,000): χ of 16 heads to 100,000 tokens, pathwise, at random weights and tokens

    python benchmarks/gpu.py [--quick] [--out benchmarks/results]

writes one JSON line a row; seconds are those of the wall, compilation apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

import jaxpattern as jp
import measure
from jaxpattern.models import transformer

PAPER = transformer.TransformerConfig(
    vocab_size=5000, context=1024, num_layers=2, num_heads=8, d_model=256
)
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, dense


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--peak", type=float, default=None, help="FLOP/s of the device, bfloat16")
    options = parser.parse_args(argv)
    report = measure.Report("gpu", options)
    if jax.default_backend() != "gpu":
        report.add("skipped: jax sees no GPU", skipped=True)
        return 0
    kind = jax.devices()[0].device_kind
    peak = options.peak or next((x for name, x in PEAKS.items() if name in kind), None)
    for dtype in ("float32", "bfloat16"):
        utilisation(report, dataclasses.replace(PAPER, dtype=dtype), peak, options)
        response(report, dataclasses.replace(PAPER, dtype=dtype), options)
    return report.close()


def at_random(config: transformer.TransformerConfig, count: int) -> tuple[Any, jp.Posterior, Any]:
    """Weights, a posterior and tokens."""
    loss_fn = transformer.make_loss_fn(config)
    params = transformer.init(jax.random.key(0), config)
    shape = (count, config.context + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    posterior = jp.localized_posterior(loss_fn, params, tokens, nbeta=30.0, localization=300.0)
    return params, posterior, tokens


def wall_seconds(run: Any) -> float:
    """The second call; the first compiles."""
    jax.block_until_ready(run(0))
    start = time.perf_counter()
    jax.block_until_ready(run(1))
    return time.perf_counter() - start


def final_scale(params: Any) -> jax.Array:
    """The least that can be observed."""
    return params["final_norm"]["scale"]


def utilisation(
    report: measure.Report,
    config: transformer.TransformerConfig,
    peak: float | None,
    options: argparse.Namespace,
) -> None:
    """SGLD over all weights, with more and more chains."""
    params, posterior, _ = at_random(config, 256)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    steps, batch, chains = 20, 16, 2
    while chains <= (8 if options.quick else 1024):
        plan = jp.Plan(
            num_chains=chains, num_burnin=steps - 2, num_draws=2, thin=1, batch_size=batch,
            num_batches=2,
        )  # fmt: skip

        def run(seed: int, plan: jp.Plan = plan) -> Any:
            return jp.sample(
                jax.random.key(seed), posterior, jp.sgld(step_size=1e-3), plan, final_scale,
                progress=False,
            )  # fmt: skip

        try:
            seconds = wall_seconds(run)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            report.add(
                f"{config.dtype}: {chains} chains do not fit", dtype=config.dtype, full=chains
            )
            return
        flops = 6 * parameters * config.context * batch * steps * chains / seconds
        report.add(
            f"{config.dtype:9s} {chains:5d} chains: {flops / 1e12:8.2f} TFLOP/s"
            + (f", {flops / peak:.1%} of the bfloat16 peak" if peak else ""),
            part="utilisation", dtype=config.dtype, chains=chains, flops=flops, peak=peak,
            seconds=seconds,
        )  # fmt: skip
        chains *= 2


def response(
    report: measure.Report, config: transformer.TransformerConfig, options: argparse.Namespace
) -> None:
    """χ of every head to 100,000 tokens."""
    params, posterior, tokens = at_random(config, 256)
    count = 8 if options.quick else 98
    plan = jp.Plan(
        num_chains=4, num_burnin=42, num_draws=20, thin=6, batch_size=16, num_batches=2, chunk=8
    )

    def run(seed: int) -> Any:
        return jp.susceptibilities(
            jax.random.key(seed), posterior, jp.sgld(step_size=1e-3), plan,
            probes={"text": tokens[:count]}, components=jp.components(params, kinds="head"),
            estimator=jp.pathwise(), progress=False,
        ).chi  # fmt: skip

    seconds = wall_seconds(run)
    report.add(
        f"{config.dtype:9s} χ of 16 heads to {count * config.context} tokens: {seconds:.1f} s",
        part="response", dtype=config.dtype, tokens=count * config.context, seconds=seconds,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
