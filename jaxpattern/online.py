"""Patterning while training: measure, choose weights, train a while, measure again."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, Shaped

from jaxpattern.descent import check_keys
from jaxpattern.inversion.intervention import Intervention, compose_weights
from jaxpattern.inversion.methods import InversionMethod
from jaxpattern.inversion.prediction import predict
from jaxpattern.inversion.solve import solve_weights
from jaxpattern.losses import check_loss, normalise_weights
from jaxpattern.response.problem import check_observables, named
from jaxpattern.response.result import Response
from jaxpattern.response.training_run import Mode, check_sources, training_response
from jaxpattern.rounds import Pattern, Round
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.training import train
from jaxpattern.types import Batch, Losses, Params
from jaxpattern.validation import (
    batch_length,
    check_count,
    check_function,
    check_number,
    own_streams,
)

_HALVINGS = 20  # of the interval that holds the largest share of a change within the budget


Measure = Callable[[Key[Array, "*seeds"], Params, Array], Response]


def pattern(
    key: Key[Array, "*seeds"],
    loss_fn: Callable[..., Losses],
    params: Params,
    data: Batch,
    optimizer: optax.GradientTransformation,
    *,
    target: Mapping[str, float],
    observables: Mapping[str, Callable] | Iterable[tuple[str, Callable]],
    sources: Mapping[str, Any] | Iterable[tuple[str, Any]],
    num_rounds: int,
    num_steps: int,
    batch_size: int,
    hold: Mapping[str, float] | Iterable[str] = (),
    min_effective_share: float = 0.5,
    weights: Shaped[Array | np.ndarray, "samples *tokens"] | None = None,
    method: InversionMethod | None = None,
    mode: Mode = "forward",
    measure: Measure | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    mesh: Mesh | None = None,
) -> Pattern:
    """Steer a training run by its data weights, round by round.

    Each round measures how φ at its end responds to the weights, solves for weights that bring φ
    to where it is to be by then, trains on them, and looks at what came of it. Against a control,
    which is trained on the first weights all along with the same batches, round r of R aims at

        φ − φ_control = target · r / R

    so that what a round missed, the next makes up for. All seeds are trained on the same weights.

    Args:
        key: a typed key, or keys `[S]` for S seeds, as in `train`.
        loss_fn: pure function of parameters and batch that returns `[B]` or `[B, T]` losses.
        params: where training starts; with S keys every leaf has a leading axis S.
        data: pytree of arrays with one leading sample axis.
        optimizer: an optax gradient transformation; its state is carried from round to round.
        target: row → shift of φ wanted at the end of all rounds, against the control.
        observables: name → function of the parameters that returns a scalar, or `[K]`.
        sources: name → indices of samples of `data`; none is in two. Others keep their share.
        num_rounds: rounds.
        num_steps: steps of each round.
        batch_size: samples of a step.
        hold: rows that must not rise: row → how far each may, against the control, or rows, which
            then may not at all. They count in a round as far as its prediction passes that.
        min_effective_share: least (Σρ)² / (N Σρ²) of the weights, from 0 to 1; a change that
            passes it, or makes a weight negative, is drawn back towards the first weights.
        weights: ρ to start from, of the shape of the losses; zero excludes. None is ρ = 1.
        method: as in `solve_weights`.
        mode: as in `training_response`: one weight per loss (`"reverse"`), or per source.
        measure: another response: `(key, params, weights) -> Response` whose probe sets are the
            sources and whose rows hold the observables, as `susceptibilities` makes it. None: the
            response of the round's own training run.
        progress: show progress lines.
        checkpoint: a folder, or a `Checkpoint`; called again with the same arguments after an
            interruption, it goes on from there. What `measure` does it must keep by itself.
        mesh: where it runs, as in `train`.

    Returns:
        A `Pattern` with every round.

    Raises:
        CheckpointError, Interrupted: as in `train`.
        TypeError, ValueError: an argument does not fit.

    Warns:
        UnreliableWarning, UnreachableTargetWarning, WeightsWarning: as `training_response` and
            `solve_weights` do, in each round.
    """
    seeds = check_keys(key)
    key = own_streams(key)
    check_count("num_rounds", num_rounds, minimum=1)
    check_number("min_effective_share", min_effective_share, minimum=0.0)
    if min_effective_share > 1:
        raise ValueError(f"min_effective_share must be at most 1, got {min_effective_share:g}")
    observables = named("observables", observables)
    if not observables:
        raise ValueError("observables is empty; give at least one")
    one = params if seeds is None else jax.tree.map(lambda x: x[0], params)
    rows, functions = check_observables(observables, one)
    assert rows is not None
    asked = _Asked(_check_rows("target", target, rows), _check_hold(hold, target, rows))
    if measure is not None:
        check_function("measure", measure, "(key, params, weights) -> Response", num_arguments=3)
    data = jax.tree.map(jnp.asarray, data)
    size = batch_length("data", data)
    shape, dtype = check_loss(loss_fn, one, data, size)
    base = np.ones(shape, dtype) if weights is None else np.asarray(weights, dtype)
    sources = check_sources(named("sources", sources), normalise_weights(base, shape, dtype))
    base = base / np.mean(base, dtype=np.float64).astype(dtype)  # of mean 1, as all that follow
    run = partial(
        train, loss_fn=loss_fn, data=data, optimizer=optimizer, num_steps=num_steps,
        batch_size=batch_size, progress=progress, mesh=mesh,
    )  # fmt: skip
    look = jax.jit(_all_rows if seeds is None else jax.vmap(_all_rows, (None, 0)))

    def phi(params: Params) -> np.ndarray:
        return np.asarray(look(functions, params), np.float64).reshape(seeds or 1, -1)

    here = control = _Place(params, None)
    present, rounds = base, []
    for r in range(num_rounds):
        keep = partial(_folder, checkpoint, r)
        now = jax.random.fold_in(key, r) if seeds is None else _fold(key, r)
        go = partial(_train, run, now)
        before = go(here, present, keep("before"))
        # Until the weights change, the control is the run itself.
        same = control is here and present is base
        control = before if same else go(control, base, keep("control"))
        if measure is None:
            response = training_response(
                now, loss_fn, here.params, data, optimizer, num_steps=num_steps,
                batch_size=batch_size, weights=present, observables=observables, sources=sources,
                mode=mode, optimizer_state=here.optimizer, progress=progress,
                checkpoint=keep("response"), mesh=mesh,
            )  # fmt: skip
        else:
            response = _check_response(measure(now, here.params, jnp.asarray(present)), sources)
        old, away = phi(before.params), phi(control.params)
        due = dict(zip(rows, (old - away).mean(0).tolist(), strict=True))
        change = _choose(
            response, asked, due, (r + 1) / num_rounds, method=method,
            present=present, base=base, sources=sources, least=min_effective_share,
        )  # fmt: skip
        here = before if change.solution is None else go(here, change.weights, keep("after"))
        if change.solution is None and same:
            control = here
        present = change.weights
        new = phi(here.params)
        realised, total = _shifts(rows, new - old), _shifts(rows, new - away)
        rounds.append(
            Round(
                response, change.solution, jnp.asarray(present), change.scale, change.wanted,
                change.predicted, *realised, *total, _effective_share(present, base),
            )
        )  # fmt: skip
    return Pattern(
        here.params, control.params, here.optimizer, tuple(rounds), asked.target, asked.hold
    )


class _Asked(NamedTuple):
    target: dict[str, float]
    hold: dict[str, float]


class _Place(NamedTuple):
    """Where a run is."""

    params: Params
    optimizer: Any


class _Change(NamedTuple):
    solution: Intervention | None
    weights: np.ndarray
    scale: float
    wanted: dict[str, float]
    predicted: dict[str, float]


def _fold(key: Key[Array, " seeds"], r: int) -> Key[Array, " seeds"]:
    return jax.vmap(lambda k: jax.random.fold_in(k, r))(key)


def _train(run: Any, key: Any, place: _Place, weights: np.ndarray, checkpoint: Any) -> _Place:
    params, history = run(
        key, params=place.params, weights=weights, optimizer_state=place.optimizer,
        checkpoint=checkpoint,
    )  # fmt: skip
    return _Place(params, history.optimizer_state)


def _all_rows(functions: tuple[Callable, ...], params: Params) -> Float[Array, " rows"]:
    return jnp.concatenate([jnp.atleast_1d(f(params)) for f in functions])


def _folder(checkpoint: Any, r: int, name: str) -> Checkpoint | None:
    """The folder of one part of a round, which is a run of its own."""
    if checkpoint is None:
        return None
    whole = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    return dataclasses.replace(whole, folder=Path(whole.folder) / f"round-{r:03}" / name)


def _shifts(rows: Any, values: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Mean over seeds, and its standard error."""
    error = np.full(values.shape[1], math.nan)
    if len(values) > 1:
        error = values.std(0, ddof=1) / math.sqrt(len(values))
    shift, spread = (dict(zip(rows, x.tolist(), strict=True)) for x in (values.mean(0), error))
    return shift, spread


def _spread(
    present: np.ndarray, sources: Mapping[str, Any], change: Mapping[str, Any]
) -> np.ndarray:
    """The weights times a factor for each source, of mean 1 over all losses."""
    factor = np.ones_like(present)
    for name, index in sources.items():
        mine = np.asarray(change[name], factor.dtype)
        factor[np.asarray(index)] = mine
    return np.asarray(compose_weights(present, factor))


def _effective_share(weights: np.ndarray, base: np.ndarray) -> float:
    used = np.asarray(weights, np.float64)[base != 0]
    return float(used.sum() ** 2 / (used.size * np.sum(used**2)))


def _choose(
    response: Response,
    asked: _Asked,
    due: Mapping[str, float],
    share: float,
    *,
    method: InversionMethod | None,
    present: np.ndarray,
    base: np.ndarray,
    sources: Mapping[str, Any],
    least: float,
) -> _Change:
    """Weights that bring each row from where it is due, against the control, to where it should be.

    A held row is left free until it is predicted to pass what it may; then it is asked to stay
    there. What passes the budget is drawn back towards the first weights, and not to those of the
    round before: so weights that have spent it can still turn.
    """
    wanted = {row: shift * share - due[row] for row, shift in asked.target.items()}
    while True:
        solution = solve_weights(response, wanted, method=method)
        passed = {
            row: limit - due[row]
            for row, limit in asked.hold.items()
            if row not in wanted and due[row] + float(solution.predicted_shift[row]) > limit
        }
        if not passed:
            break
        wanted |= passed
    there = _spread(present, sources, solution.weights)

    def at(scale: float) -> np.ndarray:
        return base + scale * (there - base)

    def fits(rho: np.ndarray) -> bool:
        # Weights below 0 cannot be trained on; those that the data came with stay.
        return bool((rho >= np.minimum(base, 0)).all()) and _effective_share(rho, base) >= least

    if fits(there):
        predicted = {row: float(x) for row, x in solution.predicted_shift.items()}
        return _Change(solution, there, 1.0, wanted, predicted)
    scale, beyond = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (scale + beyond) / 2
        scale, beyond = (middle, beyond) if fits(at(middle)) else (scale, middle)
    if scale == 0.0:
        return _Change(None, present, 0.0, wanted, dict.fromkeys(response.rows, 0.0))
    drawn = at(scale)
    factor = np.divide(drawn, present, out=np.ones_like(drawn), where=present != 0)
    relative = {}
    for name, index in sources.items():
        mine, counts = factor[np.asarray(index)], present[np.asarray(index)] != 0
        whole = np.ndim(solution.weights[name]) == 0  # one factor for all of the source
        relative[name] = mine[counts].mean() if whole and counts.any() else mine
    predicted = {row: float(shift.value) for row, shift in predict(response, relative).items()}
    return _Change(solution, drawn, scale, wanted, predicted)


def _check_rows(name: str, given: Any, rows: Any) -> dict[str, float]:
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{name} must map rows to shifts, at least one of {list(rows)}")
    unknown = [row for row in given if row not in rows]
    if unknown:
        raise ValueError(f"{name} names unknown rows {unknown}; the rows are {list(rows)}")
    for row, value in given.items():
        check_number(f"{name}[{row!r}]", value, minimum=-math.inf)
    return {row: float(value) for row, value in given.items()}


def _check_hold(hold: Any, target: Any, rows: Any) -> dict[str, float]:
    """Row → how far it may rise."""
    if isinstance(hold, str):
        raise TypeError(f"hold must be rows, or a mapping of rows to numbers, got {hold!r}")
    limits = dict(hold) if isinstance(hold, Mapping) else dict.fromkeys(hold, 0.0)
    if not limits:
        return {}
    both = sorted(set(limits) & set(target))
    if both:
        raise ValueError(f"rows may be in target or in hold, got {both} in both")
    limits = _check_rows("hold", limits, rows)
    negative = [row for row, limit in limits.items() if limit < 0]
    if negative:
        raise ValueError(
            f"hold must be at least 0, how far a row may rise, got less for {negative}"
        )
    return limits


def _check_response(response: Any, sources: Mapping[str, Any]) -> Response:
    """What `measure` gave: its probe sets are the sources."""
    if not isinstance(response, Response):
        raise TypeError(f"measure must return a Response, got {type(response).__name__}")
    if set(response.chi) != set(sources):
        raise ValueError(
            f"the probe sets of the response that measure returns must be the sources "
            f"{sorted(sources)}, got {sorted(response.chi)}"
        )
    return response
