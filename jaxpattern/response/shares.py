"""The share q of the data that each column of χ stands for, from the weights of the probe sets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpattern.losses import check_weights
from jaxpattern.posterior import Posterior
from jaxpattern.types import Batch
from jaxpattern.validation import holds, is_concrete

Spec = tuple[tuple[int, ...], Any]


def probe_mass(
    posterior: Posterior,
    probes: Mapping[str, Batch],
    given: Mapping[str, Any] | None,
    specs: Mapping[str, Spec],
) -> dict[str, Float[Array, "..."]]:
    """q of each loss, of sum 1 over all probe sets: in proportion to the weights ρ₀ of the losses.

    Without any, probe sets that are the posterior's data, or rows of them, have the weights that
    the data have; others count alike.

    Args:
        posterior: the posterior, whose data may have weights.
        probes: name → batch.
        given: name → weights of the losses; a probe set that is not named has all ones.
        specs: name → shape and dtype of the losses.

    Raises:
        TypeError, ValueError: weights are unknown, ill-shaped, negative, not finite, or all 0.
    """
    if given is None:
        weights = _from_data(posterior, probes, {name: shape for name, (shape, _) in specs.items()})
    else:
        unknown = sorted(set(given) - set(probes))
        if unknown:
            raise ValueError(f"probe_weights names {unknown}, the probes are {list(probes)}")
        weights = {name: np.ones(specs[name][0]) for name in probes}
        for name, each in given.items():
            where = f"probe_weights[{name!r}]"
            weights[name] = check_weights(where, each, specs[name][0])
            if not holds(lambda x: x.min() >= 0, weights[name]):
                raise ValueError(
                    f"{where} must not be negative, got {float(np.min(weights[name])):g} among them"
                )
            if not holds(lambda x: x.max() > 0, weights[name]):
                raise ValueError(f"{where} excludes every loss; leave the probe set out")
    if not all(map(is_concrete, weights.values())):
        total = sum(jnp.sum(each) for each in weights.values())
        return {name: (each / total).astype(specs[name][1]) for name, each in weights.items()}
    exact = {name: np.asarray(each, np.float64) for name, each in weights.items()}
    largest = max(each.max() for each in exact.values())
    total = sum((each / largest).sum() for each in exact.values())
    return {
        name: jax.device_put((each / largest / total).astype(specs[name][1]))
        for name, each in exact.items()
    }


def _from_data(
    posterior: Posterior, probes: Mapping[str, Batch], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The weights that the data have, where the probe sets are the data or rows of them."""
    ones = {name: np.ones(shape) for name, shape in shapes.items()}
    rho = posterior.weights
    if not (is_concrete(rho) and rho.is_fully_addressable):
        same = all(same_arrays(batch, posterior.data) for batch in probes.values())
        return dict.fromkeys(probes, rho) if same else ones
    weights = np.asarray(rho, np.float64)
    if (weights == weights.flat[0]).all():
        return ones
    excluded = int((weights == 0).sum())
    found: dict[str, Any] = {}
    rows = None
    for name, batch in probes.items():
        if same_arrays(batch, posterior.data):
            found[name] = weights
            continue
        rows = _rows(posterior.data) if rows is None else rows
        found[name] = _weights_of(rows, _rows(batch), weights)
    unknown = [name for name, each in found.items() if each is None or (each < 0).any()]
    guessed = [n for n, batch in probes.items() if not same_arrays(batch, posterior.data)]
    said = f"the posterior's weights are not all alike ({excluded} of {weights.size} are 0)"
    if unknown:
        warnings.warn(
            f"{said}, and probes {unknown} come without weights: every loss of the probe sets "
            "counts alike, in means, shares and solutions. Give probe_weights={name: weights of "
            "the shape of its losses}, 0 for what is excluded",
            stacklevel=5,
        )
        return ones
    if excluded and guessed:
        warnings.warn(
            f"{said}, and probes {guessed} come without weights: their samples were found among "
            "the data, whose weights are taken. Give probe_weights={name: weights of the shape of "
            "its losses}, 0 for what is excluded, to say so",
            stacklevel=5,
        )
    empty = [name for name, each in found.items() if not each.any()]
    if empty:
        raise ValueError(f"probes {empty} hold only samples that the posterior's weights exclude")
    return found


def same_arrays(batch: Batch, data: Batch) -> bool:
    """Whether two batches hold the same arrays."""
    one, other = jax.tree.leaves(batch), jax.tree.leaves(data)
    return len(one) == len(other) and all(map(lambda a, b: a is b, one, other))


def _rows(batch: Batch) -> list[bytes] | None:
    """The samples as bytes; None where they cannot be looked at."""
    leaves = jax.tree.leaves(batch)
    for leaf in leaves:
        if not is_concrete(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return None
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return None
    size = leaves[0].shape[0]
    narrow = [np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype)) for x in leaves]
    flat = [np.ascontiguousarray(x).reshape(size, -1).view(np.uint8) for x in narrow]
    return [row.tobytes() for row in np.concatenate(flat, axis=1)]


def _weights_of(
    data: list[bytes] | None, rows: list[bytes] | None, weights: np.ndarray
) -> np.ndarray | None:
    """The weights of the rows in the data; None where one is not found, or has several."""
    if data is None or rows is None:
        return None
    if data == rows:
        return weights
    place: dict[bytes, int] = {}
    for i, row in enumerate(data):
        first = place.setdefault(row, i)
        if not np.array_equal(weights[first], weights[i]):
            place[row] = -1
    index = [place.get(row, -1) for row in rows]
    return None if min(index) < 0 else weights[np.asarray(index)]


def column_mean(values: Float[Array, "..."], mass: Float[Array, "*columns"]) -> Float[Array, "..."]:
    """Σ_z q_z x_z / Σ_z q_z over the columns of a probe set, the last axes; mass 0 is left out."""
    axes = tuple(range(-mass.ndim, 0))
    share = jnp.broadcast_to(mass / jnp.sum(mass), values.shape)
    return jnp.sum(jnp.where(share == 0, 0, share * values), axis=axes)


def mean_stderr(batches: Float[Array | np.ndarray, "groups ..."]) -> Any:
    """Standard error of the mean over groups of draws, those that are NaN left out.

    NaN of fewer than two; of equal groups 0, with derivative 0. By NumPy for what NumPy holds.
    """
    xp = np if isinstance(batches, np.ndarray) else jnp
    valid = ~xp.isnan(batches)
    count = xp.sum(valid, axis=0, dtype=batches.dtype)
    mean = xp.sum(xp.where(valid, batches, 0.0), axis=0) / xp.maximum(count, 1)
    squares = xp.sum(xp.where(valid, batches - mean[None], 0.0) ** 2, axis=0)
    error = squares / xp.maximum(count * (count - 1), 1)
    root = xp.where(error > 0, xp.sqrt(xp.where(error > 0, error, 1.0)), 0.0)
    return xp.where(count > 1, root, xp.nan)
