"""The parts of a loaded model as restrictions: heads, groups, MLPs, layers and embeddings.

A head is the slices of its queries and its output, and the key/value head that it reads, with the
biases of queries, keys and values; the bias of the output and the norms belong to no head. Layer
and head are numbers that a restriction holds as leaves, so parts of one kind run as one program. A
position holds the slices only, and the forward pass puts them in layer by layer (`patches`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from jaxpattern.lm.names import Part, parse
from jaxpattern.lm.patches import Entry, write
from jaxpattern.lm.spec import Spec
from jaxpattern.restriction import Restriction
from jaxpattern.types import Params, Position

KINDS = ("embed", "head", "group", "attn", "mlp", "layer", "unembed")
"""The kinds of parts, in the order in which they are listed."""

_OF_QUERIES = ("W_Q", "b_Q", "W_O")
_OF_KEYS = ("W_K", "W_V", "b_K", "b_V")

_Places = dict[str, dict[int | None, tuple[int, ...] | None]]
"""Path of a parameter → layer of its stack, None for all of it → slots, None for all of them."""


@runtime_checkable
class Stacked(Protocol):
    """A model whose layers are stacked, such as what `load` and `split` give."""

    @property
    def spec(self) -> Spec:
        """What it computes."""

    @property
    def params(self) -> Params:
        """Its parameters."""

    @property
    def first_layer(self) -> int:
        """The number of the first layer in the stack."""


def list_parts(model: Stacked, kinds: Sequence[str] = KINDS) -> list[Part]:
    """All parts of these kinds."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds must be some of {KINDS}, each once, got {tuple(kinds)}")
    spec, parts = model.spec, []
    shared = spec.group_size > 1
    numbers = {"head": spec.num_heads, "group": spec.num_kv_heads if shared else 0}
    for kind in kinds:
        if kind == "embed" or kind == "unembed":
            parts += [Part(kind)] if kind in model.params else []
        elif kind in numbers:
            parts += [Part(kind, (i, j)) for i in _layers(model) for j in range(numbers[kind])]
        else:
            parts += [Part(kind, (i,)) for i in _layers(model)]
    return parts


def parts_of(
    model: Stacked, names: Iterable[str] | None = None, kinds: Sequence[str] = KINDS
) -> dict[str, Restriction]:
    """Name → restriction of the named parts, or of all of some kinds.

    Raises:
        TypeError: names are no strings.
        ValueError: a part does not exist or is named twice.
    """
    if names is None:
        found = list_parts(model, kinds)
    else:
        if isinstance(names, str):
            raise TypeError(
                f"names must be a list of names, got {names!r}; see `component` for one"
            )
        found = [_parse(model, name) for name in names]
        twice = sorted({str(part) for part in found if found.count(part) > 1})
        if twice:
            raise ValueError(f"names must be different, got {twice} more than once")
    return {str(part): _restriction(model, [part]) for part in found}


def component(model: Stacked, name: str | Sequence[str]) -> Restriction:
    """The restriction of one part, or of the union of several; what they share counts once."""
    names = [name] if isinstance(name, str) else list(name)
    if not names:
        raise ValueError("name must name at least one part")
    return _restriction(model, [_parse(model, one) for one in names])


def _parse(model: Stacked, name: str) -> Part:
    spec = model.spec
    return parse(
        name,
        layers=_layers(model),
        counts={"head": spec.num_heads, "group": spec.num_kv_heads},
        parameters=_shapes(model.params),
        listed=lambda: map(str, list_parts(model)),
    )


def _layers(model: Stacked) -> range:
    num = jax.tree.leaves(model.params["layers"])[0].shape[0]
    return range(model.first_layer, model.first_layer + num)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _places(model: Stacked, part: Part) -> _Places:
    """Where a part lies."""
    spec, paths = model.spec, list(_shapes(model.params))
    if part.kind == "full":
        return {path: {None: None} for path in paths}
    if part.kind == "parameter":
        return {part.path: {None: None}}
    if part.kind == "unembed" and spec.tied:
        raise ValueError(
            "unembed is not a part of its own: this model is tied, its read-out is the embedding "
            "and moves with it; name 'embed'"
        )
    if part.kind in ("embed", "unembed"):
        if part.kind not in model.params or (part.kind == "embed" and model.first_layer):
            raise ValueError(f"{part.kind} is not a part of the layers from {model.first_layer} on")
        return {path: {None: None} for path in paths if path.startswith(f"{part.kind}/")}
    layer = part.numbers[0] - model.first_layer
    if part.kind not in ("head", "group"):
        prefix = "layers/" if part.kind == "layer" else f"layers/{part.kind}/"
        return {path: {layer: None} for path in paths if path.startswith(prefix)}
    number, size = part.numbers[1], spec.group_size
    heads = (number,) if part.kind == "head" else tuple(range(number * size, (number + 1) * size))
    pair = (number // size,) if part.kind == "head" else (number,)
    slots = dict.fromkeys(_OF_QUERIES, heads) | dict.fromkeys(_OF_KEYS, pair)
    return {
        path: {layer: slots[path.removeprefix("layers/attn/")]}
        for path in paths
        if path.removeprefix("layers/attn/") in slots
    }


def _merge(places: Sequence[_Places]) -> _Places:
    """What any of them covers, once."""
    merged: _Places = {}
    for place in places:
        for path, layers in place.items():
            for layer, slots in layers.items():
                known = merged.setdefault(path, {})
                both = None in (slots, known.get(layer, ()))
                known[layer] = (
                    None if both else tuple(sorted({*(known.get(layer) or ()), *(slots or ())}))
                )
    return {
        path: {None: None} if None in layers else dict(sorted(layers.items(), key=str))
        for path, layers in merged.items()
    }


def _restriction(model: Stacked, parts: Sequence[Part]) -> Restriction:
    places = _merge([_places(model, part) for part in parts])
    shapes = _shapes(model.params)
    lens, indices, count = [], {}, 0
    for path in sorted(places):
        entries = places[path]
        lens.append((path, tuple(_kind(layer, slots) for layer, slots in entries.items())))
        indices[path] = tuple(
            () if layer is None
            else (np.int32(layer),) if slots is None
            else (np.int32(layer), np.asarray(slots, np.int32))
            for layer, slots in entries.items()
        )  # fmt: skip
        for layer, slots in entries.items():
            rest = shapes[path] if layer is None else shapes[path][1:]
            count += int(np.prod(rest)) // (1 if slots is None else rest[0]) * len(slots or (0,))
    templates = " + ".join(part.template for part in parts)
    numbers = np.asarray([number for part in parts for number in part.numbers], np.int32)
    leaves = jax.tree.map(jnp.asarray, (numbers, indices))
    static = _Lens(tuple(lens), templates, count)
    return Restriction(Partial(_Select(static), *leaves), Partial(_Embed(static), leaves[1]))


def _kind(layer: int | None, slots: tuple[int, ...] | None) -> str:
    return "all" if layer is None else "layer" if slots is None else "slots"


@dataclass(frozen=True)
class _Lens:
    """What all parts of a kind have in common: which parameters, and how much of each."""

    paths: tuple[tuple[str, tuple[str, ...]], ...]
    template: str
    count: int


@dataclass(frozen=True)
class _Select:
    lens: _Lens

    def __call__(self, numbers: Array, indices: Mapping[str, Any], params: Params) -> Position:
        position = {}
        for path, _ in self.lens.paths:
            leaf = _at(params, path)
            position[path] = tuple(
                leaf if not index else leaf[index[0]] if len(index) == 1 else leaf[index]
                for index in indices[path]
            )
        return position

    def describe(self, numbers: Array, indices: Mapping[str, Any]) -> str:
        """In words, such as `l0h1: 12,288 parameters`."""
        name = self.lens.template.format(*np.asarray(numbers).tolist())
        return f"{name}: {self.lens.count:,} parameters"


@dataclass(frozen=True)
class _Embed:
    lens: _Lens

    def __call__(self, indices: Mapping[str, Any], position: Position, params: Params) -> Params:
        for path, kinds in self.lens.paths:
            values = position[path]
            if kinds == ("all",):
                new = values[0]
            else:
                new = write(
                    _at(params, path),
                    tuple(
                        Entry(index[0], index[1] if len(index) == 2 else None, value)
                        for index, value in zip(indices[path], values, strict=True)
                    ),
                )
            params = _with(params, path.split("/"), new)
        return params


def _at(params: Params, path: str) -> Array:
    for key in path.split("/"):
        params = params[key]
    return params


def _with(params: Params, keys: Sequence[str], leaf: Array) -> Params:
    """The parameters with one replaced."""
    if not keys:
        return leaf
    return {**params, keys[0]: _with(params[keys[0]], keys[1:], leaf)}
