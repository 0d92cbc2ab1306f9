"""What a run on a TPU pod would need: memory, collectives and FLOPs, from programs compiled here.

    pip install libtpu
    python benchmarks/pod_plan.py [--quick] [--chips 16 256] [--config CONFIG] [--out FOLDER]

Claim: the programs of this package fit the chips of a v5e pod, and chains dealt out to them
exchange nothing. The real programs are compiled ahead of time for a described topology, with
shapes in the place of arrays, so it needs neither a TPU nor the memory. It exits with status 1
where a program does not fit, or one that deals out chains holds a collective.

`--config` takes a folder of Hugging Face or its `config.json`; no parameters are read.

Compiled: steps of sampling with parameters cut over `model`; a segment of the pathwise adjoint of
heads × chains; a re-weighted training step. Chip-hours of whole runs follow from their cost in
gradients, 6 FLOPs a parameter and token each, at an assumed utilisation: a plan, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Nothing here opens a chip, so another process that compiles is no reason to refuse.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxpattern as jp
from jaxpattern import descent, training
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.lower import lower_chains
from jaxpattern.chains.record import Nothing
from jaxpattern.models import transformer
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.response.problem import Problem
from jaxpattern.runtime.mesh import param_specs

TOPOLOGIES = {4: "v5e:2x2", 16: "v5e:4x4", 256: "v5e:16x16"}
HBM = 16 * 2**30  # bytes of a v5e chip
PEAK = 197e12  # bf16 FLOP/s of a v5e chip
UTILISATION = 0.4  # assumed
COLLECTIVES = "all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter"

LARGE = transformer.TransformerConfig(
    vocab_size=50304, d_model=2048, num_layers=24, num_heads=16, context=2048, mlp_width=8192,
    positions="relative_bias", dtype="bfloat16",
)  # fmt: skip
SMALL = transformer.TransformerConfig(
    vocab_size=512, d_model=64, num_layers=2, num_heads=4, context=64, mlp_width=256,
    positions="relative_bias", dtype="bfloat16",
)  # fmt: skip


class Described(NamedTuple):
    """A model of shapes: parameters, loss, and the heads of its first layer."""

    name: str
    params: Any
    loss_fn: Any
    heads: dict[str, jp.Restriction]


def of_transformer(name: str, config: transformer.TransformerConfig) -> Described:
    """One of `models.transformer`."""
    shapes = jax.eval_shape(partial(transformer.init, config=config), jax.random.key(0))
    heads = {
        f"h{h}": jp.by_slice({f"layers/0/attn/{part}": (0, h) for part in "qkvo"})
        for h in range(config.num_heads)
    }
    return Described(name, shapes, transformer.make_loss_fn(config), heads)


def of_config(path: Path) -> Described:
    """One of Hugging Face, layers computed again for derivatives."""
    model = jp.lm.abstract(path.parent if path.is_file() else path, remat=True)
    names = [f"l0h{h}" for h in range(model.spec.num_heads)]
    return Described(str(model), model.params, model.loss_fn, jp.components(model, names))


def described_mesh(chips: int, data: int = 1, model: int = 1) -> Mesh:
    """A mesh over chips that are not there."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chips]).devices
    return jp.mesh(data=data, model=model, devices=devices)


def laid_out(tree: Any, mesh: Mesh, *spec: str | None) -> Any:
    """Shapes with the same layout each."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding), tree
    )


def abstract_posterior(
    model: Described, mesh: Mesh, length: int, samples: int, dtype: Any = jnp.float32
) -> Posterior:
    """The posterior of a model that nobody trained."""
    shapes = model.params
    specs = param_specs(shapes, mesh.shape["model"])
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, s)),
        shapes, specs,
    )  # fmt: skip
    shape = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    return Posterior(
        params=params,
        data=shape((samples, length + 1), jnp.int32),
        weights=shape((samples, length), jnp.float32),
        nbeta=shape((), jnp.float32),
        localization=shape((), jnp.float32),
        restriction=None,
        loss_fn=model.loss_fn,
        spare=shape((), jnp.int32),
    )


def states_of(compiled: Any, shapes: Any) -> Any:
    """Shapes of what a compiled program returns, laid out as it does."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes, compiled.output_shardings,
    )  # fmt: skip


def sampling_step(model: Described, chips: int, parts: int, length: int, batch: int) -> Any:
    """Steps of SGLD, one chain per group of `parts` chips."""
    mesh = described_mesh(chips, model=parts)
    posterior = abstract_posterior(model, mesh, length, 1024)
    plan = jp.Plan(
        num_chains=mesh.shape["chain"], num_burnin=100, num_draws=2, thin=1, num_batches=2,
        batch_size=batch,
    )  # fmt: skip
    # Noise drawn array by array: each part is drawn where it lies.
    sampler = jp.sgld(step_size=1e-4, noise="leaf")
    return lower_chains(jp.Run(abstract_key(), posterior, sampler, plan), Nothing(), mesh).advance


def pathwise_segment(model: Described, chips: int, length: int, batch: int, probes: int) -> Any:
    """The sweep over a segment for all heads of a layer × 4 chains, a lane at a time."""
    mesh = described_mesh(chips)
    posterior = abstract_posterior(model, mesh, length, 1024, jnp.bfloat16)
    group = ComponentGroup(
        names=tuple(model.heads), ids=tuple(range(len(model.heads))),
        restrictions=jax.tree.map(lambda *leaves: np.stack(leaves), *model.heads.values()),
    )  # fmt: skip
    plan = jp.Plan(
        num_chains=4, num_burnin=16, num_draws=4, thin=4, batch_size=batch, chunk=batch,
        num_batches=1, chains_at_once=1,
    )  # fmt: skip
    run = jp.Run(abstract_key(), posterior, jp.sgld(step_size=1e-4), plan)
    shape = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    problem = Problem(
        observables=None,
        offsets=shape((1,), jnp.float32),
        probes={"p": shape((probes, length + 1), jnp.int32)},
        probe_baseline={"p": shape((probes, length), jnp.float32)},
        mass={"p": shape((probes, length), jnp.float32)},
        reference=Minibatch(
            shape((batch, length + 1), jnp.int32), shape((batch, length), jnp.float32)
        ),
        reference_baseline=shape((batch, length), jnp.float32),
        chunk=batch,
        groups=(group,),
    )
    estimator = jp.pathwise(window=4, every=2)
    found: list[Any] = []
    # Restrictions select from arrays, which a trace stands in for.
    jax.eval_shape(
        lambda p: found.append(estimator.sweep(replace(run, posterior=p), problem)), posterior
    )
    return lower_chains(
        run, Nothing(), mesh, group, look=estimator.look(found[0], problem.core),
        segments=found[0].schedule, antithetic=True,
    ).look_back  # fmt: skip


def abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def training_step(model: Described, chips: int, parts: int, length: int, batch: int) -> Any:
    """A step of Adam on re-weighted data, the batch cut over the rest of the chips."""
    mesh = described_mesh(chips, data=chips // parts, model=parts)
    posterior = abstract_posterior(model, mesh, length, 1024)
    run = descent.Descent(posterior.loss_fn, optax.adam(1e-4), 1000, batch, "loss", None, mesh)
    metrics = jax.tree_util.Partial(lambda params: {})
    compiled = training._start.lower(run, posterior.params, metrics, None).compile()
    state = states_of(
        compiled, jax.eval_shape(lambda p: training._start(run, p, metrics, None), posterior.params)
    )
    # Moments of the optimizer lie where their parameters do.
    moments = posterior.params
    adam = state.optimizer[0]._replace(mu=moments, nu=moments)
    state = state._replace(params=posterior.params, optimizer=(adam, *state.optimizer[1:]))
    state = laid_out_missing(state, mesh)
    weighted = Minibatch(posterior.data, posterior.weights)
    key = laid_out(abstract_key(), mesh)
    bounds = laid_out((jnp.asarray(0), jnp.asarray(1)), mesh)
    return training._advance.lower(run, state, key, weighted, metrics, bounds)


def laid_out_missing(tree: Any, mesh: Mesh) -> Any:
    """Whole on every chip, what has no layout on the mesh."""
    whole = NamedSharding(mesh, PartitionSpec())

    def place(x: Any) -> Any:
        here = isinstance(x.sharding, NamedSharding)
        sharding = x.sharding if here else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def report(name: str, chips: int, lowered: Any, silent: bool) -> dict[str, Any]:
    """Memory, collectives and FLOPs of a program, a chip."""
    before = time.monotonic()
    row: dict[str, Any] = {"program": name, "chips": chips}
    try:
        compiled = lowered.compile()
    except Exception as error:  # of XLA's own class: the program does not fit
        return row | {"fits": False, "error": " ".join(str(error).split())[:300]}
    memory = compiled.memory_analysis()
    used = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes
        + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip
    found = exchanged(compiled.as_text())
    return row | {
        "fits": used <= HBM,
        "memory_gib": used / 2**30,
        "collectives": dict(Counter(found.values())),
        "silent": not silent or not found,
        "flops": compiled.cost_analysis().get("flops"),
        "compile_seconds": time.monotonic() - before,
    }


def exchanged(text: str) -> dict[str, str]:
    """Channel → collective of a compiled program; XLA may write one down in several parts."""
    lines = re.findall(rf" ({COLLECTIVES})(?:-start)?\(.*?channel_id=(\d+)", text)
    return {channel: name for name, channel in lines}


def programs(model: Described, chips: int, quick: bool) -> list[tuple[str, Any, bool]]:
    """Name, how it is lowered, and whether it must hold no collective."""
    parts, length, batch, probes = (2, 32, 4, 8) if quick else (8, 512, 8, 32)
    parts = min(parts, chips)
    shares = max(batch, chips // parts)
    return [
        ("sampling", partial(sampling_step, model, chips, parts, length, batch), False),
        ("pathwise", partial(pathwise_segment, model, chips, length, 1 if not quick else batch,
                             4 if not quick else probes), True),
        ("training", partial(training_step, model, chips, parts, length, shares), False),
    ]  # fmt: skip


class Run(NamedTuple):
    """A published response run: what was measured, how, and what it is said to have cost."""

    name: str
    size: float  # parameters
    tokens: float  # whose susceptibilities are measured
    components: int
    thin: int  # steps between draws
    cost: float  # hours
    peak: float  # bf16 FLOP/s of what the hours are of


PUBLISHED = (
    # 1.1 H200-hours per 1,000 tokens.
    Run("4.25M tokens × 410 components, 1.4B", 1.4e9, 4.25e6, 410, 160, 1.1 * 4250, 989e12),
    # 2,000 B200-hours a response matrix; the length of a sample is not published, 512 is assumed.
    Run("74,508 samples × all weights, 9B", 9e9, 74_508 * 512, 1, 30, 2000, 2250e12),
)
CHAINS, DRAWS, BURNIN, BATCH = 4, 100, 200, 32 * 512  # BATCH in tokens


def cost(run: Run, estimator: str) -> float:
    """FLOPs: 2 a parameter and token forward, 6 with the gradient, 12 of a Hessian-vector product.

    A draw of the covariance is a forward pass of all probes. The adjoint runs back over the steps
    of the last `window`, a Hessian-vector product of a quarter of the batch each, and every `thin`
    steps differentiates all probes along itself (4 a parameter and token). Both give `DRAWS` draws.
    """
    steps = BURNIN + DRAWS * run.thin
    sampling = 6 * BATCH * steps
    if estimator == "covariance":
        response = 2 * run.tokens * DRAWS
    else:
        response = 12 * BATCH / 4 * steps + 4 * run.tokens * DRAWS
    return CHAINS * run.components * run.size * (sampling + response)


def published() -> list[dict[str, Any]]:
    """Predicted chip-hours of two published runs, and what they are said to have cost, as FLOPs."""
    rows = []
    for run in PUBLISHED:
        for estimator in ("covariance", "pathwise"):
            flops = cost(run, estimator)
            rows.append({
                "run": run.name, "estimator": estimator, "flops": flops,
                "chip_hours": flops / (PEAK * UTILISATION) / 3600,
                "published_chip_hours": run.cost * run.peak / PEAK,
            })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--chips", type=int, nargs="+", default=[16, 256], choices=TOPOLOGIES)
    parser.add_argument("--only", nargs="+", help="names of programs")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--config", type=Path, help="a folder of Hugging Face, or its config.json")
    options = parser.parse_args(arguments)
    if options.config:
        model = of_config(options.config)
    else:
        model = of_transformer(*(("small", SMALL) if options.quick else ("1.4B", LARGE)))
    rows = []
    for chips in options.chips:
        for name, lower, silent in programs(model, chips, options.quick):
            if options.only and name not in options.only:
                continue
            row = report(name, chips, lower(), silent)
            rows.append(row | {"model": model.name})
            print(json.dumps(rows[-1]), flush=True)
    print(
        f"v5e chip-hours at {UTILISATION:.0%} of the peak, of {CHAINS} chains, {BURNIN} steps of "
        f"burn-in, {DRAWS} draws, {BATCH:,} tokens a batch; said to have cost, hours × peak / peak"
    )
    for row in published():
        print(f"{row['run']:38s}{row['estimator']:12s}{row['chip_hours']:12,.0f}"
              f"{row['published_chip_hours']:12,.0f}")  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in [*rows, *published()]]
    (options.out / "pod_plan.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(not all(row["fits"] and row.get("silent", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
