"""The derivative of the end of a training run with respect to the data weights, both ways.

A step maps parameters w and optimizer state s to the next, given the weights ρ of its batch,
x_{t+1} = F_t(x_t, ρ) with x = (w, s). Along the very run that `train` takes,

    forwards    ẋ_{t+1} = ∂F_t/∂x ẋ_t + ∂F_t/∂ρ ω            one tangent ẋ per source, ẋ_0 = 0
    backwards   λ_t = (∂F_t/∂x)ᵀ λ_{t+1},  λ_T = ∇φ(w_T)      one adjoint per observable
                dφ/dρ = Σ_t (∂F_t/∂ρ)ᵀ λ_{t+1}

A step that `train` leaves out has the identity for F_t. Forwards holds x and its tangents.
Backwards goes through segments of the run: the states at their starts are kept, those within are
computed again, so that R segments of T/R steps hold R + T/R states.

How far a derivative can be trusted shows in how a perturbation grows that nothing feeds: forwards a
random one of w_0, backwards λ. It stays bounded where the run contracts, and grows exponentially
where it is chaotic; then the derivative is right for ever smaller changes of ρ only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxpattern.chains.divergence import all_finite
from jaxpattern.descent import Descent, Drawn, Stepped, drawing, step_of, taken
from jaxpattern.posterior import Minibatch
from jaxpattern.response.roots import with_safe_roots
from jaxpattern.runtime.mesh import over_lanes
from jaxpattern.types import Params

_PERTURBATION = 2**32 - 2  # the stream of the perturbation of the start; no step has this number


class Ask(NamedTuple):
    """What is asked of a run: its data, observables, and the source of each sample (−1: none)."""

    weighted: Minibatch
    observables: tuple[Callable[[Params], Array], ...]
    source: Int[Array, " samples"]

    def phi(self, params: Params) -> Float[Array, " rows"]:
        """All rows φ(w), in the precision of the weights."""
        dtype = self.weighted.weights.dtype
        return jnp.concatenate([jnp.atleast_1d(f(params)).astype(dtype) for f in self.observables])


class Derivative(NamedTuple):
    """What one seed gives.

    Attributes:
        phi: φ(w_T), `[K]`.
        slope: dφ/dρ, ρ relative to the weights of the run: `[K, G]`, a source, or `[K, N]` or
            `[K, N, T]`, a loss.
        norms: ‖δw‖ after each step of the perturbation that nothing feeds, the first its start:
            `[1, T + 1]` forwards, `[K, T + 1]` backwards, where the first is λ_T; None of
            differences of runs.
        broken: how many steps the derivative was followed before it was not finite, −1 if never.
        skipped: steps left out because their loss or gradient was not finite.
    """

    phi: Float[Array, " rows"]
    slope: Float[Array, "rows *columns"]
    norms: Float[Array, "perturbations steps"] | None
    broken: Int[Array, ""]
    skipped: Int[Array, ""]


class _Point(NamedTuple):
    """x: parameters and optimizer state."""

    params: Params
    optimizer: Any


class _Moving(NamedTuple):
    """The part of x that has a derivative: no counters, no keys."""

    params: Params
    optimizer: list[Array]


class Forward(NamedTuple):
    """A run, and its tangents `[G + 1]`, of which the last is the perturbation of the start."""

    point: _Point
    tangent: _Moving
    norms: Array
    broken: Array
    skipped: Array


class Kept(NamedTuple):
    """A run, and its states at the starts of the segments."""

    point: _Point
    starts: _Point
    skipped: Array


class Backward(NamedTuple):
    """The adjoints `[K]`, and dφ/dρ of the steps that they have passed."""

    adjoint: _Moving
    phi: Array
    slope: Array
    norms: Array
    broken: Array


def _split(point: _Point) -> tuple[_Moving, Callable[[_Moving], _Point]]:
    """What of a state moves, and the state that has it replaced."""
    leaves, structure = jax.tree.flatten(point.optimizer)
    where = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def join(moving: _Moving) -> _Point:
        mixed = list(leaves)
        for i, leaf in zip(where, moving.optimizer, strict=True):
            mixed[i] = leaf
        return _Point(moving.params, jax.tree.unflatten(structure, mixed))

    return _Moving(point.params, [leaves[i] for i in where]), join


def _smooth(run: Descent) -> Descent:
    """The run as it is differentiated: the roots of its optimizer have derivative 0 at 0."""
    update = with_safe_roots(run.optimizer.update)
    return run._replace(optimizer=optax.GradientTransformation(run.optimizer.init, update))


Differentiated = Callable[[_Moving, Array], _Moving]


def _steps(
    run: Descent, ask: Ask, key: Key[Array, ""]
) -> Callable[[Array, _Point], tuple[Drawn, Stepped, _Moving, Differentiated]]:
    """Step t from a state: its samples, what `train` makes of it, and F_t of what moves."""
    choose, smooth = drawing(run, ask.weighted), _smooth(run)

    def at(t: Array, point: _Point) -> tuple[Drawn, Stepped, _Moving, Differentiated]:
        drawn, move = step_of(run, choose, key, t)
        _, differentiable = step_of(smooth, choose, key, t)
        moving, join = _split(point)

        def step(moving: _Moving, weights: Array) -> _Moving:
            end = differentiable(*join(moving), weights)
            return _split(_Point(end.params, end.optimizer))[0]

        return drawn, move(*point, drawn.weights), moving, step

    return at


def _rows(mask: Array, like: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


@partial(jax.jit, static_argnames=("run", "number"))
def start_forward(
    run: Descent, number: int, key: Key[Array, " seeds"], params: Params, given: Any
) -> Forward:
    """All tangents 0 but that of the perturbation of the start, which has norm 1."""

    def one(_: Any, key: Array, params: Params, given: Any) -> Forward:
        point = _Point(params, run.optimizer_state(params, given))
        moving, _ = _split(point)
        noise = optax.tree.random_like(
            jax.random.fold_in(key, _PERTURBATION), params, jax.random.normal
        )
        size = optax.tree.norm(noise)
        zeros = jax.tree.map(lambda x: jnp.zeros((number + 1, *x.shape), x.dtype), moving)
        perturbed = jax.tree.map(
            lambda zero, x: zero.at[number].set((x / size).astype(zero.dtype)), zeros.params, noise
        )
        return Forward(
            point=point,
            tangent=_Moving(perturbed, zeros.optimizer),
            norms=jnp.zeros(run.num_steps + 1).at[0].set(1.0),
            broken=jnp.full((), -1, jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
        )

    return over_lanes(one, run.mesh)((), key, params, given)


@partial(jax.jit, static_argnames="run")
def advance_forward(
    run: Descent, ask: Ask, state: Forward, key: Key[Array, " seeds"], bounds: tuple[Array, Array]
) -> Forward:
    """Steps [start, stop) of all seeds, with all tangents."""

    def one(shared: tuple[Ask, Any], state: Forward, key: Array) -> Forward:
        ask, bounds = shared
        at = _steps(run, ask, key)
        sources = jnp.arange(jax.tree.leaves(state.tangent)[0].shape[0])

        def step(t: Array, s: Forward) -> Forward:
            drawn, stepped, moving, function = at(t, s.point)

            # ẋ_{t+1} = ∂F_t/∂x ẋ_t + ∂F_t/∂ρ ω, where ω is ρ on the samples of the source.
            def follow(tangent: _Moving, source: Array) -> _Moving:
                chosen = _rows(ask.source[drawn.place] == source, drawn.weights)
                change = jnp.where(chosen, drawn.weights, 0.0)
                return jax.jvp(function, (moving, drawn.weights), (tangent, change))[1]

            moved = jax.vmap(follow)(s.tangent, sources)
            moved = jax.tree.map(partial(jnp.where, stepped.finite), moved, s.tangent)
            size = optax.tree.norm(jax.tree.map(lambda x: x[-1], moved.params))
            return Forward(
                point=_Point(*taken(stepped, *s.point)),
                tangent=moved,
                norms=s.norms.at[t + 1].set(size.astype(s.norms.dtype)),
                broken=jnp.where((s.broken < 0) & ~all_finite(moved), t, s.broken),
                skipped=s.skipped + (~stepped.finite).astype(jnp.int32),
            )

        return jax.lax.fori_loop(bounds[0], bounds[1], step, state)

    return over_lanes(one, run.mesh)((ask, bounds), state, key)


@partial(jax.jit, static_argnames="run")
def read_forward(run: Descent, ask: Ask, state: Forward) -> Derivative:
    """dφ/dρ = ∇φ · ẇ_T of each source."""

    def one(ask: Ask, state: Forward) -> Derivative:
        params, tangents = state.point.params, state.tangent.params
        fed = jax.tree.map(lambda x: x[:-1], tangents)
        slopes = jax.vmap(lambda tangent: jax.jvp(ask.phi, (params,), (tangent,))[1])(fed)
        return Derivative(
            phi=ask.phi(params),
            slope=slopes.T,
            norms=state.norms[None],
            broken=state.broken,
            skipped=state.skipped,
        )

    return over_lanes(one, run.mesh)(ask, state)


@partial(jax.jit, static_argnames=("run", "segments"))
def start_kept(run: Descent, segments: int, params: Params, given: Any) -> Kept:
    """A run with room for the states at the starts of its segments."""

    def one(_: Any, params: Params, given: Any) -> Kept:
        point = _Point(params, run.optimizer_state(params, given))
        room = jax.tree.map(lambda x: jnp.zeros((segments, *x.shape), x.dtype), point)
        return Kept(point, room, jnp.zeros((), jnp.int32))

    return over_lanes(one, run.mesh)((), params, given)


def _put(room: _Point, slot: Array, point: _Point) -> _Point:
    return jax.tree.map(lambda all_of, x: all_of.at[slot].set(x), room, point)


@partial(jax.jit, static_argnames=("run", "length"))
def advance_kept(
    run: Descent, length: int, ask: Ask, state: Kept, key: Any, bounds: tuple[Array, Array]
) -> Kept:
    """Segments [start, stop) of the plain run."""

    def one(shared: tuple[Ask, Any], state: Kept, key: Array) -> Kept:
        ask, bounds = shared
        choose = drawing(run, ask.weighted)

        def step(t: Array, s: tuple[_Point, Array]) -> tuple[_Point, Array]:
            point, skipped = s
            drawn, move = step_of(run, choose, key, t)
            stepped = move(*point, drawn.weights)
            return _Point(*taken(stepped, *point)), skipped + (~stepped.finite).astype(jnp.int32)

        def segment(i: Array, s: Kept) -> Kept:
            stop = jnp.minimum((i + 1) * length, run.num_steps)
            end = jax.lax.fori_loop(i * length, stop, step, (s.point, s.skipped))
            return Kept(end[0], _put(s.starts, i, s.point), end[1])

        return jax.lax.fori_loop(bounds[0], bounds[1], segment, state)

    return over_lanes(one, run.mesh)((ask, bounds), state, key)


@partial(jax.jit, static_argnames="run")
def start_backward(run: Descent, ask: Ask, kept: Kept) -> Backward:
    """λ_T = ∇φ(w_T) of every row."""

    def one(ask: Ask, kept: Kept) -> Backward:
        moving, _ = _split(kept.point)
        phi, pull = jax.vjp(ask.phi, moving.params)
        (gradients,) = jax.vmap(pull)(jnp.eye(phi.shape[0], dtype=phi.dtype))
        rows = phi.shape[0]
        rest = [jnp.zeros((rows, *x.shape), x.dtype) for x in moving.optimizer]
        sizes = jax.vmap(optax.tree.norm)(gradients)
        norms = jnp.zeros((rows, run.num_steps + 1)).at[:, 0].set(sizes)
        slope = jnp.zeros((rows, *ask.weighted.weights.shape), ask.weighted.weights.dtype)
        return Backward(_Moving(gradients, rest), phi, slope, norms, jnp.full((), -1, jnp.int32))

    return over_lanes(one, run.mesh)(ask, kept)


@partial(jax.jit, static_argnames=("run", "length"))
def advance_backward(
    run: Descent,
    length: int,
    ask: Ask,
    starts: _Point,
    state: Backward,
    key: Key[Array, " seeds"],
    *,
    bounds: tuple[Array, Array],
) -> Backward:
    """Segments [start, stop) counted from the end of the run."""
    segments = -(-run.num_steps // length)

    def one(shared: tuple[Ask, Any], starts: _Point, state: Backward, key: Array) -> Backward:
        ask, bounds = shared
        at = _steps(run, ask, key)

        def segment(i: Array, s: Backward) -> Backward:
            i = segments - 1 - i
            first = i * length
            stop = jnp.minimum(first + length, run.num_steps)

            def again(t: Array, held: tuple[_Point, _Point]) -> tuple[_Point, _Point]:
                point, room = held
                _, stepped, _, _ = at(t, point)
                return _Point(*taken(stepped, *point)), _put(room, t - first, point)

            point = jax.tree.map(lambda x: x[i], starts)
            room = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), point)
            _, room = jax.lax.fori_loop(first, stop, again, (point, room))

            def back(k: Array, s: Backward) -> Backward:
                t = stop - 1 - k
                point = jax.tree.map(lambda x: x[t - first], room)
                drawn, stepped, moving, function = at(t, point)
                _, pull = jax.vjp(function, moving, drawn.weights)
                # λ_t = (∂F_t/∂x)ᵀ λ_{t+1}, and (∂F_t/∂ρ)ᵀ λ_{t+1} per unit of relative weight.
                pulled, change = jax.vmap(pull)(s.adjoint)
                keep = partial(jnp.where, stepped.finite)
                adjoint = jax.tree.map(keep, pulled, s.adjoint)
                change = jnp.where(stepped.finite, change * drawn.weights[None], 0.0)
                sizes = jax.vmap(optax.tree.norm)(adjoint.params).astype(s.norms.dtype)
                passed = run.num_steps - t
                return Backward(
                    adjoint=adjoint,
                    phi=s.phi,
                    slope=s.slope.at[:, drawn.place].add(change.astype(s.slope.dtype)),
                    norms=s.norms.at[:, passed].set(sizes),
                    broken=jnp.where(
                        (s.broken < 0) & ~all_finite((adjoint, change)), passed - 1, s.broken
                    ),
                )

            return jax.lax.fori_loop(0, stop - first, back, s)

        return jax.lax.fori_loop(bounds[0], bounds[1], segment, state)

    return over_lanes(one, run.mesh)((ask, bounds), starts, state, key)
