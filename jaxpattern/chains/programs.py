"""The programs of a run: of one chain, and jitted of all lanes.

`advance` carries chains through a chunk, `look` sweeps back over a segment where the run asks for
it, `file` puts what was recorded where it belongs. Lengths are arguments of `advance` and not part
of it: another burn-in, number of draws, thinning or grouping of the draws compiles no model again.
A burn-in is a chunk without a record, so the sampler's step is in one program, once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key, PyTree

from jaxpattern.chains.divergence import all_finite
from jaxpattern.chains.kernel import Streams, build_kernel, position_of, streams_of
from jaxpattern.chains.lanes import Chorus, over_chains, unpack
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.record import where_alive
from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import node_types
from jaxpattern.samplers import Sampler

SLOTS = 64
_SLOT_BYTES = 2**22


class Past(NamedTuple):
    """What a look back sees of one chain: `states` is a ring in which step t is at t mod history.

    `about` is what the segment says of itself, `last` the present state, `streams` the chain's
    random streams, `number` that of the segment.
    """

    posterior: Posterior
    sampler: Sampler
    batch_size: int | None
    streams: Streams
    states: PyTree[Array]
    last: PyTree[Array]
    about: Any
    number: Array


class Shape(NamedTuple):
    """What makes a program another one."""

    mesh: Mesh | None
    batch_size: int | None
    at_once: int | None
    slots: int | None  # draws that a chain holds until they are filed; None: by their size
    types: tuple[type, ...]  # of sampler, recorder and look


def shape_of(plan: Plan, mesh: Mesh | None, shared: Any) -> Shape:
    """The shape of a run's programs; `shared` are sampler, recorder and look."""
    look = shared[2]
    slots = None if look is None else look.slots
    return Shape(mesh, plan.batch_size, plan.chains_at_once, slots, node_types(shared))


class Chunk(NamedTuple):
    """`pieces` times `steps` steps from `step` on, each with `record` (0 or 1) draws after it."""

    step: Any
    steps: Any
    pieces: Any
    record: Any
    draw: Any
    fresh: Any  # whether a group of draws begins
    group: Any
    offset: Any  # where the draws are filed


class Chain(NamedTuple):
    """A chain between two chunks."""

    state: PyTree[Array]
    alive: Bool[Array, "*lanes"]
    kept: PyTree[Array]
    added: PyTree[Array]
    history: PyTree[Array]


class Chains(NamedTuple):
    """What is carried from chunk to chunk: chains, and all they left so far, `[lane, ...]`."""

    now: Chain
    kept: PyTree[Array]
    added: PyTree[Array]
    segments: PyTree[Array]


# Programs: of one lane, and of all.


def _begin(
    posterior: Posterior, shared: Any, key: Key[Array, ""], *given: Any, slots: int | None
) -> Chain:
    """The chain at w*, or where an earlier run left it, with nothing recorded."""
    sampler, recorder, look = shared
    streams = streams_of(key)
    if given:
        state, alive = given
    else:
        state = sampler(posterior).init(posterior.center, streams.init)
        alive = jnp.asarray(True)
    # Without weak types, which a state that was saved does not have.
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)
    draw = jax.eval_shape(lambda: recorder.value(posterior, state, key, None)[0])
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(draw))
    slots = slots or max(1, min(SLOTS, _SLOT_BYTES // max(1, size)))
    kept = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), draw)
    history: PyTree[Array] = ()
    if look is not None:
        history = jax.tree.map(lambda x: jnp.broadcast_to(x, (look.history, *x.shape)), state)
    return Chain(
        state=state,
        alive=alive,
        kept=(kept, () if look is None else look.shapes(posterior)[0]),
        added=_nothing_added(posterior, shared),
        history=history,
    )


def _nothing_added(posterior: Posterior, shared: Any) -> PyTree[Array]:
    _, recorder, look = shared
    return recorder.init(posterior), () if look is None else look.init(posterior)


def advance_one(
    posterior: Posterior,
    shared: Any,
    key: Key[Array, ""],
    chain: Chain,
    *,
    chunk: Chunk,
    batch_size: int | None,
) -> Chain:
    """`pieces` times: `steps` steps, then a record where one is asked for."""
    sampler, recorder, look = shared
    kernel, streams = build_kernel(posterior, sampler, batch_size), streams_of(key)

    def step(t: Array, carry: Any) -> Any:
        state, history = carry
        if look is not None:  # s_t, from which step t starts, at t mod history
            history = jax.tree.map(lambda ring, x: ring.at[t % look.history].set(x), history, state)
        return kernel.step(jax.random.fold_in(streams.step, t), state), history

    def record(chain: Chain, before: PyTree[Array], piece: Any) -> Chain:
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

    def piece(p: Any, chain: Chain) -> Chain:
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


def look_one(
    posterior: Posterior,
    shared: Any,
    key: Key[Array, ""],
    chain: Chain,
    *,
    segment: Any,
    batch_size: int | None,
) -> tuple[Chain, PyTree[Array]]:
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


def file_one(chains: Chains, seen: PyTree[Array], chunk: Chunk, segment: Any) -> Chains:
    """What a chunk left goes where it belongs; what is written too much is overwritten later."""
    now, kept, added, segments = chains

    def write(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, chunk.offset, 0)

    return Chains(
        now=now,
        kept=jax.tree.map(write, kept, now.kept),
        added=jax.tree.map(lambda whole, x: whole.at[chunk.group].set(x), added, now.added),
        segments=jax.tree.map(lambda whole, x: whole.at[segment].set(x), segments, seen),
    )


@partial(jax.jit, static_argnames="shape")
def start(chorus: Chorus, given: Any, shape: Shape) -> tuple[Chain, PyTree[Array]]:
    """All chains, and the values of a segment, still empty."""

    def begin(p: Posterior, shared: Any, key: Key[Array, ""], extra: Any, *given: Any) -> Any:
        del extra
        look = shared[2]
        seen = () if look is None else look.shapes(p)[1]
        return _begin(p, shared, key, *given, slots=shape.slots), seen

    return over_chains(begin, chorus, (), shape.at_once, shape.mesh)(*given)


@partial(jax.jit, static_argnames="shape", donate_argnames="chains")
def advance(chorus: Chorus, chains: Chain, chunk: Chunk, shape: Shape) -> Chain:
    """All chains through a chunk, whose lengths are arguments of the program."""

    def one(p: Posterior, shared: Any, key: Key[Array, ""], chunk: Chunk, chain: Chain) -> Chain:
        return advance_one(p, shared, key, chain, chunk=chunk, batch_size=shape.batch_size)

    return over_chains(one, chorus, chunk, shape.at_once, shape.mesh)(chains)


@partial(jax.jit, static_argnames="shape", donate_argnames="chains")
def look_back(
    chorus: Chorus, chains: Chain, segment: Any, shape: Shape
) -> tuple[Chain, PyTree[Array]]:
    """The look back of all chains at the end of a segment, and what it keeps of the segment."""

    def one(p: Posterior, shared: Any, key: Key[Array, ""], segment: Any, chain: Chain) -> Any:
        return look_one(p, shared, key, chain, segment=segment, batch_size=shape.batch_size)

    return over_chains(one, chorus, segment, shape.at_once, shape.mesh)(chains)


@partial(jax.jit, donate_argnames="chains")
def file(chains: Chains, seen: PyTree[Array], chunk: Chunk, segment: Any) -> Chains:
    """What a chunk left, of all chains, put where it belongs."""
    return jax.vmap(lambda chains, seen: file_one(chains, seen, chunk, segment))(chains, seen)


@partial(jax.jit, static_argnums=(1, 2, 3))
def gather(chains: Chains, components: int, num_chains: int, num_draws: int) -> Chains:
    """`[component, chain, ...]`, without what fills up devices and the draws beyond the last."""
    kept = jax.tree.map(lambda leaf: leaf[:, :num_draws], chains.kept)
    return unpack(final(chains)._replace(kept=kept), components, num_chains)


def final(chains: Chains) -> Chains:
    """What is needed of chains that are done."""
    return chains._replace(now=chains.now._replace(kept=(), added=(), history=()))
