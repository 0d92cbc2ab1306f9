"""How many chains, how long, how dense."""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax

from jaxpattern.validation import check_count

_WANTED_BATCHES = 20


@jax.tree_util.register_static
@dataclass(frozen=True)
class Plan:
    """How many chains, how long, how dense. Static: it holds no arrays.

    Attributes:
        num_chains: independent chains, all started at w*.
        num_burnin: steps thrown away at the start of a chain.
        num_draws: draws kept of a chain.
        thin: steps from draw to draw.
        batch_size: samples of the data in a step, drawn with replacement; None: all of them.
        num_batches: groups of consecutive draws a chain is cut into for standard errors. By
            default as many as make 20 over all chains. A group should span many relaxation times.
        chunk: samples evaluated at a time in passes over probes and data, where memory is short.
        chains_at_once: chains (of all components) that a device advances together while its
            others wait, where memory is short; None: all it has.
    """

    num_chains: int = 4
    num_burnin: int = 100
    num_draws: int = 100
    thin: int = 1
    batch_size: int | None = None
    num_batches: int | None = None
    chunk: int | None = None
    chains_at_once: int | None = None

    def __post_init__(self) -> None:
        check_count("num_chains", self.num_chains, minimum=1)
        check_count("num_burnin", self.num_burnin, minimum=0)
        check_count("num_draws", self.num_draws, minimum=2)
        check_count("thin", self.thin, minimum=1)
        for name in ("batch_size", "num_batches", "chunk", "chains_at_once"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), minimum=1)
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
        """Sampler steps of a chain."""
        return self.num_burnin + self.num_draws * self.thin
