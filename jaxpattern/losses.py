"""Losses: evaluated in chunks, checked for shape and for finite values, and their weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array, Float, Shaped

from jaxpattern.types import Batch, Losses, LossFn, Params
from jaxpattern.validation import are_finite, batch_length, computed_now, holds, is_concrete

_CHECKED_SAMPLES = 1024
_AT_ONCE = 64


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
    return _at_the_door(loss_fn, params, batch)[0]


def check_finite_losses(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    num_samples: int,
    weights: Array | None = None,
    *,
    alone: bool = False,
) -> None:
    """The losses of the first samples are finite at w*, but for those of weight 0.

    With `alone` they do not depend on the other samples of a batch, nor on hidden random numbers.
    """
    if not all(map(is_concrete, jax.tree.leaves((params, batch)))):
        return
    losses, again = _at_the_door(loss_fn, params, batch)
    counted = np.ones(losses.shape, bool)
    if weights is not None and is_concrete(weights):
        counted = np.asarray(weights[: len(losses)]) != 0
    finite = (np.isfinite(losses) | ~counted).reshape(len(losses), -1).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)[:5].tolist()
        raise ValueError(
            f"loss_fn is not finite at params for {(~finite).sum()} of the first "
            f"{len(finite)} samples of data, such as samples {bad}"
        )
    if alone:
        _check_alone(loss_fn, params, batch, losses, again, counted)


def _at_the_door(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    with computed_now():
        head = jax.tree.map(lambda x: x[:_CHECKED_SAMPLES], batch)
        # Without weak types, for which all is compiled again.
        params = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params)
        losses, again = _losses_jit(loss_fn, params, head)
        return np.asarray(losses), np.asarray(again)


@partial(jax.jit, static_argnums=0)
def _losses_jit(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Losses, Array]:
    """The losses of a batch, and those of its first samples in other company, `[2, half]`."""
    losses = losses_in_chunks(loss_fn, params, batch, _AT_ONCE)
    again = jax.lax.map(
        lambda rows: widen(loss_fn(params, jax.tree.map(lambda x: x[rows], batch))),
        _other_company(batch),
    )
    return losses, again


def _other_company(batch: Batch) -> np.ndarray:
    """The first samples from the last to the first, dealt out to two batches of half the size."""
    number = min(batch_length("data", batch), _AT_ONCE)
    order = np.arange(number)[::-1].astype(np.int32)
    half = max(-(-number // 2), 2 if number == 1 else 1)
    return np.stack(
        [np.resize(part, half) for part in (order[::2], order[1::2])][: 1 + (number > 1)]
    )


def _check_alone(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    losses: np.ndarray,
    again: np.ndarray,
    counted: np.ndarray,
) -> None:
    """Samples have the same losses in both companies, up to half of the digits."""
    rows = _other_company(batch).reshape(-1)
    counted = counted[rows].reshape(len(rows), -1)
    one, other = (
        np.where(counted, x.reshape(len(rows), -1).astype(np.float64), 0.0)
        for x in (losses[rows], again)
    )
    size = np.maximum(np.abs(one), np.abs(one).sum() / max(counted.sum(), 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.where(one == other, 0.0, np.abs(one - other) / size).max(axis=1)
    if (apart <= np.finfo(losses.dtype).eps ** 0.5).all():
        return
    # Suspicion: only now is the precision looked up in which the loss computes inside.
    bad = ~(apart <= precision_of(loss_fn, params, batch) ** 0.5)
    if not bad.any():
        return
    worst = int(np.argmax(np.where(bad, apart, -1.0)))
    entry = int(np.argmax(np.abs(one - other)[worst]))
    raise ValueError(
        "loss_fn must give a sample the same loss whatever else is in its batch; evaluated twice "
        f"at params, in another order and company, {len(set(rows[bad].tolist()))} of the first "
        f"{len(set(rows.tolist()))} samples of data differ, such as samples "
        f"{sorted(set(rows[bad].tolist()))[:5]}: sample {rows[worst]} has {one[worst, entry]:.6g} "
        f"and {other[worst, entry]:.6g}. Likely causes: dropout left on (also with a fixed key), "
        "batch normalization that uses the batch's own statistics, experts with a capacity, "
        "negatives taken from the batch, or random numbers drawn inside; switch to the "
        "deterministic (evaluation) mode of the model"
    )


def precision_of(loss_fn: LossFn, params: Params, batch: Batch) -> float:
    """Relative spacing of the narrowest numbers that the loss computes with."""
    kinds: set[Any] = set()
    matmul = str(getattr(jax.config, "jax_default_matmul_precision", None))
    full = jax.default_backend() == "cpu" or matmul in ("highest", "float32")

    def look(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            kinds.update(v.aval.dtype for v in equation.outvars if hasattr(v.aval, "dtype"))
            product = equation.primitive.name in ("dot_general", "conv_general_dilated")
            exact = full or "HIGHEST" in str(equation.params.get("precision"))
            if product and not exact:  # by default of bfloat16 or TF32
                kinds.add(jnp.dtype(jnp.bfloat16))
            for inner in jaxprs_in_params(equation.params):
                look(inner)

    program = jax.make_jaxpr(loss_fn)(params, batch).jaxpr
    kinds.update(v.aval.dtype for v in program.invars if hasattr(v.aval, "dtype"))
    look(program)
    floats = [jnp.finfo(kind).eps for kind in kinds if jnp.issubdtype(kind, jnp.floating)]
    return float(max(floats, default=jnp.finfo(jnp.float32).eps))


def check_finite_gradient(loss_fn: LossFn, params: Params, batch: Batch, weights: Array) -> None:
    """Losses of weight 0 bring no NaN into the gradient at w*, as 0 · ∞ inside them would.

    Rows whose losses are all excluded are never evaluated (`counted_rows`); where a row holds both,
    what is excluded can be masked in its loss, and not in the gradient of what it shares.
    """
    if not all(map(is_concrete, jax.tree.leaves((params, batch, weights)))):
        return
    rho = np.asarray(weights)
    mixed = np.flatnonzero(is_counted(rho) & is_counted(rho == 0))
    bad = steep_samples(loss_fn, params, batch, weights, mixed)
    if len(bad):
        raise ValueError(
            f"the gradient of loss_fn at params is not finite for samples {bad[:5].tolist()} of "
            "data, although their excluded losses (weight 0) are left out: a derivative of what is "
            "excluded is infinite inside loss_fn, such as that of a square root at 0, and 0 · ∞ is "
            "NaN. Feed it safe values there: jnp.where(mask, x, 1.0) before the function, and "
            "jnp.where(mask, loss, 0.0) behind it"
        )


def steep_samples(
    loss_fn: LossFn, params: Params, batch: Batch, weights: Array, samples: np.ndarray
) -> np.ndarray:
    """Which of some samples, of as many as are looked at, have a gradient that is not finite."""
    samples = samples[:_CHECKED_SAMPLES]
    if not len(samples):
        return samples
    with computed_now():
        rows = np.resize(samples, min(_CHECKED_SAMPLES, len(weights))).astype(np.int32)
        finite = _finite_gradients(loss_fn, params, batch, weights, jax.device_put(rows))
    return samples[~np.asarray(finite)[: len(samples)]]


@partial(jax.jit, static_argnums=0)
def _finite_gradients(
    loss_fn: LossFn, params: Params, batch: Batch, weights: Array, rows: Array
) -> Array:
    """Whether the gradient of the weighted loss of each row is finite."""

    def one(row: Array) -> Array:
        sample, rho = jax.tree.map(lambda x: x[row][None], (batch, weights))
        gradient = jax.grad(lambda p: weighted_mean(widen(loss_fn(p, sample)), rho))(params)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)]
        return jnp.all(jnp.stack(finite))

    return jax.lax.map(one, rows)


def weighted_mean(losses: Losses, weights: Float[Array, "samples *tokens"]) -> Float[Array, ""]:
    """(1/B) Σ ρ ℓ of B samples, for ρ of mean 1; a loss of weight 0 may be anything, also NaN."""
    counted = jnp.where(weights == 0, 0, losses)
    return jnp.sum(weights * counted) / weights.shape[0]


@jax.jit
def counted_rows(batch: Batch, weights: Float[Array, "samples *tokens"]) -> Batch:
    """The batch with a sample that counts in place of each whose weights are all 0.

    Such a sample is never evaluated: the derivative of its loss may be NaN, and 0 · NaN is NaN.
    """
    used = is_counted(weights)
    first = jnp.argmax(used)

    def select(x: Array) -> Array:
        return jnp.where(used.reshape(-1, *(1,) * (x.ndim - 1)), x, x[first][None])

    return jax.tree.map(select, batch)


def first_counted(weights: Float[Array, "samples *tokens"]) -> Any:
    """The index of a sample that counts; by NumPy where it can, which compiles nothing."""
    if not is_concrete(weights):
        return jnp.argmax(is_counted(weights)).astype(jnp.int32)
    return jax.device_put(np.asarray(np.argmax(is_counted(np.asarray(weights))), np.int32))


def is_counted(weights: Shaped[Array | np.ndarray, "samples *tokens"]) -> Any:
    """Which samples have a loss of weight other than 0. By NumPy for what NumPy holds."""
    return (weights != 0).any(axis=tuple(range(1, weights.ndim)))


def check_weights(name: str, weights: Any, shape: tuple[int, ...] | None) -> Array | np.ndarray:
    """ρ as it comes (lists, masks, integers, any scale): real, finite, of the losses' shape.

    In at least float64 where it is known; JAX arrays stay what they are.
    """
    kind = weights.dtype if hasattr(weights, "dtype") else np.asarray(weights).dtype
    if not any(jnp.issubdtype(kind, real) for real in (jnp.floating, jnp.integer, bool)):
        raise TypeError(f"{name} must be real numbers, got {kind}")
    if shape is not None and np.shape(weights) != shape:
        raise ValueError(
            f"{name} must have the shape of the losses, {list(shape)}, got "
            f"{list(np.shape(weights))}"
        )
    if is_concrete(weights) and not isinstance(weights, jax.Array):
        own = np.asarray(weights)
        own = own.astype(np.promote_types(own.dtype, np.float64) if own.dtype.isbuiltin else "f8")
        if not np.isfinite(own).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity among them")
        return own
    weights = jnp.asarray(weights)
    if not holds(are_finite, weights):
        raise ValueError(f"{name} must be finite, got NaN or infinity among them")
    return weights


def normalise_weights(
    weights: Array | np.ndarray | list[Any] | None, shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "samples *tokens"]:
    """ρ scaled to sum N, whatever scale and dtype it comes in."""
    if weights is None:
        return jnp.full(shape, shape[0] / math.prod(shape), dtype)
    # Only ratios count: brought to largest 1 in their own precision, before they are narrowed.
    known = check_weights("weights", weights, shape)
    if isinstance(known, np.ndarray):
        known = known / (np.max(np.abs(known)) or 1.0)
    else:
        known = known.astype(jnp.promote_types(known.dtype, dtype))
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(known)))
        known = known / jnp.where(largest > 0, largest, 1)
    rho = jnp.asarray(known, dtype)
    total = jnp.sum(rho)
    if not holds(lambda x: x.sum() > 0, rho):
        raise ValueError(f"weights must have a positive sum, got {float(total):g}")
    return rho * (shape[0] / total)


def widen(x: Array) -> Array:
    """At least in float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
