"""Hessian products: where a chain's derivative meets second derivatives of the loss.

**Secants.** Autodiff's Hessian has no delta functions, so on a loss with kinks (ReLU, max-pooling,
an absolute error) the derivative of a chain misses what the kinks do. But one step of the chain
smears the loss over the scale √ε of its noise: what counts in expectation is the Hessian of the
smoothed loss. A difference of gradients at that scale has it,

    H v ≈ ‖v‖ [g(w + h v̂) − g(w − h v̂)] / 2h ,       h = c √ε ,

with ‖·‖ and v̂ in the metric of the noise (a parameter whose noise has the standard deviation σ_i
counts v_i / σ_i). In expectation over w it is the Hessian smoothed along v̂ over ± h; on smooth
losses it is H v + O(h²). Its variance goes as kink² / h. One-sided, with a random sign σ,
σ [g(w + σ h v̂) − g(w)] / h has the same expectation to O(h²), needs one gradient for each further
v, and is noisier on kinks. No second derivative is left in the program: first derivatives are all
that a loss must have. Mirrored twins take opposite signs, so that what the sign adds to the product
of a smooth loss cancels in their mean.

On smooth networks both forms and autodiff's product give the same χ to four digits; on ReLU and
max-pooling the one-sided form has 1.0 to 2.1 times the error of the central one. `chains.pilot`
measures how much gradients bend over a step of the noise (.01 for tanh and GELU, .2 to .8 where
there are kinks), and one-sided differences are taken where that is little and they cost less.

The price is precision: rounding of g is divided by h. Where the loss is computed in less than
float32 the difference is noise, and autodiff's product is right; `chains.pilot` measures which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpattern.types import Position

Product = Literal["central", "one-sided", "autodiff"]
_VALUE_WIDTH = 0.25
BEND = 0.05
WORDS = {
    "central": "secants",
    "one-sided": "one-sided secants",
    "autodiff": "autodiff's Hessian",
}


def in_words(product: Product, width: float) -> str:
    """How products were computed."""
    wide = "" if product == "autodiff" or width == 1 else f" of width {width:g}"
    return WORDS[product] + wide


def product_cost(product: Product, number: int) -> int:
    """Gradients that so many products at one place cost; autodiff's counts two, and one for all."""
    return {"central": 2 * number, "one-sided": 1 + number, "autodiff": 1 + 2 * number}[product]


def hessian_products(
    gradient: Callable[[Position], Position],
    at: Position,
    directions: Position,
    *,
    product: Product,
    scale: Position,
    width: Any,
    key: Key[Array, ""],
    mirror: Any = None,
) -> Position:
    """∇²L(w) v of every direction v, `[K, ...]`, from the gradient of the loss.

    Args:
        gradient: ∇L.
        at: w.
        directions: the K vectors v.
        product: a difference of gradients, or `"autodiff"`: one forward-mode derivative for each v,
            which keeps nothing of a pass for the next (what `jax.linearize` keeps would grow with
            the samples).
        scale: σ, standard deviation of the chain's noise in each parameter.
        width: c.
        key: for the signs.
        mirror: 1 or −1, of a chain that is one of mirrored twins.
    """
    if product == "autodiff":
        return autodiff_products(gradient, at, directions)
    secants = secants_of(at, directions, product, scale=scale, width=width, key=key, mirror=mirror)
    slopes = of_each(lambda *end: gradient(secants.place(*end)), secants.steps, secants.numbers)
    return secants.products(slopes, gradient(at) if product == "one-sided" else None)


def autodiff_products(
    gradient: Callable[[Position], Position], at: Position, directions: Position
) -> Position:
    """∇²L(w) v of every v by forward mode, `[K, ...]`."""
    return jax.vmap(lambda v: jax.jvp(gradient, (at,), (v,))[1])(directions)


class Secants(NamedTuple):
    """The places where gradients are asked for, and what their differences say.

    Attributes:
        at: w.
        directions: v, `[K, ...]`.
        steps: s, signed, of every place w + s v.
        numbers: which v that is: 0 … K − 1, and again for the other ends of central differences.
    """

    at: Position
    directions: Position
    steps: Float[Array, " places"]
    numbers: Int[np.ndarray, " places"]

    def place(self, step: Array, number: Array) -> Position:
        """w + s v; w itself where s is 0, whatever has become of v."""

        def one(w: Array, v: Array) -> Array:
            return jnp.where(step == 0, w, w + (step * v[number]).astype(w.dtype))

        return jax.tree.map(one, self.at, self.directions)

    def products(self, slopes: Position, here: Position | None) -> Position:
        """∇²L v of every v, from the gradients at the places and, one-sided, from that at w."""
        if here is not None:
            return jax.vmap(lambda there, step: _over(there, here, step))(slopes, self.steps)
        number = len(self.numbers) // 2
        there, back = (
            jax.tree.map(lambda g: g[half], slopes)  # noqa: B023
            for half in (slice(number), slice(number, None))
        )
        return jax.vmap(_over)(there, back, 2 * self.steps[:number])


def secants_of(
    at: Position,
    directions: Position,
    product: Product,
    *,
    scale: Position,
    width: Any,
    key: Key[Array, ""],
    mirror: Any = None,
) -> Secants:
    """The places of `hessian_products`; none for autodiff's, which are no differences."""
    if product == "autodiff":
        return Secants(at, directions, jnp.zeros(0), np.zeros(0, np.int32))
    number = jax.tree.leaves(directions)[0].shape[0]
    numbers = np.arange(number, dtype=np.int32)
    steps = jax.vmap(lambda v: _step(v, scale, width))(directions)
    if product == "central":
        both = jnp.concatenate([steps, -steps])
        return Secants(at, directions, both, np.concatenate([numbers, numbers]))
    signs = jax.random.rademacher(key, (number,), steps.dtype)
    if mirror is not None:
        signs = signs * mirror.astype(steps.dtype)
    return Secants(at, directions, signs * steps, numbers)


def of_each(function: Callable[..., Any], *each: Any) -> Any:
    """f(x, …) of every x: one after the other on a CPU, at once elsewhere.

    The caches of a CPU hold a pass through a small model, and not several beside each other: 24
    gradients of a two-layer model at 24 places cost half the time so.
    """
    number = jax.tree.leaves(each)[0].shape[0]
    if number > 1 and jax.default_backend() == "cpu":
        return jax.lax.map(lambda x: function(*x), each)
    return jax.vmap(function)(*each)


def derivatives_along(
    function: Callable[[Position], Any], at: Position, directions: Position, *, scale: Position
) -> tuple[Any, Any]:
    """f(w), and its derivative along each of K directions, `[K, ...]`.

    Forward mode; where the function cannot enter it (a `custom_vjp` inside) a difference of values
    over ± a quarter of the noise.
    """
    try:
        return jax.vmap(lambda v: jax.jvp(function, (at,), (v,)), out_axes=(None, 0))(directions)
    except TypeError as error:
        if "forward-mode" not in str(error) and "custom_vjp" not in str(error):
            raise

    def difference(v: Position) -> Any:
        step = _step(v, scale, _VALUE_WIDTH)
        there, back = (
            jax.tree.map(lambda w, x: w + (size * x).astype(w.dtype), at, v)  # noqa: B023
            for size in (step, -step)
        )
        return _over(function(there), function(back), 2 * step)

    return function(at), jax.vmap(difference)(directions)


def _step(v: Position, scale: Position, width: Any) -> Array:
    """c / ‖v/σ‖: how far along v the noise reaches."""
    squares = jax.tree.map(lambda x, s: jnp.sum((x / s) ** 2), v, scale)
    length = jnp.sqrt(jax.tree.reduce(jnp.add, squares))
    return jnp.where(length > 0, width / jnp.where(length > 0, length, 1.0), 1.0)


def _over(a: Position, b: Position, by: Any) -> Position:
    return jax.tree.map(lambda x, y: (x - y) / by, a, b)
