"""What devinterp 2.0.1 measures and stores, its formula of χ, and the same through our moments."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import measure
from jaxpattern import moments

ORDER_SEED = 1337


class Theirs(NamedTuple):
    """What devinterp returns and what it stored: χ [heads, B, T] and one tree a restriction."""

    chi: np.ndarray
    trees: dict[str, Any]
    written: int


def without_progress() -> None:
    """devinterp draws a progress bar a chain, which no argument turns off."""
    from devinterp.slt import sampler

    sampler.trange = functools.partial(sampler.trange, disable=True)


class Windows:
    """Windows of tokens, as devinterp takes a data set."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index]}


def probe_order(count: int) -> list[int]:
    """The order in which devinterp keeps the windows of an observable."""
    return random.Random(ORDER_SEED).sample(range(count), count)


def published_hybrid(
    phi: np.ndarray, reference: np.ndarray, probes: np.ndarray, full: np.ndarray
) -> np.ndarray:
    """χ of devinterp's formula, in the precision of its arguments.

    E[φ L] − E[φ ℓ_z] − E[φ] E_full[L − ℓ_z] of draws φ, L [n], ℓ [n, *columns] of a component, and
    `full`, the mean of L − ℓ_z over draws of all weights.
    """
    axes = (slice(None), *(None,) * (probes.ndim - 1))
    return (phi * reference).mean() - (phi[axes] * probes).mean(0) - phi.mean() * full


def hybrid_from_moments(
    phi: np.ndarray, reference: np.ndarray, probes: np.ndarray, full: np.ndarray
) -> jax.Array:
    """The same χ through our streamed moments: −(Cov[φ, D] + E[φ] (E[D] − E_full[D]))."""
    shape = (slice(None), *(None,) * (probes.ndim - 1))
    deviations = jnp.asarray(probes - reference[shape])

    @jax.jit
    def stream(phi: jax.Array, deviations: jax.Array) -> moments.Moments:
        empty = moments.init(phi[0, None], deviations[0])
        return jax.lax.fori_loop(
            0, len(phi), lambda t, m: moments.update(m, phi[t, None], deviations[t]), empty
        )

    m = stream(jnp.asarray(phi), deviations)
    return -(m.comoment[0] / m.weight + m.mean_a[0] * (m.mean_b + jnp.asarray(full)))


def stored(tree: Any, draws: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """φ, L [n] and ℓ [n, B, T] of the draws of all chains that devinterp stored."""
    data = tree.dataset
    reference = data["loss_train"].values[:, :draws].mean(axis=(-2, -1)).reshape(-1)
    probes = data["loss_probes"].values[:, :draws]
    return (
        reference - data["init_loss"].values.mean(),
        reference,
        probes.reshape(-1, *probes.shape[2:]),
    )


def truncated(trees: dict[str, Any], heads: Sequence[str], draws: int) -> np.ndarray:
    """devinterp's χ from the first draws of every chain, in float64."""
    _, full_reference, full_probes = stored(trees["full"], draws)
    full = full_reference.astype(float).mean() - full_probes.astype(float).mean(0)
    return np.stack(
        [
            published_hybrid(*(x.astype(float) for x in stored(trees[head], draws)), full)
            for head in heads
        ]
    )


def covariance_of(trees: dict[str, Any], heads: Sequence[str]) -> np.ndarray:
    """−Cov[φ, ℓ_z − L] of the draws that devinterp stored, in float64."""
    chi = []
    for head in heads:
        phi, reference, probes = (x.astype(float) for x in stored(trees[head]))
        deviations = probes - reference[:, None, None]
        product = np.tensordot(phi - phi.mean(), deviations - deviations.mean(0), 1)
        chi.append(-product / (len(phi) - 1))
    return np.stack(chi)


def check_hybrid(report: measure.Report, theirs: Theirs, heads: Sequence[str]) -> None:
    """(c): our moments on devinterp's stored losses."""
    order = np.argsort(probe_order(theirs.chi.shape[1]))
    exact = truncated(theirs.trees, heads, theirs.trees["full"].dataset.sizes["draw"])[:, order]
    _, reference, probes = stored(theirs.trees["full"])
    full = (reference.astype(float).mean() - probes.astype(float).mean(0)).astype(np.float32)
    ours = np.stack(
        [np.asarray(hybrid_from_moments(*stored(theirs.trees[h]), full))[order] for h in heads]
    )
    size = float(np.abs(exact).max())
    errors = {
        "ours": float(np.abs(ours - exact).max()),
        "theirs": float(np.abs(theirs.chi - exact).max()),
    }
    report.add(
        f"hybrid form on identical draws, |χ| <= {size:.1e}: ours is off the float64 value by "
        f"{errors['ours']:.1e}, devinterp (float32) by {errors['theirs']:.1e}",
        part="hybrid", size=size, **errors,
    )  # fmt: skip
    # A float32 mean of losses of about 5 nats times φ.
    rounding = 8 * float(np.finfo(np.float32).eps) * float(np.abs(probes).max())
    report.claim(
        f"hybrid form equals devinterp's to rounding: {errors} <= {rounding:.1e}",
        max(errors.values()) <= rounding,
    )
