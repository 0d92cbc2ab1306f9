"""From the derivatives of single training runs to χ: means, errors over seeds, and health."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxpattern.chains.divergence import DivergenceError
from jaxpattern.response.measure import Estimates, batch_estimates
from jaxpattern.response.trajectory import Derivative
from jaxpattern.validation import is_concrete
from jaxpattern.verdict import GROWTH

_BLOCKS = 16
_OVERFLOW = 1e12


class _Growth(NamedTuple):
    growth: Float[Array, " perturbations"]
    horizon: Float[Array, " perturbations"]


def _growth(norms: Float[Array, "perturbations steps"]) -> _Growth:
    """max_t ‖δ_t‖ / min_{s≤t} ‖δ_s‖, where the least is over the largest of whole blocks of steps.

    A momentum swings through 0, which is no contraction: hence blocks.
    """
    steps = norms.shape[1]
    size = max(1, -(-steps // _BLOCKS))
    padded = jnp.pad(norms, ((0, 0), (0, -steps % size)), mode="edge")
    blocks = padded.reshape(norms.shape[0], -1, size).max(axis=2)
    least = jax.lax.cummin(jnp.minimum(blocks, norms[:, :1]), axis=1)
    base = jnp.repeat(least, size, axis=1)[:, :steps]
    floor = jnp.maximum(1e-30 * norms[:, :1], jnp.finfo(norms.dtype).tiny)
    ratio = norms / jnp.maximum(base, floor)
    ratio = jnp.where(jnp.isnan(ratio), jnp.inf, ratio)
    past = ratio > GROWTH
    horizon = jnp.where(past.any(axis=1), jnp.argmax(past, axis=1), steps - 1)
    return _Growth(jnp.max(ratio, axis=1), horizon.astype(norms.dtype))


def check_ends(found: Derivative, rows: tuple[str, ...]) -> Bool[Array, " seeds"]:
    """Which seeds count.

    Raises:
        DivergenceError: none ended with finite observables and a derivative within range.
        ValueError: one did, but has no finite derivative, and not for growth.
    """
    seeds = found.phi.shape[0]
    ended: Any = jnp.all(jnp.isfinite(found.phi), axis=1)
    finite: Any = jnp.all(jnp.isfinite(found.slope.reshape(seeds, -1)), axis=1)
    if not is_concrete(found.phi):
        return ended & finite
    ended, finite = np.asarray(ended), np.asarray(finite)
    if not ended.any():
        names = [row for k, row in enumerate(rows) if not np.isfinite(found.phi[:, k]).any()]
        raise DivergenceError(
            f"observables {names} are not finite at the end of the run in any of {seeds} seeds"
        )
    norms, broken = np.asarray(found.norms), np.asarray(found.broken)
    for s in np.flatnonzero(ended & ~finite):
        known = norms[s, :, : broken[s] + 1 if broken[s] >= 0 else None]
        if not np.isfinite(known[:, 0]).all() or broken[s] < 0:
            raise ValueError(
                "observables must have a finite derivative at the end of the run; one of "
                f"{list(rows)} has none"
            )
        if not known.max() > _OVERFLOW * known[:, 0].max():
            raise ValueError(
                f"the derivative is not finite after {int(broken[s])} steps of seed {s}, although "
                "the run is: optimizer divides by something that is 0, or loss_fn has no second "
                "derivative there. Adam and its like need eps_root, such as "
                "optax.adamw(..., eps_root=1e-10), where their root is out of reach"
            )
    if not (ended & finite).any():
        raise DivergenceError(
            f"the derivative grew out of range in all of {seeds} seeds, after "
            f"{broken.tolist()} steps: the run is chaotic, and its end has no response to speak of"
        )
    return jnp.asarray(ended & finite)


@partial(jax.jit, static_argnames="grouped")
def estimate(
    found: Derivative,
    alive: Bool[Array, " seeds"],
    mass: dict[str, Array],
    places: dict[str, Array],
    *,
    grouped: bool,
) -> tuple[Estimates, dict[str, Array]]:
    """χ of each source from its seeds, each a batch of its own."""

    def zeroed(x: Array) -> Array:
        return jnp.where(alive.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)

    slope, sums, batches = zeroed(found.slope), {}, {}
    for name, index in places.items():
        mine = slope[:, :, index] if not grouped else slope[:, :, index[0]]
        share = mass[name]
        scale = jnp.where(share > 0, 1 / jnp.where(share > 0, share, 1.0), 0.0)
        sums[name] = (mine * scale.reshape(1, 1, *scale.shape))[:, None]
        total = jnp.sum(mine.reshape(*mine.shape[:2], -1), axis=2) / jnp.sum(share)
        batches[name] = jnp.where(alive[:, None], total, jnp.nan)
    estimates = batch_estimates(sums, jnp.ones((len(alive), 1), slope.dtype), alive)
    number = jnp.sum(alive)
    phi = zeroed(found.phi)
    mean = jnp.sum(phi, axis=0) / number
    squares = jnp.sum(zeroed((phi - mean[None]) ** 2), axis=0)
    growth = jax.vmap(_growth)(found.norms)
    rows = jnp.zeros_like(mean)
    health = {
        "growth": rows + jnp.max(zeroed(growth.growth), axis=0),
        "horizon": rows
        + jnp.min(jnp.where(alive[:, None], growth.horizon, jnp.inf), axis=0).astype(rows.dtype),
        "skipped": rows + jnp.sum(found.skipped).astype(rows.dtype),
        "groups": rows + number.astype(rows.dtype),
    }
    summary = {"mean": mean, "stderr": jnp.sqrt(squares / (number * (number - 1)))}
    return estimates._replace(batches=batches, diagnostics=health), summary
