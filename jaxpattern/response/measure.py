"""What all estimators share: for each group of components measure, estimate, assemble."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxpattern.chains.divergence import check_alive
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.pilot import Pilot
from jaxpattern.chains.run import Run
from jaxpattern.diagnostics import Summary, numbers_of, on_device, summarize
from jaxpattern.moments import Moments
from jaxpattern.response.problem import Problem
from jaxpattern.response.result import Response
from jaxpattern.response.shares import column_mean
from jaxpattern.validation import is_concrete
from jaxpattern.verdict import PILOT, trend


class Estimates(NamedTuple):
    """χ of one component, or `[component, ...]` of several: fields as in `Response`."""

    chi: dict[str, Float[Array, "*lead rows ..."]]
    stderr: dict[str, Float[Array, "*lead rows ..."]]
    halves: dict[str, Float[Array, "*lead two rows ..."]]
    batches: dict[str, Float[Array, "*lead batches rows"]]
    diagnostics: dict[str, Shaped[Array, "*lead rows ..."]]


class Part(NamedTuple):
    """What one group of components gives: rows of all its components, one after the other."""

    estimates: Estimates
    summary: Summary
    diverged: Bool[Array | np.ndarray, "rows chains"]


def by_component(
    run: Run,
    problem: Problem,
    measure: Callable[[ComponentGroup], Part],
    *,
    name: str,
    cost: float,
    grouped: bool = False,
) -> Response:
    """The response of all groups, rows in the order in which the components were given.

    Args:
        run: what is computed.
        problem: what is asked.
        measure: what one group gives.
        name: the estimator, with the settings it chose.
        cost: gradient equivalents.
        grouped: whether a column is a probe set, of the mass of its losses; else it is a loss.
    """
    parts = [measure(group) for group in problem.groups]
    ids = np.concatenate([group.ids for group in problem.groups])
    order = (np.argsort(ids)[:, None] * problem.num_rows + np.arange(problem.num_rows)).reshape(-1)
    part = parts[0] if len(parts) == 1 else _join(parts, order)
    mass = {n: _group_mass(q) for n, q in problem.mass.items()} if grouped else problem.mass
    estimates, summary = part.estimates, part.summary
    return Response(
        chi=estimates.chi,
        stderr=estimates.stderr,
        halves=estimates.halves,
        batches=estimates.batches,
        mass=mass,
        base=problem.mass if grouped else {},
        nbeta=as_number(run.posterior.nbeta, run.posterior.weights.dtype),
        mean=summary.mean,
        mean_stderr=summary.stderr,
        rhat=summary.rhat,
        ess=summary.ess,
        diverged=on_device(part.diverged),
        diagnostics=estimates.diagnostics,
        rows=problem.rows,
        cost=cost,
        estimator="; ".join(filter(None, (name, run.sampler.caveat))),
        num_samples=sum(map(_num_counted, problem.mass.values())),
        loss_shapes=tuple((name, x.shape) for name, x in problem.probe_baseline.items())
        if grouped
        else (),
    )


def _group_mass(q: Array) -> Array:
    if not is_concrete(q):
        return jnp.sum(q)
    return jax.device_put(np.asarray(np.sum(np.asarray(q, np.float64)), q.dtype))


def _num_counted(q: Array) -> int:
    """Columns that count; all, where that is not known."""
    return int(np.count_nonzero(np.asarray(q))) if is_concrete(q) else q.size


def as_number(x: Any, dtype: Any) -> Array:
    """A scalar of this type; NumPy makes it where it can."""
    return jax.device_put(np.asarray(x, dtype)) if is_concrete(x) else jnp.asarray(x, dtype)


@jax.jit
def _join(parts: list[Part], order: Array) -> Part:
    """All rows in order; halves and batches have another axis in front of the rows."""

    def join(axis: int, *leaves: Array) -> Array:
        return jnp.take(jnp.concatenate(leaves, axis), order, axis)

    def all_of(axis: int, *trees: Any) -> Any:
        return jax.tree.map(partial(join, axis), *trees)

    estimates = [part.estimates for part in parts]
    axes = {"halves": 1, "batches": 1}
    return Part(
        Estimates(
            **{
                name: all_of(axes.get(name, 0), *(getattr(e, name) for e in estimates))
                for name in Estimates._fields
            }
        ),
        all_of(0, *(part.summary for part in parts)),
        all_of(0, *(part.diverged for part in parts)),
    )


def over_components(one: Callable[..., Estimates], *recorded: Any) -> Estimates:
    """`one` of every component, their rows one after the other; to be called under `jit`."""
    found = jax.vmap(one)(*recorded)

    def rows_first(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    def rows_second(x: Array) -> Array:
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return Estimates(
        chi=jax.tree.map(rows_first, found.chi),
        stderr=jax.tree.map(rows_first, found.stderr),
        halves=jax.tree.map(rows_second, found.halves),
        batches=jax.tree.map(rows_second, found.batches),
        diagnostics=jax.tree.map(rows_first, found.diagnostics),
    )


def part_of_chains(
    run: Run,
    problem: Problem,
    group: ComponentGroup,
    estimates: Estimates,
    alive: Bool[Array, "components chains"],
    trace: Float[Array, "components chains draws rows"],
    *,
    num_batches: int,
    antithetic: bool = False,
    pilot: Pilot | None = None,
    states: Any = (),
) -> Part:
    """Estimates with the health of the chains they come from, whose φ − φ(w*) is the trace.

    Raises:
        DivergenceError, FloatingPointError: a component lost all its chains, or derivatives.
    """
    check_alive(alive, group.names, run.posterior, states)
    alive, trace, offsets = numbers_of((alive, trace, problem.offsets))
    rows = [
        _summarize_row(trace[c, :, :, k], alive[c], num_batches, antithetic)
        for c in range(trace.shape[0])
        for k in range(problem.num_rows)
    ]
    xp = np if isinstance(trace, np.ndarray) else jnp
    summary = Summary(*(xp.stack([xp.asarray(row[i]) for row in rows]) for i in range(4)))
    summary = summary._replace(mean=summary.mean + xp.tile(offsets, trace.shape[0]))
    diverged = xp.repeat(~alive, problem.num_rows, axis=0)
    health = _health(trace, alive, num_batches, antithetic)
    for name in PILOT:
        known = np.full(trace.shape[0], np.nan) if pilot is None else getattr(pilot, name)
        health[name] = np.repeat(known, problem.num_rows).astype(trace.dtype)
    found = estimates.diagnostics | {name: on_device(x) for name, x in health.items()}
    return Part(estimates._replace(diagnostics=found), Summary(*map(on_device, summary)), diverged)


def _health(trace: Any, alive: Any, num_batches: int, antithetic: bool) -> dict[str, Any]:
    """What the verdict looks at, `[row]` over all components."""
    xp = np if isinstance(trace, np.ndarray) else jnp
    components, _, _, rows = trace.shape
    found: dict[str, list[Any]] = {"drift": [], "drift_size": [], "spread": [], "groups": []}
    for c in range(components):
        here = xp.where(alive[c][:, None, None], trace[c], 0.0)
        independent = join_twins(alive[c]) > 0 if antithetic else alive[c]
        for k in range(rows):
            drift, size = trend(here[:, :, k], alive[c], num_batches)
            found["drift"].append(drift)
            found["drift_size"].append(size)
            found["spread"].append(xp.max(here[:, :, k]) - xp.min(here[:, :, k]))
            found["groups"].append(xp.sum(independent) * num_batches)
    return {n: xp.stack([xp.asarray(x, trace.dtype) for x in v]) for n, v in found.items()}


def _summarize_row(trace: Any, alive: Any, num_batches: int, antithetic: bool) -> Summary:
    summary = summarize(trace, num_batches=num_batches, alive=alive)
    if not antithetic:
        return summary
    # Twins are no independent chains: the error is that of the means of pairs.
    xp = np if isinstance(trace, np.ndarray) else jnp
    number = join_twins(alive)
    means = join_twins(xp.where(alive[:, None], trace, 0.0)) / xp.maximum(number, 1)[:, None]
    pairs = summarize(means.astype(trace.dtype), num_batches=num_batches, alive=number > 0)
    return summary._replace(stderr=pairs.stderr)


def join_twins(values: Any) -> Any:
    """Sums over mirrored twins, chains 2c and 2c + 1; an odd last chain stands alone."""
    xp = np if isinstance(values, np.ndarray) else jnp
    values = xp.concatenate([values, xp.zeros_like(values[: values.shape[0] % 2])])
    return values.reshape(-1, 2, *values.shape[1:]).sum(axis=1)


def batch_estimates(
    sums: dict[str, Float[Array, "chains batches rows *columns"]],
    counts: Float[Array, "chains batches"],
    alive: Bool[Array, " chains"],
    antithetic: bool = False,
    mass: dict[str, Float[Array, "*columns"]] | None = None,
) -> Estimates:
    """Mean of a quantity summed over the draws of each batch, and the spread of the batches.

    χ̂ = Σ_g n_g x_g / n and Var χ̂ = Σ_g (n_g/n)² (x_g − χ̂)² G/(G − 1) over the G batches of the
    chains that are alive; with `antithetic`, of the pairs. The batches' means over columns are by
    `mass`; without, there are no columns.
    """
    if antithetic:
        sums = jax.tree.map(
            lambda x: join_twins(jnp.where(alive.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)), sums
        )
        counts = join_twins(jnp.where(alive[:, None], counts, 0.0))
        alive = join_twins(alive) > 0
    weight = jnp.repeat(alive, counts.shape[1])
    counts = jnp.where(alive[:, None], counts, 0).reshape(-1)
    share = counts / jnp.sum(counts)
    number = jnp.sum(weight, dtype=counts.dtype)
    first = (jnp.cumsum(weight, dtype=counts.dtype) <= number / 2) & weight

    def mean(values: Array, share: Array) -> Array:
        return jnp.tensordot(share / jnp.sum(share), values, 1, precision="highest")

    def one(name: str, sums: Array) -> tuple[Array, Array, Array, Array]:
        flat = sums.reshape(-1, *sums.shape[2:])
        scale = jnp.where(counts > 0, 1 / jnp.maximum(counts, 1.0), 0.0)
        x = flat * scale.reshape(-1, *(1,) * (flat.ndim - 1))
        chi = mean(x, share)
        squares = jnp.tensordot(share**2, (x - chi[None]) ** 2, 1, precision="highest")
        stderr = jnp.sqrt(squares * number / (number - 1))
        halves = jnp.stack(
            [mean(x, jnp.where(half, share, 0)) for half in (first, weight & ~first)]
        )
        group = x if mass is None else column_mean(x, mass[name])
        there = weight.reshape(-1, *(1,) * (group.ndim - 1))
        return chi, stderr, halves, jnp.where(there, group, jnp.nan)

    results = {name: one(name, total) for name, total in sums.items()}
    chi, stderr, halves, batches = ({n: r[i] for n, r in results.items()} for i in range(4))
    return Estimates(chi, stderr, halves, batches, {})


def slope_beside(
    beside: Moments,
    chi: dict[str, Array],
    stderr: dict[str, Array],
    alive: Bool[Array, " chains"],
    antithetic: bool,
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """The covariance of the same draws along a pathwise χ̂, Σ_j χ̂_j Ĉ_j / Σ_j χ̂_j², with its error.

    1 where both are right. By groups of draws as `covariance`, from
    x_g = −[C_g/n_g + (a_g − ā)(b_g − b̄)] of φ and of the one number Σ_j χ̂_j D_j; pairs of twins
    count once. Σ_j χ̂_j² holds the noise of χ̂, which is taken off; NaN where it is most of it.
    """

    def along(values: dict[str, Array], lead: int) -> Array:
        """Σ_j χ̂_kj values_j over all columns: `[chain, group, row]`."""
        parts = []
        for name, x in values.items():
            weights = chi[name].reshape(chi[name].shape[0], -1)
            flat = x.reshape(*x.shape[:lead], -1)
            each = jnp.sum(flat * weights[None, None], -1) if lead == 3 else flat @ weights.T
            parts.append(each)
        return jnp.sum(jnp.stack(parts), 0)

    count = beside.weight * alive[:, None].astype(beside.weight.dtype)
    share = count / jnp.sum(count)
    mean_b, comoment = along(beside.mean_b, 2), along(beside.comoment, 3)
    means = (beside.mean_a, mean_b)
    centered = [x - jnp.sum(share[..., None] * x, (0, 1), keepdims=True) for x in means]
    each = comoment / jnp.maximum(count, 1.0)[..., None] + centered[0] * centered[1]
    x = jnp.where(share[..., None] > 0, -each * share[..., None], 0.0)
    if antithetic:
        x, share, alive = join_twins(x), join_twins(share), join_twins(alive) > 0
    total = jnp.sum(x, (0, 1))
    number = jnp.sum((share > 0).astype(share.dtype))
    squares = jnp.sum((x - share[..., None] * total[None, None]) ** 2, (0, 1))

    def square(x: dict[str, Array]) -> Array:
        return jnp.sum(
            jnp.stack([jnp.sum(c.reshape(c.shape[0], -1) ** 2, 1) for c in x.values()]), 0
        )

    size = square(chi) - square(stderr)
    size = jnp.where(size > square(chi) / 2, size, 0.0)
    bessel = jnp.sum(count) / jnp.maximum(jnp.sum(count) - 1, 1)
    scale = bessel / jnp.where(size > 0, size, jnp.nan)
    return scale * total, scale * jnp.sqrt(squares * number / jnp.maximum(number - 1, 1))
