"""What a computation depends on, as lines of text that two processes can compare.

A value becomes a dictionary path → description: numbers as they are, arrays by dtype, shape and a
hash of their bytes, containers by their parts. What a user wrote is followed: a function is a hash
of its bytecode, with what it closes over, its defaults and the globals that it names; a module is
a hash of its file, with those of its attributes that are named; an instance is its attributes and
its class, a class all that stands in its body and in those of its parents. What is installed is a
name, compared by version or by a hash of its file, with what it closes over.

Names do not catch everything (what the environment says, what is looked up by a computed name), so
a run also keeps some of its losses at w*, by `about`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import platform
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
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
_CHECKERS = re.compile(r"<@beartype|[/\\](beartype|jaxtyping)[/\\]")  # their names hold addresses
_ABOUT = "about "
_LONGEST, _SHOWN = 400, 100  # characters of a path
_WRAPPED = ("__wrapped__", "fun", "fwd", "bwd", "jvp")
_PACKAGES = ("jax", "jaxlib", "blackjax", "optax", "flax", "numpy")
_INSTALLED = tuple(
    Path(str(path)).resolve()
    for path in {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *(metadata.distribution(name).locate_file("") for name in ("jax", "numpy")),
        Path(__file__).resolve().parents[1],
    }
)


def fingerprint(**arguments: Any) -> dict[str, str]:
    """Lines that say what the arguments are, and on what they are computed."""
    lines = _describe(arguments)
    lines["platform"] = jax.default_backend()
    lines["python"] = ".".join(platform.python_version_tuple()[:2])
    lines["version of jaxpattern"] = __version__
    for name in _PACKAGES:
        lines[f"version of {name}"] = _version(name)
    for option in ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable"):
        lines[option] = str(getattr(jax.config, option))
    return lines


def about(values: Any, tolerance: float) -> str:
    """Numbers as a line that agrees with those of another machine, which rounds otherwise."""
    numbers = [float(f"{x:.7g}") for x in np.ravel(np.asarray(values, np.float64))]
    return f"{_ABOUT}{tolerance:g} {json.dumps(numbers)}"


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs, one line per path."""
    return [
        f"{path}: {old.get(path, 'nothing')} there, {new.get(path, 'nothing')} here"
        for path in sorted(old.keys() | new.keys())
        if not _agree(old.get(path, ""), new.get(path, ""))
    ]


def _agree(old: str, new: str) -> bool:
    if not (old.startswith(_ABOUT) and new.startswith(_ABOUT)):
        return old == new
    (tolerance, before), (_, after) = (line[len(_ABOUT) :].split(" ", 1) for line in (old, new))
    x, y = (np.asarray(json.loads(numbers), np.float64) for numbers in (before, after))
    size = np.nanmax(np.abs(x), initial=0.0)
    return x.shape == y.shape and np.allclose(x, y, 0.0, float(tolerance) * size, equal_nan=True)


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
    short = f" {array.tolist()}" if array.size <= 4 else f" {digest(array.tobytes())[:12]}"
    return f"{array.dtype}{list(array.shape)}{short}"


_Parts = Iterable[tuple[Any, Any]]


class _Attributes:
    """Some attributes of a module: those that a function names."""

    def __init__(self, module: types.ModuleType, names: set[str]) -> None:
        self.module, self.names = module, names
        self.identity = (id(module), frozenset(names))


class _Leave:
    """Marks in the list of what is to be described that a container is done."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _describe(arguments: dict[str, Any]) -> dict[str, str]:
    """The lines of all that can be reached; without recursion, since structures may be deep."""
    lines: dict[str, str] = {}
    seen: dict[Any, tuple[str, Any]] = {}  # holds what it saw: an id is not used twice
    around: dict[int, str] = {}  # containers that the current value lies in
    todo: list[tuple[str, Any]] = list(reversed(arguments.items()))
    while todo:
        path, value = todo.pop()
        if isinstance(value, _Leave):
            around.pop(id(value.value))
            continue
        plain = _plain(value)
        if plain is not None:
            lines[path] = plain
            continue
        # Containers are told apart by what they hold; other things are described where they are
        # met first.
        if isinstance(value, tuple | list | Mapping):
            known = around.get(id(value))
            if known is None:
                around[id(value)] = path
                todo.append(("", _Leave(value)))
        else:
            who = value.identity if isinstance(value, _Attributes) else id(value)
            known = seen[who][0] if who in seen else None
            seen.setdefault(who, (path, value))
        if known is not None:
            lines[path] = f"the same as {known}"
            continue
        line, parts = _compound(value)
        if line:
            lines[path] = line
        todo.extend(reversed([(_join(path, name), part) for name, part in parts]))
    return lines


def _join(path: str, name: Any) -> str:
    """The path of a part; without a name, that of the whole."""
    if name is None:
        return path
    path = f"{path}.{_ADDRESS.sub('', str(name))}"
    return path if len(path) < _LONGEST else f"{path[:_SHOWN]}…{digest(path.encode())}"


def _plain(value: Any) -> str | None:
    """The line of a value without parts."""
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return repr(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic) and value.dtype != object:
        return _array(value)
    if isinstance(value, types.BuiltinFunctionType):
        return f"{value.__module__} {value.__name__}"
    return None


def _compound(value: Any) -> tuple[str, _Parts]:
    """What a value is, and its parts by name; those without a name are what it stands for."""
    kind = type(value)
    if isinstance(value, types.ModuleType):
        return _module(value), ()
    if isinstance(value, _Attributes):
        known = {} if _is_installed(value.module) else vars(value.module)
        parts = [(n, _within(known[n], value.names)) for n in sorted(value.names & known.keys())]
        return _module(value.module), parts
    if isinstance(value, type):
        return _class(value)
    if isinstance(value, partial):  # and jax.tree_util.Partial
        return "", [(None, value.func), *enumerate(value.args), *sorted(value.keywords.items())]
    if isinstance(value, types.MethodType):
        return "", [(None, value.__func__), ("self", value.__self__)]
    if isinstance(value, Mapping):
        return f"{len(value)} entries", [*value.items(), *_own_class(kind)]
    if isinstance(value, tuple | list):
        names = getattr(value, "_fields", range(len(value)))
        parts = [*zip(names, value, strict=True), *_own_class(kind)]
        return f"{kind.__qualname__} of {len(value)}", parts
    if isinstance(value, set | frozenset):
        return f"set {sorted(_ADDRESS.sub('', repr(x)) for x in value)}", ()
    if isinstance(value, np.ndarray):
        return f"object{list(value.shape)}", enumerate(value.ravel().tolist())
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, property):
        return "property", [("get", value.fget)]
    if isinstance(value, classmethod | staticmethod):
        return "", [(None, value.__func__)]
    if isinstance(value, functools.cached_property | functools.partialmethod):
        return kind.__name__, [(n, x) for n, x in sorted(vars(value).items()) if n != "lock"]
    if callable(value) and not _own_class(kind):  # jit, custom_vjp, lru_cache
        wrapped = [(n, getattr(value, n)) for n in _WRAPPED if hasattr(value, n)]
        if wrapped:
            return kind.__qualname__, wrapped
    return _instance(value, kind)


def _module(module: types.ModuleType) -> str:
    file = getattr(module, "__file__", None)
    if file is None or _is_installed(module):
        return module.__name__
    return f"{module.__name__} {_hash_file(file)}"


def _within(value: Any, names: set[str]) -> Any:
    """A module only as far as it is named."""
    return _Attributes(value, names) if isinstance(value, types.ModuleType) else value


def _class(kind: type) -> tuple[str, _Parts]:
    if not _own_class(kind):
        return f"{kind.__module__}.{kind.__qualname__}{_foreign(kind.__module__)}", ()
    parents = [(base.__name__, base) for base in kind.__bases__ if base is not object]
    body = [(n, x) for n, x in sorted(vars(kind).items()) if _is_written(n, x)]
    return kind.__qualname__, body + parents


def _is_written(name: str, value: Any) -> bool:
    """Whether it stands in the body of a class; else Python or a decorator put it there."""
    if not (name.startswith("__") and name.endswith("__")):
        return name != "_abc_impl"
    return isinstance(value, types.FunctionType) and value.__code__.co_filename != "<string>"


def _own_class(kind: type) -> list[tuple[str, type]]:
    """The class of an instance, where a user wrote it."""
    return [] if _is_installed(sys.modules.get(kind.__module__)) else [(kind.__name__, kind)]


def _instance(value: Any, kind: type) -> tuple[str, _Parts]:
    name, own = f"{kind.__module__}.{kind.__qualname__}", _own_class(kind)
    state = dict(getattr(value, "__dict__", {}))
    for slot in (n for base in kind.__mro__ for n in _slots(base)):
        with contextlib.suppress(AttributeError):
            state[slot] = getattr(value, slot)
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        more = {n: x for n, x in state.items() if own and not n.startswith("_")}
        return name, [*sorted((_kept(more, kind) | fields).items()), *own]
    if own or isinstance(value, types.SimpleNamespace | argparse.Namespace):
        if isinstance(value, int | float | str | bytes):  # with a name, as in an enumeration
            name = f"{name} {value!r}"
        return name, [*sorted(_kept(state, kind).items()), *own]
    leaves = jax.tree_util.tree_leaves_with_path(value)
    parts = [(jax.tree_util.keystr(where), leaf) for where, leaf in leaves if leaf is not value]
    code = [(n, x) for n, x in sorted(state.items()) if isinstance(x, types.FunctionType)]
    return _ADDRESS.sub("", repr(value)), parts + code


def _kept(state: dict[str, Any], kind: type) -> dict[str, Any]:
    """Attributes without what a property has only stored: it may be asked for later."""
    cached = functools.cached_property
    return {
        name: part
        for name, part in state.items()
        if not isinstance(inspect.getattr_static(kind, name, None), cached)
    }


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _function(function: types.FunctionType) -> tuple[str, _Parts]:
    code = function.__code__
    if _CHECKERS.search(code.co_filename) and hasattr(function, "__wrapped__"):
        return "", [(None, function.__wrapped__)]
    installed = _is_installed(code)
    known: dict[str, Any] = {}
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            known[variable] = cell.cell_contents
    if installed:
        name = f"{function.__module__}.{function.__qualname__}"
        return name + _foreign(function.__module__), sorted(known.items())
    names = _names(code)
    known |= {n: function.__globals__[n] for n in names & function.__globals__.keys()}
    known |= {f"default {i}": x for i, x in enumerate(function.__defaults__ or ())}
    known |= function.__kwdefaults__ or {}
    known |= {n: x for n, x in vars(function).items() if not n.startswith("__")}
    parts = [(n, _within(x, names)) for n, x in sorted(known.items())]
    return f"{function.__qualname__} code {_hash_code(code)[:12]}", parts


def _foreign(module: str | None) -> str:
    """A hash of the file of what is installed, unless a version stands for it already."""
    top = (module or "").partition(".")[0]
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None or top in (*_PACKAGES, "jaxpattern") or top in sys.stdlib_module_names:
        return ""
    return f" {_hash_file(file)}"


def _is_installed(what: types.CodeType | types.ModuleType | None) -> bool:
    """Whether it is part of an installed package, this one included, or built in."""
    if isinstance(what, types.CodeType):
        return what.co_filename.startswith("<frozen") or _lies_installed(what.co_filename)
    if what is None or what.__name__ == "__main__":
        return False
    places = [getattr(what, "__file__", None), *getattr(what, "__path__", ())]
    known = [place for place in places if place is not None]
    return not known or _lies_installed(known[0])


@functools.cache
def _lies_installed(file: str) -> bool:
    return any(Path(file).resolve().is_relative_to(folder) for folder in _INSTALLED)


def _hash_file(file: str) -> str:
    with contextlib.suppress(OSError):
        return digest(Path(file).read_bytes())[:12]
    return ""


def _names(code: types.CodeType) -> set[str]:
    """Names that a function may look up, inner functions included: also those in strings."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
        elif isinstance(constant, str):
            names.add(constant)
    return names


def _hash_code(code: types.CodeType) -> str:
    """A hash of what a function does, wherever it stands."""

    def constant(value: Any) -> str:
        if isinstance(value, types.CodeType):
            return _hash_code(value)
        # The order of a set of strings is another in each process.
        return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)

    constants = [constant(value) for value in code.co_consts]
    return digest(code.co_code, repr((constants, code.co_names, code.co_freevars)).encode())
