"""Samplers: functions from a `Posterior` to a blackjax `SamplingAlgorithm`.

A sampler made here is a `jax.tree_util.Partial` whose leaves are its settings, so that it passes
through `jit` without compiling again for another step size, and can be vmapped over one. Step
sizes are ε in the field's convention, w ← w + (ε/2) ∇log p + √ε ξ; blackjax's is ε/2.

A user's own sampler is any function of the posterior that returns a `SamplingAlgorithm`: with
`step(key, state, minibatch) → state` as the stochastic-gradient kernels of blackjax (bind their
step size), or `step(key, state) → (state, info)` as its MCMC kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from jaxpattern.diagnostics import import_blackjax
from jaxpattern.posterior import Posterior, Target
from jaxpattern.types import Position, SamplingAlgorithm
from jaxpattern.validation import check_number, is_concrete


def sgld(*, step_size: float | Float[Array, ""]) -> Partial:
    """Stochastic gradient Langevin dynamics, w ← w − (ε/2)[nβ ∇L_B(w) + γ(w − w*)] + √ε ξ.

    On a quadratic of curvature h, with per-sample gradient variance C, batch size m and
    P = nβ h + γ, its stationary variance is P⁻¹ (1 + ε (nβ)² C / 4m) / (1 − εP/4), and it forgets
    as (1 − εP/2)^t.

    Args:
        step_size: ε > 0, in squared units of the weights.

    Returns:
        A sampler.

    References:
        Welling & Teh 2011; Lau et al. 2023, arXiv 2308.12108.
    """
    check_number("step_size", step_size, minimum=0.0, exclusive=True)
    return Partial(_sgld, step_size=step_size)


def _sgld(posterior: Target, *, step_size: Any) -> SamplingAlgorithm:
    def init(position: Position, rng_key: Key[Array, ""] | None = None) -> Position:
        return position

    def step(key: Key[Array, ""], position: Position, minibatch: Any) -> Position:
        drift = posterior.grad_estimator(position, minibatch)

        def move(w: Array, force: Array, xi: Array) -> Array:
            return w + step_size / 2 * force + jnp.sqrt(step_size) * xi

        return jax.tree.map(move, position, drift, gaussian_noise(key, position))

    return SamplingAlgorithm(init, step)


def gaussian_noise(key: Key[Array, ""], position: Position) -> Position:
    """ξ ~ N(0, 1), drawn leaf by leaf: a leaf that is sharded gets its noise where it lies."""
    leaves, treedef = jax.tree.flatten(position)
    noise = [
        jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, noise)


class RmspropState(NamedTuple):
    """Position, running mean of squared loss gradients, and number of steps taken."""

    position: Position
    square_average: Position
    num_steps: Int[Array, ""]


def rmsprop_sgld(
    *,
    step_size: float | Float[Array, ""],
    decay: float = 0.99,
    stability: float = 0.1,
    initial_square: float = 1.0,
    bias_correction: bool = True,
) -> Partial:
    """SGLD with an RMSprop preconditioner, ε_t = ε / (√v̂_t + e).

    v_t = a v_{t−1} + (1−a) g_t² of the loss gradient g_t = ∇L_B(w_t) (nβ not in it),
    v̂_t = v_t / (1 − a^{t+1}) and w ← w + (ε_t/2) ∇log p + √ε_t ξ elementwise. The drift term for
    the change of the preconditioner (Γ) is left out, as in the published runs.

    Args:
        step_size: ε > 0.
        decay: a in [0, 1).
        stability: e > 0, in units of the loss gradient.
        initial_square: v_{−1} ≥ 0. Published: 1 with bias correction; the torch package
            devinterp 2.0.1: 0 without.
        bias_correction: whether v̂_t = v_t / (1 − a^{t+1}), or v_t itself.

    Returns:
        A sampler.

    References:
        Li et al. 2016; Hitchcock & Hoogland 2025, arXiv 2507.21449; arXiv 2609.00699.
    """
    check_number("step_size", step_size, minimum=0.0, exclusive=True)
    check_number("decay", decay, minimum=0.0)
    check_number("stability", stability, minimum=0.0, exclusive=True)
    check_number("initial_square", initial_square, minimum=0.0)
    if decay >= 1:
        raise ValueError(f"decay must be below 1, got {decay:g}")
    return Partial(
        _rmsprop_corrected if bias_correction else _rmsprop_uncorrected,
        step_size=step_size,
        decay=decay,
        stability=stability,
        initial_square=initial_square,
    )


def _rmsprop_corrected(posterior: Target, **settings: Any) -> SamplingAlgorithm:
    return _rmsprop(posterior, bias_correction=True, **settings)


def _rmsprop_uncorrected(posterior: Target, **settings: Any) -> SamplingAlgorithm:
    return _rmsprop(posterior, bias_correction=False, **settings)


def _rmsprop(
    posterior: Target,
    *,
    step_size: Any,
    decay: Any,
    stability: Any,
    initial_square: Any,
    bias_correction: bool,
) -> SamplingAlgorithm:
    centre = posterior.centre

    def init(position: Position, rng_key: Key[Array, ""] | None = None) -> RmspropState:
        square = jax.tree.map(lambda w: jnp.full_like(w, initial_square), position)
        return RmspropState(position, square, jnp.zeros((), jnp.int32))

    def step(key: Key[Array, ""], state: RmspropState, minibatch: Any) -> RmspropState:
        position, square, num_steps = state
        gradient = posterior.loss_gradient(position, minibatch)
        square = jax.tree.map(lambda v, g: decay * v + (1 - decay) * g**2, square, gradient)
        correction = 1 - decay ** (num_steps + 1.0) if bias_correction else 1.0

        def move(w: Array, g: Array, v: Array, w0: Array, xi: Array) -> Array:
            step = step_size / (jnp.sqrt(v / correction) + stability)
            drift = posterior.nbeta * g + posterior.localization * (w - w0)
            return w - step / 2 * drift + jnp.sqrt(step) * xi

        noise = gaussian_noise(key, position)
        position = jax.tree.map(move, position, gradient, square, centre, noise)
        return RmspropState(position, square, num_steps + 1)

    return SamplingAlgorithm(init, step)


def sgnht(
    *, step_size: float | Float[Array, ""], friction: float | Float[Array, ""] = 1.0
) -> Partial:
    """Stochastic gradient Nosé-Hoover thermostat: momentum with a friction that adapts.

    With h = √(ε/2), so that the gradient moves the weights by (ε/2) ∇log p as in SGLD:
    w ← w + h p,  p ← (1 − ξh) p + h ∇log p + √(2αh) η,  ξ ← ξ + h (p·p/d − 1).
    The thermostat absorbs mini-batch noise that is the same in all directions. These are explicit
    Euler steps: a direction of precision P is sampled at a temperature of about
    1 + h (P − P̄)/α − αh/2, with P̄ the mean precision, so it needs hP ≪ α ≪ 1/h; `sweep` shows it.

    Args:
        step_size: ε > 0, in squared units of the weights.
        friction: α > 0, per unit of the time h.

    Returns:
        A sampler.

    References:
        Ding et al. 2014.
    """
    check_number("step_size", step_size, minimum=0.0, exclusive=True)
    check_number("friction", friction, minimum=0.0, exclusive=True)
    return Partial(_sgnht, step_size=step_size, friction=friction)


class SgnhtState(NamedTuple):
    """Position, momentum p, and thermostat ξ."""

    position: Position
    momentum: Position
    thermostat: Float[Array, ""]


def _sgnht(posterior: Target, *, step_size: Any, friction: Any) -> SamplingAlgorithm:
    def init(position: Position, rng_key: Key[Array, ""]) -> SgnhtState:
        momentum = gaussian_noise(rng_key, position)
        return SgnhtState(position, momentum, jnp.asarray(friction, float))

    def step(key: Key[Array, ""], state: SgnhtState, minibatch: Any) -> SgnhtState:
        h = jnp.sqrt(step_size / 2)
        keep, scale = 1 - state.thermostat * h, jnp.sqrt(2 * friction * h)
        force = posterior.grad_estimator(state.position, minibatch)
        position = jax.tree.map(lambda w, p: w + h * p, state.position, state.momentum)
        momentum = jax.tree.map(
            lambda p, g, eta: keep * p + h * g + scale * eta,
            state.momentum,
            force,
            gaussian_noise(key, state.momentum),
        )
        squares = [jnp.sum(p**2) for p in jax.tree.leaves(momentum)]
        dimension = sum(p.size for p in jax.tree.leaves(momentum))
        thermostat = state.thermostat + h * (sum(squares) / dimension - 1)
        return SgnhtState(position, momentum, thermostat)

    return SamplingAlgorithm(init, step)


def mala(*, step_size: float | Float[Array, ""]) -> Partial:
    """Metropolis-adjusted Langevin algorithm on all the data: exact, as a check of the others.

    Proposes w + (ε/2) ∇log p + √ε ξ and accepts it by Metropolis-Hastings, so that its
    stationary law has no step bias and no mini-batch temperature.

    Args:
        step_size: ε > 0, in squared units of the weights.

    Returns:
        A sampler.

    References:
        Roberts & Tweedie 1996.
    """
    check_number("step_size", step_size, minimum=0.0, exclusive=True)
    return Partial(_mala, step_size=step_size)


def _mala(posterior: Posterior, *, step_size: Any) -> SamplingAlgorithm:
    return SamplingAlgorithm(*import_blackjax().mala(posterior.logdensity, step_size / 2))


def relaxation_steps(sampler: Any, posterior: Posterior) -> float | None:
    """Steps in which a chain forgets a flat direction (one of precision γ) by a factor e.

    2/(εγ) for SGLD; for RMSprop-SGLD the same with its effective step where gradients are of the
    size of `stability`; for SGNHT the slower of momentum and position, in steps h = √(ε/2).
    None where it is not known: another sampler, γ = 0, or settings that are being traced.
    """
    function, settings = getattr(sampler, "func", None), getattr(sampler, "keywords", {})
    if not all(map(is_concrete, (posterior.localization, *settings.values()))):
        return None
    localization = float(posterior.localization)
    if localization == 0:
        return None
    if function is _sgld:
        return 2 / (float(settings["step_size"]) * localization)
    if function in (_rmsprop_corrected, _rmsprop_uncorrected):
        step = float(settings["step_size"]) / (2 * float(settings["stability"]))
        return 2 / (step * localization)
    if function is _sgnht:
        friction = float(settings["friction"])
        time = max(2 / friction, friction / localization)
        return time / float(jnp.sqrt(settings["step_size"] / 2))
    return None
