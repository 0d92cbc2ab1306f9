"""Restrictions: a lens on the parameter tree that says which weights a chain may move.

A head, an MLP or a layer is a set of coordinates of the weights. `select` reads them as a
position, `embed` writes a position back into the full weights. Both are pytrees whose leaves are
the index arrays, so restrictions of one shape (all heads of a layer) can be stacked and vmapped.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, PyTree

from jaxpattern.pytrees import register_pytree
from jaxpattern.types import Params, Position
from jaxpattern.validation import holds, is_concrete


@register_pytree
@dataclass(frozen=True, eq=False)
class Restriction:
    """A lens on the weights: `select(params) → position`, `embed(position, params) → params`.

    `embed(select(params), params)` must give `params` back. The localization γ acts on the
    position. Functions are wrapped in `jax.tree_util.Partial`; bind arrays with a `Partial` of
    your own to make them leaves.
    """

    select: Callable[[Params], Position]
    embed: Callable[[Position, Params], Params]

    def __post_init__(self) -> None:
        for name in ("select", "embed"):
            function = getattr(self, name)
            # Unflattening passes placeholders through here: only functions are wrapped.
            if callable(function) and not isinstance(function, Partial):
                object.__setattr__(self, name, Partial(function))

    def __str__(self) -> str:
        """What it restricts to, where `select` can tell."""
        describe = getattr(getattr(self.select, "func", None), "describe", None)
        return repr(self) if describe is None else describe(*self.select.args)  # type: ignore[attr-defined]


def by_path(*patterns: str) -> Restriction:
    """All weights whose path matches a pattern, such as `"layers/1/attn/*"`.

    Paths join the keys of the parameter tree with `/`; patterns follow `fnmatch`, and `*` matches
    across `/` as well.

    Raises:
        ValueError: (when it meets the parameters) a pattern matches no path.
    """
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"patterns must be one or more non-empty strings, got {patterns}")

    return Restriction(Partial(_PathSelect(patterns)), Partial(_replace))


@dataclass(frozen=True)
class _PathSelect:
    patterns: tuple[str, ...]

    def __call__(self, params: Params) -> Position:
        leaves = _by_name(params)
        for pattern in self.patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in leaves):
                raise ValueError(f"no parameter matches {pattern!r}; there are {sorted(leaves)}")
        return {
            name: leaf
            for name, leaf in leaves.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)
        }


def by_slice(
    slices: Mapping[str, tuple[int, int | np.integer | Sequence[int] | np.ndarray | Array]],
) -> Restriction:
    """Slices of an axis of some arrays: `{path: (axis, index)}`, index an integer or several.

    An attention head is the same index of the head axis of its query, key, value and output
    arrays: `by_slice({"layers/1/attn/q": (0, 3), "layers/1/attn/o": (0, 3)})`. Indices are leaves
    of the restriction, so heads of equal shape stack and vmap.

    Raises:
        TypeError: not a mapping to pairs of integers.
        ValueError: nothing is named, an index is named twice, or (when it meets the parameters) a
            path, axis or index does not exist.

    Examples:
        >>> row = jp.by_slice({"q": (0, 1)})
        >>> row.select({"q": jnp.arange(6.0).reshape(3, 2)})
        {'q': Array([2., 3.], dtype=float32)}
    """
    if not isinstance(slices, Mapping):
        raise TypeError(f"slices must map paths to (axis, index), got {type(slices).__name__}")
    if not slices:
        raise ValueError("slices is empty; it must name at least one array")
    axes: dict[str, int] = {}
    indices: dict[str, Array] = {}
    for name, pair in slices.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"slices[{name!r}] must be (axis, index), got {pair!r:.80}")
        axis, index = pair
        if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
            raise TypeError(f"slices[{name!r}]: axis must be an integer, got {axis!r:.80}")
        numbers = index if isinstance(index, jax.Array) else np.asarray(index)
        if numbers.size and not jnp.issubdtype(numbers.dtype, jnp.integer):
            raise TypeError(f"slices[{name!r}]: index must be integers, got {numbers.dtype}")
        axes[name], indices[name] = int(axis), jnp.asarray(numbers, jnp.int32)
    for name, index in indices.items():
        if index.size == 0:
            raise ValueError(f"slices[{name!r}] selects nothing")
        if is_concrete(index) and len(np.unique(index)) != index.size:
            raise ValueError(f"slices[{name!r}] names an index twice: {np.asarray(index).tolist()}")
    static = tuple(sorted(axes.items()))
    return Restriction(
        Partial(_SliceSelect(static), indices), Partial(_SliceEmbed(static), indices)
    )


@dataclass(frozen=True)
class _SliceSelect:
    axes: tuple[tuple[str, int], ...]

    def __call__(self, indices: dict[str, Array], params: Params) -> Position:
        leaves = _by_name(params)
        for name, axis in self.axes:
            _check_slice(leaves, name, axis, indices[name])
        return {
            name: jnp.take(leaves[name], indices[name], axis=axis, mode="fill")
            for name, axis in self.axes
        }


@dataclass(frozen=True)
class _SliceEmbed:
    axes: tuple[tuple[str, int], ...]

    def __call__(self, indices: dict[str, Array], position: Position, params: Params) -> Params:
        leaves = _by_name(params)
        updated = {
            name: leaves[name]
            .at[(slice(None),) * (axis % leaves[name].ndim) + (indices[name],)]
            .set(position[name], mode="drop", unique_indices=True)
            for name, axis in self.axes
        }
        return _replace(updated, params)


def by_mask(mask: PyTree[Bool[Array | np.ndarray, "..."] | bool | np.bool_]) -> Restriction:
    """The weights at which a boolean mask, a tree of the structure of the parameters, is true.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the mask is false everywhere, or (when it meets the parameters) has another
            structure or other shapes.
    """
    indices: dict[str, Array] = {}
    shapes = {}
    for name, leaf in _by_name(mask).items():
        leaf = np.asarray(leaf)
        if leaf.dtype != bool:
            raise TypeError(f"mask at {name!r} must be boolean, got {leaf.dtype}")
        shapes[name] = leaf.shape
        if leaf.any():
            indices[name] = jnp.asarray(np.flatnonzero(leaf), jnp.int32)
    if not indices:
        raise ValueError("mask is false everywhere; the restriction selects nothing")
    static = tuple(sorted(shapes.items()))
    return Restriction(Partial(_MaskSelect(static), indices), Partial(_mask_embed, indices))


@dataclass(frozen=True)
class _MaskSelect:
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def __call__(self, indices: dict[str, Array], params: Params) -> Position:
        leaves = _by_name(params)
        if {name: leaf.shape for name, leaf in leaves.items()} != dict(self.shapes):
            raise ValueError(
                "mask must have the structure and shapes of the parameters, "
                f"{ {name: leaf.shape for name, leaf in leaves.items()} }, got {dict(self.shapes)}"
            )
        return {name: leaves[name].reshape(-1)[index] for name, index in indices.items()}


def _mask_embed(indices: dict[str, Array], position: Position, params: Params) -> Params:
    leaves = _by_name(params)
    updated = {
        name: leaves[name]
        .reshape(-1)
        .at[index]
        .set(position[name], indices_are_sorted=True, unique_indices=True)
        .reshape(leaves[name].shape)
        for name, index in indices.items()
    }
    return _replace(updated, params)


def union(params: Params, *restrictions: Restriction) -> Restriction:
    """The weights that any of the restrictions selects.

    Raises:
        TypeError: one of them is not a `Restriction`.
        ValueError: two of them overlap; a weight would be counted twice.
    """
    if not restrictions:
        raise ValueError("union needs at least one restriction")
    masks = [restriction_mask(restriction, params) for restriction in restrictions]
    counts = jax.tree.map(lambda *leaves: sum(leaf.astype(int) for leaf in leaves), *masks)
    shared = sum(int((leaf > 1).sum()) for leaf in jax.tree.leaves(counts))
    if shared:
        raise ValueError(f"restrictions overlap: {shared} weights are selected more than once")
    return by_mask(jax.tree.map(lambda leaf: leaf > 0, counts))


def complement(params: Params, restriction: Restriction) -> Restriction:
    """The weights that the restriction does not select.

    Raises:
        ValueError: it selects all of them.
    """
    mask = jax.tree.map(np.logical_not, restriction_mask(restriction, params))
    if not any(leaf.any() for leaf in jax.tree.leaves(mask)):
        raise ValueError("the restriction selects every weight; its complement is empty")
    return by_mask(mask)


def restriction_mask(restriction: Restriction, params: Params) -> PyTree[Bool[np.ndarray, "..."]]:
    """The boolean mask, a tree like the parameters, of the weights a restriction selects.

    Raises:
        TypeError: it is not a `Restriction`.
        ValueError: the restriction is not a choice of coordinates (it mixes or repeats them).
    """
    _check_type(restriction)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    ones = jax.tree.map(jnp.ones_like, restriction.select(zeros))
    # A comparison of scalars is no array.
    written = restriction.embed(ones, zeros)
    mask = jax.tree.map(lambda leaf: np.asarray(np.asarray(leaf) != 0), written)
    selected = sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask))
    size = sum(leaf.size for leaf in jax.tree.leaves(ones))
    if selected != size:
        raise ValueError(
            f"restriction must select coordinates: its position has {size} numbers but writes "
            f"{selected} weights"
        )
    return mask


def check_restriction(restriction: Any, params: Params) -> None:
    """A lens that selects something and puts it back where it was."""
    _check_type(restriction)
    position = restriction.select(params)
    for leaf in jax.tree.leaves(position):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"restriction must select floating-point weights, got {jnp.result_type(leaf)}"
            )
    if sum(jnp.size(leaf) for leaf in jax.tree.leaves(position)) == 0:
        raise ValueError("restriction selects nothing")
    back = restriction.embed(position, params)
    if jax.tree.structure(back) != jax.tree.structure(params):  # type: ignore[operator]
        raise ValueError("restriction.embed must return a tree of the structure of params")
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(back), strict=True
    ):
        name = _name(path)
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(
                f"restriction.embed changes {name} from {old.dtype}{list(old.shape)} "
                f"to {new.dtype}{list(new.shape)}"
            )
        # What a restriction leaves alone is the same array, which may be large.
        if new is old:
            continue
        # NumPy compares constants under jit too, where jnp would trace.
        if is_concrete(new) and is_concrete(old) and not np.array_equal(new, old):
            raise ValueError(f"restriction.embed(select(params), params) changes {name}")


def _check_type(restriction: Any) -> None:
    if not isinstance(restriction, Restriction):
        raise TypeError(f"restriction must be a Restriction, got {type(restriction).__name__}")
    for name in ("select", "embed"):
        if not callable(getattr(restriction, name)):
            raise TypeError(
                f"restriction.{name} must be a function, got {getattr(restriction, name)!r:.80}"
            )


def _check_slice(leaves: dict[str, Array], name: str, axis: int, index: Array) -> None:
    if name not in leaves:
        raise ValueError(f"no parameter is called {name!r}; there are {sorted(leaves)}")
    shape = leaves[name].shape
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"slices[{name!r}]: axis {axis} does not exist in shape {list(shape)}")
    if not holds(lambda i: (i.min() >= 0) & (i.max() < shape[axis]), index):
        raise ValueError(
            f"slices[{name!r}]: index {np.asarray(index).tolist()} is outside axis {axis} "
            f"of length {shape[axis]}"
        )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_name(tree: Any) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if _name(path) in leaves:
            raise ValueError(f"two parameters are called {_name(path)!r}; rename one of them")
        leaves[_name(path)] = leaf
    return leaves


def _replace(position: Position, params: Params) -> Params:
    """The parameters with the named leaves replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: position.get(_name(path), leaf), params
    )
