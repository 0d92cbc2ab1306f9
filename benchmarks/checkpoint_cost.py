"""What a component of a Hugging Face checkpoint costs: memory of a chain, time of a step, tails.

Models of the shapes of Pythia-14M, SmolLM2-135M and Pythia-1.4B with random parameters; time and
memory do not depend on what they are. Claimed:

* A chain holds its component and its activations, never a copy of the stacked model: of programs
  compiled for 1 and for 8 chains, a chain more takes at most 1.2 times what a bare gradient of its
  batch takes, with six arrays of the size of its component.
* A step of a chain costs at most 1.2 times a bare jitted gradient of the same component.

Beside them, without a claim: what the same step costs on the tail of the model (`jp.lm.split`),
where nothing below the component is computed or differentiated; compile times; peak memory of a
run; and for 1.4B, by ahead-of-time compilation alone, memory and FLOPs in float32 and bfloat16,
with and without `remat`.

    python benchmarks/checkpoint_cost.py [--quick] [--models 14M 135M 1.4B] [--out FOLDER]

CPU seconds on one core, both sides in turn, medians; a step is the difference between a long and a
short run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpattern as jp
import measure
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.lower import lower_chains
from jaxpattern.chains.record import Nothing
from jaxpattern.posterior import Posterior

LENGTH, BATCH = 32, 4  # predicted tokens of a sequence, sequences of a step
CLAIMED = 1.2


def pythia(width: int, layers: int, heads: int) -> dict[str, Any]:
    """The configuration of a Pythia."""
    return {
        "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width,
        "max_position_embeddings": 2048, "rotary_pct": 0.25, "tie_word_embeddings": False,
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "14M": pythia(128, 6, 4),
    "135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "max_position_embeddings": 8192, "rope_theta": 100_000.0, "tie_word_embeddings": True,
    },
    "1.4B": pythia(2048, 24, 16),
}  # fmt: skip
QUICK = {"14M": CONFIGS["14M"] | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 256}}


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=4, help="steps of the short run")
    options = parser.parse_args(argv)
    report = measure.Report("checkpoint_cost", options)
    for name in options.models if not options.quick else QUICK:
        config = QUICK[name] if options.quick else CONFIGS[name]
        memory_of_chains(report, name, config)
        if name == "1.4B":
            ahead_of_time(report, name, config)
        else:
            time_of_steps(report, name, config, options)
    return report.close()


class Side(NamedTuple):
    """A model or a tail of it, with one component and the data of its posterior."""

    model: Any
    part: jp.Restriction
    data: Any


def size_of(tree: Any) -> int:
    """Bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def mib(x: float) -> str:
    return f"{x / 2**20:,.0f} MiB"


def last(model: Any, kind: str) -> str:
    """The part of the last layer."""
    layer = model.spec.num_layers - 1
    return f"l{layer}h0" if kind == "head" else f"l{layer} {kind}"


def shapes(side: Side) -> tuple[Posterior, ComponentGroup]:
    """A posterior of shapes, and the component as a group of its own."""
    shape = jax.ShapeDtypeStruct
    samples = jax.tree.leaves(side.data)[0].shape[0]
    posterior = Posterior(
        params=side.model.params, data=side.data, weights=shape((samples, LENGTH), jnp.float32),
        nbeta=shape((), jnp.float32), localization=shape((), jnp.float32), restriction=None,
        loss_fn=side.model.loss_fn, spare=shape((), jnp.int32),
    )  # fmt: skip
    restrictions = jax.tree.map(lambda leaf: np.asarray(leaf)[None], side.part)
    return posterior, ComponentGroup(("part",), (0,), restrictions)


def compiled_steps(side: Side, chains: int) -> Any:
    """The program that advances so many chains of the component."""
    posterior, group = shapes(side)
    plan = jp.Plan(
        num_chains=chains, num_burnin=100, num_draws=2, thin=1, num_batches=2, batch_size=BATCH
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    run = jp.Run(key, posterior, jp.sgld(step_size=1e-6), plan)
    return lower_chains(run, Nothing(), None, group).advance.compile()


def bare_gradient(side: Side) -> Any:
    """The gradient of a batch by the component, lowered."""

    def gradient(position: Any, params: Any, batch: Any) -> Any:
        def loss(v: Any) -> jax.Array:
            return jnp.mean(side.model.loss_fn(side.part.embed(v, params), batch))

        return jax.grad(loss)(position)

    position = jax.eval_shape(side.part.select, side.model.params)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype), side.data)
    return jax.jit(gradient).lower(position, side.model.params, batch)


def abstract_side(config: Any, kind: str, **how: Any) -> Side:
    model = jp.lm.abstract(config, **how)
    data = jax.ShapeDtypeStruct((64, LENGTH + 1), jnp.int32)
    return Side(model, jp.component(model, last(model, kind)), data)


def memory_of_chains(report: measure.Report, name: str, config: Any) -> None:
    """Memory beside the arguments, of 1 and of 8 chains of a component."""
    for kind in ("head", "mlp"):
        side = abstract_side(config, kind)
        stack = size_of(side.model.params["layers"]["mlp" if kind == "mlp" else "attn"])
        own = size_of(jax.eval_shape(side.part.select, side.model.params))
        gradient = bare_gradient(side).compile().memory_analysis().temp_size_in_bytes
        start = time.process_time()
        used = {n: compiled_steps(side, n).memory_analysis() for n in (1, 8)}
        seconds = (time.process_time() - start) / 2
        temporary = {n: memory.temp_size_in_bytes for n, memory in used.items()}
        state = {n: memory.output_size_in_bytes for n, memory in used.items()}
        more = (temporary[8] + state[8] - temporary[1] - state[1]) / 7
        report.add(
            f"{name:5s} {last(side.model, kind):9s} a chain more {mib(more):>12s}; component "
            f"{mib(own):>9s}, gradient of a batch {mib(gradient):>10s}, stack {mib(stack):>11s}, "
            f"model {mib(size_of(side.model.params)):>11s}; compiled in {seconds:.1f} CPU s",
            part="memory", model=name, component=kind, per_chain=more, own=own, stack=stack,
            gradient=gradient, parameters=size_of(side.model.params), temporary=temporary,
            compile_seconds=seconds,
        )  # fmt: skip
        # The position, its gradient, its noise and what is updated are of the component's size.
        bound = 1.2 * (gradient + 6 * own)
        report.claim(f"{name} {kind}: {mib(more)} <= {mib(bound)} per chain", more <= bound)


def ahead_of_time(report: measure.Report, name: str, config: Any) -> None:
    """Memory and FLOPs of a gradient by the MLP of the last layer, by compilation alone."""
    for dtype in (jnp.float32, jnp.bfloat16):
        for remat in (False, True):
            side = abstract_side(config, "mlp", dtype=dtype, remat=remat)
            start = time.process_time()
            compiled = bare_gradient(side).compile()
            seconds = time.process_time() - start
            memory, flops = compiled.memory_analysis(), compiled.cost_analysis().get("flops")
            size = size_of(side.model.params) // np.dtype(dtype).itemsize
            tokens = BATCH * LENGTH
            report.add(
                f"{name:5s} {np.dtype(dtype).name:9s}{'remat' if remat else '':6s} parameters "
                f"{mib(memory.argument_size_in_bytes):>11s}, beside them "
                f"{mib(memory.temp_size_in_bytes):>10s}; {flops:.2e} FLOPs by XLA, "
                f"{4 * size * tokens:.2e} by 4 a parameter and token; {seconds:.1f} CPU s",
                part="ahead of time", model=name, dtype=np.dtype(dtype).name, remat=remat,
                arguments=memory.argument_size_in_bytes, temporary=memory.temp_size_in_bytes,
                flops=flops, formula=4 * size * tokens, compile_seconds=seconds,
            )  # fmt: skip


def random_model(config: Any) -> Any:
    """A model with random parameters."""
    rng = np.random.default_rng(0)
    model = jp.lm.abstract(config)

    def fill(shape: Any) -> jax.Array:
        return jax.device_put(0.02 * rng.standard_normal(shape.shape, np.float32))

    return jp.lm.Model(model.spec, jax.tree.map(fill, model.params), config, {})


def time_of_steps(report: measure.Report, name: str, config: Any, options: Any) -> None:
    """A step of a chain over a bare gradient: on the whole model, and on its tail."""
    model = random_model(config)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, model.spec.vocab_size, (16, LENGTH + 1)).astype(np.int32)
    tail = jp.lm.split(model, model.spec.num_layers - 1)
    part = last(model, "mlp")
    sides = {
        "whole": Side(model, jp.component(model, part), jax.device_put(tokens)),
        "tail": Side(tail, jp.component(tail, part), tail.data(tokens)),
    }
    each: dict[str, float] = {}
    for where, side in sides.items():
        short, long = options.steps, 3 * options.steps
        runs = {
            (who, n): run for n in (short, long) for who, run in of_steps(side, n).items()
        }  # fmt: skip
        timing = measure.in_turn(runs, 3 if options.quick else 5)
        ours, bare = (
            [
                (b - a) / (long - short)
                for a, b in zip(timing[who, short].all, timing[who, long].all, strict=True)
            ]
            for who in ("jaxpattern", "bare")
        )
        ratio = statistics.median(ours) / statistics.median(bare)
        each[where] = statistics.median(ours)
        peak = measure.peak_memory(runs["jaxpattern", long])[0]
        compilation = timing["jaxpattern", short].compilation
        report.add(
            f"{name:5s} {part} on the {where:6s}{1e3 * statistics.median(ours):9.1f} ms a step, "
            f"bare gradient {1e3 * statistics.median(bare):9.1f} ms: {ratio:.2f} times (claimed "
            f"{CLAIMED:g}); compiled in {compilation:.1f} CPU s, peak {mib(peak)}",
            part="step", model=name, where=where, cpu_ms=1e3 * statistics.median(ours),
            bare_cpu_ms=1e3 * statistics.median(bare), ratio=ratio, claimed=CLAIMED,
            compilation=compilation, peak=peak,
        )  # fmt: skip
        if not options.quick:  # steps of a millisecond, of which the noise is much
            report.claim(f"{name} on the {where}: {ratio:.2f} <= {CLAIMED:g}", ratio <= CLAIMED)
    share = each["tail"] / each["whole"]
    report.add(
        f"{name:5s} the tail takes {share:.2f} of a step of the whole", part="tail", model=name,
        share=share,
    )  # fmt: skip


def final_scale(params: Any) -> jax.Array:
    """The least that can be observed."""
    return params["ln_final"]["w"]


def of_steps(side: Side, num_steps: int) -> dict[str, Callable[[], Any]]:
    """So many steps of a chain, and as many bare gradients, each of which moves the component."""
    posterior = jp.restrict(
        jp.localized_posterior(
            side.model.loss_fn, side.model.params, side.data, nbeta=30.0, localization=300.0
        ),
        side.part,
    )
    plan = jp.Plan(
        num_chains=1, num_burnin=num_steps - 2, num_draws=2, num_batches=2, batch_size=BATCH
    )

    def ours() -> Any:
        return jp.sample(
            jax.random.key(0), posterior, jp.sgld(step_size=1e-9), plan, final_scale,
            progress=False,
        )  # fmt: skip

    @jax.jit
    def run(params: Any, data: Any) -> Any:
        batch = jax.tree.map(lambda x: x[:BATCH], data)

        def loss(v: Any) -> jax.Array:
            return jnp.mean(side.model.loss_fn(side.part.embed(v, params), batch))

        def step(i: jax.Array, v: Any) -> Any:
            return jax.tree.map(lambda x, g: x - 1e-9 * g, v, jax.grad(loss)(v))

        return jax.lax.fori_loop(0, num_steps, step, side.part.select(params))

    return {"jaxpattern": ours, "bare": partial(run, side.model.params, side.data)}


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
