"""χ as a covariance over draws, χ_z(φ) = −Cov_p[φ, ℓ_z − L], streamed.

Each chain is cut into batches of consecutive draws, and each batch keeps its own co-moments, so
that memory is O(batches · K · N) however many draws there are. With a_g, b_g the batch means of φ
and D = ℓ_z − L, ā, b̄ their means over all batches, and C_g the centered co-moment of n_g draws,

    x_g = −[ C_g / n_g + (a_g − ā)(b_g − b̄) ]        χ̂ = Σ_g n_g x_g / (n − 1)

and the spread of x_g over the G batches of all chains gives the standard error of χ̂ (the delta
method: ā and b̄ enter at second order). Batches must be long against the relaxation time.

The *hybrid* form of a component C takes E[D] from chains over all parameters,

    χ̂ = −(E_C[φ D] − E_C[φ] E_full[D]) ,

which is the centered form minus E_C[φ] times the difference E_C[D] − E_full[D].
Sources: Baker et al. 2025, arXiv 2504.18274; Wang & Murfet 2026, arXiv 2601.13548.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxpattern import moments
from jaxpattern.chains.divergence import check_alive
from jaxpattern.chains.kernel import position_of
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.loop import Recorded, run_chains
from jaxpattern.chains.pilot import Pilot, fly
from jaxpattern.chains.run import Run
from jaxpattern.moments import Moments, outer
from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.response.measure import (
    Estimates,
    Part,
    by_component,
    over_components,
    part_of_chains,
)
from jaxpattern.response.problem import Problem, check_reweighted
from jaxpattern.response.result import Response
from jaxpattern.response.shares import column_mean
from jaxpattern.runtime.host import Host
from jaxpattern.validation import renamed


@dataclass(frozen=True)
class Covariance:
    """χ_z = −Cov[φ, ℓ_z − L] over draws; made by `covariance`."""

    form: Literal["centered", "hybrid"] = "centered"
    reweight_observable: bool = False

    def __call__(self, run: Run, problem: Problem, host: Host) -> Response:
        """The response matrix."""
        self.check(problem)
        full = None
        if self.form == "hybrid":
            full = self._over_all_weights(run, problem, host)

        def measure(group: ComponentGroup) -> Part:
            recorded = run_chains(
                run, CoMoments(problem.core.on(host.mesh)), host, group,
                label=f"χ {group.label}".strip(),
            )  # fmt: skip
            return self.part(run, problem, group, recorded, full, fly(run, group))

        components = problem.num_components + (full is not None)
        cost = components * self.cost(run, problem)
        return by_component(run, problem, measure, name=f"covariance ({self.form})", cost=cost)

    def check(self, problem: Problem) -> None:
        """Whether the form and the convention go with what is asked."""
        if self.form == "hybrid" and problem.groups[0].restrictions is None:
            raise ValueError("form='hybrid' compares components with all weights: give components")
        if self.reweight_observable:
            check_reweighted(problem)

    def cost(self, run: Run, problem: Problem) -> float:
        """Gradient equivalents of one component; a forward pass is a third of one."""
        steps = run.plan.num_steps * run.batch
        return run.plan.num_chains * (steps + run.plan.num_draws * problem.forward_passes / 3)

    def part(
        self,
        run: Run,
        problem: Problem,
        group: ComponentGroup,
        recorded: Recorded,
        full: Recorded | None = None,
        pilot: Pilot | None = None,
    ) -> Part:
        """χ of a group from chains that recorded `CoMoments`."""
        alive, means = recorded.alive, None
        if full is not None:
            # Groups of draws of the component are paired with those of the full chains, which are
            # independent of them: the spread of the pairs is that of both.
            alive = alive & full.alive
            means = full.added.mean_b
        nbeta = run.posterior.nbeta if self.reweight_observable else None
        estimates = _finish(recorded.added, alive, means, problem.offsets, nbeta, problem.mass)
        return part_of_chains(
            run, problem, group, estimates, alive, recorded.kept,
            num_batches=run.plan.batches, pilot=pilot,
        )  # fmt: skip

    def _over_all_weights(self, run: Run, problem: Problem, host: Host) -> Recorded:
        # Component ids count from 0; the chains over all weights come after the last of them.
        everything = ComponentGroup(("all weights",), (problem.num_components,), None)
        columns = replace(problem.core, observables=(), offsets=jax.device_put(np.zeros(0, "f")))
        recorded = run_chains(
            run, CoMoments(columns.on(host.mesh)), host, everything, label="χ all weights"
        )
        check_alive(recorded.alive, everything.names, run.posterior)
        return recorded


def covariance(
    *,
    form: Literal["centered", "centred", "hybrid"] = "centered",
    reweight_observable: bool = False,
    direct: bool | None = None,
) -> Covariance:
    """The covariance estimator of χ, as in the published work, with standard errors.

    Unbiased in the limit of long chains, with noise set by the full size of the fluctuations of φ
    and ℓ_z, however weakly they are related.

    Args:
        form: `"centered"`: every moment from the component's own chains. `"hybrid"`: E[ℓ_z − L]
            from chains over all weights, as devinterp computes it; needs `components`.
        reweight_observable: also let the loss inside φ be re-weighted, which adds
            ⟨D_z⟩/nβ − D_z(w*)/nβ with D_z = ℓ_z − L: the response of an LLC in its second
            convention, see `llc`. Rows must be excess losses, so no observables.
        direct: the old name of `reweight_observable`.

    Raises:
        ValueError: `form` is neither.
    """
    form = "centered" if form == "centred" else form
    if form not in ("centered", "hybrid"):
        raise ValueError(f"form must be 'centered' or 'hybrid', got {form!r}")
    return Covariance(form, renamed("direct", direct, "reweight_observable", reweight_observable))


@register_pytree
@dataclass(frozen=True, eq=False)
class CoMoments:
    """Adds up co-moments of φ with D, and keeps φ."""

    problem: Problem

    def init(self, posterior: Posterior) -> PyTree[Array]:
        """No draws yet."""
        zero = jax.tree.map(jnp.zeros_like, (self.problem.offsets, self.problem.probe_baseline))
        return moments.init(*zero)

    def value(
        self, posterior: Posterior, state: PyTree[Any], key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """φ − φ(w*), and it with D − D(w*) of every column."""
        del key, batch_size
        position = position_of(state)
        excess, columns = self.problem.columns(posterior, position)
        phi = self.problem.phi(posterior, position, excess)
        return phi, (phi, columns)

    def update(self, accumulator: PyTree[Array], added: PyTree[Array]) -> PyTree[Array]:
        """One more draw."""
        return moments.update(accumulator, *added)


@jax.jit
def _finish(
    added: Moments,
    alive: Bool[Array, "components chains"],
    full: dict[str, Array] | None,
    offsets: Float[Array, " rows"],
    nbeta: Any,
    mass: dict[str, Array],
) -> Estimates:
    """χ of every component from the groups of draws of its chains."""

    def one(added: Moments, alive: Array) -> Estimates:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), added)
        weight = jnp.repeat(alive, added.weight.shape[1])
        means = jax.tree.map(lambda x: x[0].reshape(-1, *x.shape[3:]), full)
        return _estimate(flat, weight, offsets, means, nbeta, mass)

    return over_components(one, added, alive)


class _Groups(NamedTuple):
    """Co-moments of one probe set by group of draws, and what goes with them.

    `direct` is the factor of ⟨D⟩ where the observable is re-weighted too, `full` the means of D
    over all weights for the hybrid form.
    """

    size: Float[Array, " groups"]
    mean_a: Float[Array, "groups rows"]
    mean_b: Float[Array, "groups ..."]
    comoment: Float[Array, "groups rows ..."]
    offsets: Float[Array, " rows"]
    full: Float[Array, "groups ..."] | None
    direct: Any

    def centers(self, share: Array) -> _Centers:
        """ā, b̄, and the mean of D that φ is paired with."""
        b = _weighted(share, self.mean_b)
        full = b if self.full is None else _weighted(share, self.full)
        return _Centers(_weighted(share, self.mean_a), b, full)

    def value(self, g: Array, center: _Centers) -> Array:
        """x_g = −[C_g/n_g + (a_g − ā)(b_g − b̄)], for the centered or the hybrid form."""
        x = outer(self.mean_a[g] - center.a, self.mean_b[g] - center.b)
        x = x + self.comoment[g] / jnp.maximum(self.size[g], 1.0)
        if self.full is not None:
            # Linearized: (a_g − ā)(b̄ − F) + ā (b_g − b̄) − ā (F_g − F) about ā (b̄ − F), φ with its
            # offset.
            phi = center.a + self.offsets
            x = x + outer(self.mean_a[g] + self.offsets, center.b - center.full)
            x = x + outer(phi, self.mean_b[g] - center.b - (self.full[g] - center.full))
        x = self.direct * self.mean_b[g][None] - x
        return jnp.where(self.size[g] > 0, x, 0.0)

    def mean(self, share: Array, center: _Centers) -> Array:
        """Σ_g share_g x_g without holding all x_g."""

        def add(total: Array, g: Array) -> tuple[Array, None]:
            return total + share[g] * self.value(g, center), None

        zero = jnp.zeros_like(self.comoment[0])
        return jax.lax.scan(add, zero, jnp.arange(share.shape[0]))[0]


class _Centers(NamedTuple):
    """ā, b̄ and the mean of D that φ is paired with: b̄ itself, or that over all weights."""

    a: Array
    b: Array
    full: Array


def _weighted(share: Array, values: Array) -> Array:
    """Σ_g share_g values_g; groups of share 0 may hold anything."""
    share = share.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.sum(jnp.where(share > 0, share * values, 0.0), axis=0)


def _estimate(
    pooled: Moments,
    alive: Bool[Array, " groups"],
    offsets: Float[Array, " rows"],
    full_means: dict[str, Array] | None,
    nbeta: Any,
    mass: dict[str, Array],
) -> Estimates:
    """χ̂ = Σ_g n_g x_g / (n − 1), its standard error, two halves, and the groups' set means."""
    count = jnp.where(alive, pooled.weight, 0)
    number = jnp.sum(alive, dtype=count.dtype)
    # Halves have equal numbers of the groups that are alive; chains do not straddle them
    # unless their number is odd.
    first = (jnp.cumsum(alive, dtype=count.dtype) <= number / 2) & alive
    second = ~first & alive

    def columns(name: str) -> tuple[Array, Array, Array, Array]:
        full = None if full_means is None else full_means[name]
        # One factor turns the mean over draws into the unbiased n − 1 form of independent draws.
        total = jnp.sum(count)
        bessel = total / (total - 1) if full is None else jnp.ones_like(total)
        direct = 0.0 if nbeta is None else 1 / (bessel * nbeta)
        groups = _Groups(
            count, pooled.mean_a, pooled.mean_b[name], pooled.comoment[name], offsets, full, direct
        )
        share = count / jnp.sum(count)
        center = groups.centers(share)
        chi = groups.mean(share, center)

        def spread(total: Array, g: Array) -> tuple[Array, Array]:
            x = groups.value(g, center)
            mean = jnp.where(share[g] > 0, column_mean(x, mass[name]), jnp.nan)
            return total + (share[g] * (x - chi)) ** 2, mean

        squares, batches = jax.lax.scan(spread, jnp.zeros_like(chi), jnp.arange(count.shape[0]))
        stderr = jnp.sqrt(squares * number / (number - 1))
        halves = []
        for half in (first, second):
            half_count = jnp.where(half, count, 0)
            half_share = half_count / jnp.sum(half_count)
            halves.append(groups.mean(half_share, groups.centers(half_share)))
        return bessel * chi, bessel * stderr, bessel * jnp.stack(halves), bessel * batches

    results = {name: columns(name) for name in pooled.comoment}
    chi, stderr, halves, batches = ({n: r[i] for n, r in results.items()} for i in range(4))
    return Estimates(chi, stderr, halves, batches, {})
