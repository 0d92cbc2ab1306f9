"""The named parts of a decoder-only transformer: heads, MLPs, layers and embeddings.

Layer and head are numbers, held as leaves of a restriction and not in its structure. So all heads
of all layers of equal shape are one group of components, which runs as one vmapped program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from jaxpattern.lm import layouts, parts
from jaxpattern.lm.layouts import Layout
from jaxpattern.lm.model import Model
from jaxpattern.lm.split import Tail
from jaxpattern.restriction import Restriction, by_path
from jaxpattern.types import Params, Position

KINDS = ("embed", "head", "mlp", "layer", "unembed")
"""The kinds of parts; `components` names those that the weights have."""


def component(model: Any, name: str | Sequence[str]) -> Restriction:
    """One part of a loaded model, or the union of several.

    Args:
        model: from `jaxpattern.lm.load`, `jaxpattern.lm.split` or `jaxpattern.lm.layout`.
        name: `l0h1` (also `L0H1`, `l0 h1`, `0:1`), a head: its query and output and the key/value
            head that it reads; `l0g0`, all heads that share a key/value head; `l0 attn`; `l0 mlp`;
            `l0`, a layer; `embed`; `unembed`; `full`; the path of a parameter; or a list of these.

    Returns:
        A `Restriction` of `model.params`; printed, it says its name and its number of parameters.

    Raises:
        TypeError: `model` is none of these, or a name is no string.
        ValueError: there is no such part, and the message has the nearest names; or it is the
            read-out of a model whose weights are tied.
    """
    if isinstance(model, Layout):
        return layouts.component(model, name)
    if isinstance(model, Model | Tail):
        return parts.component(model, name)
    raise TypeError(
        "model must come from jaxpattern.lm.load, jaxpattern.lm.split or jaxpattern.lm.layout, "
        f"got {type(model).__name__}"
    )


def components(
    model: Any,
    names: Sequence[str] | None = None,
    *,
    kinds: str | Sequence[str] | None = None,
    across_layers: bool = True,
) -> dict[str, Restriction]:
    """The parts of a transformer by name, as `susceptibilities` takes them.

    Parts of one kind and shape run as one program.

    Args:
        model: from `jaxpattern.lm.load`, `jaxpattern.lm.split` or `jaxpattern.lm.layout`; or
            parameters, as `models.transformer.init` gives them, or a flax model that holds them:
            a nested dict with `layers/i/attn/*`, each array of which has a head axis first, and
            where they exist `layers/i/mlp/*`, `embed`, `positions` and `unembed`.
        names: parts of a loaded model or a layout, as `component` takes them; all by default.
        kinds: in place of names, which of these, in the order in which they are wanted:

            * "embed": `embed`, and `positions` where they are learned,
            * "head": `l0h1`, head 1 of layer 0: its query, key, value, output, and position bias,
            * "group": `l0g1`, heads that share a key/value head; of a loaded model,
            * "attn": `l0 attn`; of a loaded model,
            * "mlp": `l1.mlp` (of a loaded model `l1 mlp`), what it reads and writes with,
            * "layer": `l0`, all parameters of the layer, norms too,
            * "unembed": `unembed`; tied weights have none, their readout is `embed`.
        across_layers: one program for all layers: one compilation, and the widest. False makes one
            a layer, whose chains hold copies of that layer's parameters only and take no
            derivatives below it. For plain parameters only: see `jaxpattern.lm.split`.

    Returns:
        Name → `Restriction`. Kinds overlap: a head is a part of its layer.

    Raises:
        TypeError: `model` is nothing of these.
        ValueError: it is no transformer of this layout, a part or kind is unknown or named twice,
            or there is none of the kinds.
    """
    given = None if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if names is not None and given is not None:
        raise ValueError("names and kinds are two ways to choose; give one of them")
    if isinstance(model, Layout):
        return layouts.components(model, names, layouts.KINDS if given is None else given)
    if isinstance(model, Model | Tail):
        return parts.parts_of(model, names, parts.KINDS if given is None else given)
    if names is not None:
        raise TypeError(
            "names choose parts of a model from jaxpattern.lm.load or of a jaxpattern.lm.layout; "
            "of plain parameters kinds do"
        )
    return _of_params(model, KINDS if given is None else given, across_layers)


def _of_params(params: Any, wanted: tuple[str, ...], across_layers: bool) -> dict[str, Restriction]:
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(KINDS):
        raise ValueError(f"kinds must be some of {KINDS}, each once, got {wanted!r:.80}")
    if not isinstance(params, Mapping):
        params = _of_model(params)
    shapes = _layer_shapes(params)
    found: dict[str, Restriction] = {}
    for kind in wanted:
        if kind in ("embed", "unembed"):
            whole = ("embed", "positions") if kind == "embed" else ("unembed",)
            found |= {name: by_path(name) for name in whole if name in params}
        else:
            for layer in shapes:
                alike = shapes if across_layers else {layer: shapes[layer]}
                found |= _of_layer(kind, layer, alike)
    if not found:
        raise ValueError(f"the weights have no part of kinds {wanted}; there are {sorted(params)}")
    return found


def _of_layer(kind: str, layer: str, shapes: dict[str, _Shapes]) -> dict[str, Restriction]:
    """The parts of one kind in a layer, which run together with those of all layers in `shapes`."""
    if kind == "layer":
        return {f"l{layer}": _block(shapes, layer, "")}
    if kind == "mlp":
        has_mlp = any(name.startswith("mlp/") for name, _ in shapes[layer])
        return {f"l{layer}.mlp": _block(shapes, layer, "mlp/")} if has_mlp else {}
    return {
        f"l{layer}h{head}": _block(shapes, layer, "attn/", head)
        for head in range(_num_heads(layer, shapes[layer]))
    }


_Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""The arrays of a layer: path inside the layer and shape."""


def _block(
    shapes: dict[str, _Shapes], layer: str, prefix: str, head: int | None = None
) -> Restriction:
    """The arrays of a layer below a prefix, or the slice of each that is a head."""

    def own(name: str) -> _Shapes:
        return tuple(pair for pair in shapes[name] if pair[0].startswith(prefix))

    alike = tuple(name for name in shapes if own(name) == own(layer))
    lens = _Block(alike, tuple(name for name, _ in own(layer)), head is not None)
    index = {"layer": jnp.int32(alike.index(layer))}
    if head is not None:
        index["head"] = jnp.int32(head)
    return Restriction(Partial(_Select(lens), index), Partial(_Embed(lens), index))


@dataclass(frozen=True)
class _Block:
    """Arrays that several layers have in the same shape; of each all, or one index of axis 0."""

    layers: tuple[str, ...]
    names: tuple[str, ...]
    is_head: bool

    def arrays(self, params: Params) -> dict[str, list[Array]]:
        """Each array in every layer."""
        layers = [_by_name(params["layers"][layer]) for layer in self.layers]
        return {name: [layer[name] for layer in layers] for name in self.names}

    def chosen(self, array: Array, layer: int, index: dict[str, Array]) -> Array:
        """Where this array of this layer is the part."""
        chosen = index["layer"] == layer
        if not self.is_head:
            return chosen
        heads = jnp.arange(array.shape[0]) == index["head"]
        return (chosen & heads).reshape(-1, *(1,) * (array.ndim - 1))


@dataclass(frozen=True)
class _Select:
    block: _Block

    def __call__(self, index: dict[str, Array], params: Params) -> Position:
        position = {}
        for name, arrays in self.block.arrays(params).items():
            array = jnp.stack(arrays)[index["layer"]]
            position[name] = array[index["head"]] if self.block.is_head else array
        return position


@dataclass(frozen=True)
class _Embed:
    block: _Block

    def __call__(self, index: dict[str, Array], position: Position, params: Params) -> Params:
        # A choice by `where` fuses with what reads the weights; a scatter at a batched index, which
        # is what an update of one slice becomes under vmap, does not.
        written: dict[str, dict[str, Array]] = {layer: {} for layer in self.block.layers}
        for name, arrays in self.block.arrays(params).items():
            new = position[name][None] if self.block.is_head else position[name]
            for i, (layer, old) in enumerate(zip(self.block.layers, arrays, strict=True)):
                chosen = jnp.broadcast_to(self.block.chosen(old, i, index), old.shape)
                written[layer][name] = jnp.where(chosen, jnp.broadcast_to(new, old.shape), old)
        layers = {
            name: _replace(layer, written.get(name, {})) for name, layer in params["layers"].items()
        }
        return {**params, "layers": layers}


def _replace(layer: Params, arrays: dict[str, Array]) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: arrays.get(_name(path), leaf), layer)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_name(tree: Params) -> dict[str, Array]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _layer_shapes(params: Params) -> dict[str, _Shapes]:
    """The arrays of every layer, layers in order."""
    layers = params.get("layers")
    if not isinstance(layers, Mapping) or not layers or not all(str(k).isdigit() for k in layers):
        raise ValueError(
            "params must be the weights of a decoder-only transformer, with layers/0, layers/1, …, "
            f"got {sorted(map(str, params))}"
        )
    ordered = sorted(layers, key=int)
    return {
        layer: tuple(
            (name, tuple(jnp.shape(leaf))) for name, leaf in _by_name(layers[layer]).items()
        )
        for layer in ordered
    }


def _num_heads(layer: str, shapes: _Shapes) -> int:
    """The length of the first axis that all attention weights share."""
    attention = {name: shape for name, shape in shapes if name.startswith("attn/")}
    numbers = {shape[:1] for shape in attention.values()}
    if len(numbers) != 1 or numbers == {()}:
        raise ValueError(
            f"the arrays of layers/{layer}/attn must share a leading head axis, got {attention}"
        )
    return numbers.pop()[0]


def _of_model(model: Any) -> Params:
    """The weights of a flax model; flax is imported only for one."""
    from flax import nnx

    from jaxpattern.models.transformer import split_params

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"params must be a nested dict of weights or a flax model, got {type(model).__name__}"
        )
    return split_params(model)[1]
