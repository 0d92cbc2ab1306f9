"""What a computation depends on, as lines of text that two processes can compare.

A value becomes a dictionary path → description: numbers as they are, arrays by dtype, shape and a
hash of their bytes, containers by their parts. A function is its name, and what it was made of:
what it closes over, its defaults and bound arguments and, where it is not part of an installed
package, a hash of its bytecode and the functions and values among its globals. A module is its
name and a hash of its file. Installed packages are compared by version instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import platform
import re
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpattern._version import __version__
from jaxpattern.runtime.mesh import to_host

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PACKAGES = ("jax", "jaxlib", "blackjax", "optax", "numpy")
_INSTALLED = tuple(
    Path(str(path)).resolve()
    for path in {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *(metadata.distribution(name).locate_file("") for name in ("jax", "numpy")),
        Path(__file__).parent,
    }
)


def fingerprint(**arguments: Any) -> dict[str, str]:
    """Lines that say what the arguments are, and on what they are computed."""
    describe = _Describer()
    lines = dict(line for name, value in arguments.items() for line in describe(name, value))
    lines["platform"] = jax.default_backend()
    lines["python"] = ".".join(platform.python_version_tuple()[:2])
    lines["version of jaxpattern"] = __version__
    for name in _PACKAGES:
        lines[f"version of {name}"] = _version(name)
    for option in ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable"):
        lines[option] = str(getattr(jax.config, option))
    return lines


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs, a line a path."""
    return [
        f"{path}: {old.get(path, 'nothing')} there, {new.get(path, 'nothing')} here"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def digest(*parts: bytes | memoryview) -> str:
    """A short hash."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _array(value: Any) -> str:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"key {jax.random.key_impl(value)} {_array(jax.random.key_data(value))}"
    array = to_host(value)
    if array.dtype == object:
        return _ADDRESS.sub("", repr(value))
    short = f" {array.tolist()}" if array.size <= 4 else f" {digest(array.tobytes())[:12]}"
    return f"{array.dtype}{list(array.shape)}{short}"


class _Describer:
    """Lines of values; of an object that comes again, only where it was first."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, Any]] = {}  # holds what it saw: an id is not used twice

    def __call__(self, path: str, value: Any) -> Iterator[tuple[str, str]]:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            yield path, repr(value)
        elif isinstance(value, jax.Array | np.ndarray | np.generic):
            yield path, _array(value)
        elif isinstance(value, types.BuiltinFunctionType):
            yield path, f"{value.__module__} {value.__name__}"
        elif isinstance(value, types.ModuleType):
            source = b"" if _is_installed(value) else Path(str(value.__file__)).read_bytes()
            yield path, f"{value.__name__} {digest(source)[:12]}" if source else value.__name__
        elif id(value) in self._seen:
            yield path, f"the same as {self._seen[id(value)][0]}"
        else:
            if not isinstance(value, tuple | list | Mapping):
                self._seen[id(value)] = (path, value)
            yield from self._compound(path, value)

    def _parts(self, path: str, named: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, str]]:
        for name, part in named:
            yield from self(f"{path}.{name}", part)

    def _compound(self, path: str, value: Any) -> Iterator[tuple[str, str]]:
        kind = type(value)
        if isinstance(value, type):
            yield path, f"{value.__module__}.{value.__qualname__}"
            if not _is_installed(inspect.getmodule(value)):
                methods = sorted((n, f) for n, f in vars(value).items() if inspect.isfunction(f))
                yield from self._parts(path, methods)
        elif isinstance(value, partial):  # and jax.tree_util.Partial
            yield from self(path, value.func)
            yield from self._parts(path, enumerate(value.args))
            yield from self._parts(path, sorted(value.keywords.items()))
        elif isinstance(value, types.MethodType):
            yield from self(path, value.__func__)
            yield from self(f"{path}.self", value.__self__)
        elif isinstance(value, Mapping):
            yield path, f"{len(value)} entries"
            yield from self._parts(path, value.items())
        elif isinstance(value, tuple | list):
            yield path, f"{kind.__qualname__} of {len(value)}"
            names = getattr(value, "_fields", range(len(value)))
            yield from self._parts(path, zip(names, value, strict=True))
        elif isinstance(value, set | frozenset):
            yield path, f"set {sorted(map(repr, value))}"
        elif callable(value) and isinstance(inspect.unwrap(value), types.FunctionType):
            yield from self._function(path, inspect.unwrap(value))
        elif dataclasses.is_dataclass(value):
            yield path, f"{kind.__module__}.{kind.__qualname__}"
            fields = dataclasses.fields(value)
            yield from self._parts(path, ((f.name, getattr(value, f.name)) for f in fields))
            yield from self._call(path, kind)
        elif hasattr(value, "__dict__") and not _is_installed(inspect.getmodule(kind)):
            yield path, kind.__qualname__
            yield from self._parts(path, sorted(vars(value).items()))
            yield from self._call(path, kind)
        else:
            yield path, _ADDRESS.sub("", repr(value))
            leaves = jax.tree_util.tree_leaves_with_path(value)
            named = ((jax.tree_util.keystr(where), leaf) for where, leaf in leaves)
            yield from self._parts(path, (pair for pair in named if pair[1] is not value))

    def _function(self, path: str, function: types.FunctionType) -> Iterator[tuple[str, str]]:
        code = function.__code__
        installed = _is_installed(code)
        name = f"{function.__module__}.{function.__qualname__}"
        yield path, name if installed else f"{function.__qualname__} code {_hash_code(code)[:12]}"
        known: dict[str, Any] = {}
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not assigned yet
                known[variable] = cell.cell_contents
        if not installed:
            looked_up = _names(code) & function.__globals__.keys()
            known |= {name: function.__globals__[name] for name in looked_up}
            known |= {f"default {i}": x for i, x in enumerate(function.__defaults__ or ())}
            known |= function.__kwdefaults__ or {}
        yield from self._parts(path, sorted(known.items()))

    def _call(self, path: str, kind: type) -> Iterator[tuple[str, str]]:
        """What instances of a user's own class do when they are called."""
        call = getattr(kind, "__call__", None)  # noqa: B004
        if isinstance(call, types.FunctionType) and not _is_installed(call.__code__):
            yield from self(f"{path}.__call__", call)


def _is_installed(what: types.CodeType | types.ModuleType | None) -> bool:
    """Whether it is part of an installed package, this one included, or built in."""
    name = what.co_filename if isinstance(what, types.CodeType) else getattr(what, "__file__", None)
    return name is None or any(Path(name).resolve().is_relative_to(p) for p in _INSTALLED)


def _names(code: types.CodeType) -> set[str]:
    """Names that a function looks up, inner functions included."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _hash_code(code: types.CodeType) -> str:
    """A hash of what a function does, wherever it stands."""

    def constant(value: Any) -> str:
        if isinstance(value, types.CodeType):
            return _hash_code(value)
        # The order of a set of strings is another in each process.
        return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)

    constants = [constant(value) for value in code.co_consts]
    return digest(code.co_code, repr((constants, code.co_names, code.co_freevars)).encode())
