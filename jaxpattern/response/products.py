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
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

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
        return jax.vmap(lambda v: jax.jvp(gradient, (at,), (v,))[1])(directions)
    moved = _mover(at, scale, width)
    step_type = jax.tree.leaves(at)[0].dtype
    if product == "central":

        def central(v: Position) -> Position:
            # Both ends by one function: the program holds the gradient once.
            step, ends = jax.vmap(partial(moved, v))(jnp.asarray([1.0, -1.0], step_type))
            slopes = of_each(gradient, ends)
            return jax.tree.map(lambda g: (g[0] - g[1]) / (2 * step[0]), slopes)

        return of_each(central, directions)
    here = gradient(at)

    def one_sided(v: Position, sign: Array) -> Position:
        step, there = moved(v, sign)
        return _over(gradient(there), here, sign * step)

    number = jax.tree.leaves(directions)[0].shape[0]
    signs = jax.random.rademacher(key, (number,), step_type)
    if mirror is not None:
        signs = signs * mirror.astype(step_type)
    return of_each(one_sided, directions, signs)


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
    moved = _mover(at, scale, _VALUE_WIDTH)

    def difference(v: Position) -> Any:
        (step, there), (_, back) = moved(v, 1.0), moved(v, -1.0)
        return _over(function(there), function(back), 2 * step)

    return function(at), jax.vmap(difference)(directions)


def _mover(at: Position, scale: Position, width: Any) -> Callable[[Position, Any], Any]:
    """v, sign ↦ s and w + sign s v, with s = c / ‖v/σ‖."""

    def moved(v: Position, sign: Any) -> tuple[Array, Position]:
        squares = jax.tree.map(lambda x, s: jnp.sum((x / s) ** 2), v, scale)
        length = jnp.sqrt(jax.tree.reduce(jnp.add, squares))
        step = jnp.where(length > 0, width / jnp.where(length > 0, length, 1.0), 1.0)
        return step, jax.tree.map(lambda w, x: w + (sign * step * x).astype(w.dtype), at, v)

    return moved


def _over(a: Position, b: Position, by: Any) -> Position:
    return jax.tree.map(lambda x, y: (x - y) / by, a, b)
