"""Patterning in JAX: measure how a trained network responds to its data, and choose the data."""

from jaxpattern import lm as lm
from jaxpattern._version import __version__ as __version__
from jaxpattern.diagnostics import Summary, summarize
from jaxpattern.inversion import (
    Intervention,
    InversionMethod,
    Solution,
    UnreachableTarget,
    box,
    entropic,
    least_norm,
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
from jaxpattern.observables import excess_loss, mean_loss
from jaxpattern.posterior import Minibatch, Posterior, localized_posterior, restrict
from jaxpattern.response.covariance import covariance
from jaxpattern.response.directions import PrincipalDirections, principal_directions
from jaxpattern.response.extrapolate import CoordinateRegression, regress_coordinates
from jaxpattern.response.laplace import laplace
from jaxpattern.response.pathwise import GrowthWarning, pathwise
from jaxpattern.response.result import Response, group_mean
from jaxpattern.response.susceptibilities import susceptibilities
from jaxpattern.restriction import (
    Restriction,
    by_mask,
    by_path,
    by_slice,
    complement,
    coordinates,
    union,
)
from jaxpattern.results import ResultFileError, load, save
from jaxpattern.runtime.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    Interrupted,
)
from jaxpattern.runtime.mesh import is_first_process, mesh, shard_params
from jaxpattern.runtime.processes import ProcessError, from_processes, start
from jaxpattern.samplers import mala, rmsprop_sgld, sgld, sgnht
from jaxpattern.sampling import DivergenceError, DivergenceWarning, Plan, sample
from jaxpattern.sweep import Sweep, sweep
from jaxpattern.training import History, train

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "CoordinateRegression",
    "DivergenceError",
    "DivergenceWarning",
    "GrowthWarning",
    "History",
    "Interrupted",
    "Intervention",
    "InversionMethod",
    "LocalLearningCoefficient",
    "Minibatch",
    "Plan",
    "Posterior",
    "PrincipalDirections",
    "ProcessError",
    "Response",
    "Restriction",
    "ResultFileError",
    "Solution",
    "Summary",
    "Sweep",
    "TokenInContext",
    "TokenMean",
    "UnreachableTarget",
    "box",
    "by_mask",
    "by_path",
    "by_slice",
    "complement",
    "component",
    "components",
    "coordinates",
    "covariance",
    "entropic",
    "excess_loss",
    "extreme_tokens",
    "format_tokens",
    "from_processes",
    "group_mean",
    "in_context_score",
    "induction_loss",
    "is_first_process",
    "laplace",
    "least_norm",
    "llc",
    "lm",
    "load",
    "localized_posterior",
    "mala",
    "mean_by_token",
    "mean_loss",
    "mesh",
    "pathwise",
    "prefix_matching_score",
    "previous_token_score",
    "principal_directions",
    "regress_coordinates",
    "repeated_bigrams",
    "repeated_tokens",
    "restrict",
    "ridge",
    "rmsprop_sgld",
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
    "truncated",
    "union",
]
