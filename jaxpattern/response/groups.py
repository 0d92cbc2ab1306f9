"""Components that run together: those whose restrictions have equal shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.posterior import Posterior
from jaxpattern.restriction import Restriction, check_restriction
from jaxpattern.validation import is_concrete


def component_groups(
    posterior: Posterior, components: Mapping[str, Restriction] | None
) -> tuple[ComponentGroup, ...]:
    """Components of equal shape together, in order of first appearance."""
    if components is None:
        return (ComponentGroup(),)
    if not components:
        raise ValueError("components is empty; leave it out to sample the posterior as it is")
    if posterior.restriction is not None:
        raise ValueError("components need an unrestricted posterior, this one is restricted")
    members: dict[Any, list[tuple[str, int]]] = {}
    for index, (name, restriction) in enumerate(components.items()):
        try:
            check_restriction(restriction, posterior.params)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"components[{name!r}]: {error}") from error
        leaves, treedef = jax.tree.flatten(restriction)
        shape = (treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
        members.setdefault(shape, []).append((name, index))
    return tuple(
        ComponentGroup(
            names=tuple(name for name, _ in group),
            ids=tuple(index for _, index in group),
            restrictions=jax.tree.map(_stack, *(components[name] for name, _ in group)),
        )
        for group in members.values()
    )


def _stack(*leaves: Any) -> Any:
    """Leaves side by side; by NumPy where it can, which compiles nothing."""
    if all(map(is_concrete, leaves)):
        return jax.device_put(np.stack([np.asarray(leaf) for leaf in leaves]))
    return jnp.stack(leaves)
