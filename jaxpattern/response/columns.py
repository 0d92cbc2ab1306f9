"""The columns of a response: which probe sets, of which shapes, one flat axis and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


@dataclass(frozen=True)
class Columns:
    """Names and shapes of the probe sets of a response; static, so hashable and the same in `jit`.

    Attributes:
        names: the probe sets, in the order in which `join` lays them side by side.
        shapes: shape of the columns of each: that of its losses, or `()` for a grouped response.
        loss_shapes: shape of the losses of each probe set, also where the response is grouped;
            None where a grouped response was made without them.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    loss_shapes: tuple[tuple[int, ...], ...] | None = None

    @property
    def grouped(self) -> bool:
        """Whether a column is a whole probe set, as `group_mean` makes it."""
        return all(shape == () for shape in self.shapes)

    @property
    def size(self) -> int:
        """N, the number of columns."""
        return sum(map(math.prod, self.shapes))

    def group(self) -> Columns:
        """The columns of the grouped response: one per probe set."""
        return replace(self, shapes=((),) * len(self.names))

    @partial(jax.jit, static_argnums=0)
    def join(self, parts: Mapping[str, Shaped[Array, "..."]]) -> Shaped[Array, "..."]:
        """All probe sets side by side: name → `[..., *shape]` to `[..., N]`."""
        flat = [
            jnp.reshape(parts[name], (*jnp.shape(parts[name])[: np.ndim(parts[name]) - k], -1))
            for name, k in zip(self.names, map(len, self.shapes), strict=True)
        ]
        return jnp.concatenate(flat, axis=-1)

    def split(self, flat: Shaped[Array, "..."]) -> dict[str, Shaped[Array, "..."]]:
        """The inverse of `join`: `[..., N]` to name → `[..., *shape]`."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1].tolist()
        pieces = zip(self.names, self.shapes, jnp.split(flat, ends, axis=-1), strict=True)
        return {name: piece.reshape(*flat.shape[:-1], *shape) for name, shape, piece in pieces}

    def mean(
        self, flat: Shaped[Array, "... columns"], mass: Shaped[Array, " columns"]
    ) -> Shaped[Array, "... groups"]:
        """Σ_{z∈g} q_z x_z / Σ_{z∈g} q_z of each probe set.

        Columns of mass 0 count nowhere, whatever they hold; a probe set without mass has mean 0.
        """
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1].tolist()
        sums, totals = [], []
        for values, share in zip(
            jnp.split(flat, ends, axis=-1), jnp.split(mass, ends), strict=True
        ):
            lead = (1,) * (values.ndim - 1)
            share_row = share.reshape(*lead, -1)
            sums.append(jnp.sum(jnp.where(share_row > 0, values * share_row, 0), axis=-1))
            totals.append(jnp.sum(share))
        total = jnp.stack(totals).reshape(*(1,) * (flat.ndim - 1), -1)
        return jnp.stack(sums, axis=-1) / jnp.where(total > 0, total, 1)
