"""Meshes: where chains, probes and parameters lie when there are many devices.

A mesh has up to three axes, all optional, and nothing else in the package depends on how many
devices or processes there are:

* `chain`: chains of all components (seeds, in training) are dealt out to the devices, each of
  which advances its own without a word to the others. Their number need not divide: the last
  device runs copies that are thrown away.
* `data`: probes and their losses, and in training the samples of a batch, are cut along the sample
  axis; each device repeats the steps of the chains it shares.
* `model`: parameters that one device cannot hold are cut by `shard_params`.

Results come back to every process as arrays on its first device, so that what follows is the same
computation everywhere. With `chain` alone a loop holds no collective; `data` adds the mean over
the reference data, a number a draw, and `model` what the matrix products need.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxpattern.types import Params
from jaxpattern.validation import check_count, is_concrete

AXES = ("chain", "data", "model")

T = TypeVar("T")


def mesh(
    *,
    chain: int | None = None,
    data: int = 1,
    model: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over the axes `chain`, `data` and `model`, for the `mesh` argument of every driver.

    Devices of one process are neighbours along `model`, then along `data`.

    Args:
        chain: devices over which chains are dealt out; None: as many as the rest leaves.
        data: devices over which probes are cut.
        model: devices over which parameters are cut; see `shard_params`.
        devices: devices to use; None: all of all processes.

    Raises:
        ValueError, TypeError: the sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    check_count("data", data, minimum=1)
    check_count("model", model, minimum=1)
    if chain is None:
        chain = max(1, len(devices) // (data * model))
    check_count("chain", chain, minimum=1)
    if chain * data * model != len(devices):
        raise ValueError(
            f"chain × data × model must be the number of devices, {len(devices)}, "
            f"got {chain} × {data} × {model}"
        )
    return Mesh(
        np.asarray(devices).reshape(chain, data, model), AXES, axis_types=(AxisType.Auto,) * 3
    )


def resolve_mesh(given: Any) -> Mesh | None:
    """The mesh of a driver: the one given, else the current one of `jax.set_mesh`, else none.

    Raises:
        TypeError: it is not a mesh.
        ValueError: it has none of the axes, or axes of another type than Auto.
    """
    if given is None:
        try:
            found = jax.sharding.get_mesh()
        except ValueError:  # inside a transform, which places what it computes
            return None
    else:
        found = given
    if not isinstance(found, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as jp.mesh(), got {found!r:.80}")
    known = [axis for axis in AXES if axis in found.axis_names]
    if given is None and not known:
        return None
    if not known:
        raise ValueError(f"mesh must have an axis of {AXES}, got {found.axis_names}")
    types = dict(zip(found.axis_names, found.axis_types, strict=True))
    wrong = [axis for axis in known if types[axis] != AxisType.Auto]
    if wrong:
        raise ValueError(
            f"axes of mesh must be of type Auto, as jp.mesh() makes them, got {types[wrong[0]]} "
            f"for {wrong[0]!r}"
        )
    return found


def axis_size(mesh: Mesh | None, axis: str) -> int:
    """Devices along an axis; 1 where there is none."""
    return 1 if mesh is None else dict(mesh.shape).get(axis, 1)


def is_first_process() -> bool:
    """Whether this process shows progress and writes files."""
    return jax.process_index() == 0


def put(tree: T, mesh: Mesh | None, *spec: str | None) -> T:
    """Arrays laid out on the mesh, along these axes; every process holds the same arrays.

    What is traced, and what is cut over this mesh already where no axis is named, stays.
    """
    if mesh is None:
        return tree
    names = tuple(axis if axis in mesh.axis_names else None for axis in spec)
    sharding = NamedSharding(mesh, PartitionSpec(*names))

    def place(leaf: Any) -> Any:
        here = getattr(leaf, "sharding", None)
        kept = isinstance(here, NamedSharding) and here.mesh == mesh and not any(names)
        return leaf if kept or not is_concrete(leaf) else put_as(leaf, sharding)

    return jax.tree.map(place, tree)


def put_as(leaf: Any, sharding: Any) -> Array:
    """An array laid out so; every process holds the same."""
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        impl = jax.random.key_impl(leaf)
        return jax.random.wrap_key_data(put_as(jax.random.key_data(leaf), sharding), impl=impl)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf, jnp.result_type(leaf))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def loop_bounds(start: int, stop: int, mesh: Mesh | None) -> tuple[Array, Array]:
    """The ends of a chunk as arrays, so that all chunks share a compiled program."""
    return put((jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)), mesh)


def take(tree: T) -> T:
    """What a user brings, without arrays on a mesh with Explicit axes.

    A mesh of `jax.make_mesh` has such axes by default, and what is cut over them fails in sums,
    products and gathers. Each device keeps the part that it has; only the type of the axes changes.
    """

    def one(leaf: Any) -> Any:
        here = leaf.sharding if isinstance(leaf, jax.Array) and is_concrete(leaf) else None
        if not isinstance(here, NamedSharding) or AxisType.Explicit not in here.mesh.axis_types:
            return leaf
        assert isinstance(here.mesh, Mesh)
        names = here.mesh.axis_names
        mesh = Mesh(here.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
        return jax.device_put(leaf, NamedSharding(mesh, here.spec, memory_kind=here.memory_kind))

    return jax.tree.map(one, tree)


def put_rows(name: str, tree: T, mesh: Mesh | None) -> T:
    """A batch, cut along its samples over `data`.

    Raises:
        ValueError: the samples do not divide.
    """
    parts = axis_size(mesh, "data")
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[0] % parts:
            raise ValueError(
                f"{name} must have a multiple of {parts} samples, the size of the data axis of "
                f"the mesh, got {leaf.shape[0]}"
            )
    return put(tree, mesh, "data")


def cut(tree: T, mesh: Mesh | None, axis: str) -> T:
    """Traced arrays, cut over an axis of the mesh along their first axis."""
    if mesh is None or axis_size(mesh, axis) == 1:
        return tree
    here = jax.sharding.get_abstract_mesh()
    sharding = NamedSharding(mesh if here.empty else here, PartitionSpec(axis))
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree)


def fetch(tree: T, mesh: Mesh | None) -> T:
    """Arrays of a mesh as whole arrays on the first device of each process."""
    if mesh is None:
        return tree

    def whole(leaf: Any) -> Any:
        if not is_concrete(leaf):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(leaf)
            return jax.random.wrap_key_data(whole(jax.random.key_data(leaf)), impl=impl)
        return jnp.asarray(to_host(leaf))  # uncommitted: it goes with whatever it meets

    return jax.tree.map(whole, tree)


def to_host(leaf: Any) -> np.ndarray:
    """An array as numbers on this host, wherever its parts lie; all processes call it together."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if not leaf.is_fully_replicated:
        assert isinstance(leaf.sharding, NamedSharding)
        replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        leaf = jax.jit(lambda x: x, out_shardings=replicated)(leaf)
    return np.asarray(leaf.addressable_data(0))


def shard_params(
    params: Params, mesh: Mesh, axes: Mapping[str, int] | None = None, *, least_size: int = 2**16
) -> Params:
    """Parameters cut over the axis `model` of a mesh.

    Args:
        params: pytree of arrays.
        mesh: a mesh with an axis `model`.
        axes: path pattern (as in `by_path`) → axis to cut; the first that matches counts. By
            default the longest axis that divides.
        least_size: arrays of fewer numbers are kept whole, unless a pattern names them.

    Returns:
        The parameters; drivers leave them where they are.

    Raises:
        ValueError: an axis that a pattern names does not exist or does not divide.
    """
    return jax.tree.map(
        lambda leaf, spec: put(leaf, mesh, *spec),
        params,
        param_specs(params, axis_size(mesh, "model"), axes, least_size=least_size),
    )


def param_specs(
    params: PyTree[Any],
    parts: int,
    axes: Mapping[str, int] | None = None,
    *,
    least_size: int = 2**16,
) -> PyTree[Any]:
    """How `shard_params` cuts: a `PartitionSpec` for each array, which may be abstract."""

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        dividing = [i for i, n in enumerate(leaf.shape) if n % parts == 0]
        for pattern, axis in (axes or {}).items():
            if fnmatch.fnmatchcase(name, pattern):
                if axis % max(leaf.ndim, 1) not in dividing or not -leaf.ndim <= axis < leaf.ndim:
                    raise ValueError(
                        f"axes[{pattern!r}]: axis {axis} of {name}, of shape {list(leaf.shape)}, "
                        f"cannot be cut into {parts} parts"
                    )
                return _cut_at(axis % leaf.ndim)
        if not dividing or math.prod(leaf.shape) < least_size:
            return PartitionSpec()
        return _cut_at(max(dividing, key=lambda i: leaf.shape[i]))

    return jax.tree_util.tree_map_with_path(spec, params)


def _cut_at(axis: int) -> PartitionSpec:
    return PartitionSpec(*(None,) * axis, "model")


def pad_lanes(tree: T, mesh: Mesh | None, at_once: int | None = None) -> T:
    """Copies of the last lane, until every device has as many, and whole blocks of them."""
    parts = axis_size(mesh, "chain")

    def pad(leaf: Any) -> Any:
        each = -(-leaf.shape[0] // parts)
        block = min(at_once or each, each)
        missing = -(-each // block) * block * parts - leaf.shape[0]
        if not missing:
            return leaf
        return leaf[np.minimum(np.arange(leaf.shape[0] + missing), leaf.shape[0] - 1)]

    return jax.tree.map(pad, tree)


def over_lanes(
    function: Callable[..., Any], mesh: Mesh | None, at_once: int | None = None
) -> Callable[..., Any]:
    """`function(shared, *lane)` of one lane as `(shared, *lanes) -> lanes`, dealt out to devices.

    Args:
        function: what one lane does.
        mesh: where they are dealt out.
        at_once: lanes a device advances together, the others wait; None: all it has.
    """

    def on_device(shared: Any, *lanes: Any) -> Any:
        one = lambda lane: function(shared, *lane)  # noqa: E731
        size = jax.tree.leaves(lanes)[0].shape[0]
        if size == 1 and axis_size(mesh, "chain") == 1:
            # Batched products and gathers over one lane are slower than plain ones.
            alone = one(jax.tree.map(lambda leaf: leaf[0], lanes))
            return jax.tree.map(lambda leaf: leaf[None], alone)
        if at_once is None or at_once >= size:
            return jax.vmap(one)(lanes)
        return jax.lax.map(one, lanes, batch_size=None if at_once == 1 else at_once)

    if axis_size(mesh, "chain") == 1:
        return on_device

    def dealt(shared: Any, *lanes: Any) -> Any:
        chain = PartitionSpec("chain")
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(PartitionSpec(), *(chain for _ in lanes)),
            out_specs=chain,
            axis_names={"chain"},
            check_vma=False,
        )(shared, *lanes)

    return dealt
