"""Principal directions of a response matrix: what samples have in common in how they act.

Rows are components (or observables), columns are samples. Each component's χ carries an unknown
positive factor, the same for every sample, so a row has a shape but no comparable size: **each row
is centerd and divided by its standard deviation over the samples**, and the directions are those
of the correlation matrix of the rows. Papers that write samples × components call the same thing
standardizing the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpattern import tables
from jaxpattern.pytrees import register_pytree
from jaxpattern.response.result import Response
from jaxpattern.validation import (
    check_count,
    check_names,
    check_number,
    holds,
    is_concrete,
    old_name,
)

_HIGHEST = jax.lax.Precision.HIGHEST


@register_pytree
@dataclass(frozen=True, eq=False)
class PrincipalDirections:
    """Directions of the standardized response, the one of most variance first.

        a_ij = (χ_ij − center_i) / scale_i,   c_kj = Σ_i v_ki a_ij,   Σ_j q_j c_kj² = variance_k

    Attributes:
        coordinates: probe set → c of every sample, `[D, *losses.shape]`, in row standard
            deviations. More weight on samples of positive coordinate raises the observables of
            positive loading.
        loadings: v, unit vectors `[D, K]` over `rows`. The sign is such that the largest in
            magnitude is positive; of several within a tenth of it, the first.
        center: mean of each row of χ over the samples, `[K]`.
        scale: standard deviation of each row of χ over the samples, `[K]`.
        variance: variance of the coordinates, `[D]`; K over all directions together.
        explained: share of the variance, `[D]`.
        noise_share: share of each row's variance that its standard errors account for, `[K]`. A
            row that is nearly all noise takes a direction for itself; better leave it out.
        noise_variance: variance that the standard errors alone would give the coordinates,
            `[D]`: Σ_i v_ki² noise_share_i. The rows' noise is taken as independent, which it is
            for components with chains of their own. A direction whose variance is near it is
            noise.
        reliability: cosine between the coordinates from two halves of the draws, with the loadings
            held: how far the coordinates can be trusted, `[D]`. (V − n) / (V + n) is expected
            for a variance V and noise variance n. Noise alone comes out near √(K/N), since the
            loadings were fitted to it. NaN where the response holds no halves.
        half_cosine: the same where each half finds its own direction of that rank, `[D]`. Noise
            alone gives 0 ± 1/√N for independent columns. Near 0 at a high reliability says that
            directions of similar variance mix or change places.
        mass: probe set → share of each sample in means and variances; sums to 1.
        nbeta: inverse temperature of the posterior.
        rows: names of the K rows.
    """

    coordinates: dict[str, Float[Array, "..."]]
    loadings: Float[Array, "*stack directions rows"]
    center: Float[Array, "*stack rows"]
    scale: Float[Array, "*stack rows"]
    variance: Float[Array, "*stack directions"]
    explained: Float[Array, "*stack directions"]
    noise_share: Float[Array, "*stack rows"]
    noise_variance: Float[Array, "*stack directions"]
    reliability: Float[Array, "*stack directions"]
    half_cosine: Float[Array, "*stack directions"]
    mass: dict[str, Float[Array, "..."]]
    nbeta: Float[Array, "*stack"]
    rows: tuple[str, ...] = field(metadata={"static": True})

    centre = old_name("centre", "center")

    def __str__(self) -> str:
        return tables.text(describe, self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.html(describe, self)

    def target(self, direction: int, size: float = 1.0) -> dict[str, Float[Array, ""]]:
        """The shift of each row that weights 1 + size · c_k / √variance_k are predicted to make.

            dμ_i = nβ Σ_j q_j χ_ij (ρ_j − 1) = nβ · size · scale_i v_ki √variance_k

        It is a target for `solve_weights`, whose least-norm answer is these weights again where
        the rows of χ are centered.

        Raises:
            ValueError: there is no such direction.
        """
        check_count("direction", direction, minimum=0)
        check_number("size", size, minimum=-np.inf)
        if direction >= len(self.variance):
            raise ValueError(f"direction must be below {len(self.variance)}, got {direction}")
        length = self.nbeta * size * jnp.sqrt(self.variance[direction])
        shift = length * self.scale * self.loadings[direction]
        return {row: shift[i] for i, row in enumerate(self.rows)}


def principal_directions(
    response: Response,
    num: int | None = None,
    *,
    rows: Sequence[str] | None = None,
    weights: Mapping[str, Float[Array | np.ndarray, "*columns"]] | None = None,
) -> PrincipalDirections:
    """The principal directions of χ, each row standardized over the samples.

    A singular value decomposition of a_ij √q_j; see `PrincipalDirections`. Can be jitted and
    vmapped over stacked responses.

    Args:
        response: χ with one column per loss, or from `group_mean`.
        num: number of directions D; by default as many as there are rows, or columns if fewer.
        rows: which rows take part, by default all.
        weights: probe set → weight of each column, of the shape of its losses. Zero excludes a
            column, as padding, from means, variances and directions; its coordinate is
            given all the same, 0 where χ is not finite. By default the response's own masses.

    Returns:
        Coordinates, loadings, variances and what noise there is in each.

    Raises:
        ValueError: a row is unknown or named twice, or there are fewer than two; weights do not
            fit, are negative or all zero; χ of a column that counts is not finite; a row does not
            vary over the samples; more directions than there are rows or columns.

    References:
        Baker et al. 2025, arXiv 2504.18274; Wang & Murfet 2026, arXiv 2601.13548.
    """
    index = _row_index(response, rows)
    mass = _masses(response, weights)
    taken = jnp.array(index)
    columns = response.columns
    flat_mass = columns.join(mass)
    limit = min(len(index), len(flat_mass))
    if num is not None:
        check_count("num", num, minimum=1)
        if num > limit:
            raise ValueError(f"num must be at most {limit}, the rows or columns, got {num}")
    num = limit if num is None else num
    matrix = _widen(columns.join(response.chi)[taken])
    names = tuple(response.rows[i] for i in index)
    _check_counted(names, matrix, flat_mass)

    a, center, scale = _standardize(matrix, flat_mass)
    smallest = 10 * jnp.finfo(a.dtype).eps
    if not holds(lambda s, c: (s > smallest * abs(c)).all(), scale, center):
        still = [row for row, s in zip(names, np.asarray(scale), strict=True) if not s > 0]
        raise ValueError(f"rows {still or names} of χ do not vary over the samples; leave them out")
    loadings, variance = _leading_directions(a, flat_mass, num=num)
    coordinates = jnp.matmul(loadings, a, precision=_HIGHEST)
    errors = _widen(columns.join(response.stderr)[taken])
    squares = jnp.sum(
        jnp.where((flat_mass > 0)[None, :], flat_mass[None, :] * errors**2, 0), axis=1
    )
    noise_share = squares / jnp.where(scale > 0, scale, 1) ** 2
    noise = jnp.sum(loadings**2 * noise_share[None, :], axis=1)
    reliability, half_cosine = _compare_halves(response, index, flat_mass, loadings, scale)
    return PrincipalDirections(
        coordinates=columns.split(coordinates),
        loadings=loadings,
        center=center,
        scale=scale,
        variance=variance,
        explained=variance / jnp.sum(scale > 0),
        noise_share=noise_share,
        noise_variance=noise,
        reliability=reliability,
        half_cosine=half_cosine,
        mass=mass,
        nbeta=response.nbeta,
        rows=names,
    )


def describe(result: PrincipalDirections) -> tables.Page:
    """A line for each direction: what it explains, whether it repeats, its largest loadings."""
    title = f"Principal directions of {len(result.rows)} rows"
    tables.refuse_unreadable(title, result, result.nbeta)
    numbers = (result.explained, result.variance, result.noise_variance, result.reliability,
               result.half_cosine)  # fmt: skip
    body = []
    for k, loadings in enumerate(np.asarray(result.loadings)):
        explained, variance, noise, reliability, halves = (float(np.asarray(x)[k]) for x in numbers)
        first = np.argsort(-np.abs(loadings), kind="stable")[:3]
        body.append([
            str(k), tables.percent(explained), tables.percent(noise / variance),
            f"{reliability:.2f}", f"{halves:.2f}",
            ", ".join(f"{result.rows[i]} {loadings[i]:+.2f}" for i in first),
        ])  # fmt: skip
    header = ["", "explained", "of that, noise", "reliability", "halves", "largest loadings"]
    note = (
        "Explained: share of the variance of the standardized rows. Reliability and halves: "
        "cosines between two halves of the draws, with the loadings held and with their own; near "
        "0 is noise."
    )
    return tables.Page(title, (tables.Grid(header, body),), (note,))


@jax.jit
def _standardize(matrix: Array, mass: Array) -> tuple[Array, Array, Array]:
    """a, mean and standard deviation of each row; columns without mass may hold anything."""
    counted = (mass > 0)[None, :]

    def mean(values: Array) -> Array:
        return jnp.sum(jnp.where(counted, mass[None, :] * values, 0), axis=1)

    # Twice, as the sum of a row far from zero rounds.
    center = mean(matrix)
    center = center + mean(matrix - center[:, None])
    centerd = jnp.where(counted | jnp.isfinite(matrix), matrix - center[:, None], 0)
    scale = jnp.sqrt(mean(centerd**2))
    return centerd / jnp.where(scale > 0, scale, 1)[:, None], center, scale


@partial(jax.jit, static_argnames="num")
def _leading_directions(a: Array, mass: Array, num: int) -> tuple[Array, Array]:
    """Loadings `[D, K]` and variances of a_ij √q_j = (Q R)ᵀ, from the K × K matrix R."""
    a = jnp.where((mass > 0)[None, :], a, 0)
    r = jnp.linalg.qr((a * jnp.sqrt(mass)[None, :]).T, mode="r")
    _, singular, vh = jnp.linalg.svd(r, full_matrices=False)
    v = vh[:num]  # R = U S Vᵀ, so that a √q = V (Q U S)ᵀ
    size = jnp.abs(v)
    first = jnp.argmax(size >= 0.9 * jnp.max(size, axis=1, keepdims=True), axis=1)
    side = jnp.take_along_axis(v, first[:, None], axis=1)
    return v * jnp.where(side < 0, -1, 1), singular[:num] ** 2


def _compare_halves(
    response: Response, index: tuple[int, ...], mass: Array, loadings: Array, scale: Array
) -> tuple[Array, Array]:
    """Cosines between the coordinates of two halves: loadings held, and loadings of their own."""
    halves, columns = response.halves, response.columns
    if not all(name in halves and len(halves[name]) == 2 for name in columns.names):
        unknown = jnp.full(len(loadings), jnp.nan, loadings.dtype)
        return unknown, unknown
    held, own, directions = [], [], []
    for h in (0, 1):
        matrix = _widen(columns.join(halves)[h][jnp.array(index)])
        a, _, own_scale = _standardize(matrix, mass)
        v, _ = _leading_directions(a, mass, num=len(loadings))
        in_scale_of_all = a * (own_scale / jnp.where(scale > 0, scale, 1))[:, None]
        held.append(jnp.matmul(loadings, in_scale_of_all, precision=_HIGHEST))
        own.append(jnp.matmul(v, a, precision=_HIGHEST))
        directions.append(v)
    side = jnp.where(jnp.sum(directions[0] * directions[1], axis=1) < 0, -1, 1)
    return _cosine(held[0], held[1], mass), side * _cosine(own[0], own[1], mass)


def _cosine(first: Array, second: Array, mass: Array) -> Array:
    """Cosine of each row of one with that row of the other, columns weighing their mass."""

    def product(a: Array, b: Array) -> Array:
        return jnp.sum(jnp.where((mass > 0)[None, :], mass[None, :] * a * b, 0), axis=1)

    norm = jnp.sqrt(product(first, first) * product(second, second))
    return jnp.where(norm > 0, product(first, second) / jnp.where(norm > 0, norm, 1), jnp.nan)


def _widen(values: Array) -> Array:
    """At least float32."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _row_index(response: Response, rows: Sequence[str] | None) -> tuple[int, ...]:
    """Which rows take part."""
    if rows is None:
        rows = response.rows
    if isinstance(rows, str) or not set(rows) <= set(response.rows) or len(set(rows)) < len(rows):
        raise ValueError(f"rows must be some of {list(response.rows)}, each once, got {rows!r:.80}")
    if len(rows) < 2:
        raise ValueError(f"principal directions need at least two rows, got {list(rows)}")
    return tuple(response.rows.index(row) for row in rows)


def _masses(response: Response, weights: Mapping[str, Any] | None) -> dict[str, Array]:
    """Shares that sum to 1."""
    if weights is None:
        parts = dict(response.mass)
    else:
        check_names("weights", weights, response.chi)
        parts = {name: jnp.asarray(weights[name], jnp.float32) for name in response.chi}
    for name, part in parts.items():
        wanted = response.chi[name].shape[1:]
        if part.shape != wanted:
            raise ValueError(
                f"weights[{name!r}] must have the shape of its losses, {list(wanted)}, "
                f"got {list(part.shape)}"
            )
        if not holds(lambda part: ((part >= 0) & (part < np.inf)).all(), part):
            raise ValueError(f"weights[{name!r}] must be finite and not negative")
    total = jnp.sum(jnp.stack([jnp.sum(part) for part in parts.values()]))
    if not holds(lambda total: total > 0, total):
        raise ValueError("weights are all zero; at least two columns must count")
    return {name: parts[name] / total for name in response.chi}


def _check_counted(rows: tuple[str, ...], matrix: Array, mass: Array) -> None:
    if not (is_concrete(matrix) and is_concrete(mass)):
        return
    bad = ~np.isfinite(np.asarray(matrix)) & (np.asarray(mass) > 0)[None, :]
    if bad.any():
        names = [row for row, any_bad in zip(rows, bad.any(axis=1), strict=True) if any_bad]
        raise ValueError(f"χ is not finite in rows {names}, at columns of nonzero weight")
