"""Folders of Hugging Face: tensors read one at a time from memory-mapped files, and written back.

Nothing here needs torch, and nothing is unpickled.
"""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpattern.lm.families import Family, Tensor
from jaxpattern.lm.spec import Spec, family_of
from jaxpattern.types import Params

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
_FLOATS = {"F64", "F32", "F16", "BF16"}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        ValueError: there is no such folder or file, or it is no JSON object.
    """
    if not folder.is_dir():
        raise ValueError(
            f"folder must be a directory with {CONFIG} and safetensors, got {folder!s}: download "
            "it first, for example with huggingface_hub.snapshot_download"
        )
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder.name} has no {CONFIG}")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} must hold an object, got {type(config).__name__}")
    return config


class TensorFiles:
    """The tensors of a folder by name, over one file or several with an index."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            self._where = {name: folder / file for name, file in index.items()}
            lost = sorted({path.name for path in self._where.values() if not path.is_file()})
            if lost:
                raise ValueError(f"{INDEX} names files that are not in the folder: {lost}")
        elif (folder / SINGLE).is_file():
            self._where = dict.fromkeys(_open(folder / SINGLE).keys(), folder / SINGLE)
        else:
            pickled = sorted(
                p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
            )
            reason = (
                f"only pickled weights {pickled}, which run code when they are read and are "
                "refused: save them as safetensors with save_pretrained"
                if pickled
                else f"neither {SINGLE} nor {INDEX}"
            )
            raise ValueError(f"{folder.name} holds {reason}")

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def read(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A tensor, checked for its shape and cast."""
        path = self._where[name]
        if path not in self._files:
            self._files[path] = _open(path)
        file = self._files[path]
        if name not in file.keys():  # noqa: SIM118 (the file is not iterable)
            raise ValueError(f"{path.name} does not hold {name}, which the index says is there")
        piece = file.get_slice(name)
        kind, found = piece.get_dtype(), tuple(piece.get_shape())
        if kind not in _FLOATS:
            raise ValueError(
                f"{name} is stored as {kind}; there are {sorted(_FLOATS)}: dequantize it first"
            )
        if found != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(found)}")
        tensor = file.get_tensor(name)
        # Every value is read here anyway; a NaN found later names no tensor.
        if not np.isfinite(tensor.astype(np.float32, copy=False)).all():
            raise ValueError(f"{name} holds values that are not finite")
        return tensor.astype(dtype, copy=False)


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(
            "reading checkpoints needs safetensors: pip install 'jaxpattern[hub]'"
        ) from None
    try:
        return safe_open(path, "np")
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a whole safetensors file: {error}") from None


def read_params(
    folder: Path, config: Mapping[str, Any], spec: Spec, dtype: np.dtype
) -> tuple[Params, dict[str, str]]:
    """The parameters, layers stacked, and the file's spelling of each tensor."""
    family, files = family_of(config), TensorFiles(folder)
    names = _spellings(family, config, spec, files)
    sizes = spec.axis_sizes()
    flat: dict[str, Any] = {}
    for name, tensor in _outer(family, config, spec).items():
        value = files.read(names[name], _shape(tensor.rule, sizes, len(tensor.to)), dtype)
        for path, part in _deal(value, tensor, sizes):
            flat[path] = jnp.asarray(part)
    for name, tensor in _inner(family, config).items():
        shape = _shape(tensor.rule, sizes, len(tensor.to))
        stacks: dict[str, np.ndarray] = {}
        for i in range(spec.num_layers):
            value = files.read(names[family.layer.format(i=i) + name], shape, dtype)
            for path, part in _deal(value, tensor, sizes):
                stack = stacks.setdefault(path, np.empty((spec.num_layers, *part.shape), dtype))
                stack[i] = part
        flat |= {f"layers/{path}": jax.device_put(stack) for path, stack in stacks.items()}
    return _nest(flat), names


def param_shapes(config: Mapping[str, Any], spec: Spec, dtype: np.dtype) -> Params:
    """Shapes in the place of the parameters, layers stacked."""
    family, sizes = family_of(config), spec.axis_sizes()
    flat: dict[str, Any] = {}
    for tensors, folder, lead in (
        (_outer(family, config, spec), "", ()),
        (_inner(family, config), "layers/", (spec.num_layers,)),
    ):
        for tensor in tensors.values():
            axes = [axis for axis in _sides(tensor.rule)[1] if axis != "c"]
            shape = (*lead, *(sizes[axis] for axis in axes))
            flat |= {folder + path: jax.ShapeDtypeStruct(shape, dtype) for path in tensor.to}
    return _nest(flat)


def write_folder(
    folder: Path,
    params: Params,
    spec: Spec,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    source: Path | None,
) -> None:
    """Write `config.json`, one safetensors file, and the tokenizer that lay beside the source."""
    from safetensors.numpy import save_file

    family, sizes = family_of(config), spec.axis_sizes()
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in _outer(family, config, spec).items():
        tensors[names[name]] = _gather([flat[path] for path in tensor.to], tensor.rule, sizes)
    for name, tensor in _inner(family, config).items():
        for i in range(spec.num_layers):
            parts = [flat[f"layers/{path}"][i] for path in tensor.to]
            full = family.layer.format(i=i) + name
            tensors[names[full]] = _gather(parts, tensor.rule, sizes)
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    kind = dtypes.pop() if len(dtypes) == 1 else "float32"
    written = dict(config) | {"torch_dtype" if "torch_dtype" in config else "dtype": kind}
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None and source.resolve() != folder.resolve():
        for companion in _COMPANIONS:
            if (source / companion).is_file():
                shutil.copyfile(source / companion, folder / companion)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    # An index left from other shards would be read before the one file.
    (folder / INDEX).unlink(missing_ok=True)
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n", "utf-8")


def _outer(family: Family, config: Mapping[str, Any], spec: Spec) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in family.outer.items()
        if tensor.where != "untied" or not spec.tied
    }


def _inner(family: Family, config: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in family.inner.items()
        if tensor.where is None
        or config.get(tensor.where, family.defaults.get(tensor.where, False))
    }


def _spellings(
    family: Family, config: Mapping[str, Any], spec: Spec, files: TensorFiles
) -> dict[str, str]:
    """Our name of each tensor → its name in the files; every tensor there has its place."""
    wanted = list(_outer(family, config, spec)) + [
        family.layer.format(i=i) + name
        for i in range(spec.num_layers)
        for name in _inner(family, config)
    ]
    found: dict[str, str] = {}
    for name in wanted:
        spellings = [p + n for n in name.split("|") for p in (family.prefix, "")]
        present = [spelling for spelling in spellings if spelling in files]
        if not present:
            raise ValueError(
                f"the files lack {spellings[0]}, which a {spec.family} of {spec.num_layers} layers "
                "has"
            )
        found[name] = present[0]
    ignored = (*family.ignored, *(("*lm_head.weight", "*embed_out.weight") if spec.tied else ()))
    used = set(found.values())
    strange = [
        name
        for name in files
        if name not in used
        and not any(
            fnmatch.fnmatchcase("." + name, "*" + pattern.lstrip("*")) for pattern in ignored
        )
    ]
    if strange:
        raise ValueError(
            f"the files hold {len(strange)} tensors that a {spec.family} of {spec.num_layers} "
            f"layers does not have, such as {strange[:3]}"
        )
    return found


def _sides(rule: str) -> tuple[list[str], list[str], list[list[str]]]:
    """Axes on the left, axes on the right, and the left grouped as the file has them."""
    left, right = rule.split(" -> ")
    groups = [group.split() if group[0] != "(" else group[1:-1].split() for group in _tokens(left)]
    return [axis for group in groups for axis in group], right.split(), groups


def _tokens(left: str) -> list[str]:
    tokens, rest = [], left.strip()
    while rest:
        end = rest.index(")") + 1 if rest[0] == "(" else (rest + " ").index(" ")
        tokens.append(rest[:end])
        rest = rest[end:].strip()
    return tokens


def _shape(rule: str, sizes: Mapping[str, int], num_parts: int) -> tuple[int, ...]:
    """The shape of the tensor in the file."""
    lengths = {**sizes, "c": num_parts}
    return tuple(math.prod(lengths[axis] for axis in group) for group in _sides(rule)[2])


def _deal(
    value: np.ndarray, tensor: Tensor, sizes: Mapping[str, int]
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters in a tensor of the file, by path."""
    left, right, _ = _sides(tensor.rule)
    lengths = {**sizes, "c": len(tensor.to)}
    parts = value.reshape([lengths[axis] for axis in left]).transpose(
        [left.index(axis) for axis in right]
    )
    yield from zip(tensor.to, parts if right[0] == "c" else [parts], strict=True)


def _gather(parts: list[np.ndarray], rule: str, sizes: Mapping[str, int]) -> np.ndarray:
    """The tensor of the file: the inverse of `_deal`."""
    left, right, _ = _sides(rule)
    value = np.stack(parts) if right[0] == "c" else parts[0]
    value = value.transpose([right.index(axis) for axis in left])
    return np.ascontiguousarray(value.reshape(_shape(rule, sizes, len(parts))))


def _nest(flat: Mapping[str, Any]) -> Params:
    """Paths to a nested dict."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split("/")
        at = nested
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
    return nested
