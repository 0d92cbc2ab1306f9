"""How many chains, how long, how dense."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import jax

from jaxpattern.validation import check_count

_WANTED_BATCHES = 20
LONGEST = 500  # steps of a relaxation time, which a plan without numbers goes along with
_LENGTHS = ("num_burnin", "thin")
_UNKNOWN = (100, 1)

Length = Any  # an integer, or None until a run knows the relaxation time


@jax.tree_util.register_static
@dataclass(frozen=True)
class Plan:
    """How many chains, how long, how dense. Static: it holds no arrays.

    Where neither burn-in nor thinning is given, both are taken from the relaxation time of the
    sampler and posterior they are used with: 6 and ½ of it (`completed`). A component has the same.

    Attributes:
        num_chains: independent chains, all started at w*.
        num_burnin: steps thrown away at the start of a chain; None: from the relaxation time, or
            100 where `thin` is given.
        num_draws: draws kept of a chain.
        thin: steps from draw to draw; None: from the relaxation time, or 1 where `num_burnin` is
            given.
        batch_size: samples of the data in a step, drawn with replacement; None: all of them.
        num_batches: groups of consecutive draws a chain is cut into for standard errors. By
            default as many as make 20 over all chains. A group should span many relaxation times.
        chunk: samples evaluated at a time in passes over probes and data, where memory is short.
        chains_at_once: chains (of all components) that a device advances together while its
            others wait, where memory is short; None: all it has.
    """

    num_chains: int = 4
    num_burnin: Length = None
    num_draws: int = 100
    thin: Length = None
    batch_size: int | None = None
    num_batches: int | None = None
    chunk: int | None = None
    chains_at_once: int | None = None

    def __post_init__(self) -> None:
        # Who gives one of the two means numbers: the other is what it always was.
        for name, other, usual in zip(_LENGTHS, reversed(_LENGTHS), _UNKNOWN, strict=True):
            if getattr(self, name) is None and getattr(self, other) is not None:
                object.__setattr__(self, name, usual)
        check_count("num_chains", self.num_chains, minimum=1)
        check_count("num_draws", self.num_draws, minimum=2)
        for name in ("num_burnin", "thin", "batch_size", "num_batches", "chunk", "chains_at_once"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), minimum=0 if name == "num_burnin" else 1)
        if self.batches > self.num_draws:
            raise ValueError(
                f"num_batches must be at most num_draws = {self.num_draws}, got {self.num_batches}"
            )
        if self.batches * self.num_chains < 2:
            raise ValueError("num_chains × num_batches must be at least 2 for a standard error")

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return f"Plan({', '.join(f'{name}={value}' for name, value in given if value is not None)})"

    @property
    def batches(self) -> int:
        """Groups of draws in a chain, for standard errors."""
        return self.batches_over(self.num_chains)

    def batches_over(self, num_independent: int) -> int:
        """Groups of draws in a chain, where so many chains (or pairs of twins) are independent."""
        if self.num_batches is not None:
            return self.num_batches
        return min(-(-_WANTED_BATCHES // num_independent), self.num_draws)

    @property
    def num_steps(self) -> int:
        """Sampler steps of a chain.

        Raises:
            ValueError: burn-in or thinning have no numbers yet.
        """
        if self.is_open:
            raise ValueError(
                "plan has no num_burnin or no thin yet: a run takes them from the relaxation time"
            )
        return self.num_burnin + self.num_draws * self.thin

    @property
    def is_open(self) -> bool:
        """Whether burn-in or thinning wait for a relaxation time."""
        return self.num_burnin is None or self.thin is None

    def completed(self, relaxation: float | None) -> Plan:
        """The plan with numbers, from a relaxation time in steps.

        Burn-in is 6 relaxation times, as many as the window of `pathwise`, and thinning half of
        one. One beyond 500 steps counts as 500: at most 3,000 steps of burn-in, and 250 from draw
        to draw. Where none is known (another sampler, γ = 0, settings that are being traced) they
        are 100 and 1.
        """
        if not self.is_open:
            return self
        burnin, thin = _UNKNOWN
        if relaxation is not None:
            time = min(relaxation, LONGEST)
            burnin, thin = math.ceil(round(6 * time, 2)), max(1, round(time / 2))
        return replace(self, num_burnin=burnin, thin=thin)
