"""Results in files: `.npz` archives of plain arrays with a JSON header, no pickle.

The header holds the format, which kind of result it is, everything that is no array, the units of
the arrays, where the numbers come from, and a checksum; `numpy.load` reads the arrays anywhere.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpattern._version import __version__
from jaxpattern.inversion.intervention import Intervention
from jaxpattern.llc import LocalLearningCoefficient
from jaxpattern.response.columns import Columns
from jaxpattern.response.influence_result import Influence
from jaxpattern.response.result import Response
from jaxpattern.runtime.fingerprint import digest
from jaxpattern.validation import is_concrete

_FORMAT = 1
_HEADER = "header"
UNITS: dict[type, dict[str, str]] = {
    Response: {
        "chi": "observable × loss (nats), no factor nβ",
        "stderr": "observable × loss (nats)",
        "halves": "observable × loss (nats)",
        "batches": "observable × loss (nats)",
        "mass": "share of the data, sum 1",
        "nbeta": "1 / loss (nats)",
        "mean": "observable",
        "mean_stderr": "observable",
        "rhat": "none",
        "ess": "draws",
        "cost": "gradient equivalents",
    },
    Intervention: {
        "weights": "ρ, 1 is the weight a sample has now",
        "cross_fitted_shift": "observable",
        "cross_fitted_stderr": "observable",
        "predicted_shift": "observable",
        "predicted_stderr": "observable",
        "residual": "observable",
        "effective_sample_size": "samples",
        "negative_share": "share of the data",
        "mass": "share of the data, sum 1",
    },
    Influence: {
        "influence": "loss² (nats²), no factor nβ; none, where it is a correlation",
        "stderr": "as influence",
        "query_mass": "share of the rows, sum 1",
        "probe_mass": "share of the columns, sum 1",
        "nbeta": "1 / loss (nats)",
        "mean": "loss (nats)",
        "mean_stderr": "loss (nats)",
        "rhat": "none",
        "ess": "draws",
        "cost": "gradient equivalents",
    },
    LocalLearningCoefficient: {
        "mean": "none",
        "stderr": "none",
        "trace": "none; nβ (L − L(w*)), NaN where a chain is lost",
        "ess": "draws",
        "cost": "gradient equivalents",
    },
}


class ResultFileError(ValueError):
    """A file is damaged, of another format, or no result of this package."""


def save(
    path: str | os.PathLike[str],
    result: Response | Influence | Intervention | LocalLearningCoefficient,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a result to a file that `load` reads to the same bits.

    Args:
        path: the file, replaced as a whole if it exists.
        result: what `susceptibilities`, `influence`, `solve_weights` or `llc` returned.
        provenance: what else the file should say of its origin: a mapping that JSON can hold.

    Raises:
        TypeError: it is no such result, it is being traced, or JSON cannot hold the provenance.
        OSError: the file cannot be written; one that was there is as it was.
    """
    kind = type(result)
    if kind not in UNITS:
        wanted = ", ".join(sorted(k.__name__ for k in UNITS))
        raise TypeError(f"result must be one of {wanted}, got {kind.__name__}")
    if not all(map(is_concrete, jax.tree.leaves(result))):
        raise TypeError("result cannot be saved under jit, vmap or grad, where it has no numbers")
    arrays: dict[str, np.ndarray] = {}
    content = {name: _encode(getattr(result, name), name, arrays) for name in _names(kind)}
    header = {
        "format": _FORMAT,
        "kind": kind.__name__,
        "content": content,
        "units": UNITS[kind],
        "provenance": {
            **origin(),
            **(provenance or {}),
        },
    }
    try:
        text = json.dumps(header, ensure_ascii=False, sort_keys=True)
    except TypeError as error:
        raise TypeError(f"provenance must be what JSON can hold: {error}") from error
    sealed = json.dumps({"header": text, "checksum": _checksum(text, arrays)}).encode()
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            arrays[_HEADER] = np.frombuffer(sealed, np.uint8)
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def origin() -> dict[str, str]:
    """Where and when numbers are written down: versions, backend, time."""
    return {
        "jaxpattern": __version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def load(
    path: str | os.PathLike[str],
) -> Response | Influence | Intervention | LocalLearningCoefficient:
    """The result in a file that `save` wrote.

    Raises:
        ResultFileError: the file is damaged, of another format, or no such file.
        OSError: it cannot be read.
    """
    header, arrays = _read(path)
    kind = {k.__name__: k for k in UNITS}[header["kind"]]
    values = {name: _decode(value, arrays) for name, value in header["content"].items()}
    missing = set(_names(kind)) - set(values)
    if set(values) - set(_names(kind)) or missing - _with_default(kind):
        raise ResultFileError(
            f"{path} holds the fields {sorted(values)}, a {kind.__name__} has "
            f"{sorted(_names(kind))}"
        )
    return kind(**values)


def _with_default(kind: type) -> set[str]:
    """Fields that files of earlier versions may lack."""
    if hasattr(kind, "_field_defaults"):
        return set(kind._field_defaults)
    given = (
        f for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING
    )
    return {f.name for f in given}


def provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of its numbers: kind, units, versions, time, and what it was given.

    Raises:
        ResultFileError: as for `load`.
    """
    header, _ = _read(path)
    return {"kind": header["kind"], "units": header["units"], **header["provenance"]}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    content = Path(path).read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        sealed = json.loads(arrays.pop(_HEADER).tobytes())
        header = json.loads(sealed["header"])
        version, kind = header["format"], header["kind"]
    except Exception as error:  # a broken archive may raise nearly anything
        raise ResultFileError(
            f"{path} is damaged, or no result of this package ({type(error).__name__}: {error})"
        ) from error
    if version != _FORMAT:
        raise ResultFileError(
            f"{path} has format {version}, written by jaxpattern "
            f"{header.get('provenance', {}).get('jaxpattern', 'unknown')}; "
            f"this version reads {_FORMAT}"
        )
    if kind not in {k.__name__ for k in UNITS}:
        raise ResultFileError(f"{path} holds a {kind!r}, which this version does not know")
    if sealed.get("checksum") != _checksum(sealed["header"], arrays):
        raise ResultFileError(f"{path} is damaged: its checksum is wrong")
    return header, arrays


def _names(kind: type) -> tuple[str, ...]:
    return getattr(kind, "_fields", None) or tuple(field.name for field in fields(kind))


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """JSON for a value, its arrays put aside."""
    if isinstance(value, Mapping):
        return {"entries": [[k, _encode(v, f"{path}/{k}", arrays)] for k, v in value.items()]}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        name = f"{len(arrays):03d} {path}".replace("/", " ")
        array = np.asarray(value)
        # Of types that NumPy files do not know (bfloat16) the bytes are kept.
        arrays[name] = array if array.dtype.isbuiltin else np.frombuffer(array.tobytes(), np.uint8)
        return {"array": name, "dtype": str(array.dtype), "shape": list(array.shape)}
    if isinstance(value, Columns):
        parts = {name: _encode(getattr(value, name), path, arrays) for name in _names(Columns)}
        return {"columns": parts}
    return {"tuple": list(value)} if isinstance(value, tuple) else {"value": value}


def _decode(value: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    if "entries" in value:
        return {name: _decode(part, arrays) for name, part in value["entries"]}
    if "array" in value:
        array = arrays[value["array"]]
        dtype = jnp.dtype(value["dtype"])
        array = array if array.dtype == dtype else array.view(dtype)
        array = array.reshape(value["shape"])
        # float64 stays so, even where JAX would make it float32.
        return array if array.dtype != jax.dtypes.canonicalize_dtype(dtype) else jnp.asarray(array)
    if "columns" in value:
        return Columns(**{name: _decode(part, arrays) for name, part in value["columns"].items()})
    return _as_tuple(value["tuple"]) if "tuple" in value else value["value"]


def _as_tuple(values: list[Any]) -> tuple[Any, ...]:
    """JSON has lists only."""
    return tuple(_as_tuple(value) if isinstance(value, list) else value for value in values)


def _checksum(header: str, arrays: Mapping[str, np.ndarray]) -> str:
    parts = (part for name in sorted(arrays) for part in (name.encode(), arrays[name].tobytes()))
    return digest(header.encode(), *parts)
