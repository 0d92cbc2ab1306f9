"""Influences and their errors from the draws of two sides, or from co-moments of groups of them.

Draws of each chain are cut into groups. With
a_g, b_g the group means of both losses and ā, b̄ their means over all groups, groups give

    x_g = C_g / n_g + (a_g − ā)(b_g − b̄)        Cov = Σ_g n_g x_g / (n − 1)

as for χ (`response.covariance`), and r = Cov / √(Var_a Var_b), linearized,

    d_g = (x_g − Cov) / √(Var_a Var_b) − (r/2) [(y_g − Var_a) / Var_a + (z_g − Var_b) / Var_b]

with y_g, z_g the x_g of a loss with itself. The spread of x_g and d_g over the groups gives the
standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxpattern.diagnostics import batch_of
from jaxpattern.moments import Moments
from jaxpattern.response.columns import Columns

Level = Literal["loss", "sample", "set"]

_BLOCK = 2**24  # numbers of all groups and probes that a block of queries holds at once


class Side(NamedTuple):
    """The rows, or the columns: names of the sets, what the problem calls them, and their level."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    level: Level
    columns: Columns

    def join(self, of: Mapping[str, Array]) -> Float[Array, "*lead columns"]:
        """All columns side by side, from those of each level and set."""
        pairs = zip(self.names, self.keys, strict=True)
        return self.columns.join({name: of[f"{self.level} {key}"] for name, key in pairs})


class CoMoments(NamedTuple):
    """Co-moments of rows and columns, and Σ (a − ā)², Σ (b − b̄)² of each."""

    both: Moments
    square_a: Float[Array, " rows"]
    square_b: Float[Array, " columns"]


class _Groups(NamedTuple):
    """Groups of draws of the chains that are alive, means and squares of both sides."""

    size: Float[Array, " groups"]
    mean_a: Float[Array, "groups rows"]
    mean_b: Float[Array, "groups columns"]
    square_a: Float[Array, "groups rows"]
    square_b: Float[Array, "groups columns"]


@partial(jax.jit, static_argnames=("sides", "batches", "correlation"))
def estimate(
    of: Any,
    added: Any,
    alive: Bool[Array, "one chains"],
    mass: list[dict[str, Array]],
    *,
    sides: tuple[Side, Side],
    batches: int,
    correlation: bool,
) -> tuple[Any, Any]:
    """Values and errors, query set → probe set → array."""
    alive = alive[0]
    if added:
        pooled = jax.tree.map(lambda x: x[0].reshape(-1, *x.shape[3:]), added)
        both = pooled.both
        groups = _Groups(both.weight, both.mean_a, both.mean_b, pooled.square_a, pooled.square_b)

        def comoment(i: Array) -> Array:
            return both.comoment[:, i]

    else:
        parts = jax.tree.map(lambda x: x[0], of)
        a, b = (_cut(side.join(parts), alive, batches) for side in sides)
        groups = _Groups(a.size, a.mean, b.mean, a.square, b.square)

        def comoment(i: Array) -> Array:
            draws = a.centered[..., i]
            return jnp.einsum("gd,gdn->gn", draws, b.centered, precision="highest")

    groups = groups._replace(size=groups.size * jnp.repeat(alive, batches))
    counted = [side.columns.join(m) > 0 for side, m in zip(sides, mass, strict=True)]
    one = partial(_row, groups, comoment, counted, correlation)
    rows = jnp.arange(groups.mean_a.shape[1])
    block = max(1, _BLOCK // groups.mean_b.size)
    whole = block >= rows.size
    found = jax.vmap(one)(rows) if whole else jax.lax.map(one, rows, batch_size=block)
    return _by_set(found[0], sides), _by_set(found[1], sides)


def _by_set(
    x: Float[Array, "rows columns"], sides: tuple[Side, Side]
) -> dict[str, dict[str, Float[Array, "..."]]]:
    """Query set → probe set → `[*losses of the query set, *losses of the probe set]`."""
    queries, probes = (side.columns for side in sides)
    lead = dict(zip(queries.names, map(len, queries.shapes), strict=True))
    parts = queries.split(x.T).items()  # [columns, *losses]
    return {name: probes.split(jnp.moveaxis(y, 0, lead[name])) for name, y in parts}


class _Cut(NamedTuple):
    """Draws by group: how many, their mean, squares about it, and what is left of each draw."""

    size: Float[Array, " groups"]
    mean: Float[Array, "groups columns"]
    square: Float[Array, "groups columns"]
    centered: Float[Array, "groups draws columns"]


def _cut(x: Float[Array, "chains draws columns"], alive: Array, batches: int) -> _Cut:
    """Chains cut into groups of consecutive draws; the shorter are filled up with 0."""
    draws = x.shape[1]
    size = np.bincount(batch_of(np.arange(draws), draws, batches), minlength=batches)
    start = np.cumsum(size) - size
    index = np.minimum(start[:, None] + np.arange(size.max()), draws - 1)
    used = (np.arange(size.max()) < size[:, None])[None, ..., None]
    x = jnp.where(alive[:, None, None], x, 0)[:, index]
    mean = jnp.sum(jnp.where(used, x, 0), axis=2) / size[None, :, None].astype(x.dtype)
    centered = jnp.where(used, x - mean[:, :, None], 0)
    return _Cut(
        jnp.tile(jnp.asarray(size, x.dtype), len(x)),
        *(y.reshape(-1, *y.shape[2:]) for y in (mean, jnp.sum(centered**2, axis=2), centered)),
    )


def _row(
    groups: _Groups, comoment: Any, counted: list[Array], correlation: bool, i: Array
) -> tuple[Float[Array, " columns"], Float[Array, " columns"]]:
    """The influences on one query, and their errors."""
    total = jnp.sum(groups.size)
    share = (groups.size / total)[:, None]
    number = jnp.sum(groups.size > 0, dtype=total.dtype)
    each = jnp.maximum(groups.size, 1)[:, None]

    def mean(x: Array) -> Array:  # [1, columns]
        return jnp.sum(jnp.where(share > 0, share * x, 0), axis=0, keepdims=True)

    def error(x: Array) -> Array:
        squares = jnp.sum(jnp.where(share > 0, (share * x) ** 2, 0), axis=0)
        return jnp.sqrt(squares * number / (number - 1))

    def counts(x: Array) -> Array:  # 0 where either side is excluded
        return jnp.where(counted[0][i] & counted[1], x, 0)

    a, b = groups.mean_a[:, i][:, None], groups.mean_b
    a, b = a - mean(a), b - mean(b)
    x = comoment(i) / each + a * b
    covariance = mean(x)
    if not correlation:
        bessel = total / (total - 1)
        return counts(-bessel * covariance[0]), counts(bessel * error(x - covariance))
    y, z = groups.square_a[:, i][:, None] / each + a**2, groups.square_b / each + b**2
    own, other = mean(y), mean(z)
    moves = (own > 0) & (other > 0)
    own, other = jnp.where(moves, own, 1), jnp.where(moves, other, 1)
    scale = jnp.sqrt(own) * jnp.sqrt(other)
    r = covariance / scale
    spread = (x - covariance) / scale - r / 2 * ((y - own) / own + (z - other) / other)
    r, stderr = (jnp.where(moves[0], v, jnp.nan) for v in (r[0], error(spread)))
    return counts(r), counts(stderr)
