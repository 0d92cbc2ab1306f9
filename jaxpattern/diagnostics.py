"""Statistics of chains: batch means, split R-hat, effective sample size."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpattern.validation import check_count, is_concrete


class Summary(NamedTuple):
    """Mean over all draws of the chains that did not diverge, with its error."""

    mean: Float[Array, ""]
    stderr: Float[Array, ""]
    rhat: Float[Array, ""]
    ess: Float[Array, ""]


def summarize(
    trace: Float[Array, "chains draws"],
    *,
    num_batches: int,
    alive: Bool[Array, " chains"] | None = None,
) -> Summary:
    """Mean, batch-means standard error, rank-normalised split R-hat and effective sample size.

    The standard error is s/√G, with s the standard deviation of the G = chains × `num_batches`
    batch means. Chains that are not `alive` are left out. R-hat needs four draws, and is NaN below.

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
        alive = jnp.ones(trace.shape[0], bool)
    if is_concrete(alive):
        trace, alive = trace[alive], alive[alive]
    return _summarize(trace, alive, num_batches)


@partial(jax.jit, static_argnames="num_batches")
def _summarize(trace: Array, alive: Array, num_batches: int) -> Summary:
    measure = import_blackjax().diagnostics
    means = batch_means(trace, num_batches)
    weight = jnp.broadcast_to(alive[:, None], means.shape)
    total = jnp.sum(weight)
    mean = jnp.sum(jnp.where(weight, means, 0.0)) / total
    squares = jnp.sum(jnp.where(weight, (means - mean) ** 2, 0.0))
    enough = trace.shape[0] > 0 and trace.shape[1] >= 4
    return Summary(
        mean=jnp.sum(jnp.where(alive[:, None], trace, 0.0)) / (alive.sum() * trace.shape[1]),
        stderr=jnp.sqrt(squares / (total - 1) / total),
        rhat=measure.rhat(trace) if enough else jnp.asarray(jnp.nan, trace.dtype),
        ess=jnp.asarray(measure.effective_sample_size(trace) if enough else jnp.nan, trace.dtype),
    )


def batch_means(
    trace: Float[Array, "chains draws"], num_batches: int
) -> Float[Array, "chains batches"]:
    """Means of `num_batches` consecutive pieces of each chain, their sizes as equal as can be."""
    draws = trace.shape[1]
    batch = batch_of(jnp.arange(draws), draws, num_batches)
    member = jax.nn.one_hot(batch, num_batches, dtype=trace.dtype)
    share = member / jnp.sum(member, axis=0, keepdims=True)
    return jnp.matmul(trace, share, precision="highest")


def batch_of(draw: Array, num_draws: int, num_batches: int) -> Array:
    """The batch that a draw belongs to."""
    return draw * num_batches // num_draws


def import_blackjax() -> Any:
    """blackjax, which computes when it is imported: not before it is used, nor within a trace.

    A backend of JAX that has started cannot be joined to other processes any more.
    """
    with jax.ensure_compile_time_eval():
        return importlib.import_module("blackjax")
