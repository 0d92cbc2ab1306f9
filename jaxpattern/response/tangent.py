"""The pathwise estimator run forwards: one tangent a data group, every observable at once.

With δ_g = ∂s/∂h_g the derivative of the chain's state with respect to the weight h_g of group g,
the chain rule through one step s' = K(s, g(w); ξ) reads

    δ_g' = (∂K/∂s) δ_g + (∂K/∂g) [ H δ_g + ∇(ℓ_g − L)(w) ],       nβ χ_g(φ) = E[ ∇φ(w) · δ_g ],

with ℓ_g the mean loss of the group. Where the adjoint sweeps back from each observable, the
tangents ride along with the chain: no states are stored and no window is cut. H is that of the
step's own mini-batch; ∇(ℓ_g − L) is estimated without bias from fresh samples of the group and of
the data, which are drawn independently of the step's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxpattern.diagnostics import batch_of
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.response.assembly import Part, assemble, batch_estimates, summarize_rows
from jaxpattern.response.problem import ComponentGroup, Problem
from jaxpattern.response.result import Response
from jaxpattern.response.step import GivenGradient, floats_of
from jaxpattern.runtime.checkpoint import Store
from jaxpattern.runtime.mesh import put
from jaxpattern.sampling import Plan, check_alive, position_of, run_chains, write_draw
from jaxpattern.types import Position, SamplingAlgorithm


class TangentState(NamedTuple):
    """A sampler's state, its position, and the tangents `[G, ...]` of its floating-point leaves."""

    position: Position
    state: PyTree[Array]
    tangents: list[Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TangentSampler:
    """A sampler whose chains carry δ_g of every probe set g."""

    sampler: Any
    problem: Problem
    probe_batch: int | None = field(metadata={"static": True})

    def __call__(self, posterior: Posterior) -> SamplingAlgorithm:
        algorithm, given = self.sampler(posterior), self.sampler(GivenGradient(posterior))
        groups = [batch for _, batch in sorted(self.problem.probes.items())]

        def init(position: Position, rng_key: Key[Array, ""]) -> TangentState:
            state = jax.tree.map(jnp.asarray, algorithm.init(position, rng_key))
            tangents = [
                jnp.zeros((len(groups), *leaf.shape), leaf.dtype)
                for leaf in floats_of(state).leaves
            ]
            return TangentState(position_of(state), state, tangents)

        def tilt_gradient(key: Key[Array, ""], position: Position) -> Position:
            """∇(ℓ_g − L) of every group, `[G, ...]`."""
            keys = jax.random.split(posterior.own_key(key), len(groups) + 1)
            reference = jax.grad(self._reference)(position, posterior, keys[0])
            gradient = jax.grad(lambda w, batch: jnp.mean(posterior.losses(w, batch)))
            batches = [self._part(batch, key) for batch, key in zip(groups, keys[1:], strict=True)]
            shapes = [jax.tree.map(jnp.shape, batch) for batch in batches]
            if all(shape == shapes[0] for shape in shapes):
                stacked = jax.tree.map(lambda *each: jnp.stack(each), *batches)
                gradients = jax.vmap(partial(gradient, position))(stacked)
            else:
                each = [gradient(position, batch) for batch in batches]
                gradients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            return jax.tree.map(lambda g, base: g - base[None], gradients, reference)

        def step(key: Key[Array, ""], state: TangentState, minibatch: Minibatch) -> TangentState:
            # The step keeps the key it would have had: the chain is the plain sampler's.
            tilt_key = jax.random.fold_in(key, 1)
            position, inner, tangents = state
            floats = floats_of(inner)
            gradient, hessian = jax.linearize(
                lambda w: posterior.loss_gradient(w, minibatch), position
            )

            def move(leaves: list[Array], gradient: Position) -> tuple[list[Array], Any]:
                moved = given.step(key, floats.rebuild(leaves), gradient)
                return floats_of(moved).leaves, moved

            def tangent_position(tangent: list[Array]) -> Position:
                at = lambda leaves: position_of(floats.rebuild(leaves))  # noqa: E731
                return jax.jvp(at, (floats.leaves,), (tangent,))[1]

            tilts = tilt_gradient(tilt_key, position)
            pushed = jax.vmap(
                lambda tangent, tilt: jax.tree.map(
                    jnp.add, hessian(tangent_position(tangent)), tilt
                )
            )(tangents, tilts)
            _, linear, inner = jax.linearize(move, floats.leaves, gradient, has_aux=True)
            return TangentState(position_of(inner), inner, jax.vmap(linear)(tangents, pushed))

        return SamplingAlgorithm(init, step)

    def _part(self, batch: Any, key: Key[Array, ""]) -> Any:
        """`probe_batch` fresh samples of a group."""
        if self.probe_batch is None:
            return batch
        size = jax.tree.leaves(batch)[0].shape[0]
        index = jax.random.randint(key, (self.probe_batch,), 0, size)
        return jax.tree.map(lambda x: x[index], batch)

    def _reference(
        self, position: Position, posterior: Posterior, key: Key[Array, ""]
    ) -> Float[Array, ""]:
        """L on fresh samples of the reference data."""
        batch, weights = self.problem.reference
        if self.probe_batch is not None:
            index = jax.random.randint(key, (self.probe_batch,), 0, weights.shape[0])
            batch, weights = jax.tree.map(lambda x: x[index], (batch, weights))
        return jnp.sum(weights * posterior.losses(position, batch)) / weights.shape[0]


class TangentSums(NamedTuple):
    """Sums of ∇φ · δ_g / nβ over the draws of each batch, their number, and the trace of φ."""

    sums: Float[Array, "*chains batches rows groups"]
    counts: Float[Array, "*chains batches"]
    trace: Float[Array, "*chains draws rows"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TangentRecorder:
    """Records φ and ∇φ · δ_g / nβ."""

    problem: Problem

    def init(self, posterior: Posterior, plan: Plan) -> TangentSums:
        rows, groups = self.problem.num_rows, len(self.problem.probes)
        dtype = self.problem.offsets.dtype
        return TangentSums(
            sums=jnp.zeros((plan.batches, rows, groups), dtype),
            counts=jnp.zeros(plan.batches, dtype),
            trace=jnp.zeros((plan.num_draws, rows), dtype),
        )

    def value(
        self, posterior: Posterior, state: TangentState, key: Key[Array, ""], plan: Plan
    ) -> tuple[Array, Array]:
        del key, plan
        floats = floats_of(state.state)

        def phi(leaves: list[Array]) -> Array:
            position = position_of(floats.rebuild(leaves))
            return self.problem.rows_at(posterior, position)

        values, linear = jax.linearize(phi, floats.leaves)
        return values, jax.vmap(linear)(state.tangents).T / posterior.nbeta

    def update(
        self,
        accumulator: TangentSums,
        value: tuple[Array, Array],
        draw: Int[Array, ""],
        alive: Bool[Array, ""],
        plan: Plan,
    ) -> TangentSums:
        batch = batch_of(draw, plan.num_draws, plan.batches)
        values, slopes = value
        return TangentSums(
            sums=accumulator.sums.at[batch].add(jnp.where(alive, slopes, 0.0)),
            counts=accumulator.counts.at[batch].add(jnp.where(alive, 1.0, 0.0)),
            trace=write_draw(accumulator.trace, values, draw=draw, alive=alive),
        )


def tangent_response(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    problem: Problem,
    groups: list[ComponentGroup],
    rows: tuple[str, ...],
    probe_batch: int | None,
    antithetic: bool,
    progress: bool,
    store: Store | None = None,
    mesh: Mesh | None = None,
) -> Response:
    """The data-mixture response: a column a probe set, of all observables at once."""
    # Probes are drawn from at each step, and lie everywhere.
    spread = put(problem, mesh)
    tangent_sampler = TangentSampler(sampler, spread, probe_batch)
    parts: dict[int, Part] = {}
    for group in groups:
        chains = run_chains(
            key,
            posterior,
            tangent_sampler,
            plan,
            TangentRecorder(spread),
            restrictions=group.restrictions,
            component_ids=group.ids,
            antithetic=antithetic,
            label=f"tangent χ {group.label}".strip(),
            progress=progress,
            store=store,
            mesh=mesh,
        )
        check_alive(chains.alive, group.names, posterior)
        for position, index in enumerate(group.ids):
            chain = jax.tree.map(lambda leaf, p=position: leaf[p], chains)
            total = chain.accumulator
            sums = {name: total.sums[..., g] for g, name in enumerate(sorted(problem.probes))}
            estimates = batch_estimates(sums, total.counts, chain.alive, antithetic)
            summary = summarize_rows(total.trace, chain.alive, problem, plan.batches, antithetic)
            parts[index] = Part(*estimates, summary, ~chain.alive, {})
    cost = tangent_cost(posterior, plan, problem, probe_batch, len(parts))
    return assemble(parts, posterior, problem, rows, cost, "pathwise (tangent)", grouped=True)


def tangent_cost(
    posterior: Posterior, plan: Plan, problem: Problem, probe_batch: int | None, components: int
) -> float:
    """Gradient equivalents: G Hessian-vector products that share a gradient count 1 + 2G."""
    number = len(problem.probes)
    batch = plan.batch_size or posterior.num_samples
    sizes = [losses.shape[0] for losses in problem.probe_baseline.values()]
    sizes.append(problem.reference_baseline.shape[0])
    probes = sum(sizes) if probe_batch is None else probe_batch * len(sizes)
    observed = problem.observed_samples * (1 + 2 * number) / 3
    steps = plan.num_steps * (batch * (1 + 2 * number) + probes)
    return plan.num_chains * components * (steps + plan.num_draws * observed)
