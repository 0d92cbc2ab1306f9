"""The loop of a run: chains advance in chunks, draws are recorded, lost chains are left out.

A chain runs `num_burnin` steps, then `num_draws` times `thin` steps and a record. Three small
programs do it, for all lanes at once: `advance` carries chains through a chunk, `look_back` sweeps
back over a segment where the run asks for it, `file` puts what was recorded where it belongs.
Lengths are arguments of `advance` and not part of it: another burn-in, number of draws, thinning
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

from jaxpattern.chains.lanes import Chorus, ComponentGroup, make_lanes, over_chains
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.programs import (
    SLOTS,
    Chain,
    Chains,
    Chunk,
    Shape,
    advance,
    advance_one,
    file,
    file_one,
    final,
    gather,
    look_back,
    look_one,
    shape_of,
    start,
)
from jaxpattern.chains.record import Look, Recorder
from jaxpattern.chains.run import Run
from jaxpattern.posterior import Posterior
from jaxpattern.runtime.host import Host
from jaxpattern.runtime.mesh import fetch, pad_lanes, put
from jaxpattern.validation import is_concrete, is_traced


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
    """Chains to go on from: sampler states `[chain, ...]`, who is alive, steps and draws so far."""

    state: PyTree[Array]
    alive: Bool[Array, " chains"]
    steps: int
    draws: int


class Segment(NamedTuple):
    """Draws that a `Look` sweeps over together, and whatever it wants to know of them."""

    start: int
    stop: int
    about: Any = ()


def run_chains(
    run: Run,
    recorder: Recorder,
    host: Host,
    group: ComponentGroup | None = None,
    *,
    look: Look | None = None,
    segments: Sequence[Segment] = (),
    antithetic: bool = False,
    initial: States | None = None,
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
        initial: chains of an earlier run to go on from, of a group of one.
        label: what the progress line says.
    """
    group = group or ComponentGroup()
    plan, mesh = run.plan, host.mesh
    shared = put((run.key, _settle(run.posterior), (run.sampler, recorder, look)), mesh)
    chorus = Chorus(*shared, put(make_lanes(group, plan, antithetic, mesh), mesh, "chain"))
    positions = _Positions(plan, tuple(segments), *((0, 0) if initial is None else initial[2:]))
    given = () if initial is None else put(pad_lanes(tuple(initial[:2]), mesh), mesh, "chain")
    shape = shape_of(plan, mesh, (run.sampler, recorder, look))
    if not is_traced(chorus, given):
        chains = host.loop(
            label,
            positions.total,
            lambda: _empty(start(chorus, given, shape), positions, mesh),
            partial(_carry_out, chorus, positions, shape),
            final=final,
            lanes=len(group.ids) * plan.num_chains,
            cuts=positions.cuts,
            steps=positions.steps,
        )
    else:
        chains = _at_once(chorus, given, positions, shape)
    done = fetch(gather(chains, len(group.ids), plan.num_chains, plan.num_draws), mesh)
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
    if isinstance(x, jax.Array):
        return x.astype(dtype)
    return jax.device_put(np.asarray(x, dtype))


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

    def chunks(self, begin: int, end: int, slots: int) -> Iterator[tuple[Chunk, Any]]:
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

    def _draws(self, start: int, stop: int) -> Chunk:
        return self._chunk(
            self.plan.num_burnin + start * self.plan.thin, self.plan.thin, stop - start, 1, start
        )

    def _chunk(self, step: int, steps: int, pieces: int, record: int, draw: int) -> Chunk:
        plan = self.plan
        group, before = (d * plan.batches // plan.num_draws for d in (draw, draw - 1))
        numbers = (
            self.first_step + step, steps, pieces, record, self.first_draw + draw,
            int(draw == 0 or group != before), group, draw,
        )  # fmt: skip
        return Chunk(*(np.int32(x) for x in numbers))


def _carry_out(
    chorus: Chorus, positions: _Positions, shape: Shape, chains: Chains, begin: int, end: int
) -> Chains:
    """Positions [begin, end) of all lanes."""
    kept = jax.tree.leaves(chains.now.kept)
    for chunk, segment in positions.chunks(begin, end, kept[0].shape[1] if kept else SLOTS):
        chunk, segment = put((chunk, segment), shape.mesh)
        now = advance(chorus, chains.now, chunk, shape)
        seen: PyTree[Array] = ()
        if segment is not None:
            now, seen = look_back(chorus, now, segment, shape)
        chains = chains._replace(now=now)
        if segment is not None or begin >= positions.plan.num_burnin:
            chains = file(chains, seen, chunk, None if segment is None else segment[0])
        if segment is not None:
            jax.block_until_ready(chains)  # else segments in flight hold a history each
    return chains


def _empty(
    started: tuple[Chain, PyTree[Array]], positions: _Positions, mesh: Mesh | None
) -> Chains:
    """Chains that have left nothing yet. NumPy makes the zeros: a program less to compile."""
    now, seen = started
    plan = positions.plan

    def zeros(leaf: Array, length: int, inner: int) -> Any:
        shape = (leaf.shape[0], length, *leaf.shape[inner:])
        whole = np.zeros(shape, leaf.dtype) if is_concrete(leaf) else jnp.zeros(shape, leaf.dtype)
        if is_concrete(leaf) and mesh is None:
            return jax.device_put(whole)
        return put(whole, mesh, "chain")

    return Chains(
        now=now,
        # A chunk is filed whole: past the last draw there is room for its empty slots.
        kept=jax.tree.map(lambda x: zeros(x, plan.num_draws + x.shape[1], 2), now.kept),
        added=jax.tree.map(lambda x: zeros(x, plan.batches, 1), now.added),
        segments=jax.tree.map(lambda x: zeros(x, len(positions.segments), 1), seen),
    )


def _at_once(chorus: Chorus, given: Any, positions: _Positions, shape: Shape) -> Chains:
    """A whole run within a transformation. Without a look back all loops have a static length,
    so that reverse mode can run through them.
    """
    plan, looks = positions.plan, bool(positions.segments)
    slots = shape.slots if looks else 1
    started = start(chorus, given, shape._replace(slots=slots))
    burnin = positions._chunk(0, 0, 1, 0, 0)
    burnin = burnin._replace(steps=plan.num_burnin, pieces=1, record=0)

    def one(
        p: Posterior, shared: Any, key: Key[Array, ""], extra: Any, now: Chain, rest: Any
    ) -> Chains:
        del extra
        onward = partial(advance_one, p, shared, key, batch_size=plan.batch_size)
        chains = Chains(onward(now, chunk=burnin), *rest)

        def draw(chains: Chains, x: Any) -> tuple[Chains, None]:
            chunk, segment = x
            seen: PyTree[Array] = ()
            if looks:
                now = onward(chains.now, chunk=chunk)
                now, seen = look_one(
                    p, shared, key, now, segment=segment, batch_size=plan.batch_size
                )
            else:
                static = chunk._replace(steps=plan.thin, pieces=1, record=1)
                now = onward(chains.now, chunk=static)
            index = segment[0] if looks else None
            return file_one(chains._replace(now=now), seen, chunk, index), None

        every = list(positions.chunks(plan.num_burnin, positions.total, 1))
        xs = jax.tree.map(lambda *leaves: np.stack(leaves), *every)
        return jax.lax.scan(draw, chains, xs)[0]

    empty = _empty(started, positions, None)
    over = over_chains(one, chorus, (), shape.at_once, shape.mesh)
    return over(empty.now, tuple(empty[1:]))
