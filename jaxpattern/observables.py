"""Observables: scalar functions φ of the parameters whose posterior expectations are steered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxpattern.losses import check_loss, check_weights, counted_rows, losses_in_chunks
from jaxpattern.pytrees import register_pytree
from jaxpattern.types import Batch, Losses, LossFn, Params
from jaxpattern.validation import (
    batch_length,
    check_count,
    check_function,
    check_hashable,
    holds,
)


@register_pytree
@dataclass(frozen=True, eq=False)
class MeanLoss:
    """φ(w) = Σ_z ρ_z ℓ_z(w) / Σ_z ρ_z over a fixed batch, which is a leaf of it."""

    batch: Batch
    weights: Array | np.ndarray | None
    loss_fn: LossFn = field(metadata={"static": True})
    chunk: int | None = field(metadata={"static": True})

    def __call__(self, params: Params) -> Float[Array, ""]:
        return _mean(_losses(self, params), self.weights)

    @property
    def num_samples(self) -> int:
        """Samples in the batch: a forward pass of each is what one evaluation costs."""
        return batch_length("batch", self.batch)


def mean_loss(
    loss_fn: LossFn,
    batch: Batch,
    *,
    weights: Shaped[Array | np.ndarray, "samples *tokens"] | list[Any] | None = None,
    chunk: int | None = None,
) -> MeanLoss:
    """The observable φ(w) = Σ_z ρ_z ℓ_z(w) / Σ_z ρ_z over a batch.

    Args:
        loss_fn: pure function of parameters and batch that returns `[B]` or `[B, T]` losses.
        batch: pytree of arrays with one leading sample axis.
        weights: ρ of the shape of the losses; zero excludes, and an excluded loss may be anything,
            NaN included. None is all ones.
        chunk: samples evaluated at a time, where memory is short.

    Raises:
        TypeError: `loss_fn` is not a function of two arguments.
        ValueError: the batch is empty or ragged; (when it meets the parameters) the loss is
            reduced, or the weights do not have the shape of the losses.
    """
    check_function("loss_fn", loss_fn, "a function of (params, batch)", num_arguments=2)
    check_hashable("loss_fn", loss_fn)
    batch_length("batch", batch)
    if chunk is not None:
        check_count("chunk", chunk, minimum=1)
    if weights is not None:
        weights = check_weights("weights", weights, None)
        if isinstance(weights, np.ndarray):
            weights = weights / (np.max(np.abs(weights), initial=0.0) or 1.0)
        if not holds(lambda x: np.sum(np.asarray(x, np.float64)) > 0, weights):
            raise ValueError("weights must have a positive sum")
    return MeanLoss(batch=batch, weights=weights, loss_fn=loss_fn, chunk=chunk)


def mean_losses(
    loss_fn: LossFn,
    batches: Mapping[str, Batch],
    *,
    weights: Mapping[str, Shaped[Array | np.ndarray, "samples *tokens"] | list[Any]] | None = None,
    chunk: int | None = None,
) -> dict[str, MeanLoss]:
    """One `mean_loss` per batch, under its name: what `susceptibilities` takes as observables.

    Args:
        loss_fn: pure function of parameters and batch that returns `[B]` or `[B, T]` losses.
        batches: name → pytree of arrays with one leading sample axis.
        weights: name → ρ of the shape of that batch's losses, for some or all names.
        chunk: samples evaluated at a time, where memory is short.

    Raises:
        TypeError: `batches` is no mapping.
        ValueError: it is empty, or `weights` names other batches; and as for `mean_loss`.
    """
    if not isinstance(batches, Mapping):
        raise TypeError(f"batches must map names to batches, got {type(batches).__name__}")
    if not batches:
        raise ValueError("batches is empty; give at least one")
    weights = weights or {}
    unknown = sorted(set(weights) - set(batches))
    if unknown:
        raise ValueError(f"weights names {unknown}, the batches are {list(batches)}")
    return {
        name: mean_loss(loss_fn, batch, weights=weights.get(name), chunk=chunk)
        for name, batch in batches.items()
    }


@register_pytree
@dataclass(frozen=True, eq=False)
class ExcessLoss:
    """φ(w) = L(w) − L(w*) over a fixed batch, differences taken loss by loss."""

    mean: MeanLoss
    reference: Float[Array, "samples *tokens"]

    def __call__(self, params: Params) -> Float[Array, ""]:
        return _mean(_losses(self.mean, params) - self.reference, self.mean.weights)

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""
        return self.mean.num_samples


def excess_loss(
    loss_fn: LossFn,
    batch: Batch,
    params: Params,
    *,
    weights: Shaped[Array | np.ndarray, "samples *tokens"] | list[Any] | None = None,
    chunk: int | None = None,
) -> ExcessLoss:
    """The observable φ(w) = L(w) − L(w*), the standard one of a component.

    Args:
        loss_fn: pure function of parameters and batch that returns `[B]` or `[B, T]` losses.
        batch: the samples that L averages.
        params: w*, the parameters at which it is zero.
        weights: ρ of the shape of the losses.
        chunk: samples evaluated at a time, where memory is short.
    """
    mean = mean_loss(loss_fn, batch, weights=weights, chunk=chunk)
    return ExcessLoss(mean=mean, reference=_losses(mean, params))


def _losses(mean: MeanLoss, params: Params) -> Losses:
    """The losses of the batch; what is excluded is not evaluated."""
    batch, weights = mean.batch, mean.weights
    if weights is not None:
        shape, _ = check_loss(mean.loss_fn, params, batch, mean.num_samples)
        if jnp.shape(weights) != shape:
            raise ValueError(
                f"weights must have the shape of the losses, {list(shape)}, "
                f"got {list(jnp.shape(weights))}"
            )
        batch = counted_rows(jax.tree.map(jnp.asarray, batch), jnp.asarray(weights))
    return losses_in_chunks(mean.loss_fn, params, batch, mean.chunk)


def _mean(losses: Losses, weights: Array | np.ndarray | None) -> Float[Array, ""]:
    """Σ ρ ℓ / Σ ρ; a loss of weight 0 may be anything, also NaN."""
    if weights is None:
        return jnp.mean(losses)
    weights = jnp.asarray(weights).astype(losses.dtype)
    return jnp.sum(weights * jnp.where(weights == 0, 0, losses)) / jnp.sum(weights)
