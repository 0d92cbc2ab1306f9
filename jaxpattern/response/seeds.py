"""From the derivatives of single training runs to χ: means, errors over seeds, and health."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
    xp = np if is_concrete(found.phi) else jnp
    phi, slope = xp.asarray(found.phi), xp.asarray(found.slope)
    seeds = len(phi)
    ended = xp.isfinite(phi).all(axis=1)
    finite = xp.isfinite(slope.reshape(seeds, -1)).all(axis=1)
    if not is_concrete(found.phi):
        return ended & finite
    if not ended.any():
        names = [row for k, row in enumerate(rows) if not np.isfinite(phi[:, k]).any()]
        raise DivergenceError(
            f"observables {names} are not finite at the end of the run in any of {seeds} seeds"
        )
    if found.norms is None:
        if not (ended & finite).any():
            raise DivergenceError(
                f"in all of {seeds} seeds a run with more or less weight on a source has no finite "
                "observables at its end; take a smaller width"
            )
        return jax.device_put(ended & finite)
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
    return jax.device_put(ended & finite)


class OverSeeds(NamedTuple):
    """All that a response holds of its seeds; fields as there."""

    estimates: Estimates
    mass: dict[str, Array]
    mean: Float[Array, " rows"]
    mean_stderr: Float[Array, " rows"]
    rhat: Float[Array, " rows"]
    diverged: Bool[Array, "rows seeds"]


@partial(jax.jit, static_argnames="grouped")
def over_seeds(
    found: Derivative,
    alive: Bool[Array, " seeds"],
    rho: Float[Array, "samples *tokens"],
    places: dict[str, Int[Array, " rows"]],
    order: dict[str, Int[Array, ""]],
    *,
    grouped: bool,
) -> OverSeeds:
    """χ of each source from its seeds, each a batch of its own.

    Args:
        found: what the seeds gave.
        alive: which of them count.
        rho: weights of the run.
        places: source → its samples.
        order: source → its column, where a column is a source.
        grouped: whether it is.
    """

    def zeroed(x: Array) -> Array:
        return jnp.where(alive.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)

    total = jnp.sum(jnp.stack([jnp.sum(rho[index]) for index in places.values()]))
    mass = {name: rho[index] / total for name, index in places.items()}
    if grouped:
        mass = {name: jnp.sum(share) for name, share in mass.items()}
    slope, sums, batches = zeroed(found.slope), {}, {}
    for name, index in places.items():
        mine = slope[:, :, order[name]] if grouped else slope[:, :, index]
        # χ_j = (1/q_j) dφ/dρ_j, and of the whole source (1/Σq) Σ_j dφ/dρ_j.
        share = mass[name]
        scale = jnp.where(share > 0, 1 / jnp.where(share > 0, share, 1.0), 0.0)
        sums[name] = (mine * scale.reshape(1, 1, *scale.shape))[:, None]
        whole = jnp.sum(mine.reshape(*mine.shape[:2], -1), axis=2) / jnp.sum(share)
        batches[name] = jnp.where(alive[:, None], whole, jnp.nan)
    estimates = batch_estimates(sums, jnp.ones((len(alive), 1), slope.dtype), alive)
    number = jnp.sum(alive)
    phi = zeroed(found.phi)
    mean = jnp.sum(phi, axis=0) / number
    squares = jnp.sum(zeroed((phi - mean[None]) ** 2), axis=0)
    zero, health = jnp.zeros_like(mean), {}
    if found.norms is not None:
        growth = jax.vmap(_growth)(found.norms)
        least = jnp.min(jnp.where(alive[:, None], growth.horizon, jnp.inf), axis=0)
        health = {
            "growth": zero + jnp.max(zeroed(growth.growth), axis=0).astype(zero.dtype),
            "horizon": zero + least.astype(zero.dtype),
        }
    health |= {
        "skipped": zero + jnp.sum(found.skipped).astype(zero.dtype),
        "groups": zero + number.astype(zero.dtype),
    }
    return OverSeeds(
        estimates=estimates._replace(batches=batches, diagnostics=health),
        mass=mass,
        mean=mean,
        mean_stderr=jnp.sqrt(squares / (number * (number - 1))),
        rhat=jnp.full_like(mean, jnp.nan),
        diverged=jnp.broadcast_to(~alive, (len(mean), len(alive))),
    )
