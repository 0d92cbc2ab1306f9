"""What is known to be wrong with an inversion before it is solved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpattern.response.result import Response
from jaxpattern.validation import check_number, holds, is_concrete

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
        check_number(f"target[{name!r}]", value, minimum=-jnp.inf)
    check_number("scale", scale, minimum=-jnp.inf)
    if is_concrete(scale) and float(scale) == 0:
        raise ValueError("scale must not be 0: the weights would not change")
    if untargeted not in get_args(Untargeted):
        raise ValueError(f"untargeted must be one of {get_args(Untargeted)}, got {untargeted!r}")
    if not callable(method):
        raise TypeError(f"method must be a function such as ridge(), got {method!r}")
    for name in response.chi:
        if not _finite(response.chi[name], response.mass[name]):
            raise ValueError(f"response.chi[{name!r}] must be finite, but holds NaN or infinity")
    check_rows = getattr(method, "check_rows", None)
    if check_rows is not None:
        check_rows(len(rows) if untargeted == "hold" else len(target))
    if getattr(method, "needs_noise", False):
        _check_noise(response)


def _check_noise(response: Response) -> None:
    """Standard errors from which a ridge or a cut-off can be taken."""
    for name in response.chi:
        if not _finite(response.stderr[name], response.mass[name]):
            raise ValueError(
                f"response.stderr[{name!r}] must be finite for a method that takes its ridge or "
                "cut-off from χ's noise, but holds NaN or infinity; give tau or rank instead"
            )
    errors = [response.stderr[name] for name in response.chi]
    if all(map(is_concrete, errors)) and all(holds(lambda x: (x == 0).all(), x) for x in errors):
        raise ValueError(
            "response.stderr must not be all zero for a method that takes its ridge or cut-off "
            "from χ's noise; give tau or rank instead"
        )


def _finite(values: Array, mass: Array) -> bool:
    """Whether every column that counts is finite; of what is traced, yes."""
    return holds(lambda x, q: ((abs(x) < np.inf) | (q == 0)[None]).all(), values, mass)
