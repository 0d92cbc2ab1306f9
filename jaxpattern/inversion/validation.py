"""What is known to be wrong with an inversion before it is solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpattern.inversion.methods import METHODS_OF_NOISE
from jaxpattern.response.result import Response
from jaxpattern.validation import is_concrete

Untargeted = Literal["free", "hold"]


def check_problem(
    response: Response, target: Mapping[str, Any], method: Any, scale: Any, untargeted: Any
) -> None:
    """Target, scale, χ, and the settings of the method against the response they meet."""
    rows = response.rows
    if not isinstance(target, Mapping):
        raise TypeError(f"target must map row names to shifts, got {type(target).__name__}")
    if not target:
        raise ValueError(f"target is empty; it must name at least one row of {list(rows)}")
    unknown = [name for name in target if name not in rows]
    if unknown:
        raise ValueError(f"target names unknown rows {unknown}; the rows are {list(rows)}")
    for name, value in target.items():
        _check_finite(f"target[{name!r}]", value)
    _check_finite("scale", scale)
    if is_concrete(scale) and float(scale) == 0:
        raise ValueError("scale must not be 0: the weights would not change")
    if untargeted not in get_args(Untargeted):
        raise ValueError(f"untargeted must be one of {get_args(Untargeted)}, got {untargeted!r}")
    if not callable(method):
        raise TypeError(f"method must be a function such as ridge(), got {method!r}")
    for name, values in response.chi.items():
        if is_concrete(values) and not _all(jnp.isfinite, values):
            raise ValueError(f"response.chi[{name!r}] must be finite, but holds NaN or infinity")
    num_rows = len(rows) if untargeted == "hold" else len(target)
    _check_method(method, response, num_rows)


def _check_method(method: Any, response: Response, num_rows: int) -> None:
    """The settings of a method against the response they meet."""
    settings = getattr(method, "keywords", {})
    rank = settings.get("rank")
    if isinstance(rank, int) and rank > num_rows:
        raise ValueError(f"rank must be at most {num_rows}, the rows in the problem, got {rank}")
    share = settings.get("noise_share", 0.0)
    needed = getattr(method, "func", None) in METHODS_OF_NOISE or (
        is_concrete(share) and float(share) > 0
    )
    if not needed:
        return
    errors = [response.stderr[name] for name in response.chi]
    if not all(map(is_concrete, errors)):
        return
    for name in response.chi:
        if not _all(jnp.isfinite, response.stderr[name]):
            raise ValueError(
                f"response.stderr[{name!r}] must be finite for a method that takes its ridge or "
                "cut-off from χ's noise, but holds NaN or infinity; give tau or rank instead"
            )
    if all(_all(lambda x: x == 0, values) for values in errors):
        raise ValueError(
            "response.stderr must not be all zero for a method that takes its ridge or cut-off "
            "from χ's noise; give tau or rank instead"
        )


def _all(test: Callable[[Array], Array], values: Array) -> bool:
    """Whether the test holds everywhere; of concrete values also while others are traced."""
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(test(values)))


def _check_finite(name: str, value: Any) -> None:
    """A real scalar that is finite."""
    if isinstance(value, str | bytes) or jnp.ndim(value) != 0:
        raise TypeError(f"{name} must be a number, got {value!r}")
    if is_concrete(value) and not np.isfinite(float(value)):
        raise ValueError(f"{name} must be finite, got {float(value):g}")
