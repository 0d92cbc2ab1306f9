"""Several measurements of one run: LLC, χ, influences and traces from the same chains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jaxpattern import tables
from jaxpattern.chains.divergence import check_alive
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.loop import Recorded, States, run_chains
from jaxpattern.chains.pilot import fly
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.record import Several
from jaxpattern.chains.run import Run, make_run
from jaxpattern.llc import PairedExcessLoss, coefficient
from jaxpattern.posterior import Posterior
from jaxpattern.response.covariance import CoMoments, Covariance
from jaxpattern.response.estimator import Estimator
from jaxpattern.response.influence import BIF, Losses
from jaxpattern.response.measure import by_component
from jaxpattern.response.problem import Problem, named
from jaxpattern.response.susceptibilities import choose_estimator, make_problem
from jaxpattern.restriction import Restriction
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.runtime.host import Host, host_for
from jaxpattern.sampling import as_draws, observed
from jaxpattern.types import Batch


@dataclass(frozen=True)
class LLC:
    """Asks `measure` for the local learning coefficient, as `llc` does alone."""


@dataclass(frozen=True, eq=False)
class Chi:
    """Asks `measure` for a response matrix; the fields are the arguments of `susceptibilities`."""

    probes: Mapping[str, Batch] | Iterable[tuple[str, Batch]]
    observables: Mapping[str, Callable[..., Any]] | Iterable[tuple[str, Callable]] | None = None
    estimator: Estimator | None = None
    components: Mapping[str, Restriction] | Iterable[tuple[str, Restriction]] | None = None
    reference: Batch | None = None
    probe_weights: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Measured(Mapping[str, Any]):
    """Results by name, and the chains they come from, to go on from (`start=`)."""

    results: Mapping[str, Any]
    chains: States | None

    def __getitem__(self, name: str) -> Any:
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __str__(self) -> str:
        return "\n\n".join(f"{name}\n{result}" for name, result in self.results.items())

    def _repr_html_(self) -> str:
        return tables.together(self.results)


def measure(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    measurements: Mapping[str, Any],
    *,
    start: States | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    mesh: Mesh | None = None,
) -> Measured:
    """Several measurements, which give what the separate calls give, bit for bit.

    LLC, traces, influences and covariances over all of the posterior's parameters share one set of
    chains.
    A response of components, or a pathwise one, whose chains are antithetic pairs, has chains of
    its own (of the same key), here as in `susceptibilities`.

    Args:
        key: typed key.
        posterior: what to sample.
        sampler: `sgld(...)`, …
        plan: lengths and numbers.
        measurements: name → `LLC()`, `Chi(...)`, `BIF(...)`, or a function of the parameters whose
            values are kept, as in `sample`.
        start: `chains` of an earlier call with this key, to go on from where they are: with a
            burn-in of 0 they are one long run.
        progress, checkpoint, mesh: as in `sample`.

    Returns:
        A mapping of names to results, with the states of the shared chains.

    Raises:
        DivergenceError, CheckpointError, Interrupted, TypeError, ValueError: as the single calls.
    """
    run = make_run(key, posterior, sampler, plan)
    asked = named("measurements", measurements)
    if not asked:
        raise ValueError("measurements is empty; give at least one")
    if start is not None:
        _check_start(start, run)
    problems, estimators = {}, {}
    for name, what in asked.items():
        if isinstance(what, Chi):
            estimators[name] = choose_estimator(run, what.estimator)
            problems[name] = make_problem(
                run, probes=what.probes, observables=what.observables, reference=what.reference,
                components=what.components, probe_weights=what.probe_weights,
            )  # fmt: skip
    shared = {
        name: _recorder(what, run, problems.get(name), estimators.get(name))
        for name, what in asked.items()
    }
    alone = [name for name, recorder in shared.items() if recorder is None]
    if start is not None and alone:
        raise ValueError(f"start does not go with {alone}, which have chains of their own")
    with host_for(
        "measure", checkpoint=checkpoint, mesh=mesh, progress=progress, run=run,
        posterior=posterior, asked=asked, start=start,
    ) as host:  # fmt: skip
        own = {n: estimators[n](run, problems[n], host) for n in alone}
        together, chains = _together(run, shared, problems, estimators, start, host)
    results = own | together
    return Measured({name: results[name] for name in asked}, chains)


def _check_start(start: Any, run: Run) -> None:
    """Chains of as many, of the same sampler on parameters of the same shapes.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(start, States):
        raise TypeError(f"start must be the chains of measure(), got {type(start).__name__}")
    if len(start.alive) != run.plan.num_chains:
        raise ValueError(
            f"start has {len(start.alive)} chains, plan.num_chains is {run.plan.num_chains}"
        )

    def begin(posterior: Posterior) -> Any:
        return run.sampler(posterior).init(posterior.center, run.key)

    got = jax.tree.map(lambda x: (x.shape[1:], x.dtype), start.state)
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(begin, run.posterior))
    if got != wanted:
        raise ValueError(
            f"start holds states of another sampler or posterior: wanted {wanted}, got {got}"
        )


def _recorder(
    what: Any, run: Run, problem: Problem | None, estimator: Estimator | None
) -> Any | None:
    """What the shared chains keep for a measurement; None: it has chains of its own."""
    if isinstance(what, LLC):
        return PairedExcessLoss()
    if isinstance(what, BIF):
        return what.recorder(run)
    if problem is None:
        return observed(what, run.posterior)
    whole = len(problem.groups) == 1 and problem.groups[0].restrictions is None
    if isinstance(estimator, Covariance) and whole:
        estimator.check(problem)
        return CoMoments(problem.core)
    return None


def _together(
    run: Run,
    recorders: Mapping[str, Any],
    problems: Mapping[str, Problem],
    estimators: Mapping[str, Any],
    start: States | None,
    host: Host,
) -> tuple[dict[str, Any], States | None]:
    """The measurements that share chains, and where those are now."""
    parts = {name: recorder for name, recorder in recorders.items() if recorder is not None}
    if not parts:
        return {}, None
    carried = {name: _on(part, host.mesh) for name, part in parts.items()}
    chains = run_chains(run, Several(carried), host, initial=start, label="measuring")
    check_alive(chains.alive, ("",), run.posterior)
    results: dict[str, Any] = {}
    for name, part in parts.items():
        own = chains._replace(kept=chains.kept[name], added=chains.added[name])
        results[name] = _result(part, run, own, problems.get(name), estimators.get(name))
    steps, draws = (0, 0) if start is None else (start.steps, start.draws)
    states = States(
        state=_first(chains.state),
        alive=_first(chains.alive),
        steps=steps + run.plan.num_steps,
        draws=draws + run.plan.num_draws,
    )
    return results, states


def _on(part: Any, mesh: Mesh | None) -> Any:
    """A recorder with its batches on a mesh."""
    if isinstance(part, CoMoments):
        return CoMoments(part.problem.on(mesh))
    return part.on(mesh) if isinstance(part, Losses) else part


def _result(part: Any, run: Run, own: Recorded, problem: Problem | None, estimator: Any) -> Any:
    if isinstance(part, PairedExcessLoss):
        return coefficient(run, own, fly(run, ComponentGroup()))
    if isinstance(part, Losses):
        return part.result(run, own)
    if problem is None:
        return as_draws(_first(own.kept))

    def measured(group: Any) -> Any:
        return estimator.part(run, problem, group, own, None, fly(run, group))

    name, cost = f"covariance ({estimator.form})", estimator.cost(run, problem)
    return by_component(run, problem, measured, name=name, cost=cost)


def _first(tree: Any) -> Any:
    """Of the only component."""
    return jax.tree.map(lambda leaf: leaf[0], tree)
