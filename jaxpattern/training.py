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

from jaxpattern import tables
from jaxpattern.descent import Descent, check_descent, check_keys, drawing, step_of, taken
from jaxpattern.losses import first_losses, losses_in_chunks
from jaxpattern.posterior import Minibatch
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.runtime.host import host_for
from jaxpattern.runtime.mesh import (
    fetch,
    loop_bounds,
    over_lanes,
    pad_lanes,
    put,
    resolve_mesh,
    take,
)
from jaxpattern.types import Batch, Losses, Params
from jaxpattern.validation import as_pytree_function, holds, num_required, own_streams


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
    seeds_at_once: int | None = None,
) -> tuple[Params, History]:
    """Minimize L(w) = Σ_j ρ_j ℓ_j(w) / Σ_j ρ_j with an optax optimizer.

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
        seeds_at_once: seeds a device trains together while the others wait, where memory is short;
            None: all it has. The last bits depend on it.

    Returns:
        The trained parameters and a `History`. A step whose loss or gradient is not finite
        changes nothing; how many there were is in the history and in a warning.

    Raises:
        CheckpointError: the folder belongs to another run, or cannot be used.
        Interrupted: a signal stopped a run with a folder, after it was saved.
        TypeError, ValueError: an argument does not fit.
    """
    seeds = check_keys(key)
    key = own_streams(key)
    mesh = resolve_mesh(mesh)
    params, data, weights, given = take((params, data, weights, optimizer_state))
    run = Descent(
        loss_fn, optimizer, num_steps, batch_size, weighting, record_every, mesh,
        num_required(loss_fn) == 3, seeds_at_once,
    )  # fmt: skip
    data = jax.tree.map(jnp.asarray, data)
    weighted = Minibatch(data, check_descent(run, seeds, params, data, weights, given))
    metrics = as_pytree_function(_no_metrics if metrics is None else metrics)
    one = params if seeds is None else jax.tree.map(lambda x: x[0], params)
    with host_for(
        "train", checkpoint=checkpoint, mesh=mesh, progress=progress,
        losses=partial(first_losses, run.losses, one, data),
        key=key, params=params, data=data, weights=weighted.weights, metrics=metrics,
        optimizer_state=given,
        **run.arguments,
    ) as host:  # fmt: skip
        weighted, metrics = put((weighted, metrics), mesh)
        lanes = (key, params, given)
        if seeds is None:
            key, params, given = put(lanes, mesh)
        else:
            key, params, given = put(pad_lanes(lanes, mesh, seeds_at_once), mesh, "chain")

        def advance(state: _State, a: int, b: int) -> _State:
            if not host.chunked:
                return _advance(run, state, key, weighted, metrics, None, static_bounds=(a, b))
            return _advance(run, state, key, weighted, metrics, loop_bounds(a, b, mesh))

        state = host.loop(
            "training", num_steps, partial(_start, run, params, metrics, seeds, given), advance,
            lanes=seeds, note=_mean_loss,
        )  # fmt: skip
        if seeds is not None:
            state = jax.tree.map(lambda leaf: leaf[:seeds], state)
        state = fetch(state, mesh)
    if not holds(lambda skipped: (skipped == 0).all(), state.skipped):
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
    return f"loss={float(np.mean(np.asarray(state.loss)[..., a:b])):.3f}"


def _cause(
    run: Descent, state: _State, seeds: int | None, start: Params, weighted: Minibatch
) -> str:
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


@partial(jax.jit, static_argnums=(0, 3))
def _start(
    run: Descent, params: Params, metrics: Any, seeds: int | None, given: PyTree[Any] | None = None
) -> _State:
    def one(params: Params, given: PyTree[Any] | None) -> _State:
        first = jax.tree.map(jnp.asarray, metrics(params))
        records = jax.tree.map(
            lambda x: jnp.zeros((run.num_records, *x.shape), x.dtype).at[0].set(x), first
        )
        return _State(
            params=params,
            optimizer=run.optimizer_state(params, given),
            loss=jnp.zeros(run.num_steps),
            step=jnp.zeros(run.num_records, jnp.int32),
            metrics=records,
            skipped=jnp.zeros((), jnp.int32),
        )

    if seeds is None:
        return one(params, given)
    every = over_lanes(lambda _, *lane: one(*lane), run.mesh, run.seeds_at_once)
    return every((), params, given)


@partial(jax.jit, static_argnames=("run", "static_bounds"))
def _advance(
    run: Descent,
    state: _State,
    key: Key[Array, "*seeds"],
    weighted: Minibatch,
    metrics: Any,
    bounds: tuple[Array, Array] | None,
    *,
    static_bounds: tuple[int, int] | None = None,
) -> _State:
    """Steps [start, stop) of the run, of all seeds."""
    steps = partial(_steps, run, static_bounds=static_bounds)
    shared = (weighted, metrics, bounds)
    if key.ndim == 0:
        return steps(shared, state, key)
    return over_lanes(steps, run.mesh, run.seeds_at_once)(shared, state, key)


def _steps(
    run: Descent,
    shared: tuple[Minibatch, Any, tuple[Array, Array] | None],
    state: _State,
    key: Key[Array, ""],
    *,
    static_bounds: tuple[int, int] | None,
) -> _State:
    weighted, metrics, bounds = shared
    start, stop = static_bounds or bounds  # type: ignore[misc]
    choose = drawing(run, weighted)

    def step(t: Array, state: _State) -> _State:
        drawn, move = step_of(run, choose, key, t)
        stepped = move(state.params, state.optimizer, drawn.weights)
        params, optimizer = taken(stepped, state.params, state.optimizer)

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
            loss=state.loss.at[t].set(stepped.loss.astype(state.loss.dtype)),
            step=steps,
            metrics=records,
            skipped=state.skipped + (~stepped.finite).astype(jnp.int32),
        )

    return jax.lax.fori_loop(start, stop, step, state)
