"""From the tokens whose coordinates were measured to many that were not: a ridge regression.

Measuring χ on every token of a training set costs as many chains as the set has parts. A coordinate
is often a simple function of what the model itself computes at the token, so it is fitted on the
measured tokens, on features such as residual states, and predicted on the rest. How well that
works is measured on whole sequences that the fit has not seen: tokens of one sequence share their
context, so a split by token would flatter it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jaxpattern.validation import check_count, check_key, check_number

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class CoordinateRegression(NamedTuple):
    """A linear function of features, and how well it does on sequences it has not seen.

    Attributes:
        intercept: value where all features are 0.
        coefficients: `[F]`, per unit of each feature.
        penalty: the τ that was chosen.
        fold_r2: R² of each penalty over the folds of the training sequences, which chose it, `[P]`.
        held_out_r2: R² = 1 − Σ q (c − ĉ)² / Σ q (c − c̄)² on the held-out sequences, c̄ the mean of
            the training sequences. It is bounded by what the noise of the coordinates leaves:
            1 − noise_variance / variance of their direction.
        held_out_stderr: its standard error, from the spread of the held-out sequences.
        held_out: which sequences those are, `[B]`.
    """

    intercept: Float[Array, ""]
    coefficients: Float[Array, " features"]
    penalty: float
    fold_r2: Float[np.ndarray, " penalties"]
    held_out_r2: float
    held_out_stderr: float
    held_out: Bool[np.ndarray, " B"]

    def predict(
        self, features: Float[Array | np.ndarray, "*tokens features"]
    ) -> Float[Array, "*tokens"]:
        """The coordinate of each token, ĉ = intercept + features · coefficients; can be jitted."""
        product = jnp.matmul(features, self.coefficients, precision=jax.lax.Precision.HIGHEST)
        return product + self.intercept


def regress_coordinates(
    key: Key[Array, ""],
    features: Float[Array | np.ndarray, "B T F"],
    coordinates: Float[Array | np.ndarray, "B T"],
    *,
    weights: Float[Array | np.ndarray, "B T"] | None = None,
    penalties: Sequence[float] = PENALTIES,
    held_out: float = 0.2,
    folds: int = 5,
) -> CoordinateRegression:
    """Ridge regression of coordinates on features of the tokens, with its held-out R².

        minimize over b:  Σ_z q_z (c_z − c̄ − Σ_f x_zf b_f)² + τ |b|²,   Σ q = 1

    with x the features, centered and divided by their standard deviations, so that τ is a share of
    a feature's variance. Some sequences are held out; the rest are divided into folds, also by
    sequence, that choose τ. The reported R² is that of the returned coefficients, which no
    held-out sequence has touched. The sums are done in float64 on the host.

    Args:
        key: typed key, which says which sequences are held out.
        features: `[B, T, F]`, such as residual states beside the embedding of the next token.
        coordinates: `[B, T]`, such as `directions.coordinates["code"][1]`.
        weights: q before it is normalized, `[B, T]`; 0 excludes, and an excluded entry may hold
            anything, NaN included.
        penalties: the τ to choose from.
        held_out: share of the sequences to hold out.
        folds: number of folds.

    Returns:
        A `CoordinateRegression`, whose `predict` takes features of any tokens.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: shapes do not fit, values that count are not finite, there are too few
            sequences, or the coordinates do not vary.
    """
    check_key(key)
    x, c, q = _check_data(features, coordinates, weights)
    if not penalties:
        raise ValueError("penalties is empty; give at least one")
    for value in penalties:
        check_number("penalties", value, minimum=0.0, exclusive=True)
    check_number("held_out", held_out, minimum=0.0, exclusive=True)
    check_count("folds", folds, minimum=2)
    sequences = np.flatnonzero(q.sum(axis=1) > 0)
    number = round(held_out * len(sequences))
    if number < 2 or len(sequences) - number < folds:
        raise ValueError(
            f"held_out must leave out at least 2 and keep at least folds = {folds} of the "
            f"{len(sequences)} sequences, got {held_out:g}"
        )
    shuffled = sequences[np.asarray(jax.random.permutation(key, len(sequences)))]
    tested, kept = shuffled[:number], shuffled[number:]

    def error(train: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
        """Squared errors of the fit and of the mean, of each test sequence."""
        intercept, b = _fit(x[train], c[train], q[train], penalty)
        mean = np.sum(q[train] * c[train]) / np.sum(q[train])
        residuals = (c[test] - intercept - x[test] @ b, c[test] - mean)
        return np.stack([np.sum(q[test] * residual**2, axis=1) for residual in residuals])

    parts = [kept[i::folds] for i in range(folds)]
    fold_r2 = np.zeros(len(penalties))
    for p, penalty in enumerate(penalties):
        errors = [error(np.setdiff1d(kept, part), part, penalty) for part in parts]
        fit, total = np.concatenate(errors, axis=1).sum(axis=1)
        if total == 0:
            raise ValueError("coordinates do not vary; there is nothing to fit")
        fold_r2[p] = 1 - fit / total
    penalty = float(penalties[int(np.argmax(fold_r2))])
    intercept, b = _fit(x[kept], c[kept], q[kept], penalty)
    fit, total = error(kept, tested, penalty)
    ratio = fit.sum() / total.sum()
    spread = np.sum((fit - ratio * total) ** 2) * number / (number - 1)
    return CoordinateRegression(
        intercept=jnp.asarray(intercept, jnp.float32),
        coefficients=jnp.asarray(b, jnp.float32),
        penalty=penalty,
        fold_r2=fold_r2,
        held_out_r2=float(1 - ratio),
        held_out_stderr=float(np.sqrt(spread) / total.sum()),
        held_out=np.isin(np.arange(len(c)), tested),
    )


def _fit(x: np.ndarray, c: np.ndarray, q: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
    """Intercept and coefficients of the features as they come."""
    x, c, q = x.reshape(-1, x.shape[-1]), c.reshape(-1), q.reshape(-1) / q.sum()
    center, mean = q @ x, q @ c
    x = x - center
    scale = np.sqrt(q @ x**2)
    x = x / np.where(scale > 0, scale, 1)
    gram = (x * q[:, None]).T @ x + penalty * np.eye(len(scale))
    b = np.linalg.solve(gram, x.T @ (q * (c - mean))) / np.where(scale > 0, scale, 1)
    return float(mean - center @ b), b


def _check_data(
    features: Any, coordinates: Any, weights: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, coordinates and weights in float64, 0 where the weight is."""
    x, c = np.asarray(features, np.float64), np.asarray(coordinates, np.float64)
    if x.ndim != 3 or x.shape[:2] != c.shape:
        raise ValueError(
            f"features must be [B, T, F] and coordinates [B, T], got shapes {list(x.shape)} "
            f"and {list(c.shape)}"
        )
    q = np.ones(c.shape) if weights is None else np.asarray(weights, np.float64)
    if q.shape != c.shape or not (np.isfinite(q) & (q >= 0)).all():
        raise ValueError(
            f"weights must be [B, T] = {list(c.shape)}, finite and not negative, "
            f"got shape {list(q.shape)}"
        )
    counted = q > 0
    if not np.isfinite(c[counted]).all() or not np.isfinite(x[counted]).all():
        raise ValueError("features and coordinates must be finite where the weight is not 0")
    return np.where(counted[..., None], x, 0), np.where(counted, c, 0), q
