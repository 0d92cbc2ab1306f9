"""The local learning coefficient (LLC), λ̂ = nβ (⟨L⟩ − L(w*)), with a paired baseline.

Its response to the weight ρ_m of a sample, at ρ = 1, has two conventions, which differ at leading
order; whoever targets an LLC says which one is meant:

* **φ held fixed**: λ̂ is nβ times the expectation of the observable L(w) − L(w*) of the data as
  they are, and only the posterior moves: ∂λ̂/∂ρ_m = −((nβ)²/N) Cov[L, ℓ_m − L]. It is nβ times the
  response of `excess_loss` as `susceptibilities` measures it, and the convention of this package
  wherever no other is named.
* **φ re-weighted too**: the loss inside λ̂ is the re-weighted one, which adds
  (nβ/N) (⟨ℓ_m − L⟩ − (ℓ_m − L)(w*)). In a regular model with γ = 0 the two terms cancel exactly:
  the LLC of a regular model is d/2 whatever the data.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxpattern import tables
from jaxpattern.chains.divergence import check_alive
from jaxpattern.chains.kernel import position_of
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.loop import Recorded, run_chains
from jaxpattern.chains.pilot import Pilot, fly
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.record import Trace
from jaxpattern.chains.run import Run, make_run
from jaxpattern.diagnostics import numbers_of, on_device, summarize
from jaxpattern.losses import weighted_mean
from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.runtime.host import host_for
from jaxpattern.verdict import PILOT, before, say, trend, unsettled, warn

if TYPE_CHECKING:
    import xarray


class LocalLearningCoefficient(NamedTuple):
    """λ̂ with its error. `cost` is in gradient equivalents; a diverged chain's trace is NaN."""

    mean: Float[Array, ""]
    stderr: Float[Array, ""]
    per_chain: Float[Array, " chains"]
    rhat: Float[Array, ""]
    ess: Float[Array, ""]
    trace: Float[Array, "chains draws"]
    diverged: Bool[Array, " chains"]
    cost: float
    pilot: dict[str, Float[Array, ""]] = {}  # noqa: RUF012
    groups: float = 0.0  # of draws of each chain, which the error is from
    caveat: float = 0.0  # 1 where the law of the chains is known to lack a term; see `Sampler`

    @property
    def verdict(self) -> str:
        """Whether λ̂ can be trusted, in words."""
        trace, lost = np.asarray(self.trace, np.float64), np.asarray(self.diverged)
        living = trace[~lost]
        drift, size = trend(living, np.ones(len(living), bool), 20)
        found = unsettled(
            rhat=float(self.rhat), ess=float(self.ess), spread=float(np.ptp(living)),
            drift=float(drift), size=float(size), groups=float(self.groups) * len(living),
        )  # fmt: skip
        if float(self.mean) < -3 * float(self.stderr):
            found.append(
                "λ̂ is negative: the parameters are not at a minimum of this loss. Train further, "
                "or tie the chain closer with a larger localization"
            )
        return say("LLC", [("", [*found, *before(self.pilot)])])

    def to_arviz(self) -> xarray.DataTree:
        """The trace as ArviZ takes it; see `export.to_arviz`."""
        from jaxpattern import export

        return export.to_arviz({"llc": self.trace})

    def __str__(self) -> str:
        return tables.text(tables.llc, self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return tables.html(tables.llc, self)


@register_pytree
@dataclass(frozen=True, eq=False)
class PairedExcessLoss(Trace):
    """Keeps L_B(w_t) − L_B(w*) on a fresh mini-batch, the same for both terms."""

    def value(
        self, posterior: Posterior, state: PyTree[Any], key: Key[Array, ""], batch_size: int | None
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """(the paired excess loss, nothing)."""
        batch, weights = posterior.minibatch(key, batch_size)
        excess = posterior.losses(position_of(state), batch)
        excess = excess - posterior.losses(posterior.center, batch)
        return weighted_mean(excess, weights), ()


def llc(
    key: Key[Array, ""],
    posterior: Posterior,
    sampler: Any,
    plan: Plan,
    *,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    mesh: Mesh | None = None,
) -> LocalLearningCoefficient:
    """λ̂ = nβ · mean_t [L_B(w_t) − L_B(w*)], both losses on the same fresh mini-batch B.

    The pairing removes the mini-batch's own level, most of the variance of the unpaired estimate,
    for one more forward pass a draw. B is independent of w_t, so the estimate is unbiased for the
    law the chain samples. That law carries the sampler's step bias and mini-batch temperature
    (see `sgld`), and so does λ̂. On a restricted posterior this is the refined (component) LLC.

    Args:
        key: typed key.
        posterior: what to sample. w* should be a minimum: λ̂ < 0 says that it is not.
        sampler: `sgld(...)`, …
        plan: lengths and numbers; `batch_size` is used for the steps and for B.
        progress: show a progress line. Without it this is a pure function, to be vmapped over
            nβ, γ or checkpoints.
        checkpoint: a folder, or a `Checkpoint`, where the run is kept; called again with the same
            arguments after an interruption, it goes on from there to the same bits.
        mesh: where it runs, see `jaxpattern.mesh`; None: the current mesh, or one device.

    Returns:
        A `LocalLearningCoefficient`; errors from batch means.

    Raises:
        DivergenceError: all chains diverged.
        CheckpointError: the folder belongs to another run, or cannot be used.
        Interrupted: a signal stopped a run with a folder, after it was saved.
        TypeError, ValueError: an argument does not fit.

    References:
        Lau et al. 2023, arXiv 2308.12108; Wang et al. 2024, arXiv 2410.02984.
    """
    run = make_run(key, posterior, sampler, plan)
    with host_for(
        "llc", checkpoint=checkpoint, mesh=mesh, progress=progress, run=run, posterior=posterior
    ) as host:
        chains = run_chains(run, PairedExcessLoss(), host, label="LLC")
        pilot = fly(run, ComponentGroup())
    check_alive(chains.alive, ("",), posterior)
    return coefficient(run, chains, pilot)


def coefficient(run: Run, chains: Recorded, pilot: Pilot | None) -> LocalLearningCoefficient:
    """λ̂ and its error from chains that kept `PairedExcessLoss`."""
    plan = run.plan
    alive, excess, nbeta = numbers_of((chains.alive, chains.kept, run.posterior.nbeta))
    alive, excess = alive[0], excess[0]
    trace = (nbeta * excess).astype(excess.dtype)
    summary = summarize(trace, num_batches=plan.batches, alive=alive)
    xp = np if isinstance(trace, np.ndarray) else jnp
    result = LocalLearningCoefficient(
        mean=summary.mean,
        stderr=summary.stderr,
        per_chain=on_device(xp.where(alive, xp.mean(trace, axis=1), xp.nan)),
        rhat=summary.rhat,
        ess=summary.ess,
        trace=on_device(trace),
        diverged=on_device(~alive),
        cost=plan.num_chains * run.batch * (plan.num_steps + plan.num_draws * 2 / 3),
        pilot={
            name: on_device(np.asarray(np.nan if pilot is None else getattr(pilot, name)[0], "f"))
            for name in PILOT
        },
        groups=float(plan.batches),
        caveat=float(bool(run.sampler.caveat)),
    )
    if isinstance(trace, np.ndarray) and not result.verdict.startswith("nothing"):
        warn(result.verdict, stacklevel=2)
    return result
