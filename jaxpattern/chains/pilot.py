"""A look at the posterior before a run: how stiff it is for the step, how smooth, how exact.

In the coordinates of the sampler's noise, u_i = w_i / σ_i, one step of a Langevin chain multiplies
a direction by 1 − Λ/2 with Λ = σ (nβ H + γ) σ: ε P for SGLD. It samples with the variance
1/(1 − Λ/4) of the right one, and leaves for infinity at Λ > 4. The largest Λ is found by power
iterations on differences of gradients, so that kinks count and no second derivative is needed.

A chain knows the loss by its gradient alone. Along steps Δ of its noise the loss must rise by what
the gradient says, L(w + Δ) − L(w) = (g + g')·Δ/2 up to third order; what it rises beside that is
the jumps of a loss that routes, rounds or sorts, and the chain samples another law without them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.looks import (
    BENDS,
    FRACTION,
    STEPS,
    STRIDE,
    Bends,
    Space,
    Stiffness,
    Walk,
    make_space,
)
from jaxpattern.chains.run import Run
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.restriction import Restriction
from jaxpattern.validation import is_traced

_STREAM = 2**31
_SAMPLES = 64  # looked at, where a sample has few losses
_LOSSES = 512
_MOST = 256  # where the plan has no mini-batches


class Pilot(NamedTuple):
    """What is known of each component before the run, `[component]`.

    Attributes:
        stiffness: the largest Λ.
        rounding: error of a difference of gradients over a step of the noise, relative to it (or to
            what the localization adds to it).
        bend: how much the gradient of a mini-batch bends over a step of the noise: its second
            difference over the first, root mean square over some places and directions. 0 where the
            loss is quadratic on that scale, about 1 where a kink lies.
        jump: what the loss rises along steps of the noise beside what its gradient says, over the
            second order of it, root mean square. 0 where the loss is quadratic on that scale, below
            1 with kinks.
        leap: the same in units of temperature, over a relaxation time of a chain on all the data.
        heat: what mini-batches add to the temperature in the stiffest direction.
        grain: rounding of the mean loss, in units of temperature.
        gradient: root mean square of the loss gradient.
        spacing: how far apart parameters narrower than float32 lie (half of it, root mean square),
            over the widest that the posterior can be, 1/√γ.
    """

    stiffness: Float[np.ndarray, " components"]
    rounding: Float[np.ndarray, " components"]
    bend: Float[np.ndarray, " components"]
    jump: Float[np.ndarray, " components"]
    leap: Float[np.ndarray, " components"]
    heat: Float[np.ndarray, " components"]
    grain: Float[np.ndarray, " components"]
    gradient: Float[np.ndarray, " components"]
    spacing: Float[np.ndarray, " components"]


def fly(run: Run, group: ComponentGroup) -> Pilot | None:
    """What a run would meet; None where nothing can be said: inside a transformation, or of a
    sampler that does not state the size of its steps.
    """
    if run.sampler.step_scale is None or is_traced(run, group):
        return None
    found = _fly(
        run.key, run.posterior, run.sampler, group.restrictions,
        batch_size=run.plan.batch_size, number=len(group.ids),
        flat=all(_in_one_piece(leaf) for leaf in jax.tree.leaves(run.posterior.params)),
    )  # fmt: skip
    pilot = Pilot(*(np.atleast_1d(np.asarray(x, np.float64)) for x in found))
    relaxation = run.sampler.relaxation(run.posterior, float(np.max(pilot.gradient)))
    heat = pilot.heat * (0 if run.sampler.tempers_noise else 1)
    return pilot._replace(leap=pilot.leap * np.sqrt(max(relaxation or 1.0, 1.0)), heat=heat)


def _in_one_piece(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.sharding.is_fully_replicated


@partial(jax.jit, static_argnames=("batch_size", "number", "flat"))
def _fly(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    restrictions: Restriction | None,
    *,
    batch_size: int | None,
    number: int,
    flat: bool,
) -> tuple[Array, ...]:
    if restrictions is None:
        return _fly_one(key, posterior, sampler, batch_size, flat)

    def one(index: Array) -> tuple[Array, ...]:
        chosen = jax.tree.map(lambda leaf: leaf[index], restrictions)
        return _fly_one(key, replace(posterior, restriction=chosen), sampler, batch_size, flat)

    return jax.lax.map(one, jnp.arange(number))


def _fly_one(
    key: Key[Array, ""], posterior: Posterior, sampler: Any, batch_size: int | None, flat: bool
) -> tuple[Array, ...]:
    # Beyond the streams of components, which fold in small numbers.
    keys = [jax.random.fold_in(key, _STREAM + i) for i in range(3)]
    each = posterior.weights.size // posterior.num_samples
    size = max(batch_size or 1, min(_SAMPLES if batch_size else _MOST, _LOSSES // each))
    size = min(posterior.num_samples, size)
    everything = batch_size is None and size == posterior.num_samples
    minibatch = posterior.minibatch(keys[0], None if everything else size)
    space = make_space(keys[1], posterior, sampler, minibatch, flat)
    zero, nowhere = jnp.zeros((), posterior.weights.dtype), space.zero
    parts = (
        Stiffness(nowhere, nowhere, zero, zero, zero, zero),
        Bends(nowhere, nowhere, nowhere, zero),
        Walk(space.center, zero, nowhere, zero, zero),
    )
    ends = np.cumsum([part.looks for part in parts])

    def look(i: Array, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        which = jnp.searchsorted(jnp.asarray(ends), i, side="right")
        within = [i - start for start in (0, *ends[:-1])]
        numbers = jnp.stack([part.number(j) for part, j in zip(parts, within, strict=True)])
        stream = jax.random.fold_in(jax.random.fold_in(keys[2], which), numbers[which])
        draws = space.draw(stream)

        def place(k: int, parts: tuple[Any, ...]) -> Any:
            return parts[k].place(space, draws, within[k])

        def learn(k: int, parts: tuple[Any, ...], loss: Array, gradient: Any) -> tuple[Any, ...]:
            new = parts[k].learn(space, draws, within[k], loss, gradient)
            return (*parts[:k], new, *parts[k + 1 :])

        kinds = range(len(parts))
        there = jax.lax.switch(which, [partial(place, k) for k in kinds], parts)
        loss, gradient = space.look(there)
        return jax.lax.switch(which, [partial(learn, k) for k in kinds], parts, loss, gradient)

    stiff, bends, walk = jax.lax.fori_loop(0, int(ends[-1]), look, parts)
    moved = space.scaled(stiff.u)
    tether = posterior.localization * optax.tree.vdot(moved, moved)
    stiffness = posterior.nbeta * stiff.value + tether

    # Of a difference over a 64th of the way a 64th is there; what is more is rounding.
    noise = jnp.maximum(stiff.part - stiff.whole * 1.5 * FRACTION, 0.0)
    least = posterior.localization / posterior.nbeta * stiff.pull
    rounding = noise / jnp.maximum(jnp.maximum(stiff.whole, least), 1e-30)
    # Kinks of single samples average out; a step sees a mini-batch.
    bend = jnp.sqrt(bends.total / BENDS * (size / (batch_size or size)))
    jump = jnp.sqrt(walk.rest / jnp.maximum(walk.order, 1e-30))
    # Squares of what is beside grow with the way and fall with the samples.
    share = size / posterior.num_samples / STRIDE
    leap = posterior.nbeta * jnp.sqrt(walk.rest / STEPS * share)
    heat = _heat(posterior, space, minibatch, stiff.u, batch_size)
    eps = float(jnp.finfo(walk.loss.dtype).eps) / np.sqrt(minibatch.weights.size)
    grain = posterior.nbeta * eps * jnp.abs(walk.loss)
    number = sum(leaf.size for leaf in jax.tree.leaves(stiff.here))
    gradient = optax.tree.norm(stiff.here) / np.sqrt(number)
    spacing = _spacing(posterior) * jnp.sqrt(posterior.localization)
    return stiffness, rounding, bend, jump, leap, heat, grain, gradient, spacing


def _heat(
    posterior: Posterior, space: Space, minibatch: Minibatch, u: Any, batch_size: int | None
) -> Array:
    """(nβ/2)² Var[σû·g_B] beside the 1 of the noise, from the slopes of single samples along û."""
    if batch_size is None:
        return jnp.zeros((), minibatch.weights.dtype)
    rows = minibatch.weights.reshape(minibatch.weights.shape[0], -1)

    def of_samples(size: float) -> Array:
        losses = space.losses(space.along(space.center, u, size)).reshape(rows.shape)
        return jnp.sum(jnp.where(rows == 0, 0.0, rows * losses), 1) / jnp.mean(jnp.sum(rows, 1))

    slopes = 2 * (of_samples(0.25) - of_samples(-0.25))
    return (posterior.nbeta / 2) ** 2 * jnp.var(slopes) / batch_size


def _spacing(posterior: Posterior) -> Array:
    """Half the distance between neighbors of the moved parameters, root mean square."""
    narrow = [
        (jnp.finfo(leaf.dtype).eps / 2 * leaf.astype(jnp.float32)) ** 2
        if jnp.finfo(leaf.dtype).bits < 32
        else jnp.zeros_like(leaf, jnp.float32)
        for leaf in jax.tree.leaves(posterior.select(posterior.params))
    ]
    total = sum(leaf.size for leaf in narrow)
    return jnp.sqrt(sum(jnp.sum(leaf) for leaf in narrow) / total)
