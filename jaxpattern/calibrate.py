"""Settings that can be used: nβ, γ, ε, burn-in and thinning for a posterior, by short runs.

A pilot finds P, the precision of the stiffest direction, and ε = 0.2/P; of h = (P − γ)/nβ and of
the steps that the budget allows follows the weakest γ in which a chain can settle. A handful of
settings around the given ones is then run, all at once, and each is judged (`health`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Key

from jaxpattern import tables
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.loop import run_chains
from jaxpattern.chains.pilot import Pilot, fly
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.run import Run, make_run
from jaxpattern.health import BASIN, SETTLE, SETTLED, SIGNAL, STEP, Look, Reading, Setting, judge
from jaxpattern.posterior import Posterior
from jaxpattern.runtime.host import Host
from jaxpattern.samplers import Sampler, sgld
from jaxpattern.types import Params
from jaxpattern.validation import (
    as_pytree_function,
    check_count,
    check_number,
    is_traced,
    own_streams,
)

_GRAVITY = {BASIN: 4, STEP: 3, SETTLED: 2, SIGNAL: 1}  # of what is wrong, for the least bad
_NOT_BELOW = 1e-6  # of nβ: the γ that stands for 0 where h is measured
_LANES, _DRAWS = 8, 50
_KNOWN = ("step_size", "nbeta", "localization", "stiffness", "relaxation")
_OPERATIONS, _FEWEST, _MOST = 1.5e11, 200, 3000


class Calibration(NamedTuple):
    """Settings of posterior and sampler, what was seen of each, and the one that is proposed.

    Attributes:
        posterior, sampler, plan: the proposal, to be used as they are.
        proposed: its index among the settings; the first setting is the given one.
        step_size, nbeta, localization: ε, nβ and γ of the settings, `[S]`.
        stiffness: εP of the stiffest direction, `[S]`; proposals have 0.1 to 0.3.
        relaxation: steps in which a flat direction is forgotten, 2/(εγ) for SGLD, `[S]`.
        llc, stderr, rhat: λ̂, its error and R-hat, `[S]`.
        reach: γ⟨‖w − w*‖²⟩/d, `[S]`: 1 where the localization alone acts.
        pull: share by which the data lower the mean excess loss of the localization alone, `[S]`.
        trace: nβ (L − L(w*)) along the chains, `[S, chains, draws]`; NaN where a chain is lost.
        healthy: whether nothing is wrong, `[S]`.
        problems: what is wrong with each, by name and in words.
        cost, plan_cost: gradient equivalents spent, and of the chains of the plan.
    """

    posterior: Posterior
    sampler: Sampler
    plan: Plan
    proposed: int
    step_size: Float[np.ndarray, " settings"]
    nbeta: Float[np.ndarray, " settings"]
    localization: Float[np.ndarray, " settings"]
    stiffness: Float[np.ndarray, " settings"]
    relaxation: Float[np.ndarray, " settings"]
    llc: Float[np.ndarray, " settings"]
    stderr: Float[np.ndarray, " settings"]
    rhat: Float[np.ndarray, " settings"]
    reach: Float[np.ndarray, " settings"]
    pull: Float[np.ndarray, " settings"]
    trace: Float[np.ndarray, "settings chains draws"]
    healthy: Bool[np.ndarray, " settings"]
    problems: tuple[tuple[str, ...], ...]
    cost: float
    plan_cost: float

    @property
    def verdict(self) -> str:
        """Whether the proposal can be used, in words."""
        if self.healthy[self.proposed]:
            return "healthy"
        return "no setting tried is healthy; this is the least bad, with: " + "; ".join(
            self.problems[self.proposed]
        )

    def __str__(self) -> str:
        return tables.text(describe, self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return tables.html(describe, self)


def describe(result: Calibration) -> tables.Page:
    """The proposal, a line for each setting, and in words what is wrong with it."""
    i = result.proposed
    title = (
        f"Proposed: nβ = {result.nbeta[i]:.4g}, γ = {result.localization[i]:.4g}, "
        f"{result.sampler}, {result.plan} ({result.verdict})"
    )
    header = ["setting", "nβ", "γ", "ε", "εP", "relaxation", "λ̂", "verdict"]
    rows, notes = [], []
    for s, problems in enumerate(result.problems):
        name = f"{s} given" * (s == 0) or f"{s}"
        names = dict.fromkeys(problem.split(":")[0] for problem in problems)
        rows.append([
            f"{name} →" if s == i else name, f"{result.nbeta[s]:.4g}",
            f"{result.localization[s]:.4g}", f"{result.step_size[s]:.3g}",
            f"{result.stiffness[s]:.2g}", f"{result.relaxation[s]:.3g}",
            tables.measured(result.llc[s], result.stderr[s]), ", ".join(names) or "healthy",
        ])  # fmt: skip
        notes += [f"Setting {s}: {'; '.join(problems)}."] if problems else []
    notes.append(
        f"Cost {result.cost:.3g} gradient equivalents; a run of the plan takes "
        f"{result.plan_cost:.3g}."
    )
    return tables.Page(title, (tables.Grid(header, rows),), tuple(notes))


class _Case(NamedTuple):
    """What is calibrated. The scout is the sampler whose steps the pilot knows."""

    key: Key[Array, ""]
    posterior: Posterior
    sampler: Sampler
    scout: Sampler
    plan: Plan


def calibrate(
    key: Key[Array, ""],
    posterior: Posterior,
    *,
    sampler: Any = sgld,
    batch_size: int | None = None,
    num_chains: int = 4,
    budget: float | int | None = None,
    check: Callable[[Params], Float[Array, ""]] | None = None,
) -> Calibration:
    """Propose nβ, γ, ε and a plan for a posterior, by short runs that are judged in words.

    Tried are the given nβ and γ; the given nβ with the weakest γ in which a chain settles within
    the budget, with four times that, and with one as strong as the loss is stiff; the first two for
    nβ = n/log n as well; and the given γ with the nβ that fits. ε = 0.2/P for the stiffest
    direction, or less where mini-batches would heat it by more than a tenth. Proposed is the
    healthy setting nearest to the given one, in logarithms of nβ and γ, of which going down counts
    twice; where none is healthy the least bad, which `verdict` says.

    A setting is called "step too large" (εP above ½, mini-batches that add a quarter to the
    temperature, a temperature above 1, chains that go to infinity), "not settled" (a burn-in below
    three relaxation times, a trend, chains that disagree), "left the basin" (further from w* than
    the localization alone allows, a loss below that of w*, a check that is lost) or "too little
    signal" (λ̂ within two errors of 0, or data that lower the loss by less than a tenth of what the
    localization alone gives).

    Args:
        key: typed key.
        posterior: what to sample, with the nβ and γ to begin with.
        sampler: `sgld`, `rmsprop_sgld` or another function of `step_size`; or a sampler such as
            `sgld(step_size=1e-3)`, whose step is then judged as well.
        batch_size: samples of a step; None: 32, or all where there are at most 64.
        num_chains: of each setting, and of the plan.
        budget: gradient equivalents of the short runs. None: what takes about 20 s on two cores,
            counted as 6 operations per parameter and loss, within 200 and 3,000 steps of a chain.
        check: scalar function of the parameters that must keep 95 % of its value at w* (an
            accuracy).

    Returns:
        A `Calibration`: `settings.posterior`, `settings.sampler` and `settings.plan` (with burn-in
        and thinning of `Plan.completed`) can be used at once; `print` it, or draw it with
        `jaxpattern.plot.calibration`.

    Raises:
        TypeError, ValueError: an argument does not fit, or is traced.
    """
    case, given = _begin(key, posterior, sampler, batch_size, num_chains, budget)
    settings = _settings(case, given)
    recorder = Look(as_pytree_function(check or (lambda params: jnp.ones(()))))
    base = float(recorder.check(posterior.params)) if check is not None else math.nan
    grid = np.array([[s.step_size, s.nbeta, s.localization] for s in settings]).T
    dtype = posterior.weights.dtype
    kept, alive = _short_runs(
        case.key, posterior, case.sampler, jax.device_put(grid.astype(dtype)), recorder, case.plan
    )
    kept = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), kept)
    kept = kept._replace(excess=kept.excess * grid[1][:, None, None])
    kept = kept._replace(tether=kept.tether * grid[1][:, None, None])
    each = [jax.tree.map(lambda leaf, s=s: leaf[s], kept) for s in range(len(settings))]
    judged = [
        judge(reading, living, case.plan, now, base)
        for reading, living, now in zip(each, np.asarray(alive), settings, strict=True)
    ]
    problems = tuple(found for _, found in judged)
    i = _choose(settings, problems)
    best = settings[i]
    proposal = Plan(num_chains=num_chains, batch_size=case.plan.batch_size)
    proposal = proposal.completed(best.relaxation if math.isfinite(best.relaxation) else None)
    numbers = np.array([numbers for numbers, _ in judged]).T
    size = num_chains * (case.plan.batch_size or posterior.num_samples)
    return Calibration(
        posterior=_at(posterior, best.nbeta, best.localization),
        sampler=_with_step(case.sampler, best.step_size),
        plan=proposal,
        proposed=i,
        **{name: np.array([getattr(s, name) for s in settings]) for name in _KNOWN},
        **dict(zip(("llc", "stderr", "rhat", "reach", "pull"), numbers, strict=True)),
        trace=kept.excess,
        healthy=np.array([not found for found in problems]),
        problems=problems,
        cost=float(size * len(settings) * (case.plan.num_steps + 2 * case.plan.num_draws)),
        plan_cost=float(size * proposal.num_steps),
    )


def _begin(
    key: Any, posterior: Any, sampler: Any, batch_size: Any, num_chains: Any, budget: Any
) -> tuple[_Case, float | None]:
    """The case, and the given ε where there is one."""
    check_count("num_chains", num_chains, minimum=2)
    if budget is not None:
        check_number("budget", budget, minimum=0.0, exclusive=True)
    given, made = None, sampler
    if not isinstance(sampler, Sampler):
        wanted = "sampler must be a function of step_size, such as jp.sgld, or a Sampler"
        if not callable(sampler):
            raise TypeError(f"{wanted}, got {type(sampler).__name__}")
        try:
            made = sampler(step_size=1.0)
        except TypeError as error:
            raise TypeError(f"{wanted}, got {sampler!r:.80}: {error}") from None
    if not isinstance(made, Sampler) or "step_size" not in made.settings:
        raise TypeError(
            "sampler must have step_size among its settings (bind it with jax.tree_util.Partial "
            f"and jp.make_sampler), got {made!r:.80}"
        )
    if made.tempers_noise:
        raise ValueError(
            f"sampler must be a Langevin sampler, got {made.name}: how large its step may be also "
            "depends on its friction; try settings of it with jp.sweep"
        )
    if made is sampler:
        given = float(made.settings["step_size"])
    size = getattr(posterior, "num_samples", 1)
    if batch_size is None and size > 64 and made.needs_minibatch:
        batch_size = 32
    least = Plan(num_chains=num_chains, num_burnin=1, num_draws=2, thin=1, batch_size=batch_size)
    make_run(key, posterior, _with_step(made, 1e-30), least)
    if is_traced(key, posterior, made):
        raise ValueError("calibrate looks at what it finds, so it cannot be traced by jit or vmap")
    steps = _num_steps(posterior, budget, num_chains * _LANES, batch_size or size)
    draws = min(_DRAWS, steps // 8)
    plan = replace(
        least, num_burnin=steps // 2, num_draws=draws, thin=(steps - steps // 2) // draws
    )
    scout = made if made.step_scale is not None else sgld(step_size=1.0)
    return _Case(own_streams(key), posterior, made, scout, plan), given


def _num_steps(posterior: Posterior, budget: float | int | None, lanes: int, batch: int) -> int:
    """Steps of a chain that the budget allows."""
    if budget is None:
        moved = sum(leaf.size for leaf in jax.tree.leaves(posterior.center))
        number = sum(leaf.size for leaf in jax.tree.leaves(posterior.params))
        losses = posterior.weights.size // posterior.num_samples
        # A normal costs about as much as 100 operations.
        step = 6 * number * losses * batch + 100 * moved
        return int(np.clip(_OPERATIONS / (lanes * step), _FEWEST, _MOST))
    steps = int(budget / (lanes * batch))
    if steps < 40:
        raise ValueError(
            f"budget must be at least {40 * lanes * batch} gradient equivalents, 40 steps of "
            f"{lanes} chains on {batch} samples, got {budget:g}"
        )
    return steps


def _at(posterior: Posterior, nbeta: float, localization: float) -> Posterior:
    dtype = posterior.weights.dtype
    numbers = (jax.device_put(np.asarray(x, dtype)) for x in (nbeta, localization))
    return replace(posterior, **dict(zip(("nbeta", "localization"), numbers, strict=True)))


def _with_step(sampler: Sampler, step: Any) -> Sampler:
    """The same sampler with another ε."""
    old: Any = sampler.algorithm
    settings = {**old.keywords, "step_size": step}
    return replace(sampler, algorithm=Partial(old.func, *old.args, **settings))


def _settings(case: _Case, given: float | None) -> list[Setting]:
    """The settings to try, the given one first."""
    nbeta, gamma = float(case.posterior.nbeta), float(case.posterior.localization)
    base = _find(case, nbeta, max(gamma, _NOT_BELOW * nbeta), 1 / (gamma + nbeta), tries=4)
    # A chain settles where `SETTLE` relaxation times, of P/γ · 2/Λ steps, fit the burn-in.
    settles = case.plan.num_burnin * base.stiffness / (2 * SETTLE)
    ratio = max(0.8 * settles - 1, 1.0)
    size = max(int(np.sum(np.any(np.asarray(case.posterior.weights) != 0, axis=tuple(
        range(1, case.posterior.weights.ndim))))), 3)  # fmt: skip
    field = size / math.log(size)
    tried = [(nbeta, base.curvature, nbeta * base.curvature / ratio * k) for k in (1, 4, ratio)]
    start = base.step_size * min(1.0, nbeta / field)
    far = _find(case, field, field * base.curvature / ratio, start, tries=2)
    tried += [(field, far.curvature, field * far.curvature / ratio * k) for k in (1, 4)]
    if gamma > 0:
        tried.append((gamma * ratio / 2 / base.curvature, base.curvature, gamma))
    settings = [base._replace(localization=gamma) if gamma > 0 else base._replace(
        localization=0.0, relaxation=math.inf)]  # fmt: skip
    if given is not None:
        settings.insert(0, _fly(case, nbeta, gamma, given))
    for nb, h, g in tried:
        if any(max(abs(math.log(nb / s.nbeta)), abs(math.log(g / max(s.localization, 1e-30)))) < 0.2
               for s in settings):  # fmt: skip
            continue
        start = base.step_size * _precision(base) / (nb * h + g)
        settings.append(_find(case, nb, g, start, tries=1))
    return settings


def _precision(setting: Setting) -> float:
    return setting.nbeta * setting.curvature + setting.localization


def _find(case: _Case, nbeta: float, gamma: float, step: float, tries: int) -> Setting:
    """The setting whose ε is what is proposed for it; the curvature depends on the ε at which
    one looks, so it is looked at again.
    """
    for _ in range(tries):
        now = _fly(case, nbeta, gamma, step)
        if 0.5 < now.factor < 1.5:
            break
        step = now.step_size * now.factor
    return now.scaled(now.factor)


def _fly(case: _Case, nbeta: float, gamma: float, step: float) -> Setting:
    """What the pilot says of a setting; of one that it cannot be evaluated at, of a smaller ε."""
    posterior, looked = _at(case.posterior, nbeta, gamma), step
    for _ in range(8):
        sampler = _with_step(case.scout, looked)
        found = fly(Run(case.key, posterior, sampler, case.plan), ComponentGroup())
        pilot = cast(Pilot, found)  # the scout states the size of its steps
        if np.isfinite(pilot.stiffness[0]):
            break
        looked /= 30
    relaxation = sampler.relaxation(posterior, float(pilot.gradient[0])) or math.inf
    stiffness = max(float(pilot.stiffness[0]), 2 / relaxation, 1e-30)
    heat = float(pilot.heat[0]) if case.sampler.needs_minibatch else 0.0
    now = Setting(nbeta, gamma, looked, stiffness, relaxation, heat, pilot)
    return now.scaled(step / looked)


@partial(jax.jit, static_argnames="plan")
def _short_runs(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Sampler,
    grid: Float[Array, "3 settings"],
    recorder: Look,
    plan: Plan,
) -> tuple[Reading, Array]:
    def run(step: Array, nbeta: Array, localization: Array) -> tuple[Reading, Array]:
        setting = replace(posterior, nbeta=nbeta, localization=localization)
        chains = run_chains(
            make_run(key, setting, _with_step(sampler, step), plan), recorder, Host()
        )
        return jax.tree.map(lambda leaf: leaf[0], (chains.kept, chains.alive))

    return jax.vmap(run)(*grid)


def _choose(settings: list[Setting], problems: tuple[tuple[str, ...], ...]) -> int:
    """The nearest of those with the least wrong; to go down counts twice."""

    def rank(s: int) -> tuple[int, float]:
        names = {problem.split(":")[0] for problem in problems[s]}
        way = 0.0
        for name in ("nbeta", "localization"):
            old, new = (max(getattr(x, name), 1e-30) for x in (settings[0], settings[s]))
            way += max(math.log(new / old), 2 * math.log(old / new))
        return sum(_GRAVITY.get(name, 3) for name in names), way

    return min(range(len(settings)), key=rank)
