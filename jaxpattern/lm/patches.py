"""A stacked parameter with a part replaced, which the forward pass can read without making it.

A restriction writes a head into the stack `[layer, …]` of all layers. Under `vmap` over chains the
result is a copy of the stack for every chain, and a scan over the layers would make it real. So the
array that `write` returns, correct as it is, is *remembered* with what it was made of: the forward
pass, which is handed the very same array, replaces the part inside the layer, and the copy, which
nothing then reads, is not computed. Where the array has gone through a boundary (a `jit`, a
`checkpoint`) it is another one, and is read as it is: right, only larger.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpattern.validation import is_concrete


class Entry(NamedTuple):
    """A part of one layer of a stack.

    Attributes:
        layer: which layer.
        slots: indices R of the axis after the layer, or None for all of it.
        value: `[R, …]`, or the whole array of the layer.
    """

    layer: Int[Array, ""]
    slots: Int[Array, " slots"] | None
    value: Float[Array, "..."]


class Patched(NamedTuple):
    """A stack, and what is written into it."""

    base: Float[Array, "layer ..."]
    entries: tuple[Entry, ...]


_made: dict[int, tuple[weakref.ref[Array], Patched]] = {}


def write(stack: Float[Array, "layer ..."], entries: tuple[Entry, ...]) -> Array:
    """The stack with the entries in it."""
    dense = stack
    for layer, slots, value in entries:
        index = layer if slots is None else (layer, slots)
        dense = dense.at[index].set(value, mode="drop", unique_indices=True)
    if not is_concrete(dense):
        known = patched(stack)
        made = Patched(known.base, known.entries + entries)
        number = id(dense)
        # The array is gone before its number is given to another.
        _made[number] = (weakref.ref(dense, lambda _: _made.pop(number, None)), made)
    return dense


def patched(stack: Float[Array, "layer ..."]) -> Patched:
    """What the array was made of; itself where nothing was written."""
    reference, made = _made.get(id(stack), (None, None))
    if reference is None or made is None or reference() is not stack:
        return Patched(stack, ())
    return made


class Weight(NamedTuple):
    """A parameter of one layer, with the heads that are replaced in it.

    Attributes:
        base: the array of the layer.
        heads: for each entry whether it is in this layer, its slots, and its value.
    """

    base: Float[Array, "..."]
    heads: tuple[tuple[Bool[Array, ""], Int[Array, " slots"], Float[Array, "..."]], ...] = ()


def of_layer(base: Array, entries: tuple[Entry, ...], layer: Int[Array, ""]) -> Weight:
    """A parameter at one layer of the scan; what is written later replaces what was before."""
    heads: list[tuple[Array, Array, Array]] = []
    for entry in entries:
        here = entry.layer == layer
        if entry.slots is None:
            heads = [(before & ~here, slots, value) for before, slots, value in heads]
            base = jnp.where(here, entry.value, base)
        elif base.ndim < 3:
            # A bias is smaller than what it is added to.
            whole = base.at[entry.slots].set(entry.value, unique_indices=True)
            base = jnp.where(here, whole, base)
        else:
            heads.append((here, entry.slots, entry.value))
    return Weight(base, tuple(heads))


def _places(here: Array, slots: Array, num: int) -> tuple[Array, Array]:
    """Which slot is which head `[R, H]`, and which heads are replaced `[H]`."""
    place_RxH = here & (slots[:, None] == jnp.arange(num)[None, :])
    return place_RxH, jnp.any(place_RxH, axis=0)


def into_heads(x_NxD: Array, weight: Weight) -> Array:
    """y_h = x W_h, `[N, H, K]`; a replaced head is computed beside the others and put in."""
    y_NxHxK = jnp.einsum("nd,hdk->nhk", x_NxD, weight.base)
    for here, slots, w_RxDxK in weight.heads:
        place_RxH, mask_H = _places(here, slots, y_NxHxK.shape[1])
        y_NxRxK = jnp.einsum("nd,rdk->nrk", x_NxD, w_RxDxK)
        own_NxHxK = jnp.einsum("nrk,rh->nhk", y_NxRxK, place_RxH.astype(x_NxD.dtype))
        y_NxHxK = jnp.where(mask_H[None, :, None], own_NxHxK, y_NxHxK)
    return y_NxHxK


def out_of_heads(z_NxHxK: Array, weight: Weight) -> Array:
    """Σ_h z_h W_h, `[N, D]`; a replaced head is left out of the sum and added with its own."""
    added_NxD: list[Array] = []
    # Backwards: of two writes to a head the later one finds it, and takes it away.
    for here, slots, w_RxKxD in reversed(weight.heads):
        place_RxH, mask_H = _places(here, slots, z_NxHxK.shape[1])
        own_NxRxK = jnp.einsum("nhk,rh->nrk", z_NxHxK, place_RxH.astype(z_NxHxK.dtype))
        added_NxD.append(jnp.einsum("nrk,rkd->nd", own_NxRxK, w_RxKxD))
        z_NxHxK = jnp.where(mask_H[None, :, None], 0, z_NxHxK)
    return sum(added_NxD, jnp.einsum("nhk,hkd->nd", z_NxHxK, weight.base))
