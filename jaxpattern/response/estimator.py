"""What an estimator of χ is: a function of a run, a problem and a host."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxpattern.chains.run import Run
from jaxpattern.response.problem import Problem
from jaxpattern.response.result import Response
from jaxpattern.runtime.host import Host


@runtime_checkable
class Estimator(Protocol):
    """Measures χ: any function `(run, problem, host) -> Response`.

    `run` says what is sampled (key, posterior, sampler, plan), `problem` what is asked (rows,
    columns, components, and their losses at w*), `host` where and how it is carried out; an
    estimator that samples hands the host on to `run_chains`. The estimators of this package are
    frozen dataclasses: they print, compare and hash.
    """

    def __call__(self, run: Run, problem: Problem, host: Host) -> Response:
        """The response matrix, rows in the order of `problem.rows`."""
