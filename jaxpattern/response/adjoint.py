"""The adjoint of a chain: a sweep back over the states behind the draws of a segment.

The mathematics is in `jaxpattern.response.pathwise`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxpattern import moments
from jaxpattern.chains.divergence import all_finite
from jaxpattern.chains.kernel import noise_scale, position_of, step_keys
from jaxpattern.chains.lanes import own_by_lane
from jaxpattern.chains.programs import Past
from jaxpattern.chains.record import Glance
from jaxpattern.moments import Moments
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.response.problem import Problem
from jaxpattern.response.products import Product, derivatives_along, hessian_products
from jaxpattern.response.step import floats_of, given_step
from jaxpattern.types import Position


class Sums(NamedTuple):
    """Of a group of draws: Σ of χ's summands, their number, and the co-moments of φ and D beside.

    The covariance of the same draws costs nothing more, since the sweep evaluates D anyway, one
    step behind each draw; it is what χ is compared with.
    """

    chi: dict[str, Float[Array, "*lead rows ..."]]
    num_draws: Float[Array, "*lead"]
    beside: Moments


class Health(NamedTuple):
    """What a sweep says of itself: see the diagnostics of `pathwise`."""

    growth: Float[Array, "*lead rows"]
    truncated: Bool[Array, "*lead rows"]
    remainder: Float[Array, "*lead rows"]
    tail: Float[Array, "*lead rows blocks"]


class Backward(NamedTuple):
    """A sweep between two blocks: λ at step `time`, where the chain is in the state `after`."""

    adjoint: list[Array]
    after: PyTree[Array]
    time: Int[Array, ""]
    sources: Float[Array, " rows"]
    growth: Float[Array, " rows"]
    at_draw: Float[Array, " rows"]
    whole: Bool[Array, " rows"]
    total: dict[str, Array]
    values: Float[Array, "slots rows"]
    beside: Moments
    tail: Float[Array, "blocks rows"]


@register_pytree
@dataclass(frozen=True, eq=False)
class Adjoint:
    """A `Look` that sweeps λ back from the draws of a segment, and adds up χ.

    Attributes:
        problem: what is asked.
        growth_limit: past which a sweep is cut.
        history: states remembered.
        slots: most draws of a segment.
        tail_blocks: blocks of a window.
        direct: whether the loss inside φ is re-weighted too.
        hessian_batch: samples behind a Hessian product; None: the mini-batch.
        reference_batch: fresh samples behind L; None: all of the reference.
        product: how Hessian products are computed.
        width: c of a secant product.
    """

    problem: Problem
    growth_limit: Any
    width: Any
    history: int = field(metadata={"static": True})
    slots: int = field(metadata={"static": True})
    tail_blocks: int = field(metadata={"static": True})
    direct: bool = field(metadata={"static": True})
    hessian_batch: int | None = field(metadata={"static": True})
    reference_batch: int | None = field(metadata={"static": True})
    product: Product = field(metadata={"static": True})

    def init(self, posterior: Posterior) -> PyTree[Array]:
        """No draws yet."""
        columns = jax.tree.map(jnp.zeros_like, self.problem.probe_baseline)
        beside = moments.init(jnp.zeros_like(self.problem.offsets), columns)
        return Sums(self._no_columns(), jnp.zeros((), self._dtype), beside)

    def shapes(self, posterior: Posterior) -> tuple[PyTree[Array], PyTree[Array]]:
        """φ of the draws, `[slots, rows]`, and the health of the sweep."""
        rows = self.problem.num_rows
        zero = jnp.zeros(rows, self._dtype)
        values = jnp.zeros((self.slots, rows), self._dtype)
        tail = jnp.zeros((rows, self.tail_blocks), self._dtype)
        return values, Health(zero, jnp.zeros(rows, bool), zero, tail)

    @property
    def _dtype(self) -> Any:
        return self.problem.offsets.dtype

    def _no_columns(self) -> dict[str, Array]:
        rows = self.problem.num_rows
        return {
            name: jnp.zeros((rows, *losses.shape), losses.dtype)
            for name, losses in self.problem.probe_baseline.items()
        }

    def back(self, past: Past, accumulator: Sums) -> Glance:
        """λ from the last draw of the segment to the far end of the first draw's window."""
        rows, about = self.problem.num_rows, past.about
        zero = jnp.zeros(rows, self._dtype)
        start = Backward(
            adjoint=[jnp.zeros((rows, *x.shape), x.dtype) for x in floats_of(past.last).leaves],
            after=past.last,
            time=jnp.asarray(about.stop, jnp.int32),
            sources=zero,
            growth=zero,
            at_draw=jnp.ones_like(zero),
            whole=jnp.ones(rows, bool),
            total=self._no_columns(),
            values=jnp.zeros((self.slots, rows), self._dtype),
            beside=accumulator.beside,
            tail=jnp.zeros((self.tail_blocks, rows), self._dtype),
        )
        start = own_by_lane(start, accumulator.num_draws)
        end = jax.lax.fori_loop(0, about.num_blocks, partial(self._block, past), start)
        size = jnp.maximum(_size(end.total), 1e-30)
        num_draws = accumulator.num_draws + about.draws.astype(self._dtype)
        return Glance(
            draws=end.values,
            segment=Health(
                growth=end.growth,
                truncated=~end.whole,
                remainder=_norm(end.adjoint, past.last) / jnp.maximum(end.at_draw, 1e-30),
                tail=(end.tail / size[None]).T,
            ),
            accumulator=Sums(
                jax.tree.map(jnp.add, accumulator.chi, end.total), num_draws, end.beside
            ),
            finite=all_finite((end.values, end.total)),
        )

    def _block(self, past: Past, j: Array, sweep: Backward) -> Backward:
        """A draw's ∂φ/∂s if there is one here, the steps of a block back, and the probes once."""
        about, nbeta = past.about, jnp.asarray(past.posterior.nbeta, self._dtype)
        size, slot = about.size[j], about.source[j]
        sweep = jax.lax.cond(
            slot >= 0, partial(self._add_source, past, slot), lambda sweep: sweep, sweep
        )
        # One step of the block at random; a twin takes the opposite one, and what is linear in it
        # cancels.
        key = jax.random.fold_in(jax.random.fold_in(past.streams.record, past.number), j)
        chosen = jax.random.randint(key, (), 0, size)
        if past.posterior.mirror is not None:
            chosen = jnp.where(past.posterior.mirror < 0, size - 1 - chosen, chosen)

        def back(i: Array, carry: Any) -> Any:
            adjoint, push, kept = carry
            time = sweep.time - 1 - i
            state = self._state(past, time)
            adjoint, now = self._step_back(past, adjoint, state, time)
            pick = partial(jnp.where, i == chosen)
            return (
                adjoint,
                jax.tree.map(pick, now, push),
                jax.tree.map(pick, state, kept),
            )

        rows = self.problem.num_rows
        zero = jax.tree.map(
            lambda w: jnp.zeros((rows, *w.shape), w.dtype), position_of(sweep.after)
        )
        carry = (sweep.adjoint, own_by_lane(zero, sweep.growth[0]), sweep.after)
        adjoint, push, state = jax.lax.fori_loop(0, size, back, carry)

        # Past the limit the sweep ends here: what lies further back counts nothing.
        growth = _norm(adjoint, sweep.after) / jnp.maximum(sweep.sources, 1e-30)
        whole = sweep.whole & ~(growth > self.growth_limit)
        adjoint, push = jax.tree.map(lambda x: _rowwise(whole, x, 0.0), (adjoint, push))

        # χ += (size / nβ) ⟨c_t, ∇(ℓ_z − L)(w_t)⟩, for all z one pass along c_t.
        reference_key = jax.random.fold_in(key, 1)
        level, added = self._along(past, state, push, reference_key)
        per_step = size.astype(nbeta.dtype) / nbeta
        added = jax.tree.map(lambda x: per_step * x, added)
        added_size = _size(added)
        beside = jax.lax.cond(
            slot >= 0,
            lambda both: moments.update(both, sweep.values[slot], level),
            lambda both: both,
            sweep.beside,
        )
        if self.direct:  # ⟨D_z⟩/nβ − D_z(w*)/nβ, from the same steps
            share = about.draws.astype(nbeta.dtype) * per_step / about.length.astype(nbeta.dtype)
            added = jax.tree.map(lambda x, d: x + share * d[None], added, level)
        # Blocks behind the first draw are the tail; what lies in front of it falls off the end.
        place = jnp.where(j >= about.tail, j - about.tail, self.tail_blocks)
        time = sweep.time - size
        return sweep._replace(
            adjoint=adjoint,
            after=self._state(past, time),
            time=time,
            growth=jnp.maximum(sweep.growth, growth),
            whole=whole,
            total=jax.tree.map(jnp.add, sweep.total, added),
            beside=beside,
            tail=sweep.tail.at[place].set(added_size, mode="drop"),
        )

    def _state(self, past: Past, time: Array) -> PyTree[Array]:
        """s_t, from which step t starts."""
        return jax.tree.map(lambda ring: ring[time % self.history], past.states)

    def _add_source(self, past: Past, slot: Array, sweep: Backward) -> Backward:
        """λ + ∂φ/∂s, and φ − φ(w*), of all rows."""
        floats = floats_of(sweep.after)

        def phi(leaves: list[Array]) -> Array:
            return self.problem.phi_at(past.posterior, position_of(floats.rebuild(leaves)))

        values, pull = jax.vjp(phi, floats.leaves)
        (gradients,) = jax.vmap(pull)(jnp.eye(self.problem.num_rows, dtype=values.dtype))
        adjoint = jax.tree.map(jnp.add, sweep.adjoint, gradients)
        return sweep._replace(
            adjoint=adjoint,
            sources=sweep.sources + _norm(gradients, sweep.after),
            at_draw=_norm(adjoint, sweep.after),
            values=sweep.values.at[slot].set(values),
        )

    def _step_back(
        self, past: Past, adjoint: list[Array], state: PyTree[Array], time: Array
    ) -> tuple[list[Array], Position]:
        """λ_{t+1} → λ_t = (∂K/∂s)ᵀ λ_{t+1} + H_t c_t and c_t = (∂K/∂g)ᵀ λ_{t+1}, for all rows."""
        posterior = past.posterior
        batch_key, noise_key = step_keys(jax.random.fold_in(past.streams.step, time))
        minibatch = posterior.minibatch(batch_key, past.batch_size)
        part = self._curvature_part(past, minibatch, batch_key)
        floats, position = floats_of(state), position_of(state)
        gradient = posterior.loss_gradient(position, minibatch)

        def move(leaves: list[Array], gradient: Position) -> list[Array]:
            new = given_step(past.sampler, posterior, noise_key, floats.rebuild(leaves), gradient)
            return floats_of(new).leaves

        _, pull = jax.vjp(move, floats.leaves, gradient)
        _, pull_position = jax.vjp(
            lambda leaves: position_of(floats.rebuild(leaves)), floats.leaves
        )
        direct, push = jax.vmap(pull)(adjoint)
        bent = hessian_products(
            lambda w: posterior.loss_gradient(w, part),
            position,
            push,
            product=self.product,
            scale=noise_scale(past.sampler, state),
            width=self.width,
            key=jax.random.fold_in(noise_key, 2),
            mirror=posterior.mirror,
        )
        (through,) = jax.vmap(pull_position)(bent)
        return jax.tree.map(jnp.add, direct, through), push

    def _curvature_part(
        self, past: Past, minibatch: Minibatch, batch_key: Key[Array, ""]
    ) -> Minibatch:
        """The samples behind H, which is H_B on average whatever the chain did.

        The first samples of a mini-batch are a random part of it; all the data are not.
        """
        size = self.hessian_batch
        if size is None:
            return minibatch
        if past.batch_size is None:
            return past.posterior.minibatch(jax.random.fold_in(batch_key, 1), size)
        return jax.tree.map(lambda x: x[:size], minibatch)

    def _along(
        self, past: Past, state: PyTree[Array], push: Position, key: Key[Array, ""]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """D_z − D_z(w*) of every probe, and its derivative along c_t of every row."""
        posterior, position = past.posterior, position_of(state)

        def deviations(position: Position) -> dict[str, Array]:
            if self.reference_batch is None:
                return self.problem.columns(posterior, position)[1]
            # L of fresh samples, without bias: λ does not depend on them.
            fresh = posterior.minibatch(key, self.reference_batch)
            return self.problem.columns(posterior, position, posterior.loss(position, fresh))[1]

        scale = noise_scale(past.sampler, state)
        return derivatives_along(deviations, position, push, scale=scale)


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
