"""Losses: evaluated in chunks, checked for shape and for finite values, and their weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpattern.types import Batch, Losses, LossFn, Params
from jaxpattern.validation import batch_length, holds, is_concrete

_CHECKED_SAMPLES = 1024


def losses_in_chunks(loss_fn: LossFn, params: Params, batch: Batch, chunk: int | None) -> Losses:
    """ℓ_z(w) of a batch, `chunk` samples at a time: memory O(chunk), one compiled loop."""

    def evaluate(piece: Batch, size: int) -> Losses:
        losses = loss_fn(params, piece)
        _check_losses(losses, size, "loss_fn")
        return widen(losses)

    size = batch_length("batch", batch)
    if chunk is None or chunk >= size:
        return evaluate(batch, size)
    whole = size // chunk * chunk
    head = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), batch)
    losses = jax.lax.map(lambda piece: evaluate(piece, chunk), head)
    losses = losses.reshape(whole, *losses.shape[2:])
    if whole == size:
        return losses
    rest = evaluate(jax.tree.map(lambda x: x[whole:], batch), size - whole)
    return jnp.concatenate([losses, rest])


def check_loss(
    loss_fn: LossFn, params: Params, batch: Batch, num_samples: int, name: str = "loss_fn"
) -> tuple[tuple[int, ...], jnp.dtype]:
    """Shape and (widened) dtype of the losses of a batch, without computing them."""
    out = jax.eval_shape(loss_fn, params, batch)
    _check_losses(out, num_samples, name)
    return out.shape, jnp.promote_types(out.dtype, jnp.float32)


def _check_losses(out: Any, num_samples: int, name: str) -> None:
    if not hasattr(out, "shape"):
        raise TypeError(f"{name} must return one array of losses, got {type(out).__name__}")
    if out.ndim == 0:
        raise ValueError(
            f"{name} must return one loss a sample, [B] or [B, T]; it reduced to a scalar"
        )
    if out.shape[0] != num_samples or out.ndim > 2 or 0 in out.shape:
        raise ValueError(
            f"{name} must return losses of shape [B] or [B, T] with B = {num_samples}, "
            f"got {list(out.shape)}"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"{name} must return floating-point losses, got {out.dtype}")


def first_losses(loss_fn: LossFn, params: Params, batch: Batch) -> np.ndarray:
    """The losses of the first samples, by a program that is compiled once per shape."""
    with jax.ensure_compile_time_eval():
        head = jax.tree.map(lambda x: x[:_CHECKED_SAMPLES], batch)
        return np.asarray(_losses_jit(loss_fn, params, head))


def check_finite_losses(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    num_samples: int,
    weights: Array | None = None,
) -> None:
    """The losses of the first samples are finite at w*, but for those of weight 0."""
    if not all(map(is_concrete, jax.tree.leaves((params, batch)))):
        return
    losses = first_losses(loss_fn, params, batch)
    finite = np.isfinite(losses)
    if weights is not None and is_concrete(weights):
        finite |= np.asarray(weights[: len(losses)]) == 0
    finite = finite.reshape(len(finite), -1).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)[:5].tolist()
        raise ValueError(
            f"loss_fn is not finite at params for {(~finite).sum()} of the first "
            f"{len(finite)} samples of data, such as samples {bad}"
        )


@partial(jax.jit, static_argnums=0)
def _losses_jit(loss_fn: LossFn, params: Params, batch: Batch) -> Losses:
    return losses_in_chunks(loss_fn, params, batch, 64)


def normalise_weights(
    weights: Array | np.ndarray | None, shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "samples *tokens"]:
    """ρ scaled to sum N, whatever scale and dtype it comes in."""
    if weights is None:
        return jnp.full(shape, shape[0] / math.prod(shape), dtype)
    kind = weights.dtype if hasattr(weights, "dtype") else np.asarray(weights).dtype
    if not any(jnp.issubdtype(kind, real) for real in (jnp.floating, jnp.integer, bool)):
        raise TypeError(f"weights must be real numbers, got {kind}")
    if np.shape(weights) != shape:
        raise ValueError(
            f"weights must have the shape of the losses, {list(shape)}, got "
            f"{list(np.shape(weights))}"
        )
    if is_concrete(weights) and not isinstance(weights, jax.Array):
        # Only ratios count: brought to largest 1 in their own precision, before they are narrowed.
        own = np.asarray(weights)
        own = own.astype(np.promote_types(own.dtype, np.float64) if own.dtype.isbuiltin else "f8")
        if not np.isfinite(own).all():
            raise ValueError("weights must be finite, got NaN or infinity among them")
        weights = own / (np.max(np.abs(own)) or 1.0)
        weights = jnp.asarray(weights, dtype)
    else:
        weights = jnp.asarray(weights)
        if not holds(lambda x: jnp.all(jnp.isfinite(x)), weights):
            raise ValueError("weights must be finite, got NaN or infinity among them")
        wide = jnp.promote_types(weights.dtype, dtype)
        weights = weights.astype(wide)
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(weights)))
        weights = (weights / jnp.where(largest > 0, largest, 1)).astype(dtype)
    total = jnp.sum(weights)
    if not holds(lambda x: jnp.sum(x) > 0, weights):
        raise ValueError(f"weights must have a positive sum, got {float(total):g}")
    return weights * (shape[0] / total)


def widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
