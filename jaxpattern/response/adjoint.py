"""The adjoint of a chain: segments run forwards, and swept backwards from their draws.

The mathematics is in `jaxpattern.response.pathwise`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key, PyTree
from tqdm import tqdm

from jaxpattern.diagnostics import batch_of
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.response.problem import ComponentGroup, Problem
from jaxpattern.response.step import GivenGradient, floats_of
from jaxpattern.runtime.checkpoint import Store
from jaxpattern.runtime.mesh import fetch, is_first_process, pad_lanes, put
from jaxpattern.sampling import (
    Plan,
    all_finite,
    build_kernel,
    burn_in,
    make_lanes,
    over_chains,
    position_of,
    streams_of,
    unpack,
)
from jaxpattern.types import Position
from jaxpattern.validation import is_concrete


class Layout(NamedTuple):
    """How a chain is cut: all static.

    A segment holds `draws` draws, `thin` steps apart; its buffer holds the states before the last
    `length` steps, the first `window` of which lie before the first draw.
    """

    window: int
    every: int
    thin: int
    draws: int
    num_segments: int
    direct: bool
    batches: int
    antithetic: bool
    hessian_batch: int | None
    reference_batch: int | None

    @property
    def length(self) -> int:
        return self.window + (self.draws - 1) * self.thin

    @property
    def steps(self) -> int:
        """New steps of a segment."""
        return self.draws * self.thin

    @property
    def lead(self) -> int:
        """Steps of a segment that no window reaches."""
        return max(0, self.steps - self.length)

    @property
    def keep(self) -> int:
        """States that the segment before hands on."""
        return max(0, self.length - self.steps)

    @property
    def blocks(self) -> int:
        return self.length // self.every

    @property
    def tail_blocks(self) -> int:
        return self.window // self.every


class AdjointChain(NamedTuple):
    """A chain between two segments."""

    state: PyTree[Array]
    buffer: PyTree[Array]
    alive: Bool[Array, "*chains"]
    sums: dict[str, Array]
    counts: Array
    trace: Array
    growth: Array
    truncated: Array
    remainder: Array
    tail: Array


def _start(
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    problem: Problem,
    layout: Layout,
    state: PyTree[Array],
    key: Key[Array, ""],
) -> AdjointChain:
    """The chain after the last steps of its burn-in, with the states before them."""
    kernel, streams = build_kernel(posterior, sampler, plan), streams_of(key)
    step = lambda t, state: kernel.step(jax.random.fold_in(streams.step, t), state)  # noqa: E731
    recorded = min(layout.keep, plan.num_burnin)

    def record(state: PyTree[Array], t: Array) -> tuple[PyTree[Array], PyTree[Array]]:
        return step(t, state), state

    first = state
    state, states = jax.lax.scan(
        record, state, jnp.arange(plan.num_burnin - recorded, plan.num_burnin)
    )
    missing = layout.keep - recorded
    buffer = jax.tree.map(
        lambda s, old: jnp.concatenate([jnp.broadcast_to(s, (missing, *s.shape)), old]),
        first,
        states,
    )
    rows = problem.num_rows
    dtype = problem.offsets.dtype
    return AdjointChain(
        state=state,
        buffer=buffer,
        alive=jnp.asarray(True),
        sums={
            name: jnp.zeros((layout.batches, rows, *losses.shape), losses.dtype)
            for name, losses in problem.probe_baseline.items()
        },
        counts=jnp.zeros(layout.batches, dtype),
        trace=jnp.full((plan.num_draws, rows), jnp.nan, dtype),
        growth=jnp.zeros((layout.num_segments, rows), dtype),
        truncated=jnp.zeros((layout.num_segments, rows), bool),
        remainder=jnp.zeros(rows, dtype),
        tail=jnp.zeros((rows, layout.tail_blocks), dtype),
    )


class _Sweep(NamedTuple):
    """A backward sweep between two blocks."""

    adjoint: list[Array]
    after: PyTree[Array]
    sources: Array
    growth: Array
    at_draw: Array
    whole: Array
    total: dict[str, Array]


def _segment(
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    problem: Problem,
    layout: Layout,
    growth_limit: Any,
    chain: AdjointChain,
    key: Key[Array, ""],
    index: Array,
) -> AdjointChain:
    """Run one segment forwards and sweep it backwards."""
    kernel, streams = build_kernel(posterior, sampler, plan), streams_of(key)
    first = plan.num_burnin + index * layout.steps
    stop = first + layout.steps

    def forward(state: PyTree[Array], t: Array) -> tuple[PyTree[Array], PyTree[Array]]:
        return kernel.step(jax.random.fold_in(streams.step, t), state), state

    state = chain.state
    if layout.lead:
        state = jax.lax.fori_loop(first, first + layout.lead, lambda t, s: forward(s, t)[0], state)
    state, states = jax.lax.scan(forward, state, first + jnp.arange(layout.lead, layout.steps))
    states = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), chain.buffer, states)
    sweeper = _Sweeper(
        posterior, sampler, plan, problem, layout, growth_limit,
        streams.step, jax.random.fold_in(streams.record, index),
    )  # fmt: skip
    remainder, values, sweep, tail = sweeper.run(states, state, stop)
    alive = chain.alive & all_finite((position_of(state), values, sweep.total))
    batch = batch_of(index, layout.num_segments, layout.batches)

    def keep(new: Array, old: Array | float) -> Array:
        return jnp.where(alive, new, old)

    return AdjointChain(
        state=jax.tree.map(keep, state, chain.state),
        buffer=jax.tree.map(
            lambda new, old: keep(new[new.shape[0] - layout.keep :], old), states, chain.buffer
        ),
        alive=alive,
        sums=jax.tree.map(lambda s, x: s.at[batch].add(keep(x, 0.0)), chain.sums, sweep.total),
        counts=chain.counts.at[batch].add(keep(jnp.asarray(layout.draws, chain.counts.dtype), 0.0)),
        trace=jax.lax.dynamic_update_slice_in_dim(
            chain.trace, keep(values, jnp.nan), index * layout.draws, 0
        ),
        growth=chain.growth.at[index].set(keep(sweep.growth, 0.0)),
        truncated=chain.truncated.at[index].set(~sweep.whole & alive),
        remainder=chain.remainder + keep(remainder, 0.0) / layout.num_segments,
        tail=chain.tail + keep(tail, 0.0) / layout.num_segments,
    )


class _Sweeper(NamedTuple):
    """What a backward sweep is given, and its pieces."""

    posterior: Posterior
    sampler: Any
    plan: Plan
    problem: Problem
    layout: Layout
    growth_limit: Any
    step_key: Key[Array, ""]
    choice_key: Key[Array, ""]

    def source(self, state: PyTree[Array]) -> tuple[Array, list[Array]]:
        """φ − φ(w*) and ∂φ/∂s of all rows."""
        floats = floats_of(state)

        def phi(leaves: list[Array]) -> Array:
            return self.problem.rows_at(self.posterior, position_of(floats.rebuild(leaves)))

        values, pull = jax.vjp(phi, floats.leaves)
        (gradients,) = jax.vmap(pull)(jnp.eye(self.problem.num_rows, dtype=values.dtype))
        return values, gradients

    def step_back(
        self, adjoint: list[Array], state: PyTree[Array], t: Array
    ) -> tuple[list[Array], Position]:
        """λ_{t+1} → λ_t and c_t, for all rows."""
        posterior = self.posterior
        batch_key, noise_key = jax.random.split(jax.random.fold_in(self.step_key, t))
        minibatch = posterior.minibatch(batch_key, self.plan.batch_size)
        part = self.curvature_part(minibatch, batch_key)
        floats = floats_of(state)
        gradient = posterior.loss_gradient(position_of(state), minibatch)
        hessian = _differential(lambda w: posterior.loss_gradient(w, part), position_of(state))
        given = self.sampler(GivenGradient(posterior))

        def move(leaves: list[Array], gradient: Position) -> list[Array]:
            return floats_of(given.step(noise_key, floats.rebuild(leaves), gradient)).leaves

        _, pull = jax.vjp(move, floats.leaves, gradient)
        _, pull_position = jax.vjp(
            lambda leaves: position_of(floats.rebuild(leaves)), floats.leaves
        )

        def one(adjoint: list[Array]) -> tuple[list[Array], Position]:
            direct, push = pull(adjoint)
            (through,) = pull_position(hessian(push)[1])
            return jax.tree.map(jnp.add, direct, through), push

        return jax.vmap(one)(adjoint)

    def curvature_part(self, minibatch: Minibatch, batch_key: Key[Array, ""]) -> Minibatch:
        """The samples behind H, which is H_B on average whatever the chain did.

        The first samples of a mini-batch are a random part of it; all the data are not.
        """
        size = self.layout.hessian_batch
        if size is None:
            return minibatch
        if self.plan.batch_size is None:
            return self.posterior.minibatch(jax.random.fold_in(batch_key, 1), size)
        return jax.tree.map(lambda x: x[:size], minibatch)

    def columns(
        self, position: Position, index: Array
    ) -> Callable[[Position], tuple[dict[str, Array], dict[str, Array]]]:
        """D_z − D_z(w*) of every probe and its derivative, as a function of the direction."""

        def deviations(position: Position) -> dict[str, Array]:
            size = self.layout.reference_batch
            if size is None:
                return self.problem.columns(self.posterior, position)[1]
            # L of fresh samples, without bias: λ does not depend on them.
            key = jax.random.fold_in(self.choice_key, 1 + index)
            excess = self.posterior.loss(position, self.posterior.minibatch(key, size))
            return self.problem.columns(self.posterior, position, excess)[1]

        return _differential(deviations, position)

    def block(self, sweep: _Sweep, x: Any) -> tuple[_Sweep, tuple[Array, Array]]:
        """`every` steps back, with the draw behind them if there is one, and the probes once."""
        layout, problem = self.layout, self.problem
        states, times, draw_after, chosen, index = x

        def add_source(sweep: _Sweep) -> tuple[_Sweep, Array]:
            values, gradients = self.source(sweep.after)
            adjoint = jax.tree.map(jnp.add, sweep.adjoint, gradients)
            return sweep._replace(
                adjoint=adjoint,
                sources=sweep.sources + _norm(gradients, sweep.after),
                at_draw=_norm(adjoint, sweep.after),
            ), values

        def nothing(sweep: _Sweep) -> tuple[_Sweep, Array]:
            return sweep, jnp.full(problem.num_rows, jnp.nan, problem.offsets.dtype)

        sweep, values = jax.lax.cond(draw_after, add_source, nothing, sweep)

        def back(carry: Any, x: Any) -> tuple[Any, None]:
            adjoint, push, position = carry
            state, t, i = x
            before, now = self.step_back(adjoint, state, t)
            real, pick = t >= 0, i == chosen
            adjoint = jax.tree.map(partial(jnp.where, real), before, adjoint)
            push = jax.tree.map(lambda c, old: jnp.where(pick & real, c, old), now, push)
            position = jax.tree.map(partial(jnp.where, pick), position_of(state), position)
            return (adjoint, push, position), None

        after = position_of(sweep.after)
        zero = jax.tree.map(lambda w: jnp.zeros((problem.num_rows, *w.shape), w.dtype), after)
        (adjoint, push, position), _ = jax.lax.scan(
            back, (sweep.adjoint, zero, after), (states, times, jnp.arange(layout.every)),
            reverse=True,
        )  # fmt: skip
        growth = _norm(adjoint, sweep.after) / jnp.maximum(sweep.sources, 1e-30)
        whole = sweep.whole & ~(growth > self.growth_limit)
        adjoint, push = jax.tree.map(lambda leaf: _rowwise(whole, leaf, 0.0), (adjoint, push))

        differential = jax.vmap(self.columns(position, index), out_axes=(None, 0))
        level, added = differential(push)
        scale = layout.every / self.posterior.nbeta
        added = jax.tree.map(lambda x: scale * x, added)
        size = _size(added)
        if layout.direct:
            share = layout.draws / layout.blocks / self.posterior.nbeta
            added = jax.tree.map(lambda x, d: x + share * d[None], added, level)
        return sweep._replace(
            adjoint=adjoint,
            after=jax.tree.map(lambda leaf: leaf[0], states),
            growth=jnp.maximum(sweep.growth, growth),
            whole=whole,
            total=jax.tree.map(jnp.add, sweep.total, added),
        ), (values, size)

    def run(
        self, states: PyTree[Array], last: PyTree[Array], stop: Array
    ) -> tuple[Array, Array, _Sweep, Array]:
        """Sweep over the states before the steps that end at `stop` in the state `last`.

        Returns:
            What is left of λ, φ at the draws, the end of the sweep, and the tail by block.
        """
        problem, layout = self.problem, self.layout
        num_rows, dtype = problem.num_rows, problem.offsets.dtype
        shape = (layout.blocks, layout.every)
        after_window = layout.every * (1 + jnp.arange(layout.blocks)) - layout.window
        # A step of each block; a twin takes the opposite one, and what is linear in it cancels.
        chosen = jax.random.randint(
            jax.random.fold_in(self.choice_key, 0), (layout.blocks,), 0, layout.every
        )
        if self.posterior.mirror is not None:
            chosen = jnp.where(self.posterior.mirror < 0, layout.every - 1 - chosen, chosen)
        start = _Sweep(
            adjoint=[
                jnp.zeros((num_rows, *leaf.shape), leaf.dtype) for leaf in floats_of(last).leaves
            ],
            after=last,
            sources=jnp.zeros(num_rows, dtype),
            growth=jnp.zeros(num_rows, dtype),
            at_draw=jnp.ones(num_rows, dtype),
            whole=jnp.ones(num_rows, bool),
            total={
                name: jnp.zeros((num_rows, *losses.shape), losses.dtype)
                for name, losses in problem.probe_baseline.items()
            },
        )
        blocks = (
            jax.tree.map(lambda s: s.reshape(*shape, *s.shape[1:]), states),
            (stop - layout.length + jnp.arange(layout.length)).reshape(shape),
            (after_window >= 0) & (after_window % layout.thin == 0),
            chosen,
            jnp.arange(layout.blocks),
        )
        end, (values, sizes) = jax.lax.scan(self.block, start, blocks, reverse=True)
        drawn = layout.tail_blocks - 1 + (layout.thin // layout.every) * jnp.arange(layout.draws)
        tail = sizes[: layout.tail_blocks][::-1].T / jnp.maximum(_size(end.total)[:, None], 1e-30)
        remainder = _norm(end.adjoint, last) / jnp.maximum(end.at_draw, 1e-30)
        return remainder, values[drawn], end, tail


def _differential(function: Callable[[Position], Any], at: Position) -> Callable[[Position], Any]:
    """`direction -> (value, derivative along it)`, which keeps nothing of a pass for the next.

    What `jax.linearize` keeps would grow with the samples, however small a chunk of them is.
    """
    return lambda direction: jax.jvp(function, (at,), (direction,))


def _norm(adjoint: list[Array], state: PyTree[Array]) -> Array:
    """‖λ‖ of the position, by row."""
    rebuild = floats_of(state).rebuild
    return jax.vmap(lambda leaves: optax.tree.norm(position_of(rebuild(leaves))))(adjoint)


def _size(total: dict[str, Array]) -> Array:
    """Root of the sum of squares over all columns, by row."""
    squares = [jnp.sum(x**2, axis=tuple(range(1, x.ndim))) for x in total.values()]
    return jnp.sqrt(sum(squares))


def _rowwise(keep: Array, leaf: Array, other: float) -> Array:
    return jnp.where(keep.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, other)


@partial(jax.jit, static_argnames=("plan", "layout", "mesh"))
def _start_all(posterior, sampler, problem, states, lanes, plan, layout, mesh):  # type: ignore[no-untyped-def]
    def start(p: Posterior, shared: Any, key: Key[Array, ""], state: PyTree[Array]) -> AdjointChain:
        sampler, problem = shared
        return _start(p, sampler, plan, problem, layout, state, key)

    return over_chains(start, posterior, (sampler, problem), lanes, plan, mesh)(states)


@partial(jax.jit, static_argnames=("plan", "layout", "mesh"))
def _segment_all(  # type: ignore[no-untyped-def]
    posterior, sampler, problem, growth_limit, chains, lanes, index, plan, layout, mesh
):
    def segment(
        p: Posterior, shared: Any, key: Key[Array, ""], chain: AdjointChain
    ) -> AdjointChain:
        sampler, problem, growth_limit, index = shared
        return _segment(p, sampler, plan, problem, layout, growth_limit, chain, key, index)

    shared = (sampler, problem, growth_limit, index)
    return over_chains(segment, posterior, shared, lanes, plan, mesh)(chains)


def run_adjoint(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    problem: Problem,
    layout: Layout,
    growth_limit: float,
    group: ComponentGroup,
    progress: bool,
    store: Store | None = None,
    mesh: Mesh | None = None,
) -> AdjointChain:
    """All chains of a group of components."""
    label = f"pathwise χ {group.label}".strip()
    num_lanes = len(group.ids) * plan.num_chains
    show = progress and all(map(is_concrete, jax.tree.leaves((key, posterior, sampler))))
    posterior, sampler, limit = put((posterior, sampler, growth_limit), mesh)
    problem = problem.on(mesh)
    lanes = make_lanes(key, group.restrictions, group.ids, plan, layout.antithetic)
    lanes = put(pad_lanes(lanes, mesh, plan.chains_at_once), mesh, "chain")
    states = burn_in(
        lanes, posterior, sampler, plan, max(0, plan.num_burnin - layout.keep),
        num_lanes=num_lanes, label=f"{label} burn-in", store=store, mesh=mesh,
    )  # fmt: skip
    stage = (store or Store()).stage(
        label,
        layout.num_segments,
        final=lambda chains: chains._replace(state=(), buffer=()),
        lanes=num_lanes,
    )
    done, chains = stage.resume(
        partial(_start_all, posterior, sampler, problem, states, lanes, plan, layout, mesh), mesh
    )
    with tqdm(
        total=layout.num_segments, initial=done, desc=label, unit="segment", leave=False,
        disable=not (show and is_first_process()),
    ) as bar:  # fmt: skip
        for index in range(done, layout.num_segments):
            chains = _segment_all(
                posterior, sampler, problem, limit, chains, lanes,
                put(jnp.asarray(index, jnp.int32), mesh), plan, layout, mesh,
            )  # fmt: skip
            jax.block_until_ready(chains)  # else segments in flight hold a buffer each
            bar.update()
            stage.save(index + 1, chains)
    chains = chains._replace(state=(), buffer=())
    return fetch(unpack(chains, len(group.ids), plan.num_chains), mesh)
