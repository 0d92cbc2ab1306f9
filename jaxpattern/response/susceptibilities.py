"""The driver that measures a response matrix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jaxpattern.chains.plan import Plan
from jaxpattern.chains.run import Run, make_run
from jaxpattern.posterior import Posterior
from jaxpattern.response.covariance import covariance
from jaxpattern.response.estimator import Estimator
from jaxpattern.response.pathwise import pathwise
from jaxpattern.response.problem import Problem, build_problem, named
from jaxpattern.response.result import Response, doubts
from jaxpattern.restriction import Restriction
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.runtime.host import host_for
from jaxpattern.types import Batch
from jaxpattern.validation import check_function
from jaxpattern.verdict import warn


def susceptibilities(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    *,
    probes: Mapping[str, Batch] | Iterable[tuple[str, Batch]],
    observables: Mapping[str, Callable] | Iterable[tuple[str, Callable]] | None = None,
    estimator: Estimator | None = None,
    components: Mapping[str, Restriction] | Iterable[tuple[str, Restriction]] | None = None,
    reference: Batch | None = None,
    probe_weights: Mapping[str, Array | np.ndarray | list[Any]] | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    mesh: Mesh | None = None,
) -> Response:
    """The response matrix χ_z(φ) = −Cov_p[φ, ℓ_z − L], with standard errors.

    Positive: more weight on z raises ⟨φ⟩. To first order, weights ρ on the columns shift it by
    nβ Σ_z q_z χ_z (ρ_z − 1), q the share of the data that a column stands for. Weights ρ multiply
    base weights ρ₀ where there are any: what is trained on next is ρ₀ ρ (`compose_weights`).

    Args:
        key: typed key.
        posterior: what to sample.
        sampler: `sgld(...)`, …, or any function of the posterior to a `SamplingAlgorithm`.
        plan: lengths and numbers.
        probes: name → batch like the data; every loss in it is one column. Its samples may be of
            another length than those of the data.
        observables: name → function of the parameters that returns a scalar, or `[K]` for rows
            `name/0` … None, with components: each component's excess loss L(w) − L(w*).
        estimator: `pathwise(...)`, the default where the relaxation time of the sampler is known
            (the samplers of this package but `mala`, with γ > 0), `covariance(...)`, the default
            elsewhere, or `laplace(...)`.
        components: name → `Restriction`; each gets chains of its own with all other weights held
            at w*, and components of equal shape run as one vmapped program.
        reference: batch whose mean loss stands for L. None is the posterior's data with their
            weights: a pass over all of them a draw for covariances, a fresh mini-batch of
            `plan.batch_size` for pathwise estimates, which stay unbiased. A batch that is one of
            the probe sets has the weights of that set.
        probe_weights: name → base weights ρ₀ ≥ 0 of the shape of the losses of that probe set; 0
            excludes, whatever the loss is (padding). Columns stand for shares q ∝ ρ₀ of the data
            (`Response.mass`), and an excluded one has χ = 0. A probe set that is not named has
            all ones. None: all ones, except that probe sets made of samples of a weighted
            posterior's data have those weights. Two probe sets of the same samples and different
            weights tell sources of tokens inside packed rows apart: `probes={"code": rows,
            "prose": rows}, probe_weights={"code": is_code, "prose": ~is_code}`.
        progress: show progress lines. Without them, and with an estimator that allows it, this is
            a pure function.
        checkpoint: a folder, or a `Checkpoint`, where the run is kept; called again with the same
            arguments after an interruption, it goes on from there to the same bits.
        mesh: where it runs, see `jaxpattern.mesh`; None: the current mesh, or one device.

    Returns:
        A `Response` with rows named `observable`, `component`, or `component/observable`.

    Raises:
        DivergenceError: all chains of a component diverged.
        CheckpointError: the folder belongs to another run, or cannot be used.
        Interrupted: a signal stopped a run with a folder, after it was saved.
        TypeError, ValueError: an argument does not fit; said before any sampling.

    References:
        Baker et al. 2025, arXiv 2504.18274; Wang & Murfet 2026, arXiv 2601.13548.
    """
    run = make_run(key, posterior, sampler, plan)
    estimator = choose_estimator(run, estimator)
    problem = make_problem(
        run, observables=observables, probes=probes, reference=reference, components=components,
        probe_weights=probe_weights,
    )  # fmt: skip
    with host_for(
        "susceptibilities", checkpoint=checkpoint, mesh=mesh, progress=progress, run=run,
        posterior=posterior, problem=problem, estimator=estimator,
    ) as host:  # fmt: skip
        response = estimator(run, problem, host)
    warn_of(response)
    return response


def warn_of(response: Response) -> None:
    """A warning, where something speaks against rows of a response that can be looked at."""
    if any(doubts(response)):
        warn(response.verdict)


def choose_estimator(run: Run, estimator: Estimator | None) -> Estimator:
    """The one given, or the default of the run.

    Raises:
        TypeError: it is no function of (run, problem, host).
    """
    if estimator is None:
        known = run.sampler.relaxation(run.posterior) is not None
        return pathwise() if known else covariance()
    check_function("estimator", estimator, "one such as jp.pathwise()", num_arguments=3)
    return estimator


def make_problem(
    run: Run,
    *,
    probes: Any,
    observables: Any = None,
    reference: Batch | None = None,
    components: Any = None,
    probe_weights: Any = None,
) -> Problem:
    """What is asked, from what a user gives.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if components is not None:
        components = named("components", components)
    if observables is not None:
        observables = named("observables", observables)
        if not observables:
            raise ValueError("observables is empty; leave it out to use the excess loss")
    elif components is None:
        raise ValueError("observables must be given where there are no components")
    probes = named("probes", probes)
    if probe_weights is not None:
        probe_weights = named("probe_weights", probe_weights)
    return build_problem(
        run.posterior,
        observables,
        probes,
        reference,
        components,
        run.plan.chunk,
        probe_weights=probe_weights,
    )
