"""χ as a covariance over draws, χ_z(φ) = −Cov_p[φ, ℓ_z − L], streamed.

Each chain is cut into batches of consecutive draws, and each batch keeps its own co-moments, so
that memory is O(batches · K · N) however many draws there are. With a_g, b_g the batch means of φ
and D = ℓ_z − L, ā, b̄ their means over all batches, and C_g the centred co-moment of n_g draws,

    x_g = −[ C_g / n_g + (a_g − ā)(b_g − b̄) ]        χ̂ = Σ_g n_g x_g / (n − 1)

and the spread of x_g over the G batches of all chains gives the standard error of χ̂ (the delta
method: ā and b̄ enter at second order). Batches must be long against the relaxation time.

The *hybrid* form of a component C takes E[D] from chains over all weights,
χ̂ = −(E_C[φD] − E_C[φ] E_full[D]), which is the centred form minus E_C[φ](E_C[D] − E_full[D]).
Sources: Baker et al. 2025, arXiv 2504.18274; Wang & Murfet 2026, arXiv 2601.13548.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxpattern import moments
from jaxpattern.diagnostics import batch_of
from jaxpattern.moments import Moments, outer
from jaxpattern.posterior import Posterior
from jaxpattern.response.assembly import Part, assemble, summarize_rows
from jaxpattern.response.problem import ComponentGroup, Estimator, Problem, check_direct
from jaxpattern.response.result import Response
from jaxpattern.runtime.checkpoint import Store
from jaxpattern.sampling import Chain, Plan, check_alive, position_of, run_chains, write_draw


def covariance(
    *, form: Literal["centred", "hybrid"] = "centred", direct: bool = False
) -> Estimator:
    """The covariance estimator of χ, as in the published work, with standard errors.

    Unbiased in the limit of long chains, with noise set by the full size of the fluctuations of φ
    and ℓ_z, however weakly they are related.

    Args:
        form: `"centred"`: every moment from the component's own chains. `"hybrid"`: E[ℓ_z − L]
            from chains over all weights, as devinterp computes it; needs `components`.
        direct: also let the loss inside φ be re-weighted, which adds ⟨D_z⟩/nβ − D_z(w*)/nβ with
            D_z = ℓ_z − L: the response of an LLC in its second convention, see `jaxpattern.llc`.
            Rows must be excess losses, so no observables.

    Raises:
        ValueError: `form` is neither.
    """
    if form not in ("centred", "hybrid"):
        raise ValueError(f"form must be 'centred' or 'hybrid', got {form!r}")

    def estimate(
        key: Key[Array, ""],
        posterior: Posterior,
        sampler: Any,
        plan: Plan,
        problem: Problem,
        groups: list[ComponentGroup],
        rows: tuple[str, ...],
        progress: bool,
        store: Store | None = None,
        mesh: Mesh | None = None,
    ) -> Response:
        if form == "hybrid" and groups[0].restrictions is None:
            raise ValueError("form='hybrid' compares components with all weights: give components")
        if direct:
            check_direct(problem)
        run = partial(
            _run, key, posterior, sampler, plan, progress=progress, store=store,
            mesh=mesh,
        )  # fmt: skip
        # Component ids count from 0; the chains over all weights come after the last of them.
        everything = ComponentGroup(("all weights",), (sum(len(g.ids) for g in groups),), None)
        full = None
        if form == "hybrid":
            full = run(replace(problem, observables=(), offsets=jnp.zeros(0)), everything)
        parts: dict[int, Part] = {}
        for group in groups:
            chains = run(problem, group)
            for position, index in enumerate(group.ids):
                chain = jax.tree.map(lambda leaf, p=position: leaf[p], chains)
                parts[index] = _summarize_component(
                    chain, full, problem, plan, posterior.nbeta if direct else None
                )
        steps = plan.num_steps * (plan.batch_size or posterior.num_samples)
        passes = plan.num_draws * problem.forward_passes / 3
        cost = plan.num_chains * (len(parts) + (full is not None)) * (steps + passes)
        return assemble(parts, posterior, problem, rows, cost, f"covariance ({form})")

    return estimate


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class _CoMoments:
    """Records co-moments of φ with D, a batch of draws at a time, and the trace of φ."""

    problem: Problem

    def init(self, posterior: Posterior, plan: Plan) -> tuple[Moments, Array]:
        zero = self.problem.offsets
        empty = moments.init(zero, jax.tree.map(jnp.zeros_like, self.problem.probe_baseline))
        batched = jax.tree.map(lambda x: jnp.zeros((plan.batches, *x.shape), x.dtype), empty)
        return batched, jnp.zeros((plan.num_draws, *zero.shape), zero.dtype)

    def value(
        self, posterior: Posterior, state: PyTree[Array], key: Key[Array, ""], plan: Plan
    ) -> tuple[Float[Array, " rows"], dict[str, Float[Array, "..."]]]:
        del key, plan
        position = position_of(state)
        excess, columns = self.problem.columns(posterior, position)
        return self.problem.rows(posterior, position, excess), columns

    def update(
        self,
        accumulator: tuple[Moments, Array],
        value: tuple[Float[Array, " rows"], dict[str, Float[Array, "..."]]],
        draw: Int[Array, ""],
        alive: Bool[Array, ""],
        plan: Plan,
    ) -> tuple[Moments, Array]:
        batched, trace = accumulator
        batch = batch_of(draw, plan.num_draws, plan.batches)
        current = jax.tree.map(lambda x: x[batch], batched)
        updated = moments.update(current, *value, weight=alive.astype(trace.dtype))
        batched = jax.tree.map(lambda x, new: x.at[batch].set(new), batched, updated)
        return batched, write_draw(trace, value[0], draw=draw, alive=alive)


def _run(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    problem: Problem,
    group: ComponentGroup,
    *,
    progress: bool,
    store: Store | None,
    mesh: Mesh | None,
) -> Chain:
    chains = run_chains(
        key,
        posterior,
        sampler,
        plan,
        _CoMoments(problem.on(mesh)),
        restrictions=group.restrictions,
        component_ids=group.ids,
        label=f"χ {group.label}".strip(),
        progress=progress,
        store=store,
        mesh=mesh,
    )
    check_alive(chains.alive, group.names, posterior)
    return chains


def _summarize_component(
    chain: Chain, full: Chain | None, problem: Problem, plan: Plan, direct: Array | float | None
) -> Part:
    """χ of one component from the batches of its chains."""
    alive = chain.alive
    pooled, trace = chain.accumulator
    means = None
    if full is not None:
        # Batches of the component are paired with batches of the full chains, which are
        # independent of them: the spread of the pairs is that of both.
        alive = alive & full.alive[0]
        means = full.accumulator[0].mean_b
        means = jax.tree.map(lambda x: x[0].reshape(-1, *x.shape[3:]), means)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pooled)
    weight = jnp.repeat(alive, plan.batches)
    chi, stderr, halves, batches = _estimate(flat, weight, problem.offsets, means, direct)
    summary = summarize_rows(trace, alive, problem, plan.batches)
    return Part(chi, stderr, halves, batches, summary, ~alive, {})


@jax.jit
def _estimate(
    pooled: Moments,
    alive: Bool[Array, " batches"],
    offsets: Float[Array, " rows"],
    full_means: dict[str, Array] | None,
    nbeta: Float[Array, ""] | float | None,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array], dict[str, Array]]:
    """χ, its standard error, χ of two halves, and the batches' estimates of the set means."""
    count = pooled.weight * alive
    number = jnp.sum(alive)
    # Halves have equal numbers of the batches that are alive; chains do not straddle them
    # unless their number is odd.
    first = (jnp.cumsum(alive) <= number / 2) & alive
    second = ~first & alive

    def columns(name: str) -> tuple[Array, Array, Array, Array]:
        mean_b, comoment = pooled.mean_b[name], pooled.comoment[name]
        full = None if full_means is None else full_means[name]
        # One factor turns the mean over draws into the unbiased n − 1 form of independent draws.
        total = jnp.sum(count)
        bessel = total / (total - 1) if full is None else jnp.ones_like(total)
        direct = 0.0 if nbeta is None else 1 / (bessel * nbeta)
        args = (count, pooled.mean_a, mean_b, comoment, offsets, full, direct)
        share = count / jnp.sum(count)
        centre = _centres(share, *args)
        chi = _mean(share, centre, *args)
        column_axes = tuple(range(1, chi.ndim))

        def spread(total: Array, g: Array) -> tuple[Array, Array]:
            x = _batch_value(g, centre, *args)
            mean = jnp.where(share[g] > 0, jnp.mean(x, axis=column_axes), jnp.nan)
            return total + (share[g] * (x - chi)) ** 2, mean

        squares, batches = jax.lax.scan(spread, jnp.zeros_like(chi), jnp.arange(count.shape[0]))
        stderr = jnp.sqrt(squares * number / (number - 1))
        halves = []
        for half in (first, second):
            half_share = count * half / jnp.sum(count * half)
            halves.append(_mean(half_share, _centres(half_share, *args), *args))
        return bessel * chi, bessel * stderr, bessel * jnp.stack(halves), bessel * batches

    results = {name: columns(name) for name in pooled.comoment}
    chi, stderr, halves, batches = (
        {name: result[i] for name, result in results.items()} for i in range(4)
    )
    return chi, stderr, halves, batches


class _Centres(NamedTuple):
    """ā, b̄ and the mean of D that φ is paired with: b̄ itself, or that over all weights."""

    a: Array
    b: Array
    full: Array


def _centres(share, count, mean_a, mean_b, comoment, offsets, full, direct):  # type: ignore[no-untyped-def]
    b = _weighted(share, mean_b)
    return _Centres(_weighted(share, mean_a), b, b if full is None else _weighted(share, full))


def _weighted(share: Array, values: Array) -> Array:
    """Σ_g share_g values_g; batches of share 0 may hold anything."""
    share = share.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.sum(jnp.where(share > 0, share * values, 0.0), axis=0)


def _batch_value(g, centre, count, mean_a, mean_b, comoment, offsets, full, direct):  # type: ignore[no-untyped-def]
    """x_g, for the centred or the hybrid form."""
    x = outer(mean_a[g] - centre.a, mean_b[g] - centre.b)
    x = x + comoment[g] / jnp.maximum(count[g], 1.0)
    if full is not None:
        # Linearised: (a_g − ā)(b̄ − F) + ā (b_g − b̄) − ā (F_g − F) about ā (b̄ − F), φ with offset.
        phi = centre.a + offsets
        x = x + outer(mean_a[g] + offsets, centre.b - centre.full)
        x = x + outer(phi, mean_b[g] - centre.b - (full[g] - centre.full))
    x = direct * mean_b[g][None] - x
    return jnp.where(count[g] > 0, x, 0.0)


def _mean(share, centre, *args):  # type: ignore[no-untyped-def]
    """Σ_g share_g x_g without holding all x_g."""

    def add(total: Array, g: Array) -> tuple[Array, None]:
        return total + share[g] * _batch_value(g, centre, *args), None

    zero = jnp.zeros_like(args[3][0])
    return jax.lax.scan(add, zero, jnp.arange(share.shape[0]))[0]
