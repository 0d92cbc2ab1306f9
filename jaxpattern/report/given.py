"""What comes beside a result: the text and the losses of its columns, checked and packed."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpattern.lm.tokens import Decode, check_decode
from jaxpattern.validation import check_function

Shapes = Mapping[str, tuple[int, ...]]


def packed(values: Any, kind: str) -> str:
    """The numbers in base64, little-endian: what the page reads as a typed array."""
    return base64.b64encode(np.asarray(values, np.dtype(kind).newbyteorder("<")).tobytes()).decode()


def check_known(name: str, given: Mapping[str, Any], shapes: Shapes) -> None:
    """Names of probe sets whose columns are single losses.

    Raises:
        TypeError: it is not a mapping.
        ValueError: a name is unknown, or there is no response with a column for each loss.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must map probe sets to values, got {type(given).__name__}")
    if given and not shapes:
        raise ValueError(
            f"{name} belongs to results with one column per loss, got only results with one column "
            "per probe set; report the response before group_mean"
        )
    if unknown := [probe for probe in given if probe not in shapes]:
        raise ValueError(f"{name} names {unknown}, the probe sets are {list(shapes)}")


def pack_losses(losses: Mapping[str, Any], shapes: Shapes) -> dict[str, str]:
    """Losses at w*, of the shape of their columns."""
    check_known("losses", losses, shapes)
    for name, values in losses.items():
        if np.shape(values) != shapes[name]:
            raise ValueError(
                f"losses[{name!r}] must have the shape of its columns, {list(shapes[name])}, "
                f"got {list(np.shape(values))}"
            )
    return {name: packed(values, "f4") for name, values in losses.items()}


def pack_tokens(
    tokens: Mapping[str, Any], shapes: Shapes, decode: Decode | None
) -> dict[str, dict[str, Any]]:
    """The text of the columns: each different token once, and which stands where.

    Tokens of losses `[B, T]` are `[B, T + 1]`, of which the first has no loss, or `[B, T]`. Those
    of losses `[B]` are one text for each sample, or the tokens of each, of any length.

    Raises:
        TypeError: tokens are neither texts nor integers.
        ValueError: their shape does not fit, or integers are no bytes and `decode` is not given.
    """
    check_known("tokens", tokens, shapes)
    if decode is not None:
        check_function("decode", decode, "a function of a list of tokens", num_arguments=1)
    return {name: _pack(_texts(name, rows, shapes[name], decode)) for name, rows in tokens.items()}


def _texts(name: str, rows: Any, shape: tuple[int, ...], decode: Decode | None) -> list[list[str]]:
    """The texts of each row of tokens; of losses `[B]` one text each."""
    if isinstance(rows, str | Mapping) or not hasattr(rows, "__len__"):
        raise TypeError(f"tokens[{name!r}] must be rows of tokens, got {type(rows).__name__}")
    lines = [_line(f"tokens[{name!r}][{i}]", row) for i, row in enumerate(rows)]
    per = math.prod(shape[1:])
    fitting = {per, per + 1} if len(shape) > 1 else {len(line) for line in lines}
    if len(lines) != shape[0] or not {len(line) for line in lines} <= fitting:
        wanted = f"{shape[0]} texts or rows of tokens, one for each sample"
        if len(shape) > 1:
            wanted = f"{shape[0]} rows of {per + 1} tokens (or {per}, one for each loss)"
        lengths = sorted({len(line) for line in lines})
        got = " to ".join(map(str, dict.fromkeys(lengths[:1] + lengths[-1:])))
        raise ValueError(f"tokens[{name!r}] must be {wanted}, got {len(lines)} rows of {got}")
    if len(shape) > 1 and len({len(line) for line in lines}) > 1:
        raise ValueError(f"tokens[{name!r}] must have rows of one length, got {per} and {per + 1}")
    numbers = [line for line in lines if isinstance(line, np.ndarray)]
    read = check_decode(decode, np.concatenate(numbers)) if numbers else None
    known: dict[int, str] = {}

    def texts(line: list[str] | np.ndarray) -> list[str]:
        if read is None or isinstance(line, list):
            return list(line)
        ids = line.tolist()
        if len(shape) == 1:
            return [read(ids)]
        for token in ids:
            if token not in known:
                known[token] = read([token])
        return [known[token] for token in ids]

    found = [texts(line) for line in lines]
    return [["".join(line)] for line in found] if len(shape) == 1 else found


def _line(where: str, row: Any) -> list[str] | np.ndarray:
    """A row of tokens, as texts or as integers; a text by itself is a row of one."""
    if isinstance(row, str):
        return [row]
    if isinstance(row, list | tuple) and row and all(isinstance(token, str) for token in row):
        return list(row)
    array = np.asarray(row)
    if array.ndim == 1 and array.dtype.kind == "U":
        return [str(token) for token in array]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"{where} must be a row of texts or integers, got {array.dtype}{list(array.shape)}"
        )
    return array


def _pack(lines: list[list[str]]) -> dict[str, Any]:
    flat = [token for line in lines for token in line]
    vocabulary: dict[str, int] = {}
    ids = [vocabulary.setdefault(token, len(vocabulary)) for token in flat]
    return {"vocabulary": list(vocabulary), "ids": packed(ids, "i4"), "length": len(lines[0])}
