"""Results as others read them: xarray, ArviZ, pandas, files of weights, data loaders.

It is optional: `pip install "jaxpattern[export]"` brings xarray, ArviZ's containers and pandas.
Files of weights, columns and probabilities need none of them. The results themselves have these
functions as methods: `response.to_xarray()`, `trace.to_arviz()`, `solution.to_dataframe()`,
`solution.write("weights.json")`.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxpattern.chains.divergence import lost_chains
from jaxpattern.inversion.intervention import Intervention
from jaxpattern.response.influence_result import Influence
from jaxpattern.response.result import Response
from jaxpattern.results import UNITS, origin
from jaxpattern.validation import is_concrete

if TYPE_CHECKING:
    import pandas
    import xarray

_LOSS_AXES = ("sample", "token")


def to_xarray(response: Response) -> xarray.Dataset:
    """The response as a Dataset over `row`, `probe`, `sample` and `token`.

    `chi`, `stderr` and `mass` have the axes of the losses: `sample` where there is one loss per
    sample, `sample` and `token` where there is one per token, neither for grouped columns. Where
    probe sets differ in length the shorter are filled up with NaN (with 0 in `mass`), which the
    means of xarray leave out; losses per sample beside losses per token stand at token 0. A column
    that is excluded has mass 0 and χ = 0, as in the response. Halves are left out; `jp.save` keeps
    everything.

    Args:
        response: of one posterior.

    Returns:
        A Dataset; variables have `units`, and its attributes say where the numbers come from.

    Raises:
        ImportError: xarray is not installed.
        TypeError, ValueError: the response is being traced, or is a stack of several.
    """
    xarray = _need("xarray", "to_xarray")
    _check_one("response", response, response.nbeta)
    columns = response.columns
    rows, (axes, full) = (len(response.rows),), loss_axes(columns.shapes)

    def filled(parts: Mapping[str, Array], lead: tuple[int, ...], fill: float) -> np.ndarray:
        named = zip(columns.names, columns.shapes, strict=True)
        each = [fill_up(parts[n], (*lead, *_deep(s, full)), (*lead, *full), fill) for n, s in named]
        return np.stack(each, len(lead))

    found: dict[str, tuple[Sequence[str], np.ndarray]] = {
        "chi": (("row", "probe", *axes), filled(response.chi, rows, np.nan)),
        "stderr": (("row", "probe", *axes), filled(response.stderr, rows, np.nan)),
        "mass": (("probe", *axes), filled(response.mass, (), 0.0)),
        "nbeta": ((), numbers(response.nbeta)),
        "diverged": (("row", "chain"), np.asarray(response.diverged)),
    }
    for name in ("mean", "mean_stderr", "rhat", "ess"):
        found[name] = (("row",), numbers(getattr(response, name)))
    if set(response.batches) == set(columns.names):
        batches = np.stack([numbers(response.batches[name]) for name in columns.names], -1)
        found["batches"] = (("batch", "row", "probe"), batches)
    for name, values in response.diagnostics.items():
        rest = (f"{name}_{i}" for i in range(1, np.ndim(values)))
        found[f"diagnostic_{name}"] = (("row", *rest), numbers(values))
    units = UNITS[Response]
    coords: dict[str, Any] = {"row": list(response.rows), "probe": list(columns.names)}
    coords |= {axis: np.arange(size) for axis, size in zip(axes, full, strict=True)}
    return xarray.Dataset(
        {n: (d, x, {"units": units[n]} if n in units else {}) for n, (d, x) in found.items()},
        coords,
        {
            "estimator": response.estimator,
            "num_samples": response.num_samples,
            "cost": float(response.cost),
            "cost_units": units["cost"],
            "verdict": response.verdict,
            **origin(),
        },
    )


def influence_to_xarray(influence: Influence) -> xarray.Dataset:
    """Influences as a Dataset over `query`, `query_sample`, `query_token`, `probe`, `sample`, …

    As `to_xarray`: shorter sets are filled up with NaN, their masses with 0. The health of the
    chains is over `set`.

    Raises:
        ImportError: xarray is not installed.
        TypeError, ValueError: it is being traced, or is a stack of several.
    """
    xarray = _need("xarray", "to_xarray")
    _check_one("influence", influence, influence.nbeta)
    masses = influence.query_mass, influence.probe_mass
    (rows, row_sizes), (axes, sizes) = (
        loss_axes([x.shape for x in mass.values()]) for mass in masses
    )
    rows = tuple(f"query_{axis}" for axis in rows)

    def filled(parts: Mapping[str, Mapping[str, Array]]) -> np.ndarray:
        def one(query: str, probe: str) -> np.ndarray:
            shape = _deep(masses[0][query].shape, row_sizes) + _deep(masses[1][probe].shape, sizes)
            return fill_up(parts[query][probe], shape, (*row_sizes, *sizes), np.nan)

        return np.stack([np.stack([one(q, p) for p in masses[1]], len(rows)) for q in masses[0]])

    dims = ("query", *rows, "probe", *axes)
    found: dict[str, tuple[Sequence[str], np.ndarray]] = {
        "influence": (dims, filled(influence.influence)),
        "stderr": (dims, filled(influence.stderr)),
        "query_mass": (dims[: 1 + len(rows)], _stacked(masses[0], row_sizes)),
        "probe_mass": (dims[1 + len(rows) :], _stacked(masses[1], sizes)),
        "nbeta": ((), numbers(influence.nbeta)),
        "diverged": (("set", "chain"), np.asarray(influence.diverged)),
    }
    for name in ("mean", "mean_stderr", "rhat", "ess"):
        found[name] = (("set",), numbers(getattr(influence, name)))
    units = UNITS[Influence] | {"influence": "none" if influence.correlation else "loss² (nats²)"}
    lengths = zip((*rows, *axes), (*row_sizes, *sizes), strict=True)
    coords: dict[str, Any] = {
        "query": list(masses[0]), "probe": list(masses[1]), "set": list(influence.rows),
        **{axis: np.arange(size) for axis, size in lengths},
    }  # fmt: skip
    return xarray.Dataset(
        {n: (d, x, {"units": units[n]} if n in units else {}) for n, (d, x) in found.items()},
        coords,
        {
            "form": influence.form,
            "cost": float(influence.cost),
            "cost_units": units["cost"],
            "verdict": influence.verdict,
            **origin(),
        },
    )


def _stacked(parts: Mapping[str, Array], full: tuple[int, ...]) -> np.ndarray:
    return np.stack([fill_up(x, _deep(x.shape, full), full, 0.0) for x in parts.values()])


def loss_axes(shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names of the axes that hold losses of all these shapes, and their lengths."""
    depth = max(map(len, shapes))
    full = [_deep(shape, (1,) * depth) for shape in shapes]
    return _LOSS_AXES[:depth], tuple(map(max, zip(*full, strict=True)))


def fill_up(values: Any, shape: tuple[int, ...], full: tuple[int, ...], fill: float) -> np.ndarray:
    """Numbers seen as of one shape, filled up to another."""
    x = numbers(values).reshape(shape)
    missing = [(0, n - m) for n, m in zip(full, shape, strict=True)]
    return np.pad(x, missing, constant_values=fill) if missing else x


def _deep(shape: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with as many axes as the full one."""
    return (*shape, *(1,) * (len(full) - len(shape)))


def to_arviz(trace: PyTree[Array | np.ndarray]) -> xarray.DataTree:
    """Traces as ArviZ takes them: a DataTree whose group `posterior` has them as variables.

    In float64. Leaves of a tree are named by their path, with dots. Chains that were lost are left
    out, as in every estimate of this package; the coordinate `chain` says which remain.

    Args:
        trace: what `jp.sample` returned, or any pytree of arrays `[chain, draw, ...]`.

    Returns:
        A DataTree for `arviz_stats.rhat`, `.ess`, `.summary` and the plots of ArviZ.

    Raises:
        ImportError: arviz-base is not installed.
        TypeError, ValueError: these are no traces.
    """
    arviz_base = _need("arviz_base", "to_arviz")
    leaves = jax.tree_util.tree_leaves_with_path(trace)
    named: dict[str, np.ndarray] = {}
    for path, leaf in leaves:
        simple = jax.tree_util.keystr(path, simple=True, separator=".")
        name = simple.replace("/", ".") or "trace"
        if not is_concrete(leaf):
            raise TypeError(f"trace has no numbers under jit, vmap or grad: {name}")
        if name in named or name in ("chain", "draw"):
            raise ValueError(f"trace needs names that differ, also from chain and draw: {name}")
        # In float32 the folded ranks of ArviZ's R-hat round: 1e-4 off.
        named[name] = np.asarray(leaf).astype(np.promote_types(_kind(leaf), np.float64))
    sizes = {x.shape[:2] for x in named.values()}
    if len(sizes) != 1 or len(*sizes) != 2:
        raise ValueError(
            "trace must have leaves [chain, draw, ...] of the same chains and draws, got "
            f"{ {name: list(x.shape) for name, x in named.items()} }"
        )
    lost = lost_chains(named)
    return arviz_base.from_dict(
        {"posterior": {name: x[~lost] for name, x in named.items()}},
        coords={"chain": np.flatnonzero(~lost)},
        attrs={"posterior": {"lost_chains": np.flatnonzero(lost).tolist(), **origin()}},
    )


def to_dataframe(solution: Intervention) -> pandas.DataFrame:
    """Weights as a table with a line for each column of the response.

    Args:
        solution: what `solve_weights` returned.

    Returns:
        A DataFrame of `probe`, `sample` and `token` where columns are losses, `weight` (ρ, 1 is
        what the loss weighs now), `share` (q, of the data) and `share_then` (qρ / Σqρ).

    Raises:
        ImportError: pandas is not installed.
        TypeError, ValueError: the solution is being traced, or is a stack of several.
    """
    pandas = _need("pandas", "to_dataframe")
    _check_one("solution", solution, solution.reached)
    axes = loss_axes(solution.columns.shapes)[0]
    parts = []
    for name in solution.columns.names:
        weight, share = numbers(solution.weights[name]), numbers(solution.mass[name])
        index = np.indices(weight.shape).reshape(weight.ndim, weight.size)
        places = {
            axis: pandas.array(index[i] if i < len(index) else [None] * weight.size, dtype="Int64")
            for i, axis in enumerate(axes)
        }
        values = {"weight": weight.reshape(-1), "share": share.reshape(-1)}
        parts.append(pandas.DataFrame({"probe": [name] * weight.size, **places, **values}))
    table = pandas.concat(parts, ignore_index=True)
    then = table["share"] * table["weight"]
    return table.assign(share_then=then / then.sum())


def write_weights(path: str | os.PathLike[str], solution: Intervention) -> None:
    """Weights of every loss in a file that any trainer reads: `.json` or `.npz`, by its name.

    They are those of `Intervention.over`, by probe set: the loss to train on is Σρℓ / Σρ over all
    of them, and their mean is 1. `.npz` holds an array per probe set, under its name. `.json` holds
    `weights` (lists), what they mean, and where they come from.

    Args:
        path: the file, replaced if it exists.
        solution: what `solve_weights` returned.

    Raises:
        ValueError: another kind of file; the solution is a stack, or does not know the shapes of
            its losses.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"path must end in .json or .npz, got {path.name!r}")
    weights = {name: numbers(x) for name, x in solution.by_probe().items()}
    if path.suffix == ".json":
        lists = {name: x.tolist() for name, x in weights.items()}
        about = "weights of losses, mean 1; train on sum(w * loss) / sum(w)"
        content = {"weights": lists, "meaning": about, "provenance": origin()}
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    # Not by numpy.savez, whose own arguments (`file`) would be forbidden names.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, x in weights.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, x, allow_pickle=False)
            archive.writestr(f"{name}.npy", stream.getvalue())


def add_weights(dataset: Any, solution: Intervention, column: str = "weight") -> Any:
    """A Hugging Face dataset with the weights as one more column.

    Args:
        dataset: a `datasets.Dataset` of all samples, probe set after probe set in the order of
            the response, or a `DatasetDict` whose splits are the probe sets.
        solution: what `solve_weights` returned.
        column: what the column is called: a number per sample, or a list of one per token.

    Returns:
        The dataset with the column; the one that is given stays as it is.

    Raises:
        TypeError: it is no such dataset.
        ValueError: it has other splits, or another number of samples.
    """
    weights = {name: numbers(x) for name, x in solution.by_probe().items()}
    if isinstance(dataset, Mapping):
        if set(dataset) != set(weights):
            raise ValueError(
                f"dataset must have the splits {sorted(weights)}, got {sorted(dataset)}"
            )
        make: Any = type(dataset)
        return make({n: _with_column(split, weights[n], column) for n, split in dataset.items()})
    flat = [row for x in weights.values() for row in x]
    return _with_column(dataset, flat, column)


def _with_column(dataset: Any, weights: Any, column: str) -> Any:
    if not hasattr(dataset, "add_column"):
        raise TypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}")
    if len(dataset) != len(weights):
        raise ValueError(
            f"dataset must have the {len(weights)} samples of the response, got {len(dataset)}"
        )
    return dataset.add_column(column, [np.asarray(row).tolist() for row in weights])


def probabilities(
    weights: Float[Array | np.ndarray, "samples *tokens"],
) -> Float[np.ndarray, " samples"]:
    """How often to draw each sample, Σ_t ρ_jt / Σ ρ, for loaders that draw with replacement.

    As `jp.train(weighting="sampling")` draws. Samples drawn so are trained on with equal weights;
    where tokens of one sample differ in weight, their loss keeps ρ_jt / Σ_t ρ_jt inside it.

        rho = solution.over(probes)
        torch.utils.data.WeightedRandomSampler(export.probabilities(rho), num_samples=len(rho))

    Args:
        weights: ρ, such as `solution.over(probes)`.

    Returns:
        float64, of sum 1.

    Raises:
        ValueError: a sample has a negative weight, which no loader can draw.
    """
    rho = np.asarray(weights, np.float64)
    total = rho.reshape(len(rho), -1).sum(axis=1)
    if not (total >= 0).all() or not total.sum() > 0:
        raise ValueError(
            f"weights must not be negative to be drawn by, got {total.min():.3g} among them: solve "
            "with method=jp.entropic() or jp.box(), or train on Σρℓ / Σρ"
        )
    return total / total.sum()


def numbers(values: Any) -> np.ndarray:
    """NumPy numbers of a type that every reader knows."""
    x = np.asarray(values)
    return x.astype(_kind(x), copy=False)


def _kind(x: Any) -> np.dtype[Any]:
    """Its type, or float32 for those that NumPy does not know, such as bfloat16."""
    dtype = np.dtype(x.dtype)
    return dtype if dtype.isbuiltin == 1 else np.dtype(np.float32)


def _check_one(name: str, result: Any, scalar: Any) -> None:
    if not all(map(is_concrete, jax.tree.leaves(result))):
        raise TypeError(f"{name} has no numbers under jit, vmap or grad")
    if np.ndim(scalar):
        raise ValueError(
            f"{name} is a stack of {np.shape(scalar)} results; take one of them first, such as "
            f"jax.tree.map(lambda x: x[0], {name})"
        )


def _need(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{what} needs {module}, which is optional: pip install "jaxpattern[export]"'
        ) from error
