"""Patterning in JAX: measure how a trained network responds to its data, and choose the data."""

from jaxpattern import lm as lm
from jaxpattern._version import __version__ as __version__
from jaxpattern.calibrate import Calibration, calibrate
from jaxpattern.chains.divergence import DivergenceError, DivergenceWarning
from jaxpattern.chains.loop import Recorded, run_chains
from jaxpattern.chains.plan import Plan
from jaxpattern.chains.record import Recorder, Trace
from jaxpattern.chains.run import Run
from jaxpattern.diagnostics import Summary, summarize
from jaxpattern.inversion import (
    Intervention,
    InversionMethod,
    Shift,
    Solution,
    UnreachableTargetWarning,
    WeightsWarning,
    box,
    compose_weights,
    entropic,
    least_norm,
    predict,
    ridge,
    solve_weights,
    truncated,
)
from jaxpattern.llc import LocalLearningCoefficient, llc
from jaxpattern.lm.components import component, components
from jaxpattern.lm.scores import (
    in_context_score,
    induction_loss,
    prefix_matching_score,
    previous_token_score,
    repeated_bigrams,
    repeated_tokens,
)
from jaxpattern.lm.tokens import (
    TokenInContext,
    TokenMean,
    extreme_tokens,
    format_tokens,
    mean_by_token,
)
from jaxpattern.observables import excess_loss, mean_loss, mean_losses
from jaxpattern.online import pattern
from jaxpattern.posterior import Minibatch, Posterior, localized_posterior, restrict
from jaxpattern.preconditioned import rmsprop_sgld
from jaxpattern.report import report
from jaxpattern.response.covariance import covariance
from jaxpattern.response.directions import PrincipalDirections, principal_directions
from jaxpattern.response.estimator import Estimator
from jaxpattern.response.extrapolate import CoordinateRegression, regress_coordinates
from jaxpattern.response.fallback import GrowthWarning
from jaxpattern.response.influence import BIF, influence
from jaxpattern.response.influence_result import Influence
from jaxpattern.response.laplace import laplace
from jaxpattern.response.pathwise import pathwise
from jaxpattern.response.problem import Problem
from jaxpattern.response.result import Response, group_mean
from jaxpattern.response.susceptibilities import susceptibilities
from jaxpattern.response.training_run import training_response
from jaxpattern.restriction import (
    Restriction,
    by_mask,
    by_path,
    by_slice,
    complement,
    restriction_mask,
    union,
)
from jaxpattern.results import ResultFileError, load, save
from jaxpattern.rounds import Pattern, Round
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.runtime.folder import CheckpointError, CheckpointWarning, Interrupted
from jaxpattern.runtime.host import Host
from jaxpattern.runtime.mesh import is_first_process, mesh, shard_params
from jaxpattern.runtime.processes import ProcessError, from_processes, start
from jaxpattern.samplers import Sampler, make_sampler, mala, sgld, sgnht
from jaxpattern.sampling import Draws, sample
from jaxpattern.several import LLC, Chi, Measured, measure
from jaxpattern.sweep import Sweep, sweep
from jaxpattern.training import History, train
from jaxpattern.verdict import UnreliableError, UnreliableWarning

__all__ = [
    "BIF",
    "LLC",
    "Calibration",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "Chi",
    "CoordinateRegression",
    "DivergenceError",
    "DivergenceWarning",
    "Draws",
    "Estimator",
    "GrowthWarning",
    "History",
    "Host",
    "Influence",
    "Interrupted",
    "Intervention",
    "InversionMethod",
    "LocalLearningCoefficient",
    "Measured",
    "Minibatch",
    "Pattern",
    "Plan",
    "Posterior",
    "PrincipalDirections",
    "Problem",
    "ProcessError",
    "Recorded",
    "Recorder",
    "Response",
    "Restriction",
    "ResultFileError",
    "Round",
    "Run",
    "Sampler",
    "Shift",
    "Solution",
    "Summary",
    "Sweep",
    "TokenInContext",
    "TokenMean",
    "Trace",
    "UnreachableTargetWarning",
    "UnreliableError",
    "UnreliableWarning",
    "WeightsWarning",
    "box",
    "by_mask",
    "by_path",
    "by_slice",
    "calibrate",
    "complement",
    "component",
    "components",
    "compose_weights",
    "covariance",
    "entropic",
    "excess_loss",
    "extreme_tokens",
    "format_tokens",
    "from_processes",
    "group_mean",
    "in_context_score",
    "induction_loss",
    "influence",
    "is_first_process",
    "laplace",
    "least_norm",
    "llc",
    "lm",
    "load",
    "localized_posterior",
    "make_sampler",
    "mala",
    "mean_by_token",
    "mean_loss",
    "mean_losses",
    "measure",
    "mesh",
    "pathwise",
    "pattern",
    "predict",
    "prefix_matching_score",
    "previous_token_score",
    "principal_directions",
    "regress_coordinates",
    "repeated_bigrams",
    "repeated_tokens",
    "report",
    "restrict",
    "restriction_mask",
    "ridge",
    "rmsprop_sgld",
    "run_chains",
    "sample",
    "save",
    "sgld",
    "sgnht",
    "shard_params",
    "solve_weights",
    "start",
    "summarize",
    "susceptibilities",
    "sweep",
    "train",
    "training_response",
    "truncated",
    "union",
]


_RENAMED = {"coordinates": "restriction_mask", "UnreachableTarget": "UnreachableTargetWarning"}


def __getattr__(name: str) -> object:
    """Old names, with a warning."""
    if name in _RENAMED:
        import warnings

        new = _RENAMED[name]
        warnings.warn(f"jp.{name} is now jp.{new}", DeprecationWarning, stacklevel=2)
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
