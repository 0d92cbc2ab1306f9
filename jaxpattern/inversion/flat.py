"""χ as one matrix over all columns, in the form that weights act on: nβ (χ − Σ_j q_j χ_j)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpattern.response.columns import Columns
from jaxpattern.response.result import Response
from jaxpattern.response.shares import mean_stderr

_HIGHEST = jax.lax.Precision.HIGHEST


class Measured(NamedTuple):
    """What is known of χ, by probe set as in `Response`."""

    chi: dict[str, Array]
    stderr: dict[str, Array]
    halves: dict[str, Array] | None
    batches: dict[str, Array] | None
    mass: dict[str, Array]
    nbeta: Array


class Rows(NamedTuple):
    """χ flat and projected: A = nβ (χ − Σ_j q_j χ_j), with the halves and batches of the draws."""

    matrix: Array
    halves: Array | None
    batches: Array | None
    mass: Array
    noise: Array

    def predict(self, change: Array) -> Array:
        """dμ = Σ_j q_j A_j s_j of every row."""
        return product(self.matrix, self.mass * change)

    def stderr(self, change: Array) -> Array:
        """Its standard error at fixed weights, from the batches, or from the two halves."""
        if self.batches is not None:
            return mean_stderr(product(self.batches, self.mass * change))
        if self.halves is None:
            return jnp.full(self.matrix.shape[0], jnp.nan, self.matrix.dtype)
        first, second = product(self.halves, self.mass * change)
        return jnp.abs(first - second) / 2


def flatten(measured: Measured, columns: Columns) -> Rows:
    """All columns side by side, projected on weights of mean 1."""
    nbeta = measured.nbeta
    mass = columns.join(measured.mass).astype(nbeta.dtype)
    mass = mass / jnp.sum(mass)

    def project(values: dict[str, Array] | None) -> Array | None:
        """nβ χ less its mean Σ_j q_j χ_j; 0 in columns that do not count."""
        if values is None:
            return None
        flat = columns.join(values).astype(nbeta.dtype)
        used = jnp.broadcast_to(mass > 0, flat.shape)
        flat = jnp.where(used, flat, 0.0)
        # Twice, as the mean of a row far from zero rounds.
        for _ in range(2):
            flat = flat - product(flat, mass)[..., None]
        return nbeta * jnp.where(used, flat, 0.0)

    matrix = project(measured.chi)
    assert matrix is not None
    errors = jnp.where(mass[None] > 0, nbeta * columns.join(measured.stderr), 0.0)
    noise = product(errors.astype(nbeta.dtype) ** 2, mass)
    return Rows(matrix, project(measured.halves), project(measured.batches), mass, noise)


def product(values: Array, vector: Array) -> Array:
    """Σ_j values_…j vector_j."""
    return jnp.matmul(values, vector, precision=_HIGHEST)


def normalized(change: Array, mass: Array) -> tuple[Array, Array]:
    """s of (1 + s) / Σ_j q_j (1 + s_j), the same weights for a self-normalized loss, and that mean.

    Methods whose weights have mean 1 are changed by rounding only. Weights whose mean is not
    positive cannot be trained on: NaN.
    """
    excess = jnp.sum(mass * change)
    mean = jnp.where(1 + excess > 0, 1 + excess, jnp.nan)
    return (change - excess) / mean, mean


def _two_halves(response: Response) -> bool:
    """Whether χ of two halves of the draws is there for every probe set."""
    halves = response.halves
    return all(name in halves and len(halves[name]) == 2 for name in response.chi)


def measured_of(response: Response) -> Measured:
    """What a response says, in at least float32."""
    columns = response.columns
    dtype = jnp.promote_types(jnp.result_type(*response.chi.values()), jnp.float32)
    grouped = columns.grouped and set(response.batches) == set(columns.names)
    return Measured(
        chi=response.chi,
        stderr=response.stderr,
        halves=response.halves if _two_halves(response) else None,
        batches=response.batches if grouped else None,
        mass=response.mass,
        nbeta=jnp.asarray(response.nbeta, dtype),
    )
