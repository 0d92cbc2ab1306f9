"""A function whose square roots have derivative 0 at 0.

An optimizer divides by √ν of its second moment ν ≥ 0. Where ν is exactly 0, as for the embedding of
a token that no batch held, ν is at its least and its derivative is 0, but that of the root is
infinite, and ∞ · 0 is NaN. What is meant is 0: whatever does not move has no derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, primitives
from jaxtyping import Array, Float


@jax.custom_jvp
def root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """√x, with derivative ẋ / 2√x where x > 0 and 0 where x = 0."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    y = jnp.sqrt(x)
    zero = x == 0
    return y, jnp.where(zero, 0.0, tangent * (0.5 / jnp.where(zero, 1.0, y)))


def with_safe_roots(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of pytrees of arrays, every √ of it replaced by `root`."""

    def safe(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        flat = _evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return safe


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
    """The program, equation by equation; calls and branches are entered, loops are not."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for equation in jaxpr.eqns:
        given = [x.val if isinstance(x, Literal) else known[x] for x in equation.invars]
        primitive, settings = equation.primitive, equation.params
        if primitive is primitives.sqrt_p:
            out = [root(*given)]
        elif primitive is primitives.jit_p:
            out = _evaluate(settings["jaxpr"].jaxpr, settings["jaxpr"].consts, *given)
        elif primitive is primitives.cond_p:
            branches = [partial(_evaluate, b.jaxpr, b.consts) for b in settings["branches"]]
            out = jax.lax.switch(given[0], branches, *given[1:])
        else:
            settings = primitive.get_bind_params(settings)
            # Before and after jax 0.10 this is (functions, settings), or settings alone.
            functions, settings = settings if isinstance(settings, tuple) else ((), settings)
            bound = primitive.bind(*functions, *given, **settings)
            out = bound if primitive.multiple_results else [bound]
        known.update(zip(equation.outvars, out, strict=True))
    return [x.val if isinstance(x, Literal) else known[x] for x in jaxpr.outvars]
