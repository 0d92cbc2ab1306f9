"""Training on re-weighted data: a compiled optax loop with the weights an inversion gave."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from jaxpattern.losses import check_finite_losses, check_loss, normalise_weights
from jaxpattern.posterior import Minibatch
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.runtime.host import host_for
from jaxpattern.runtime.mesh import (
    axis_size,
    cut,
    fetch,
    loop_bounds,
    over_lanes,
    pad_lanes,
    put,
    resolve_mesh,
)
from jaxpattern.types import Batch, LossFn, Params
from jaxpattern.validation import (
    as_pytree_function,
    batch_length,
    check_count,
    check_params,
    check_typed_key,
    holds,
    is_concrete,
)

_RECORDS = 20


class History(NamedTuple):
    """What a training run recorded; with several seeds every leaf has a leading seed axis.

    Attributes:
        loss: training loss of each step's batch, Σρℓ / Σρ, `[num_steps]`.
        step: steps after which `metrics` was evaluated, `[records]`, 0 the first.
        metrics: the pytree of `metrics(params)`, leaves `[records, ...]`.
        skipped: steps left out because their loss or gradient was not finite.
    """

    loss: Float[Array, "*seeds steps"]
    step: Int[Array, "*seeds records"]
    metrics: PyTree[Array]
    skipped: Int[Array, "*seeds"]


class _State(NamedTuple):
    params: Params
    optimizer: Any
    loss: Array
    step: Array
    metrics: PyTree[Array]
    skipped: Array


def train(
    key: Key[Array, "*seeds"],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int,
    weights: Shaped[Array | np.ndarray, "samples *tokens"] | None = None,
    weighting: Literal["loss", "sampling"] = "loss",
    metrics: Callable[[Params], PyTree[Array]] | None = None,
    record_every: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    mesh: Mesh | None = None,
) -> tuple[Params, History]:
    """Minimise L(w) = Σ_j ρ_j ℓ_j(w) / Σ_j ρ_j with an optax optimizer.

    With `weighting="loss"` a batch is drawn uniformly with replacement and its loss is
    Σ_B ρℓ / Σ_B ρ. With `"sampling"` samples are drawn with probability ∝ Σ_t ρ_jt, and weights
    act only among the tokens of a sample; then they must not be negative.

    Args:
        key: a typed key, or keys `[S]` for S seeds trained as one vmapped program.
        loss_fn: pure function of weights and batch that returns `[B]` or `[B, T]` losses.
        params: where training starts; with S keys every leaf has a leading axis S.
        data: pytree of arrays with one leading sample axis.
        optimizer: an optax gradient transformation.
        num_steps: steps to take.
        batch_size: samples of a step.
        weights: ρ of the shape of the losses. None is ρ = 1.
        weighting: `"loss"` or `"sampling"`.
        metrics: pure function of the weights, recorded along the way.
        record_every: steps between records of `metrics`; by default a twentieth of the run.
        progress: show a progress line. Without it the run is one pure function, to be vmapped.
        checkpoint: a folder, or a `Checkpoint`, where the run is kept; called again with the same
            arguments after an interruption, it goes on from there to the same bits.
        mesh: where it runs, see `jaxpattern.mesh`; None: the current mesh, or one device. Seeds are
            dealt out over `chain`; the samples of a batch are cut over `data`, which changes
            the order of sums and so the last bits.

    Returns:
        The trained parameters and a `History`. A step whose loss or gradient is not finite
        changes nothing; how many there were is in the history and in a warning.

    Raises:
        CheckpointError: the folder belongs to another run, or cannot be used.
        Interrupted: a signal stopped a run with a folder, after it was saved.
        TypeError, ValueError: an argument does not fit.
    """
    seeds = _check_train_key(key)
    mesh = resolve_mesh(mesh)
    check_params("params", params)
    num_samples = batch_length("data", data)
    check_count("num_steps", num_steps, minimum=1)
    check_count("batch_size", batch_size, minimum=1)
    if batch_size > num_samples:
        raise ValueError(f"batch_size must be at most the {num_samples} samples, got {batch_size}")
    if weighting not in ("loss", "sampling"):
        raise ValueError(f"weighting must be 'loss' or 'sampling', got {weighting!r}")
    if seeds is not None and batch_length("params", params) != seeds:
        raise ValueError(
            f"params must have a leading axis of {seeds}, one for each key, "
            f"got {batch_length('params', params)}"
        )
    one = params if seeds is None else jax.tree.map(lambda x: x[0], params)
    data = jax.tree.map(jnp.asarray, data)
    shape, dtype = check_loss(loss_fn, one, data, num_samples)
    check_finite_losses(loss_fn, one, data, num_samples)
    if record_every is not None:
        check_count("record_every", record_every, minimum=1)
    weighted = Minibatch(data, normalise_weights(weights, shape, dtype))
    if weighting == "sampling" and not holds(lambda x: x.min() >= 0, weighted.weights):
        raise ValueError("weights must not be negative with weighting='sampling'")

    if batch_size % axis_size(mesh, "data"):
        raise ValueError(
            f"batch_size must be a multiple of {axis_size(mesh, 'data')}, the size of the data "
            f"axis of the mesh, got {batch_size}"
        )
    run = _Run(loss_fn, optimizer, num_steps, batch_size, weighting, record_every, mesh)
    metrics = as_pytree_function(metrics if metrics is not None else lambda _: {})
    with host_for(
        "train",
        checkpoint=checkpoint,
        mesh=mesh,
        progress=progress,
        key=key,
        params=params,
        data=data,
        weights=weighted.weights,
        metrics=metrics,
        **{name: value for name, value in run._asdict().items() if name != "mesh"},
    ) as host:
        weighted, metrics = put((weighted, metrics), mesh)
        along = () if seeds is None else ("chain",)
        if seeds is not None:
            key, params = pad_lanes((key, params), mesh)
        key, params = put((key, params), mesh, *along)

        def advance(state: _State, a: int, b: int) -> _State:
            if host.chunked:
                bounds = loop_bounds(a, b, mesh)
                return _advance(run, state, key, weighted, metrics, bounds)
            return _advance(run, state, key, weighted, metrics, None, (a, b))

        def loss_of(state: _State, a: int, b: int) -> str:
            seen = state.loss.is_fully_addressable
            return f"loss={float(jnp.mean(state.loss[..., a:b])):.3f}" if seen else ""

        state = host.loop(
            "training",
            num_steps,
            partial(_start, run, params, metrics, seeds),
            advance,
            final=lambda state: state._replace(optimizer=()),
            lanes=seeds,
            note=loss_of,
        )
        if seeds is not None:
            state = jax.tree.map(lambda leaf: leaf[:seeds], state)
        state = fetch(state, mesh)
    skipped = state.skipped
    if is_concrete(skipped) and bool(jnp.any(skipped > 0)):
        warnings.warn(
            f"{int(jnp.sum(skipped))} steps had a loss or gradient that was not finite and were "
            "left out; a smaller learning rate or other weights avoid them",
            stacklevel=2,
        )
    return state.params, History(state.loss, state.step, state.metrics, skipped)


class _Run(NamedTuple):
    """The static part of a training run."""

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    num_steps: int
    batch_size: int
    weighting: str
    record_every: int | None
    mesh: Mesh | None

    @property
    def every(self) -> int:
        return self.record_every or -(-self.num_steps // _RECORDS)

    @property
    def num_records(self) -> int:
        """The first, every `every` steps, and the last."""
        return 1 + -(-self.num_steps // self.every)


@partial(jax.jit, static_argnums=(0, 3))
def _start(run: _Run, params: Params, metrics: Any, seeds: int | None) -> _State:
    def one(params: Params) -> _State:
        first = jax.tree.map(jnp.asarray, metrics(params))
        records = jax.tree.map(
            lambda x: jnp.zeros((run.num_records, *x.shape), x.dtype).at[0].set(x), first
        )
        return _State(
            params=params,
            optimizer=run.optimizer.init(params),
            loss=jnp.zeros(run.num_steps),
            step=jnp.zeros(run.num_records, jnp.int32),
            metrics=records,
            skipped=jnp.zeros((), jnp.int32),
        )

    if seeds is None:
        return one(params)
    return over_lanes(lambda _, params: one(params), run.mesh)((), params)


@partial(jax.jit, static_argnames=("run", "static_bounds"))
def _advance(
    run: _Run,
    state: _State,
    key: Key[Array, "*seeds"],
    weighted: Minibatch,
    metrics: Any,
    bounds: tuple[Array, Array] | None,
    static_bounds: tuple[int, int] | None = None,
) -> _State:
    """Steps [start, stop) of the run, of all seeds."""
    steps = partial(_steps, run, static_bounds=static_bounds)
    shared = (weighted, metrics, bounds)
    if key.ndim == 0:
        return steps(shared, state, key)
    return over_lanes(steps, run.mesh)(shared, state, key)


def _steps(
    run: _Run,
    shared: tuple[Minibatch, Any, tuple[Array, Array] | None],
    state: _State,
    key: Key[Array, ""],
    *,
    static_bounds: tuple[int, int] | None,
) -> _State:
    weighted, metrics, bounds = shared
    start, stop = static_bounds or bounds  # type: ignore[misc]
    row_weights = weighted.weights.reshape(weighted.weights.shape[0], -1).sum(axis=1)
    cumulative = jnp.cumsum(row_weights)

    def choose(key: Key[Array, ""]) -> Minibatch:
        if run.weighting == "loss":
            index = jax.random.randint(key, (run.batch_size,), 0, row_weights.shape[0])
            return jax.tree.map(lambda x: x[index], weighted)
        level = jax.random.uniform(key, (run.batch_size,), maxval=cumulative[-1])
        index = jnp.searchsorted(cumulative, level, side="right")
        batch, weights = jax.tree.map(lambda x: x[index], weighted)
        rows = row_weights[index].reshape(-1, *(1,) * (weights.ndim - 1))
        return Minibatch(batch, weights / rows)

    def step(t: Array, state: _State) -> _State:
        batch, weights = cut(choose(jax.random.fold_in(key, t)), run.mesh, "data")
        total = jnp.sum(weights)

        def objective(params: Params) -> Array:
            losses = run.loss_fn(params, batch).astype(weights.dtype)
            return jnp.sum(weights * losses) / jnp.where(total == 0, 1.0, total)

        loss, gradient = jax.value_and_grad(objective)(state.params)
        updates, optimizer = run.optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss + optax.tree.norm(gradient))
        keep = partial(jax.tree.map, partial(jnp.where, finite))
        params, optimizer = keep((params, optimizer), (state.params, state.optimizer))

        def record(state: _State) -> tuple[Array, PyTree[Array]]:
            slot = -(-(t + 1) // run.every)
            values = metrics(params)
            return state.step.at[slot].set(t + 1), jax.tree.map(
                lambda trace, x: trace.at[slot].set(x), state.metrics, values
            )

        due = ((t + 1) % run.every == 0) | (t + 1 == run.num_steps)
        steps, records = jax.lax.cond(due, record, lambda s: (s.step, s.metrics), state)
        return _State(
            params=params,
            optimizer=optimizer,
            loss=state.loss.at[t].set(loss.astype(state.loss.dtype)),
            step=steps,
            metrics=records,
            skipped=state.skipped + ~finite,
        )

    return jax.lax.fori_loop(start, stop, step, state)


def _check_train_key(key: Any) -> int | None:
    """The number of seeds, or None for a single key."""
    check_typed_key(key)
    if key.ndim > 1:
        raise TypeError(f"key must be one key or keys of shape [S], got shape {key.shape}")
    return None if key.ndim == 0 else key.shape[0]
