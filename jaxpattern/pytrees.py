"""Dataclasses as pytrees whose structures are equal only if their classes are.

Of dataclasses that `jax.tree_util.register_dataclass` knows, JAX (0.10) compares the static fields
and not the classes. A `jit` called with one of them finds the program of another of the same fields
where their hashes happen to fall together, in about one process in a hundred, and returns its
numbers without a word: `ridge()` those of `entropic()`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey

C = TypeVar("C", bound=type)
_REGISTERED: set[type] = set()


def register_pytree(cls: C) -> C:
    """A dataclass as a pytree: its fields are children, those marked static part of the structure.

    What `jax.tree_util.register_dataclass` does, but that two classes differ.
    """
    fields = dataclasses.fields(cls)
    static = tuple(f.name for f in fields if f.metadata.get("static"))
    child = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(x, n) for n in child), tuple(getattr(x, n) for n in static)

    def flatten_with_keys(x: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, about = flatten(x)
        return tuple((GetAttrKey(n), c) for n, c in zip(child, children, strict=True)), about

    def unflatten(about: tuple[Any, ...], children: Any) -> Any:
        values = dict(zip(child, children, strict=True)) | dict(zip(static, about, strict=True))
        return cls(**values)

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    _REGISTERED.add(cls)
    return cls


def node_types(tree: Any) -> tuple[type, ...]:
    """The classes of all nodes of a pytree, which tell apart what JAX may take for equal."""
    found: list[type] = []

    def walk(structure: Any) -> None:
        about = structure.node_data()
        if about is not None:
            found.append(about[0])
            for part in structure.children():
                walk(part)

    walk(jax.tree.structure(tree))
    return tuple(found)


@register_pytree
@dataclasses.dataclass(frozen=True)
class _Told:
    """A function that is a pytree, with the classes of its nodes in its structure."""

    function: Any
    types: tuple[type, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def told_apart(function: Any) -> Any:
    """A function that is a pytree, so that JAX takes no dataclass of a user in it for another."""
    types = node_types(function)
    foreign = any(dataclasses.is_dataclass(t) and t not in _REGISTERED for t in types)
    return _Told(function, types) if foreign else function
