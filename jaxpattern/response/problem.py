"""What every estimator of χ is asked: rows, columns, and their losses at w*."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.losses import check_loss, counted_rows, losses_in_chunks, weighted_mean
from jaxpattern.posterior import Minibatch, Posterior
from jaxpattern.pytrees import register_pytree
from jaxpattern.response.groups import component_groups
from jaxpattern.response.shares import Spec, probe_mass, same_arrays
from jaxpattern.restriction import Restriction
from jaxpattern.runtime.mesh import put, put_rows, take
from jaxpattern.types import Batch, Losses, Params, Position
from jaxpattern.validation import (
    are_finite,
    as_pytree_function,
    batch_length,
    check_function,
    holds,
    is_concrete,
)


@register_pytree
@dataclass(frozen=True, eq=False)
class Problem:
    """Observables φ, probes z, and the reference data whose loss is L in χ_z = −Cov[φ, ℓ_z − L].

    Everything is measured from w*: differences of losses are taken loss by loss before anything is
    averaged, so that float32 holds. Without observables the one row is the excess loss L − L(w*).
    An observable gives one row, or K rows where it returns `[K]`. `mass` is the share q of the data
    that a column stands for, of sum 1; a column of mass 0 is excluded: its D_z is 0, whatever its
    loss is. Where the reference is itself a probe set, `reference_probe` names it and its losses
    are shared. `groups` are the components, `rows` the names of all rows, components first.
    """

    observables: tuple[Callable[[Params], Float[Array, "..."]], ...] | None
    offsets: Float[Array, " rows"]
    probes: dict[str, Batch]
    probe_baseline: dict[str, Float[Array, "..."]]
    mass: dict[str, Float[Array, "..."]]
    reference: Minibatch
    reference_baseline: Losses
    chunk: int | None = field(metadata={"static": True})
    reference_probe: str | None = field(default=None, metadata={"static": True})
    reference_is_data: bool = field(default=False, metadata={"static": True})
    groups: tuple[ComponentGroup, ...] = (ComponentGroup(),)
    rows: tuple[str, ...] = field(default=(), metadata={"static": True})

    @property
    def core(self) -> Problem:
        """What a program needs to know: not the components, nor any names of rows."""
        return replace(self, groups=(), rows=())

    @property
    def num_rows(self) -> int:
        """Rows of one component."""
        return self.offsets.shape[0]

    def excess_reference(self, posterior: Posterior, position: Position) -> Float[Array, ""]:
        """L(w) − L(w*) on the reference data."""
        batch = counted_rows(*self.reference)
        losses = losses_in_chunks(posterior.loss_fn, posterior.embed(position), batch, self.chunk)
        return weighted_mean(losses - self.reference_baseline, self.reference.weights)

    def probe_minibatch(self, name: str) -> Minibatch:
        """A probe set with weights in proportion to its mass, of sum B."""
        mass = self.mass[name]
        return Minibatch(self.probes[name], mass * (mass.shape[0] / jnp.sum(mass)))

    @property
    def num_components(self) -> int:
        """Components of all groups."""
        return sum(len(group.ids) for group in self.groups)

    def phi(
        self, posterior: Posterior, position: Position, excess: Float[Array, ""]
    ) -> Float[Array, " rows"]:
        """φ(w) − φ(w*), given L(w) − L(w*)."""
        if self.observables is None:
            return excess[None]
        if not self.observables:
            return jnp.zeros((0,), excess.dtype)
        params = posterior.embed(position)
        values = [jnp.atleast_1d(phi(params)).astype(excess.dtype) for phi in self.observables]
        return jnp.concatenate(values) - self.offsets

    def phi_at(self, posterior: Posterior, position: Position) -> Float[Array, " rows"]:
        """φ(w) − φ(w*); L is evaluated only where it is the row."""
        excess = jnp.zeros((), self.offsets.dtype)
        if self.observables is None:
            excess = self.excess_reference(posterior, position)
        return self.phi(posterior, position, excess)

    def columns(
        self, posterior: Posterior, position: Position, excess: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
        """L(w) − L(w*), unless it is given, and D_z(w) − D_z(w*) with D_z = ℓ_z − L."""
        params = posterior.embed(position)
        deviations = {
            name: self._counted(
                name,
                losses_in_chunks(posterior.loss_fn, params, batch, self.chunk)
                - self.probe_baseline[name],
            )
            for name, batch in self.probes.items()
        }
        if excess is None:
            name = self.reference_probe
            if name is None:
                excess = self.excess_reference(posterior, position)
            else:
                excess = weighted_mean(deviations[name], self.reference.weights)
        return excess, {n: self._counted(n, x - excess) for n, x in deviations.items()}

    def _counted(self, name: str, values: Array) -> Array:
        """0 where a column is excluded, also in derivatives."""
        return jnp.where(self.mass[name] == 0, 0, values)

    def on(self, mesh: Mesh | None) -> Problem:
        """The problem on a mesh, with the probes and their losses cut over its axis `data`."""
        if mesh is None:
            return self
        return replace(
            put(replace(self, probes={}, probe_baseline={}, mass={}), mesh),
            probes={n: put_rows(f"probes[{n!r}]", x, mesh) for n, x in self.probes.items()},
            probe_baseline=put(self.probe_baseline, mesh, "data"),
            mass=put(self.mass, mesh, "data"),
        )

    @property
    def observed_samples(self) -> int:
        """Samples behind the rows; only observables that count theirs are counted."""
        if self.observables is None:
            return self.reference_baseline.shape[0]
        return sum(getattr(phi, "num_samples", 0) for phi in self.observables)

    @property
    def probe_samples(self) -> int:
        """Samples of all probe sets."""
        return sum(losses.shape[0] for losses in self.probe_baseline.values())

    @property
    def reference_samples(self) -> int:
        """Samples behind L that are not passed forward as probes."""
        return self.reference_baseline.shape[0] if self.reference_probe is None else 0

    @property
    def forward_passes(self) -> int:
        """Samples passed forward at a draw of the covariance estimator."""
        observed = 0 if self.observables is None else self.observed_samples
        return observed + self.probe_samples + self.reference_samples


def build_problem(
    posterior: Posterior,
    observables: Mapping[str, Callable[..., Any]] | None,
    probes: Mapping[str, Batch],
    reference: Batch | None,
    components: Mapping[str, Restriction] | None,
    chunk: int | None,
    *,
    probe_weights: Mapping[str, Any] | None = None,
) -> Problem:
    """Check rows and columns, and compute the losses at w* once.

    Raises:
        TypeError, ValueError: they do not fit; see `susceptibilities`.
    """
    params = posterior.params
    if not probes:
        raise ValueError("probes is empty; χ needs at least one probe set")
    groups = component_groups(posterior, components)
    probes = {name: take(batch) for name, batch in probes.items()}
    specs = {n: check_like_data(f"probes[{n!r}]", x, posterior) for n, x in probes.items()}
    mass = probe_mass(posterior, probes, probe_weights, specs)
    same: list[str] = []
    if reference is None:
        minibatch = Minibatch(posterior.data, posterior.weights)
    else:
        reference = take(reference)
        spec = check_like_data("reference", reference, posterior)
        same = [name for name, batch in probes.items() if same_arrays(batch, reference)]
        # L is the mean over all that is asked of these samples, by one probe set or several.
        q = [mass[name] for name in same]
        q = q or [
            probe_mass(posterior, {"reference": reference}, None, {"reference": spec})["reference"]
        ]
        minibatch = Minibatch(_on_device(reference), _of_sum(q, spec))
    probes = {n: _on_device(_without_excluded(x, mass[n])) for n, x in probes.items()}
    names, functions = check_observables(observables, params)
    shared = len(same) == 1
    probe_baseline, reference_baseline, values = _at_start(
        posterior.loss_fn, params, probes, mass, None if shared else minibatch, functions,
        chunk=chunk or 256,
    )  # fmt: skip
    if shared:
        reference_baseline = probe_baseline[same[0]]
    for name, losses in probe_baseline.items():
        _check_finite(f"probes[{name!r}]", losses)
    _check_finite("data" if reference is None else "reference", reference_baseline)
    return Problem(
        observables=functions,
        offsets=_check_offsets(observables, values, minibatch.weights.dtype),
        probes=probes,
        probe_baseline=probe_baseline,
        mass=mass,
        reference=minibatch,
        reference_baseline=reference_baseline,
        chunk=chunk,
        reference_probe=same[0] if shared else None,
        reference_is_data=reference is None,
        groups=groups,
        rows=_row_names(names, components),
    )


def _of_sum(shares: list[Array], spec: Any) -> Array:
    """Weights of sum B in proportion to the sum of the shares."""
    (size, *_), dtype = spec
    if not all(map(is_concrete, shares)):
        traced = jax.tree.reduce(jnp.add, shares)
        return traced * (size / jnp.sum(traced))
    total = np.sum([np.asarray(share, np.float64) for share in shares], axis=0)
    return jax.device_put((total * (size / total.sum())).astype(dtype))


def _without_excluded(batch: Batch, mass: Array) -> Batch:
    """A sample that counts in place of each of mass 0; by NumPy where it can."""
    if not all(map(is_concrete, (mass, *jax.tree.leaves(batch)))):
        return counted_rows(jax.tree.map(jnp.asarray, batch), mass)
    used = np.atleast_1d(np.asarray(mass).reshape(len(mass), -1).any(axis=1))
    if used.all():
        return batch
    rows = np.where(used, np.arange(len(used)), np.argmax(used))
    return jax.tree.map(lambda x: np.asarray(x)[rows], batch)


def _row_names(
    observables: tuple[str, ...] | None, components: Mapping[str, Restriction] | None
) -> tuple[str, ...]:
    """`observable`, `component`, or `component/observable`."""
    if components is None:
        rows = observables or ()
    elif observables is None:
        rows = tuple(components)
    else:
        rows = tuple(f"{component}/{phi}" for component in components for phi in observables)
    if len(set(rows)) < len(rows):
        raise ValueError(f"names of components and observables make two rows alike: {rows}")
    return rows


def _on_device(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x), batch)


def _check_finite(name: str, losses: Losses) -> None:
    if not holds(are_finite, losses):
        finite = np.isfinite(np.asarray(losses)).reshape(len(losses), -1).all(axis=1)
        raise ValueError(
            f"{name} has losses that are not finite at w*, "
            f"such as those of samples {np.flatnonzero(~finite)[:5].tolist()}"
        )


def check_observables(
    observables: Mapping[str, Callable[..., Any]] | None, params: Params
) -> tuple[tuple[str, ...] | None, tuple[Callable[..., Any], ...] | None]:
    """Names of the rows, `name/0` … where one returns several, and functions as pytrees."""
    if observables is None:
        return None, None
    names: list[str] = []
    for name, phi in observables.items():
        check_function(f"observables[{name!r}]", phi, "a function of params", num_arguments=1)
        out = jax.eval_shape(lambda params, phi=phi: phi(params), params)
        shape = getattr(out, "shape", None)
        if shape is None or len(shape) > 1 or 0 in shape:
            raise ValueError(
                f"observables[{name!r}] must return a scalar, or one row each [K], got "
                f"{type(out).__name__ if shape is None else shape}"
            )
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"observables[{name!r}] must return a float, got {out.dtype}")
        names += [f"{name}/{k}" for k in range(shape[0])] if shape else [name]
    return tuple(names), tuple(as_pytree_function(phi) for phi in observables.values())


def _check_offsets(
    observables: Mapping[str, Callable[..., Any]] | None, values: Any, dtype: Any
) -> Float[Array, " rows"]:
    """φ(w*) of all rows."""
    if observables is None:
        return jax.device_put(np.zeros(1, dtype))
    for name, value in zip(observables, values, strict=True):
        if not holds(are_finite, value):
            raise ValueError(
                f"observables[{name!r}] is {np.asarray(value).tolist()} at w*; it must be finite"
            )
    if all(map(is_concrete, values)):
        flat = np.concatenate([np.atleast_1d(np.asarray(value, dtype)) for value in values])
        return jax.device_put(flat)
    return jnp.concatenate([jnp.atleast_1d(value).astype(dtype) for value in values])


def check_reweighted(problem: Problem) -> None:
    """Rows whose loss can be re-weighted along with the posterior."""
    if problem.observables is not None:
        raise ValueError(
            "reweight_observable changes the loss inside φ, so rows must be excess losses: leave "
            "observables out and give components, such as {'all': jp.by_path('*')}"
        )


def named(name: str, pairs: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary from a mapping or pairs, whose names are strings and used once."""
    if not isinstance(pairs, Iterable) or isinstance(pairs, str):
        raise TypeError(f"{name} must map names to values, got {type(pairs).__name__}")
    items = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    if not all(isinstance(item, tuple) and len(item) == 2 for item in items):
        raise TypeError(f"{name} must map names to values, got {items!r:.80}")
    seen: dict[str, Any] = {}
    for key, value in items:
        if not isinstance(key, str) or not key:
            raise TypeError(f"{name} must be named by non-empty strings, got {key!r}")
        if key in seen:
            raise ValueError(f"{name} uses the name {key!r} twice")
        seen[key] = value
    return seen


def check_like_data(name: str, batch: Batch, posterior: Posterior) -> Spec:
    """A batch of the structure, axes and dtypes of the data; returns shape and dtype of its losses.

    Samples may be of other lengths than those of the data, where `loss_fn` takes them.
    """
    size = batch_length(name, batch)
    spec = partial(jax.tree.map, lambda x: (x.dtype, x.shape[1:]))
    given, wanted = (
        spec(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch))),
        spec(posterior.data),
    )
    kinds = partial(jax.tree.map, lambda x: (x.dtype, x.ndim))
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch))
    if kinds(like) != kinds(posterior.data):
        raise ValueError(f"{name} must be like the data, {wanted} per sample, got {given}")
    try:
        return check_loss(posterior.loss_fn, posterior.params, batch, size)
    except Exception as error:
        if given == wanted:
            raise
        raise ValueError(
            f"{name} must be like the data, {wanted} per sample, or such that loss_fn takes it; "
            f"got {given}, at which it says: {error}"
        ) from error


@partial(jax.jit, static_argnames=("loss_fn", "chunk"))
def _at_start(
    loss_fn: Any,
    params: Params,
    probes: dict[str, Batch],
    mass: dict[str, Float[Array, "..."]],
    reference: Minibatch | None,
    observables: tuple[Callable[..., Any], ...] | None,
    *,
    chunk: int,
) -> tuple[dict[str, Float[Array, "..."]], Losses | None, list[Array]]:
    """Losses and observables at w*; 0 for what is excluded."""

    def losses(batch: Batch, weights: Array) -> Array:
        return jnp.where(weights == 0, 0, losses_in_chunks(loss_fn, params, batch, chunk=chunk))

    rest = None
    if reference is not None:
        rest = losses(counted_rows(*reference), reference.weights)
    values = [jnp.asarray(phi(params)) for phi in observables or ()]
    return {name: losses(batch, mass[name]) for name, batch in probes.items()}, rest, values
