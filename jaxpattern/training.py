"""Training on re-weighted data: a compiled optax loop with the weights an inversion gave."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from jaxpattern import tables
from jaxpattern.losses import (
    check_finite_losses,
    check_loss,
    first_losses,
    losses_in_chunks,
    normalise_weights,
)
from jaxpattern.lottery import draw, make_lottery
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
    take,
)
from jaxpattern.types import Batch, Losses, LossFn, Params
from jaxpattern.validation import (
    as_pytree_function,
    batch_length,
    check_count,
    check_params,
    check_typed_key,
    holds,
    is_concrete,
    num_required,
    own_streams,
)

_RECORDS = 20
_NOISE = 2**32 - 1  # the stream of a stochastic loss; no step has this number


class History(NamedTuple):
    """What a training run recorded; with several seeds every leaf has a leading seed axis.

    Attributes:
        loss: training loss of each step's batch, Σρℓ / Σρ, `[num_steps]`.
        step: steps after which `metrics` was evaluated, `[records]`, 0 the first.
        metrics: the pytree of `metrics(params)`, leaves `[records, ...]`.
        skipped: steps left out because their loss or gradient was not finite.
        optimizer_state: that of the optimizer after the last step, to go on from.
    """

    loss: Float[Array, "*seeds steps"]
    step: Int[Array, "*seeds records"]
    metrics: PyTree[Array]
    skipped: Int[Array, "*seeds"]
    optimizer_state: PyTree[Any]

    def __str__(self) -> str:
        return tables.text(tables.history, self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return tables.html(tables.history, self)


class _State(NamedTuple):
    params: Params
    optimizer: Any
    loss: Array
    step: Array
    metrics: PyTree[Array]
    skipped: Array


def train(
    key: Key[Array, "*seeds"],
    loss_fn: Callable[..., Losses],
    params: Params,
    data: Batch,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int,
    weights: Shaped[Array | np.ndarray, "samples *tokens"] | list[Any] | None = None,
    weighting: Literal["loss", "sampling"] = "loss",
    metrics: Callable[[Params], PyTree[Array]] | None = None,
    record_every: int | None = None,
    optimizer_state: PyTree[Any] | None = None,
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
        loss_fn: pure function of parameters and batch that returns `[B]` or `[B, T]` losses. A
            third positional argument without a default is given a key, another one at each step,
            for dropout and the like.
        params: where training starts; with S keys every leaf has a leading axis S.
        data: pytree of arrays with one leading sample axis.
        optimizer: an optax gradient transformation.
        num_steps: steps to take.
        batch_size: samples of a step.
        weights: ρ of the shape of the losses; zero excludes. None is ρ = 1.
        weighting: `"loss"` or `"sampling"`.
        metrics: pure function of the parameters, recorded along the way.
        record_every: steps between records of `metrics`; by default a twentieth of the run.
        optimizer_state: that of `optimizer` to start from, such as `history.optimizer_state` of a
            run to be continued (with another key); None: a fresh one.
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
    key = own_streams(key)
    mesh = resolve_mesh(mesh)
    params, data, weights, given = take((params, data, weights, optimizer_state))
    run = _Run(
        loss_fn, optimizer, num_steps, batch_size, weighting, record_every, mesh,
        num_required(loss_fn) == 3,
    )  # fmt: skip
    data = jax.tree.map(jnp.asarray, data)
    weighted = Minibatch(data, _check_run(run, seeds, params, data, weights, given))
    metrics = as_pytree_function(_no_metrics if metrics is None else metrics)
    one = params if seeds is None else jax.tree.map(lambda x: x[0], params)
    with host_for(
        "train", checkpoint=checkpoint, mesh=mesh, progress=progress,
        losses=partial(first_losses, run.losses, one, data),
        key=key, params=params, data=data, weights=weighted.weights, metrics=metrics,
        optimizer_state=given,
        **{name: value for name, value in run._asdict().items() if name != "mesh"},
    ) as host:  # fmt: skip
        weighted, metrics = put((weighted, metrics), mesh)
        lanes = (key, params, given)
        if seeds is None:
            key, params, given = put(lanes, mesh)
        else:
            key, params, given = put(pad_lanes(lanes, mesh), mesh, "chain")

        def advance(state: _State, a: int, b: int) -> _State:
            if not host.chunked:
                return _advance(run, state, key, weighted, metrics, None, (a, b))
            return _advance(run, state, key, weighted, metrics, loop_bounds(a, b, mesh))

        state = host.loop(
            "training", num_steps, partial(_start, run, params, metrics, seeds, given), advance,
            lanes=seeds, note=_mean_loss,
        )  # fmt: skip
        if seeds is not None:
            state = jax.tree.map(lambda leaf: leaf[:seeds], state)
        state = fetch(state, mesh)
    if is_concrete(state.skipped) and bool(jnp.any(state.skipped > 0)):
        warnings.warn(_cause(run, state, seeds, one, weighted), stacklevel=2)
    history = History(state.loss, state.step, state.metrics, state.skipped, state.optimizer)
    return state.params, history


def _no_metrics(params: Params) -> PyTree[Array]:
    """One function for all calls, so that a second run compiles nothing again."""
    return {}


def _mean_loss(state: _State, a: int, b: int) -> str:
    """What the progress line says beside the time."""
    if not state.loss.is_fully_addressable:
        return ""
    return f"loss={float(jnp.mean(state.loss[..., a:b])):.3f}"


def _check_run(
    run: _Run, seeds: int | None, params: Params, data: Batch, weights: Any, given: Any
) -> Float[Array, "samples *tokens"]:
    """What `train` takes, checked before any step; returns ρ, scaled to sum N."""
    check_params("params", params)
    num_samples = batch_length("data", data)
    _check_optimizer(run.optimizer, params)
    check_count("num_steps", run.num_steps, minimum=1)
    check_count("batch_size", run.batch_size, minimum=1)
    if run.batch_size > num_samples:
        raise ValueError(
            f"batch_size must be at most the {num_samples} samples, got {run.batch_size}"
        )
    parts = axis_size(run.mesh, "data")
    if run.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts}, the size of the data axis of the mesh, "
            f"got {run.batch_size}"
        )
    if run.weighting not in ("loss", "sampling"):
        raise ValueError(f"weighting must be 'loss' or 'sampling', got {run.weighting!r}")
    if run.record_every is not None:
        check_count("record_every", run.record_every, minimum=1)
    if seeds is not None and batch_length("params", params) != seeds:
        raise ValueError(
            f"params must have a leading axis of {seeds}, one for each key, "
            f"got {batch_length('params', params)}"
        )
    if given is not None:
        start = run.optimizer.init if seeds is None else jax.vmap(run.optimizer.init)
        wanted, got = (
            jax.tree.map(lambda x: (jnp.shape(x), str(jnp.result_type(x))), state)
            for state in (jax.eval_shape(start, params), given)
        )
        if wanted != got:
            raise ValueError(
                f"optimizer_state must be one of optimizer for these params, {wanted}, got {got}"
            )
    one = params if seeds is None else jax.tree.map(lambda x: x[0], params)
    shape, dtype = check_loss(run.losses, one, data, num_samples)
    rho = normalise_weights(weights, shape, dtype)
    check_finite_losses(run.losses, one, data, num_samples, rho)
    if run.weighting == "sampling" and not holds(lambda x: x.min() >= 0, rho):
        raise ValueError("weights must not be negative with weighting='sampling'")
    return rho


def _check_optimizer(optimizer: Any, params: Params) -> None:
    """Something with init(params) and update(gradients, state, params)."""
    wanted = "an optax.GradientTransformation, such as optax.adamw(1e-3)"
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        told = f"{optimizer!r:.40}" if isinstance(optimizer, int | float) else type(optimizer)
        raise TypeError(f"optimizer must be {wanted}, got {told}")

    def step(params: Params) -> Any:
        return optimizer.update(params, optimizer.init(params), params)

    try:
        jax.eval_shape(step, params)
    except TypeError as error:
        raise TypeError(
            f"optimizer must be {wanted}, whose update needs (gradients, state, params) and no "
            f"more: {error}"
        ) from error


def _cause(run: _Run, state: _State, seeds: int | None, start: Params, weighted: Minibatch) -> str:
    """Why steps were left out, as far as it can be found out afterwards."""
    number = int(jnp.sum(state.skipped))
    end = state.params if seeds is None else jax.tree.map(lambda x: x[0], state.params)
    told = f"{number} steps had a loss or gradient that was not finite and were left out"
    for params, where in ((start, "params as they were given"), (end, "the trained parameters")):
        losses = losses_in_chunks(run.losses, params, weighted.batch, min(64, run.batch_size))
        bad = ~np.isfinite(np.asarray(losses)) & (np.asarray(weighted.weights) != 0)
        rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
        if len(rows):
            return (
                f"{told}: loss_fn is not finite at {where} for {len(rows)} samples of data, such "
                f"as samples {rows[:5].tolist()}; mend them, or exclude them by weights of 0"
            )
    steep = number - int(jnp.sum(~jnp.isfinite(state.loss)))
    if steep:
        return (
            f"{told}: in {steep} of them the loss was finite and its gradient was not, as that of "
            "a square root at 0 is, or that of losses too large"
        )
    return (
        f"{told}, although the losses of all samples are finite at the start and at the end; a "
        "smaller learning rate or other weights may avoid them"
    )


@dataclass(frozen=True)
class _AtKey:
    """A stochastic loss at one key."""

    loss_fn: Callable[..., Losses]

    def __call__(self, params: Params, batch: Batch) -> Losses:
        return self.loss_fn(params, batch, jax.random.key(0))


class _Run(NamedTuple):
    """The static part of a training run."""

    loss_fn: Callable[..., Losses]
    optimizer: optax.GradientTransformation
    num_steps: int
    batch_size: int
    weighting: str
    record_every: int | None
    mesh: Mesh | None
    stochastic: bool = False

    @property
    def losses(self) -> LossFn:
        """The loss as a function of parameters and batch alone."""
        return _AtKey(self.loss_fn) if self.stochastic else self.loss_fn

    @property
    def every(self) -> int:
        return self.record_every or -(-self.num_steps // _RECORDS)

    @property
    def num_records(self) -> int:
        """The first, every `every` steps, and the last."""
        return 1 + -(-self.num_steps // self.every)


@partial(jax.jit, static_argnums=(0, 3))
def _start(
    run: _Run, params: Params, metrics: Any, seeds: int | None, given: PyTree[Any] | None = None
) -> _State:
    def one(params: Params, given: PyTree[Any] | None) -> _State:
        first = jax.tree.map(jnp.asarray, metrics(params))
        records = jax.tree.map(
            lambda x: jnp.zeros((run.num_records, *x.shape), x.dtype).at[0].set(x), first
        )
        return _State(
            params=params,
            optimizer=run.optimizer.init(params) if given is None else given,
            loss=jnp.zeros(run.num_steps),
            step=jnp.zeros(run.num_records, jnp.int32),
            metrics=records,
            skipped=jnp.zeros((), jnp.int32),
        )

    if seeds is None:
        return one(params, given)
    return over_lanes(lambda _, *lane: one(*lane), run.mesh)((), params, given)


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
    # Samples without weight are never looked at: 0 · NaN is NaN, also in a derivative.
    counted = jnp.argmax(row_weights != 0)
    lottery = make_lottery(row_weights) if run.weighting == "sampling" else None

    def choose(key: Key[Array, ""]) -> Minibatch:
        if lottery is None:
            index = jax.random.randint(key, (run.batch_size,), 0, row_weights.shape[0])
            excluded = (weighted.weights[index] == 0).reshape(run.batch_size, -1).all(axis=1)
            rows = jnp.where(excluded, counted, index)
            batch = jax.tree.map(lambda x: x[rows], weighted.batch)
            return Minibatch(batch, weighted.weights[index])
        index = draw(key, lottery, run.batch_size)
        batch, weights = jax.tree.map(lambda x: x[index], weighted)
        rows = row_weights[index].reshape(-1, *(1,) * (weights.ndim - 1))
        return Minibatch(batch, weights / rows)

    def step(t: Array, state: _State) -> _State:
        batch, weights = cut(choose(jax.random.fold_in(key, t)), run.mesh, "data")
        total = jnp.sum(weights)
        noise = jax.random.fold_in(jax.random.fold_in(key, _NOISE), t)

        def objective(params: Params) -> Array:
            losses = run.loss_fn(params, batch, *((noise,) if run.stochastic else ()))
            losses = jnp.where(weights == 0, 0.0, losses.astype(weights.dtype))
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
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )

    return jax.lax.fori_loop(start, stop, step, state)


def _check_train_key(key: Any) -> int | None:
    """The number of seeds, or None for a single key."""
    check_typed_key(key)
    if key.ndim > 1:
        raise TypeError(f"key must be one key or keys of shape [S], got shape {key.shape}")
    return None if key.ndim == 0 else key.shape[0]
