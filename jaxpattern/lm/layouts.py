"""A description of where the parts of a transformer lie in a tree of parameters of one's own.

It serves trees in which every layer is a subtree of its own, as flax, equinox and haiku make them.
Layer and head are numbers that a restriction holds as leaves, so parts of one kind run as one
program; a choice of the layer by `where` fuses with what reads the parameters.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from jaxpattern.lm.names import Part, parse
from jaxpattern.restriction import Restriction, union
from jaxpattern.types import Params, Position

KINDS = ("embed", "head", "attn", "mlp", "layer", "unembed")
_LAYER = "{layer}"


@dataclass(frozen=True)
class HeadAxis:
    """Where the heads of an array are: `count` blocks of equal length along an axis."""

    axis: int
    count: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Which arrays of a tree are which part; from `layout`.

    Attributes:
        params: the tree.
        heads: pattern with `{layer}` → its head axis.
        layers: kind of part → layer → arrays in it, by their path with `{layer}`.
        outer: "embed" and "unembed" → paths.
    """

    params: Params
    heads: dict[str, HeadAxis]
    layers: dict[str, dict[int, dict[str, str]]]
    outer: dict[str, tuple[str, ...]]

    @property
    def num_heads(self) -> int:
        """Heads of a layer; arrays of fewer are shared by several."""
        return max((axis.count for axis in self.heads.values()), default=0)


def layout(
    params: Params,
    *,
    head: Mapping[str, int | tuple[int, int]] | None = None,
    attn: Sequence[str] = (),
    mlp: Sequence[str] = (),
    layer: Sequence[str] = (),
    embed: Sequence[str] = (),
    unembed: Sequence[str] = (),
) -> Layout:
    """Name the parts of a transformer of your own; `component` and `components` take the result.

        jp.lm.layout(params, head={"block_{layer}/attn/query/kernel": 1,
                                   "block_{layer}/attn/out/kernel": 0}, mlp=["block_{layer}/mlp/*"])

    Args:
        params: its parameters, any pytree; paths join keys, attributes and indices with `/`.
        head: path with `{layer}` → the axis of heads, or (axis, number of heads) where an axis
            holds the heads one after another, as `[D, H·K]` does. An array of fewer heads than the
            most (keys and values of grouped queries) is shared by heads in order.
        attn: paths with `{layer}` of all that belongs to attention; `*` matches anything.
        mlp: the same of the MLP.
        layer: the same of the whole layer.
        embed: paths of the embedding.
        unembed: paths of the read-out.

    Returns:
        A `Layout`.

    Raises:
        TypeError: an axis is no integer or pair of them.
        ValueError: a path matches nothing or lacks `{layer}`, an axis does not exist or does not
            divide into its heads, or nothing is named.
    """
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(jnp.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    named = {
        "head": tuple(head or ()),
        "attn": tuple(attn),
        "mlp": tuple(mlp),
        "layer": tuple(layer),
    }
    outer = {"embed": tuple(embed), "unembed": tuple(unembed)}
    if not any(named.values()) and not any(outer.values()):
        raise ValueError("layout names no part; give at least one of head, mlp, layer, embed")
    layers = {
        kind: _find_layers(kind, patterns, list(shapes))
        for kind, patterns in named.items()
        if patterns
    }
    heads = {
        pattern: _head_axis(pattern, place, shapes, layers["head"])
        for pattern, place in (head or {}).items()
    }
    most = max((axis.count for axis in heads.values()), default=1)
    for pattern, axis in heads.items():
        if most % axis.count:
            raise ValueError(
                f"head[{pattern!r}] has {axis.count} heads, which do not divide {most}"
            )
    found = {
        kind: tuple(path for pattern in patterns for path in _matching(kind, pattern, list(shapes)))
        for kind, patterns in outer.items()
        if patterns
    }
    return Layout(params, heads, layers, found)


def _matching(kind: str, pattern: str, paths: list[str]) -> list[str]:
    matches = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
    if not matches:
        raise ValueError(f"{kind}: no parameter matches {pattern!r}; there are {paths[:8]}")
    return matches


def _find_layers(kind: str, patterns: Sequence[str], paths: list[str]) -> dict[int, dict[str, str]]:
    """Layer → path with `{layer}` → path."""
    found: dict[int, dict[str, str]] = {}
    for pattern in patterns:
        if pattern.count(_LAYER) != 1:
            raise ValueError(f"{kind}: {pattern!r} must have one {_LAYER}")
        before, after = (fnmatch.translate(side)[4:-3] for side in pattern.split(_LAYER))
        expression = re.compile(f"(?s:({before})(\\d+)({after}))")
        matches = [match for path in paths if (match := expression.fullmatch(path))]
        if not matches:
            raise ValueError(f"{kind}: no parameter matches {pattern!r}; there are {paths[:8]}")
        for match in matches:
            start, number, end = match.groups()
            found.setdefault(int(number), {})[start + _LAYER + end] = match.group(0)
    return dict(sorted(found.items()))


def _head_axis(
    pattern: str,
    place: int | tuple[int, int],
    shapes: Mapping[str, tuple[int, ...]],
    layers: dict[int, dict[str, str]],
) -> HeadAxis:
    pair = place if isinstance(place, tuple) else (place,)
    if not 1 <= len(pair) <= 2 or not all(isinstance(n, int) for n in pair):
        raise TypeError(f"head[{pattern!r}] must be an axis or (axis, number), got {place!r:.80}")
    found = {shapes[paths[pattern]] for paths in layers.values() if pattern in paths}
    if len(found) != 1:
        raise ValueError(f"head[{pattern!r}] must be one shape in all layers, got {sorted(found)}")
    (shape,) = found
    if not -len(shape) <= pair[0] < len(shape):
        raise ValueError(f"head[{pattern!r}]: axis {pair[0]} does not exist in {list(shape)}")
    axis = pair[0] % len(shape)
    count = pair[1] if len(pair) == 2 else shape[axis]
    if count < 1 or shape[axis] % count:
        raise ValueError(
            f"head[{pattern!r}]: {count} heads do not divide axis {axis} of {list(shape)}"
        )
    return HeadAxis(axis, count)


def component(layout: Layout, name: str | Sequence[str]) -> Restriction:
    """The restriction of one part, or of the union of several that do not overlap."""
    if isinstance(name, str):
        return _restriction(layout, _parse(layout, name))
    return union(layout.params, *(_restriction(layout, _parse(layout, one)) for one in name))


def components(
    layout: Layout, names: Sequence[str] | None, kinds: Sequence[str]
) -> dict[str, Restriction]:
    """Name → restriction of the named parts, or of all of some kinds."""
    if names is None:
        found = _list_parts(layout, kinds)
        if not found:
            raise ValueError(f"the layout has no part of kinds {tuple(kinds)}")
    else:
        found = [_parse(layout, name) for name in names]
    return {str(part): _restriction(layout, part) for part in found}


def _list_parts(layout: Layout, kinds: Sequence[str]) -> list[Part]:
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds must be some of {KINDS}, each once, got {tuple(kinds)}")
    parts = []
    for kind in kinds:
        layers = layout.layers.get(kind, {})
        if kind in layout.outer:
            parts.append(Part(kind))
        elif kind == "head":
            parts += [Part(kind, (i, h)) for i in layers for h in range(layout.num_heads)]
        else:
            parts += [Part(kind, (i,)) for i in layers]
    return parts


def _parse(layout: Layout, name: str) -> Part:
    last = max((i for layers in layout.layers.values() for i in layers), default=-1)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(layout.params)
    ]
    return parse(
        name,
        layers=range(last + 1),
        counts={"head": layout.num_heads},
        parameters=paths,
        listed=lambda: map(str, _list_parts(layout, KINDS)),
    )


def _restriction(layout: Layout, part: Part) -> Restriction:
    if part.kind in ("full", "parameter") or part.kind in layout.outer:
        keep = {"full": None, "parameter": (part.path,)}.get(part.kind) or layout.outer.get(
            part.kind
        )
        return Restriction(Partial(_Whole(keep)), _put)
    layers = layout.layers.get(part.kind, {})
    if not part.numbers or part.numbers[0] not in layers:
        raise ValueError(f"the layout does not say where {str(part)!r} is")
    shapes = {path: leaf.shape for path, leaf in _leaves(layout.params).items()}

    def signature(layer: int) -> list[tuple[str, tuple[int, ...]]]:
        return sorted((name, shapes[path]) for name, path in layers[layer].items())

    own = signature(part.numbers[0])
    alike = [layer for layer in layers if signature(layer) == own]
    lens = _Layers(
        tuple((name, tuple(layers[layer][name] for layer in alike)) for name, _ in own),
        tuple((name, layout.heads[name]) for name, _ in own) if part.kind == "head" else (),
        layout.num_heads,
    )
    numbers = np.asarray([alike.index(part.numbers[0]), *part.numbers[1:]], np.int32)
    index = jnp.asarray(numbers)
    return Restriction(Partial(_Select(lens), index), Partial(_Embed(lens), index))


def _leaves(params: Params) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _put(position: Position, params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: position.get(
            jax.tree_util.keystr(path, simple=True, separator="/"), leaf
        ),
        params,
    )


@dataclass(frozen=True)
class _Whole:
    """All of some arrays, None for all of them."""

    paths: tuple[str, ...] | None

    def __call__(self, params: Params) -> Position:
        return {k: v for k, v in _leaves(params).items() if self.paths is None or k in self.paths}


@dataclass(frozen=True)
class _Layers:
    """Arrays that layers have in one shape, and where heads are in them."""

    paths: tuple[tuple[str, tuple[str, ...]], ...]
    heads: tuple[tuple[str, HeadAxis], ...]
    num_heads: int

    def split(self, name: str, array: Array) -> Array:
        """The heads of an array as its first axis; the array itself where it is no head."""
        place = dict(self.heads).get(name)
        if place is None:
            return array
        shape = array.shape
        blocks = (*shape[: place.axis], place.count, -1, *shape[place.axis + 1 :])
        return jnp.moveaxis(array.reshape(blocks), place.axis, 0)

    def join(self, name: str, array: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `split`."""
        place = dict(self.heads).get(name)
        return array if place is None else jnp.moveaxis(array, 0, place.axis).reshape(shape)

    def head(self, name: str, index: Array) -> Array:
        """The number of the head in this array, which several may share."""
        return index[1] // (self.num_heads // dict(self.heads)[name].count)


@dataclass(frozen=True)
class _Select:
    lens: _Layers

    def __call__(self, index: Array, params: Params) -> Position:
        leaves, position = _leaves(params), {}
        for name, paths in self.lens.paths:
            array = jnp.stack([self.lens.split(name, leaves[path]) for path in paths])[index[0]]
            position[name] = array[self.lens.head(name, index)] if self.lens.heads else array
        return position


@dataclass(frozen=True)
class _Embed:
    lens: _Layers

    def __call__(self, index: Array, position: Position, params: Params) -> Params:
        leaves, written = _leaves(params), {}
        for name, paths in self.lens.paths:
            for i, path in enumerate(paths):
                old = self.lens.split(name, leaves[path])
                chosen, new = index[0] == i, position[name]
                if self.lens.heads:
                    chosen &= jnp.arange(old.shape[0]) == self.lens.head(name, index)
                    chosen, new = chosen.reshape(-1, *(1,) * (old.ndim - 1)), new[None]
                chosen, new = (jnp.broadcast_to(x, old.shape) for x in (chosen, new))
                written[path] = self.lens.join(
                    name, jnp.where(chosen, new, old), leaves[path].shape
                )
        return _put(written, params)
