"""What a pilot learns from gradients near w*: stiffness, bends and jumps, each from a few looks.

A look is one gradient. Each kind says where it wants one (`place`) and what it takes from it
(`learn`), so that a program that runs them in turn holds the model once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from jaxpattern.chains.kernel import noise_scale
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.samplers import noise_by_leaf
from jaxpattern.types import Position

ITERATIONS = 10
FRACTION = 1 / 64  # of the distance at which rounding is looked for
BENDS = 6
STEPS = 12
STRIDE = 0.5  # of a step of the noise: kinks show less there, and jumps more


class Draws(NamedTuple):
    """Noise of one look."""

    first: Any
    second: Any


class Space(NamedTuple):
    """Where the pilot calculates: σ, w*, and L with its gradient, and the losses, at a place.

    Places are flat vectors, of which a program is small, or positions where arrays lie in pieces on
    several devices, and stay there.
    """

    sigma: Any
    center: Any
    look: Callable[[Any], tuple[Array, Any]]
    losses: Callable[[Any], Array]

    def along(self, start: Any, u: Any, size: Any = 1.0) -> Any:
        """w + σ u."""
        return jax.tree.map(lambda w, s, x: w + size * s * x, start, self.sigma, u)

    def scaled(self, gradient: Any) -> Any:
        """σ g, the gradient in the coordinates u."""
        return jax.tree.map(jnp.multiply, self.sigma, gradient)

    def draw(self, key: Key[Array, ""]) -> Draws:
        """Two u ~ N(0, 1)."""
        keys = jax.random.split(key)
        return Draws(noise_by_leaf(keys[0], self.center), noise_by_leaf(keys[1], self.center))

    @property
    def zero(self) -> Any:
        """No direction."""
        return jax.tree.map(jnp.zeros_like, self.center)


def make_space(
    key: Key[Array, ""], posterior: Posterior, sampler: Any, minibatch: Minibatch, flat: bool
) -> Space:
    """The space of a posterior, with losses on one mini-batch; `flat` makes places vectors."""
    center = posterior.center
    sigma = noise_scale(sampler, sampler(posterior).init(center, key))

    def mean(place: Position) -> Array:
        return posterior.loss(place, minibatch)

    def losses(place: Position) -> Array:
        return posterior.losses(place, minibatch.batch)

    if not flat:
        return Space(sigma, center, jax.value_and_grad(mean), losses)
    vector, position_of = jax.flatten_util.ravel_pytree(center)
    sigma = jax.flatten_util.ravel_pytree(sigma)[0]
    return Space(
        sigma,
        vector,
        jax.value_and_grad(lambda x: mean(position_of(x))),
        lambda x: losses(position_of(x)),
    )


class Stiffness(NamedTuple):
    """Power iteration: L at the start, twice along a first u, then along the last product.

    Holds the last product of length 1, g at the start, u · σHσu, the lengths of the two first
    products, and that of σ²u of the first u.
    """

    u: Any
    here: Any
    value: Array
    part: Array
    whole: Array
    pull: Array

    @property
    def looks(self) -> int:
        """Gradients of the power iteration."""
        return 3 + ITERATIONS

    def place(self, space: Space, draws: Draws, i: Array) -> Any:
        """Where the i-th gradient is taken."""
        size = jnp.where(i == 0, 0.0, jnp.where(i == 1, FRACTION, 1.0))
        return space.along(_off(space, draws), self._along(draws, i), size)

    def number(self, i: Array) -> Array:
        """Always the same noise: one start, one first u."""
        return 0 * i

    def _along(self, draws: Draws, i: Array) -> Any:
        return jax.tree.map(partial(jnp.where, i <= 2), _unit(draws.second), self.u)

    def learn(self, space: Space, draws: Draws, i: Array, loss: Array, gradient: Any) -> Stiffness:
        """What that gradient adds."""
        here = jax.tree.map(partial(jnp.where, i == 0), gradient, self.here)
        # σ [g(w + σ u) − g(w)]: σ H σ u.
        product = space.scaled(jax.tree.map(jnp.subtract, gradient, here))
        length = optax.tree.norm(product)
        return Stiffness(
            u=_unit(product),
            here=here,
            value=optax.tree.vdot(self._along(draws, i), product),
            part=jnp.where(i == 1, length, self.part),
            whole=jnp.where(i == 2, length, self.whole),
            pull=optax.tree.norm(space.scaled(space.scaled(_unit(draws.second)))),
        )


def _off(space: Space, draws: Draws) -> Any:
    """Off w* by a step of the noise: w* itself may be a special point."""
    return space.along(space.center, draws.first)


def _unit(u: Any) -> Any:
    return optax.tree.scale(1 / jnp.maximum(optax.tree.norm(u), 1e-30), u)


class Bends(NamedTuple):
    """g at w − σû, w and w + σû of some places w: its first and second difference so far.

    Every other û goes along a gradient, that of the place before, and the others anywhere; kinks
    may lie far apart, so each has a place of its own.
    """

    down: Any
    first: Any
    second: Any
    total: Array

    @property
    def looks(self) -> int:
        """Three of each place."""
        return 3 * BENDS

    def place(self, space: Space, draws: Draws, i: Array) -> Any:
        """Where the i-th gradient is taken."""
        number, side = jnp.divmod(i, 3)
        u = jax.tree.map(partial(jnp.where, number % 2 == 1), self.down, draws.second)
        return space.along(_off(space, draws), _unit(u), (side - 1).astype(self.total.dtype))

    def number(self, i: Array) -> Array:
        """Noise of its own for each place."""
        return i // 3

    def learn(self, space: Space, draws: Draws, i: Array, loss: Array, gradient: Any) -> Bends:
        """What that gradient adds."""
        side = i % 3
        slope = space.scaled(gradient)

        def add(sum_so_far: Any, weight: Any) -> Any:
            weight = weight.astype(self.total.dtype)
            return jax.tree.map(
                lambda x, g: jnp.where(side == 0, 0.0, x) + weight * g, sum_so_far, slope
            )

        first, second = add(self.first, side - 1), add(self.second, jnp.where(side == 1, -2, 1))
        ratio = optax.tree.norm(second) / jnp.maximum(optax.tree.norm(first), 1e-30)
        done = jnp.where(side == 2, ratio**2, 0.0)
        down = jax.tree.map(partial(jnp.where, side == 2), slope, self.down)
        return Bends(down, first, second, self.total + done)


class Walk(NamedTuple):
    """A walk of steps of the noise: where it is, and L and g where it was.

    Σ of the squares of what L rises beside (g + g')·Δ/2, and of the second order (g' − g)·Δ/2.
    """

    at: Any
    loss: Array
    gradient: Any
    rest: Array
    order: Array

    @property
    def looks(self) -> int:
        """One more than steps."""
        return 1 + STEPS

    def place(self, space: Space, draws: Draws, i: Array) -> Any:
        """Where the i-th gradient is taken."""
        return space.along(self.at, draws.first, STRIDE)

    def number(self, i: Array) -> Array:
        """Noise of its own for each step."""
        return i

    def learn(self, space: Space, draws: Draws, i: Array, loss: Array, gradient: Any) -> Walk:
        """What that gradient adds."""
        step = optax.tree.scale(STRIDE, draws.first)
        now, before = (optax.tree.vdot(step, space.scaled(g)) for g in (gradient, self.gradient))
        rest = loss - self.loss - (now + before) / 2
        counts = jnp.where(i == 0, 0.0, 1.0)
        return Walk(
            at=space.along(self.at, step),
            loss=loss,
            gradient=gradient,
            rest=self.rest + counts * rest**2,
            order=self.order + counts * ((now - before) / 2) ** 2,
        )
