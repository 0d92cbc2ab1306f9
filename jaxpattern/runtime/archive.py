"""A state and its checkpoint on disk: an Orbax checkpoint of the leaves, as they lie on the mesh.

Every process writes and reads what its own devices hold, so that no host needs the whole state, and
a state can go on with another mesh or number of devices. Three things are added to what Orbax
0.12.8 does. It refuses arrays of size zero: they are left out, and made again. It notices damage to
its indices, but not to numbers (each of 40 bits flipped in an array of 240 kB was loaded without a
word), and what it notices in several arrays leaves tasks behind: each file has a digest, and Orbax
opens none before they are right. And lanes that only fill up the devices of a mesh are cut off, or
made again, as the new mesh needs them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_SUMS = "sums-"


def describe(state: Any, lanes: int | None) -> list[list[Any]]:
    """Dtype and shape of each leaf, without the lanes that fill up devices."""
    return [
        [str(leaf.dtype), [*leaf.shape] if lanes is None else [lanes, *leaf.shape[1:]]]
        for leaf in jax.tree.leaves(state)
    ]


def size(state: Any) -> int:
    """Bytes of a state."""
    return sum(raw.size * raw.dtype.itemsize for raw in map(_abstract, jax.tree.leaves(state)))


def write(path: Path, state: Any, lanes: int | None, about: dict[str, Any]) -> None:
    """Save a state; all processes call it together.

    Args:
        path: the folder to make, seen by all processes.
        state: a pytree of arrays.
        lanes: how many of the leading axis of each leaf count; None: there is no such axis.
        about: what is to be known before the state is read.
    """
    from orbax.checkpoint import v1 as ocp

    leaves = jax.tree.leaves(state)
    content = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]
    content = [leaf for leaf in content if leaf.size]
    keys = [str(jax.random.key_impl(leaf)) for leaf in leaves if _is_key(leaf)]
    about = about | {"leaves": describe(state, lanes), "keys": keys}
    with _context():
        ocp.save(path, list(map(_shared, content)), custom_metadata=about, overwrite=True)
    _seal(path)


def read_about(path: Path) -> dict[str, Any]:
    """What is known of a checkpoint without its state.

    Raises:
        ValueError, OSError: a file of it is missing or is not as it was written.
    """
    from orbax.checkpoint import v1 as ocp

    _verify(path)
    with _context():
        about = ocp.metadata(path).custom_metadata
    if not isinstance(about, dict):
        raise ValueError("its metadata cannot be read")
    return about


def read(path: Path, like: Any, lanes: int | None, about: dict[str, Any]) -> Any:
    """The state of a checkpoint; all processes call it together.

    Args:
        path: the folder of the checkpoint.
        like: the state wanted, concrete or abstract; a leaf goes where that of `like` lies, and
            where that says nothing, to the default device.
        lanes: as for `write`.
        about: what `read_about` returned.
    """
    from orbax.checkpoint import v1 as ocp

    leaves, structure = jax.tree.flatten(like)
    wanted = [_abstract(leaf) for leaf in leaves]
    targets = [raw if raw.sharding else np.empty(raw.shape, raw.dtype) for raw in wanted]
    targets = [target for target in targets if target.size]
    with _context():
        content = iter(ocp.load(path, targets) if targets else [])
    keys = iter(about["keys"])
    restored = []
    for leaf, raw in zip(leaves, wanted, strict=True):
        if raw.size:
            array = _fill(jax.device_put(next(content)), raw, lanes)
        else:
            array = jax.device_put(np.zeros(raw.shape, raw.dtype), raw.sharding)
        if _is_key(leaf):
            array = jax.random.wrap_key_data(array, impl=next(keys))
        restored.append(array)
    return jax.tree.unflatten(structure, restored)


@contextmanager
def _context() -> Iterator[None]:
    """Settings of Orbax."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    # Else it starts threads, which wait minutes for a folder that cannot be made.
    context.asynchronous.create_directories_asynchronously = False
    context.array.loading.enable_padding_and_truncation = True  # of lanes
    with context:
        yield


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What is saved of a leaf: of a key, its numbers."""
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=getattr(leaf, "sharding", None))


def _shared(leaf: Any) -> Any:
    """An array as Orbax takes it: what every process holds whole is written by the first."""
    if jax.process_count() > 1 and leaf.is_fully_addressable:
        return np.asarray(leaf)
    return leaf


def _fill(leaf: Array, like: jax.ShapeDtypeStruct, lanes: int | None) -> Array:
    """A leaf with copies of its last lane up to the length that the mesh needs."""
    if lanes is None or like.shape[0] <= lanes:
        return leaf if leaf.shape == like.shape else leaf[: like.shape[0]]
    index = np.minimum(np.arange(like.shape[0]), lanes - 1)
    return jax.jit(lambda x: x[index], out_shardings=like.sharding)(leaf)


def _files(path: Path) -> list[Path]:
    """The files that this process answers for: each in turn takes one."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(_SUMS))
    return files[jax.process_index() :: jax.process_count()]


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def _seal(path: Path) -> None:
    """Write down the digests of files, which `_verify` looks at."""
    sums = {str(file.relative_to(path)): _digest(file) for file in _files(path)}
    with open(path / f"{_SUMS}{jax.process_index()}.json", "w", encoding="utf-8") as file:
        json.dump({"processes": jax.process_count(), "sums": sums}, file)
        file.flush()
        os.fsync(file.fileno())


def _verify(path: Path) -> None:
    """No file is missing, and those that this process answers for are as they were."""
    written = [json.loads(p.read_text(encoding="utf-8")) for p in path.glob(f"{_SUMS}*.json")]
    sums: dict[str, str] = {}
    for one in written:
        sums |= one["sums"]
    if not written or len(written) != written[0]["processes"]:
        raise ValueError("a list of its checksums is missing")
    missing = [name for name in sums if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    for file in _files(path):
        if sums.get(str(file.relative_to(path))) != _digest(file):
            raise ValueError(f"the checksum of {file.relative_to(path)} is wrong")
