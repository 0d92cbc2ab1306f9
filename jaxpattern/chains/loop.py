"""The loop of a run: chains advance in chunks, draws are recorded, lost chains are left out.

A chain runs `num_burnin` steps, then `num_draws` times `thin` steps and a record. Three small
programs do it, for all lanes at once: `_advance` carries chains through a chunk, `_look` sweeps
back over a segment where the run asks for it, `_file` puts what was recorded where it belongs.
Lengths are arguments of `_advance` and not part of it: another burn-in, number of draws, thinning
or grouping of the draws compiles no model again. A burn-in is a chunk without a record, so the
step of the sampler is in one program, once.

Inside a transformation (`jit`, `vmap`, `grad`) the same pieces make one loop of static length.

Randomness: chain c of component k uses fold_in(fold_in(key, k), c), step t folds in t, draw d
folds in d. Bits therefore do not depend on chunking, on other chains, or on where a chain runs.
Antithetic chains 2c and 2c + 1 are mirrored twins (see `Posterior`), which share chain c's key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key, PyTree

from jaxpattern.chains.divergence import all_finite
from jaxpattern.chains.kernel import Streams, build_kernel, position_of, streams_of
from jaxpattern.chains.lanes import ComponentGroup, Lane, make_lanes, over_chains, unpack
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.record import Look, Nothing, Recorder, where_alive
from jaxpattern.chains.run import Run
from jaxpattern.posterior import Posterior
from jaxpattern.runtime.host import Host
from jaxpattern.runtime.mesh import fetch, put
from jaxpattern.samplers import Sampler
from jaxpattern.validation import is_concrete

_SLOTS = 64
_SLOT_BYTES = 2**22


class Recorded(NamedTuple):
    """What chains left, leaves with leading axes `[component, chain]`.

    Attributes:
        alive: which chains stayed finite.
        kept: of every draw, `[component, chain, draw, ...]`.
        added: of every group of draws, `[component, chain, group, ...]`.
        looked: of the draws and of the segments of a `Look`, and what it added.
        state: where the chains are, to go on from.
    """

    alive: Bool[Array, "components chains"]
    kept: PyTree[Array]
    added: PyTree[Array]
    looked: Looked
    state: PyTree[Array]


class Looked(NamedTuple):
    """What a `Look` left: by draw, by segment, by group of draws."""

    draws: PyTree[Array] = ()
    segments: PyTree[Array] = ()
    added: PyTree[Array] = ()


class States(NamedTuple):
    """Chains to go on from: sampler states `[chain, ...]`, which are alive, steps and draws taken."""

    state: PyTree[Array]
    alive: Bool[Array, " chains"]
    steps: int
    draws: int


class Segment(NamedTuple):
    """Draws that a `Look` sweeps over together, and whatever it wants to know of them."""

    start: int
    stop: int
    about: Any = ()


class Past(NamedTuple):
    """What a look back sees of one chain: `states` is a ring in which step t is at t mod history.

    `about` is what the segment says of itself, `last` the present state, `streams` the chain's
    random streams, `index` the number of the segment.
    """

    posterior: Posterior
    sampler: Sampler
    batch_size: int | None
    streams: Streams
    states: PyTree[Array]
    last: PyTree[Array]
    about: Any
    index: Array


class _Shape(NamedTuple):
    """What makes a program another one."""

    batch_size: int | None
    at_once: int | None
    slots: int
    history: int


class _Chunk(NamedTuple):
    """`pieces` times `steps` steps from `step` on, each with `record` (0 or 1) draws after it."""

    step: Any
    steps: Any
    pieces: Any
    record: Any
    draw: Any
    fresh: Any  # whether a group of draws begins
    group: Any
    offset: Any  # where the draws are filed


class _Chain(NamedTuple):
    """A chain between two chunks."""

    state: PyTree[Array]
    alive: Bool[Array, "*lanes"]
    kept: PyTree[Array]
    added: PyTree[Array]
    history: PyTree[Array]


class _Chains(NamedTuple):
    """What is carried from chunk to chunk: chains, and all they left so far, `[lane, ...]`."""

    now: _Chain
    kept: PyTree[Array]
    added: PyTree[Array]
    segments: PyTree[Array]


def run_chains(
    run: Run,
    recorder: Recorder,
    host: Host,
    group: ComponentGroup | None = None,
    *,
    look: Look | None = None,
    segments: Sequence[Segment] = (),
    antithetic: bool = False,
    start: States | None = None,
    label: str = "sampling",
) -> Recorded:
    """All chains of some components of equal shape, as one program.

    Args:
        run: what is computed; its posterior is unrestricted where the group has restrictions.
        recorder: what to keep of each draw.
        host: where and how it is carried out.
        group: the components; None: the posterior as it is.
        look: a look back over each of the segments.
        segments: the draws, cut so that none straddles two groups of draws.
        antithetic: chains 2c and 2c + 1 are mirrored twins.
        start: chains of an earlier run to go on from, of a group of one.
        label: what the progress line says.
    """
    group = group or ComponentGroup()
    plan, mesh = run.plan, host.mesh
    posterior, sampler, recorder, look = put(
        (_settle(run.posterior), run.sampler, recorder, look), mesh
    )
    lanes = make_lanes(run.key, group, plan, antithetic, mesh)
    begin = (start.steps, start.draws) if start is not None else (0, 0)
    given = None if start is None else (start.state, start.alive)
    shared = (sampler, recorder, look)
    shape = _shape(posterior, shared, lanes, plan)
    count = len(group.ids) * plan.num_chains
    cut = _Cut(plan, segments, shape.slots, *begin)
    traced = not all(map(is_concrete, jax.tree.leaves((lanes, posterior, shared))))
    if traced:
        chains = _everything(posterior, shared, lanes, given, cut, shape, mesh)
    else:

        def first() -> _Chains:
            now = _start(posterior, shared, lanes, given, shape, mesh)
            return _Chains(now, *_empty(now, cut, mesh))

        def advance(chains: _Chains, begin: int, end: int) -> _Chains:
            for chunk, segment in cut.chunks(begin, end):
                chunk, segment = put((chunk, segment), mesh)
                now = _advance(posterior, shared, lanes, chains.now, chunk, shape, mesh)
                seen: Any = ()
                if segment is not None:
                    now, seen = _look(posterior, shared, lanes, now, segment, shape, mesh)
                chains = chains._replace(now=now)
                if segment is not None or end > plan.num_burnin:
                    chains = _file(chains, seen, chunk, segment and segment[0])
                if segment is not None:
                    jax.block_until_ready(chains)  # else segments in flight hold a history each
            return chains

        chains = host.loop(
            label, cut.total, first, advance, final=_final, lanes=count, cuts=cut.cuts,
            steps=cut.steps_at,
        )  # fmt: skip
    chains = _trim(chains, plan.num_draws)
    done = unpack(chains, len(group.ids), plan.num_chains)
    done = fetch(done, mesh)
    kept, added = done.kept, done.added
    return Recorded(
        alive=done.now.alive,
        kept=kept[0],
        added=added[0],
        looked=Looked(kept[1], done.segments, added[1]),
        state=done.now.state,
    )


def _settle(posterior: Posterior) -> Posterior:
    """The posterior without Python numbers and weak types, for which all is compiled again."""
    from dataclasses import replace

    dtype = posterior.weights.dtype
    return replace(
        posterior,
        params=jax.tree.map(lambda x: jnp.asarray(x, x.dtype), posterior.params),
        nbeta=jnp.asarray(posterior.nbeta, dtype),
        localization=jnp.asarray(posterior.localization, dtype),
    )
