r"""χ by differentiating the chain: the pathwise estimator. Over 400 lines, as the derivation and
what each setting means stand beside the code that they explain.

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

Antithetic pairs, part of the curvature, windows, blocks of steps, growth and the secant products
that stand in for H_t are derived in `docs/mathematics.md`. ‖λ‖ is compared with what a contracting
chain could reach, the sum of the ‖∇φ‖ that were added: past `growth_limit` times that the sweep is
cut, and counted in `diagnostics["truncated"]`. A Metropolis step is not a smooth function of h, so
`mala` has no pathwise derivative. The preconditioner of `rmsprop_sgld` is differentiated with the
rest: its running mean is part of the state.

**With covariance?** The best linear combination of the two estimators on the same chains, its
weight fitted to the very errors it is judged by, had 0.96–1.00 of the squared error of the pathwise
one alone for γ ≥ 50 and 0.85 at γ = 10 (`benchmarks/pathwise.py`), so none is offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxpattern.chains.kernel import position_of
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.loop import Looked, Recorded, run_chains
from jaxpattern.chains.pilot import Pilot, fly
from jaxpattern.chains.record import Nothing
from jaxpattern.chains.run import Run
from jaxpattern.losses import precision_of
from jaxpattern.response.adjoint import Adjoint
from jaxpattern.response.fallback import Fallback, grew
from jaxpattern.response.measure import (
    Estimates,
    Part,
    batch_estimates,
    by_component,
    over_components,
    part_of_chains,
    slope_beside,
)
from jaxpattern.response.problem import Problem, check_reweighted
from jaxpattern.response.products import BEND, Product, in_words, product_cost
from jaxpattern.response.result import Response, group_mean
from jaxpattern.response.schedule import mean_blocks
from jaxpattern.response.sweeping import SLOTS, Sweep, plan_sweep
from jaxpattern.response.tangent import Tangent
from jaxpattern.runtime.host import Host
from jaxpattern.validation import check_count, check_number, renamed

_HESSIAN_SHARE = 4
_ROUNDING = 0.1
_WIDEST = 8.0


Pilots: TypeAlias = dict[tuple[int, ...], Pilot | None]


@dataclass(frozen=True)
class Pathwise:
    """χ by differentiating the chain; made by `pathwise`, which says what the settings mean."""

    window: int | None = None
    every: int | None = None
    antithetic: bool = True
    hessian_batch: int | None = None
    growth_limit: float = 10.0
    on_growth: Literal["truncate", "covariance"] = "truncate"
    mode: Literal["adjoint", "tangent", "auto"] = "adjoint"
    probe_batch: int | None = None
    reweight_observable: bool = False
    product: Product | Literal["auto"] = "auto"
    width: float | None = None
    on_unreliable: Literal["warn", "covariance", "raise"] = "warn"

    def __call__(self, run: Run, problem: Problem, host: Host) -> Response:
        """The response matrix."""
        if not run.sampler.needs_minibatch or run.sampler.gradients_per_step not in (None, 1):
            raise TypeError(
                "pathwise needs a sampler whose step takes (key, state, minibatch), asks for one "
                f"gradient and is smooth; {run.sampler.name} is not: use estimator=covariance()"
            )
        if self.antithetic:
            pairs = -(-run.plan.num_chains // 2)
            run = replace(run, plan=replace(run.plan, num_batches=run.plan.batches_over(pairs)))
        if self.reweight_observable:
            check_reweighted(problem)
            if self.mode != "adjoint":
                raise ValueError(f"reweight_observable needs mode='adjoint', got {self.mode!r}")
        # The derivative of the chain as it runs has no first-order bias from mini-batches that heat
        # it; of what they do beyond that, the covariance of the same draws tells.
        flown = {group.ids: fly(run, group) for group in problem.groups}
        pilots = {ids: p and p._replace(heat=np.zeros_like(p.heat)) for ids, p in flown.items()}
        forwards = self.product_of(run, pilots)
        tangent = Tangent(self.probe_batch, self.antithetic, forwards, 1.0, self.growth_limit)

        def forth(width: float) -> Response:
            return replace(tangent, width=width)(run, problem, host, pilots)

        if self.mode == "tangent":
            return self._settled(self._widened(forth, forwards), run, problem, host)
        gradients = [p.gradient for p in pilots.values() if p is not None]
        gradient = float(np.max(np.concatenate(gradients))) if gradients else None
        sweep = self.sweep(run, problem, gradient)
        product = self.product_of(run, pilots, problem.num_rows)
        if self.mode == "auto" and tangent.cost(run, problem) < self.cost(sweep, problem, product):
            return self._settled(self._widened(forth, forwards), run, problem, host)

        def back(width: float) -> Response:
            return self._adjoint(sweep, problem, host, product, width, pilots)

        response = self._settled(self._widened(back, product), sweep.run, problem, host)
        return group_mean(response) if self.mode == "auto" else response

    def _widened(self, measure: Callable[[float], Response], product: Product) -> Response:
        """χ by secants as wide as the noise of a step, and wider where it grew."""
        width = self.width or 1.0
        response = measure(width)
        while self.width is None and product != "autodiff" and width < _WIDEST and grew(response):
            width *= 2
            wider = measure(width)
            response = replace(wider, cost=wider.cost + response.cost)
        return response

    @property
    def _settled(self) -> Fallback:
        """What becomes of rows that cannot be trusted."""
        return Fallback(
            self.growth_limit, self.on_growth, self.on_unreliable, self.reweight_observable
        )

    def sweep(self, run: Run, problem: Problem, gradient: float | None = None) -> Sweep:
        """How the chains of a run are swept; `gradient` is the measured size of its gradients."""
        return plan_sweep(
            run, problem, window=self.window, every=self.every, antithetic=self.antithetic,
            gradient=gradient,
        )  # fmt: skip

    def product_of(self, run: Run, pilots: Pilots, number: int | None = None) -> Product:
        """Secants where the gradients are exact enough for them, autodiff's product elsewhere;
        one-sided where gradients hardly bend, unless a `number` of products makes that no cheaper.
        """
        if self.product != "auto":
            return self.product
        if run.sampler.step_scale is None:
            return "autodiff"
        # The types in the program say what it is computed in, also inside a trace; a measurement
        # finds what they do not show.
        posterior = run.posterior
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), posterior.data
        )
        finest = precision_of(posterior.loss_fn, posterior.params, one)
        flown = [pilot for pilot in pilots.values() if pilot is not None]
        exact = finest <= float(jnp.finfo(jnp.float32).eps)
        if not exact or any(np.max(pilot.rounding) >= _ROUNDING for pilot in flown):
            return "autodiff"
        straight = flown and all(np.max(pilot.bend) < BEND for pilot in flown)
        return "one-sided" if straight and number != 1 else "central"

    def _adjoint(
        self,
        sweep: Sweep,
        problem: Problem,
        host: Host,
        product: Product,
        width: float,
        pilots: Pilots,
    ) -> Response:
        run, cost = sweep.run, self.cost(sweep, problem, product)

        def measure(group: ComponentGroup) -> Part:
            look = self.look(sweep, problem.core.on(host.mesh), product, width)
            recorded = run_chains(
                run, Nothing(), host, group, look=look,
                segments=sweep.schedule, antithetic=self.antithetic,
                label=f"pathwise χ {group.label}".strip(),
            )  # fmt: skip
            return self.part(run, problem, group, recorded, pilots[group.ids])

        every = "" if self.every is None else f", every {self.every}"
        name = f"pathwise (adjoint, window {sweep.window}{every}, {in_words(product, width)})"
        return by_component(run, problem, measure, name=name, cost=cost)

    def look(
        self,
        sweep: Sweep,
        problem: Problem,
        product: Product = "central",
        width: float | None = None,
    ) -> Adjoint:
        """What sweeps back over the segments of a chain."""
        batch, plan = sweep.run.batch, sweep.run.plan
        part = self.hessian_batch or -(-batch // _HESSIAN_SHARE)
        fresh = problem.reference_is_data and not self.reweight_observable
        return Adjoint(
            problem=problem,
            growth_limit=np.asarray(self.growth_limit, problem.offsets.dtype),
            history=sweep.history,
            slots=SLOTS,
            tail_blocks=sweep.tail_blocks,
            direct=self.reweight_observable,
            hessian_batch=part if part < batch else None,
            reference_batch=plan.batch_size if fresh else None,
            product=product,
            width=np.asarray(width or self.width or 1.0, problem.offsets.dtype),
        )

    def part(
        self,
        run: Run,
        problem: Problem,
        group: ComponentGroup,
        recorded: Recorded,
        pilot: Pilot | None = None,
    ) -> Part:
        """χ of a group from chains that were swept back."""
        estimates = _finish(recorded.looked, recorded.alive, problem.mass, self.antithetic)
        return part_of_chains(
            run, problem, group, estimates, recorded.alive, recorded.looked.draws,
            num_batches=run.plan.batches, antithetic=self.antithetic, pilot=pilot,
            states=position_of(recorded.state),
        )  # fmt: skip

    def cost(self, sweep: Sweep, problem: Problem, product: Product = "central") -> float:
        """Gradient equivalents: K Hessian products as `product_cost` says, a forward pass with K
        tangents (1 + 2K)/3, the gradient of an observable 1.
        """
        run, look = sweep.run, self.look(sweep, problem, product)
        tangents = 1 + 2 * problem.num_rows
        probes = problem.probe_samples + (look.reference_batch or problem.reference_samples)
        steps, asked = mean_blocks(sweep.schedule)
        one = (
            run.plan.num_steps * run.batch
            + steps * (look.hessian_batch or run.batch) * product_cost(product, problem.num_rows)
            + asked * probes * tangents / 3
            + run.plan.num_draws * problem.observed_samples
        )
        return run.plan.num_chains * problem.num_components * one


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
    reweight_observable: bool = False,
    product: Product | Literal["auto"] = "auto",
    width: float | None = None,
    on_unreliable: Literal["warn", "covariance", "raise"] = "warn",
    direct: bool | None = None,
) -> Pathwise:
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
        every: steps for each evaluation of the probes. By default few right behind a draw and more
            with the distance from it.
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
        reweight_observable: also let the loss inside φ be re-weighted, which adds
            ⟨D_z⟩/nβ − D_z(w*)/nβ with D_z = ℓ_z − L: the response of an LLC in its second
            convention, see `llc`. Rows must be excess losses, so no observables; not in tangent
            mode.
        product: how Hessian products are computed: `"central"` or `"one-sided"` differences of
            gradients at the scale of the chain's noise, which see kinks, or `"autodiff"`. By
            default a difference where the gradients are exact enough for it (float32 at full matmul
            precision, which is measured), one-sided where they hardly bend on that scale (measured
            too) and that is cheaper, and autodiff's elsewhere; the result says which.
        width: c, the distance of those gradients from each other in units of 2 √ε. By default 1,
            and measured again with twice that, up to 8, where the derivative grew past the limit;
            the result says which.
        on_unreliable: where `Response.verdict` finds that the covariance of the same draws
            contradicts a row, that the chain is shorter than its memory, or that its chains have
            not settled: `"warn"`; `"covariance"`, which measures such rows by `covariance()`
            instead, and warns; or `"raise"`, an `UnreliableError`.
        direct: the old name of `reweight_observable`.

    Raises:
        ValueError, TypeError: an argument does not fit.

    References:
        Glasserman 1991; Assaraf, Jourdain, Lelièvre & Roux 2018; Hammersley & Morton 1956.
    """
    for name, value in (
        ("window", window),
        ("every", every),
        ("hessian_batch", hessian_batch),
        ("probe_batch", probe_batch),
    ):
        if value is not None:
            check_count(name, value, minimum=1)
    check_number("growth_limit", growth_limit, minimum=1.0)
    if mode not in ("adjoint", "tangent", "auto"):
        raise ValueError(f"mode must be 'adjoint', 'tangent' or 'auto', got {mode!r}")
    if product not in ("auto", "central", "one-sided", "autodiff"):
        raise ValueError(
            f"product must be 'auto', 'central', 'one-sided' or 'autodiff', got {product!r}"
        )
    if on_unreliable not in ("warn", "covariance", "raise"):
        raise ValueError(
            f"on_unreliable must be 'warn', 'covariance' or 'raise', got {on_unreliable!r}"
        )
    if width is not None:
        check_number("width", width, minimum=0.0, exclusive=True)
    if on_growth not in ("truncate", "covariance"):
        raise ValueError(f"on_growth must be 'truncate' or 'covariance', got {on_growth!r}")
    return Pathwise(
        window=window,
        every=every,
        antithetic=antithetic,
        hessian_batch=hessian_batch,
        growth_limit=growth_limit,
        on_growth=on_growth,
        mode=mode,
        probe_batch=probe_batch,
        reweight_observable=renamed("direct", direct, "reweight_observable", reweight_observable),
        product=product,
        width=width,
        on_unreliable=on_unreliable,
    )


@partial(jax.jit, static_argnames="antithetic")
def _finish(
    looked: Looked,
    alive: Bool[Array, "components chains"],
    mass: dict[str, Array],
    antithetic: bool,
) -> Estimates:
    """χ of every component from the groups of draws of its chains, and the health of its sweeps."""

    def one(looked: Looked, alive: Array) -> Estimates:
        sums, health = looked.added, looked.segments
        estimates = batch_estimates(sums.chi, sums.num_draws, alive, antithetic, mass)

        def mean(x: Array) -> Array:
            """Over the segments of the chains that are alive."""
            over_segments = jnp.mean(x, axis=1)
            kept = jnp.where(alive.reshape(-1, *(1,) * (x.ndim - 2)), over_segments, 0.0)
            return jnp.sum(kept, axis=0) / alive.sum().astype(x.dtype)

        slope, slope_error = slope_beside(
            sums.beside, estimates.chi, estimates.stderr, alive, antithetic
        )
        return estimates._replace(
            diagnostics={
                "slope": slope,
                "slope_error": slope_error,
                "tail": mean(health.tail),
                "remainder": mean(health.remainder),
                "growth": jnp.moveaxis(health.growth, -1, 0),
                "truncated": jnp.moveaxis(health.truncated, -1, 0),
            }
        )

    return over_components(one, looked, alive)
