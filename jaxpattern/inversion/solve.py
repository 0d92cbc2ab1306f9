"""From a wanted shift of the observables to data weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpattern.inversion.checks import Untargeted, check_problem
from jaxpattern.inversion.flat import (
    Measured,
    Rows,
    flatten,
    measured_of,
    normalized,
    product,
)
from jaxpattern.inversion.intervention import Intervention
from jaxpattern.inversion.methods import InversionMethod, Solution, entropic, ridge
from jaxpattern.inversion.spectral import energies
from jaxpattern.response.columns import Columns
from jaxpattern.response.result import Response
from jaxpattern.validation import as_pytree_function, is_concrete

_TOLERANCE = 0.01
# On Gaussian models solved again exactly, the predicted shift of weights this far from 1 is off by
# 13 % in the median and 66 % in one of ten; at 0.1 by 2 % and 13 %, at 1 by 25 % and 116 %.
_LINEAR = 0.5


class UnreachableTargetWarning(UserWarning):
    """The weights are predicted to miss the target."""


class WeightsWarning(UserWarning):
    """Weights are negative, or so far from 1 that a linear prediction says little."""


def solve_weights(
    response: Response,
    target: Mapping[str, float | Float[Array, ""]],
    *,
    method: InversionMethod | None = None,
    scale: float | Float[Array, ""] = 1.0,
    untargeted: Untargeted = "free",
) -> Intervention:
    """Data weights ρ that shift expectations by a wanted amount, nβ Σ_j χ_j q_j (ρ_j − 1) = dμ.

    The method finds weights that make the shift dμ; those returned are 1 + scale · (ρ − 1), so
    that `scale` moves along a fixed direction. Bounds of a method hold at scale 1.

    The trained loss Σ_j q_j ρ_j ℓ_j / Σ_j q_j ρ_j does not change when all weights are multiplied
    by a number, so weights have mean Σ_j q_j ρ_j = 1 and G columns have G − 1 degrees of freedom.
    **The columns stand for all that is trained on**, each for its share q. Then Σ_j q_j χ_j = 0
    in truth, and what a measured row has of a mean is noise, or, where the probes are another
    sample than the data of the posterior, the shift that going over to the probes makes at ρ = 1;
    it is subtracted from every row, and predictions compare with the same columns at weight 1.
    Data that are trained on with fixed weight beside the probes must be a probe set too.

    Differentiable in χ, in the target and in the settings of the method, in forward and reverse
    mode; can be jitted and vmapped. The linear regime ends near |ρ − 1| ≈ 0.1: beyond, the
    prediction is a direction, to be compared with the shift that retraining realizes.

    Args:
        response: χ with its errors, ungrouped or from `group_mean`.
        target: row → wanted shift of its ⟨φ⟩, in units of φ.
        method: `least_norm()`, `truncated()`, `ridge()`, `box()`, `entropic()`, or any
            `InversionMethod`. The default is `ridge()` for one column per loss, and `entropic()`
            for a grouped response: a mixture has few groups, whose weights are often large, and a
            negative share of a source can be neither collected nor trained on.
        scale: finite factor on the change of the weights, not 0. Negative for the opposite.
        untargeted: what becomes of rows without a target: "free" lets them move, "hold" asks for
            no shift.

    Returns:
        Weights, predicted shifts and diagnostics.

    Raises:
        ValueError: the target is empty, names an unknown row or is not finite; χ of a column that
            counts is not finite; `scale` is 0 or not finite; `untargeted` is neither choice; the
            method needs standard errors and all are zero, or more directions than there are rows.
        TypeError: a target or `scale` is not a number, or `method` is not a function.

    Warns:
        UnreachableTargetWarning: the prediction misses the target by more than 1 %, in the units
            of `Intervention.reached`; or the cross-fitted one gets less than half as far, by more
            than two standard errors.
        WeightsWarning: weights are negative, or further than 0.5 from 1. Both only where all
            values are concrete.

    References:
        Wang & Murfet 2026, arXiv 2601.13548; Wang, Donoway & Murfet 2026, arXiv 2609.00699.
    """
    columns = response.columns
    if method is None:
        method = entropic() if columns.grouped else ridge()
    check_problem(response, target, method, scale, untargeted)
    rows = response.rows
    constrained = tuple(k for k, row in enumerate(rows) if untargeted == "hold" or row in target)
    dtype = jnp.promote_types(jnp.result_type(*response.chi.values()), jnp.float32)
    measured = measured_of(response)
    wanted = jnp.stack([jnp.asarray(target.get(rows[k], 0.0), dtype) for k in constrained])
    wish = _Wish(wanted, jnp.asarray(scale, dtype))
    result = _solve(
        as_pytree_function(method), measured, wish, columns=columns, constrained=constrained
    )
    intervention = _name(result, response, constrained, target)
    values = (intervention, dict(target), scale, result, measured)
    if all(map(is_concrete, jax.tree.leaves(values))):
        _warn(intervention, result, response, target, len(constrained))
    return intervention


class _Wish(NamedTuple):
    """dμ of the constrained rows, and the factor on the change of the weights."""

    shift: Array
    scale: Array


class _Result(NamedTuple):
    """The solution as arrays over rows and columns; names as in `Intervention`."""

    weights: dict[str, Array]
    cross_fitted: Array
    cross_fitted_stderr: Array
    predicted: Array
    predicted_stderr: Array
    wanted: Array
    reached: Array
    cross_reached: Array
    cross_reached_stderr: Array
    miss: Array
    effective_share: Array
    negative: Array
    largest: Array
    smallest: Array
    furthest: Array
    half_cosine: Array
    dual: Array
    converged: Array


@partial(jax.jit, static_argnames=("columns", "constrained"))
def _solve(
    method: Any,
    measured: Measured,
    wish: _Wish,
    *,
    columns: Columns,
    constrained: tuple[int, ...],
) -> _Result:
    """Everything about the solution, as arrays over rows and columns."""
    rows = flatten(measured, columns)
    mass = rows.mass
    index = jnp.asarray(constrained)
    everything = constrained == tuple(range(len(rows.matrix)))
    matrix = rows.matrix if everything else rows.matrix[index]
    noise = rows.noise[index]

    # ρ = 1 + scale · s, divided by its mean.
    solution = method(matrix, mass, wish.shift, noise)
    raw = wish.scale * solution.change
    change, mean = normalized(raw, mass)
    # Not 1 + (ρ − 1), which rounds a positive weight below zero.
    weights = jnp.where(mass > 0, (1 + raw) / mean, 0.0)

    # dμ̂ = Σ_j q_j A_j (ρ_j − 1), of the rows with a target and of the others.
    predicted = rows.predict(change)
    wanted = wish.scale * wish.shift
    importance = _importance(jax.lax.stop_gradient(matrix), mass)
    wanted_square = jnp.sum(importance * wanted**2)
    anything = wanted_square > 0

    def reached(shift: Array) -> Array:
        """⟨shift, wanted⟩ / ⟨wanted, wanted⟩, rows in units of their response."""
        along = jnp.sum(importance * shift[index] * wanted)
        return jnp.where(anything, along / jnp.where(anything, wanted_square, 1.0), 1.0)

    # |predicted − wanted| / |wanted| in the same units.
    missed = jnp.sum(importance * (predicted[index] - wanted) ** 2)
    missed = missed / jnp.where(anything, wanted_square, 1.0)
    crossed = _cross_fit(method, rows, wish, index)
    used = mass > 0
    return _Result(
        weights=columns.split(weights),
        cross_fitted=crossed.shift,
        cross_fitted_stderr=crossed.stderr,
        predicted=predicted,
        predicted_stderr=rows.stderr(change),
        wanted=wanted,
        reached=reached(predicted),
        cross_reached=reached(crossed.shift),
        # Errors of rows of one chain go together: their sizes add.
        cross_reached_stderr=jnp.sum(importance * jnp.abs(crossed.stderr[index] * wanted))
        / jnp.where(anything, wanted_square, 1.0),
        miss=jnp.sqrt(jax.lax.stop_gradient(missed)),
        # (Σ q ρ)² / Σ q ρ²
        effective_share=jnp.sum(mass * weights) ** 2 / jnp.sum(mass * weights**2),
        negative=jnp.sum(jnp.where(weights < 0, mass, 0.0)),
        largest=jnp.max(jnp.where(used, weights, -jnp.inf)),
        smallest=jnp.min(jnp.where(used, weights, jnp.inf)),
        furthest=jnp.max(jnp.where(used, jnp.abs(change), 0.0)),
        half_cosine=crossed.cosine,
        dual=jnp.zeros_like(predicted).at[index].set(solution.dual),
        converged=solution.converged,
    )


class _CrossFit(NamedTuple):
    """The prediction of each half's weights by the other, and how alike the weights are."""

    shift: Array
    stderr: Array
    cosine: Array


def _cross_fit(method: Any, rows: Rows, wish: _Wish, index: Array) -> _CrossFit:
    """s_h from half h, dμ̂ = ½ Σ_h Σ_j q_j A_(1−h)j s_hj. No derivative.

    The ridge is that of all draws: a half holds more noise, which shrinks its weights by itself.
    """
    unknown = jnp.full(rows.matrix.shape[0], jnp.nan, rows.matrix.dtype)
    if rows.halves is None:
        return _CrossFit(unknown, unknown, unknown[0])
    method, rows, wish = jax.lax.stop_gradient((method, rows, wish))
    mass, halves = rows.mass, rows.halves
    assert halves is not None

    def change(half: Array) -> Array:
        solution: Solution = method(half[index], mass, wish.shift, rows.noise[index])
        return normalized(wish.scale * solution.change, mass)[0]

    # One half after the other: the memory of one problem.
    first, second = jax.lax.map(change, halves)
    one, other = product(halves[1], mass * first), product(halves[0], mass * second)
    # The two ways share draws, so that their difference alone would understate the error.
    stderr = jnp.sqrt(((one - other) / 2) ** 2 + rows.stderr((first + second) / 2) ** 2)
    overlap = jnp.sum(mass * first * second)
    norms = jnp.sqrt(jnp.sum(mass * first**2) * jnp.sum(mass * second**2))
    cosine = jnp.where(norms > 0, overlap / jnp.where(norms > 0, norms, 1.0), jnp.nan)
    return _CrossFit((one + other) / 2, stderr, cosine)


def _importance(matrix: Array, mass: Array) -> Array:
    """1 / Σ_j q_j A_kj²: brings the squares of rows to unit response; huge for a row of none."""
    energy = energies(matrix, mass)
    largest = jnp.max(energy)
    floor = jnp.where(largest > 0, jnp.finfo(energy.dtype).eps * largest, 1.0)
    return 1 / jnp.where(energy > 0, energy, floor)


def _name(
    result: _Result,
    response: Response,
    constrained: tuple[int, ...],
    target: Mapping[str, Any],
) -> Intervention:
    """The result with its rows named."""
    rows = response.rows

    def by_row(values: Array) -> dict[str, Array]:
        return {row: values[k] for k, row in enumerate(rows)}

    predicted = by_row(result.predicted)
    wanted = {rows[k]: result.wanted[i] for i, k in enumerate(constrained)}
    return Intervention(
        # In the order of the response: `jit` returns dictionaries sorted.
        weights={name: result.weights[name] for name in response.chi},
        cross_fitted_shift=by_row(result.cross_fitted),
        cross_fitted_stderr=by_row(result.cross_fitted_stderr),
        predicted_shift=predicted,
        predicted_stderr=by_row(result.predicted_stderr),
        residual={row: wanted[row] - predicted[row] for row in target},
        reached=result.reached,
        effective_sample_size=result.effective_share * response.num_samples,
        negative_share=result.negative,
        max_weight=result.largest,
        min_weight=result.smallest,
        half_cosine=result.half_cosine,
        dual=by_row(result.dual),
        converged=result.converged,
        mass=response.mass,
        columns=response.columns,
        base=response.base,
    )


def _warn(
    intervention: Intervention,
    result: _Result,
    response: Response,
    target: Mapping[str, Any],
    num_rows: int,
) -> None:
    """What is wrong with the weights, with numbers; silent under a transformation."""
    columns = response.columns
    if not bool(jnp.isfinite(result.largest)):
        warnings.warn(
            "the weights are not finite, or their mean is not positive, so that nothing can be "
            "trained on them",
            WeightsWarning,
            stacklevel=3,
        )
        return
    shifts = intervention.predicted_shift
    if not float(result.miss) <= _TOLERANCE:
        lines = [
            f"{row!r} gets {float(shifts[row]):.3g} of "
            f"{float(shifts[row] + intervention.residual[row]):.3g}"
            for row in target
        ]
        count = sum(int(jnp.sum(response.mass[name] > 0)) for name in columns.names)
        what = "groups" if columns.grouped else "columns"
        freedom = (
            f" {count} {what} have {count - 1} degree{'s' if count != 2 else ''} of freedom, as "
            f"only ratios of weights matter, for {num_rows} rows."
            if count - 1 < num_rows
            else ""
        )
        warnings.warn(
            f"the weights are predicted to reach {float(result.reached):.1%} of the target, "
            f"and to miss it by {float(result.miss):.1%} of its size: {', '.join(lines)}."
            f"{freedom} The rows may not be movable this far or independently, or the method's "
            "ridge or bounds hold the weights "
            f"back{'' if bool(result.converged) else '; the method did not converge'}",
            UnreachableTargetWarning,
            stacklevel=3,
        )
    surely = float(result.cross_reached) + 2 * float(result.cross_reached_stderr)
    if float(result.miss) <= _TOLERANCE and surely < float(result.reached) / 2:
        warnings.warn(
            f"the weights are predicted to reach {float(result.reached):.1%} of the target by the "
            f"χ they were fitted to, but {float(result.cross_reached):.1%} ± "
            f"{float(result.cross_reached_stderr):.1%} by draws they were not "
            "fitted to (cross_fitted_shift): they are fitted to noise. Measure χ longer, or group "
            "its columns",
            UnreachableTargetWarning,
            stacklevel=3,
        )
    if float(result.negative) > 0 or float(result.furthest) > _LINEAR:
        negative = (
            f"{float(result.negative):.2%} of the data have negative weights; "
            if float(result.negative) > 0
            else ""
        )
        warnings.warn(
            f"weights run from {float(result.smallest):.3g} to {float(result.largest):.3g}: "
            f"{negative}the linear prediction holds near |ρ − 1| ≈ 0.1, and is no more than a "
            "direction here. Ask for less (`scale`), or bound the weights (`box`, `entropic`)",
            WeightsWarning,
            stacklevel=3,
        )
