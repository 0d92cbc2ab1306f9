"""What a response predicts of any weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpattern.inversion.flat import Measured, flatten, measured_of, normalized
from jaxpattern.response.columns import Columns
from jaxpattern.response.result import Response
from jaxpattern.validation import check_names


class Shift(NamedTuple):
    """A predicted change of ⟨φ⟩, in units of φ, and its standard error."""

    value: Float[Array, ""]
    stderr: Float[Array, ""]

    def __repr__(self) -> str:
        error = float(self.stderr)
        return f"{float(self.value):+.4g}" + ("" if np.isnan(error) else f" ± {error:.2g}")


def predict(response: Response, weights: Mapping[str, Any]) -> dict[str, Shift]:
    """The shift of each row under given weights, dμ = nβ Σ_j χ_j q_j (ρ_j − 1), to first order.

    Of the posterior for a response of `susceptibilities`, of the training run for one of
    `training_response`. Weights are divided by their mean Σ_j q_j ρ_j, as the loss does.

    Args:
        response: χ with its errors, ungrouped or from `group_mean`.
        weights: probe set → ρ, a number or one for each of its columns; `solution.weights` of the
            same columns fits.

    Returns:
        Row → `Shift`. The error is that of χ at these weights, from its groups of draws or seeds
        where the response is grouped, from two halves otherwise, NaN for a single seed; for
        weights that were fitted to the same χ it is too small, see
        `Intervention.cross_fitted_shift`.

    Raises:
        ValueError: a probe set is missing or unknown, or its weights have another shape.
    """
    columns = response.columns
    check_names("weights", weights, columns.names)
    rho = {}
    for name, shape in zip(columns.names, columns.shapes, strict=True):
        given = np.shape(weights[name])
        if given not in ((), shape):
            raise ValueError(
                f"weights[{name!r}] must be a number or have the shape {shape} of its columns, "
                f"got {given}"
            )
        rho[name] = jnp.broadcast_to(jnp.asarray(weights[name], jnp.float32), shape)
    value, stderr = _predict(measured_of(response), rho, columns=columns)
    return {row: Shift(value[k], stderr[k]) for k, row in enumerate(response.rows)}


@partial(jax.jit, static_argnames="columns")
def _predict(
    measured: Measured, weights: dict[str, Array], *, columns: Columns
) -> tuple[Array, Array]:
    rows = flatten(measured, columns)
    change, _ = normalized(columns.join(weights) - 1, rows.mass)
    return rows.predict(change), rows.stderr(change)
