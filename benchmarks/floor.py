"""The floor: what each part of the library costs over the bare computation it cannot do without.

Claimed, for a GPT-2-shaped language model (2 layers, d 64, vocabulary 512, context 64):
  * an SGLD step costs at most 1.1 times a bare jitted forward and backward pass of its mini-batch;
  * a draw of the covariance estimator at most 1.1 times bare forward passes of its probes.
The first is missed by a little: 1.12, and 1.07 for four chains one at a time, in the run that
`docs/benchmarks.md` tells of. The library adds 0.03 to a bare loop that draws the same noise; the
rest is the noise, 168,256 normals of `jax.random` per step at 7 ns each.

Beside them, without a claim: four chains at once; a pathwise step against the gradient, the
Hessian-vector product and the jvp of the probes that it needs; a moment update against reading and
writing its memory; the inversion of 64 rows and 10⁶ columns against one product of that size.

The bare side is plain jax with the same loss; only the library's public functions stand on the
other. CPU seconds on one core, both sides in turn, medians. What a step costs is the difference
between a long and a short run, so that neither compilation nor the start of a run is in it.

    python benchmarks/floor.py [--quick] [--out benchmarks/results]

writes one JSON line a row and a figure, and exits with 1 when a claim fails.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm

import jaxpattern as jp
import language_model
import measure
from jaxpattern import moments

BATCH = 16
CLAIMED = 1.1
TOGETHER = "activations of four chains at once outgrow the cache of one core"
NOISE = "one normal a weight, drawn by jax.random, on the bare side too"
SWEEP = "gradient of 16, product of 4, and a gradient and a jvp of 64 probes every 4 steps"
MEMORY = "its memory read and written; a product of the deviations of each row besides"
PRODUCT = "one product χ χᵀ; rows weighted, noise, weights, shifts and checks are passes more"


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps or draws in a call")
    parser.add_argument("--columns", type=int, default=10**6, help="columns of the inversion")
    options = parser.parse_args(argv)
    report = measure.Report("floor", options)
    repeats = 3 if options.quick else 9
    model = language_model.trained_model(language_model.GPT2, 20, num_probes=64)
    for name, claimed, sides, why in (
        ("SGLD step, one chain", CLAIMED, partial(sgld_step, model, 1, None), ""),
        ("the same, bare with noise", None, partial(sgld_step, model, 1, None, noise=True), NOISE),
        ("SGLD step, four chains", None, partial(sgld_step, model, 4, None), TOGETHER),
        ("the same, chains_at_once=1", CLAIMED, partial(sgld_step, model, 4, 1), ""),
        ("covariance draw, one chain", CLAIMED, partial(covariance_draw, model, 1, None), ""),
        ("covariance draw, four chains", None, partial(covariance_draw, model, 4, None), TOGETHER),
        ("the same, chunk=16", CLAIMED, partial(covariance_draw, model, 4, 16), ""),
        ("pathwise step, a head", None, partial(pathwise_step, model), SWEEP),
        ("moments, 16 rows of 65,536", None, partial(moment_update, 16, 65_536), MEMORY),
        ("inversion, 64 rows", None, partial(inversion, 64, options.columns), PRODUCT),
    ):
        short, long = options.steps, 3 * options.steps
        runs = {(side, n): run for n in (short, long) for side, run in sides(n).items()}
        timing = measure.in_turn(runs, repeats)
        ours, bare = (
            [b - a for a, b in zip(timing[side, short].all, timing[side, long].all, strict=True)]
            for side in ("jaxpattern", "bare")
        )
        ratio = statistics.median(ours) / statistics.median(bare)
        each = 1e3 * statistics.median(ours) / (long - short)
        bare_each = 1e3 * statistics.median(bare) / (long - short)
        report.add(
            f"{name:30s} {each:8.2f} ms, bare {bare_each:8.2f} ms: {ratio:5.2f} times"
            + (f" (claimed {claimed:g})" if claimed else f" ({why})"),
            part=name, claimed=claimed, ratio=ratio, why=why, cpu_ms=each, bare_cpu_ms=bare_each,
            start_ms=1e3 * timing["jaxpattern", short].seconds - each * short,
            compilation=timing["jaxpattern", long].compilation,
            bare_compilation=timing["bare", long].compilation,
        )  # fmt: skip
        if claimed:
            report.claim(f"{name}: {ratio:.2f} <= {claimed:g}", ratio <= claimed)
    draw(report)
    return report.close()


Sides = dict[str, Callable[[], Any]]


def bare_steps(model: language_model.Trained, num_chains: int, num_steps: int, noise: bool) -> Any:
    """Forward and backward passes of a mini-batch of each chain, one after the other."""

    def move(w: jax.Array, g: jax.Array, key: jax.Array) -> jax.Array:
        w = w - 1e-9 * g
        return w + 1e-9 * jax.random.normal(key, w.shape) if noise else w

    @jax.jit
    def run(params: Any, batch: jax.Array) -> Any:
        gradient = jax.grad(lambda w, x: jnp.mean(model.loss_fn(w, x)))

        def step(i: jax.Array, w: Any) -> Any:
            treedef = jax.tree.structure(w)
            keys = jax.random.split(jax.random.key(i), treedef.num_leaves)
            return jax.tree.map(move, w, gradient(w, batch), treedef.unflatten(keys))

        return jax.lax.fori_loop(0, num_chains * num_steps, step, params)

    return lambda: run(model.params, model.data[:BATCH])


def final_scale(params: Any) -> jax.Array:
    """The least that can be observed."""
    return params["final_norm"]["scale"]


def sgld_step(
    model: language_model.Trained,
    num_chains: int,
    at_once: int | None,
    num_steps: int,
    noise: bool = False,
) -> Sides:
    """Chains of SGLD, of which next to nothing is observed."""
    posterior = jp.localized_posterior(
        model.loss_fn, model.params, model.data, nbeta=30.0, localization=300.0
    )
    plan = jp.Plan(
        num_chains=num_chains, num_burnin=num_steps - 2, num_draws=2, thin=1, num_batches=2,
        batch_size=BATCH, chains_at_once=at_once,
    )  # fmt: skip

    def ours() -> Any:
        return jp.sample(
            jax.random.key(0), posterior, jp.sgld(step_size=1e-3), plan,
            final_scale, progress=False,
        )  # fmt: skip

    return {"jaxpattern": ours, "bare": bare_steps(model, num_chains, num_steps, noise)}


def stand_still(posterior: Any) -> SamplingAlgorithm:
    """A sampler that costs nothing."""

    def step(key: jax.Array, position: Any, minibatch: Any) -> Any:
        return jax.tree.map(lambda x: x * (1 - 1e-6), position)

    return SamplingAlgorithm(lambda position, key: position, step)


def covariance_draw(
    model: language_model.Trained, num_chains: int, chunk: int | None, num_draws: int
) -> Sides:
    """Draws of a sampler that stands still."""
    posterior = jp.localized_posterior(
        model.loss_fn, model.params, model.data, nbeta=30.0, localization=300.0
    )
    plan = jp.Plan(
        num_chains=num_chains, num_burnin=0, num_draws=num_draws, thin=1, batch_size=1,
        chunk=chunk,
    )  # fmt: skip

    def ours() -> Any:
        return jp.susceptibilities(
            jax.random.key(0), posterior, stand_still, plan, probes={"text": model.probes},
            reference=model.probes, components={"all": jp.by_path("*")}, estimator=jp.covariance(),
            progress=False,
        ).chi  # fmt: skip

    @jax.jit
    def run(params: Any, probes: jax.Array) -> Any:
        def draw(i: jax.Array, carry: Any) -> Any:
            w, total = carry
            w = jax.tree.map(lambda x: x * (1 - 1e-6), w)
            return w, total + model.loss_fn(w, probes)

        zero = jnp.zeros((probes.shape[0], probes.shape[1] - 1))
        return jax.lax.fori_loop(0, num_chains * num_draws, draw, (params, zero))

    return {"jaxpattern": ours, "bare": lambda: run(model.params, model.probes)}


def pathwise_step(model: language_model.Trained, num_steps: int) -> Sides:
    """A pathwise run of one head, and the passes that its sweeps are made of."""
    posterior = jp.localized_posterior(
        model.loss_fn, model.params, model.data, nbeta=30.0, localization=300.0
    )
    components = {"l1h0": jp.components(model.params, kinds="head")["l1h0"]}
    every, num_chains = 4, 2
    plan = jp.Plan(
        num_chains=num_chains, num_burnin=0, num_draws=num_steps // every, thin=every,
        batch_size=BATCH, num_batches=2,
    )  # fmt: skip

    def ours() -> Any:
        return jp.susceptibilities(
            jax.random.key(0), posterior, jp.sgld(step_size=1e-3), plan,
            probes={"text": model.probes}, reference=model.probes, components=components,
            estimator=jp.pathwise(window=every, every=every), progress=False,
        ).chi  # fmt: skip

    head = components["l1h0"]

    @jax.jit
    def run(params: Any, data: jax.Array, probes: jax.Array) -> Any:
        def losses(v: Any, batch: jax.Array) -> jax.Array:
            return model.loss_fn(head.embed(v, params), batch)

        gradient = jax.grad(lambda v, batch: jnp.mean(losses(v, batch)))

        def step(i: jax.Array, carry: Any) -> Any:
            v, adjoint = carry
            v = jax.tree.map(lambda x, g: x - 1e-9 * g, v, gradient(v, data))
            part = data[: BATCH // 4]
            product = jax.jvp(lambda v: gradient(v, part), (v,), (adjoint,))[1]
            return v, jax.tree.map(lambda x, h: x - 1e-9 * h, adjoint, product)

        def block(i: jax.Array, carry: Any) -> Any:
            # A draw: ∂φ of the probes; then the steps, and the jvp of the probes.
            v, adjoint, total = carry
            source = gradient(v, probes)
            adjoint = jax.tree.map(jnp.add, adjoint, source)
            v, adjoint = jax.lax.fori_loop(0, every, step, (v, adjoint))
            return v, adjoint, total + jax.jvp(lambda v: losses(v, probes), (v,), (adjoint,))[1]

        v = head.select(params)
        zero = jnp.zeros((probes.shape[0], probes.shape[1] - 1))
        carry = (v, jax.tree.map(jnp.zeros_like, v), zero)
        return jax.lax.fori_loop(0, num_chains * num_steps // every, block, carry)

    return {
        "jaxpattern": ours,
        "bare": lambda: run(model.params, model.data[:BATCH], model.probes),
    }


def moment_update(num_rows: int, num_columns: int, num_draws: int) -> Sides:
    """Streamed co-moments, and a loop that only reads and writes as many numbers."""
    num_draws *= 100
    a, b = jnp.arange(num_rows, dtype=float), jnp.arange(num_columns, dtype=float)

    @jax.jit
    def ours(a: jax.Array, b: jax.Array) -> Any:
        return jax.lax.fori_loop(
            0, num_draws, lambda i, m: moments.update(m, a + i, b * i), moments.init(a, b)
        )

    @jax.jit
    def bare(a: jax.Array, b: jax.Array) -> Any:
        zero = jnp.zeros((num_rows + 1, num_columns))
        return jax.lax.fori_loop(0, num_draws, lambda i, x: x * 0.5 + i, zero)

    return {"jaxpattern": partial(ours, a, b), "bare": partial(bare, a, b)}


def inversion(num_rows: int, num_columns: int, repeats: int) -> Sides:
    """Ridge weights with all their diagnostics, and the product χ χᵀ."""
    chi = jax.random.normal(jax.random.key(0), (num_rows, num_columns)) / 100
    rows = tuple(map(str, range(num_rows)))
    some = jnp.ones(num_rows)
    response = jp.Response(
        chi={"x": chi}, stderr={"x": jnp.full_like(chi, 1e-4)}, halves={}, batches={},
        mass={"x": jnp.full(num_columns, 1 / num_columns)}, nbeta=jnp.asarray(30.0),
        mean=some, mean_stderr=some, rhat=some, ess=some,
        diverged=jnp.zeros((num_rows, 1), bool), rows=rows, cost=0.0, num_samples=num_columns,
    )  # fmt: skip
    target = dict.fromkeys(rows, 0.001)
    product = jax.jit(lambda x: jnp.matmul(x, x.T, precision="highest"))

    def ours() -> Any:
        return [jp.solve_weights(response, target).weights for _ in range(repeats // 20)]

    return {
        "jaxpattern": ours,
        "bare": lambda: [product(chi).block_until_ready() for _ in range(repeats // 20)],
    }


def draw(report: measure.Report) -> None:
    """Bars of the ratios, with the claimed bound."""
    from matplotlib.figure import Figure

    rows = report.rows()
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.2), layout="constrained", dpi=120)
    ax = figure.subplots()
    ax.barh([row["part"] for row in rows][::-1], [row["ratio"] for row in rows][::-1])
    ax.axvline(1, color="black")
    label = f"claimed for a step and a draw: {CLAIMED:g}"
    ax.axvline(CLAIMED, color="tab:red", linestyle=":", label=label)
    ax.set_xlabel("CPU seconds over those of the bare computation")
    ax.legend()
    figure.savefig(report.figure)


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
