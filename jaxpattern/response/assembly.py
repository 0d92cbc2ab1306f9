"""From the estimates of single components to one response matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxpattern.diagnostics import Summary, summarize
from jaxpattern.posterior import Posterior
from jaxpattern.response.problem import Problem
from jaxpattern.response.result import Response


class Part(NamedTuple):
    """The rows of one component: fields as in `Response`, `diverged` by chain."""

    chi: dict[str, Float[Array, "rows *columns"]]
    stderr: dict[str, Float[Array, "rows *columns"]]
    halves: dict[str, Float[Array, "two rows *columns"]]
    batches: dict[str, Float[Array, "batches rows"]]
    summary: Summary
    diverged: Bool[Array, " chains"]
    diagnostics: dict[str, Shaped[Array, "rows ..."]]


def summarize_rows(
    trace: Float[Array, "chains draws rows"],
    alive: Bool[Array, " chains"],
    problem: Problem,
    num_batches: int,
    antithetic: bool = False,
) -> Summary:
    """⟨φ⟩ of each row with its diagnostics, from the trace of φ − φ(w*)."""
    rows = [
        summarize(trace[:, :, k], num_batches=num_batches, alive=alive)
        for k in range(problem.num_rows)
    ]
    summary = jax.tree.map(lambda *values: jnp.stack(values), *rows)
    if antithetic:
        # Twins are no independent chains: the error is that of the means of pairs.
        values = join_twins(jnp.where(alive[:, None, None], trace, 0.0))
        number = join_twins(alive)
        means = values / jnp.maximum(number, 1)[:, None, None]
        stderr = [
            summarize(means[:, :, k], num_batches=num_batches, alive=number > 0).stderr
            for k in range(problem.num_rows)
        ]
        summary = summary._replace(stderr=jnp.stack(stderr))
    return summary._replace(mean=summary.mean + problem.offsets)


def join_twins(values: Shaped[Array, "chains ..."]) -> Shaped[Array, "pairs ..."]:
    """Sums over mirrored twins, chains 2c and 2c + 1; an odd last chain stands alone."""
    values = jnp.concatenate([values, jnp.zeros_like(values[: values.shape[0] % 2])])
    return values.reshape(-1, 2, *values.shape[1:]).sum(axis=1)


class BatchEstimates(NamedTuple):
    """χ, its standard error, χ of two halves and of the batches, by probe set; as in `Part`."""

    chi: dict[str, Array]
    stderr: dict[str, Array]
    halves: dict[str, Array]
    batches: dict[str, Array]


def batch_estimates(
    sums: dict[str, Float[Array, "chains batches rows *columns"]],
    counts: Float[Array, "chains batches"],
    alive: Bool[Array, " chains"],
    antithetic: bool = False,
) -> BatchEstimates:
    """Mean of a quantity summed over the draws of each batch, and the spread of the batches.

    χ̂ = Σ_g n_g x_g / n and Var χ̂ = Σ_g (n_g/n)² (x_g − χ̂)² G/(G − 1) over the G batches of the
    chains that are alive; with `antithetic`, of the pairs.
    """
    if antithetic:
        sums = jax.tree.map(
            lambda x: join_twins(jnp.where(alive.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)), sums
        )
        counts = join_twins(jnp.where(alive[:, None], counts, 0.0))
        alive = join_twins(alive) > 0
    weight = jnp.repeat(alive, counts.shape[1])
    counts = (counts * alive[:, None]).reshape(-1)
    share = counts / jnp.sum(counts)
    number = jnp.sum(weight)
    first = (jnp.cumsum(weight) <= number / 2) & weight

    def mean(values: Array, share: Array) -> Array:
        return jnp.tensordot(share / jnp.sum(share), values, 1, precision="highest")

    def one(sums: Array) -> tuple[Array, Array, Array, Array]:
        flat = sums.reshape(-1, *sums.shape[2:])
        scale = jnp.where(counts > 0, 1 / jnp.maximum(counts, 1.0), 0.0)
        x = flat * scale.reshape(-1, *(1,) * (flat.ndim - 1))
        chi = mean(x, share)
        squares = jnp.tensordot(share**2, (x - chi[None]) ** 2, 1, precision="highest")
        stderr = jnp.sqrt(squares * number / (number - 1))
        halves = jnp.stack([mean(x, share * first), mean(x, share * (weight & ~first))])
        group = jnp.mean(x, axis=tuple(range(2, x.ndim)))
        return chi, stderr, halves, jnp.where(weight[:, None], group, jnp.nan)

    results = {name: one(total) for name, total in sums.items()}
    return BatchEstimates(
        *({name: result[i] for name, result in results.items()} for i in range(4))
    )


def assemble(
    parts: dict[int, Part],
    posterior: Posterior,
    problem: Problem,
    rows: tuple[str, ...],
    cost: float,
    estimator: str,
    grouped: bool = False,
) -> Response:
    """The rows of all components, in the order the components were given.

    Columns are losses, all of one mass; `grouped`: probe sets, of the mass of their losses.
    """
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
            name: jnp.asarray(losses.size / columns, losses.dtype)
            if grouped
            else jnp.full(losses.shape, 1 / columns, losses.dtype)
            for name, losses in problem.probe_baseline.items()
        },
        nbeta=jnp.asarray(posterior.nbeta, posterior.weights.dtype),
        mean=summary.mean,
        mean_stderr=summary.stderr,
        rhat=summary.rhat,
        ess=summary.ess,
        diverged=jnp.concatenate(
            [
                jnp.broadcast_to(part.diverged, (problem.num_rows, *part.diverged.shape))
                for part in ordered
            ]
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
