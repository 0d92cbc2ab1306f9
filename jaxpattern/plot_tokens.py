"""The figure of tokens in context."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Array

from jaxpattern.canvas import (
    Figure,
    Normalize,
    PolyCollection,
    ScalarMappable,
    findfont,
    get_font,
)
from jaxpattern.lm.tokens import Decode, check_aligned, decode_each, visible
from jaxpattern.validation import check_count

_FONT, _FONT_SIZE = "DejaVu Sans Mono", 8


def tokens(
    coordinates: np.ndarray | Array,
    tokens: np.ndarray | Array,
    *,
    decode: Decode | None = None,
    width: int = 88,
    limit: float | None = None,
    label: str = "coordinate",
) -> Figure:
    """Running text, each token on a background coloured by its coordinate.

    Lines break where the text does and at `width` characters. Characters that do not print are
    drawn as a dot, and a line break is shown as ↵, since it is a token, too. The first token of
    a sequence is predicted by nothing and has no colour, like tokens of coordinate NaN.

    Args:
        coordinates: one number a predicted token, `[B, T]`; each sequence starts a paragraph.
        tokens: `[B, T + 1]`, what the losses were of.
        decode: tokens to text, called with one token at a time; by default they are bytes.
        width: characters a line.
        limit: number at the ends of the colour scale, by default the 99th percentile of the
            magnitudes, which a few outliers do not move.
        label: what the numbers are.

    Raises:
        ValueError: shapes do not fit, or tokens are no bytes where `decode` is left out.
    """
    coordinates, tokens = check_aligned(coordinates, tokens)
    check_count("width", width, minimum=1)
    pieces = []
    line = column = 0
    for values, sequence in zip(coordinates, tokens, strict=True):
        for value, text in zip([np.nan, *values], decode_each(sequence, decode), strict=True):
            for part, ends in _wrap(_drawable(text), width, column):
                pieces.append((line, column, part, value))
                line, column = (line + 1, 0) if ends else (line, column + len(part))
        line, column = line + (2 if column else 1), 0
    finite = np.abs(coordinates[np.isfinite(coordinates)])
    limit = limit or (float(np.quantile(finite, 0.99)) if finite.size else 0.0) or 1.0

    # The size of a cell is that of a character of the font, so that backgrounds fit the text.
    cell_width, cell_height, bar = 0.602 * _FONT_SIZE / 72, 1.45 * _FONT_SIZE / 72, 0.9
    inner = (width * cell_width, max(line, 4) * cell_height)
    outer = (inner[0] + bar + 0.2, inner[1] + 0.2)
    figure = Figure(figsize=outer, dpi=150)
    ax = figure.add_axes((0.1 / outer[0], 0.1 / outer[1], inner[0] / outer[0], inner[1] / outer[1]))
    ax.set_xlim(0, width)
    ax.set_ylim(max(line, 4), 0)
    ax.axis("off")
    scale = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
    boxes = [(x, y, len(part), value) for y, x, part, value in pieces if np.isfinite(value)]
    ax.add_collection(
        PolyCollection(
            [[(x, y), (x + n, y), (x + n, y + 1), (x, y + 1)] for x, y, n, _ in boxes],
            facecolors=[scale.to_rgba(value) for *_, value in boxes],
            edgecolors="white", linewidths=0.4,
        )
    )  # fmt: skip
    for y, x, part, value in pieces:
        if part.strip():
            ax.text(
                x, y + 0.5, part, family=_FONT, fontsize=_FONT_SIZE, va="center", ha="left",
                color="white" if abs(value) > 0.6 * limit else "black", parse_math=False,
            )  # fmt: skip
    height = min(1.5, inner[1])
    bar_ax = figure.add_axes(
        (
            (inner[0] + 0.25) / outer[0],
            1 - (0.1 + height) / outer[1],
            0.12 / outer[0],
            height / outer[1],
        )
    )
    colours = figure.colorbar(scale, cax=bar_ax)
    colours.set_label(label, fontsize=8)
    colours.ax.tick_params(labelsize=7)
    colours.outline.set_visible(False)
    return figure


def _wrap(text: str, width: int, column: int) -> Iterator[tuple[str, bool]]:
    """The text in parts that fit a line from a column on, and whether the line ends there."""
    while text:
        room = width - column
        stop = text.find("↵", 0, room)
        part = text[:room] if stop < 0 else text[: stop + 1]
        text = text[len(part) :]
        ends = stop >= 0 or len(part) == room
        yield part, ends
        column = 0 if ends else column + len(part)


@functools.cache
def _known_characters() -> frozenset[int]:
    """What the font can draw."""
    return frozenset(get_font(findfont(_FONT)).get_charmap())


def _drawable(text: str) -> str:
    """The text as the font can draw it, a character a cell."""
    shown = visible(text.replace("\t", "    "))
    return "".join(c if ord(c) in _known_characters() else "·" for c in shown)
