"""From the estimates of single components to one response matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpattern.diagnostics import Summary, summarize
from jaxpattern.posterior import Posterior
from jaxpattern.response.problem import Problem
from jaxpattern.response.result import Response
from jaxpattern.sampling import Plan


class Part(NamedTuple):
    """The rows of one component: fields as in `Response`, `diverged` by chain."""

    chi: dict[str, Float[Array, "rows *columns"]]
    stderr: dict[str, Float[Array, "rows *columns"]]
    halves: dict[str, Float[Array, "two rows *columns"]]
    batches: dict[str, Float[Array, "batches rows"]]
    summary: Summary
    diverged: Bool[Array, " chains"]
    diagnostics: dict[str, Float[Array, "rows ..."]]


def summarize_rows(
    trace: Float[Array, "chains draws rows"],
    alive: Bool[Array, " chains"],
    problem: Problem,
    plan: Plan,
) -> Summary:
    """⟨φ⟩ of each row with its diagnostics, from the trace of φ − φ(w*)."""
    rows = [
        summarize(trace[:, :, k], num_batches=plan.batches, alive=alive)
        for k in range(problem.num_rows)
    ]
    summary = jax.tree.map(lambda *values: jnp.stack(values), *rows)
    return summary._replace(mean=summary.mean + problem.offsets)


def assemble(
    parts: dict[int, Part],
    posterior: Posterior,
    problem: Problem,
    rows: tuple[str, ...],
    cost: float,
    estimator: str,
) -> Response:
    """The rows of all components, in the order the components were given."""
    ordered = [parts[index] for index in sorted(parts)]
    names = tuple(problem.probe_baseline)
    columns = sum(losses.size for losses in problem.probe_baseline.values())

    def stack(field: str, axis: int) -> dict[str, Array]:
        return {
            name: jnp.concatenate([getattr(part, field)[name] for part in ordered], axis=axis)
            for name in names
        }

    summary = jax.tree.map(
        lambda *values: jnp.concatenate(values), *(part.summary for part in ordered)
    )
    return Response(
        chi=stack("chi", 0),
        stderr=stack("stderr", 0),
        halves=stack("halves", 1),
        batches=stack("batches", 1),
        mass={
            name: jnp.full(losses.shape, 1 / columns, losses.dtype)
            for name, losses in problem.probe_baseline.items()
        },
        nbeta=posterior.nbeta,
        mean=summary.mean,
        mean_stderr=summary.stderr,
        rhat=summary.rhat,
        ess=summary.ess,
        diverged=jnp.concatenate(
            [jnp.broadcast_to(part.diverged, (problem.num_rows, *part.diverged.shape)) for part in ordered]
        ),
        diagnostics={
            name: jnp.concatenate([part.diagnostics[name] for part in ordered])
            for name in ordered[0].diagnostics
        },
        rows=rows,
        cost=cost,
        estimator=estimator,
        num_samples=columns,
    )
