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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxpattern import moments
from jaxpattern.chains.kernel import noise_scale, position_of
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.loop import run_chains
from jaxpattern.chains.pilot import Pilot
from jaxpattern.chains.run import Run
from jaxpattern.losses import counted_rows
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.response.measure import (
    Estimates,
    Part,
    batch_estimates,
    by_component,
    over_components,
    part_of_chains,
    slope_beside,
)
from jaxpattern.response.problem import Problem
from jaxpattern.response.products import (
    Product,
    Secants,
    autodiff_products,
    in_words,
    of_each,
    product_cost,
    secants_of,
)
from jaxpattern.response.result import Response
from jaxpattern.response.step import floats_of, given_step
from jaxpattern.runtime.host import Host
from jaxpattern.runtime.mesh import put
from jaxpattern.samplers import Sampler
from jaxpattern.types import Position, SamplingAlgorithm


class TangentState(NamedTuple):
    """A sampler's state, its position, and the tangents `[G, ...]` of its floating-point leaves.

    `levels` are L_g − L at the step before, `reach` the sum of what was put into each tangent: as
    far as a contracting chain could take it.
    """

    position: Position
    state: PyTree[Array]
    tangents: list[Array]
    levels: Float[Array, "*lead groups"]
    reach: Float[Array, "*lead groups"]


@register_pytree
@dataclass(frozen=True, eq=False)
class TangentAlgorithm:
    """A sampler whose chains carry δ_g of every probe set g."""

    sampler: Sampler
    problem: Problem
    width: Any
    probe_batch: int | None = field(metadata={"static": True})
    product: Product = field(metadata={"static": True})

    def __call__(self, posterior: Any) -> SamplingAlgorithm:
        algorithm = self.sampler(posterior)
        groups = [self.problem.probe_minibatch(name) for name in sorted(self.problem.probes)]

        def init(position: Position, rng_key: Key[Array, ""]) -> TangentState:
            state = jax.tree.map(jnp.asarray, algorithm.init(position, rng_key))
            tangents = [
                jnp.zeros((len(groups), *leaf.shape), leaf.dtype)
                for leaf in floats_of(state).leaves
            ]
            zero = jnp.zeros(len(groups), self.problem.offsets.dtype)
            return TangentState(position_of(state), state, tangents, zero, zero)

        def step(key: Key[Array, ""], state: TangentState, minibatch: Minibatch) -> TangentState:
            # The step keeps the key it would have had: the chain is the plain sampler's.
            tilt_key = jax.random.fold_in(key, 1)
            position, inner, tangents, _, reach = state
            floats = floats_of(inner)

            def move(leaves: list[Array], gradient: Position) -> tuple[list[Array], Any]:
                moved = given_step(self.sampler, posterior, key, floats.rebuild(leaves), gradient)
                return floats_of(moved).leaves, moved

            def tangent_position(tangent: list[Array]) -> Position:
                return jax.jvp(
                    lambda leaves: position_of(floats.rebuild(leaves)), (floats.leaves,), (tangent,)
                )[1]

            # H δ_g + ∇(ℓ_g − L) of every group, through one step.
            sets = [self.problem.reference, *groups]
            parts = self._parts(posterior.own_key(tilt_key), sets)
            directions = jax.vmap(tangent_position)(tangents)
            secants = secants_of(
                position, directions, self.product, scale=noise_scale(self.sampler, inner),
                width=self.width, key=jax.random.fold_in(key, 2), mirror=posterior.mirror,
            )  # fmt: skip
            losses, gradients = _look(posterior, secants, minibatch, parts)
            ends = 1 + len(secants.numbers)
            gradient, slopes, reference, tilt = (
                jax.tree.map(lambda g: g[at], gradients)  # noqa: B023
                for at in (0, slice(1, ends), slice(ends, ends + 1), slice(ends + 1, None))
            )
            if self.product == "autodiff":
                own = partial(posterior.loss_gradient, minibatch=minibatch)
                bent = autodiff_products(own, position, directions)
            else:
                bent = secants.products(slopes, gradient if self.product == "one-sided" else None)
            levels = losses[ends + 1 :] - losses[ends]
            tilt = jax.tree.map(jnp.subtract, tilt, reference)
            pushed = jax.tree.map(jnp.add, bent, tilt)
            _, linear, inner = jax.linearize(move, floats.leaves, gradient, has_aux=True)
            put_in = jax.vmap(partial(linear, jax.tree.map(jnp.zeros_like, floats.leaves)))(tilt)
            tangents = jax.vmap(linear)(tangents, pushed)
            reach = reach + _sizes(inner, put_in)
            return TangentState(position_of(inner), inner, tangents, levels, reach)

        return SamplingAlgorithm(init, step)

    def _parts(self, key: Key[Array, ""], sets: Sequence[Minibatch]) -> list[Minibatch]:
        """`probe_batch` fresh samples of every set; those that are excluded are never evaluated."""
        counted = [Minibatch(counted_rows(*each), each.weights) for each in sets]
        if self.probe_batch is None:
            return counted
        keys, sizes = jax.random.split(key, len(sets)), [len(each.weights) for each in sets]
        draw = partial(jax.random.randint, shape=(self.probe_batch,), minval=0)
        index = jax.vmap(lambda key, size: draw(key, maxval=size))(keys, np.asarray(sizes))
        return [
            jax.tree.map(lambda x: x[chosen], each)  # noqa: B023
            for each, chosen in zip(counted, index, strict=True)
        ]


def _look(
    posterior: Posterior, secants: Secants, minibatch: Minibatch, parts: Sequence[Minibatch]
) -> tuple[Array, Position]:
    """Loss and gradient on the step's mini-batch, at w and at the ends of secants, and on each part
    at w. Batches of one shape are looked at in one loop, so that its program holds the model once.
    """
    batches = [minibatch, *parts]
    batch_of = np.arange(-len(secants.numbers), len(batches)).clip(0)
    steps = jnp.pad(secants.steps, (1, len(parts)))
    numbers = np.pad(secants.numbers, (1, len(parts)))
    shapes = [str(jax.tree.map(jax.typeof, batch)) for batch in batches]
    order, found = [], []
    for shape in dict.fromkeys(shapes):
        members = np.flatnonzero([shape == other for other in shapes])
        places = np.flatnonzero(np.isin(batch_of, members))
        which = np.searchsorted(members, batch_of[places]).astype(np.int32)
        look = _looking(posterior, secants, [batches[i] for i in members])
        found.append(of_each(look, steps[places], numbers[places], which))
        order.append(places)
    if len(found) == 1:
        return found[0]
    back = np.argsort(np.concatenate(order))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[back], *found)


def _looking(
    posterior: Posterior, secants: Secants, batches: Sequence[Minibatch]
) -> Callable[[Array, Array, Array], tuple[Array, Position]]:
    """Loss and gradient at w + s v on one of several batches of one shape."""
    measure = jax.value_and_grad(posterior.loss)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches) if batches[1:] else None

    def look(step: Array, number: Array, which: Array) -> tuple[Array, Position]:
        if stacked is None:
            return measure(secants.place(step, number), batches[0])
        batch = jax.tree.map(lambda leaf: leaf[which], stacked)
        return measure(secants.place(step, number), batch)

    return look


def _sizes(state: PyTree[Array], tangents: list[Array]) -> Float[Array, " groups"]:
    """‖δ_g‖ of the position."""
    rebuild = floats_of(state).rebuild
    return jax.vmap(lambda leaves: optax.tree.norm(position_of(rebuild(leaves))))(tangents)


@register_pytree
@dataclass(frozen=True, eq=False)
class TangentRecorder:
    """Keeps φ, and adds up ∇φ · δ_g / nβ."""

    problem: Problem

    def init(self, posterior: Posterior) -> PyTree[Array]:
        """No draws yet."""
        rows, groups = self.problem.num_rows, len(self.problem.probes)
        dtype = self.problem.offsets.dtype
        beside = moments.init(jnp.zeros(rows, dtype), jnp.zeros(groups, dtype))
        return jnp.zeros((rows, groups), dtype), beside, jnp.zeros(groups, dtype)

    def value(
        self, posterior: Posterior, state: TangentState, key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """φ − φ(w*), and its derivative along every tangent."""
        del key, batch_size
        floats = floats_of(state.state)

        def phi(leaves: list[Array]) -> Array:
            return self.problem.phi_at(posterior, position_of(floats.rebuild(leaves)))

        values, slopes = of_each(lambda v: jax.jvp(phi, (floats.leaves,), (v,)), state.tangents)
        values, slopes = values[0], slopes.T / posterior.nbeta
        # The levels of the step before the draw: what the covariance beside is made of.
        growth = _sizes(state.state, state.tangents) / jnp.maximum(state.reach, 1e-30)
        return values, (slopes, values, state.levels, growth)

    def update(self, accumulator: PyTree[Array], added: PyTree[Array]) -> PyTree[Array]:
        """One more draw."""
        total, beside, most = accumulator
        slopes, values, levels, growth = added
        return total + slopes, moments.update(beside, values, levels), jnp.maximum(most, growth)


@dataclass(frozen=True)
class Tangent:
    """The data-mixture response: a column per probe set, all observables at once."""

    probe_batch: int | None
    antithetic: bool
    product: Product
    width: float
    growth_limit: float

    def __call__(
        self, run: Run, problem: Problem, host: Host, pilots: Mapping[Any, Pilot | None]
    ) -> Response:
        """The response matrix."""
        # Probes are drawn from at each step, and lie everywhere.
        spread = put(problem.core, host.mesh)
        algorithm = TangentAlgorithm(
            run.sampler, spread, np.float32(self.width), self.probe_batch, self.product
        )
        carried = replace(run, sampler=Sampler(algorithm, name=f"tangents of {run.sampler.name}"))
        names = tuple(sorted(problem.probes))

        def measure(group: ComponentGroup) -> Part:
            recorded = run_chains(
                carried, TangentRecorder(spread), host, group, antithetic=self.antithetic,
                label=f"tangent χ {group.label}".strip(),
            )  # fmt: skip
            estimates = _finish(
                recorded.added,
                recorded.alive,
                names,
                self.antithetic,
                np.float32(self.growth_limit),
            )
            return part_of_chains(
                run, problem, group, estimates, recorded.alive, recorded.kept,
                num_batches=run.plan.batches, antithetic=self.antithetic,
                pilot=pilots[group.ids],
            )  # fmt: skip

        return by_component(
            run,
            problem,
            measure,
            name=f"pathwise (tangent, {in_words(self.product, self.width)})",
            cost=self.cost(run, problem),
            grouped=True,
        )

    def cost(self, run: Run, problem: Problem) -> float:
        """Gradient equivalents; the products share the gradient of the step where they need it."""
        number, plan = len(problem.probes), run.plan
        sizes = [losses.shape[0] for losses in problem.probe_baseline.values()]
        sizes.append(problem.reference_baseline.shape[0])
        probes = sum(sizes) if self.probe_batch is None else self.probe_batch * len(sizes)
        observed = problem.observed_samples * (1 + 2 * number) / 3
        own = product_cost(self.product, number) + (self.product == "central")
        steps = plan.num_steps * (run.batch * own + probes)
        return plan.num_chains * problem.num_components * (steps + plan.num_draws * observed)


@partial(jax.jit, static_argnames=("names", "antithetic"))
def _finish(
    added: Any,
    alive: Bool[Array, "components chains"],
    names: tuple[str, ...],
    antithetic: bool,
    growth_limit: Any,
) -> Estimates:
    def one(added: Any, alive: Array) -> Estimates:
        total, beside, growth = added
        sums = {name: total[..., g] for g, name in enumerate(names)}
        estimates = batch_estimates(sums, beside.weight, alive, antithetic)
        by_name = {name: beside.mean_b[..., g] for g, name in enumerate(names)}
        joint = {name: beside.comoment[..., g] for g, name in enumerate(names)}
        slope, error = slope_beside(
            beside._replace(mean_b=by_name, comoment=joint),
            estimates.chi,
            estimates.stderr,
            alive,
            antithetic,
        )
        # Of every chain and group of draws, the most of any tangent; all rows share the tangents.
        most = jnp.where(alive[:, None], jnp.max(growth, axis=-1), 0.0)
        most = jnp.broadcast_to(most, (total.shape[-2], *most.shape))
        return estimates._replace(
            diagnostics={
                "slope": slope,
                "slope_error": error,
                "growth": most,
                "truncated": most > growth_limit,
            }
        )

    return over_components(one, added, alive)
