"""Calibration: a grid of (ε, nβ, γ) as one vmapped program, and which settings are healthy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxpattern import tables
from jaxpattern.chains.kernel import position_of
from jaxpattern.chains.loop import run_chains
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.record import Trace
from jaxpattern.chains.run import make_run
from jaxpattern.diagnostics import summarize
from jaxpattern.llc import PairedExcessLoss
from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.runtime.host import Host
from jaxpattern.samplers import sgld
from jaxpattern.types import Params
from jaxpattern.validation import as_pytree_function, check_number


class Sweep(NamedTuple):
    """Chains of S settings, and a verdict on each.

    Attributes:
        step_size, nbeta, localization: the settings, `[S]`.
        llc, stderr, rhat: λ̂, its standard error and R-hat, `[S]`.
        temperature: of the sampled law, weighted by curvature, `[S]`; 1 is exact. By Stein's
            identity E[∇L · ∇U] = E[ΔL] for the law exp(−U), U = nβ L + γ/2 ‖w − w*‖²; the ratio of
            the two sides is Σ h_i T_i / Σ h_i on a quadratic of curvatures h, with T_i the factor
            by which step size and mini-batches inflate the variance of a direction.
        trace: nβ (L − L(w*)) along the chains, `[S, chains, draws]`; NaN where a chain is lost.
        kept: mean of `check` along the chains over its value at w*, `[S]`; NaN without a check.
        healthy: whether nothing is wrong, `[S]`.
        problems: what is wrong with each setting, empty where it is healthy.
    """

    step_size: Float[np.ndarray, " settings"]
    nbeta: Float[np.ndarray, " settings"]
    localization: Float[np.ndarray, " settings"]
    llc: Float[np.ndarray, " settings"]
    stderr: Float[np.ndarray, " settings"]
    rhat: Float[np.ndarray, " settings"]
    temperature: Float[np.ndarray, " settings"]
    kept: Float[np.ndarray, " settings"]
    trace: Float[np.ndarray, "settings chains draws"]
    healthy: Bool[np.ndarray, " settings"]
    problems: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = ["  step size       nβ        γ        λ̂   stderr  R-hat  temp.  kept  verdict"]
        for s in range(len(self.llc)):
            lines.append(
                f"{self.step_size[s]:11.3g}{self.nbeta[s]:9.4g}{self.localization[s]:9.4g}"
                f"{self.llc[s]:10.4g}{self.stderr[s]:9.2g}{self.rhat[s]:7.3f}"
                f"{self.temperature[s]:7.2f}{self.kept[s]:6.2f}"
                f"  {'; '.join(self.problems[s]) or 'healthy'}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return tables.html(describe, self, most=len(self.llc))


def describe(result: Sweep) -> tables.Page:
    """A line for each setting."""
    header = ["step size", "nβ", "γ", "λ̂", "R-hat", "temperature", "kept", "verdict"]
    body = [
        [
            f"{result.step_size[s]:.3g}", f"{result.nbeta[s]:.4g}",
            f"{result.localization[s]:.4g}", tables.measured(result.llc[s], result.stderr[s]),
            f"{result.rhat[s]:.3f}", f"{result.temperature[s]:.2f}", f"{result.kept[s]:.2f}",
            "; ".join(result.problems[s]) or "healthy",
        ]
        for s in range(len(result.llc))
    ]  # fmt: skip
    title = f"{int(np.sum(result.healthy))} of {len(result.llc)} settings are healthy"
    return tables.Page(title, (tables.Grid(header, body),))


class _Reading(NamedTuple):
    """What is recorded of a draw."""

    excess: Array
    check: Array
    work: Array
    laplacian: Array


@register_pytree
@dataclass(frozen=True, eq=False)
class _Health(Trace):
    """Keeps the paired excess loss, the user's check, and both sides of Stein's identity."""

    loss: PairedExcessLoss
    check: Callable[[Params], Float[Array, ""]]

    def value(
        self, posterior: Posterior, state: PyTree[Any], key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """A reading, and nothing."""
        position = position_of(state)
        loss_key, left_key, right_key, trace_key = jax.random.split(key, 4)
        excess = self.loss.value(posterior, state, loss_key, batch_size)[0]
        # Independent mini-batches, so that the product of two gradients is unbiased.
        left, right = (posterior.minibatch(k, batch_size) for k in (left_key, right_key))
        force = posterior.grad_estimator(position, right)
        probe = optax.tree.random_like(trace_key, position, jax.random.rademacher)
        gradient, curvature = jax.jvp(
            lambda w: posterior.loss_gradient(w, left), (position,), (probe,)
        )
        reading = _Reading(
            excess=excess,
            check=jnp.asarray(self.check(posterior.embed(position)), excess.dtype),
            work=-optax.tree.vdot(gradient, force),
            laplacian=optax.tree.vdot(probe, curvature),
        )
        return reading, ()


def sweep(
    key: Key[Array, ""],
    posterior: Posterior,
    plan: Plan,
    *,
    step_sizes: Sequence[float],
    nbetas: Sequence[float],
    localizations: Sequence[float],
    sampler: Callable[..., Any] = sgld,
    check: Callable[[Params], Float[Array, ""]] | None = None,
    keep: float = 0.95,
    tolerance: float = 0.1,
) -> Sweep:
    """Sample every combination of (ε, nβ, γ) at once, and say which settings are healthy.

    A setting is healthy when no chain is lost, the loss rises above L(w*) by more than two standard
    errors, the two halves of the chains agree within three standard errors, R-hat is below 1.1,
    the temperature is within `tolerance` of 1 (or three standard errors, if they are larger), and
    the check (an accuracy, say) keeps at least the share `keep` of its value at w*.

    Args:
        key: typed key.
        posterior: what to sample; its own nβ and γ are not used.
        plan: lengths and numbers, the same for all settings; without numbers those that the
            slowest of them asks for.
        step_sizes: values of ε.
        nbetas: values of nβ.
        localizations: values of γ.
        sampler: `sgld`, `rmsprop_sgld`, …: a function of `step_size`.
        check: scalar function of the weights that must not change along a chain.
        keep: share of the check's value at w* that must be kept.
        tolerance: how far the temperature may be from 1.

    Returns:
        A `Sweep`; `print` it, or draw it with `jaxpattern.plot.sweep`. `calibrate` chooses the
        settings by itself.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    for name, values, exclusive in (
        ("step_sizes", step_sizes, True),
        ("nbetas", nbetas, True),
        ("localizations", localizations, False),
    ):
        if len(values) == 0:
            raise ValueError(f"{name} is empty")
        for value in values:
            check_number(name, value, minimum=0.0, exclusive=exclusive)
    check_number("keep", keep, minimum=0.0)
    check_number("tolerance", tolerance, minimum=0.0, exclusive=True)
    held = [gamma for gamma in localizations if gamma > 0] or [0.0]
    slowest = replace(posterior, localization=min(held))
    plan = make_run(key, slowest, sampler(step_size=min(step_sizes)), plan).plan
    grid = np.stack(
        [x.ravel() for x in np.meshgrid(step_sizes, nbetas, localizations, indexing="ij")]
    )
    recorder = _Health(
        PairedExcessLoss(), as_pytree_function(check or (lambda params: jnp.ones(())))
    )

    @jax.jit
    @jax.vmap
    def run(step_size: Array, nbeta: Array, localization: Array) -> tuple[_Reading, Array]:
        setting = replace(posterior, nbeta=nbeta, localization=localization)
        run = make_run(key, setting, sampler(step_size=step_size), plan)
        chains = run_chains(run, recorder, Host())
        return jax.tree.map(lambda leaf: leaf[0], (chains.kept, chains.alive))

    readings, alive = run(*jnp.asarray(grid, posterior.weights.dtype))
    readings = readings._replace(excess=readings.excess * jnp.expand_dims(grid[1], (1, 2)))
    base = float(recorder.check(posterior.params)) if check is not None else float("nan")
    verdicts = [
        _judge(
            jax.tree.map(lambda leaf, s=s: leaf[s], readings), alive[s], base, plan, keep, tolerance
        )
        for s in range(grid.shape[1])
    ]
    problems = tuple(found for _, found in verdicts)
    numbers = np.array([numbers for numbers, _ in verdicts]).T
    healthy = np.array([not found for found in problems])
    return Sweep._make([*grid, *numbers, np.asarray(readings.excess), healthy, problems])


def _judge(
    reading: _Reading, alive: Array, base: float, plan: Plan, keep: float, tolerance: float
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """(λ̂, its error, R-hat, temperature, share kept), and what is wrong."""
    if not bool(alive.any()):
        return (np.nan,) * 5, ("all chains turned non-finite",)
    problems = []
    if not bool(alive.all()):
        problems.append(f"{int((~alive).sum())} of {len(alive)} chains turned non-finite")
    reading = jax.tree.map(lambda leaf: leaf[alive], reading)
    summary = summarize(reading.excess, num_batches=plan.batches)
    mean, stderr, rhat = float(summary.mean), float(summary.stderr), float(summary.rhat)
    half = plan.num_draws // 2
    drift = float(jnp.mean(reading.excess[:, half:]) - jnp.mean(reading.excess[:, :half]))
    if mean < 2 * stderr:
        problems.append("loss does not rise above that of w*")
    # The difference of two half-means has twice the standard error of the whole.
    if abs(drift) > 3 * 2 * stderr:
        problems.append("still drifting")
    if rhat > 1.1:
        problems.append("chains disagree")
    laplacian = float(jnp.mean(reading.laplacian))
    temperature = float(jnp.mean(reading.work)) / laplacian
    residual = (reading.work - temperature * reading.laplacian) / laplacian
    noise = float(summarize(residual, num_batches=plan.batches).stderr)
    if abs(temperature - 1) > max(tolerance, 3 * noise):
        problems.append(f"sampled at {temperature:.2f} times the temperature")
    share = float(jnp.mean(reading.check)) / base
    if share < keep:
        problems.append(f"check kept only {share:.0%}")
    return (mean, stderr, rhat, temperature, share), tuple(problems)
