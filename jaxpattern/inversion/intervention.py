"""From a wanted shift of the observables to data weights, with all that is known about them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from jaxpattern.inversion.methods import InversionMethod, Solution, ridge
from jaxpattern.inversion.spectral import energies
from jaxpattern.inversion.validation import Untargeted, check_problem
from jaxpattern.response.result import Response
from jaxpattern.validation import is_concrete

_HIGHEST = jax.lax.Precision.HIGHEST
_TOLERANCE = 0.01


class UnreachableTarget(UserWarning):
    """The weights are predicted to miss the target by more than 1 %."""


class Intervention(NamedTuple):
    """Data weights and what they are predicted to do.

    Attributes:
        weights: probe set → ρ, of the shape of its losses; a scalar for a grouped response.
        predicted_shift: row → dμ̂ = nβ Σ_j χ_j q_j (ρ_j − 1), for every row of χ.
        predicted_stderr: row → standard error of that, from the noise of χ at fixed weights. For
            a grouped response from the spread of its batches; for columns of one loss each, whose
            errors are correlated, half the difference between the predictions of the two halves
            of the draws (one degree of freedom). The weights were fitted to the same noise: if
            `half_cosine` is low the shift itself is overestimated, which no error bar shows.
            NaN where the response holds neither.
        residual: targeted row → scale · target − predicted shift.
        reached: how far along the target the prediction gets: ⟨predicted, target⟩ over
            ⟨target, target⟩ · scale, rows in units of the root-mean-square √(Σ_j q_j A_kj²) of
            their response, so that their own units do not matter. 1 is all of it.
        effective_sample_size: (Σ q ρ)² / Σ q ρ² · number of samples.
        negative_share: share of the data with a negative weight.
        max_weight: largest ρ.
        min_weight: smallest ρ.
        half_cosine: cosine between the changes ρ − 1 that the two halves of the draws lead to,
            each under the noise of half the draws. NaN where the response has no halves.
        dual: row → ν, the price of its shift; 0 for a row that was left free.
        converged: whether the method found its answer up to rounding.
    """

    weights: dict[str, Float[Array, "*columns"]]
    predicted_shift: dict[str, Float[Array, ""]]
    predicted_stderr: dict[str, Float[Array, ""]]
    residual: dict[str, Float[Array, ""]]
    reached: Float[Array, ""]
    effective_sample_size: Float[Array, ""]
    negative_share: Float[Array, ""]
    max_weight: Float[Array, ""]
    min_weight: Float[Array, ""]
    half_cosine: Float[Array, ""]
    dual: dict[str, Float[Array, ""]]
    converged: Bool[Array, ""]


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

    Differentiable in χ, in the target and in the settings of the method, in forward and reverse
    mode; can be jitted and vmapped. The linear regime ends near |ρ − 1| ≈ 0.1: beyond, the
    prediction is a direction, to be compared with the shift that retraining realises.

    Args:
        response: χ with its errors, ungrouped or from `group_mean`.
        target: row → wanted shift of its ⟨φ⟩, in units of φ.
        method: `least_norm()`, `truncated()`, `ridge()` (the default), `box()`, `entropic()`, or
            any `InversionMethod`.
        scale: finite factor on the change of the weights, not 0. Negative for the opposite.
        untargeted: what becomes of rows without a target: "free" lets them move, "hold" asks for
            no shift.

    Returns:
        Weights, predicted shifts and diagnostics.

    Raises:
        ValueError: the target is empty, names an unknown row or is not finite; χ is not finite;
            `scale` is 0 or not finite; `untargeted` is neither choice; the method needs standard
            errors and all are zero, or more directions than there are rows.
        TypeError: a target or `scale` is not a number, or `method` is not a function.

    Warns:
        UnreachableTarget: the prediction misses the target by more than 1 %, in the units of
            `Intervention.reached`; only where all values are concrete.

    References:
        Wang & Murfet 2026, arXiv 2601.13548; Wang, Donoway & Murfet 2026, arXiv 2609.00699.
    """
    method = ridge() if method is None else method
    check_problem(response, target, method, scale, untargeted)
    rows = response.rows
    constrained = tuple(k for k, row in enumerate(rows) if untargeted == "hold" or row in target)
    dtype = jnp.promote_types(jnp.result_type(*response.chi.values()), jnp.float32)
    result = _solve(
        _as_partial(method),
        {name: (response.chi[name], response.mass[name]) for name in response.chi},
        {name: response.stderr[name] for name in response.chi},
        _halves(response),
        _batches(response),
        jnp.asarray(response.nbeta, dtype),
        jnp.stack([jnp.asarray(target.get(rows[k], 0.0), dtype) for k in constrained]),
        jnp.asarray(scale, dtype),
        constrained=constrained,
    )
    intervention = _name(result, rows, constrained, target, response.num_samples)
    _warn_if_unreached(intervention, target, result["miss"], scale)
    return intervention


@partial(jax.jit, static_argnames="constrained")
def _solve(
    method: Any,
    columns: dict[str, tuple[Array, Array]],
    stderr: dict[str, Array],
    halves: dict[str, Array] | None,
    batches: dict[str, Array] | None,
    nbeta: Array,
    shift: Array,
    scale: Array,
    *,
    constrained: tuple[int, ...],
) -> dict[str, Any]:
    """Everything about the solution, as arrays over rows and columns."""
    names = tuple(columns)
    shapes = {name: columns[name][1].shape for name in names}
    chi = {name: columns[name][0] for name in names}
    mass = jnp.concatenate([columns[name][1].reshape(-1) for name in names]).astype(nbeta.dtype)

    matrix = nbeta * _flatten(chi, constrained, nbeta.dtype)
    noise = _total(
        jnp.sum(
            columns[name][1][None] * (nbeta * _select(stderr[name], constrained)) ** 2,
            axis=tuple(range(1, stderr[name].ndim)),
        )
        for name in names
    )
    solution = method(matrix, mass, shift, noise)
    change = scale * solution.change
    weights = 1 + change

    moved = mass * change
    parts = {
        name: part.reshape(shapes[name])
        for name, part in zip(names, _split(moved, shapes), strict=True)
    }
    predicted = _predict(chi, parts, nbeta)
    if batches is not None:
        stderr_shift = _mean_stderr(_predict({n: batches[n].T for n in names}, parts, nbeta))
    elif halves is not None:
        first, second = (
            _predict({name: halves[name][h] for name in names}, parts, nbeta) for h in (0, 1)
        )
        stderr_shift = jnp.abs(first - second) / 2
    else:
        stderr_shift = None

    wanted = scale * shift
    got = predicted[jnp.asarray(constrained)]
    importance = _importance(jax.lax.stop_gradient(matrix), mass)
    wanted_square = jnp.sum(importance * wanted**2)
    anything = wanted_square > 0
    along = jnp.sum(importance * got * wanted) / jnp.where(anything, wanted_square, 1.0)
    return {
        "weights": {
            name: part.reshape(shapes[name])
            for name, part in zip(names, _split(weights, shapes), strict=True)
        },
        "predicted": predicted,
        "stderr": jnp.full_like(predicted, jnp.nan) if stderr_shift is None else stderr_shift,
        "wanted": wanted,
        "reached": jnp.where(anything, along, 1.0),
        "miss": jnp.sqrt(
            jax.lax.stop_gradient(
                jnp.sum(importance * (got - wanted) ** 2) / jnp.where(anything, wanted_square, 1.0)
            )
        ),
        "effective_share": jnp.sum(mass * weights) ** 2 / jnp.sum(mass * weights**2),
        "negative": jnp.sum(jnp.where(weights < 0, mass, 0.0)) / jnp.sum(mass),
        "max": jnp.max(weights),
        "min": jnp.min(weights),
        "half_cosine": _half_cosine(method, halves, mass, shift, 2 * noise, nbeta, constrained),
        "dual": jnp.zeros_like(predicted).at[jnp.asarray(constrained)].set(solution.dual),
        "converged": solution.converged,
    }


def _half_cosine(
    method: Any,
    halves: dict[str, Array] | None,
    mass: Array,
    shift: Array,
    noise: Array,
    nbeta: Array,
    constrained: tuple[int, ...],
) -> Array:
    """The cosine between the solutions of two halves, one solved after the other. No derivative."""
    if halves is None:
        return jnp.full((), jnp.nan, nbeta.dtype)
    method, halves, mass, shift, noise, nbeta = jax.lax.stop_gradient(
        (method, halves, mass, shift, noise, nbeta)
    )

    def change(half: dict[str, Array]) -> Array:
        matrix = nbeta * _flatten(half, constrained, nbeta.dtype)
        solution: Solution = method(matrix, mass, shift, noise)
        return solution.change

    first, second = tuple(jax.lax.map(change, halves))
    overlap = jnp.sum(mass * first * second)
    norms = jnp.sqrt(jnp.sum(mass * first**2) * jnp.sum(mass * second**2))
    return jnp.where(norms > 0, overlap / jnp.where(norms > 0, norms, 1.0), jnp.nan)


def _total(parts: Iterable[Array]) -> Array:
    """The sum over probe sets."""
    return jnp.sum(jnp.stack(list(parts)), axis=0)


def _select(values: Array, constrained: tuple[int, ...]) -> Array:
    """The rows that are constrained; no copy where that is all of them."""
    everything = constrained == tuple(range(values.shape[0]))
    return values if everything else values[jnp.asarray(constrained)]


def _flatten(chi: dict[str, Array], constrained: tuple[int, ...], dtype: Any) -> Array:
    """The constrained rows of all probe sets, side by side."""
    blocks = [_select(chi[name], constrained) for name in chi]
    return jnp.concatenate([b.reshape(b.shape[0], -1) for b in blocks], axis=1).astype(dtype)


def _split(values: Array, shapes: dict[str, tuple[int, ...]]) -> list[Array]:
    """One flat piece a probe set."""
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    return jnp.split(values, np.cumsum(sizes)[:-1].tolist())


def _predict(chi: dict[str, Array], moved: dict[str, Array], nbeta: Array) -> Array:
    """nβ Σ_j χ_j q_j (ρ_j − 1); trailing axes of χ beyond those of the columns stay."""
    return nbeta * _total(
        jnp.tensordot(chi[name], moved[name], moved[name].ndim, precision=_HIGHEST)
        if moved[name].ndim
        else chi[name] * moved[name]
        for name in chi
    )


def _importance(matrix: Array, mass: Array) -> Array:
    """1/√(Σ q A²) squared: what brings rows to unit response; huge for rows that have none."""
    energy = energies(matrix, mass)
    largest = jnp.max(energy)
    floor = jnp.where(largest > 0, jnp.finfo(energy.dtype).eps * largest, 1.0)
    return 1 / jnp.where(energy > 0, energy, floor)


def _mean_stderr(batches: Array) -> Array:
    """Standard error of the mean over the last axis, NaN left out; derivative 0 at no spread."""
    valid = ~jnp.isnan(batches)
    count = jnp.sum(valid, axis=-1)
    mean = jnp.sum(jnp.where(valid, batches, 0.0), axis=-1) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(valid, batches - mean[:, None], 0.0) ** 2, axis=-1)
    error = squares / jnp.maximum(count * (count - 1), 1)
    root = jnp.where(error > 0, jnp.sqrt(jnp.where(error > 0, error, 1.0)), 0.0)
    return jnp.where(count > 1, root, jnp.nan)


def _as_partial(method: Any) -> Any:
    """The method as a pytree that `jit` takes."""
    return method if isinstance(method, Partial) else Partial(method)


def _is_grouped(response: Response) -> bool:
    return all(values.ndim == 1 for values in response.chi.values())


def _halves(response: Response) -> dict[str, Array] | None:
    """χ of the two halves of the draws, where there are two."""
    names = tuple(response.chi)
    if not all(name in response.halves and len(response.halves[name]) == 2 for name in names):
        return None
    return {name: response.halves[name] for name in names}


def _batches(response: Response) -> dict[str, Array] | None:
    """The batches of a grouped response, which are estimates of its columns."""
    names = tuple(response.chi)
    if not _is_grouped(response) or not all(name in response.batches for name in names):
        return None
    return {name: response.batches[name] for name in names}


def _name(
    result: dict[str, Any],
    rows: tuple[str, ...],
    constrained: tuple[int, ...],
    target: Mapping[str, Any],
    num_samples: int,
) -> Intervention:
    """The result with its rows named."""

    def by_row(values: Array) -> dict[str, Array]:
        return {row: values[k] for k, row in enumerate(rows)}

    predicted = by_row(result["predicted"])
    wanted = {rows[k]: result["wanted"][i] for i, k in enumerate(constrained)}
    return Intervention(
        weights=result["weights"],
        predicted_shift=predicted,
        predicted_stderr=by_row(result["stderr"]),
        residual={row: wanted[row] - predicted[row] for row in target},
        reached=result["reached"],
        effective_sample_size=result["effective_share"] * num_samples,
        negative_share=result["negative"],
        max_weight=result["max"],
        min_weight=result["min"],
        half_cosine=result["half_cosine"],
        dual=by_row(result["dual"]),
        converged=result["converged"],
    )


def _warn_if_unreached(
    intervention: Intervention, target: Mapping[str, Any], miss: Array, scale: Any
) -> None:
    """Says, row by row, how far the weights get; silent under a transformation."""
    concrete = all(map(is_concrete, jax.tree.leaves((intervention, dict(target), miss, scale))))
    if not concrete or not float(miss) > _TOLERANCE:
        return
    lines = [
        f"{row!r} gets {float(intervention.predicted_shift[row]):.3g} of {float(wanted):.3g}"
        for row in target
        for wanted in [float(scale) * float(target[row])]
    ]
    warnings.warn(
        f"the weights are predicted to reach {float(intervention.reached):.1%} of the target, "
        f"and to miss it by {float(miss):.1%} of its size: {', '.join(lines)}. The rows may not "
        "be movable this far or independently, or the method's ridge or bounds hold the weights "
        f"back{'' if bool(intervention.converged) else '; the method did not converge'}",
        UnreachableTarget,
        stacklevel=3,
    )
