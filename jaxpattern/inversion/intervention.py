"""Data weights with all that is known about them, and how they are trained on."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxpattern import tables
from jaxpattern.pytrees import register_pytree
from jaxpattern.response.columns import Columns
from jaxpattern.types import Batch
from jaxpattern.validation import batch_length, check_names

if TYPE_CHECKING:
    import pandas


@register_pytree
@dataclass(frozen=True, eq=False)
class Intervention:
    """Data weights and what they are predicted to do.

    Attributes:
        weights: probe set → ρ, of the shape of its losses, of mean Σ_j q_j ρ_j = 1; a scalar for
            a grouped response; 0 for a loss that the response excludes. `over` spreads them over
            the losses that are trained on.
        cross_fitted_shift: row → the shift predicted of weights by draws they were not fitted to:
            weights from one half of the draws, χ from the other, averaged over both ways. Read
            this one. NaN where the response holds no halves.
        cross_fitted_stderr: row → its standard error: half the difference between the two ways,
            and the noise of χ at fixed weights as in `predicted_stderr`, squares added.
        predicted_shift: row → dμ̂ = nβ Σ_j χ_j q_j (ρ_j − 1), for every row of χ. Too large, since
            the weights were fitted to the noise of the same χ.
        predicted_stderr: row → standard error of that, from the noise of χ at fixed weights. For
            a grouped response from the spread of its batches; for columns of one loss each, whose
            errors are correlated, half the difference between the predictions of the two halves
            of the draws (one degree of freedom). It does not cover the overestimate that fitting
            makes. NaN where the response holds neither.
        residual: targeted row → scale · target − predicted shift.
        reached: how far along the target the prediction gets: ⟨predicted, target⟩ over
            ⟨target, target⟩ · scale, rows in units of the root-mean-square √(Σ_j q_j A_kj²) of
            their response, so that their own units do not matter. 1 is all of it.
        effective_sample_size: (Σ q ρ)² / Σ q ρ² · number of samples.
        negative_share: share of the data with a negative weight.
        max_weight: largest ρ.
        min_weight: smallest ρ.
        half_cosine: cosine between the changes ρ − 1 that the two halves of the draws lead to,
            under the same ridge. NaN where the response has no halves.
        dual: row → ν, the price of its shift; 0 for a row that was left free.
        converged: whether the method found its answer up to rounding.
        mass: probe set → share q of the data of each column, as in `Response`.
        columns: names and shapes of the probe sets.
        base: probe set → mass of each of its losses, for a grouped response, as in `Response`.
    """

    weights: dict[str, Float[Array, "..."]]
    cross_fitted_shift: dict[str, Float[Array, "*stack"]]
    cross_fitted_stderr: dict[str, Float[Array, "*stack"]]
    predicted_shift: dict[str, Float[Array, "*stack"]]
    predicted_stderr: dict[str, Float[Array, "*stack"]]
    residual: dict[str, Float[Array, "*stack"]]
    reached: Float[Array, "*stack"]
    effective_sample_size: Float[Array, "*stack"]
    negative_share: Float[Array, "*stack"]
    max_weight: Float[Array, "*stack"]
    min_weight: Float[Array, "*stack"]
    half_cosine: Float[Array, "*stack"]
    dual: dict[str, Float[Array, "*stack"]]
    converged: Bool[Array, "*stack"]
    mass: dict[str, Float[Array, "..."]]
    columns: Columns = field(metadata={"static": True})
    base: dict[str, Float[Array, "..."]] = field(default_factory=dict)

    def over(
        self, probes: Mapping[str, Batch], base: Mapping[str, Array | np.ndarray] | None = None
    ) -> Float[Array, "samples *tokens"]:
        """Weights of the shape of the losses, for training on the probe sets one after another.

        They make the loss Σ_j q_j ρ_j ℓ_j / Σ_j q_j ρ_j: base weights that the response was
        measured with, excluded losses (weight 0), and shares given to `group_mean` are in them.
        With plain probe sets they are ρ itself, a group's weight repeated for each of its losses.

            data = jax.tree.map(lambda *x: jnp.concatenate(x), *probes.values())
            jp.train(..., data, ..., weights=solution.over(probes))

        Args:
            probes: name → batch, the probe sets of the response; their order is that of the
                weights.
            base: name → base weights ρ₀ of the losses, where a grouped response does not know
                its own; without either, the losses of a group count alike.

        Returns:
            `[B]` or `[B, T]`, B samples of all probe sets, of mean 1.

        Raises:
            ValueError: the probe sets are others than those of the response, or of other sizes;
                their losses differ in length; a grouped response does not know its losses' shapes.
        """
        check_names("probes", probes, self.columns.names)
        weights = self.by_probe(base)
        for name, batch in probes.items():
            size, wanted = batch_length(f"probes[{name!r}]", batch), len(weights[name])
            if size != wanted:
                raise ValueError(
                    f"probes[{name!r}] must hold the {wanted} samples that χ was measured on, "
                    f"got {size}"
                )
        shapes = {name: each.shape for name, each in weights.items()}
        if len({shape[1:] for shape in shapes.values()}) > 1:
            raise ValueError(f"losses of the probe sets must be of one length, got {shapes}")
        return jnp.concatenate([weights[name] for name in probes], axis=0)

    def by_probe(
        self, base: Mapping[str, Array | np.ndarray] | None = None
    ) -> dict[str, Float[Array, "samples *tokens"]]:
        """The weights of `over`, probe set → `[B]` or `[B, T]`, which may differ in length.

        Args:
            base: as in `over`.

        Raises:
            ValueError: as `over`.
        """
        columns = self.columns
        if np.ndim(self.reached):
            raise ValueError("the solution is a stack of several; take one of them first")
        if columns.loss_shapes is None:
            raise ValueError(
                "the response was grouped without the shapes of its losses; make it with "
                "group_mean, or give Response(loss_shapes=...)"
            )
        total = sum(map(math.prod, columns.loss_shapes))
        shapes = zip(columns.names, columns.loss_shapes, strict=True)
        return {name: total * self._shares(name, shape, base) for name, shape in shapes}

    def to_dataframe(self) -> pandas.DataFrame:
        """The weights as a table; see `export.to_dataframe`."""
        from jaxpattern import export

        return export.to_dataframe(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """The weights in a file, `.json` or `.npz`; see `export.write_weights`."""
        from jaxpattern import export

        export.write_weights(path, self)

    def add_to(self, dataset: Any, column: str = "weight") -> Any:
        """A Hugging Face dataset with the weights as a column; see `export.add_weights`."""
        from jaxpattern import export

        return export.add_weights(dataset, self, column)

    def _shares(
        self, name: str, shape: tuple[int, ...], base: Mapping[str, Array | np.ndarray] | None
    ) -> Array:
        """q ρ of each loss of a probe set."""
        share = self.mass[name] * self.weights[name]
        if base is None and name in self.base:
            spread = self.base[name] / jnp.sum(self.base[name])
        elif base is None:
            spread = jnp.full(shape, 1 / math.prod(shape), share.dtype)
        else:
            check_names("base", base, self.columns.names)
            if np.shape(base[name]) != shape:
                raise ValueError(
                    f"base[{name!r}] must have the shape of its losses, {list(shape)}, "
                    f"got {list(np.shape(base[name]))}"
                )
            spread = jnp.asarray(base[name], share.dtype)
            spread = spread / jnp.sum(spread)
        if share.ndim:
            if base is not None:
                raise ValueError("base is for grouped responses; this one knows its base weights")
            return share
        return share * spread

    def __str__(self) -> str:
        return tables.text(describe, self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.html(describe, self)


def compose_weights(base: PyTree, weights: PyTree) -> PyTree:
    """The weights after two rounds: ρ₀ · ρ, of mean 1.

    The second response is measured under the base weights ρ₀ (`localized_posterior(weights=ρ₀)`,
    and ρ₀ of the probes as their masses), so its solution ρ is relative to them, and
    L = Σ ρ₀ρℓ / Σ ρ₀ρ is what is trained on next. A third round takes the result as its ρ₀. An
    excluded loss (ρ₀ = 0) stays so.

    Args:
        base: ρ₀, an array or a pytree of arrays.
        weights: ρ, the same.

    Returns:
        The same, of mean 1 over all entries.

    Raises:
        ValueError: trees or shapes differ.

    Examples:
        >>> jp.compose_weights(jnp.array([1.0, 1.0, 0.0]), jnp.array([1.0, 3.0, 5.0]))
        Array([0.75, 2.25, 0.  ], dtype=float32)
    """
    structure: Any = jax.tree.structure(base)
    if structure != jax.tree.structure(weights):
        raise ValueError(
            f"base and weights must be alike, got {structure} and {jax.tree.structure(weights)}"
        )
    pairs = list(zip(jax.tree.leaves(base), jax.tree.leaves(weights), strict=True))
    for one, other in pairs:
        if np.shape(one) != np.shape(other):
            raise ValueError(
                "base and weights must have the same shapes, got "
                f"{list(np.shape(one))} and {list(np.shape(other))}"
            )
    zero = [jnp.asarray(one) == 0 for one, _ in pairs]
    products = [
        jnp.where(none, 0, jnp.asarray(one) * other)
        for none, (one, other) in zip(zero, pairs, strict=True)
    ]
    mean = sum(jnp.sum(x) for x in products) / sum(x.size for x in products)
    return jax.tree.unflatten(structure, [x / mean for x in products])


def describe(result: Intervention) -> tables.Page:
    """The weights, and the shift of each row: wanted, predicted twice, with errors."""
    columns = result.columns
    title = (
        f"Data weights ρ for {len(columns.names)} probe sets, "
        f"to move {len(result.residual)} of {len(result.predicted_shift)} rows"
    )
    tables.refuse_unreadable(title, result, result.reached)
    total = sum(float(jnp.sum(result.mass[name])) for name in columns.names)
    body = []
    for name in columns.names:
        mass, weights = np.asarray(result.mass[name]), np.asarray(result.weights[name])
        share = float(mass.sum()) / total
        used = weights[mass > 0]
        mean = float((mass * weights).sum() / mass.sum()) if mass.sum() > 0 else math.nan
        span = [] if columns.grouped else [f"{x:.3g}" for x in _ends(used)]
        then = share * mean
        body.append([name, f"{mean:.3g}", *span, tables.percent(share), tables.percent(then)])
    span_head = [] if columns.grouped else ["smallest", "largest"]
    weight_head = "weight ρ" if columns.grouped else "mean ρ"
    weights_grid = tables.Grid(
        ["probe set", weight_head, *span_head, "share of data", "share then"], body
    )
    shifts = []
    crossed = all(math.isfinite(float(x)) for x in result.cross_fitted_shift.values())
    for row, plain in result.predicted_shift.items():
        wanted = f"{float(result.residual[row] + plain):.3g}" if row in result.residual else "–"
        cross = [
            tables.measured(float(result.cross_fitted_shift[row]),
                            float(result.cross_fitted_stderr[row]))
        ] if crossed else []  # fmt: skip
        own = tables.measured(float(plain), float(result.predicted_stderr[row]))
        shifts.append([row, wanted, *cross, own])
    cross_head = ["cross-fitted"] if crossed else []
    shift_grid = tables.Grid(["row", "wanted shift", *cross_head, "plain prediction"], shifts)
    return tables.Page(title, (weights_grid, shift_grid), tuple(_notes(result, crossed)))


def _ends(values: np.ndarray) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if values.size else (math.nan, math.nan)


def _notes(result: Intervention, crossed: bool) -> list[str]:
    notes = ["Shifts of ⟨φ⟩ in the units of each row, to first order, ± one standard error."]
    if crossed:
        notes.append(
            "Cross-fitted: weights from half of the draws, χ from the other half. Believe it; the "
            "plain one is fitted to its own noise."
        )
    notes.append(
        f"Reached {tables.percent(float(result.reached))} of the target (plain); effective sample "
        f"size {float(result.effective_sample_size):.4g}; weights from "
        f"{float(result.min_weight):.3g} to {float(result.max_weight):.3g}, "
        f"{tables.percent(float(result.negative_share))} of the data negative; halves agree to a "
        f"cosine of {float(result.half_cosine):.2f}."
    )
    if not bool(result.converged):
        notes.append("The method did not converge.")
    return notes
