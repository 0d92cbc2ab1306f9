"""Bayesian influence: how the loss of one sample or token moves with that of another.

For a query loss ℓ_q and a probe loss ℓ_z, over the draws of one posterior,

    BIF(z, q) = −Cov_p[ℓ_q, ℓ_z]        or        +Corr_p[ℓ_q, ℓ_z]

The first is the Bayesian influence function as published: the derivative of ⟨ℓ_q⟩ over a weight β_z
in the potential Σ β_z ℓ_z. The second is what devinterp computes by default (its
`compute_covariance=True` is +Cov). Mind the signs: a probe that helps has a negative BIF and a
positive correlation. χ of a query's loss is the BIF measured from its mean over the data,
χ_z(ℓ_q) = BIF(z, q) − Σ_j q_j BIF(j, q), since it holds the sum of weights.

Q query losses and N probe losses give Q × N numbers, with errors from groups of draws
(`influence_estimate`). **Memory**: of each group of n draws either the draws are kept, n (Q + N)
numbers, or their co-moments, Q N numbers, whichever is less, so that memory does not grow with the
number of draws; the results are made by blocks of queries. Losses at w* are subtracted before
anything is kept.

Sources: Kreer et al. 2025, arXiv 2509.26544; devinterp 2.0.1, `slt.bif`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from jaxpattern import moments
from jaxpattern.chains.kernel import position_of
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.loop import Recorded, run_chains
from jaxpattern.chains.pilot import fly
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.run import Run, make_run
from jaxpattern.diagnostics import on_device
from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.response.columns import Columns
from jaxpattern.response.influence_estimate import CoMoments, Level, Side, estimate
from jaxpattern.response.influence_result import Influence
from jaxpattern.response.measure import Estimates, as_number, part_of_chains
from jaxpattern.response.problem import Problem, build_problem, check_like_data, named
from jaxpattern.response.result import doubts
from jaxpattern.response.shares import column_mean, same_arrays
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.runtime.host import host_for
from jaxpattern.runtime.mesh import take
from jaxpattern.types import Batch
from jaxpattern.validation import is_concrete
from jaxpattern.verdict import warn


def influence(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    *,
    queries: Mapping[str, Batch] | Iterable[tuple[str, Batch]],
    probes: Mapping[str, Batch] | Iterable[tuple[str, Batch]],
    correlation: bool = False,
    query_level: Level = "loss",
    probe_level: Level = "loss",
    query_weights: Mapping[str, Any] | None = None,
    probe_weights: Mapping[str, Any] | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    mesh: Mesh | None = None,
) -> Influence:
    """The Bayesian influence −Cov_p[ℓ_q, ℓ_z] of every probe loss on every query loss, with errors.

    The derivative of ⟨ℓ_q⟩ over the weight of z: negative where more weight on z lowers ℓ_q. With
    `correlation` it is +Corr_p[ℓ_q, ℓ_z], devinterp's default, positive there.

    Args:
        key: typed key; the chains are those of `sample` and `susceptibilities` with this key.
        posterior: what to sample; restricted, it gives the influence within a component.
        sampler: `sgld(...)`, …, or any function of the posterior to a `SamplingAlgorithm`.
        plan: lengths and numbers.
        queries: name → batch like the data; its losses are the rows.
        probes: name → batch like the data; its losses are the columns. A batch that is also a query
            is evaluated once.
        correlation: Pearson's correlation in place of minus the covariance.
        query_level: what a row is: each `"loss"` (a token, where there are losses per token), the
            mean loss of each `"sample"`, or of the whole `"set"`.
        probe_level: what a column is, the same.
        query_weights: name → base weights ≥ 0 of the losses of a query set; 0 excludes, and means
            are by them. As `probe_weights` in `susceptibilities`.
        probe_weights: name → the same for probe sets.
        progress: show a progress line. Without it this is a pure function.
        checkpoint: a folder, or a `Checkpoint`, where the run is kept; called again with the same
            arguments after an interruption, it goes on from there to the same bits.
        mesh: where it runs, see `jaxpattern.mesh`; None: the current mesh, or one device.

    Returns:
        An `Influence`. Excluded losses have influence 0; a loss that never moves has correlation
        NaN. More than fits into memory: several calls with the same key, which has the same draws.

    Raises:
        DivergenceError: all chains diverged.
        CheckpointError: the folder belongs to another run, or cannot be used.
        Interrupted: a signal stopped a run with a folder, after it was saved.
        TypeError, ValueError: an argument does not fit; said before any sampling.

    References:
        Kreer et al. 2025, arXiv 2509.26544.
    """
    run = make_run(key, posterior, sampler, plan)
    asked = BIF(
        queries, probes, correlation, query_level, probe_level, query_weights, probe_weights
    )
    losses = asked.recorder(run)
    with host_for(
        "influence", checkpoint=checkpoint, mesh=mesh, progress=progress, run=run,
        posterior=posterior, asked=losses.on(None),
    ) as host:  # fmt: skip
        chains = run_chains(run, losses.on(host.mesh), host, label="influence")
    return losses.result(run, chains)


@dataclass(frozen=True, eq=False)
class BIF:
    """Asks `measure` for Bayesian influences; the fields are the arguments of `influence`."""

    queries: Mapping[str, Batch] | Iterable[tuple[str, Batch]]
    probes: Mapping[str, Batch] | Iterable[tuple[str, Batch]]
    correlation: bool = False
    query_level: Level = "loss"
    probe_level: Level = "loss"
    query_weights: Mapping[str, Any] | None = None
    probe_weights: Mapping[str, Any] | None = None

    def recorder(self, run: Run) -> Losses:
        """What the chains are to keep.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        if not isinstance(self.correlation, bool):
            raise TypeError(f"correlation must be True or False, got {self.correlation!r}")
        for name in ("query_level", "probe_level"):
            if getattr(self, name) not in get_args(Level):
                raise ValueError(
                    f"{name} must be one of {list(get_args(Level))}, got {getattr(self, name)!r}"
                )
        batches: dict[str, Batch] = {}
        weights: dict[str, Any] = {}
        sides = []
        for kind, given, level, own in (
            ("queries", self.queries, self.query_level, self.query_weights),
            ("probes", self.probes, self.probe_level, self.probe_weights),
        ):
            sets = {name: take(batch) for name, batch in named(kind, given).items()}
            if not sets:
                raise ValueError(f"{kind} is empty; give at least one set")
            argument = "query_weights" if kind == "queries" else "probe_weights"
            own = {} if own is None else named(argument, own)
            unknown = sorted(set(own) - set(sets))
            if unknown:
                raise ValueError(f"{argument} names {unknown}, the {kind} are {list(sets)}")
            keys = []
            for name, batch in sets.items():
                check_like_data(f"{kind}[{name!r}]", batch, run.posterior)
                here = f"{kind}/{name}"
                twin = [k for k in batches if same_arrays(batches[k], batch)]
                twin = [k for k in twin if weights.get(k) is own.get(name)]
                keys.append(twin[0] if twin else here)
                if not twin:
                    batches[here] = batch
                    weights |= {here: own[name]} if name in own else {}
            sides.append((tuple(sets), tuple(keys), level))
        problem = build_problem(
            run.posterior, None, batches, next(iter(batches.values())), None, run.plan.chunk,
            probe_weights=weights or None,
        )  # fmt: skip
        both = [Side(*side, _columns(problem, *side)) for side in sides]
        return _losses(problem, both, self.correlation, run.plan)


def _columns(
    problem: Problem, names: tuple[str, ...], keys: tuple[str, ...], level: Level
) -> Columns:
    shapes = [problem.mass[key].shape for key in keys]
    cut = {"loss": None, "sample": 1, "set": 0}[level]
    return Columns(names, tuple(shape[:cut] for shape in shapes))


def _losses(problem: Problem, sides: list[Side], correlation: bool, plan: Plan) -> Losses:
    queries, probes = sides
    kinds = dict.fromkeys(f"{side.level} {key}" for side in sides for key in side.keys)
    sizes = {f"{s.level} {k}": math.prod(shape) for s in sides
             for k, shape in zip(s.keys, s.columns.shapes, strict=True)}  # fmt: skip
    draws = -(-plan.num_draws // plan.batches) * sum(sizes.values())
    rows = tuple(problem.probes)
    parts = [(problem.probe_baseline[key], problem.mass[key]) for key in rows]
    if all(map(is_concrete, jax.tree.leaves(parts))):
        means = np.stack([np.average(x, weights=q) for x, q in jax.tree.map(np.asarray, parts)])
        offsets = jax.device_put(means.astype(problem.offsets.dtype))
    else:
        offsets = jnp.stack([column_mean(x, q) for x, q in parts])
    return Losses(
        problem=replace(problem, offsets=offsets, groups=(), rows=()),
        rows=rows,
        kinds=tuple(kinds),
        queries=queries,
        probes=probes,
        correlation=correlation,
        keeps_draws=draws <= queries.columns.size * probes.columns.size,
    )


@register_pytree
@dataclass(frozen=True, eq=False)
class Losses:
    """Keeps the mean loss of every set, and the losses of each draw or their co-moments."""

    problem: Problem
    rows: tuple[str, ...] = field(metadata={"static": True})
    kinds: tuple[str, ...] = field(metadata={"static": True})
    queries: Side = field(metadata={"static": True})
    probes: Side = field(metadata={"static": True})
    correlation: bool = field(metadata={"static": True})
    keeps_draws: bool = field(metadata={"static": True})

    def on(self, mesh: Mesh | None) -> Losses:
        """What the chains carry: batches cut over a mesh, one program for both forms."""
        return replace(self, problem=self.problem.on(mesh), correlation=False)

    def init(self, posterior: Posterior) -> PyTree[Array]:
        """No draws yet."""
        if self.keeps_draws:
            return ()
        dtype = self.problem.offsets.dtype
        a, b = (jnp.zeros(side.columns.size, dtype) for side in (self.queries, self.probes))
        return CoMoments(moments.init(a, b), a, b)

    def value(
        self, posterior: Posterior, state: PyTree[Any], key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """ℓ − ℓ(w*) of the sets, and of rows and columns."""
        del key, batch_size
        none = jnp.zeros((), self.problem.offsets.dtype)
        _, moved = self.problem.columns(posterior, position_of(state), none)
        sets = jnp.stack([column_mean(moved[key], self.problem.mass[key]) for key in self.rows])
        of = {}
        for kind in self.kinds:
            level, name = kind.split(" ", 1)
            of[kind] = _at_level(moved[name], self.problem.mass[name], level)
        if self.keeps_draws:
            return (sets, of), ()
        return (sets, ()), (self.queries.join(of), self.probes.join(of))

    def update(self, accumulator: PyTree[Array], added: PyTree[Array]) -> PyTree[Array]:
        """One more draw."""
        if self.keeps_draws:
            return ()
        (a, b), old = added, accumulator.both
        new = moments.update(old, a, b)
        return CoMoments(
            both=new,
            square_a=accumulator.square_a + (a - old.mean_a) * (a - new.mean_a),
            square_b=accumulator.square_b + (b - old.mean_b) * (b - new.mean_b),
        )

    def _mass(self, side: Side) -> dict[str, Array]:
        """The shares of the columns of a side, of sum 1."""
        parts = {n: self.problem.mass[k] for n, k in zip(side.names, side.keys, strict=True)}
        xp: Any = np if all(map(is_concrete, parts.values())) else jnp
        whole = {n: xp.sum(xp.asarray(q), _axes(q, side.level)) for n, q in parts.items()}
        total = sum(xp.sum(q) for q in whole.values())
        return {n: on_device(xp.asarray(q / total, q.dtype)) for n, q in whole.items()}

    def result(self, run: Run, chains: Recorded) -> Influence:
        """Influences, errors and the health of the chains.

        Raises:
            DivergenceError: all chains are lost.
        """
        group = ComponentGroup()
        sets, of = chains.kept
        health = part_of_chains(
            run, self.problem, group, Estimates({}, {}, {}, {}, {}), chains.alive, sets,
            num_batches=run.plan.batches, pilot=fly(run, group),
        )  # fmt: skip
        mass = [self._mass(side) for side in (self.queries, self.probes)]
        value, stderr = estimate(
            of, chains.added, chains.alive, mass,
            sides=(self.queries, self.probes), batches=run.plan.batches,
            correlation=self.correlation,
        )  # fmt: skip
        same_level = self.queries.level == self.probes.level
        result = Influence(
            influence=value,
            stderr=stderr,
            query_mass=mass[0],
            probe_mass=mass[1],
            nbeta=as_number(run.posterior.nbeta, run.posterior.weights.dtype),
            mean=health.summary.mean,
            mean_stderr=health.summary.stderr,
            rhat=health.summary.rhat,
            ess=health.summary.ess,
            diverged=on_device(health.diverged),
            diagnostics=health.estimates.diagnostics,
            rows=self.rows,
            correlation=self.correlation,
            itself=tuple(
                (q, p)
                for q, one in zip(self.queries.names, self.queries.keys, strict=True)
                for p, other in zip(self.probes.names, self.probes.keys, strict=True)
                if same_level and one == other
            ),
            cost=run.plan.num_chains
            * (
                run.plan.num_steps * run.batch + run.plan.num_draws * self.problem.probe_samples / 3
            ),
        )
        if any(doubts(result)):
            warn(result.verdict)
        return result


def _at_level(losses: Array, mass: Array, level: str) -> Array:
    """The losses themselves, their means over each sample, or over the set; 0 without mass."""
    if level == "loss" or (level == "sample" and losses.ndim == 1):
        return losses
    if level == "set":
        return column_mean(losses, mass)
    total = jnp.sum(mass, axis=1)
    return jnp.sum(mass * losses, axis=1) / jnp.where(total > 0, total, 1)


def _axes(mass: Array, level: str) -> tuple[int, ...]:
    """The axes of losses that a column of this level spans."""
    return tuple(range({"loss": mass.ndim, "sample": 1, "set": 0}[level], mass.ndim))
