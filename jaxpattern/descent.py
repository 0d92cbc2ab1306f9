"""One step of a training run: which samples it draws, and what it does with them.

`train` repeats it; the response of a run differentiates it. Both take the step from here, so that
the derivative is that of the very run, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpattern.losses import check_finite_losses, check_loss, normalise_weights
from jaxpattern.lottery import draw, make_lottery
from jaxpattern.posterior import Minibatch
from jaxpattern.runtime.mesh import axis_size, cut
from jaxpattern.types import Batch, Losses, LossFn, Params
from jaxpattern.validation import batch_length, check_count, check_params, check_typed_key, holds

_RECORDS = 20
_NOISE = 2**32 - 1  # the stream of a stochastic loss; no step has this number


@dataclass(frozen=True)
class _AtKey:
    """A stochastic loss at one key."""

    loss_fn: Callable[..., Losses]

    def __call__(self, params: Params, batch: Batch) -> Losses:
        return self.loss_fn(params, batch, jax.random.key(0))


class Descent(NamedTuple):
    """The static part of a training run."""

    loss_fn: Callable[..., Losses]
    optimizer: optax.GradientTransformation
    num_steps: int
    batch_size: int
    weighting: str
    record_every: int | None
    mesh: Mesh | None
    stochastic: bool = False
    seeds_at_once: int | None = None

    @property
    def losses(self) -> LossFn:
        """The loss as a function of parameters and batch alone."""
        return _AtKey(self.loss_fn) if self.stochastic else self.loss_fn

    @property
    def every(self) -> int:
        """Steps between two records."""
        return self.record_every or -(-self.num_steps // _RECORDS)

    @property
    def num_records(self) -> int:
        """The first, every `every` steps, and the last."""
        return 1 + -(-self.num_steps // self.every)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the result depends on, by name."""
        return {name: value for name, value in self._asdict().items() if name != "mesh"}

    def optimizer_state(self, params: Params, given: Any) -> Any:
        """Where the optimizer starts: from what it is given, or afresh."""
        return self.optimizer.init(params) if given is None else given


class Drawn(NamedTuple):
    """The samples of a step: their places in the data, themselves, and their weights."""

    place: Int[Array, " batch"]
    batch: Batch
    weights: Float[Array, "batch *tokens"]


class Stepped(NamedTuple):
    """What a step gives; where it is not finite, it is not to be taken."""

    params: Params
    optimizer: Any
    loss: Float[Array, ""]
    finite: Bool[Array, ""]


def drawing(run: Descent, weighted: Minibatch) -> Callable[[Key[Array, ""]], Drawn]:
    """What draws the samples of a step by the step's key."""
    row_weights = weighted.weights.reshape(weighted.weights.shape[0], -1).sum(axis=1)
    # Samples without weight are never looked at: 0 · NaN is NaN, also in a derivative.
    counted = jnp.argmax(row_weights != 0)
    lottery = make_lottery(row_weights) if run.weighting == "sampling" else None

    def choose(key: Key[Array, ""]) -> Drawn:
        if lottery is None:
            index = jax.random.randint(key, (run.batch_size,), 0, row_weights.shape[0])
            excluded = (weighted.weights[index] == 0).reshape(run.batch_size, -1).all(axis=1)
            rows = jnp.where(excluded, counted, index)
            batch = jax.tree.map(lambda x: x[rows], weighted.batch)
            return Drawn(index, batch, weighted.weights[index])
        index = draw(key, lottery, run.batch_size)
        batch, weights = jax.tree.map(lambda x: x[index], weighted)
        rows = row_weights[index].reshape(-1, *(1,) * (weights.ndim - 1))
        return Drawn(index, batch, weights / rows)

    return choose


def step_of(
    run: Descent,
    choose: Callable[[Key[Array, ""]], Drawn],
    key: Key[Array, ""],
    t: Int[Array, ""],
) -> tuple[Drawn, Callable[[Params, Any, Float[Array, "batch *tokens"]], Stepped]]:
    """Step t of a run: its samples, and what it makes of parameters, optimizer and weights."""
    drawn = cut(choose(jax.random.fold_in(key, t)), run.mesh, "data")
    noise = jax.random.fold_in(jax.random.fold_in(key, _NOISE), t)

    def step(params: Params, optimizer: Any, weights: Float[Array, "batch *tokens"]) -> Stepped:
        total = jnp.sum(weights)

        def objective(params: Params) -> Array:
            losses = run.loss_fn(params, drawn.batch, *((noise,) if run.stochastic else ()))
            losses = jnp.where(weights == 0, 0.0, losses.astype(weights.dtype))
            return jnp.sum(weights * losses) / jnp.where(total == 0, 1.0, total)

        loss, gradient = jax.value_and_grad(objective)(params)
        updates, optimizer = run.optimizer.update(gradient, optimizer, params)
        finite = jnp.isfinite(loss + optax.tree.norm(gradient))
        return Stepped(optax.apply_updates(params, updates), optimizer, loss, finite)

    return drawn, step


def taken(stepped: Stepped, params: Params, optimizer: Any) -> tuple[Params, Any]:
    """Parameters and optimizer after the step: as before, where it is not finite."""
    keep = partial(jax.tree.map, partial(jnp.where, stepped.finite))
    return keep((stepped.params, stepped.optimizer), (params, optimizer))


def check_descent(
    run: Descent, seeds: int | None, params: Params, data: Batch, weights: Any, given: Any
) -> Float[Array, "samples *tokens"]:
    """What `train` takes, checked before any step; returns ρ, scaled to sum N."""
    check_params("params", params)
    num_samples = batch_length("data", data)
    _check_optimizer(run.optimizer, params)
    check_count("num_steps", run.num_steps, minimum=1)
    check_count("batch_size", run.batch_size, minimum=1)
    if run.batch_size > num_samples:
        raise ValueError(
            f"batch_size must be at most the {num_samples} samples, got {run.batch_size}"
        )
    parts = axis_size(run.mesh, "data")
    if run.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts}, the size of the data axis of the mesh, "
            f"got {run.batch_size}"
        )
    if run.weighting not in ("loss", "sampling"):
        raise ValueError(f"weighting must be 'loss' or 'sampling', got {run.weighting!r}")
    if run.seeds_at_once is not None:
        check_count("seeds_at_once", run.seeds_at_once, minimum=1)
    if run.record_every is not None:
        check_count("record_every", run.record_every, minimum=1)
    if seeds is not None and batch_length("params", params) != seeds:
        raise ValueError(
            f"params must have a leading axis of {seeds}, one for each key, "
            f"got {batch_length('params', params)}"
        )
    if given is not None:
        start = run.optimizer.init if seeds is None else jax.vmap(run.optimizer.init)
        wanted, got = (
            jax.tree.map(lambda x: (jnp.shape(x), str(jnp.result_type(x))), state)
            for state in (jax.eval_shape(start, params), given)
        )
        if wanted != got:
            raise ValueError(
                f"optimizer_state must be one of optimizer for these params, {wanted}, got {got}"
            )
    one = params if seeds is None else jax.tree.map(lambda x: x[0], params)
    shape, dtype = check_loss(run.losses, one, data, num_samples)
    rho = normalise_weights(weights, shape, dtype)
    check_finite_losses(run.losses, one, data, num_samples, rho)
    if run.weighting == "sampling" and not holds(lambda x: x.min() >= 0, rho):
        raise ValueError("weights must not be negative with weighting='sampling'")
    return rho


def check_keys(key: Any) -> int | None:
    """The number of seeds, or None for a single key."""
    check_typed_key(key)
    if key.ndim > 1:
        raise TypeError(f"key must be one key or keys of shape [S], got shape {key.shape}")
    return None if key.ndim == 0 else key.shape[0]


def _check_optimizer(optimizer: Any, params: Params) -> None:
    """Something with init(params) and update(gradients, state, params)."""
    wanted = "an optax.GradientTransformation, such as optax.adamw(1e-3)"
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        told = f"{optimizer!r:.40}" if isinstance(optimizer, int | float) else type(optimizer)
        raise TypeError(f"optimizer must be {wanted}, got {told}")

    def step(params: Params) -> Any:
        return optimizer.update(params, optimizer.init(params), params)

    try:
        jax.eval_shape(step, params)
    except TypeError as error:
        raise TypeError(
            f"optimizer must be {wanted}, whose update needs (gradients, state, params) and no "
            f"more: {error}"
        ) from error
