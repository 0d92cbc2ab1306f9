"""How the chains of a run are swept back: window, states remembered, segments of draws."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax

from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.loop import Segment
from jaxpattern.chains.run import Run
from jaxpattern.posterior import Posterior
from jaxpattern.response.problem import Problem
from jaxpattern.response.schedule import block_sizes, segments
from jaxpattern.restriction import Restriction
from jaxpattern.types import Position

SLOTS = 64  # most draws of a segment
_WINDOW_RELAXATIONS = 6
_SEGMENT_WINDOWS = 5  # windows that are remembered: one behind the first draw, four of draws
_MOST_BYTES = 2**30  # of states that are remembered, by all chains
_FREE_BYTES = 2**24  # of which so many are never saved on
_LEAST_BATCHES = 4


class Sweep(NamedTuple):
    """How the chains of a run are swept: a plan with the groups it can afford, and its segments."""

    run: Run
    window: int
    history: int
    tail_blocks: int
    schedule: tuple[Segment, ...]


def plan_sweep(
    run: Run,
    problem: Problem,
    *,
    window: int | None,
    every: int | None,
    antithetic: bool,
    gradient: float | None,
) -> Sweep:
    """relaxation time → window → states remembered → groups of draws → segments.

    Args:
        run: what is computed.
        problem: what is asked.
        window: steps behind each draw; None: six relaxation times.
        every: steps of a block; None: by their distance from the draw.
        antithetic: whether chains are pairs of twins.
        gradient: measured size of the loss gradient, where it is known.

    Raises:
        ValueError: there is no window, and no relaxation time is known.
    """
    plan = run.plan
    if window is None:
        relaxation = run.sampler.relaxation(run.posterior, gradient)
        if relaxation is None:
            raise ValueError(
                "window must be given: the relaxation time of this sampler and posterior is not "
                "known"
            )
        window = max(1, round(_WINDOW_RELAXATIONS * relaxation))
    reach = min(window, plan.num_steps)  # a sweep goes no further back than the chain
    # No more states than the chain has, unless they cost nothing: then another length of the
    # chain compiles nothing again.
    each = plan.num_chains * max(_bytes(run.posterior, group) for group in problem.groups)
    length = 1 << (plan.num_steps - 1).bit_length()
    history = min(_SEGMENT_WINDOWS * window, max(length, _FREE_BYTES // each))
    history = max(reach, min(history, _MOST_BYTES // each))
    # Groups of at least a window of draws, but some in all: one spread needs two numbers.
    chains = -(-plan.num_chains // 2) if antithetic else plan.num_chains
    windows = plan.num_draws * plan.thin // reach
    least = min(-(-_LEAST_BATCHES // chains), plan.num_draws)
    plan = replace(plan, num_batches=min(plan.batches, max(windows, least)))
    return Sweep(
        run=replace(run, plan=plan),
        window=reach,
        history=history,
        tail_blocks=len(block_sizes(min(window, history), every)),
        schedule=segments(plan, window=reach, every=every, history=history, slots=SLOTS),
    )


def _bytes(posterior: Posterior, group: ComponentGroup) -> int:
    """Memory of the positions of all components of a group."""

    def center(restriction: Restriction | None) -> Position:
        return replace(posterior, restriction=restriction).center

    if group.restrictions is None:
        positions = jax.eval_shape(lambda: posterior.center)
    else:
        positions = jax.eval_shape(jax.vmap(center, axis_size=len(group.ids)), group.restrictions)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(positions))
