"""The response matrix as it is returned: χ, its error, and what is needed to trust both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxpattern.validation import check_names, is_concrete


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Response:
    """The response matrix χ ∈ R^{K×N}, with errors; columns are kept by probe set.

    A column is one loss of a probe set, so `chi[name]` has shape `[K, *losses.shape]`; after
    `group_mean` a column is a whole probe set and `chi[name]` has shape `[K]`.

    Attributes:
        rows: names of the K rows: the observable, the component, or `component/observable`.
        chi: probe set → χ, in units of observable times loss. Holds no factor nβ.
        stderr: probe set → standard error of χ, same shape.
        halves: probe set → χ from two disjoint halves of the draws, `[2, K, ...]`.
        batches: probe set → estimates of the probe set's mean χ from the G batches of draws,
            `[G, K]`, NaN for batches of diverged chains. Their spread is the standard error of a
            group mean.
        mass: probe set → share q of the data that a column stands for. Sums to 1 over all
            columns: a change of the weights ρ shifts μ by nβ Σ_j χ_j q_j (ρ_j − 1).
        nbeta: inverse temperature of the posterior.
        mean: ⟨φ⟩ of each row, `[K]`.
        mean_stderr: its standard error, `[K]`.
        rhat: rank-normalised split R-hat of each row's observable, `[K]`.
        ess: effective sample size of each row's observable, over all chains, `[K]`.
        diverged: which chains were lost, `[K, chains]`; they count in no estimate.
        estimator: which estimator, with the settings it chose.
        diagnostics: what an estimator says about itself, arrays with a leading row axis.
        cost: gradient equivalents spent (one forward and backward pass of one sample).
        num_samples: number of columns before any grouping.
    """

    # What vmap returns is a stack of responses, with leading axes everywhere.
    chi: dict[str, Float[Array, "..."]]
    stderr: dict[str, Float[Array, "..."]]
    halves: dict[str, Float[Array, "..."]]
    batches: dict[str, Float[Array, "*stack batches rows"]]
    mass: dict[str, Float[Array, "..."]]
    nbeta: Float[Array, "*stack"]
    mean: Float[Array, "*stack rows"]
    mean_stderr: Float[Array, "*stack rows"]
    rhat: Float[Array, "*stack rows"]
    ess: Float[Array, "*stack rows"]
    diverged: Bool[Array, "*stack rows chains"]
    rows: tuple[str, ...] = field(metadata={"static": True})
    cost: float = field(metadata={"static": True})
    num_samples: int = field(metadata={"static": True})
    estimator: str = field(default="", metadata={"static": True})
    diagnostics: dict[str, Shaped[Array, "..."]] = field(default_factory=dict)


def group_mean(response: Response, shares: Mapping[str, float] | None = None) -> Response:
    """The data-mixture response: one column a probe set, χ_g = Σ_{z∈g} q_z χ_z / Σ_{z∈g} q_z.

    Args:
        response: a response matrix with a column a loss.
        shares: probe set → its share of the data, for probe sets whose sizes do not mirror the
            data; normalised to sum 1. By default the mass the columns already carry.

    Returns:
        A `Response` whose `chi[name]` is `[K]` and `mass[name]` a scalar. Standard errors come
        from the spread of the batches: columns of one chain are correlated, so they do not
        follow from the standard errors of the columns.

    Raises:
        ValueError: `shares` names other probe sets, or is not positive.
    """
    names = tuple(response.chi)
    totals = {name: jnp.sum(response.mass[name]) for name in names}
    if shares is None:
        mass = totals
    else:
        check_names("shares", shares, names)
        if not all(value > 0 for value in shares.values() if is_concrete(value)):
            raise ValueError(f"shares must be positive, got {dict(shares)}")
        norm = sum(shares.values())
        mass = {name: jnp.asarray(shares[name] / norm) for name in names}

    def mean(values: Array, name: str, leading: int) -> Array:
        axes = tuple(range(leading, values.ndim))
        mass = jnp.expand_dims(response.mass[name], tuple(range(leading)))
        return jnp.sum(values * mass, axis=axes) / totals[name]

    def stderr(batches: Array) -> Array:
        number = jnp.sum(~jnp.isnan(batches), axis=0)
        return jnp.nanstd(batches, axis=0, ddof=1) / jnp.sqrt(number)

    return replace(
        response,
        chi={name: mean(response.chi[name], name, 1) for name in names},
        stderr={name: stderr(response.batches[name]) for name in names},
        halves={name: mean(response.halves[name], name, 2) for name in names},
        mass=mass,
    )
