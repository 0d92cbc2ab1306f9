"""Where and how a run is carried out: the one loop that cuts into chunks, shows and saves.

A driver says what its positions are and what carries a range of them out; the host decides how long
a range is. A loop gives the same bits however it is cut, so nothing that is computed depends on the
host, and none of it enters a trace.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpattern.runtime.checkpoint import Checkpoint, Store, open_store
from jaxpattern.runtime.mesh import is_first_process, resolve_mesh
from jaxpattern.runtime.processes import largest
from jaxpattern.validation import is_concrete

_SHOWN_CHUNKS = 50
_SHOWN_SECONDS = (0.1, 10.0)  # how often a line of progress may change, and must
_SAVED_SECONDS = 2.0  # how soon a signal is answered

State = TypeVar("State")


class Host(NamedTuple):
    """Where and how a run is carried out.

    Attributes:
        mesh: the devices it is dealt out over; None: one.
        store: where it is kept; None: nowhere.
        progress: show a progress line.
    """

    mesh: Mesh | None = None
    store: Store | None = None
    progress: bool = False

    @property
    def chunked(self) -> bool:
        """Whether loops are cut at places not known beforehand, so that bounds must be traced."""
        return self.progress or self.store is not None

    def loop(
        self,
        label: str,
        total: int,
        start: Callable[[], State],
        advance: Callable[[State, int, int], State],
        *,
        final: Callable[[State], State] = lambda state: state,
        lanes: int | None = None,
        cuts: Sequence[int] = (),
        steps: Callable[[int], int] = lambda position: position,
        unit: str = "step",
        longest: int | None = None,
        note: Callable[[State, int, int], str] | None = None,
    ) -> State:
        """Carry out positions 0 to `total`, from the last state that was kept.

        Without progress and a folder chunks are as long as `cuts` and `longest` allow. With
        progress there are about fifty, or fewer where they pass too fast to be read; with a
        folder each is so short that a signal is answered soon.

        Args:
            label: what the progress line and the folder of the loop are called.
            total: positions to carry out.
            start: the state at position 0.
            advance: `(state, a, b) -> state`, which carries out positions a to b − 1.
            final: what is needed of the last state, which is all that is kept of it.
            lanes: the leaves of the state have a leading axis, of which so many count.
            cuts: positions that no chunk straddles; at the first of them another program begins.
            steps: position → units of the progress line; must not fall.
            unit: what those are called.
            longest: positions of a chunk at most; then no two chunks are in flight at once.
            note: `(state, a, b) -> text` behind the progress line.

        Returns:
            `final` of the last state.
        """
        stage = None if self.store is None else self.store.stage(label, total, final, lanes)
        position, state = (0, start()) if stage is None else stage.resume(start, self.mesh)
        if 0 < total == position:
            return state
        concrete = all(map(is_concrete, jax.tree.leaves(state)))
        show = self.progress and concrete
        pace = _Pace(self.store, show, steps(total))
        stops = sorted({total, *(cut for cut in cuts if 0 < cut < total)})
        with _Line(label, unit, steps(total), steps(position), show) as line:
            while position < total:
                if cuts and position == cuts[0]:
                    line.compile()
                stop = min(pace.reach(position, total, steps), *(s for s in stops if s > position))
                if longest is not None:
                    stop = min(stop, position + longest)
                before = time.monotonic()
                state = advance(state, position, stop)
                if concrete and (pace.watched or longest is not None):
                    jax.block_until_ready(state)
                pace.note(before)
                text = note(state, position, stop) if note is not None and line.shown else ""
                line.advance(steps(stop), text)
                position = stop
                if stage is not None:
                    stage.save(position, state)
        return final(state)


class _Pace:
    """How far the next chunk reaches, by how long the last one took."""

    def __init__(self, store: Store | None, show: bool, units: int) -> None:
        self.watched = show or store is not None
        self._least, self._most = _SHOWN_SECONDS
        self._units = max(1, -(-units // _SHOWN_CHUNKS)) if self.watched else max(1, units)
        if store is not None:
            self._units = 1
            self._least = self._most = min(_SAVED_SECONDS, store.every / 2) / 2

    def reach(self, position: int, total: int, steps: Callable[[int], int]) -> int:
        """The first position that is so many units away."""
        goal = steps(position) + self._units
        return position + 1 + bisect_left(range(position + 1, total), goal, key=steps)

    def note(self, before: float) -> None:
        """A chunk that began then is done; all processes come to the same length."""
        if not self.watched:
            return
        (seconds,) = largest(time.monotonic() - before)
        if seconds < self._least:
            self._units *= 2
        elif seconds >= self._most:
            self._units = max(1, self._units // 2)


class _Line:
    """A line of progress, whose rate leaves out the first chunk of a program, which compiles."""

    def __init__(self, label: str, unit: str, total: int, done: int, show: bool) -> None:
        self.shown = show and is_first_process()
        self._label, self._compiled = label, False
        from tqdm import tqdm  # not with the core, which imports this module

        self._bar = tqdm(
            desc=f"{label}: compiling", unit=unit, total=total, initial=done, leave=False,
            disable=not self.shown, smoothing=0,
        )  # fmt: skip

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def compile(self) -> None:
        """The next chunk is the first of a program: how long it takes nobody knows."""
        if self.shown and self._compiled:
            self._compiled = False
            self._bar.set_description_str(f"{self._label}: compiling", refresh=False)
            self._count_from(self._bar.n)

    def advance(self, done: int, text: str) -> None:
        if not self.shown:
            return
        bar = self._bar
        bar.set_postfix_str(text, refresh=False)
        if self._compiled:
            bar.update(done - bar.n)
            return
        self._compiled = True
        bar.set_description_str(self._label, refresh=False)
        self._count_from(done)

    def _count_from(self, done: int) -> None:
        """The rate is that of what comes from now on."""
        bar = self._bar
        bar.initial = bar.n = bar.last_print_n = done
        bar.start_t = bar.last_print_t = time.time()
        bar.refresh()


@contextmanager
def host_for(
    driver: str,
    *,
    checkpoint: str | os.PathLike[str] | Checkpoint | None,
    mesh: Mesh | None,
    progress: bool,
    losses: Callable[[], np.ndarray] | None = None,
    **arguments: Any,
) -> Iterator[Host]:
    """The host of one call of a driver; its folder is locked, and signals are caught.

    Under jit, vmap or grad there is no line of progress.

    Args:
        driver: which function runs.
        checkpoint: a folder, a `Checkpoint`, or None.
        mesh: a mesh with axes of `jaxpattern.mesh`; None: the current one, or one device.
        progress: show a progress line.
        losses: some losses at the start, `[samples, ...]`, which with a folder tell runs apart
            where the code of a loss cannot be followed; by default those of the argument
            `posterior`.
        arguments: all that the result of the driver depends on.

    Raises:
        CheckpointError: the folder belongs to another run, holds other files, is in use by
            another process, or cannot be written to.
        TypeError: with a folder, an argument is traced.
        TypeError, ValueError: the mesh does not fit.
    """
    mesh = resolve_mesh(mesh)
    shown = progress and all(map(is_concrete, jax.tree.leaves(arguments)))
    with open_store(checkpoint, driver, losses, **arguments) as store:
        yield Host(mesh, store, shown)
