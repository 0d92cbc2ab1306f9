"""Inversion of χ: from a wanted shift of structural coordinates to data weights."""

import warnings
from typing import Any

from jaxpattern.inversion.intervention import Intervention, compose_weights
from jaxpattern.inversion.methods import (
    InversionMethod,
    Solution,
    box,
    entropic,
    least_norm,
    ridge,
    truncated,
)
from jaxpattern.inversion.prediction import Shift, predict
from jaxpattern.inversion.solve import UnreachableTargetWarning, WeightsWarning, solve_weights

__all__ = [
    "Intervention",
    "InversionMethod",
    "Shift",
    "Solution",
    "UnreachableTargetWarning",
    "WeightsWarning",
    "box",
    "compose_weights",
    "entropic",
    "least_norm",
    "predict",
    "ridge",
    "solve_weights",
    "truncated",
]


def __getattr__(name: str) -> Any:
    """`UnreachableTarget`, the old name of `UnreachableTargetWarning`."""
    if name == "UnreachableTarget":
        message = "UnreachableTarget is now UnreachableTargetWarning"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return UnreachableTargetWarning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
