"""What is kept of a chain: recorders, which turn draws into traces and running sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Key, PyTree

from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import register_pytree


@runtime_checkable
class Recorder(Protocol):
    """What is kept of a chain. A pytree, so that its arrays pass through `jit` as arguments.

    At each draw `value` computes two things from the state of the sampler: what is *kept* of every
    draw (returned as `[component, chain, draw, ...]`, NaN where the chain is lost, so floating
    point), and what is *added*, by `update`, to an accumulator of fixed size. There is one
    accumulator for each of the plan's `num_batches` groups of draws
    (`[component, chain, group, ...]`), since their spread is what standard errors come from.
    Either may be empty, `()`. Draws of a lost chain are never added.
    """

    def value(
        self, posterior: Posterior, state: PyTree[Any], key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """(kept, added) of a draw; `position_of(state)` is where the chain is."""

    def init(self, posterior: Posterior) -> PyTree[Array]:
        """The empty accumulator."""

    def update(self, accumulator: PyTree[Array], added: PyTree[Array]) -> PyTree[Array]:
        """The accumulator with one more draw."""


class Trace:
    """Base of recorders that only keep draws: nothing is added up."""

    def init(self, posterior: Posterior) -> PyTree[Array]:
        """Nothing."""
        return ()

    def update(self, accumulator: PyTree[Array], added: PyTree[Array]) -> PyTree[Array]:
        """Nothing."""
        return ()


@register_pytree
@dataclass(frozen=True, eq=False)
class Nothing(Trace):
    """Keeps nothing of the draws."""

    def value(
        self, posterior: Posterior, state: PyTree[Any], key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Nothing."""
        return (), ()


@register_pytree
@dataclass(frozen=True, eq=False)
class Several:
    """Several recorders of one set of chains, by name."""

    parts: Mapping[str, Any]

    def value(
        self, posterior: Posterior, state: PyTree[Any], key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """What each gives; all are handed the same key, as they would be alone."""
        values = {n: r.value(posterior, state, key, batch_size) for n, r in self.parts.items()}
        return {n: v[0] for n, v in values.items()}, {n: v[1] for n, v in values.items()}

    def init(self, posterior: Posterior) -> PyTree[Array]:
        """Their accumulators."""
        return {name: part.init(posterior) for name, part in self.parts.items()}

    def update(self, accumulator: PyTree[Array], added: PyTree[Array]) -> PyTree[Array]:
        """Each with its own."""
        return {n: part.update(accumulator[n], added[n]) for n, part in self.parts.items()}


class Glance(NamedTuple):
    """What a look back gives: values of the draws `[slots, ...]`, of the segment, and what it adds.

    `finite` is false where the chain is lost.
    """

    draws: PyTree[Array]
    segment: PyTree[Array]
    accumulator: PyTree[Array]
    finite: Bool[Array, ""]


@runtime_checkable
class Look(Protocol):
    """A look back over the last states of a chain, taken at the end of each segment of its draws.

    A pytree. What a reverse sweep needs and a `Recorder`, which sees one draw, has not.
    """

    @property
    def history(self) -> int:
        """How many states before the present one a chain remembers."""

    @property
    def slots(self) -> int:
        """Most draws of a segment."""

    def init(self, posterior: Posterior) -> PyTree[Array]:
        """The empty accumulator of one group of draws."""

    def shapes(self, posterior: Posterior) -> tuple[PyTree[Array], PyTree[Array]]:
        """Empty values of the draws of a segment, `[slots, ...]`, and of the segment."""

    def back(self, past: Any, accumulator: PyTree[Array]) -> Glance:
        """Sweep over what lies behind; see `chains.loop.Past`."""


def where_alive(alive: Bool[Array, ""], new: PyTree[Any], old: PyTree[Any]) -> PyTree[Any]:
    """The new values where the chain is alive, the old ones where it is lost."""
    return jax.tree.map(lambda a, b: jax.numpy.where(alive, a, b), new, old)
