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

from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from jaxpattern.chains.record import Look, Recorder, where_alive
from jaxpattern.chains.run import Run
from jaxpattern.posterior import Posterior
from jaxpattern.runtime.host import Host
from jaxpattern.runtime.mesh import fetch, pad_lanes, put
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
    slots: int | None  # draws that a chain holds until they are filed; None: by their size


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
    posterior, shared = put((_settle(run.posterior), (run.sampler, recorder, look)), mesh)
    lanes = make_lanes(run.key, group, plan, antithetic, mesh)
    positions = _Positions(plan, tuple(segments), *(start[2:] if start is not None else (0, 0)))
    given = () if start is None else put(pad_lanes(start[:2], mesh), mesh, "chain")
    shape = _Shape(plan.batch_size, plan.chains_at_once, None if look is None else look.slots)
    count = len(group.ids) * plan.num_chains
    if all(map(is_concrete, jax.tree.leaves((lanes, posterior, shared, given)))):
        chains = host.loop(
            label,
            positions.total,
            lambda: _empty(_start(posterior, shared, lanes, given, shape, mesh), positions, mesh),
            partial(_carry_out, posterior, shared, lanes, positions, shape, mesh),
            final=_final,
            lanes=count,
            cuts=positions.cuts,
            steps=positions.steps,
        )
    else:
        chains = _at_once(posterior, shared, lanes, given, positions, shape, mesh)
    done = fetch(_gather(chains, len(group.ids), plan.num_chains, plan.num_draws), mesh)
    return Recorded(
        alive=done.now.alive,
        kept=done.kept[0],
        added=done.added[0],
        looked=Looked(done.kept[1], done.segments, done.added[1]),
        state=done.now.state,
    )


def _settle(posterior: Posterior) -> Posterior:
    """The posterior without Python numbers and weak types, for which all is compiled again."""
    dtype = posterior.weights.dtype
    return replace(
        posterior,
        params=jax.tree.map(lambda x: jnp.asarray(x, x.dtype), posterior.params),
        nbeta=_number(posterior.nbeta, dtype),
        localization=_number(posterior.localization, dtype),
    )


def _number(x: Any, dtype: Any) -> Any:
    return jnp.asarray(x, dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype)


class _Positions(NamedTuple):
    """A run as positions: the steps of its burn-in, then its draws, or segments of them."""

    plan: Plan
    segments: tuple[Segment, ...]
    first_step: int
    first_draw: int

    @property
    def total(self) -> int:
        return self.plan.num_burnin + (len(self.segments) or self.plan.num_draws)

    @property
    def cuts(self) -> list[int]:
        """Where the burn-in ends and groups of draws begin; a segment lies within a group."""
        burnin, plan = self.plan.num_burnin, self.plan
        if self.segments:
            return [burnin]
        starts = -(-np.arange(plan.batches) * plan.num_draws // plan.batches)
        return [burnin, *(burnin + int(d) for d in starts)]

    def steps(self, position: int) -> int:
        """Steps of the sampler before a position."""
        beyond = position - self.plan.num_burnin
        if beyond <= 0:
            return position
        draws = self.segments[beyond - 1].stop if self.segments else beyond
        return self.plan.num_burnin + draws * self.plan.thin

    def chunks(self, begin: int, end: int, slots: int) -> Iterator[tuple[_Chunk, Any]]:
        """Positions [begin, end) as chunks of at most so many draws, with their segments."""
        plan = self.plan
        if begin < plan.num_burnin:
            stop = min(end, plan.num_burnin)
            yield self._chunk(begin, stop - begin, 1, 0, 0), None
        first, last = (max(0, p - plan.num_burnin) for p in (begin, end))
        if self.segments:
            for i in range(first, last):
                start, stop, about = self.segments[i]
                yield self._draws(start, stop), (np.int32(i), about)
            return
        for start in range(first, last, slots):
            yield self._draws(start, min(start + slots, last)), None

    def _draws(self, start: int, stop: int) -> _Chunk:
        return self._chunk(
            self.plan.num_burnin + start * self.plan.thin, self.plan.thin, stop - start, 1, start
        )

    def _chunk(self, step: int, steps: int, pieces: int, record: int, draw: int) -> _Chunk:
        plan = self.plan
        group, before = (d * plan.batches // plan.num_draws for d in (draw, draw - 1))
        numbers = (
            self.first_step + step, steps, pieces, record, self.first_draw + draw,
            int(draw == 0 or group != before), group, draw,
        )  # fmt: skip
        return _Chunk(*(np.int32(x) for x in numbers))


def _carry_out(
    posterior: Posterior,
    shared: Any,
    lanes: Lane,
    positions: _Positions,
    shape: _Shape,
    mesh: Mesh | None,
    chains: _Chains,
    begin: int,
    end: int,
) -> _Chains:
    """Positions [begin, end) of all lanes."""
    kept = jax.tree.leaves(chains.now.kept)
    for chunk, segment in positions.chunks(begin, end, kept[0].shape[1] if kept else _SLOTS):
        chunk, segment = put((chunk, segment), mesh)
        now = _advance(posterior, shared, lanes, chains.now, chunk, shape, mesh)
        seen: PyTree[Array] = ()
        if segment is not None:
            now, seen = _look(posterior, shared, lanes, now, segment, shape, mesh)
        chains = chains._replace(now=now)
        if segment is not None or begin >= positions.plan.num_burnin:
            chains = _file(chains, seen, chunk, None if segment is None else segment[0])
        if segment is not None:
            jax.block_until_ready(chains)  # else segments in flight hold a history each
    return chains


# Programs: of one lane, and of all.


def _begin(
    posterior: Posterior, shared: Any, key: Key[Array, ""], *given: Any, slots: int | None
) -> _Chain:
    """The chain at w*, or where an earlier run left it, with nothing recorded."""
    sampler, recorder, look = shared
    streams = streams_of(key)
    if given:
        state, alive = given
    else:
        state = sampler(posterior).init(posterior.centre, streams.init)
        alive = jnp.asarray(True)
    # Without weak types, which a state that was saved does not have.
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)
    draw = jax.eval_shape(lambda: recorder.value(posterior, state, key, None)[0])
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(draw))
    slots = slots or max(1, min(_SLOTS, _SLOT_BYTES // max(1, size)))
    kept = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), draw)
    history: PyTree[Array] = ()
    if look is not None:
        history = jax.tree.map(lambda x: jnp.broadcast_to(x, (look.history, *x.shape)), state)
    return _Chain(
        state=state,
        alive=alive,
        kept=(kept, () if look is None else look.shapes(posterior)[0]),
        added=_nothing_added(posterior, shared),
        history=history,
    )


def _nothing_added(posterior: Posterior, shared: Any) -> PyTree[Array]:
    _, recorder, look = shared
    return recorder.init(posterior), () if look is None else look.init(posterior)


def _advance_one(
    posterior: Posterior,
    shared: Any,
    key: Key[Array, ""],
    chain: _Chain,
    *,
    chunk: _Chunk,
    batch_size: int | None,
) -> _Chain:
    """`pieces` times: `steps` steps, then a record where one is asked for."""
    sampler, recorder, look = shared
    kernel, streams = build_kernel(posterior, sampler, batch_size), streams_of(key)

    def step(t: Array, carry: Any) -> Any:
        state, history = carry
        if look is not None:  # s_t, from which step t starts, at t mod history
            history = jax.tree.map(lambda ring, x: ring.at[t % look.history].set(x), history, state)
        return kernel.step(jax.random.fold_in(streams.step, t), state), history

    def record(chain: _Chain, before: PyTree[Array], piece: Any) -> _Chain:
        record_key = jax.random.fold_in(streams.record, chunk.draw + piece)
        kept, added = recorder.value(posterior, chain.state, record_key, batch_size)
        alive = chain.alive & all_finite((position_of(chain.state), kept, added))
        draws, accumulators = chain.kept, chain.added
        kept = jax.tree.map(
            lambda slots, x: slots.at[piece].set(jnp.where(alive, x, jnp.nan)), draws[0], kept
        )
        updated = recorder.update(accumulators[0], added)
        return chain._replace(
            # A chain with a history is not frozen: its states are not looked at any more.
            state=chain.state if look is not None else where_alive(alive, chain.state, before),
            alive=alive,
            kept=(kept, draws[1]),
            added=(where_alive(alive, updated, accumulators[0]), accumulators[1]),
        )

    def piece(p: Any, chain: _Chain) -> _Chain:
        first = chunk.step + p * chunk.steps
        state, history = jax.lax.fori_loop(
            0, chunk.steps, lambda i, carry: step(first + i, carry), (chain.state, chain.history)
        )
        moved = chain._replace(state=state, history=history)
        # A loop of no or one turn, where a branch would copy what it may change.
        return jax.lax.fori_loop(
            0, chunk.record, lambda _, moved: record(moved, chain.state, p), moved
        )

    fresh = jnp.asarray(chunk.fresh, bool)
    chain = chain._replace(added=where_alive(fresh, _nothing_added(posterior, shared), chain.added))
    return jax.lax.fori_loop(0, chunk.pieces, piece, chain)


def _look_one(
    posterior: Posterior,
    shared: Any,
    key: Key[Array, ""],
    chain: _Chain,
    *,
    segment: Any,
    batch_size: int | None,
) -> tuple[_Chain, PyTree[Array]]:
    """The look back at the end of a segment."""
    sampler, _, look = shared
    index, about = segment
    past = Past(
        posterior, sampler, batch_size, streams_of(key), chain.history, chain.state, about, index
    )
    kept, added = chain.kept, chain.added
    glance = look.back(past, added[1])
    alive = chain.alive & glance.finite & all_finite(position_of(chain.state))
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), glance.draws)
    zero = jax.tree.map(jnp.zeros_like, glance.segment)
    chain = chain._replace(
        alive=alive,
        kept=(kept[0], where_alive(alive, glance.draws, nan)),
        added=(added[0], where_alive(alive, glance.accumulator, added[1])),
    )
    return chain, where_alive(alive, glance.segment, zero)


def _file_one(chains: _Chains, seen: PyTree[Array], chunk: _Chunk, segment: Any) -> _Chains:
    """What a chunk left goes where it belongs; what is written too much is overwritten later."""
    now, kept, added, segments = chains

    def write(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, chunk.offset, 0)

    return _Chains(
        now=now,
        kept=jax.tree.map(write, kept, now.kept),
        added=jax.tree.map(lambda whole, x: whole.at[chunk.group].set(x), added, now.added),
        segments=jax.tree.map(lambda whole, x: whole.at[segment].set(x), segments, seen),
    )


@partial(jax.jit, static_argnames=("shape", "mesh"))
def _start(
    posterior: Posterior, shared: Any, lanes: Lane, given: Any, shape: _Shape, mesh: Mesh | None
) -> tuple[_Chain, PyTree[Array]]:
    """All chains, and the values of a segment, still empty."""

    def begin(p: Posterior, shared: Any, key: Key[Array, ""], *given: Any) -> Any:
        look = shared[2]
        seen = () if look is None else look.shapes(p)[1]
        return _begin(p, shared, key, *given, slots=shape.slots), seen

    return over_chains(begin, posterior, shared, lanes, shape.at_once, mesh)(*given)


@partial(jax.jit, static_argnames=("shape", "mesh"), donate_argnames="chains")
def _advance(
    posterior: Posterior,
    shared: Any,
    lanes: Lane,
    chains: _Chain,
    chunk: _Chunk,
    shape: _Shape,
    mesh: Mesh | None,
) -> _Chain:
    def one(p: Posterior, rest: Any, key: Key[Array, ""], chain: _Chain) -> _Chain:
        shared, chunk = rest
        return _advance_one(p, shared, key, chain, chunk=chunk, batch_size=shape.batch_size)

    return over_chains(one, posterior, (shared, chunk), lanes, shape.at_once, mesh)(chains)


@partial(jax.jit, static_argnames=("shape", "mesh"), donate_argnames="chains")
def _look(
    posterior: Posterior,
    shared: Any,
    lanes: Lane,
    chains: _Chain,
    segment: Any,
    shape: _Shape,
    mesh: Mesh | None,
) -> tuple[_Chain, PyTree[Array]]:
    def one(p: Posterior, rest: Any, key: Key[Array, ""], chain: _Chain) -> Any:
        shared, segment = rest
        return _look_one(p, shared, key, chain, segment=segment, batch_size=shape.batch_size)

    return over_chains(one, posterior, (shared, segment), lanes, shape.at_once, mesh)(chains)


@partial(jax.jit, donate_argnames="chains")
def _file(chains: _Chains, seen: PyTree[Array], chunk: _Chunk, segment: Any) -> _Chains:
    return jax.vmap(lambda chains, seen: _file_one(chains, seen, chunk, segment))(chains, seen)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _gather(chains: _Chains, components: int, num_chains: int, num_draws: int) -> _Chains:
    """`[component, chain, ...]`, without what fills up devices and the draws beyond the last."""
    kept = jax.tree.map(lambda leaf: leaf[:, :num_draws], chains.kept)
    return unpack(_final(chains)._replace(kept=kept), components, num_chains)


def _final(chains: _Chains) -> _Chains:
    """What is needed of chains that are done."""
    return chains._replace(now=chains.now._replace(kept=(), added=(), history=()))


def _empty(
    started: tuple[_Chain, PyTree[Array]], positions: _Positions, mesh: Mesh | None
) -> _Chains:
    """Chains that have left nothing yet. NumPy makes the zeros: a program less to compile."""
    now, seen = started
    plan = positions.plan

    def zeros(leaf: Array, length: int, inner: int) -> Any:
        shape = (leaf.shape[0], length, *leaf.shape[inner:])
        whole = np.zeros(shape, leaf.dtype) if is_concrete(leaf) else jnp.zeros(shape, leaf.dtype)
        return jnp.asarray(whole) if mesh is None else put(whole, mesh, "chain")

    return _Chains(
        now=now,
        # A chunk is filed whole: past the last draw there is room for its empty slots.
        kept=jax.tree.map(lambda x: zeros(x, plan.num_draws + x.shape[1], 2), now.kept),
        added=jax.tree.map(lambda x: zeros(x, plan.batches, 1), now.added),
        segments=jax.tree.map(lambda x: zeros(x, len(positions.segments), 1), seen),
    )


def _at_once(
    posterior: Posterior,
    shared: Any,
    lanes: Lane,
    given: Any,
    positions: _Positions,
    shape: _Shape,
    mesh: Mesh | None,
) -> _Chains:
    """A whole run within a transformation. Without a look back all loops have a static length,
    so that reverse mode can run through them.
    """
    plan, looks = positions.plan, bool(positions.segments)
    slots = shape.slots if looks else 1
    started = _start(posterior, shared, lanes, given, shape._replace(slots=slots), mesh)
    burnin = positions._chunk(0, 0, 1, 0, 0)
    burnin = burnin._replace(steps=plan.num_burnin, pieces=1, record=0)

    def one(p: Posterior, shared: Any, key: Key[Array, ""], now: _Chain, rest: Any) -> _Chains:
        advance = partial(_advance_one, p, shared, key, batch_size=plan.batch_size)
        chains = _Chains(advance(now, chunk=burnin), *rest)

        def draw(chains: _Chains, x: Any) -> tuple[_Chains, None]:
            chunk, segment = x
            seen: PyTree[Array] = ()
            if looks:
                now = advance(chains.now, chunk=chunk)
                now, seen = _look_one(
                    p, shared, key, now, segment=segment, batch_size=plan.batch_size
                )
            else:
                static = chunk._replace(steps=plan.thin, pieces=1, record=1)
                now = advance(chains.now, chunk=static)
            index = segment[0] if looks else None
            return _file_one(chains._replace(now=now), seen, chunk, index), None

        every = list(positions.chunks(plan.num_burnin, positions.total, 1))
        xs = jax.tree.map(lambda *leaves: np.stack(leaves), *every)
        return jax.lax.scan(draw, chains, xs)[0]

    empty = _empty(started, positions, None)
    return over_chains(one, posterior, shared, lanes, plan.chains_at_once, mesh)(
        empty.now, tuple(empty[1:])
    )
