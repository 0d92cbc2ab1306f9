"""Where a backward sweep looks at the probes: windows, blocks of steps, segments of draws.

χ is a sum over the steps t behind a draw, and λ_t is large and changes fast close behind it, slowly
far off. The steps are cut into *blocks*; the probes meet one step of each, chosen at random and
counted as often as the block has steps. That is unbiased for any blocks. Blocks of a size in
proportion to the distance from the draw see every relaxation time equally well: a direction of
precision P lives for 2/(εP) steps, and from one step to many windows those may be.

A *segment* is several draws that share a sweep (λ is linear: ∂φ/∂s is added as the sweep passes a
draw), as many as fit into the states that are remembered.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxpattern.chains.loop import Segment
from jaxpattern.chains.plan import Plan

_GROWTH = 3  # a block is a third as long as its distance from the draw


class Blocks(NamedTuple):
    """The blocks of one segment, latest first; arrays are as long as the history, to fit all.

    Attributes:
        stop: the step after the last of the segment.
        num_blocks: how many there are.
        size: steps of each.
        source: the slot of the draw that a block lies right behind, or −1.
        draws: draws of the segment.
        length: steps of all blocks.
        tail: the first block behind the first draw.
    """

    stop: Any
    num_blocks: Any
    size: Any
    source: Any
    draws: Any
    length: Any
    tail: Any


def block_sizes(length: int, every: int | None) -> list[int]:
    """Sizes of the blocks behind a draw, as far back as `length` steps; the first is one step."""
    sizes, lag = [1], 1
    while lag < length:
        size = min(every or max(1, lag // _GROWTH), length - lag)
        sizes.append(size)
        lag += size
    return sizes


def segments(
    plan: Plan, *, window: int, every: int | None, history: int, slots: int
) -> tuple[Segment, ...]:
    """The draws of a plan in segments, each within a group of draws."""
    most = max(1, min(slots, 1 + (history - window) // plan.thin))
    found: list[Segment] = []
    for group in range(plan.batches):
        first, last = (-(-g * plan.num_draws // plan.batches) for g in (group, group + 1))
        pieces = -(-(last - first) // most)
        edges = [first + piece * (last - first) // pieces for piece in range(pieces + 1)]
        for start, stop in pairwise(edges):
            blocks = _blocks(plan, start, stop, window, every, history)
            found.append(Segment(start, stop, blocks))
    return tuple(found)


def _blocks(
    plan: Plan, start: int, stop: int, window: int, every: int | None, history: int
) -> Blocks:
    end = plan.num_burnin + stop * plan.thin
    # A sweep goes no further back than the chain.
    length = min(window + (stop - start - 1) * plan.thin, end)
    size, source = np.zeros(history, np.int32), np.full(history, -1, np.int32)
    count = tail = 0
    for draw in range(stop - 1, start - 1, -1):
        behind = plan.thin if draw > start else length - (stop - start - 1) * plan.thin
        tail, source[count] = count, draw - start
        sizes = block_sizes(behind, every)
        size[count : count + len(sizes)] = sizes
        count += len(sizes)
    numbers = (np.int32(x) for x in (stop - start, length, tail))
    return Blocks(np.int32(end), np.int32(count), size, source, *numbers)


def mean_blocks(schedule: tuple[Segment, ...]) -> tuple[float, float]:
    """Steps swept and probes asked, over the whole of a chain."""
    return (
        float(sum(int(segment.about.length) for segment in schedule)),
        float(sum(int(segment.about.num_blocks) for segment in schedule)),
    )
