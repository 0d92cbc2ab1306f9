"""A look at the posterior before a run: how stiff it is for the step, how exact its gradients.

In the coordinates of the sampler's noise, u_i = w_i / σ_i, one step of a Langevin chain multiplies
a direction by 1 − Λ/2 with Λ = σ (nβ H + γ) σ: ε P for SGLD. It samples with the variance
1/(1 − Λ/4) of the right one, and leaves for infinity at Λ > 4. The largest Λ is found by power
iterations on differences of gradients, so that kinks count and no second derivative is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from jaxpattern.chains.kernel import noise_scale
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.run import Run
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.restriction import Restriction
from jaxpattern.samplers import noise_by_leaf
from jaxpattern.validation import is_traced

_ITERATIONS = 12
_STREAM = 2**31
_SAMPLES = 64
_BENDS = 8
_FRACTION = 1 / 64  # of the distance at which rounding is looked for


class Pilot(NamedTuple):
    """What is known of each component before the run, `[component]`.

    Attributes:
        stiffness: the largest Λ.
        rounding: error of a difference of gradients over a step of the noise, relative to it (or to
            what the localization adds to it).
        bend: how much the gradient of a mini-batch bends over a step of the noise: its second
            difference over the first, root mean square over some places and directions. 0 where the
            loss is quadratic on that scale, about 1 where a kink lies.
        gradient: root mean square of the loss gradient.
        spacing: how far apart parameters narrower than float32 lie (half of it, root mean square),
            over the widest that the posterior can be, 1/√γ.
    """

    stiffness: Float[np.ndarray, " components"]
    rounding: Float[np.ndarray, " components"]
    bend: Float[np.ndarray, " components"]
    gradient: Float[np.ndarray, " components"]
    spacing: Float[np.ndarray, " components"]


class _Seen(NamedTuple):
    """Power iteration: the last product of length 1, g at the start, u · σHσu, and two lengths."""

    u: Any
    here: Any
    value: Array
    part: Array
    whole: Array


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
    return Pilot(*(np.atleast_1d(np.asarray(x, np.float64)) for x in found))


def _in_one_piece(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.sharding.is_fully_replicated


@partial(jax.jit, static_argnames=("batch_size", "number", "flat"))
def _fly(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    restrictions: Restriction | None,
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


class _Space(NamedTuple):
    """Where the pilot calculates: σ, w*, and the gradient of the loss at a place on a mini-batch.

    Places are flat vectors, of which a program is small, or positions where arrays lie in pieces on
    several devices, and stay there.
    """

    sigma: Any
    center: Any
    gradient: Callable[[Any, Minibatch], Any]
    noise: Callable[[Key[Array, ""]], Any]

    def along(self, start: Any, u: Any, size: Any = 1.0) -> Any:
        """w + σ u."""
        return jax.tree.map(lambda w, s, x: w + size * s * x, start, self.sigma, u)


def _space(key: Key[Array, ""], posterior: Posterior, sampler: Any, flat: bool) -> _Space:
    center = posterior.centre
    sigma = noise_scale(sampler, sampler(posterior).init(center, key))
    if not flat:
        return _Space(
            sigma, center, posterior.loss_gradient, partial(noise_by_leaf, position=center)
        )
    vector, position_of = jax.flatten_util.ravel_pytree(center)

    def gradient(place: Array, minibatch: Minibatch) -> Array:
        return _ravel(posterior.loss_gradient(position_of(place), minibatch)).astype(vector.dtype)

    return _Space(_ravel(sigma), vector, gradient, partial(noise_by_leaf, position=vector))


def _ravel(tree: Any) -> Array:
    return jax.flatten_util.ravel_pytree(tree)[0]


def _fly_one(
    key: Key[Array, ""], posterior: Posterior, sampler: Any, batch_size: int | None, flat: bool
) -> tuple[Array, ...]:
    # Beyond the streams of components, which fold in small numbers.
    keys = [jax.random.fold_in(key, _STREAM + i) for i in range(5)]
    size = batch_size and min(posterior.num_samples, max(batch_size, _SAMPLES))
    minibatch = posterior.minibatch(keys[0], size)
    space = _space(keys[1], posterior, sampler, flat)
    sigma = space.sigma

    # Off w* by a step of the noise: w* itself may be a special point.
    start = space.along(space.center, space.noise(keys[2]))
    first = space.noise(keys[3])
    first = optax.tree.scale(1 / optax.tree.norm(first), first)

    def look(i: Array, seen: _Seen) -> _Seen:
        """One gradient: at the start, along the first u twice, then along the last product."""
        size = jnp.where(i == 0, 0.0, jnp.where(i == 1, _FRACTION, 1.0))
        u = jax.tree.map(partial(jnp.where, i <= 2), first, seen.u)
        there = space.gradient(space.along(start, u, size), minibatch)
        here = jax.tree.map(partial(jnp.where, i == 0), there, seen.here)
        # σ [g(w + σ u) − g(w)]: σ H σ u.
        product = jax.tree.map(lambda s, x, y: s * (x - y), sigma, there, here)
        length = optax.tree.norm(product)
        return _Seen(
            u=optax.tree.scale(1 / jnp.maximum(length, 1e-30), product),
            here=here,
            value=optax.tree.vdot(u, product),
            part=jnp.where(i == 1, length, seen.part),
            whole=jnp.where(i == 2, length, seen.whole),
        )

    zero = jnp.zeros((), posterior.weights.dtype)
    seen = _Seen(first, jax.tree.map(jnp.zeros_like, first), zero, zero, zero)
    seen = jax.lax.fori_loop(0, 3 + _ITERATIONS, look, seen)
    here = seen.here
    moved = jax.tree.map(jnp.multiply, sigma, seen.u)
    tether = posterior.localization * optax.tree.vdot(moved, moved)
    stiffness = posterior.nbeta * seen.value + tether

    # Of a difference over a 64th of the way a 64th is there; what is more is rounding.
    noise = jnp.maximum(seen.part - seen.whole * 1.5 * _FRACTION, 0.0)
    bend = _bend(keys[4], posterior, space, here, batch_size)
    pulled = jax.tree.map(lambda s, x: s**2 * x, sigma, first)
    least = posterior.localization / posterior.nbeta * optax.tree.norm(pulled)
    rounding = noise / jnp.maximum(jnp.maximum(seen.whole, least), 1e-30)
    mean = optax.tree.norm(here, squared=True) / sum(leaf.size for leaf in jax.tree.leaves(here))
    spacing = _spacing(posterior) * jnp.sqrt(posterior.localization)
    return stiffness, rounding, bend, jnp.sqrt(mean), spacing


def _bend(
    key: Key[Array, ""], posterior: Posterior, space: _Space, slope: Any, batch_size: int | None
) -> Array:
    """‖g₊ − 2g + g₋‖ / ‖g₊ − g₋‖ over ± a step of the noise, root mean square.

    Every other step goes along the gradient and the others anywhere; kinks may lie far apart, so
    each starts at a place of its own.
    """
    size = min(posterior.num_samples, batch_size or _SAMPLES)
    sigma, zero = space.sigma, jax.tree.map(jnp.zeros_like, slope)

    def one(i: Array, total: Array) -> Array:
        place, direction, batch = jax.random.split(jax.random.fold_in(key, i), 3)
        minibatch = posterior.minibatch(batch, size)
        start = space.along(space.center, space.noise(place))
        downhill = jax.tree.map(jnp.multiply, sigma, slope)
        anywhere = space.noise(direction)
        u = jax.tree.map(partial(jnp.where, i % 2 == 0), downhill, anywhere)
        u = optax.tree.scale(1 / jnp.maximum(optax.tree.norm(u), 1e-30), u)

        def add(side: Array, sums: tuple[Any, Any]) -> tuple[Any, Any]:
            """g at w − σû, w and w + σû, into the first and the second difference."""
            ahead = (side - 1).astype(total.dtype)
            gradient = space.gradient(space.along(start, u, ahead), minibatch)
            weights = ahead, jnp.where(side == 1, -2.0, 1.0).astype(ahead.dtype)
            first, second = (
                jax.tree.map(lambda x, s, g, w=w: x + w * s * g, part, sigma, gradient)
                for part, w in zip(sums, weights, strict=True)
            )
            return first, second

        first, second = jax.lax.fori_loop(0, 3, add, (zero, zero))
        ratio = optax.tree.norm(second) / jnp.maximum(optax.tree.norm(first), 1e-30)
        return total + ratio**2 / _BENDS

    return jnp.sqrt(jax.lax.fori_loop(0, _BENDS, one, jnp.zeros((), posterior.weights.dtype)))


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
