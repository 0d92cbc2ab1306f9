"""Which tokens, in their context, have the largest coordinates: how a direction is read.

Column t of a sequence is the loss of token t + 1 given those before it, so a coordinate `[B, T]`
belongs to the last T of the tokens `[B, T + 1]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array, Float, Int

from jaxpattern.validation import check_count, check_function

Decode: TypeAlias = Callable[[Sequence[int]], str]
"""Tokens to text, such as `Tokenizer.decode`."""


class TokenInContext(NamedTuple):
    """A token, what it scores, and the text around it.

    Attributes:
        coordinate: the number it is listed for.
        sequence: its row among the sequences.
        position: its place in the sequence, counted from 0; its loss is column position − 1.
        before: text before it.
        token: the token.
        after: text after it.
    """

    coordinate: float
    sequence: int
    position: int
    before: str
    token: str
    after: str


def extreme_tokens(
    coordinates: Float[Array | np.ndarray, "B T"],
    tokens: Int[Array | np.ndarray, "B length"],
    *,
    decode: Decode | None = None,
    num: int = 10,
    largest: bool = True,
    context: int = 12,
    per_token: int | None = None,
    per_sequence: int | None = None,
    weights: Float[Array | np.ndarray, "B T"] | None = None,
) -> list[TokenInContext]:
    """The tokens of largest, or smallest, coordinate in their context, the most extreme first.

    Args:
        coordinates: one number a predicted token, `[B, T]`, such as
            `directions.coordinates["code"][1]`.
        tokens: `[B, T + 1]`, what the losses were of.
        decode: tokens to text; by default they are bytes.
        num: at most how many.
        largest: False for the smallest.
        context: tokens of text before and after.
        per_token: at most how many of the same token, by default any number.
        per_sequence: at most how many of one sequence, by default any number.
        weights: `[B, T]`, where tokens of weight 0, such as padding, are not listed.

    Returns:
        One `TokenInContext` each; ties in the order of the text.

    Raises:
        TypeError: `decode` is not a function, or a number is not an integer.
        ValueError: shapes do not fit, a coordinate that counts is not finite, or tokens are no
            bytes where `decode` is left out.
    """
    coordinates, tokens = check_aligned(coordinates, tokens)
    decode = check_decode(decode, tokens)
    check_count("num", num, minimum=1)
    check_count("context", context, minimum=0)
    for name, limit in (("per_token", per_token), ("per_sequence", per_sequence)):
        if limit is not None:
            check_count(name, limit, minimum=1)
    counted = _counted(coordinates, weights)
    order = np.argsort(-coordinates if largest else coordinates, axis=None, kind="stable")
    rows: list[TokenInContext] = []
    seen: dict[tuple[str, int], int] = {}
    for b, t in zip(*np.unravel_index(order, coordinates.shape), strict=True):
        if len(rows) == num:
            break
        sequence = tokens[b].tolist()
        at = int(t) + 1
        kinds = (("token", sequence[at], per_token), ("sequence", int(b), per_sequence))
        full = any(limit and seen.get((kind, i), 0) >= limit for kind, i, limit in kinds)
        if full or not counted[b, t]:
            continue
        for kind, i, _ in kinds:
            seen[kind, i] = seen.get((kind, i), 0) + 1
        rows.append(
            TokenInContext(
                coordinate=float(coordinates[b, t]),
                sequence=int(b),
                position=at,
                before=decode(sequence[max(at - context, 0) : at]),
                token=decode([sequence[at]]),
                after=decode(sequence[at + 1 : at + 1 + context]),
            )
        )
    return rows


class TokenMean(NamedTuple):
    """A token, and its mean coordinate wherever it is predicted.

    Attributes:
        token: the token as text.
        token_id: its number in the vocabulary.
        occurrences: how often it occurs where the weight is not 0.
        mean: mean coordinate.
        stderr: standard error of the mean, occurrences taken as independent.
    """

    token: str
    token_id: int
    occurrences: int
    mean: float
    stderr: float


def mean_by_token(
    coordinates: Float[Array | np.ndarray, "B T"],
    tokens: Int[Array | np.ndarray, "B length"],
    *,
    decode: Decode | None = None,
    min_count: int = 5,
    weights: Float[Array | np.ndarray, "B T"] | None = None,
) -> list[TokenMean]:
    """The mean coordinate of each token of the vocabulary, the largest first.

    It tells a direction of certain tokens, such as delimiters, from one of contexts, in which the
    same token has coordinates of all sizes.

    Args:
        coordinates: one number a predicted token, `[B, T]`.
        tokens: `[B, T + 1]`, what the losses were of.
        decode: tokens to text; by default they are bytes.
        min_count: leave out tokens that occur less often; at least 2.
        weights: `[B, T]`, where occurrences of weight 0, such as padding, do not count.

    Returns:
        One `TokenMean` a token.

    Raises:
        TypeError, ValueError: as `extreme_tokens`.
    """
    coordinates, tokens = check_aligned(coordinates, tokens)
    decode = check_decode(decode, tokens)
    check_count("min_count", min_count, minimum=2)
    counted = _counted(coordinates, weights)
    values, token = np.float64(coordinates[counted]), tokens[:, 1:][counted]
    index, place, count = np.unique(token, return_inverse=True, return_counts=True)
    mean = np.bincount(place, values, len(index)) / count
    squares = np.bincount(place, (values - mean[place]) ** 2, len(index))
    stderr = np.sqrt(squares / np.maximum(count - 1, 1) / count)
    return [
        TokenMean(
            decode([int(index[i])]), int(index[i]), int(count[i]), float(mean[i]), float(stderr[i])
        )
        for i in np.argsort(-mean, kind="stable")
        if count[i] >= min_count
    ]


def format_tokens(rows: Sequence[TokenInContext], *, width: int = 32) -> str:
    """A table for reading, a line a token: its coordinate, and ⟦the token⟧ in its context.

        +3.14  …elf.window = ⟦window⟧↵        self.ste…

    Args:
        rows: from `extreme_tokens`.
        width: characters of text on either side.

    Returns:
        Lines joined by newlines; line breaks and tabs in the text are shown as ↵ and →.
    """
    check_count("width", width, minimum=1)
    numbers = [f"{row.coordinate:+.3g}" for row in rows]
    wide = max(map(len, numbers), default=0)
    lines = []
    for number, row in zip(numbers, rows, strict=True):
        before, token, after = (visible(text) for text in (row.before, row.token, row.after))
        if len(before) > width:
            before = "…" + before[len(before) - width + 1 :]
        if len(after) > width:
            after = after[: width - 1] + "…"
        lines.append(f"{number:>{wide}}  {before:>{width}}⟦{token}⟧{after}".rstrip())
    return "\n".join(lines)


def visible(text: str) -> str:
    """The text on one line: ↵ for a line break, → for a tab, · for what cannot be printed."""
    marks = {"\n": "↵", "\t": "→"}
    return "".join(marks.get(c) or (c if c.isprintable() else "·") for c in text)


def decode_each(
    tokens: Int[Array | np.ndarray, " length"], decode: Decode | None = None
) -> list[str]:
    """The text of each token by itself."""
    decode = check_decode(decode, np.asarray(tokens))
    return [decode([token]) for token in np.asarray(tokens).tolist()]


def _decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


def check_decode(decode: Any, tokens: np.ndarray) -> Decode:
    """What turns tokens into text: as given, or bytes as UTF-8 where all tokens are bytes."""
    if decode is not None:
        check_function("decode", decode, "a function of a list of tokens", num_arguments=1)
        return decode
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 256:
        raise ValueError(
            "decode must be given for tokens that are not bytes, "
            f"got tokens from {tokens.min()} to {tokens.max()}"
        )
    return _decode_bytes


def _counted(coordinates: np.ndarray, weights: Any) -> np.ndarray:
    """Where the weight is not 0; coordinates are finite there."""
    counted = np.ones(coordinates.shape, bool)
    if weights is not None:
        if np.shape(weights) != coordinates.shape:
            raise ValueError(
                f"weights must have shape {list(coordinates.shape)}, got {list(np.shape(weights))}"
            )
        counted = np.asarray(weights) > 0
    if not np.isfinite(coordinates[counted]).all():
        raise ValueError("coordinates are not finite; give weights that are 0 at padding")
    return counted


def check_aligned(coordinates: Any, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates `[B, T]` and tokens `[B, T + 1]` as NumPy arrays."""
    coordinates, tokens = np.asarray(coordinates), np.asarray(tokens)
    if coordinates.ndim != 2 or tokens.shape != (len(coordinates), coordinates.shape[1] + 1):
        raise ValueError(
            "coordinates must be [B, T] and tokens [B, T + 1], "
            f"got shapes {list(coordinates.shape)} and {list(tokens.shape)}"
        )
    return coordinates, tokens
