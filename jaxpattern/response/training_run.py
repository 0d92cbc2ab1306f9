"""The response of the end of a training run to the weights of its data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key, PyTree, Shaped

from jaxpattern.descent import Descent, check_descent, check_keys
from jaxpattern.losses import first_losses
from jaxpattern.posterior import Minibatch
from jaxpattern.response import trajectory, twins
from jaxpattern.response.problem import check_observables, named
from jaxpattern.response.result import Response, doubts
from jaxpattern.response.seeds import check_ends, over_seeds
from jaxpattern.response.trajectory import Ask, Derivative
from jaxpattern.runtime.checkpoint import Checkpoint
from jaxpattern.runtime.host import Host, host_for
from jaxpattern.runtime.mesh import fetch, loop_bounds, pad_lanes, put, resolve_mesh, take
from jaxpattern.types import Batch, Losses, Params
from jaxpattern.validation import check_count, check_number, is_concrete, num_required, own_streams
from jaxpattern.verdict import warn

Mode = Literal["forward", "reverse", "secant"]
WIDTH = 0.25


def training_response(
    key: Key[Array, "*seeds"],
    loss_fn: Callable[..., Losses],
    params: Params,
    data: Batch,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int,
    observables: Mapping[str, Callable] | Iterable[tuple[str, Callable]],
    sources: Mapping[str, Any] | Iterable[tuple[str, Any]],
    weights: Shaped[Array | np.ndarray, "samples *tokens"] | None = None,
    mode: Mode = "forward",
    width: float | None = None,
    num_snapshots: int | None = None,
    optimizer_state: PyTree[Any] | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    mesh: Mesh | None = None,
) -> Response:
    """The derivative of φ(w_T) after a run of `train` with respect to the weights of its data.

        χ_j = (1/q_j) dφ(w_T)/dρ_j,    nβ = 1

    where ρ_j multiplies the weights that the run has, and q_j is the share of j in them, so that
    weights ρ shift φ(w_T) by nβ Σ_j χ_j q_j (ρ_j − 1) to first order, as everywhere: `group_mean`,
    `solve_weights`, plots and files take it as it is. No posterior is behind it, hence nβ = 1 and
    no temperature. Run, batches and random numbers are those of `train` with the same arguments
    (`weighting="loss"`), to the same bits; means and errors are over seeds.

    Samples of no source keep their weight: shares q sum to 1 over the sources, and weights of mean
    Σ_j q_j ρ_j = 1 leave the rest its share of the data.

    Forwards, one tangent per source runs along, for all observables at once; a column is a source.
    Backwards, one adjoint per observable goes back through the run, for all losses at once; a
    column is a loss, and the run is computed twice. Both hold the same derivative. It is that of
    the loss as autodiff sees it: what kinks do (ReLU) is missed. Loss functions need second
    derivatives; roots in the optimizer have derivative 0 at 0, so that Adam needs no `eps_root`.

    The derivative of a long run may grow without bound. Then it is right for ever smaller changes
    of the weights only; the verdict says so. `mode="secant"` measures what changes of a given
    `width` do: for each source two more runs, with its weights times 1 + δ and 1 − δ,

        dφ/dρ_g ≈ [φ(w_T; 1 + δ) − φ(w_T; 1 − δ)] / 2δ ,

    which is the derivative smoothed over ± δ. It needs no derivative but the run's own gradients,
    sees kinks, and costs two runs per source, where a tangent costs as much.

    `diagnostics` hold, for each row (the worst of all seeds; the first two not of secants):

    * `"growth"`: how many times a perturbation of the parameters grew along the run: a random one
      of the start forwards, the adjoint backwards. About 1 where the run contracts;
    * `"horizon"`: the first step at which it had grown past 30 (backwards: counted from the end),
      or the number of steps;
    * `"skipped"`: steps that were left out, `"groups"`: seeds.

    Args:
        key: a typed key, or keys `[S]` for S seeds, as in `train`. One seed has no error.
        loss_fn: pure function of parameters and batch that returns `[B]` or `[B, T]` losses.
        params: where training starts; with S keys every leaf has a leading axis S.
        data: pytree of arrays with one leading sample axis.
        optimizer: an optax gradient transformation.
        num_steps: steps of the run.
        batch_size: samples of a step.
        observables: name → function of the parameters that returns a scalar, or `[K]` for rows
            `name/0` …
        sources: name → indices of samples of `data`; none is in two.
        weights: ρ of the shape of the losses; zero excludes. None is ρ = 1.
        mode: `"forward"`, `"reverse"` or `"secant"`.
        width: δ of secants, at most 1; None: 0.25.
        num_snapshots: states of the run that are kept for the way back; those between two are
            computed again, and held while they are needed. None: the root of `num_steps`.
        optimizer_state: that of `optimizer` to start from.
        progress: show a progress line. Without it this is one pure function, to be vmapped.
        checkpoint: a folder, or a `Checkpoint`, where the run is kept.
        mesh: where it runs: seeds over `chain`, samples of a batch over `data`.

    Returns:
        A `Response`, whose `mean` is φ(w_T), `ess` the number of seeds, and `rhat` not known.

    Raises:
        CheckpointError: the folder belongs to another run, or cannot be used.
        DivergenceError: φ(w_T) is not finite in any seed, or its derivative grew out of range.
        ValueError: the derivative is not finite although the run is; or, as TypeError: an
            argument does not fit.

    Warns:
        UnreliableWarning: the verdict speaks against a row.

    References:
        Murfet, "Patterning flow"; Engstrom et al. 2025, arXiv 2503.13751 (metagradients).
    """
    seeds = check_keys(key)
    key = own_streams(key)
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    mesh = resolve_mesh(mesh)
    params, data, weights, given = take((params, data, weights, optimizer_state))
    run = Descent(
        loss_fn, optimizer, num_steps, batch_size, "loss", None, mesh, num_required(loss_fn) == 3
    )
    data = jax.tree.map(jnp.asarray, data)
    rho = check_descent(run, seeds, params, data, weights, given)
    lanes = (key, params, given)
    if seeds is None:
        lanes = (key[None], *jax.tree.map(lambda x: jnp.asarray(x)[None], (params, given)))
    one = jax.tree.map(lambda x: x[0], lanes[1])
    observables = named("observables", observables)
    if not observables:
        raise ValueError("observables is empty; give at least one")
    rows, functions = check_observables(observables, one)
    assert rows is not None
    assert functions is not None
    places = check_sources(named("sources", sources), rho)
    number = len(rows) if mode == "reverse" else len(places)
    delta = _width(width, mode)
    length = _segment_length(num_steps, num_snapshots, mode)
    ask = Ask(Minibatch(data, rho), functions, jax.device_put(_source_of(places, len(rho))))
    with host_for(
        "training_response", checkpoint=checkpoint, mesh=mesh, progress=progress,
        losses=partial(first_losses, run.losses, one, data),
        key=key, params=params, data=data, weights=rho, observables=functions,
        sources=ask.source, optimizer_state=given, mode=mode, length=length, width=delta,
        **run.arguments,
    ) as host:  # fmt: skip
        ask = put(ask, mesh)
        lanes = put(pad_lanes(lanes, mesh), mesh, "chain")
        sweeps: dict[str, Callable[..., Derivative]] = {
            "forward": _forwards,
            "reverse": partial(_backwards, length=length),
            "secant": partial(_twins, width=put(jax.device_put(np.float32(delta)), mesh)),
        }
        found = sweeps[mode](host, run, ask, lanes, seeds or 1, number)
        found = fetch(jax.tree.map(lambda x: x[: seeds or 1], found), mesh)
    alive = check_ends(found, rows)
    response = _assemble(
        found, alive, rho, places, run, rows=rows, mode=mode, observables=observables
    )
    if any(doubts(response)):
        warn(response.verdict)
    return response


def _width(width: float | None, mode: str) -> float:
    """δ of twin runs."""
    if width is None:
        return WIDTH if mode == "secant" else 0.0
    check_number("width", width, minimum=0.0, exclusive=True)
    if mode != "secant":
        raise ValueError(f"width is for mode='secant'; mode={mode!r} differentiates")
    if width > 1:
        raise ValueError(f"width must be at most 1, where weights are 0, got {width:g}")
    return float(width)


def _segment_length(num_steps: int, num_snapshots: int | None, mode: str) -> int:
    """Steps of a segment of the way back."""
    if num_snapshots is None:
        return max(1, math.isqrt(num_steps))
    check_count("num_snapshots", num_snapshots, minimum=1)
    if mode != "reverse":
        raise ValueError(f"num_snapshots is for mode='reverse'; mode={mode!r} keeps no states")
    return -(-num_steps // min(num_snapshots, num_steps))


def check_sources(sources: dict[str, Any], rho: Array) -> dict[str, Int[np.ndarray, " rows"]]:
    """Indices of each source: whole numbers of samples that count, none twice."""
    if not sources:
        raise ValueError("sources is empty; give at least one")
    places: dict[str, np.ndarray] = {}
    owner: dict[int, str] = {}
    for name, given in sources.items():
        index = np.asarray(given)
        if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
            raise TypeError(
                f"sources[{name!r}] must be indices of samples, [n] integers, got "
                f"{index.dtype}{list(index.shape)}"
            )
        if not len(index) or index.min() < 0 or index.max() >= len(rho):
            span = f"{index.min()} to {index.max()}" if len(index) else "none"
            raise ValueError(
                f"sources[{name!r}] must be indices from 0 to {len(rho) - 1}, got {span}"
            )
        for i in index.tolist():
            if i in owner:
                raise ValueError(
                    f"a sample may be in one source once, got sample {i} in {owner[i]!r} and "
                    f"{name!r}"
                )
            owner[i] = name
        if is_concrete(rho):
            mine = np.asarray(rho)[index]
            if mine.min() < 0:
                raise ValueError(f"weights must not be negative, as those of sources[{name!r}] are")
            if not mine.sum() > 0:
                raise ValueError(f"sources[{name!r}] must hold samples whose weights are not all 0")
        places[name] = index
    return places


def _source_of(places: Mapping[str, np.ndarray], num_samples: int) -> Int[np.ndarray, " samples"]:
    """Number of the source that each sample is in, −1 for none."""
    source = np.full(num_samples, -1, np.int32)
    for i, index in enumerate(places.values()):
        source[index] = i
    return source


def _forwards(
    host: Host, run: Descent, ask: Ask, lanes: tuple, seeds: int, number: int
) -> Derivative:
    key = lanes[0]
    return host.loop(
        "response", run.num_steps, partial(trajectory.start_forward, run, number, *lanes),
        lambda state, a, b: trajectory.advance_forward(
            run, ask, state, key, loop_bounds(a, b, host.mesh)
        ),
        final=partial(trajectory.read_forward, run, ask), lanes=seeds,
    )  # fmt: skip


def _backwards(
    host: Host, run: Descent, ask: Ask, lanes: tuple, seeds: int, number: int, *, length: int
) -> Derivative:
    key, segments = lanes[0], -(-run.num_steps // length)
    kept = host.loop(
        "run", segments, partial(trajectory.start_kept, run, segments, *lanes[1:]),
        lambda state, a, b: trajectory.advance_kept(
            run, length, ask, state, key, loop_bounds(a, b, host.mesh)
        ),
        lanes=seeds, steps=lambda i: min(i * length, run.num_steps),
    )  # fmt: skip
    kept = put(pad_lanes(kept, host.mesh), host.mesh, "chain")
    state = host.loop(
        "way back", segments, partial(trajectory.start_backward, run, ask, kept),
        lambda state, a, b: trajectory.advance_backward(
            run, length, ask, kept.starts, state, key, bounds=loop_bounds(a, b, host.mesh)
        ),
        lanes=seeds, steps=lambda i: min(i * length, run.num_steps),
    )  # fmt: skip
    skipped = kept.skipped[: state.broken.shape[0]]
    return Derivative(state.phi, state.slope, state.norms, state.broken, skipped)


def _twins(
    host: Host, run: Descent, ask: Ask, lanes: tuple, seeds: int, number: int, *, width: Array
) -> Derivative:
    key = lanes[0]
    return host.loop(
        "response", run.num_steps, partial(twins.start_twins, run, number, *lanes),
        lambda state, a, b: twins.advance_twins(
            run, ask, width, state, key, loop_bounds(a, b, host.mesh)
        ),
        final=partial(twins.read_twins, run, ask, width), lanes=seeds,
    )  # fmt: skip


def _assemble(
    found: Derivative,
    alive: Bool[Array, " seeds"],
    rho: Array,
    places: dict[str, np.ndarray],
    run: Descent,
    *,
    rows: tuple[str, ...],
    mode: Mode,
    observables: dict[str, Callable],
) -> Response:
    """The response of all seeds."""
    grouped, seeds = mode != "reverse", len(found.phi)
    order = {name: np.int32(i) for i, name in enumerate(places)}
    all_seeds = over_seeds(found, alive, rho, places, order, grouped=grouped)
    estimates = all_seeds.estimates
    shapes = {name: (len(x), *rho.shape[1:]) for name, x in places.items()}
    cost = _cost(run, seeds, len(places) if grouped else len(rows), mode, observables)

    def ordered(values: dict[str, Array]) -> dict[str, Array]:
        return {name: values[name] for name in places}  # jit sorts them

    return Response(
        chi=ordered(estimates.chi),
        stderr=ordered(estimates.stderr),
        halves=ordered(estimates.halves) if seeds > 1 else {},
        batches=ordered(estimates.batches),
        mass=ordered(all_seeds.mass),
        nbeta=jax.device_put(np.ones((), rho.dtype)),
        mean=all_seeds.mean,
        mean_stderr=all_seeds.mean_stderr,
        rhat=all_seeds.rhat,
        ess=estimates.diagnostics["groups"],
        diverged=all_seeds.diverged,
        diagnostics=estimates.diagnostics,
        rows=rows,
        cost=cost,
        estimator=f"training run ({mode}, {run.num_steps} steps, {seeds} seeds)",
        num_samples=sum(math.prod(shape) for shape in shapes.values()),
        loss_shapes=tuple(shapes.items()) if grouped else (),
    )


def _cost(
    run: Descent, seeds: int, number: int, mode: Mode, observables: dict[str, Callable]
) -> float:
    """Gradient equivalents: products of one batch that share a gradient count 1 + 2 each."""
    observed = sum(getattr(phi, "num_samples", 0) for phi in observables.values())
    if mode == "secant":
        each, after = 1 + 2 * number, observed * (1 + 2 * number) / 3
    elif mode == "forward":  # the perturbation of the start is one more product
        each, after = 1 + 2 * (number + 1), observed * (1 + number) / 3
    else:  # the run, the run again, and the way back
        each, after = 3 + 2 * number, float(observed)
    return seeds * (run.num_steps * run.batch_size * each + after)
