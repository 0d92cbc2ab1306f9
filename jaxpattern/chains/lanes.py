"""Lanes: all chains of some components in a row, to be dealt out to devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Key, PyTree

from jaxpattern.chains.plan import Plan
from jaxpattern.posterior import Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.restriction import Restriction
from jaxpattern.runtime.mesh import over_lanes, pad_lanes
from jaxpattern.validation import is_concrete

T = TypeVar("T")


@register_pytree
@dataclass(frozen=True, eq=False)
class ComponentGroup:
    """Components whose restrictions have one shape and run as one vmapped program.

    Attributes:
        names: of the components.
        ids: what each folds into the key.
        restrictions: one `Restriction` whose leaves have a leading component axis; None: the
            posterior as it is.
    """

    names: tuple[str, ...] = field(default=("",), metadata={"static": True})
    ids: tuple[int, ...] = field(default=(0,), metadata={"static": True})
    restrictions: Restriction | None = None

    @property
    def label(self) -> str:
        """The first and the last name, for a progress line."""
        return " … ".join(dict.fromkeys((self.names[0], self.names[-1])))


class Lane(NamedTuple):
    """One chain of one component: what tells it from the others."""

    component: Integer[Array | np.ndarray, "*lanes"]
    chain: Integer[Array | np.ndarray, "*lanes"]
    mirror: Float[Array | np.ndarray, "*lanes"] | None
    restriction: Restriction | None

    def key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        """fold_in(fold_in(key, component), chain); twins share it."""
        return jax.random.fold_in(jax.random.fold_in(key, self.component), self.chain)


def make_lanes(group: ComponentGroup, plan: Plan, antithetic: bool, mesh: Mesh | None) -> Lane:
    """All chains of a group in a row, as many as a mesh needs. NumPy makes them: no program."""
    chains = np.arange(plan.num_chains, dtype=np.uint32)
    number = len(group.ids)
    lanes = Lane(
        component=np.repeat(np.asarray(group.ids, np.uint32), plan.num_chains),
        chain=np.tile(chains // (2 if antithetic else 1), number),
        mirror=np.tile(np.float32(1) - 2 * (chains % 2).astype(np.float32), number)
        if antithetic
        else None,
        restriction=jax.tree.map(partial(_repeat, times=plan.num_chains), group.restrictions),
    )
    return pad_lanes(lanes, mesh, plan.chains_at_once)


def _repeat(leaf: Any, times: int) -> Any:
    xp = np if is_concrete(leaf) else jnp
    return xp.repeat(xp.asarray(leaf), times, axis=0)


def unpack(lanes: PyTree[Any], num_components: int, num_chains: int) -> PyTree[Any]:
    """`[lane, ...]` → `[component, chain, ...]`, without what only fills up the devices."""
    total = num_components * num_chains
    return jax.tree.map(
        lambda leaf: leaf[:total].reshape(num_components, num_chains, *leaf.shape[1:]), lanes
    )


def own_by_lane(tree: T, own: Array) -> T:
    """Values that all lanes share, as values of each lane; `own` is a number of the lane.

    Under `vmap` a loop is traced once more for each round of values in its carry that are shared
    at the start and not at the end. The compiler drops the choice between equals.
    """
    return jax.tree.map(lambda x: jnp.where(own == own, x, x), tree)


class Chorus(NamedTuple):
    """All chains of a run as programs take them: what they share, and what each has of its own.

    `shared` are sampler, recorder and look.
    """

    key: Key[Array, ""]
    posterior: Posterior
    shared: Any
    lanes: Lane


def over_chains(
    function: Callable[..., Any], chorus: Chorus, extra: Any, at_once: int | None, mesh: Mesh | None
) -> Callable[..., Any]:
    """`function(posterior of the lane, shared, key, extra, *args)` over all lanes."""

    def one(given: Any, lane: Lane, *args: Any) -> Any:
        key, component, shared, extra = given
        if lane.mirror is not None:
            component = replace(component, mirror=lane.mirror)
        if lane.restriction is not None:
            component = replace(component, restriction=lane.restriction)
        return function(component, shared, lane.key(key), extra, *args)

    mapped = over_lanes(one, mesh, at_once)
    key, posterior, shared, lanes = chorus
    return lambda *args: mapped((key, posterior, shared, extra), lanes, *args)
