"""Inversion of χ: from a wanted shift of structural coordinates to data weights."""

from jaxpattern.inversion.intervention import Intervention, UnreachableTarget, solve_weights
from jaxpattern.inversion.methods import (
    InversionMethod,
    Solution,
    box,
    entropic,
    least_norm,
    ridge,
    truncated,
)

__all__ = [
    "Intervention",
    "InversionMethod",
    "Solution",
    "UnreachableTarget",
    "box",
    "entropic",
    "least_norm",
    "ridge",
    "solve_weights",
    "truncated",
]
