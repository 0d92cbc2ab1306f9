"""Statistics of chains: batch means, rank-normalized split R-hat, bulk effective sample size.

Concrete traces are summarized by NumPy in float64, which compiles nothing; traces under `jit`,
`vmap` or `grad` by the same formulas in JAX.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float

from jaxpattern.validation import check_count, is_concrete


class Summary(NamedTuple):
    """Mean over all draws of the chains that did not diverge, with its error."""

    mean: Float[Array, ""]
    stderr: Float[Array, ""]
    rhat: Float[Array, ""]
    ess: Float[Array, ""]


def summarize(
    trace: Float[Array | np.ndarray, "chains draws"],
    *,
    num_batches: int,
    alive: Bool[Array | np.ndarray, " chains"] | None = None,
) -> Summary:
    """Mean, batch-means standard error, rank-normalized split R-hat and bulk sample size.

    The standard error is s/√G, with s the standard deviation of the G = chains × `num_batches`
    means of consecutive draws. Chains that are not `alive` are left out. R-hat and the effective
    sample size need four draws, and are NaN below, and for chains that do not move.

    Raises:
        ValueError: the trace is not `[chains, draws]`, or has fewer draws than batches.

    References:
        Vehtari et al. 2021; Geyer 1992.
    """
    if jnp.ndim(trace) != 2:
        raise ValueError(f"trace must be [chains, draws], got shape {list(jnp.shape(trace))}")
    check_count("num_batches", num_batches, minimum=1)
    if num_batches > trace.shape[1]:
        raise ValueError(f"num_batches must be at most {trace.shape[1]} draws, got {num_batches}")
    if alive is None:
        alive = np.ones(trace.shape[0], bool)
    dtype = jnp.result_type(trace)
    if is_concrete(trace) and is_concrete(alive):
        living = np.asarray(trace)[np.asarray(alive)].astype(np.float64)
        with np.errstate(all="ignore"):
            summary = _summarize(np, living, np.ones(len(living), bool), num_batches)
        # The result is of the dtype of the trace (a float64 trace stays one under x64 only).
        return Summary(*(jax.device_put(np.asarray(x, dtype)) for x in summary))
    return Summary(
        *(jnp.asarray(x, dtype) for x in _summarize(jnp, trace, jnp.asarray(alive), num_batches))
    )


def numbers_of(tree: Any) -> Any:
    """Arrays as NumPy arrays where all can be looked at, so that nothing is compiled for them."""
    if all(map(is_concrete, jax.tree.leaves(tree))):
        return jax.tree.map(np.asarray, tree)
    return tree


def on_device(x: Any) -> Array:
    """NumPy arrays as arrays of JAX, without a program of their own."""
    return jax.device_put(x) if isinstance(x, np.ndarray | np.generic) else x


def _summarize(xp: Any, trace: Any, alive: Any, num_batches: int) -> Summary:
    means = batch_means(trace, num_batches)
    weight = xp.broadcast_to(alive[:, None], means.shape)
    total = xp.sum(weight)
    mean = xp.sum(xp.where(weight, means, 0.0)) / total
    squares = xp.sum(xp.where(weight, (means - mean) ** 2, 0.0))
    enough = trace.shape[0] > 0 and trace.shape[1] >= 4
    nan = xp.asarray(xp.nan, trace.dtype)
    return Summary(
        mean=xp.sum(xp.where(alive[:, None], trace, 0.0)) / (alive.sum() * trace.shape[1]),
        stderr=xp.sqrt(squares / (total - 1) / total),
        rhat=_rhat(xp, trace) if enough else nan,
        ess=_bulk_ess(xp, trace) if enough else nan,
    )


def batch_means(trace: Any, num_batches: int) -> Any:
    """Means of `num_batches` consecutive pieces of each chain, their sizes as equal as can be."""
    xp = np if isinstance(trace, np.ndarray) else jnp
    draws = trace.shape[1]
    member = np.arange(num_batches) == batch_of(np.arange(draws), draws, num_batches)[:, None]
    share = (member / member.sum(axis=0, keepdims=True)).astype(trace.dtype)
    if xp is np:
        return trace @ share
    return jnp.matmul(trace, share, precision="highest")


def batch_of(draw: Any, num_draws: int, num_batches: int) -> Any:
    """The group that a draw belongs to."""
    return draw * num_batches // num_draws


def _split(trace: Any) -> Any:
    """Each chain as two; an odd draw in the middle belongs to neither."""
    half = trace.shape[1] // 2
    xp = np if isinstance(trace, np.ndarray) else jnp
    return xp.concatenate([trace[:, :half], trace[:, -half:]])


def _normal_scores(xp: Any, x: Any) -> Any:
    """Φ⁻¹ of the ranks, ties at their mean rank (Vehtari et al. 2021, eq. 14)."""
    flat = x.reshape(-1)
    ordered = xp.sort(flat)
    low = xp.searchsorted(ordered, flat, side="left")
    high = xp.searchsorted(ordered, flat, side="right")
    rank = (low + high + 1) / 2
    inverse = scipy.special.ndtri if xp is np else jax.scipy.special.ndtri
    return inverse((rank - 0.375) / (flat.size + 0.25)).reshape(x.shape).astype(x.dtype)


def _rhat(xp: Any, trace: Any) -> Any:
    """The larger R-hat of normal scores and of those of |x − median| (eq. 15)."""
    halves = _split(trace)
    folded = xp.abs(halves - xp.median(halves))
    values = [_potential(xp, _normal_scores(xp, x)) for x in (halves, folded)]
    return xp.where(_moves(xp, trace), xp.maximum(*values), xp.nan)


def _potential(xp: Any, x: Any) -> Any:
    """√((n−1)/n + B/(nW)) with B/n the variance of chain means, W the mean of their variances."""
    within = xp.mean(xp.var(x, axis=1, ddof=1))
    between = xp.var(xp.mean(x, axis=1), ddof=1)
    draws = x.shape[1]
    return xp.sqrt((draws - 1) / draws + between / xp.where(within > 0, within, xp.nan))


def _moves(xp: Any, trace: Any) -> Any:
    return (xp.max(trace) > xp.min(trace)) & xp.all(xp.isfinite(trace))


def _bulk_ess(xp: Any, trace: Any) -> Any:
    """Effective sample size of split, rank-normalized chains (Vehtari et al. 2021, eq. 10–13).

    Geyer's initial positive and monotone sequences on pairs of autocorrelations.
    """
    x = _normal_scores(xp, _split(trace))
    chains, draws = x.shape
    # Autocovariances, divided by n at every lag, by FFT.
    centered = x - xp.mean(x, axis=1, keepdims=True)
    length = 1 << (2 * draws - 1).bit_length()
    spectrum = xp.fft.rfft(centered, n=length, axis=1)
    power = xp.real(spectrum * xp.conj(spectrum))
    autocovariance = xp.fft.irfft(power, n=length, axis=1)[:, :draws] / draws
    mean = xp.mean(autocovariance, axis=0)
    within = mean[0] * draws / (draws - 1)
    total = within * (draws - 1) / draws + xp.var(xp.mean(x, axis=1), ddof=1)
    rho = 1 - (within - mean) / xp.where(total > 0, total, xp.nan)
    rho = xp.concatenate([xp.ones_like(rho[:1]), rho[1:]])
    # Pairs ρ_{2k} + ρ_{2k+1}, in front of the first that is not positive, made monotone; of that
    # one (or the last) the even ρ alone, where it is positive.
    pairs = max(1, -(-(draws - 2) // 2))
    even, odd = rho[: 2 * pairs : 2], rho[1 : 2 * pairs : 2]
    sums, index = even + odd, np.arange(pairs)
    end = xp.min(xp.where(sums <= 0, index, pairs - 1))
    monotone = xp.where(index < end, _running_minimum(xp, sums), 0.0)
    rest = xp.where((even[end] > 0) | (sums[end] >= 0), even[end], 0.0)
    tau = -1 + 2 * xp.sum(monotone) + rest
    size = chains * draws
    tau = xp.maximum(tau, 1 / np.log10(size))
    return xp.where(_moves(xp, trace), size / tau, xp.nan)


def _running_minimum(xp: Any, x: Any) -> Any:
    return np.minimum.accumulate(x) if xp is np else jax.lax.cummin(x)
