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

**Antithetic pairs.** To first order in the noise the estimate at a draw is off by a linear function
of ξ. A twin chain that is given −ξ is off by the negative of it, and the mean of the two keeps only
what is even in ξ (Hammersley & Morton 1956). Both follow the same law, so nothing else changes;
a covariance gains nothing from it, being even in ξ to begin with.

**Part of the curvature.** λ_t is linear in each H_t alone. An H_t from a random part of the
mini-batch, chosen independently of the chain, has the mean H_t whatever the chain did, so that the
mean of the estimate is still exactly the derivative of the chain. Where γ outweighs nβ H this
costs little variance and saves most of a Hessian-vector product.

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

**What it needs.** ∇ℓ must be continuous in w, or the path jumps where the derivative does not look:
a ReLU's kinks carry curvature that no Hessian-vector product sees. That part is missing from λ; χ
was off by a fifth on ReLU regressions of eight units (nβ = 300, γ = 30), by a quarter on single
samples of the toy model of superposition (nβ = 1000, γ = 30), less where γ outweighs nβ H. GELU,
SiLU, softmax and tanh have no such part. A Metropolis step is not a smooth function of h, so `mala`
has no pathwise derivative. The preconditioner of `rmsprop_sgld` is differentiated with the rest:
its running mean is part of the state.

**With covariance?** The best linear combination of the two estimators on the same chains, its
weight fitted to the very errors it is judged by, had 0.96–1.00 of the squared error of the pathwise
one alone for γ ≥ 50 and 0.85 at γ = 10 (`benchmarks/pathwise.py`), so none is offered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key

from jaxpattern.posterior import Posterior
from jaxpattern.response.adjoint import AdjointChain, Layout, run_adjoint
from jaxpattern.response.assembly import Part, assemble, batch_estimates, summarize_rows
from jaxpattern.response.covariance import covariance
from jaxpattern.response.problem import ComponentGroup, Estimator, Problem, check_direct
from jaxpattern.response.result import Response, group_mean
from jaxpattern.response.tangent import tangent_cost, tangent_response
from jaxpattern.restriction import Restriction
from jaxpattern.runtime.checkpoint import Store
from jaxpattern.samplers import relaxation_steps
from jaxpattern.sampling import (
    Plan,
    build_kernel,
    check_alive,
)
from jaxpattern.types import Position
from jaxpattern.validation import check_count, check_number, is_concrete

_WINDOW_RELAXATIONS = 6
_SEGMENT_WINDOWS = 4
_SEGMENT_BYTES = 2**30
_LEAST_BATCHES = 4
_HESSIAN_SHARE = 4


class GrowthWarning(UserWarning):
    """The adjoint grew: the chain expands where it should contract."""


def pathwise(
    *,
    window: int | None = None,
    every: int | None = None,
    antithetic: bool = True,
    hessian_batch: int | None = None,
    growth_limit: float = 10.0,
    on_growth: Literal["truncate", "covariance"] = "truncate",
    mode: Literal["adjoint", "tangent", "auto"] = "adjoint",
    probe_batch: int | None = None,
    direct: bool = False,
) -> Estimator:
    """The pathwise estimator of χ: nβ χ_z = E Σ_t ⟨c_t, ∇(ℓ_z − L)(w_t)⟩, c_t the chain's adjoint.

    It is the derivative of the chain itself; the module's docstring derives it. Estimates of draws
    whose windows overlap are correlated, so standard errors come from batches of draws of at least
    a window each: by default 20 in all, but fewer in a short chain, and at least four. (With n of
    them 1.96 standard errors hold χ as often as Student's t with n − 1 degrees of freedom says: in
    93.5 % of cases for 20, 91 % for 8, 85 % for four.) Its `diagnostics` have a leading row axis:

    * `"tail"`, `[K, blocks]`: root mean square over the columns of what each block of steps before
      the first draw of a segment adds to χ, over that of χ; the last entries say what the window
      cuts off.
    * `"remainder"`, `[K]`: mean of ‖λ‖ at the end of the window over ‖λ‖ at the draw.
    * `"growth"`, `[K, chains, segments]`: largest ‖λ‖ over the sum of the ‖∇φ‖ put into it, by
      segment of consecutive draws, all equally many. A contracting chain stays below 1.
    * `"truncated"`, `[K, chains, segments]`: whether the sweep was cut there for growth.

    Args:
        window: steps behind each draw. By default six relaxation times of the sampler in flat
            directions, 2/(εγ) for SGLD.
        every: p, steps for each evaluation of the probes; the nearest divisor of `plan.thin` is
            taken. By default half a relaxation time.
        antithetic: chains 2c and 2c + 1 are mirrored twins, which share their noise with opposite
            signs. A pair counts as one chain for standard errors; an odd last chain has no twin.
        hessian_batch: samples of each step's mini-batch (fresh ones of the data where the plan has
            no mini-batches) behind its Hessian-vector product; at least `plan.batch_size` is all
            of them. By default a quarter. Adjoint mode only.
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
        Glasserman 1991; Assaraf, Jourdain, Lelièvre & Roux 2018; Hammersley & Morton 1956.
    """
    if hessian_batch is not None:
        check_count("hessian_batch", hessian_batch, minimum=1)
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
        store: Store | None = None,
        mesh: Mesh | None = None,
    ) -> Response:
        if not build_kernel(posterior, sampler, plan).takes_minibatch:
            raise TypeError(
                "pathwise needs a sampler whose step takes (key, state, minibatch) and is smooth; "
                "a Metropolis kernel such as mala is not: use estimator=covariance()"
            )
        if antithetic:
            pairs = -(-plan.num_chains // 2)
            plan = replace(plan, num_batches=plan.batches_over(pairs))
        if direct:
            check_direct(problem)
            if mode != "adjoint":
                raise ValueError(f"direct needs mode='adjoint', got {mode!r}")
        components = len(rows) // problem.num_rows
        forwards = tangent_cost(posterior, plan, problem, probe_batch, components)
        if mode != "tangent":
            layout = _layout(
                posterior, sampler, plan, problem, groups, window, every, antithetic, hessian_batch,
                direct,
            )  # fmt: skip
            cost = _cost(posterior, plan, problem, layout, components)
        if mode == "tangent" or (mode == "auto" and forwards < cost):
            return tangent_response(
                key, posterior, sampler, plan, problem, groups, rows, probe_batch, antithetic,
                progress, store, mesh,
            )  # fmt: skip
        parts: dict[int, Part] = {}
        for group in groups:
            chains = run_adjoint(
                key, posterior, sampler, plan, problem, layout, growth_limit, group, progress,
                store, mesh,
            )  # fmt: skip
            check_alive(chains.alive, group.names, posterior)
            for position, index in enumerate(group.ids):
                chain = jax.tree.map(lambda leaf, p=position: leaf[p], chains)
                parts[index] = _summarize_component(chain, problem, plan, layout)
        name = f"pathwise (adjoint, window {layout.window}, every {layout.every})"
        response = assemble(parts, posterior, problem, rows, cost, name)
        grown = response.diagnostics["truncated"].any(axis=(1, 2))
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
                    key, posterior, sampler, plan, problem, groups, rows, progress, store, mesh
                )
                response = _choose(response, other, grown)
        return group_mean(response) if mode == "auto" else response

    return estimate


def _layout(
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    problem: Problem,
    groups: list[ComponentGroup],
    window: int | None,
    every: int | None,
    antithetic: bool,
    hessian_batch: int | None,
    direct: bool,
) -> Layout:
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
    # Batches of at least a window, but some in all: one spread needs more than one number.
    chains = -(-plan.num_chains // 2) if antithetic else plan.num_chains
    whole_windows = plan.num_draws * plan.thin // window
    least = min(-(-_LEAST_BATCHES // chains), plan.num_draws)
    batches = min(plan.batches, max(whole_windows, least))
    # Several windows of draws share a sweep, as far as the states fit in memory; segments are
    # equal, and fill the batches evenly.
    states = _SEGMENT_BYTES // (plan.num_chains * max(_bytes(posterior, g) for g in groups))
    wanted = max(1, min(_SEGMENT_WINDOWS * window, states - window) // plan.thin)
    most = max(1, plan.num_draws // batches)
    draws = max(
        m
        for m in range(1, plan.num_draws + 1)
        if plan.num_draws % m == 0 and m <= min(wanted, most)
    )
    batch = plan.batch_size or posterior.num_samples
    part = hessian_batch or -(-batch // _HESSIAN_SHARE)
    return Layout(
        window, every, plan.thin, draws, plan.num_draws // draws, direct, batches, antithetic,
        part if part < batch else None,
        plan.batch_size if problem.reference_is_data and not direct else None,
    )  # fmt: skip


def _bytes(posterior: Posterior, group: ComponentGroup) -> int:
    """Memory of the positions of all components of a group."""

    def centre(restriction: Restriction) -> Position:
        return replace(posterior, restriction=restriction).centre

    positions = posterior.centre
    if group.restrictions is not None:
        positions = jax.eval_shape(jax.vmap(centre, axis_size=len(group.ids)), group.restrictions)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(positions))


def _summarize_component(chain: AdjointChain, problem: Problem, plan: Plan, layout: Layout) -> Part:
    """χ of one component: means of the batches of its chains, and their spread."""
    alive = chain.alive
    chi, stderr, halves, batches = batch_estimates(
        chain.sums, chain.counts, alive, layout.antithetic
    )
    lost = alive.sum()
    diagnostics = {
        "tail": jnp.sum(jnp.where(alive[:, None, None], chain.tail, 0.0), axis=0) / lost,
        "remainder": jnp.sum(jnp.where(alive[:, None], chain.remainder, 0.0), axis=0) / lost,
        "growth": jnp.moveaxis(chain.growth, -1, 0),
        "truncated": jnp.moveaxis(chain.truncated, -1, 0),
    }
    summary = summarize_rows(chain.trace, alive, problem, layout.batches, layout.antithetic)
    return Part(chi, stderr, halves, batches, summary, ~alive, diagnostics)


def _choose(response: Response, other: Response, rows: Bool[Array, " rows"]) -> Response:
    """The other estimate in some rows."""

    def pick(axis: int) -> Callable[[Array, Array], Array]:
        def choose(a: Array, b: Array) -> Array:
            shape = [1] * a.ndim
            shape[axis] = -1
            return jnp.where(rows.reshape(shape), b, a)

        return choose

    def pad(batches: Array, length: int) -> Array:
        """NaN stands for batches that the other estimator has more of."""
        return jnp.pad(batches, ((0, length - len(batches)), (0, 0)), constant_values=jnp.nan)

    length = max(len(x) for r in (response, other) for x in r.batches.values())
    ours, theirs = (jax.tree.map(partial(pad, length=length), r.batches) for r in (response, other))
    return replace(
        response,
        chi=jax.tree.map(pick(0), response.chi, other.chi),
        stderr=jax.tree.map(pick(0), response.stderr, other.stderr),
        halves=jax.tree.map(pick(1), response.halves, other.halves),
        batches=jax.tree.map(pick(1), ours, theirs),
        cost=response.cost + other.cost,
    )


def _cost(
    posterior: Posterior, plan: Plan, problem: Problem, layout: Layout, components: int
) -> float:
    """Gradient equivalents: a Hessian-vector product of K rows counts 1 + 2K, a forward pass with
    K tangents (1 + 2K)/3, the gradient of an observable 1."""
    rows = problem.num_rows
    batch = plan.batch_size or posterior.num_samples
    sweeps = layout.num_segments
    reference = layout.reference_batch or problem.reference_samples
    probes = problem.probe_samples + reference
    return (
        plan.num_chains
        * components
        * (
            plan.num_steps * batch
            + sweeps * layout.length * (layout.hessian_batch or batch) * (1 + 2 * rows)
            + sweeps * layout.blocks * probes * (1 + 2 * rows) / 3
            + plan.num_draws * problem.observed_samples
        )
    )
