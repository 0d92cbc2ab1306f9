r"""χ by differentiating the chain: the pathwise estimator.

**The idea.** A chain is a program. Write one step of a sampler as

    s_{t+1} = K(s_t, g_t; ξ_t),     g_t = ∇L_{B_t}(w_t) + h ∇(ℓ_z − L)(w_t)

with w_t the position in the state s_t, ξ_t the noise, B_t the mini-batch, and the loss tilted by
h (ℓ_z − L): that is what moving data weight h onto sample z does. The noise and the mini-batches do
not depend on h, so the whole run is a smooth function of h, and

    (d/dh) E[φ(w_T)] |_{h=0} = E[ dφ(w_T)/dh ] = nβ χ_z .

The left equality (derivative under the expectation) holds when the path derivative has a finite
mean: infinitesimal perturbation analysis (Glasserman 1991), for diffusions Assaraf, Jourdain,
Lelièvre & Roux 2018. The right one is linear response: for the stationary law p ∝ exp(−nβ L − …),
(d/dh)⟨φ⟩ = −nβ Cov[φ, ℓ_z − L].

**The adjoint.** Reverse mode gives all samples z at once. Start at a draw with λ = ∂φ/∂s and step
back. A step has two inputs, the state and the gradient it was given:

    (∂K/∂s)ᵀ λ_{t+1} = a_t,   (∂K/∂g)ᵀ λ_{t+1} = c_t,   λ_t = a_t + H_t c_t (into the position)

with H_t = ∇²L_{B_t}(w_t): one Hessian-vector product. For SGLD a_t = (1 − (ε/2)γ) λ_{t+1} and
c_t = −(ε/2) nβ λ_{t+1}. The tilt enters through g alone, so

    nβ χ_z = E Σ_t ⟨c_t, ∇(ℓ_z − L)(w_t)⟩ ,

a Jacobian-vector product of the vector of losses along c_t: one forward pass gives every column,
per token. Nothing of size (samples × parameters) ever exists.

**Why it is less noisy.** A covariance estimates the product of two fluctuations from draws, and its
noise is their full size however weakly they are related. The path derivative holds the noise ξ
fixed and measures the relation itself; where φ and ℓ are linear on the scale of the posterior it
has no noise at all. It is the derivative of what the chain computes, mini-batch noise included.

**Windows.** λ dies out as (1 − εP/2)^k in a direction of precision P = nβ h + γ, so `window` steps
behind each draw suffice. Draws are taken `thin` steps apart and *segments* of several draws share
one backward sweep (λ is linear: ∂φ/∂s is added as the sweep passes a draw). Memory is the states
of one segment. What the steps furthest back still contribute is in `diagnostics["tail"]`.

**Probes every p steps.** The sum over t is estimated from one step of each block of p, chosen at
random and counted p times. That is unbiased for any p; λ is smooth, so it costs little variance.

**Growth.** Where nβ H + γ has negative directions the dynamics expand and λ may grow without bound:
the derivative of a chaotic chain is not the response of its average. ‖λ‖ is compared with what a
contracting chain could reach, the sum of the ‖∇φ‖ that were added; past `growth_limit` times that,
the sweep is cut there, and counted in `diagnostics["truncated"]`, or the component is measured by
covariance instead.

The preconditioner of `rmsprop_sgld` is differentiated with the rest: its running mean is part of
the state. A Metropolis step is not a smooth function of h, so `mala` has no pathwise derivative.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Key, PyTree
from tqdm import tqdm

from jaxpattern.diagnostics import batch_of
from jaxpattern.posterior import Posterior
from jaxpattern.response.assembly import Part, assemble, batch_estimates, summarize_rows
from jaxpattern.response.covariance import covariance
from jaxpattern.response.problem import ComponentGroup, Estimator, Problem, check_direct
from jaxpattern.response.result import Response, group_mean
from jaxpattern.response.step import GivenGradient, floats_of
from jaxpattern.response.tangent import tangent_cost, tangent_response
from jaxpattern.samplers import relaxation_steps
from jaxpattern.sampling import (
    Plan,
    all_finite,
    build_kernel,
    chain_keys,
    check_alive,
    over_chains,
    position_of,
    streams_of,
)
from jaxpattern.types import Position
from jaxpattern.validation import check_count, check_number, is_concrete

_WINDOW_RELAXATIONS = 6
_SEGMENT_WINDOWS = 2


class GrowthWarning(UserWarning):
    """The adjoint grew: the chain expands where it should contract."""


def pathwise(
    *,
    window: int | None = None,
    every: int | None = None,
    growth_limit: float = 10.0,
    on_growth: Literal["truncate", "covariance"] = "truncate",
    mode: Literal["adjoint", "tangent", "auto"] = "adjoint",
    probe_batch: int | None = None,
    direct: bool = False,
) -> Estimator:
    """The pathwise estimator of χ: nβ χ_z = E Σ_t ⟨c_t, ∇(ℓ_z − L)(w_t)⟩, c_t the chain's adjoint.

    It is the derivative of the chain itself; the module's docstring derives it. Its `diagnostics`
    have a leading row axis:

    * `"tail"`, `[K, blocks]`: root mean square over the columns of what each block of steps before
      the first draw of a segment adds to χ, over that of χ; the last entries say what the window
      cuts off.
    * `"remainder"`, `[K]`: mean of ‖λ‖ at the end of the window over ‖λ‖ at the draw.
    * `"growth"`, `[K, chains]`: largest ‖λ‖ over the sum of the ‖∇φ‖ put into it. A contracting
      chain stays below 1.
    * `"truncated"`, `[K, chains]`: share of the chain's segments that were cut for growth.

    Args:
        window: steps behind each draw. By default six relaxation times of the sampler in flat
            directions, 2/(εγ) for SGLD.
        every: p, steps for each evaluation of the probes; the nearest divisor of `plan.thin` is
            taken. By default half a relaxation time.
        growth_limit: how far past what a contracting chain could reach the adjoint may grow.
        on_growth: `"truncate"` cuts the sweep there and says so; `"covariance"` measures a
            component in which that happened by `covariance()` instead, on chains of the same key.
        mode: `"adjoint"` gives a column a loss, at a cost that grows with the number of rows of a
            component. `"tangent"` runs forwards with one tangent a probe set and gives a column a
            probe set, as `group_mean` does, at a cost that grows with the number of probe sets;
            it cuts no window and stores no states. `"auto"` gives a column a probe set by
            whichever is cheaper; `Response.estimator` says which.
        probe_batch: samples of each probe set, and of the reference, drawn afresh at each step
            in tangent mode; None: all of them.
        direct: also let the loss inside φ be re-weighted, which adds ⟨D_z⟩/nβ − D_z(w*)/nβ with
            D_z = ℓ_z − L: the response of an LLC in its second convention, see `jaxpattern.llc`.
            Rows must be excess losses, so no observables; not in tangent mode.

    Raises:
        ValueError, TypeError: an argument does not fit.

    References:
        Glasserman 1991; Assaraf, Jourdain, Lelièvre & Roux 2018.
    """
    for name, value in (("window", window), ("every", every)):
        if value is not None:
            check_count(name, value, minimum=1)
    check_number("growth_limit", growth_limit, minimum=1.0)
    if mode not in ("adjoint", "tangent", "auto"):
        raise ValueError(f"mode must be 'adjoint', 'tangent' or 'auto', got {mode!r}")
    if probe_batch is not None:
        check_count("probe_batch", probe_batch, minimum=1)
    if on_growth not in ("truncate", "covariance"):
        raise ValueError(f"on_growth must be 'truncate' or 'covariance', got {on_growth!r}")

    def estimate(
        key: Key[Array, ""],
        posterior: Posterior,
        sampler: Any,
        plan: Plan,
        problem: Problem,
        groups: list[ComponentGroup],
        rows: tuple[str, ...],
        progress: bool,
    ) -> Response:
        if not build_kernel(posterior, sampler, plan).takes_minibatch:
            raise TypeError(
                "pathwise needs a sampler whose step takes (key, state, minibatch) and is smooth; "
                "a Metropolis kernel such as mala is not: use estimator=covariance()"
            )
        if direct:
            check_direct(problem)
            if mode != "adjoint":
                raise ValueError(f"direct needs mode='adjoint', got {mode!r}")
        components = len(rows) // problem.num_rows
        forwards = tangent_cost(posterior, plan, problem, probe_batch, components)
        if mode != "tangent":
            layout = _layout(posterior, sampler, plan, window, every, direct)
            cost = _cost(posterior, plan, problem, layout, components)
        if mode == "tangent" or (mode == "auto" and forwards < cost):
            return tangent_response(
                key, posterior, sampler, plan, problem, groups, rows, probe_batch, progress
            )
        parts: dict[int, Part] = {}
        for group in groups:
            chains = _run(
                key, posterior, sampler, plan, problem, layout, growth_limit, group, progress
            )
            check_alive(chains.alive, group.names, posterior)
            for position, index in enumerate(group.ids):
                chain = jax.tree.map(lambda leaf, p=position: leaf[p], chains)
                parts[index] = _summarize_component(chain, problem, plan, layout)
        name = f"pathwise (adjoint, window {layout.window}, every {layout.every})"
        response = assemble(parts, posterior, problem, rows, cost, name)
        grown = response.diagnostics["truncated"].max(axis=1) > 0
        if is_concrete(grown) and bool(grown.any()):
            names = [row for row, bad in zip(rows, grown, strict=True) if bad]
            consequence = (
                "they are measured by covariance instead"
                if on_growth == "covariance"
                else "their sweeps are cut there and χ is incomplete; a larger localization, a "
                "smaller nbeta, or on_growth='covariance' avoids that"
            )
            warnings.warn(
                f"the adjoint grew past {growth_limit:g} in rows {names}: {consequence}",
                GrowthWarning,
                stacklevel=3,
            )
            if on_growth == "covariance":
                other = covariance(direct=direct)(
                    key, posterior, sampler, plan, problem, groups, rows, progress
                )
                response = _choose(response, other, grown)
        return group_mean(response) if mode == "auto" else response

    return estimate


class _Layout(NamedTuple):
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


def _layout(
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    window: int | None,
    every: int | None,
    direct: bool,
) -> _Layout:
    """Window and probe spacing from the relaxation time, where they are not given."""
    relaxation = None
    if window is None or every is None:
        relaxation = relaxation_steps(sampler, posterior)
    if relaxation is None and window is None:
        raise ValueError(
            "window must be given: the relaxation time of this sampler and posterior is not known"
        )
    if window is None:
        assert relaxation is not None
        window = max(1, round(_WINDOW_RELAXATIONS * relaxation))
    wanted = every or (1.0 if relaxation is None else max(1.0, relaxation / 2))
    divisors = [p for p in range(1, plan.thin + 1) if plan.thin % p == 0]
    every = min(divisors, key=lambda p: abs(math.log(p / wanted)))
    window = -(-window // every) * every
    # About two windows of draws share a sweep; segments are equal, and fill the batches evenly.
    wanted = max(1, _SEGMENT_WINDOWS * window // plan.thin)
    most = max(1, plan.num_draws // plan.batches)
    draws = max(
        m
        for m in range(1, plan.num_draws + 1)
        if plan.num_draws % m == 0 and m <= min(wanted, most)
    )
    return _Layout(window, every, plan.thin, draws, plan.num_draws // draws, direct)


class _Chain(NamedTuple):
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
    layout: _Layout,
    key: Key[Array, ""],
) -> _Chain:
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
    return _Chain(
        state=state,
        buffer=buffer,
        alive=jnp.asarray(True),
        sums={
            name: jnp.zeros((plan.batches, rows, *losses.shape), losses.dtype)
            for name, losses in problem.probe_baseline.items()
        },
        counts=jnp.zeros(plan.batches, dtype),
        trace=jnp.full((plan.num_draws, rows), jnp.nan, dtype),
        growth=jnp.zeros(rows, dtype),
        truncated=jnp.zeros(rows, dtype),
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
    layout: _Layout,
    growth_limit: Any,
    chain: _Chain,
    key: Key[Array, ""],
    shared_key: Key[Array, ""],
    index: Array,
) -> _Chain:
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
        streams.step, jax.random.fold_in(shared_key, index),
    )  # fmt: skip
    alive = chain.alive & all_finite((position_of(state), values, total))
    batch = batch_of(index, layout.num_segments, plan.batches)

    def keep(new: Array, old: Array | float) -> Array:
        return jnp.where(alive, new, old)

    return _Chain(
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
        growth=jnp.maximum(chain.growth, keep(sweep.growth, 0.0)),
        truncated=chain.truncated + keep(~sweep.whole, 0.0) / layout.num_segments,
        remainder=chain.remainder + keep(remainder, 0.0) / layout.num_segments,
        tail=chain.tail + keep(tail, 0.0) / layout.num_segments,
    )


def _sweep_back(
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    problem: Problem,
    layout: _Layout,
    growth_limit: Any,
    states: PyTree[Array],
    last: PyTree[Array],
    stop: Array,
    step_key: Key[Array, ""],
    shared_key: Key[Array, ""],
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
        floats = floats_of(state)
        gradient, hessian = jax.linearize(
            lambda w: posterior.loss_gradient(w, minibatch), position_of(state)
        )

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
        states, times, draw_after, chosen = x

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
            excess = problem.excess_reference(posterior, position)
            return problem.columns(posterior, position, excess)

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
    # A step of each block, the same for all chains: a shared choice keeps the program free of
    # branches that differ from chain to chain, and chains still have noise of their own.
    chosen = jax.random.randint(shared_key, (layout.blocks,), 0, layout.every)
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
    return over_chains(start, posterior, restrictions)(keys)


@partial(jax.jit, static_argnames=("plan", "layout"))
def _segment_all(  # type: ignore[no-untyped-def]
    posterior, restrictions, sampler, problem, growth_limit, chains, keys, key, index, plan, layout
):
    def segment(p: Posterior, chain: _Chain, chain_key: Key[Array, ""]) -> _Chain:
        return _segment(
            p, sampler, plan, problem, layout, growth_limit, chain, chain_key, key, index
        )

    return over_chains(segment, posterior, restrictions)(chains, keys)


def _run(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    problem: Problem,
    layout: _Layout,
    growth_limit: float,
    group: ComponentGroup,
    progress: bool,
) -> _Chain:
    """All chains of a group of components."""
    keys = chain_keys(key, group.ids, plan.num_chains)
    # Chains fold in small numbers; the shared choices of steps take the largest.
    shared = jax.random.fold_in(key, 2**32 - 1)
    chains = _start_all(posterior, group.restrictions, sampler, problem, keys, plan, layout)
    show = progress and all(map(is_concrete, jax.tree.leaves((key, posterior, sampler))))
    label = "pathwise χ " + " … ".join(
        filter(None, dict.fromkeys((group.names[0], group.names[-1])))
    )
    with tqdm(
        total=layout.num_segments, desc=label.strip(), unit="segment", leave=False, disable=not show
    ) as bar:
        for index in range(layout.num_segments):
            chains = _segment_all(
                posterior, group.restrictions, sampler, problem, growth_limit, chains, keys,
                shared, jnp.asarray(index, jnp.int32), plan, layout,
            )  # fmt: skip
            if show:
                jax.block_until_ready(chains)
                bar.update()
    return chains


def _summarize_component(chain: _Chain, problem: Problem, plan: Plan, layout: _Layout) -> Part:
    """χ of one component: means of the batches of its chains, and their spread."""
    alive = chain.alive
    chi, stderr, halves, batches = batch_estimates(chain.sums, chain.counts, alive)
    lost = alive.sum()
    diagnostics = {
        "tail": jnp.sum(jnp.where(alive[:, None, None], chain.tail, 0.0), axis=0) / lost,
        "remainder": jnp.sum(jnp.where(alive[:, None], chain.remainder, 0.0), axis=0) / lost,
        "growth": chain.growth.T,
        "truncated": chain.truncated.T,
    }
    summary = summarize_rows(chain.trace, alive, problem, plan)
    return Part(chi, stderr, halves, batches, summary, ~alive, diagnostics)


def _choose(response: Response, other: Response, rows: Bool[Array, " rows"]) -> Response:
    """The other estimate in some rows."""

    def pick(axis: int) -> Callable[[Array, Array], Array]:
        def choose(a: Array, b: Array) -> Array:
            shape = [1] * a.ndim
            shape[axis] = -1
            return jnp.where(rows.reshape(shape), b, a)

        return choose

    return replace(
        response,
        chi=jax.tree.map(pick(0), response.chi, other.chi),
        stderr=jax.tree.map(pick(0), response.stderr, other.stderr),
        halves=jax.tree.map(pick(1), response.halves, other.halves),
        batches=jax.tree.map(pick(1), response.batches, other.batches),
        cost=response.cost + other.cost,
    )


def _cost(
    posterior: Posterior, plan: Plan, problem: Problem, layout: _Layout, components: int
) -> float:
    """Gradient equivalents: a Hessian-vector product of K rows counts 1 + 2K, a forward pass with
    K tangents (1 + 2K)/3, the gradient of an observable 1."""
    rows = problem.num_rows
    batch = plan.batch_size or posterior.num_samples
    sweeps = layout.num_segments
    probes = sum(losses.shape[0] for losses in problem.probe_baseline.values())
    probes += problem.reference_baseline.shape[0]
    return (
        plan.num_chains
        * components
        * (
            plan.num_steps * batch
            + sweeps * layout.length * batch * (1 + 2 * rows)
            + sweeps * layout.blocks * probes * (1 + 2 * rows) / 3
            + plan.num_draws * problem.observed_samples
        )
    )
