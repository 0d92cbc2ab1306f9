"""Lanes: all chains of some components in a row, to be dealt out to devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from jaxpattern.chains.plan import Plan
from jaxpattern.posterior import Posterior
from jaxpattern.restriction import Restriction
from jaxpattern.runtime.mesh import over_lanes, pad_lanes, put


class ComponentGroup(NamedTuple):
    """Components whose restrictions have one shape and run as one vmapped program.

    Attributes:
        names: of the components.
        ids: what each folds into the key.
        restrictions: one `Restriction` whose leaves have a leading component axis; None: the
            posterior as it is.
    """

    names: tuple[str, ...] = ("",)
    ids: tuple[int, ...] = (0,)
    restrictions: Restriction | None = None

    @property
    def label(self) -> str:
        """The first and the last name, for a progress line."""
        return " … ".join(dict.fromkeys((self.names[0], self.names[-1])))

    def component(self, posterior: Posterior, position: int) -> Posterior:
        """The posterior of one of them."""
        if self.restrictions is None:
            return posterior
        chosen = jax.tree.map(lambda leaf: leaf[position], self.restrictions)
        return replace(posterior, restriction=chosen)


class Lane(NamedTuple):
    """One chain of one component: what tells it from the others."""

    key: Key[Array, "*lanes"]
    mirror: Float[Array, "*lanes"] | None
    restriction: Restriction | None


def make_lanes(
    key: Key[Array, ""], group: ComponentGroup, plan: Plan, antithetic: bool, mesh: Mesh | None
) -> Lane:
    """All chains of a group in a row, on the mesh; twins share a key."""
    ids = np.asarray(group.ids, np.uint32)
    lanes = _lanes(key, ids, group.restrictions, plan.num_chains, antithetic)
    return put(pad_lanes(lanes, mesh, plan.chains_at_once), mesh, "chain")


@partial(jax.jit, static_argnames=("num_chains", "antithetic"))
def _lanes(
    key: Key[Array, ""],
    ids: Array,
    restrictions: Restriction | None,
    num_chains: int,
    antithetic: bool,
) -> Lane:
    keys = chain_keys(key, ids, num_chains, antithetic).reshape(-1)
    mirror = (-1.0) ** jnp.arange(num_chains) if antithetic else None
    return Lane(
        key=keys,
        mirror=None if mirror is None else jnp.tile(mirror, ids.shape[0]),
        restriction=jax.tree.map(lambda leaf: jnp.repeat(leaf, num_chains, axis=0), restrictions),
    )


def chain_keys(
    key: Key[Array, ""], component_ids: Any, num_chains: int, antithetic: bool = False
) -> Key[Array, "components chains"]:
    """fold_in(fold_in(key, component), chain); twins share a key."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    chains = jnp.arange(num_chains, dtype=jnp.uint32) // (2 if antithetic else 1)
    components = fold(key, jnp.asarray(component_ids, jnp.uint32))
    return jax.vmap(lambda component: fold(component, chains))(components)


def unpack(lanes: PyTree[Any], num_components: int, num_chains: int) -> PyTree[Any]:
    """`[lane, ...]` → `[component, chain, ...]`, without what only fills up the devices."""
    total = num_components * num_chains
    return jax.tree.map(
        lambda leaf: leaf[:total].reshape(num_components, num_chains, *leaf.shape[1:]), lanes
    )


def over_chains(
    function: Callable[..., Any],
    posterior: Posterior,
    shared: Any,
    lanes: Lane,
    at_once: int | None,
    mesh: Mesh | None,
) -> Callable[..., Any]:
    """`function(posterior of the lane, shared, key, *args)` over all lanes."""

    def one(shared: Any, lane: Lane, *args: Any) -> Any:
        component, rest = shared
        if lane.mirror is not None:
            component = replace(component, mirror=lane.mirror)
        if lane.restriction is not None:
            component = replace(component, restriction=lane.restriction)
        return function(component, rest, lane.key, *args)

    mapped = over_lanes(one, mesh, at_once)
    return lambda *args: mapped((posterior, shared), lanes, *args)
