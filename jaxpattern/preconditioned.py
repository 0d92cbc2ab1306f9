"""RMSprop-preconditioned SGLD, which blackjax does not have, with and without its drift term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from jaxpattern.posterior import Posterior, Target
from jaxpattern.samplers import Noise, Sampler, noise_by_leaf, noise_flat, noise_of
from jaxpattern.types import Position, SamplingAlgorithm
from jaxpattern.validation import check_number


class RmspropState(NamedTuple):
    """Position, running mean of squared loss gradients, number of steps taken, and with `drift` the
    running mean of the derivative of those squares.
    """

    position: Position
    square_average: Position
    num_steps: Int[Array, ""]
    slope_average: Position = ()


def rmsprop_sgld(
    *,
    step_size: float | Float[Array, ""],
    decay: float = 0.99,
    stability: float = 0.1,
    initial_square: float = 1.0,
    bias_correction: bool = True,
    drift: bool = False,
    noise: Noise = "flat",
) -> Sampler:
    """SGLD with an RMSprop preconditioner, ε_t = ε / (√v̂_t + e).

    v_t = a v_{t−1} + (1−a) g_t² of the loss gradient g_t = ∇L_B(w_t) (nβ not in it),
    v̂_t = v_t / (1 − a^{t+1}) and w ← w + (ε_t/2) ∇log p + √ε_t ξ elementwise.

    A preconditioner that changes with w, G_i = 1/(√v̂_i + e), needs the drift (ε/2) Γ_i with
    Γ_i = ∂_i G_i, or the chain dwells where G is small: it samples another law than the posterior.
    The published runs leave Γ out, and so does this sampler unless `drift` is set. Then
    ∂_i v_i = mean of 2 g_i H_ii over the memory of v, right where the chain moves little within it,
    with H_ii from one more gradient per step: z_i [g(w + σ z) − g(w)]_i / σ_i of random signs z.

    Args:
        step_size: ε > 0.
        decay: a in [0, 1).
        stability: e > 0, in units of the loss gradient.
        initial_square: v_{−1} ≥ 0. Published: 1 with bias correction; the torch package
            devinterp 2.0.1: 0 without.
        bias_correction: whether v̂_t = v_t / (1 − a^{t+1}), or v_t itself.
        drift: whether to add Γ, at two gradients per step. A chain with it cannot be differentiated
            by `pathwise`.
        noise: as in `sgld`.

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
    draw = noise_of(noise, noise_flat, noise_by_leaf)
    return Sampler(
        Partial(
            _rmsprop,
            _Rmsprop(draw, bias_correction, drift),
            step_size=step_size,
            decay=decay,
            stability=stability,
            initial_square=initial_square,
        ),
        gradients_per_step=2 if drift else 1,
        caveat="" if drift else "chains without the drift Γ of their preconditioner",
        relaxation_steps=_preconditioned,
        step_scale=_preconditioned_scale,
        name="rmsprop_sgld",
    )


def _preconditioned(posterior: Posterior, settings: dict[str, Any]) -> float:
    """2 / (ε_t γ) with ε_t = ε / (√v̂ + e), √v̂ the measured size of gradients, or e without one."""
    stability = float(settings["stability"])
    root = float(settings.get("gradient", stability))
    step = float(settings["step_size"]) / (root + stability)
    return 2 / (step * float(posterior.localization))


def _preconditioned_scale(state: Any, settings: dict[str, Any]) -> Any:
    """√ε_t, elementwise, from the running mean without its correction."""
    step, stability = settings["step_size"], settings["stability"]
    return jax.tree.map(lambda v: jnp.sqrt(step / (_root(v) + stability)), state.square_average)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Rmsprop:
    """What of RMSprop-SGLD is no number."""

    noise: Callable[[Key[Array, ""], Position], Position]
    bias_correction: bool
    drift: bool


def _rmsprop(
    kind: _Rmsprop,
    posterior: Target,
    *,
    step_size: Any,
    decay: Any,
    stability: Any,
    initial_square: Any,
) -> SamplingAlgorithm:
    center = posterior.center

    def init(position: Position, rng_key: Key[Array, ""] | None = None) -> RmspropState:
        square = jax.tree.map(lambda w: jnp.full_like(w, initial_square), position)
        slope = jax.tree.map(jnp.zeros_like, position) if kind.drift else ()
        return RmspropState(position, square, jnp.zeros((), jnp.int32), slope)

    def average(v: Array, new: Array) -> Array:
        kept = jnp.asarray(decay, v.dtype)
        return kept * v + (1 - kept) * new

    def corrected(v: Array, num_steps: Array) -> Array:
        if not kind.bias_correction:
            return v
        return v / (1 - jnp.asarray(decay, v.dtype) ** (num_steps.astype(v.dtype) + 1))

    def slopes_of_squares(
        key: Key[Array, ""], position: Position, gradient: Position, scale: Position, minibatch: Any
    ) -> Position:
        """2 g_i H_ii, without bias."""
        signs = optax.tree.random_like(key, position, jax.random.rademacher)
        ahead = jax.tree.map(lambda w, s, z: w + (s * z).astype(w.dtype), position, scale, signs)
        there = posterior.loss_gradient(ahead, minibatch)
        return jax.tree.map(
            lambda g, h, s, z: 2 * g * z * (h - g) / s, gradient, there, scale, signs
        )

    def step(key: Key[Array, ""], state: RmspropState, minibatch: Any) -> RmspropState:
        position, square, num_steps, slope = state
        gradient = posterior.loss_gradient(position, minibatch)
        square = jax.tree.map(lambda v, g: average(v, g**2), square, gradient)
        root = jax.tree.map(lambda v: _root(corrected(v, num_steps)), square)

        # In the precision of the position, whatever that of the losses and the settings.
        def move(w: Array, g: Array, r: Array, w0: Array, xi: Array) -> Array:
            nbeta, gamma, size, small = (
                jnp.asarray(x, w.dtype)
                for x in (posterior.nbeta, posterior.localization, step_size, stability)
            )
            step = size / (r + small)
            force = nbeta * g + gamma * (w - w0)
            return w - step / 2 * force + jnp.sqrt(step) * xi

        noise = kind.noise(key, position)
        moved = jax.tree.map(move, position, gradient, root, center, noise)
        if not kind.drift:
            return RmspropState(moved, square, num_steps + 1)

        def scale_of(r: Array) -> Array:
            return jnp.sqrt(jnp.asarray(step_size, r.dtype) / (r + jnp.asarray(stability, r.dtype)))

        def turn(w: Array, r: Array, d: Array) -> Array:
            """(ε/2) Γ, Γ = −∂v / (2 √v (√v + e)²); 0 where there never was a gradient."""
            size, small = (jnp.asarray(x, w.dtype) for x in (step_size, stability))
            bent = corrected(d, num_steps) / (2 * jnp.where(r > 0, r, 1.0) * (r + small) ** 2)
            return w - size / 2 * jnp.where(r > 0, bent, 0.0)

        new = slopes_of_squares(
            jax.random.fold_in(key, 1), position, gradient, jax.tree.map(scale_of, root), minibatch
        )
        slope = jax.tree.map(average, slope, new)
        moved = jax.tree.map(turn, moved, root, slope)
        return RmspropState(moved, square, num_steps + 1, slope)

    return SamplingAlgorithm(init, step)


def _root(v: Array) -> Array:
    """√v, with derivative 0 at 0: a weight that never had a gradient has none of its step."""
    positive = v > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, v, 1.0)), 0.0)
