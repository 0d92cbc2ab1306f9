"""What the examples that weight single samples say about scores and weights."""

from __future__ import annotations

import numpy as np
import scipy.stats


def area(score: np.ndarray, member: np.ndarray, other: np.ndarray | None = None) -> float:
    """The chance that a random member has a higher score than a random other (AUC).

    ½ for no relation, ties count half; of no members, or no others, nan. Others are all that are
    not members, if none are named.
    """
    other = ~member if other is None else other
    inside, outside = int(member.sum()), int(other.sum())
    if not inside or not outside:
        return float("nan")
    ranks = scipy.stats.rankdata(np.concatenate([score[member], score[other]]))
    return float((ranks[:inside].sum() - inside * (inside + 1) / 2) / (inside * outside))


def sample_share(weights: np.ndarray) -> float:
    """(Σρ)² / (N Σρ²), the effective sample size as a share of all."""
    weights = weights.astype(np.float64)
    return float(weights.mean() ** 2 / (weights**2).mean())
