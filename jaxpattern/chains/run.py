"""What is computed: a run, as one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Key

from jaxpattern.chains.kernel import as_sampler
from jaxpattern.chains.plan import LONGEST, Plan
from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.samplers import Sampler
from jaxpattern.types import Position
from jaxpattern.validation import check_function, check_key, check_number, own_streams
from jaxpattern.verdict import warn


@register_pytree
@dataclass(frozen=True, eq=False)
class Run:
    """Chains of a sampler on a posterior. A pytree, which passes through `jit` and `vmap`.

    Where and how it is carried out (devices, folder, progress) is a `Host`, which never enters a
    trace.

    Attributes:
        key: typed key; `make_run` makes a threefry key of one of another kind (`own_streams`).
        posterior: what to sample.
        sampler: how.
        plan: lengths and numbers, those left open are completed here; static.
    """

    key: Key[Array, "..."]
    posterior: Posterior
    sampler: Sampler
    plan: Plan = field(metadata={"static": True})

    def __post_init__(self) -> None:
        if self.plan.is_open:
            plan = self.plan.completed(self.sampler.relaxation(self.posterior))
            object.__setattr__(self, "plan", plan)

    @property
    def batch(self) -> int:
        """Samples behind a gradient."""
        return self.plan.batch_size or self.posterior.num_samples


def make_run(key: Any, posterior: Any, sampler: Any, plan: Any) -> Run:
    """The run of a driver's first four arguments, checked before any sampling.

    Raises:
        TypeError, ValueError: one of them does not fit.
    """
    check_key(key)
    if not isinstance(posterior, Posterior):
        raise TypeError(
            f"posterior must come from localized_posterior, got {type(posterior).__name__}"
        )
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    check_number("posterior.nbeta", posterior.nbeta, minimum=0.0, exclusive=True)
    check_number("posterior.localization", posterior.localization, minimum=0.0)
    wanted = "a function Posterior -> SamplingAlgorithm, such as jp.sgld(step_size=1e-3)"
    check_function("sampler", sampler, wanted, num_arguments=1)
    if plan.batch_size is not None and plan.batch_size > posterior.num_samples:
        raise ValueError(
            f"plan.batch_size must be at most the {posterior.num_samples} samples of data, "
            f"got {plan.batch_size}"
        )
    sampler = as_sampler(sampler, posterior)
    _check_state(key, posterior, sampler)
    relaxation = sampler.relaxation(posterior)
    _check_step(relaxation)
    if relaxation is not None and relaxation > LONGEST and plan.is_open:
        warn(
            f"plan: a relaxation time is {relaxation:.0f} steps, and a plan without num_burnin and "
            f"thin goes along with at most {LONGEST}: chains will not settle in flat directions. "
            "Take a larger step_size or localization (see jp.calibrate), or give the numbers",
            stacklevel=3,
        )
    return Run(own_streams(key), posterior, sampler, plan)


def _check_step(relaxation: float | None) -> None:
    """εγ < 2: beyond, the chain leaves even where the loss is flat."""
    if relaxation is not None and relaxation <= 1:
        raise ValueError(
            f"step_size is too large for the localization: εγ = {2 / relaxation:.3g}, and chains "
            "are stable below 2 at most, accurate far below 1"
        )


def _check_state(key: Any, posterior: Posterior, sampler: Sampler) -> None:
    """The sampler's state is the position, or holds it."""

    def start(posterior: Posterior) -> tuple[Position, Position]:
        state = sampler(posterior).init(posterior.center, key)
        return posterior.center, getattr(state, "position", state)

    center, position = jax.eval_shape(start, posterior)
    if jax.tree.structure(center) != jax.tree.structure(position):  # type: ignore[operator]
        raise TypeError(
            "the state of the sampler must be the position, or have it as `position`; "
            f"wanted {jax.tree.structure(center)}, got {jax.tree.structure(position)}"
        )
