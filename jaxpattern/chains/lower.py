"""The programs of a run, lowered and not run: what they need, before there is anything to run on.

    programs = lower_chains(run, recorder, mesh)
    programs.advance.compile().memory_analysis()

Arrays may be `jax.ShapeDtypeStruct`, and the devices of the mesh only described.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpattern.chains.lanes import Chorus, ComponentGroup, make_lanes
from jaxpattern.chains.loop import Segment
from jaxpattern.chains.programs import Chunk, advance, look_back, shape_of, start
from jaxpattern.chains.record import Look, Recorder
from jaxpattern.chains.run import Run


class Lowered(NamedTuple):
    """The programs in which a run spends its time."""

    advance: Any
    look_back: Any | None


def lower_chains(
    run: Run,
    recorder: Recorder,
    mesh: Mesh | None,
    group: ComponentGroup | None = None,
    *,
    look: Look | None = None,
    segments: Sequence[Segment] = (),
    antithetic: bool = False,
) -> Lowered:
    """What `run_chains` compiles for these arguments, as `jax.stages.Lowered`.

    Args:
        run, recorder, mesh, group, look, segments, antithetic: as `run_chains` takes them, with
            the mesh in the place of a host. Arrays that are not laid out on the mesh are whole on
            each of its devices.
    """
    plan = run.plan
    key, posterior, shared = describe((run.key, run.posterior, (run.sampler, recorder, look)), mesh)
    lanes = describe(make_lanes(group or ComponentGroup(), plan, antithetic, mesh), mesh, "chain")
    chorus = Chorus(key, posterior, shared, lanes)
    shape = shape_of(plan, mesh, (run.sampler, recorder, look))
    first = start.lower(chorus, (), shape)
    # XLA decides where the state of a chain lies, by where its parameters do.
    chains, _ = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        first.out_info, first.compile().output_shardings,
    )  # fmt: skip
    number = np.int32(0)
    chunk = describe(Chunk(*(number for _ in Chunk._fields)), mesh)
    back = None
    if look is not None:
        segment = describe((number, segments[0].about), mesh)
        back = look_back.lower(chorus, chains, segment, shape)
    return Lowered(advance.lower(chorus, chains, chunk, shape), back)


def describe(tree: Any, mesh: Mesh | None, *spec: str | None) -> Any:
    """Shapes in the place of arrays, laid out on the mesh: as they are, or along these axes."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        here = getattr(leaf, "sharding", None)
        if mesh is None:
            here = None
        elif any(spec) or not (isinstance(here, NamedSharding) and here.mesh == mesh):
            axes = (axis if axis in mesh.axis_names else None for axis in spec)
            here = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=here)

    return jax.tree.map(one, tree)
