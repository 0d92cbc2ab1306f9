"""The response of a training run from twin runs: differences over a finite change of the weights.

For each source g two more runs are trained beside the plain one, from the same start and on the
same batches, with its weights times 1 + δ and 1 − δ:

    dφ/dρ_g ≈ [φ(w_T; 1 + δ) − φ(w_T; 1 − δ)] / 2δ

On a smooth run that is the derivative up to O(δ²). Where a run is chaotic the derivative is that of
ever smaller changes, and its mean over seeds is ruled by few of them; what retraining does on
weights that differ by δ is the derivative smoothed over ± δ, and this measures it. As with secants
for Hessian products, kinks count and nothing is differentiated twice (here: at all).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxpattern.descent import Descent, drawing, step_of, taken
from jaxpattern.response.products import of_each
from jaxpattern.response.trajectory import Ask, Derivative
from jaxpattern.runtime.mesh import over_lanes
from jaxpattern.types import Params


class Twins(NamedTuple):
    """Runs `[2 G + 1]`: with more weight on each source, with less, and the plain one."""

    params: Params
    optimizer: Any
    skipped: Array


@partial(jax.jit, static_argnames=("run", "number"))
def start_twins(
    run: Descent, number: int, key: Key[Array, " seeds"], params: Params, given: Any
) -> Twins:
    """All runs at the same start."""

    def one(_: Any, params: Params, given: Any) -> Twins:
        start = Twins(params, run.optimizer_state(params, given), jnp.zeros((), jnp.int32))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (2 * number + 1, *jnp.shape(x))), start)

    return over_lanes(one, run.mesh)((), params, given)


@partial(jax.jit, static_argnames="run")
def advance_twins(
    run: Descent,
    ask: Ask,
    width: Any,
    state: Twins,
    key: Key[Array, " seeds"],
    bounds: tuple[Array, Array],
) -> Twins:
    """Steps [start, stop) of all runs of all seeds."""

    def one(shared: tuple[Ask, Any, Any], state: Twins, key: Array) -> Twins:
        ask, width, bounds = shared
        choose = drawing(run, ask.weighted)
        number = state.skipped.shape[0] // 2
        twin = jnp.arange(2 * number + 1)
        source = jnp.where(twin < 2 * number, twin % number, -2)
        change = jnp.where(twin < number, width, -width)

        def step(t: Array, s: Twins) -> Twins:
            drawn, move = step_of(run, choose, key, t)

            def follow(params: Params, optimizer: Any, source: Array, change: Array) -> Any:
                chosen = ask.source[drawn.place] == source
                factor = 1 + jnp.where(chosen, change, 0.0).astype(drawn.weights.dtype)
                factor = factor.reshape(-1, *(1,) * (drawn.weights.ndim - 1))
                stepped = move(params, optimizer, drawn.weights * factor)
                return *taken(stepped, params, optimizer), ~stepped.finite

            params, optimizer, broken = of_each(follow, s.params, s.optimizer, source, change)
            return Twins(params, optimizer, s.skipped + broken.astype(jnp.int32))

        return jax.lax.fori_loop(bounds[0], bounds[1], step, state)

    return over_lanes(one, run.mesh)((ask, width, bounds), state, key)


@partial(jax.jit, static_argnames="run")
def read_twins(run: Descent, ask: Ask, width: Any, state: Twins) -> Derivative:
    """φ of the plain run, and dφ/dρ of each source."""

    def one(shared: tuple[Ask, Any], state: Twins) -> Derivative:
        ask, width = shared
        phi = of_each(ask.phi, state.params)
        number = phi.shape[0] // 2
        slope = (phi[:number] - phi[number:-1]) / (2 * width)
        nowhere = jnp.full((), -1, jnp.int32)
        return Derivative(phi[-1], slope.T, None, nowhere, jnp.sum(state.skipped))

    return over_lanes(one, run.mesh)((ask, width), state)
