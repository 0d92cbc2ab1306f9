"""What is wrong with a setting of nβ, γ and ε, in words, from a pilot and short chains.

What is looked at holds for any loss, smooth or not:

* Under the law of U = nβ L + γ/2 ‖w − w*‖², E[(w − w*) · ∇U] = d: a larger mean is a temperature
  above 1.
* Where the loss holds the chain, E‖w − w*‖² ≤ d/γ; beyond, it pushes the chain away.
* ⟨L⟩ falls as nβ rises from 0, by −Var L: where it has not fallen below its mean under the
  localization alone, the data do not act.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxpattern import tables, verdict
from jaxpattern.chains.kernel import position_of
from jaxpattern.chains.pilot import Pilot
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.record import Trace
from jaxpattern.diagnostics import summarize
from jaxpattern.losses import weighted_mean
from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.samplers import noise_by_leaf
from jaxpattern.types import Params

STEP, SETTLED, BASIN, SIGNAL = (
    "step too large", "not settled", "left the basin", "too little signal"
)  # fmt: skip
STIFFNESS, _STIFF = 0.2, 0.5  # εP proposed, and healthy: the variance is 1.05 and 1.14 times right
HEAT, _HOT = 0.1, 0.25  # what mini-batches may add to the temperature
SETTLE = 3  # relaxation times of burn-in
_PULL = 0.1  # share by which the data lower the excess loss of the localization alone
_KEEP = 0.95  # of the check
_FAR = 1e30


class Setting(NamedTuple):
    """nβ, γ and ε, and what the pilot says of them; `heat` is what mini-batches add."""

    nbeta: float
    localization: float
    step_size: float
    stiffness: float
    relaxation: float
    heat: float
    pilot: Pilot

    def scaled(self, factor: float) -> Setting:
        """The same with another ε."""
        return self._replace(
            step_size=self.step_size * factor, stiffness=self.stiffness * factor,
            relaxation=self.relaxation / factor, heat=self.heat * factor,
        )  # fmt: skip

    @property
    def factor(self) -> float:
        """By which ε reaches the εP that is proposed, or the heat."""
        return min(STIFFNESS / self.stiffness, HEAT / max(self.heat, 1e-30))

    @property
    def curvature(self) -> float:
        """h of P = nβ h + γ, from P/γ = Λ · relaxation / 2; at least a little."""
        ratio = self.stiffness * self.relaxation / 2 - 1
        return max(ratio, 1e-6) * self.localization / self.nbeta


class Reading(NamedTuple):
    """What is recorded of a draw, or its means over the draws."""

    excess: Any
    tether: Any
    reach: Any
    heat: Any
    check: Any


@register_pytree
@dataclass(frozen=True, eq=False)
class Look(Trace):
    """Excess loss here and under the localization alone, distance, temperature, the check."""

    check: Callable[[Params], Float[Array, ""]]

    def value(
        self, posterior: Posterior, state: PyTree[Any], key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """A reading, and nothing."""
        position, center, gamma = position_of(state), posterior.center, posterior.localization
        keys = [jax.random.fold_in(key, i) for i in range(3)]
        spread = jnp.where(gamma > 0, 1 / jnp.sqrt(jnp.where(gamma > 0, gamma, 1.0)), 0.0)
        noise = noise_by_leaf(keys[0], center)
        loose = jax.tree.map(lambda w, xi: w + spread.astype(w.dtype) * xi, center, noise)
        batch, weights = posterior.minibatch(keys[1], batch_size)
        least = posterior.losses(center, batch)
        here, tether = (
            weighted_mean(posterior.losses(w, batch) - least, weights) for w in (position, loose)
        )
        away = optax.tree.sub(position, center)
        force = posterior.grad_estimator(position, posterior.minibatch(keys[2], batch_size))
        number = sum(leaf.size for leaf in jax.tree.leaves(center))
        dtype = here.dtype
        reading = Reading(
            excess=here,
            # So far out a loss may overflow, and no chain is lost for that.
            tether=jnp.nan_to_num(tether, nan=_FAR, posinf=_FAR, neginf=_FAR),
            reach=(gamma * optax.tree.vdot(away, away) / number).astype(dtype),
            heat=(-optax.tree.vdot(away, force) / number).astype(dtype),
            check=jnp.asarray(self.check(posterior.embed(position)), dtype),
        )
        return reading, ()


def judge(
    reading: Reading, alive: np.ndarray, plan: Plan, now: Setting, base: float
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """(λ̂, its error, R-hat, reach, pull), and what is wrong."""
    found = _before(now, plan)
    if not alive.all():
        outcome = f"{'all' if not alive.any() else int((~alive).sum())} chains went to infinity"
        found.append(f"{STEP if now.stiffness > _STIFF else BASIN}: {outcome}")
    if not alive.any():
        return (math.nan,) * 5, tuple(found)
    reading = jax.tree.map(lambda leaf: leaf[alive], reading)
    of = [summarize(leaf, num_batches=plan.batches) for leaf in reading]
    means, errors = ([float(getattr(x, name)) for x in of] for name in ("mean", "stderr"))
    mean, error = Reading(*means), Reading(*errors)
    if mean.heat > 1.15 + 3 * error.heat:
        found.append(f"{STEP}: the chains sample at {mean.heat:.2f} times the temperature")
    if mean.reach > 1.1 + 3 * error.reach:
        found.append(
            f"{BASIN}: the chains are {math.sqrt(mean.reach):.2f} times as far from w* as the "
            "localization alone lets them go, so the loss pushes them away: a larger γ"
        )
    if mean.excess < -3 * error.excess:
        found.append(
            f"{BASIN}: the loss falls below that of w* (λ̂ = "
            f"{tables.measured(mean.excess, error.excess)}), which is no minimum: train further, "
            "or a larger γ"
        )
    if mean.check / base < _KEEP:
        found.append(f"{BASIN}: the check keeps {mean.check / base:.0%} of its value at w*")
    drift, size = verdict.trend(reading.excess, np.ones(int(alive.sum()), bool), 20)
    loose = verdict.unsettled(
        rhat=float(of[0].rhat), ess=float(of[0].ess), spread=float(np.ptp(reading.excess)),
        drift=float(drift), size=float(size), groups=float(plan.batches * len(reading.excess)),
    )  # fmt: skip
    found += [f"{SETTLED}: {words}" for words in loose]
    pull = 1 - mean.excess / mean.tether if mean.tether > 0 else math.nan
    if pull < _PULL:
        found.append(
            f"{SIGNAL}: the data lower the loss by {max(pull, 0):.0%} of what the localization "
            "alone gives: a larger nβ or a smaller γ"
        )
    elif abs(mean.excess) < 2 * error.excess:
        found.append(
            f"{SIGNAL}: λ̂ = {tables.measured(mean.excess, error.excess)} is within two errors of 0"
        )
    return (mean.excess, error.excess, float(of[0].rhat), mean.reach, pull), tuple(found)


def _before(now: Setting, plan: Plan) -> list[str]:
    """What is wrong by the pilot, and by the steps that there are."""
    found = []
    if now.stiffness > _STIFF:
        outcome = "chains leave for infinity from 4 on"
        if now.stiffness < 4:
            outcome = f"its variance is {1 / (1 - now.stiffness / 4):.2f} times the right one"
        found.append(f"{STEP}: εP = {now.stiffness:.2g} in the stiffest direction ({outcome})")
    if now.heat > _HOT:
        found.append(
            f"{STEP}: the noise of mini-batches adds {now.heat:.0%} to the temperature in the "
            "stiffest direction: a smaller ε or a larger batch_size"
        )
    if now.localization == 0:
        found.append(f"{SETTLED}: γ = 0, so that flat directions never settle")
    elif SETTLE * now.relaxation > plan.num_burnin:
        found.append(
            f"{SETTLED}: a flat direction is forgotten in {now.relaxation:.3g} steps, and the "
            f"burn-in of the short runs was {plan.num_burnin}, not {SETTLE} times that: a "
            "larger γ, or a larger budget"
        )
    known = {name: getattr(now.pilot, name)[0] for name in ("spacing", "grain", "jump", "leap")}
    return found + [f"not exact: {words}" for words in verdict.before(known)]
