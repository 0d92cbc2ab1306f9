"""The floor: what each part of the library costs over the bare computation it cannot do without.

Claimed, for a GPT-2-shaped language model (2 layers, d 64, vocabulary 512, context 64):
  * an SGLD step costs at most 1.1 times a bare jitted forward and backward pass of its mini-batch;
  * a draw of the covariance estimator at most 1.1 times bare forward passes of its probes.
Beside them, without a claim: a pathwise step against the gradient, the Hessian-vector product and
the jvp of the probes that it needs; a moment update against reading and writing its memory; the
inversion of 64 rows and 10⁶ columns against one matrix product of that size.

The bare side is plain jax with the same loss; only the library's public functions stand on the
other. Both are CPU seconds on one core, compilation apart, in turn, medians.

    python benchmarks/floor.py [--quick] [--out benchmarks/results]

writes one JSON line a row and a figure, and exits with 1 when a claim fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import language_model
import measure  # first, it pins the process
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm

import jaxpattern as jp
from jaxpattern import moments

BATCH = 16
CLAIMED = 1.1


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps or draws in a call")
    parser.add_argument("--columns", type=int, default=10**6, help="columns of the inversion")
    options = parser.parse_args(argv)
    report = measure.Report("floor", options)
    repeats = 3 if options.quick else 15
    model = language_model.trained_model(language_model.GPT2, 20, num_probes=64)
    for name, claimed, sides, why in (
        sgld_step(model, options.steps, 1),
        sgld_step(model, options.steps, 4),
        covariance_draw(model, options.steps, 4, "*"),
        covariance_draw(model, options.steps, 4, None),
        pathwise_step(model, 4 * options.steps),
        moment_update(16, 65_536, options.steps),
        inversion(64, options.columns),
    ):
        timing = measure.in_turn(sides, repeats)
        ours, bare = timing["jaxpattern"], timing["bare"]
        ratio = measure.ratio(ours, bare)
        report.add(
            f"{name:42s} {ours.seconds:7.3f} s, bare {bare.seconds:7.3f} s: {ratio:5.2f} times"
            + (f" (claimed {claimed:g})" if claimed else f" ({why})"),
            part=name, claimed=claimed, ratio=ratio, why=why,
            cpu_seconds=ours.seconds, bare_cpu_seconds=bare.seconds,
            compilation=ours.compilation, bare_compilation=bare.compilation,
        )  # fmt: skip
        if claimed:
            report.claim(f"{name}: {ratio:.2f} <= {claimed:g}", ratio <= claimed)
    draw(report)
    return report.close()


Part = tuple[str, float | None, dict[str, Callable[[], Any]], str]


def bare_steps(model: language_model.Trained, num_chains: int, num_steps: int) -> Any:
    """Forward and backward passes of a mini-batch of each chain, one after the other."""

    @jax.jit
    def run(params: Any, batch: jax.Array) -> Any:
        gradient = jax.grad(lambda w, x: jnp.mean(model.loss_fn(w, x)))

        def step(i: jax.Array, w: Any) -> Any:
            return jax.tree.map(lambda x, g: x - 1e-9 * g, w, gradient(w, batch))

        return jax.lax.fori_loop(0, num_chains * num_steps, step, params)

    return lambda: run(model.params, model.data[:BATCH])


def final_scale(params: Any) -> jax.Array:
    """The least that can be observed."""
    return params["final_norm"]["scale"]


def sgld_step(model: language_model.Trained, num_steps: int, num_chains: int) -> Part:
    """Chains of SGLD, of which next to nothing is observed."""
    posterior = jp.localized_posterior(
        model.loss_fn, model.params, model.data, nbeta=30.0, localization=300.0
    )
    plan = jp.Plan(
        num_chains=num_chains, num_burnin=num_steps - 2, num_draws=2, num_batches=2,
        batch_size=BATCH,
    )  # fmt: skip

    def ours() -> Any:
        return jp.sample(
            jax.random.key(0), posterior, jp.sgld(step_size=1e-3), plan,
            final_scale, progress=False,
        )  # fmt: skip

    sides = {"jaxpattern": ours, "bare": bare_steps(model, num_chains, num_steps)}
    return f"SGLD step, {num_chains} chains", CLAIMED, sides, ""


def stand_still(posterior: Any) -> SamplingAlgorithm:
    """A sampler that costs nothing."""

    def step(key: jax.Array, position: Any, minibatch: Any) -> Any:
        return jax.tree.map(lambda x: x * (1 - 1e-6), position)

    return SamplingAlgorithm(lambda position, key: position, step)


def covariance_draw(
    model: language_model.Trained, num_draws: int, num_chains: int, pattern: str | None
) -> Part:
    """Draws of a sampler that stands still, of all weights or of one head."""
    posterior = jp.localized_posterior(
        model.loss_fn, model.params, model.data, nbeta=30.0, localization=300.0
    )
    restriction = (
        jp.by_path(pattern) if pattern else jp.components(model.params, kinds="head")["l1h0"]
    )
    plan = jp.Plan(num_chains=num_chains, num_burnin=0, num_draws=num_draws, batch_size=1)

    def ours() -> Any:
        return jp.susceptibilities(
            jax.random.key(0), posterior, stand_still, plan, probes={"text": model.probes},
            reference=model.probes, components={"part": restriction}, estimator=jp.covariance(),
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

    sides = {"jaxpattern": ours, "bare": lambda: run(model.params, model.probes)}
    where = "all weights" if pattern else "a head"
    return f"covariance draw, {where}", CLAIMED, sides, ""


def pathwise_step(model: language_model.Trained, num_steps: int) -> Part:
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
            v, adjoint = jax.lax.fori_loop(0, every, step, (v, jax.tree.map(jnp.add, adjoint, source)))
            return v, adjoint, total + jax.jvp(lambda v: losses(v, probes), (v,), (adjoint,))[1]

        v = head.select(params)
        zero = jnp.zeros((probes.shape[0], probes.shape[1] - 1))
        carry = (v, jax.tree.map(jnp.zeros_like, v), zero)
        return jax.lax.fori_loop(0, num_chains * num_steps // every, block, carry)

    sides = {
        "jaxpattern": ours,
        "bare": lambda: run(model.params, model.data[:BATCH], model.probes),
    }
    why = "gradient of 16, product of 4, and a gradient and a jvp of 64 probes every 4 steps"
    return "pathwise step, a head", None, sides, why


def moment_update(num_rows: int, num_columns: int, num_draws: int) -> Part:
    """Streamed co-moments, and a loop that only reads and writes as many numbers."""
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

    sides = {"jaxpattern": partial(ours, a, b), "bare": partial(bare, a, b)}
    return f"moments, {num_rows} rows of {num_columns}", None, sides, "its memory read and written"


def inversion(num_rows: int, num_columns: int) -> Part:
    """Ridge weights with all their diagnostics, and the product χ χᵀ."""
    chi = jax.random.normal(jax.random.key(0), (num_rows, num_columns)) / 100
    rows = tuple(map(str, range(num_rows)))
    some = jnp.ones(num_rows)
    response = jp.Response(
        chi={"x": chi}, stderr={"x": jnp.full_like(chi, 1e-3)}, halves={}, batches={},
        mass={"x": jnp.full(num_columns, 1 / num_columns)}, nbeta=jnp.asarray(30.0),
        mean=some, mean_stderr=some, rhat=some, ess=some,
        diverged=jnp.zeros((num_rows, 1), bool), rows=rows, cost=0.0, num_samples=num_columns,
    )  # fmt: skip
    target = {row: 0.001 for row in rows}

    def ours() -> Any:
        return jp.solve_weights(response, target, method=jp.ridge(1e-9)).weights

    product = jax.jit(lambda x: jnp.matmul(x, x.T, precision="highest"))
    why = "one product χ χᵀ"
    name = f"inversion, {num_rows} rows of {num_columns}"
    return name, None, {"jaxpattern": ours, "bare": lambda: product(chi)}, why


def draw(report: measure.Report) -> None:
    """Bars of the ratios, with the claimed bound."""
    from matplotlib.figure import Figure

    rows = report.rows()
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.2), layout="constrained", dpi=120)
    ax = figure.subplots()
    ax.barh([row["part"] for row in rows][::-1], [row["ratio"] for row in rows][::-1])
    ax.axvline(1, color="black")
    ax.axvline(CLAIMED, color="tab:red", linestyle=":", label=f"claimed for steps and draws: {CLAIMED:g}")
    ax.set_xlabel("CPU seconds over those of the bare computation")
    ax.legend()
    figure.savefig(report.figure)


if __name__ == "__main__":
    sys.exit(main())
