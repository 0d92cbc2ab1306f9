"""Checks on what users pass in. Each error names the argument, what came and what was wanted."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Key

from jaxpattern.pytrees import told_apart


def is_concrete(value: Any) -> bool:
    """Whether the value can be looked at: false for what is traced by jit, vmap or grad."""
    return not isinstance(value, jax.core.Tracer)


def is_traced(*values: Any) -> bool:
    """Whether what is computed from the values now is traced by jit, vmap or grad.

    Within `jit` that is so even of constants, on which JAX stages every operation.
    """
    here = jax.device_put(np.int32(0))  # the one operation that compiles nothing
    return not all(map(is_concrete, (here, *jax.tree.leaves(values))))


def holds(predicate: Callable[..., Any], *values: Any) -> bool:
    """Whether it is true of the values; what is being traced is given the benefit of the doubt.

    Decided now even within an outer `jit`, where JAX would stage an operation on constants. By
    NumPy for what this process can read, which compiles nothing: the predicate uses methods of
    arrays.
    """
    if not all(map(is_concrete, jax.tree.leaves(values))):
        return True
    with computed_now():
        return bool(predicate(*jax.tree.map(_read, values)))


def _read(x: Any) -> Any:
    """By NumPy, unless other processes hold parts of it."""
    whole = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x) if whole else x


def are_finite(x: Any) -> Any:
    """Whether every number is finite, as a predicate of `holds`."""
    return (abs(x) < np.inf).all()


def computed_now() -> AbstractContextManager[Any]:
    """Where known values give known values, also within an outer trace.

    Only there by JAX's own context, which makes a program of every constant of what it compiles.
    """
    return jax.ensure_compile_time_eval() if is_traced() else contextlib.nullcontext()


def check_typed_key(key: Any) -> None:
    """A typed random key, or an array of them."""
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        kind = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else type(key).__name__
        raise TypeError(f"key must be a typed key from jax.random.key(seed), got {kind}")


def check_key(key: Any) -> None:
    """A single typed random key."""
    check_typed_key(key)
    if key.shape != ():
        raise TypeError(f"key must be one key, got an array of keys of shape {key.shape}")


@jax.jit
def _threefry(key: Key[Array, "*seeds"]) -> Key[Array, "*seeds"]:
    words = jax.random.key_data(key).reshape(*key.shape, -1)
    mixed = jax.random.wrap_key_data(words[..., :2], impl="threefry2x32")
    fold = jax.random.fold_in
    for _ in range(key.ndim):
        fold = jax.vmap(fold)
    for i in range(2, words.shape[-1]):
        mixed = fold(mixed, words[..., i])
    return mixed


def own_streams(key: Key[Array, "*seeds"]) -> Key[Array, "*seeds"]:
    """The key, or a threefry key made of it.

    `rbg` draws the numbers of all lanes of a vmap from the first key, and the `fold_in` of
    `unsafe_rbg` commutes: chains would share their noise, and depend on how many run together.
    """
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return _threefry(key)


def check_number(name: str, value: Any, *, minimum: float, exclusive: bool = False) -> None:
    """A real scalar, at least (or above) the minimum, and finite."""
    known = isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
    if not known or isinstance(value, bool) or np.ndim(value) != 0:
        raise TypeError(f"{name} must be a number, got {value!r:.80}")
    kind = getattr(value, "dtype", jnp.float32)
    if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
        raise TypeError(f"{name} must be a real number, got {kind}")
    if not is_concrete(value):
        return
    number = float(value)
    wanted = f" and {'above' if exclusive else 'at least'} {minimum:g}" if minimum > -np.inf else ""
    if not np.isfinite(number) or number < minimum or (exclusive and number == minimum):
        raise ValueError(f"{name} must be finite{wanted}, got {number:g}")


def check_count(name: str, value: Any, *, minimum: int) -> None:
    """A Python integer, at least the minimum."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_function(name: str, value: Any, wanted: str, *, num_arguments: int) -> None:
    """Something callable with that many positional arguments."""
    if not callable(value):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    if inspect.isbuiltin(value):  # bound ones may count `self`, as those of tokenizers do
        return
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError as error:
        given = getattr(value, "__name__", type(value).__name__)
        raise TypeError(f"{name} must be {wanted}, got {given}{signature}: {error}") from None


def check_deterministic(name: str, loss_fn: Any) -> None:
    """A loss of (params, batch), without a key."""
    wanted = "a function of (params, batch)"
    if callable(loss_fn) and num_required(loss_fn) == 3:
        given = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(
            f"{name} must be {wanted}, got {given}{inspect.signature(loss_fn)}. A chain needs a "
            "loss that is a function of the parameters alone; if the third argument is a key for "
            "dropout or the like, switch that off: lambda params, batch: "
            "loss_fn(params, batch, None) with the model in its deterministic mode"
        )
    check_function(name, loss_fn, wanted, num_arguments=2)


def check_hashable(name: str, value: Any) -> None:
    """Usable as a key of the compilation cache."""
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{name} must be hashable, got an unhashable {type(value).__name__}: "
            "wrap it in a function, or register it as a pytree where it takes part as one"
        ) from None


def old_name(old: str, new: str) -> Any:
    """The old name of a property, which warns."""

    def get(self: Any) -> Any:
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    return property(get, doc=f"The old name of `{new}`.")


def renamed(old: str, given: Any, new: str, value: Any) -> Any:
    """The value of a setting that has a new name, also where the old one was used."""
    if given is None:
        return value
    warnings.warn(f"{old}= is now called {new}=", DeprecationWarning, stacklevel=3)
    return given


def num_required(function: Callable[..., Any]) -> int | None:
    """Positional arguments without a default; None where nobody can tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def as_pytree_function(function: Callable) -> Callable:
    """A function as a pytree, so that it passes through `jit` as an argument."""
    leaves = jax.tree.leaves(function)
    if len(leaves) != 1 or leaves[0] is not function:
        return told_apart(function)
    check_hashable(getattr(function, "__name__", type(function).__name__), function)
    return Partial(function)


def check_names(name: str, given: Iterable[str], known: Collection[str]) -> None:
    """The same names, no more and no fewer."""
    given = list(given)
    if set(given) != set(known):
        raise ValueError(f"{name} must name exactly {sorted(known)}, got {sorted(given)}")


def check_params(name: str, params: Any) -> None:
    """A non-empty pytree of finite floating-point arrays, each in one place."""
    _check_no_module(name, params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"{name} is an empty pytree; there is nothing to sample")
    seen: dict[Any, str] = {}
    for path, leaf in leaves:
        where = _where(name, path)
        _check_array(where, leaf, "an array")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{where} must be floating point, got {leaf.dtype}")
        if jnp.finfo(leaf.dtype).bits < 16:
            raise TypeError(
                f"{where} must have at least 16 bits to be moved, got {leaf.dtype}; give it as "
                "bfloat16 and narrow it inside loss_fn"
            )
        first = seen.setdefault(_place(leaf), where)
        if first != where:
            raise ValueError(
                f"{where} and {first} are one and the same array, and would move apart. "
                "Where they are tied, keep one of the two leaves and use it twice in loss_fn; "
                "where they are not, give one as a copy, jnp.copy(x)"
            )
    known = [(path, leaf) for path, leaf in leaves if is_concrete(leaf)]
    for (path, _), fine in zip(known, _all_finite([leaf for _, leaf in known]), strict=True):
        if not fine:
            raise ValueError(f"{_where(name, path)} holds values that are not finite")


def _place(leaf: Any) -> Any:
    """Where an array lies: two that lie in one place are one. A view of NumPy is what it views."""
    if isinstance(leaf, np.ndarray) and leaf.size:
        return leaf.__array_interface__["data"][0], leaf.nbytes
    return id(leaf)


def _check_no_module(name: str, params: Any) -> None:
    """An `nnx.Module` holds more than parameters, and cannot be told from its state."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, nnx.Module))
    for node in nodes:
        if isinstance(node, nnx.Module):
            raise TypeError(
                f"{name} must be a pytree of arrays, got the nnx.Module {type(node).__name__}; "
                "split it (in its evaluation mode):\n"
                "    graphdef, params, rest = nnx.split(model, nnx.Param, ...)\n"
                "    pure_loss = lambda params, batch: "
                "loss_fn(nnx.merge(graphdef, params, rest), batch)"
            )


def _where(name: str, path: Any) -> str:
    return f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}".rstrip("/")


def _check_array(where: str, leaf: Any, wanted: str) -> None:
    """An array of JAX or NumPy that can be computed with."""
    if not isinstance(leaf, jax.Array | np.ndarray):
        kind = f"{type(leaf).__module__}.{type(leaf).__name__}"
        told = f"{leaf!r:.60}" if wanted != "an array" and np.isscalar(leaf) else kind
        raise TypeError(f"{where} must be {wanted}, got {told.removeprefix('builtins.')}")
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(
            f"{where} must be {wanted}, got a masked array; fill it, x.filled(0), and say what is "
            "masked by weights of 0"
        )
    # What JAX adds to NumPy (bfloat16, float8 …) is of kind V, as records are.
    other = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMmV"
    if other and not jnp.issubdtype(leaf.dtype, np.number):
        raise TypeError(f"{where} must hold numbers, got dtype {leaf.dtype}")
    if isinstance(leaf, jax.Array) and is_concrete(leaf) and leaf.is_deleted():
        raise ValueError(
            f"{where} has been deleted (donated to an earlier call); keep a copy of it"
        )


def _all_finite(leaves: list[Any]) -> list[bool]:
    """Of each array: by NumPy what lies in this host's memory, which compiles nothing, and where it
    lies, in one program, what does not.
    """
    elsewhere = [leaf for leaf in leaves if not _on_host(leaf)]
    there = []
    if elsewhere:
        with computed_now():
            there = np.asarray(_finite_there(elsewhere)).tolist()
    found = iter(there)
    return [
        bool(np.all(np.isfinite(np.asarray(leaf)))) if _on_host(leaf) else next(found)
        for leaf in leaves
    ]


def _on_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return [device.platform for device in leaf.devices()] == ["cpu"] and leaf.is_fully_addressable


@jax.jit
def _finite_there(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def batch_length(name: str, batch: Any) -> int:
    """The length of the leading axis that all arrays of a batch share."""
    several = isinstance(batch, list) and len(batch) > 1 and not any(map(_is_array, batch))
    if several and len({jax.tree.structure(x) for x in batch}) == 1 and jax.tree.leaves(batch):
        raise TypeError(
            f"{name} must be one pytree of arrays with a leading sample axis, got a list of "
            f"{len(batch)} samples; stack them: jax.tree.map(lambda *x: np.stack(x), *{name})"
        )
    sparse = sys.modules.get("jax.experimental.sparse")
    kept = None if sparse is None else lambda node: isinstance(node, sparse.JAXSparse)
    lengths: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch, is_leaf=kept):
        where = _where(name, path)
        _check_array(where, leaf, "an array with a leading sample axis")
        if leaf.ndim == 0:
            raise ValueError(f"{where} must have a leading sample axis, got a scalar")
        lengths[where] = leaf.shape[0]
    if not lengths:
        raise ValueError(f"{name} is an empty pytree; it holds no samples")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name} must share one leading sample axis, got lengths {lengths}")
    length = next(iter(lengths.values()))
    if length == 0:
        raise ValueError(f"{name} holds no samples")
    return length


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") or np.isscalar(value)
