"""Strings of brackets, and two rules that tell them apart.

The *depth* d_t after t symbols is the number of "(" less that of ")". A string is NESTED (properly
balanced) if no d_t < 0 and the last one is 0; it is EQUAL-COUNT if the last one is 0. Trained on
strings for which both rules agree, a model may learn either; the strings for which they disagree,
equal counts that are not nested, tell which.

Tokens are 0 (padding), 1 for "(" and 2 for ")"; strings `[N, T]` are padded on the right.

Sources: Li et al. 2025, arXiv 2507.06445; Wang & Murfet 2026, arXiv 2601.13548.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxpattern.validation import check_count

PAD, OPEN, CLOSE = 0, 1, 2

Strings = Int[np.ndarray, "N T"]


class Category(NamedTuple):
    """What a string is made of; `imbalance` is its last depth, `dip` its lowest (at most 0).

    `excess_dip` is how far the depth dips below what the last depth implies, min(0, last) − dip:
    0 for a string that only lacks or has too many at its ends.
    """

    nested: Bool[np.ndarray, " N"]
    equal_count: Bool[np.ndarray, " N"]
    imbalance: Int[np.ndarray, " N"]
    dip: Int[np.ndarray, " N"]
    excess_dip: Int[np.ndarray, " N"]


def depth(strings: Strings) -> Int[np.ndarray, "N T"]:
    """d_t after each symbol; padding keeps it."""
    return np.cumsum((strings == OPEN).astype(int) - (strings == CLOSE), axis=1)


def categories(strings: Strings) -> Category:
    """Both rules, and by how much each fails."""
    levels = depth(strings)
    last, dip = levels[:, -1], np.minimum(levels.min(axis=1), 0)
    return Category(
        nested=(last == 0) & (dip == 0),
        equal_count=last == 0,
        imbalance=last,
        dip=dip,
        excess_dip=np.minimum(last, 0) - dip,
    )


def nested_strings(rng: np.random.Generator, num: int, length: int) -> Strings:
    """Nested strings of one even length, each equally likely.

    With r open brackets and k symbols left, P(close) = r (k + r + 2) / (2k (r + 1)): the share of
    continuations that begin with ")".

    Raises:
        ValueError: `length` is odd or below 2.
    """
    _check(num, length)
    strings = np.empty((num, length), np.int32)
    level = np.zeros(num)
    for t in range(length):
        left = length - t
        close = rng.random(num) < level * (left + level + 2) / (2 * left * (level + 1))
        strings[:, t] = np.where(close, CLOSE, OPEN)
        level += np.where(close, -1, 1)
    return strings


def random_strings(rng: np.random.Generator, num: int, length: int) -> Strings:
    """Strings of independent, equally likely symbols."""
    _check(num, length)
    return rng.integers(OPEN, CLOSE + 1, (num, length), dtype=np.int32)


def equal_count_strings(rng: np.random.Generator, num: int, length: int) -> Strings:
    """Strings with as many "(" as ")", each equally likely; nested ones are among them."""
    _check(num, length)
    halves = np.repeat(np.array([OPEN, CLOSE], np.int32), length // 2)
    return rng.permuted(np.broadcast_to(halves, (num, length)), axis=1)


def uneven_strings(rng: np.random.Generator, num: int, length: int) -> Strings:
    """Independent symbols, given that the counts differ."""
    return _accept(num, lambda: random_strings(rng, num, length), lambda c: ~c.equal_count)


def out_of_distribution(rng: np.random.Generator, num: int, length: int) -> Strings:
    """Equal counts that are not nested, each equally likely.

    Raises:
        ValueError: `length` is odd or below 2.
    """
    return _accept(num, lambda: equal_count_strings(rng, num, length), lambda c: ~c.nested)


def pad(strings: Strings, length: int) -> Int[np.ndarray, "N length"]:
    """The same strings, padded on the right."""
    if strings.shape[1] > length:
        raise ValueError(f"length must be at least {strings.shape[1]}, got {length}")
    return np.pad(strings, ((0, 0), (0, length - strings.shape[1])), constant_values=PAD)


def to_text(string: Int[np.ndarray, " T"]) -> str:
    """The string as people write it."""
    return "".join(" ()"[token] for token in string).rstrip()


def _accept(num: int, draw, wanted) -> Strings:  # type: ignore[no-untyped-def]
    """Draws that are wanted, as many as asked for."""
    kept = [draw()[:0]]
    while sum(map(len, kept)) < num:
        strings = draw()
        kept.append(strings[wanted(categories(strings))])
    return np.concatenate(kept)[:num]


def _check(num: int, length: int) -> None:
    check_count("num", num, minimum=1)
    check_count("length", length, minimum=2)
    if length % 2:
        raise ValueError(f"length must be even, got {length}")
