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
from jaxpattern.types import Position
from jaxpattern.validation import is_traced

_STREAM = 2**31
_SAMPLES = 64
_ITERATIONS = 12
_FRACTION = 1 / 64  # of the distance at which rounding is looked for
_BENDS = 8
_STEPS = 16
_STRIDE = 0.5  # of a step of the noise: kinks show less there, and jumps more


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

    def noise(self, key: Key[Array, ""]) -> Any:
        """u ~ N(0, 1)."""
        return noise_by_leaf(key, self.center)

    @property
    def zero(self) -> Any:
        """No direction."""
        return jax.tree.map(jnp.zeros_like, self.center)


def _space(
    key: Key[Array, ""], posterior: Posterior, sampler: Any, minibatch: Minibatch, flat: bool
) -> _Space:
    center = posterior.centre
    sigma = noise_scale(sampler, sampler(posterior).init(center, key))

    def mean(place: Position) -> Array:
        return posterior.loss(place, minibatch)

    def losses(place: Position) -> Array:
        return posterior.losses(place, minibatch.batch)

    if not flat:
        return _Space(sigma, center, jax.value_and_grad(mean), losses)
    vector, position_of = jax.flatten_util.ravel_pytree(center)
    sigma = jax.flatten_util.ravel_pytree(sigma)[0]
    return _Space(
        sigma,
        vector,
        jax.value_and_grad(lambda x: mean(position_of(x))),
        lambda x: losses(position_of(x)),
    )


class _Stiffness(NamedTuple):
    """Power iteration: L at the start, twice along a first u, then along the last product.

    Holds the last product of length 1, g at the start, u · σHσu, and two lengths.
    """

    u: Any
    here: Any
    value: Array
    part: Array
    whole: Array

    @property
    def looks(self) -> int:
        """Gradients of the power iteration."""
        return 3 + _ITERATIONS

    def place(self, space: _Space, key: Key[Array, ""], i: Array) -> Any:
        """Where the i-th gradient is taken."""
        size = jnp.where(i == 0, 0.0, jnp.where(i == 1, _FRACTION, 1.0))
        return space.along(_off(space, key), self._along(space, key, i), size)

    def _along(self, space: _Space, key: Key[Array, ""], i: Array) -> Any:
        return jax.tree.map(partial(jnp.where, i <= 2), _first(space, key), self.u)

    def learn(
        self, space: _Space, key: Key[Array, ""], i: Array, loss: Array, gradient: Any
    ) -> _Stiffness:
        """What that gradient adds."""
        here = jax.tree.map(partial(jnp.where, i == 0), gradient, self.here)
        # σ [g(w + σ u) − g(w)]: σ H σ u.
        product = space.scaled(jax.tree.map(jnp.subtract, gradient, here))
        length = optax.tree.norm(product)
        return _Stiffness(
            u=_unit(product),
            here=here,
            value=optax.tree.vdot(self._along(space, key, i), product),
            part=jnp.where(i == 1, length, self.part),
            whole=jnp.where(i == 2, length, self.whole),
        )


def _off(space: _Space, key: Key[Array, ""]) -> Any:
    """Off w* by a step of the noise: w* itself may be a special point."""
    return space.along(space.center, space.noise(key))


def _first(space: _Space, key: Key[Array, ""]) -> Any:
    return _unit(space.noise(jax.random.fold_in(key, 1)))


def _unit(u: Any) -> Any:
    return optax.tree.scale(1 / jnp.maximum(optax.tree.norm(u), 1e-30), u)


class _Bends(NamedTuple):
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
        return 3 * _BENDS

    def place(self, space: _Space, key: Key[Array, ""], i: Array) -> Any:
        """Where the i-th gradient is taken."""
        number, side = jnp.divmod(i, 3)
        key = jax.random.fold_in(key, number)
        anywhere = space.noise(jax.random.fold_in(key, 1))
        u = jax.tree.map(partial(jnp.where, number % 2 == 1), self.down, anywhere)
        return space.along(_off(space, key), _unit(u), (side - 1).astype(self.total.dtype))

    def learn(
        self, space: _Space, key: Key[Array, ""], i: Array, loss: Array, gradient: Any
    ) -> _Bends:
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
        return _Bends(down, first, second, self.total + done)


class _Walk(NamedTuple):
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
        return 1 + _STEPS

    def place(self, space: _Space, key: Key[Array, ""], i: Array) -> Any:
        """Where the i-th gradient is taken."""
        return space.along(self.at, self._step(space, key, i))

    def _step(self, space: _Space, key: Key[Array, ""], i: Array) -> Any:
        return optax.tree.scale(_STRIDE, space.noise(jax.random.fold_in(key, i)))

    def learn(
        self, space: _Space, key: Key[Array, ""], i: Array, loss: Array, gradient: Any
    ) -> _Walk:
        """What that gradient adds."""
        step = self._step(space, key, i)
        now, before = (optax.tree.vdot(step, space.scaled(g)) for g in (gradient, self.gradient))
        rest = loss - self.loss - (now + before) / 2
        counts = jnp.where(i == 0, 0.0, 1.0)
        return _Walk(
            at=space.along(self.at, step),
            loss=loss,
            gradient=gradient,
            rest=self.rest + counts * rest**2,
            order=self.order + counts * ((now - before) / 2) ** 2,
        )


def _fly_one(
    key: Key[Array, ""], posterior: Posterior, sampler: Any, batch_size: int | None, flat: bool
) -> tuple[Array, ...]:
    # Beyond the streams of components, which fold in small numbers.
    keys = [jax.random.fold_in(key, _STREAM + i) for i in range(5)]
    size = posterior.num_samples
    if batch_size is not None:
        size = min(size, max(batch_size, _SAMPLES))
    minibatch = posterior.minibatch(keys[0], batch_size and size)
    space = _space(keys[1], posterior, sampler, minibatch, flat)
    zero, nowhere = jnp.zeros((), posterior.weights.dtype), space.zero
    parts = (
        _Stiffness(nowhere, nowhere, zero, zero, zero),
        _Bends(nowhere, nowhere, nowhere, zero),
        _Walk(space.center, zero, nowhere, zero, zero),
    )
    ends = np.cumsum([part.looks for part in parts])

    def look(i: Array, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        """One gradient: the program holds the model once."""
        which = jnp.searchsorted(jnp.asarray(ends), i, side="right")
        offsets = (0, *ends[:-1])

        def place(k: int, parts: tuple[Any, ...]) -> Any:
            return parts[k].place(space, keys[2 + k], i - offsets[k])

        def learn(k: int, parts: tuple[Any, ...], loss: Array, gradient: Any) -> tuple[Any, ...]:
            new = parts[k].learn(space, keys[2 + k], i - offsets[k], loss, gradient)
            return (*parts[:k], new, *parts[k + 1 :])

        numbers = range(len(parts))
        there = jax.lax.switch(which, [partial(place, k) for k in numbers], parts)
        loss, gradient = space.look(there)
        return jax.lax.switch(which, [partial(learn, k) for k in numbers], parts, loss, gradient)

    stiff, bends, walk = jax.lax.fori_loop(0, int(ends[-1]), look, parts)
    moved = space.scaled(stiff.u)
    tether = posterior.localization * optax.tree.vdot(moved, moved)
    stiffness = posterior.nbeta * stiff.value + tether

    # Of a difference over a 64th of the way a 64th is there; what is more is rounding.
    noise = jnp.maximum(stiff.part - stiff.whole * 1.5 * _FRACTION, 0.0)
    pulled = space.scaled(space.scaled(_first(space, keys[2])))
    least = posterior.localization / posterior.nbeta * optax.tree.norm(pulled)
    rounding = noise / jnp.maximum(jnp.maximum(stiff.whole, least), 1e-30)
    # Kinks of single samples average out; a step sees a mini-batch.
    bend = jnp.sqrt(bends.total / _BENDS * (size / (batch_size or size)))
    jump = jnp.sqrt(walk.rest / jnp.maximum(walk.order, 1e-30))
    # Squares of what is beside grow with the way and fall with the samples.
    share = size / posterior.num_samples / _STRIDE
    leap = posterior.nbeta * jnp.sqrt(walk.rest / _STEPS * share)
    heat = _heat(posterior, space, minibatch, stiff.u, batch_size)
    eps = float(jnp.finfo(walk.loss.dtype).eps) / np.sqrt(minibatch.weights.size)
    grain = posterior.nbeta * eps * jnp.abs(walk.loss)
    number = sum(leaf.size for leaf in jax.tree.leaves(stiff.here))
    gradient = optax.tree.norm(stiff.here) / np.sqrt(number)
    spacing = _spacing(posterior) * jnp.sqrt(posterior.localization)
    return stiffness, rounding, bend, jump, leap, heat, grain, gradient, spacing


def _heat(
    posterior: Posterior, space: _Space, minibatch: Minibatch, u: Any, batch_size: int | None
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
