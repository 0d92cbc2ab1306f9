"""The adjoint of a chain: segments run forwards, and swept backwards from their draws.

The mathematics is in `jaxpattern.response.pathwise`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Key, PyTree
from tqdm import tqdm

from jaxpattern.diagnostics import batch_of
from jaxpattern.posterior import Posterior
from jaxpattern.response.problem import ComponentGroup, Problem
from jaxpattern.response.step import GivenGradient, floats_of
from jaxpattern.sampling import (
    Plan,
    all_finite,
    build_kernel,
    chain_keys,
    over_chains,
    position_of,
    streams_of,
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
    key: Key[Array, ""],
) -> AdjointChain:
    """The chain after burn-in, with the last states of it."""
    kernel, streams = build_kernel(posterior, sampler, plan), streams_of(key)
    state = jax.tree.map(jnp.asarray, kernel.init(posterior.centre, streams.init))
    step = lambda t, state: kernel.step(jax.random.fold_in(streams.step, t), state)  # noqa: E731
    recorded = min(layout.keep, plan.num_burnin)
    state = jax.lax.fori_loop(0, plan.num_burnin - recorded, step, state)

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

    state = jax.lax.fori_loop(
        first, first + layout.lead, lambda t, s: forward(s, t)[0], chain.state
    )
    state, states = jax.lax.scan(forward, state, first + jnp.arange(layout.lead, layout.steps))
    states = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), chain.buffer, states)
    remainder, values, total, sweep, tail = _sweep_back(
        posterior, sampler, plan, problem, layout, growth_limit, states, state, stop,
        streams.step, jax.random.fold_in(streams.record, index),
    )  # fmt: skip
    alive = chain.alive & all_finite((position_of(state), values, total))
    batch = batch_of(index, layout.num_segments, layout.batches)

    def keep(new: Array, old: Array | float) -> Array:
        return jnp.where(alive, new, old)

    return AdjointChain(
        state=jax.tree.map(keep, state, chain.state),
        buffer=jax.tree.map(
            lambda new, old: keep(new[new.shape[0] - layout.keep :], old), states, chain.buffer
        ),
        alive=alive,
        sums=jax.tree.map(lambda s, x: s.at[batch].add(keep(x, 0.0)), chain.sums, total),
        counts=chain.counts.at[batch].add(keep(jnp.asarray(layout.draws, chain.counts.dtype), 0.0)),
        trace=jax.lax.dynamic_update_slice_in_dim(
            chain.trace, keep(values, jnp.nan), index * layout.draws, 0
        ),
        growth=chain.growth.at[index].set(keep(sweep.growth, 0.0)),
        truncated=chain.truncated.at[index].set(~sweep.whole & alive),
        remainder=chain.remainder + keep(remainder, 0.0) / layout.num_segments,
        tail=chain.tail + keep(tail, 0.0) / layout.num_segments,
    )


def _sweep_back(
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    problem: Problem,
    layout: Layout,
    growth_limit: Any,
    states: PyTree[Array],
    last: PyTree[Array],
    stop: Array,
    step_key: Key[Array, ""],
    choice_key: Key[Array, ""],
) -> tuple[Array, Array, dict[str, Array], _Sweep, Array]:
    """The adjoint of the draws in the buffer, and what it says of every probe."""
    given = sampler(GivenGradient(posterior))
    floats_of_last = floats_of(last)

    def phi(state: PyTree[Array]) -> Array:
        return problem.rows_at(posterior, position_of(state))

    def source(state: PyTree[Array]) -> tuple[Array, list[Array]]:
        """φ − φ(w*) and ∂φ/∂s of all rows."""
        floats = floats_of(state)
        values, pull = jax.vjp(lambda leaves: phi(floats.rebuild(leaves)), floats.leaves)
        (gradients,) = jax.vmap(pull)(jnp.eye(problem.num_rows, dtype=values.dtype))
        return values, gradients

    def step_back(
        adjoint: list[Array], state: PyTree[Array], t: Array
    ) -> tuple[list[Array], Position]:
        """λ_{t+1} → λ_t and c_t, for all rows."""
        key = jax.random.fold_in(step_key, t)
        batch_key, noise_key = jax.random.split(key)
        minibatch = posterior.minibatch(batch_key, plan.batch_size)
        # H from some of the step's samples, which is H_B on average whatever the chain did.
        # (The first samples of a mini-batch are a random part of it; all the data are not.)
        size = layout.hessian_batch
        if size is None:
            part = minibatch
        elif plan.batch_size is None:
            part = posterior.minibatch(jax.random.fold_in(batch_key, 1), size)
        else:
            part = jax.tree.map(lambda x: x[:size], minibatch)
        floats = floats_of(state)
        gradient = posterior.loss_gradient(position_of(state), minibatch)
        _, hessian = jax.linearize(lambda w: posterior.loss_gradient(w, part), position_of(state))

        def move(leaves: list[Array], gradient: Position) -> list[Array]:
            return floats_of(given.step(noise_key, floats.rebuild(leaves), gradient)).leaves

        _, pull = jax.vjp(move, floats.leaves, gradient)
        _, pull_position = jax.vjp(
            lambda leaves: position_of(floats.rebuild(leaves)), floats.leaves
        )

        def one(adjoint: list[Array]) -> tuple[list[Array], Position]:
            direct, push = pull(adjoint)
            (through,) = pull_position(hessian(push))
            return jax.tree.map(jnp.add, direct, through), push

        return jax.vmap(one)(adjoint)

    def norm(adjoint: list[Array]) -> Array:
        """‖λ‖ of the position, by row."""
        return jax.vmap(
            lambda leaves: optax.tree.norm(position_of(floats_of_last.rebuild(leaves)))
        )(adjoint)

    def block(sweep: _Sweep, x: Any) -> tuple[_Sweep, tuple[Array, Array]]:
        states, times, draw_after, chosen, index = x

        def add_source(sweep: _Sweep) -> tuple[_Sweep, Array]:
            values, gradients = source(sweep.after)
            adjoint = jax.tree.map(jnp.add, sweep.adjoint, gradients)
            sources = sweep.sources + norm(gradients)
            return sweep._replace(adjoint=adjoint, sources=sources, at_draw=norm(adjoint)), values

        def nothing(sweep: _Sweep) -> tuple[_Sweep, Array]:
            return sweep, jnp.full(problem.num_rows, jnp.nan, problem.offsets.dtype)

        sweep, values = jax.lax.cond(draw_after, add_source, nothing, sweep)

        def inner(carry: Any, x: Any) -> tuple[Any, None]:
            adjoint, push, position = carry
            state, t, i = x
            before, now = step_back(adjoint, state, t)
            real = t >= 0
            adjoint = jax.tree.map(partial(jnp.where, real), before, adjoint)
            pick = i == chosen
            push = jax.tree.map(lambda c, old: jnp.where(pick & real, c, old), now, push)
            position = jax.tree.map(partial(jnp.where, pick), position_of(state), position)
            return (adjoint, push, position), None

        after = position_of(sweep.after)
        zero = jax.tree.map(lambda w: jnp.zeros((problem.num_rows, *w.shape), w.dtype), after)
        start = (sweep.adjoint, zero, after)
        (adjoint, push, position), _ = jax.lax.scan(
            inner, start, (states, times, jnp.arange(layout.every)), reverse=True
        )
        growth = norm(adjoint) / jnp.maximum(sweep.sources, 1e-30)
        whole = sweep.whole & ~(growth > growth_limit)
        adjoint = jax.tree.map(lambda leaf: _rowwise(whole, leaf, 0.0), adjoint)
        push = jax.tree.map(lambda leaf: _rowwise(whole, leaf, 0.0), push)

        def columns(position: Position) -> dict[str, Array]:
            if layout.reference_batch is None:
                return problem.columns(posterior, position)[1]
            # L of fresh samples, without bias: λ does not depend on them.
            reference_key = jax.random.fold_in(choice_key, 1 + index)
            minibatch = posterior.minibatch(reference_key, layout.reference_batch)
            return problem.columns(posterior, position, posterior.loss(position, minibatch))[1]

        level, differential = jax.linearize(columns, position)
        scale = layout.every / posterior.nbeta
        added = jax.tree.map(lambda x: scale * x, jax.vmap(differential)(push))
        squares = sum(jnp.sum(x**2, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(added))
        if layout.direct:
            share = layout.draws / layout.blocks / posterior.nbeta
            added = jax.tree.map(lambda x, d: x + share * d[None], added, level)
        return sweep._replace(
            adjoint=adjoint,
            after=jax.tree.map(lambda leaf: leaf[0], states),
            growth=jnp.maximum(sweep.growth, growth),
            whole=whole,
            total=jax.tree.map(jnp.add, sweep.total, added),
        ), (values, jnp.sqrt(squares))

    num_rows, dtype = problem.num_rows, problem.offsets.dtype
    shape = (layout.blocks, layout.every)
    block_ends = layout.every * (1 + jnp.arange(layout.blocks))
    after_window = block_ends - layout.window
    # A step of each block; a twin takes the opposite one, and what is linear in the step cancels.
    chosen = jax.random.randint(
        jax.random.fold_in(choice_key, 0), (layout.blocks,), 0, layout.every
    )
    if posterior.mirror is not None:
        chosen = jnp.where(posterior.mirror < 0, layout.every - 1 - chosen, chosen)
    sweep = _Sweep(
        adjoint=[jnp.zeros((num_rows, *leaf.shape), leaf.dtype) for leaf in floats_of_last.leaves],
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
    sweep, (values, sizes) = jax.lax.scan(
        block,
        sweep,
        (
            jax.tree.map(lambda s: s.reshape(*shape, *s.shape[1:]), states),
            (stop - layout.length + jnp.arange(layout.length)).reshape(shape),
            (after_window >= 0) & (after_window % layout.thin == 0),
            chosen,
            jnp.arange(layout.blocks),
        ),
        reverse=True,
    )
    drawn = layout.tail_blocks - 1 + (layout.thin // layout.every) * jnp.arange(layout.draws)
    whole_size = jnp.sqrt(sum(
        jnp.sum(x**2, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(sweep.total)
    ))  # fmt: skip
    tail = sizes[: layout.tail_blocks][::-1].T / jnp.maximum(whole_size[:, None], 1e-30)
    remainder = norm(sweep.adjoint) / jnp.maximum(sweep.at_draw, 1e-30)
    return remainder, values[drawn], sweep.total, sweep, tail


def _rowwise(keep: Array, leaf: Array, other: float) -> Array:
    return jnp.where(keep.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, other)


@partial(jax.jit, static_argnames=("plan", "layout"))
def _start_all(posterior, restrictions, sampler, problem, keys, plan, layout):  # type: ignore[no-untyped-def]
    start = lambda p, key: _start(p, sampler, plan, problem, layout, key)  # noqa: E731
    return over_chains(start, posterior, restrictions, layout.antithetic)(keys)


@partial(jax.jit, static_argnames=("plan", "layout"))
def _segment_all(  # type: ignore[no-untyped-def]
    posterior, restrictions, sampler, problem, growth_limit, chains, keys, index, plan, layout
):
    def segment(p: Posterior, chain: AdjointChain, chain_key: Key[Array, ""]) -> AdjointChain:
        return _segment(p, sampler, plan, problem, layout, growth_limit, chain, chain_key, index)

    return over_chains(segment, posterior, restrictions, layout.antithetic)(chains, keys)


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
) -> AdjointChain:
    """All chains of a group of components."""
    keys = chain_keys(key, group.ids, plan.num_chains, layout.antithetic)
    chains = _start_all(posterior, group.restrictions, sampler, problem, keys, plan, layout)
    show = progress and all(map(is_concrete, jax.tree.leaves((key, posterior, sampler))))
    label = f"pathwise χ {group.label}".strip()
    with tqdm(
        total=layout.num_segments, desc=label, unit="segment", leave=False, disable=not show
    ) as bar:
        for index in range(layout.num_segments):
            chains = _segment_all(
                posterior, group.restrictions, sampler, problem, growth_limit, chains, keys,
                jnp.asarray(index, jnp.int32), plan, layout,
            )  # fmt: skip
            if show:
                jax.block_until_ready(chains)
                bar.update()
    return chains
