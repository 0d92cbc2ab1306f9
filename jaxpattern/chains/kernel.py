"""A sampler in one shape, init(position, key) and step(key, state), and its random streams."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxpattern.posterior import Target
from jaxpattern.samplers import Sampler, make_sampler
from jaxpattern.types import Position


class Kernel(NamedTuple):
    """A sampling algorithm whose steps draw their own mini-batches."""

    init: Callable[[Position, Key[Array, ""]], PyTree[Array]]
    step: Callable[[Key[Array, ""], PyTree[Array]], PyTree[Array]]


def position_of(state: PyTree[Array]) -> Position:
    """The position in a sampler's state: its field of that name, or the state itself."""
    return getattr(state, "position", state)


def noise_scale(sampler: Sampler, state: PyTree[Array]) -> Position:
    """σ, the standard deviation of a step's noise in each parameter; 1 where it is not known."""
    position, scale = position_of(state), 1.0
    if sampler.step_scale is not None:
        scale = sampler.step_scale(state, sampler.settings)
    if jax.tree.structure(scale) == jax.tree.structure(position):  # type: ignore[operator]
        return jax.tree.map(lambda s, w: jnp.broadcast_to(s, w.shape), scale, position)
    return jax.tree.map(lambda w: jnp.full_like(w, scale), position)


def build_kernel(posterior: Target, sampler: Sampler, batch_size: int | None) -> Kernel:
    """The kernel of a sampler on a posterior, with mini-batches drawn inside its steps.

    Raises:
        TypeError: (when it is traced) the step does not return a state like the one it was given.
    """
    algorithm = sampler(posterior)

    def full_data_step(key: Key[Array, ""], state: Any) -> Any:
        out = algorithm.step(key, state)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                "the sampler's step(key, state) must return (state, info), "
                f"got {type(out).__name__}"
            )
        return _like(out[0], state)

    def minibatch_step(key: Key[Array, ""], state: Any) -> Any:
        batch_key, step_key = step_keys(key)
        minibatch = posterior.minibatch(batch_key, batch_size)
        return _like(algorithm.step(step_key, state, minibatch), state)

    return Kernel(
        init=lambda position, key: algorithm.init(position, key),
        step=minibatch_step if sampler.needs_minibatch else full_data_step,
    )


def step_keys(key: Key[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """The keys of a step's mini-batch and of its noise."""
    batch_key, step_key = jax.random.split(key)
    return batch_key, step_key


def as_sampler(sampler: Any, posterior: Any) -> Sampler:
    """What a user gives as a sampler. Only of a bare function are the parameters of `step` counted.

    Raises:
        TypeError: it does not return a `SamplingAlgorithm`, or its step takes neither (key, state)
            nor (key, state, minibatch).
    """
    if isinstance(sampler, Sampler):
        return sampler
    found: list[Any] = []

    def look(posterior: Any) -> None:
        found.append(sampler(posterior))

    jax.eval_shape(look, posterior)
    algorithm = found[0]
    if not (hasattr(algorithm, "init") and hasattr(algorithm, "step")):
        raise TypeError(
            "sampler must be a function Posterior -> SamplingAlgorithm, such as "
            f"jp.sgld(step_size=1e-3); it returned {type(algorithm).__name__}"
        )
    required = [
        parameter.name
        for parameter in inspect.signature(algorithm.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(required) not in (2, 3):
        raise TypeError(
            "the sampler's step must take (key, state) or (key, state, minibatch); it requires "
            f"{required}: bind the others first"
        )
    return make_sampler(sampler, needs_minibatch=len(required) == 3)


def _like(new: PyTree[Array], old: PyTree[Array]) -> PyTree[Array]:
    """The new state, if it has the structure, shapes and dtypes of the old one."""
    specs = [
        jax.tree.map(lambda x: (jnp.result_type(x).name, jnp.shape(x)), state)
        for state in (old, new)
    ]
    if specs[0] != specs[1]:
        raise TypeError(
            "the sampler's step must return a state like the one it was given, "
            f"{specs[0]}, got {specs[1]}"
        )
    return new


@dataclass(frozen=True)
class Streams:
    """The random streams of one chain."""

    init: Key[Array, ""]
    step: Key[Array, ""]
    record: Key[Array, ""]


def streams_of(key: Key[Array, ""]) -> Streams:
    """The streams of the chain with this key."""
    return Streams(*(jax.random.fold_in(key, stream) for stream in range(3)))
