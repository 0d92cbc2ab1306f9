"""What becomes of pathwise rows that grew, or that cannot be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxpattern.chains.run import Run
from jaxpattern.response.covariance import Covariance
from jaxpattern.response.problem import Problem
from jaxpattern.response.result import Response, doubts, group_mean
from jaxpattern.runtime.host import Host
from jaxpattern.validation import is_concrete
from jaxpattern.verdict import UnreliableError


class GrowthWarning(UserWarning):
    """The derivative of a chain grew: the chain expands where it should contract."""


def grew(response: Response) -> bool:
    """Whether any row's did; False inside a transformation."""
    truncated = response.diagnostics.get("truncated")
    return truncated is not None and is_concrete(truncated) and bool(np.any(truncated))


@dataclass(frozen=True)
class Fallback:
    """Which rows are measured by covariance instead, which are only warned of, which stop the run.

    Attributes:
        growth_limit: past which the adjoint was cut, for the message.
        on_growth, on_unreliable, reweight_observable: see `pathwise`.
    """

    growth_limit: float
    on_growth: Literal["truncate", "covariance"]
    on_unreliable: Literal["warn", "covariance", "raise"]
    reweight_observable: bool

    def __call__(self, response: Response, run: Run, problem: Problem, host: Host) -> Response:
        """The response after that; as it is inside a transformation."""
        if not is_concrete(response.mean):
            return response
        grown = np.asarray(response.diagnostics.get("truncated", np.zeros((1, 1, 1))))
        grown = np.broadcast_to(grown.any(axis=(1, 2)), len(problem.rows))
        wrong = np.asarray([bool(found) for found in doubts(response)])
        if grown.any():
            names = [row for row, bad in zip(problem.rows, grown, strict=True) if bad]
            backwards = "remainder" in response.diagnostics
            consequence = (
                "their sweeps are cut there and χ is incomplete"
                if backwards
                else "χ is mostly noise"
            ) + (
                "; a larger localization, a smaller nbeta, a larger width, or "
                "on_growth='covariance' avoids that"
            )
            if self.on_growth == "covariance":
                consequence = "they are measured by covariance instead"
            what = "adjoint" if backwards else "tangents"
            warnings.warn(
                f"the {what} grew past {self.growth_limit:g} in rows {names}: {consequence}",
                GrowthWarning,
                stacklevel=5,
            )
        if self.on_unreliable == "raise" and wrong.any():
            raise UnreliableError(response.verdict)
        replaced = (grown & (self.on_growth == "covariance")) | (
            wrong & (self.on_unreliable == "covariance")
        )
        if not replaced.any():
            return response
        other = Covariance(reweight_observable=self.reweight_observable)(run, problem, host)
        if response.columns.grouped:
            other = group_mean(other)
        return _choose(response, other, jnp.asarray(replaced))


def _choose(response: Response, other: Response, rows: Bool[Array, " rows"]) -> Response:
    """The other estimate in some rows."""

    def pick(axis: int) -> Callable[[Array, Array], Array]:
        def choose(a: Array, b: Array) -> Array:
            shape = [1] * a.ndim
            shape[axis] = -1
            return jnp.where(rows.reshape(shape), b, a)

        return choose

    def pad(batches: Array, length: int) -> Array:
        """NaN stands for batches that the other estimator has more of."""
        return jnp.pad(batches, ((0, length - len(batches)), (0, 0)), constant_values=jnp.nan)

    length = max(len(x) for r in (response, other) for x in r.batches.values())
    ours, theirs = (jax.tree.map(partial(pad, length=length), r.batches) for r in (response, other))
    return replace(
        response,
        chi=jax.tree.map(pick(0), response.chi, other.chi),
        stderr=jax.tree.map(pick(0), response.stderr, other.stderr),
        halves=jax.tree.map(pick(1), response.halves, other.halves),
        batches=jax.tree.map(pick(1), ours, theirs),
        cost=response.cost + other.cost,
    )
