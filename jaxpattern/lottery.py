"""Drawing indices with probabilities proportional to given weights, exactly zero where these are.

Prefix sums in float32 do not do: those of a parallel scan are not monotone, so that an entry of
weight 0 may be drawn, and 24 bits cannot tell 2²⁴ entries apart. Here weights become integers with
a sum of about 2³¹, whose prefix sums are exact, on two levels: √N blocks, and √N entries of each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt

_TICKETS = 2.0**31


class Lottery(NamedTuple):
    """Prefix sums of the tickets of blocks, and within each block."""

    blocks: UInt[Array, "1 fan"]
    entries: UInt[Array, "blocks fan"]


def make_lottery(weights: Float[Array, " entries"]) -> Lottery:
    """The lottery of weights that are not negative.

    The probability of an entry is right to 2⁻³¹ of that of its block, and where it is positive it
    stays so.
    """
    fan = 1
    while fan * fan < weights.shape[0]:
        fan *= 2
    entries = jnp.pad(weights, (0, fan * fan - weights.shape[0])).reshape(fan, fan)
    return Lottery(_tickets(entries.sum(axis=1)[None]), _tickets(entries))


def _tickets(weights: Float[Array, "rows fan"]) -> UInt[Array, "rows fan"]:
    largest = weights.max(axis=1, keepdims=True)
    weights = weights / jnp.where(largest == 0, 1.0, largest)  # the sum of small ones is not 0
    total = weights.sum(axis=1, keepdims=True)
    share = weights / jnp.where(total == 0, 1.0, total)
    number = jnp.maximum(jnp.round(share * _TICKETS), 1.0).astype(jnp.uint32)
    return jnp.cumsum(jnp.where(weights > 0, number, 0), axis=1, dtype=jnp.uint32)


def draw(key: Key[Array, ""], lottery: Lottery, size: int) -> Int[Array, " size"]:
    """Indices drawn with replacement."""
    first, second = (jax.random.fold_in(key, i) for i in range(2))
    zero = jnp.zeros(size, jnp.int32)
    block = _search(first, lottery.blocks, zero)
    return block * lottery.entries.shape[1] + _search(second, lottery.entries, block)


def _search(
    key: Key[Array, ""], sums: UInt[Array, "rows fan"], row: Int[Array, " size"]
) -> Int[Array, " size"]:
    """The entry of each row that holds a ticket drawn from all of the row's."""
    fan = sums.shape[1]
    ticket = jax.random.randint(key, row.shape, 0, sums[row, fan - 1], jnp.uint32)
    found, step = jnp.zeros_like(row), fan // 2
    while step:
        found = jnp.where(sums[row, found + step - 1] <= ticket, found + step, found)
        step //= 2
    return found
