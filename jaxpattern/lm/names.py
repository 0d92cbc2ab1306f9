"""Names of the parts of a transformer, as papers and code write them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

_PATTERNS = (
    ("head", re.compile(r"l(\d+)[ .]*h(\d+)")),
    ("head", re.compile(r"(\d+):(\d+)")),
    ("group", re.compile(r"l(\d+)[ .]*g(\d+)")),
    ("attn", re.compile(r"l(\d+)[ .]*attn")),
    ("mlp", re.compile(r"l(\d+)[ .]*mlp")),
    ("layer", re.compile(r"l(\d+)")),
    ("embed", re.compile("embed")),
    ("unembed", re.compile("unembed")),
    ("full", re.compile("full")),
)
_SPELLINGS = {
    "head": "l{}h{}",
    "group": "l{}g{}",
    "attn": "l{} attn",
    "mlp": "l{} mlp",
    "layer": "l{}",
    "embed": "embed",
    "unembed": "unembed",
    "full": "full",
}


class Part(NamedTuple):
    """A part: its kind and its numbers, layer first; or the path of a parameter."""

    kind: str
    numbers: tuple[int, ...] = ()
    path: str = ""

    @property
    def template(self) -> str:
        """The name without its numbers."""
        return self.path if self.kind == "parameter" else _SPELLINGS[self.kind]

    def __str__(self) -> str:
        return self.template.format(*self.numbers)


def parse(
    name: str,
    *,
    layers: range,
    counts: dict[str, int],
    parameters: Iterable[str],
    listed: Callable[[], Iterable[str]],
) -> Part:
    """The part that a name means.

    Args:
        name: such as `l0h1`, `L0H1`, `l0 h1`, `0:1`, `l0g0`, `l0`, `l0 attn`, `l0 mlp`, `embed`,
            `unembed`, `full`, or the path of a parameter.
        layers: numbers of the layers there are.
        counts: how many heads and groups a layer has.
        parameters: paths of the parameters.
        listed: all names of parts, for those nearest to an unknown one.

    Raises:
        TypeError: the name is not a string.
        ValueError: there is no such part.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a part must be a string, got {type(name).__name__}")
    if name in set(parameters):
        return Part("parameter", path=name)
    plain = name.strip().lower()
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(plain)
        if match is None:
            continue
        numbers = tuple(map(int, match.groups()))
        if numbers and numbers[0] not in layers:
            there = f"layers are {layers[0]} to {layers[-1]}" if layers else "there are none"
            raise ValueError(f"there is no layer {numbers[0]} for {name!r}; {there}")
        if len(numbers) == 2 and numbers[1] >= counts.get(kind, 0):
            raise ValueError(
                f"there is no {kind} {numbers[1]} for {name!r}; a layer has {counts.get(kind, 0)}"
            )
        return Part(kind, numbers)
    known = [*listed(), "full", *parameters]
    near = difflib.get_close_matches(plain, known, n=3, cutoff=0.4) or known[:3]
    raise ValueError(f"there is no part {name!r}; did you mean {', '.join(map(repr, near))}?")
