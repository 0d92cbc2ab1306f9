"""Checks on what users pass in. Each error names the argument, what came and what was wanted."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial


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

    Decided now even within an outer `jit`, where JAX would stage an operation on constants.
    """
    if not all(map(is_concrete, jax.tree.leaves(values))):
        return True
    with jax.ensure_compile_time_eval():
        return bool(predicate(*values))


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
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError as error:
        given = getattr(value, "__name__", type(value).__name__)
        raise TypeError(f"{name} must be {wanted}, got {given}{signature}: {error}") from None


def check_hashable(name: str, value: Any) -> None:
    """Usable as a key of the compilation cache."""
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{name} must be hashable, got an unhashable {type(value).__name__}: "
            "wrap it in a function, or register it as a pytree where it takes part as one"
        ) from None


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
        return function
    check_hashable(getattr(function, "__name__", type(function).__name__), function)
    return Partial(function)


def check_names(name: str, given: Iterable[str], known: Collection[str]) -> None:
    """The same names, no more and no fewer."""
    given = list(given)
    if set(given) != set(known):
        raise ValueError(f"{name} must name exactly {sorted(known)}, got {sorted(given)}")


def check_params(name: str, params: Any) -> None:
    """A non-empty pytree of finite floating-point arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"{name} is an empty pytree; there is nothing to sample")
    for path, leaf in leaves:
        where = f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{where} must be an array, got {type(leaf).__name__}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{where} must be floating point, got {leaf.dtype}")
    known = [(path, leaf) for path, leaf in leaves if is_concrete(leaf)]
    with jax.ensure_compile_time_eval():
        finite = np.asarray(_all_finite([leaf for _, leaf in known])) if known else []
    for (path, _), fine in zip(known, finite, strict=True):
        if not fine:
            where = f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            raise ValueError(f"{where} holds values that are not finite")


@jax.jit
def _all_finite(leaves: list[Any]) -> jax.Array:
    """Of each array, in one program and not two for each shape."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def batch_length(name: str, batch: Any) -> int:
    """The length of the leading axis that all arrays of a batch share."""
    lengths: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        where = f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}".rstrip("/")
        if not hasattr(leaf, "shape") or isinstance(leaf, np.generic):
            raise TypeError(
                f"{where} must be an array with a leading sample axis, got {leaf!r:.80}"
            )
        if leaf.ndim == 0:
            raise ValueError(f"{where} must have a leading sample axis, got a scalar")
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm":
            raise TypeError(f"{where} must hold numbers, got dtype {leaf.dtype}")
        lengths[where] = leaf.shape[0]
    if not lengths:
        raise ValueError(f"{name} is an empty pytree; it holds no samples")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name} must share one leading sample axis, got lengths {lengths}")
    length = next(iter(lengths.values()))
    if length == 0:
        raise ValueError(f"{name} holds no samples")
    return length
