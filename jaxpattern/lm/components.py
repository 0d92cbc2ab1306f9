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

from jaxpattern.restriction import Restriction, by_path
from jaxpattern.types import Params, Position

KINDS = ("embed", "head", "mlp", "layer", "unembed")
"""The kinds of parts; `components` names those that the weights have."""


def components(
    params: Any, *, kinds: str | Sequence[str] = KINDS, across_layers: bool = True
) -> dict[str, Restriction]:
    """The parts of a transformer by name, as `susceptibilities` takes them.

    Parts of one kind and shape run as one program.

    Args:
        params: weights, as `models.transformer.init` gives them, or a flax model that holds them:
            a nested dict with `layers/i/attn/*`, each array of which has a head axis first, and
            where they exist `layers/i/mlp/*`, `embed`, `positions` and `unembed`.
        kinds: which of these, in the order in which they are wanted:

            * "embed": `embed`, and `positions` where they are learned,
            * "head": `l0h1`, head 1 of layer 0: its query, key, value, output, and position bias,
            * "mlp": `l1.mlp`, what it reads and writes with,
            * "layer": `l0`, all weights of the layer, norms too,
            * "unembed": `unembed`; tied weights have none, their readout is `embed`.
        across_layers: one program for all layers: one compilation, and the widest. False makes one
            a layer, whose chains hold copies of that layer's weights only and take no derivatives
            below it; that is for deep models.

    Returns:
        Name → `Restriction`. Kinds overlap: a head is a part of its layer.

    Raises:
        TypeError: `params` is neither a nested dict nor a flax model.
        ValueError: it is no transformer of this layout, a kind is unknown or named twice, or the
            weights have none of the kinds.
    """
    wanted = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(KINDS):
        raise ValueError(f"kinds must be some of {KINDS}, each once, got {kinds!r:.80}")
    if not isinstance(params, Mapping):
        params = _of_model(params)
    shapes = _layer_shapes(params)
    found: dict[str, Restriction] = {}
    for kind in wanted:
        if kind in ("embed", "unembed"):
            names = ("embed", "positions") if kind == "embed" else ("unembed",)
            found |= {name: by_path(name) for name in names if name in params}
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
