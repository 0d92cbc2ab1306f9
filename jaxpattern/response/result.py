"""The response matrix as it is returned: χ, its error, and what is needed to trust both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float, Shaped

from jaxpattern import tables, verdict
from jaxpattern.pytrees import register_pytree
from jaxpattern.response.columns import Columns
from jaxpattern.response.shares import mean_stderr
from jaxpattern.validation import check_names, check_number, is_concrete

if TYPE_CHECKING:
    import xarray


@register_pytree
@dataclass(frozen=True, eq=False)
class Response:
    """The response matrix χ ∈ R^{K×N}, with errors; columns are kept by probe set.

    A column is one loss of a probe set, so `chi[name]` has shape `[K, *losses.shape]`; after
    `group_mean` a column is a whole probe set and `chi[name]` has shape `[K]`.

    Attributes:
        rows: names of the K rows: the observable, the component, or `component/observable`.
        chi: probe set → χ, in units of observable times loss. Holds no factor nβ.
        stderr: probe set → standard error of χ, same shape.
        halves: probe set → χ from two disjoint halves of the draws, `[2, K, ...]`.
        batches: probe set → estimates of the probe set's mean χ from the G batches of draws,
            `[G, K]`, NaN for batches of diverged chains. Their spread is the standard error of a
            group mean.
        mass: probe set → share q of the data that a column stands for, in proportion to the base
            weights ρ₀ where there are any; 0 excludes a column, which may then hold anything.
            Sums to 1 over all columns: weights ρ on top of the base weights, of mean
            Σ_j q_j ρ_j = 1, shift μ by nβ Σ_j χ_j q_j (ρ_j − 1).
        nbeta: inverse temperature of the posterior; 1 for the response of a training run, whose χ
            is the derivative itself over q.
        mean: ⟨φ⟩ of each row, `[K]`.
        mean_stderr: its standard error, `[K]`.
        rhat: rank-normalized split R-hat of each row's observable, `[K]`.
        ess: effective sample size of each row's observable, over all chains, `[K]`.
        diverged: which chains were lost, `[K, chains]`; they count in no estimate.
        estimator: which estimator, with the settings it chose.
        diagnostics: what an estimator says about itself, arrays with a leading row axis.
        cost: gradient equivalents spent (one forward and backward pass of one sample).
        num_samples: number of columns before any grouping.
        base: probe set → mass of each of its losses, kept by `group_mean`; empty where the columns
            are the losses, or where it is not known.
        loss_shapes: pairs of a probe set and the shape of its losses, kept by `group_mean`;
            empty where the columns are the losses, or where the shapes are not known.
    """

    # What vmap returns is a stack of responses, with leading axes everywhere.
    chi: dict[str, Float[Array, "..."]]
    stderr: dict[str, Float[Array, "..."]]
    halves: dict[str, Float[Array, "..."]]
    batches: dict[str, Float[Array, "*stack batches rows"]]
    mass: dict[str, Float[Array, "..."]]
    nbeta: Float[Array, "*stack"]
    mean: Float[Array, "*stack rows"]
    mean_stderr: Float[Array, "*stack rows"]
    rhat: Float[Array, "*stack rows"]
    ess: Float[Array, "*stack rows"]
    diverged: Bool[Array, "*stack rows chains"]
    rows: tuple[str, ...] = field(metadata={"static": True})
    cost: float = field(metadata={"static": True})
    num_samples: int = field(metadata={"static": True})
    estimator: str = field(default="", metadata={"static": True})
    diagnostics: dict[str, Shaped[Array, "..."]] = field(default_factory=dict)
    base: dict[str, Float[Array, "..."]] = field(default_factory=dict)
    loss_shapes: tuple[tuple[str, tuple[int, ...]], ...] = field(
        default=(), metadata={"static": True}
    )

    @property
    def columns(self) -> Columns:
        """Names and shapes of the columns; of each member, where this is a stack of responses."""
        names = tuple(self.chi)
        shapes = tuple(self.mass[name].shape[jnp.ndim(self.nbeta) :] for name in names)
        columns = Columns(names, shapes)
        known = dict(self.loss_shapes) if columns.grouped else dict(zip(names, shapes, strict=True))
        if set(known) != set(names):
            return columns
        return replace(columns, loss_shapes=tuple(known[name] for name in names))

    def interval(self, level: float = 0.95) -> Interval:
        """χ̂ ± t · stderr, with Student's t for as many groups of draws as the errors come from.

        Args:
            level: the share of intervals that are to hold χ.
        """
        factor = t_factor(level, self.diagnostics.get("groups", np.inf))

        def width(x: Array) -> Array:
            rows = np.broadcast_to(factor, len(self.rows)).reshape(-1, *(1,) * (x.ndim - 1))
            return x * rows.astype(x.dtype)

        return Interval(
            low={name: x - width(self.stderr[name]) for name, x in self.chi.items()},
            high={name: x + width(self.stderr[name]) for name, x in self.chi.items()},
        )

    @property
    def verdict(self) -> str:
        """Whether the rows can be trusted, in words."""
        return verdict.say("χ", list(zip(self.rows, doubts(self), strict=True)))

    def to_xarray(self) -> xarray.Dataset:
        """A Dataset over row, probe, sample and token; see `export.to_xarray`."""
        from jaxpattern import export

        return export.to_xarray(self)

    def __str__(self) -> str:
        return tables.text(describe, self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.html(describe, self)


class Interval(NamedTuple):
    """The ends of an interval around each χ; probe set → array like χ."""

    low: dict[str, Any]
    high: dict[str, Any]


def t_factor(level: float, groups: Any) -> np.ndarray:
    """Standard errors to either side of an estimate from so many groups of draws.

    Raises:
        ValueError: the level is no share.
    """
    check_number("level", level, minimum=0.0, exclusive=True)
    if not level < 1:
        raise ValueError(f"level must be below 1, got {level:g}")
    freedom = np.maximum(np.asarray(groups, np.float64) - 1, 1)
    return np.asarray(scipy.special.stdtrit(freedom, (1 + level) / 2))


def doubts(response: Any) -> list[list[str]]:
    """What speaks against each row of a `Response`, or of what else has its rows and diagnostics.

    Nothing is known of one that is being traced.
    """
    if not is_concrete(response.mean) or np.ndim(response.nbeta):
        return [[] for _ in response.rows]
    known = {name: np.asarray(x, np.float64) for name, x in response.diagnostics.items()}
    nan = np.full(len(response.rows), np.nan)
    of = {name: known.get(name, nan) for name in _LOOKED_AT}
    rhat, ess = np.asarray(response.rhat), np.asarray(response.ess)
    found = []
    for k in range(len(response.rows)):
        if "skipped" in known:  # of training runs, which have no chains
            found.append(
                verdict.chaotic(float(of["growth"][k]), float(of["horizon"][k]))
                + verdict.left_out(float(of["skipped"][k]))
            )
            continue
        here = verdict.unsettled(
            rhat=float(rhat[k]), ess=float(ess[k]),
            spread=float(of["spread"][k]), drift=float(of["drift"][k]),
            size=float(of["drift_size"][k]), groups=float(of["groups"][k]),
        )  # fmt: skip
        if of["remainder"][k] > verdict.REMAINDER:
            here.append(
                f"{of['remainder'][k]:.0%} of the adjoint is left at the end of its window, which "
                "is as long as the chain or as you set it: χ is incomplete. A longer burn-in, a "
                "larger window or a larger step"
            )
        slope, error = of["slope"][k], of["slope_error"][k]
        if verdict.disagree(slope, error, of["groups"][k]):
            here.append(
                f"the covariance of the same draws is {slope:.2g} ± {error:.1g} times χ: the loss "
                "jumps, the chains hop over barriers, or small mini-batches heat them. Compare "
                "with covariance(), and with a larger batch_size"
            )
        here += verdict.before({name: of[name][k] for name in verdict.PILOT})
        if of["residual"][k] > verdict.REMAINDER:
            here.append("nβ H + γ is not positive definite, or the solves did not converge")
        found.append(here)
    return found


_LOOKED_AT = (
    "spread", "drift", "drift_size", "remainder", "slope", "slope_error", "groups",
    "residual", "growth", "horizon", "skipped", *verdict.PILOT,
)  # fmt: skip


def group_mean(response: Response, shares: Mapping[str, float] | None = None) -> Response:
    """The data-mixture response: one column per probe set, χ_g = Σ_{z∈g} q_z χ_z / Σ_{z∈g} q_z.

    Columns of mass 0 (excluded losses, such as padding) count nowhere, whatever they hold.

    Args:
        response: a response matrix with one column per loss.
        shares: probe set → its share of the data, for probe sets whose sizes do not mirror the
            data; normalized to sum 1. By default the mass the columns already carry.

    Returns:
        A `Response` whose `chi[name]` is `[K]` and `mass[name]` a scalar. Standard errors come
        from the spread of the batches: columns of one chain are correlated, so they do not
        follow from the standard errors of the columns.

    Raises:
        ValueError: `shares` names other probe sets, or is not positive; the response holds no
            batches.
    """
    columns = response.columns
    if set(response.batches) != set(columns.names):
        raise ValueError(
            "response.batches must hold every probe set, as the errors of group means come from "
            f"them, got {sorted(response.batches)} of {sorted(columns.names)}"
        )
    if shares is not None:
        check_names("shares", shares, columns.names)
        for name, value in shares.items():
            check_number(f"shares[{name!r}]", value, minimum=0.0, exclusive=True)

    halves = response.halves if set(response.halves) == set(columns.names) else None
    grouped = _grouped(response.chi, halves, response.batches, response.mass, columns=columns)
    # `jit` hands dictionaries back sorted.
    chi, halves, stderr, share = (dict(zip(columns.names, x, strict=False)) for x in grouped)
    if shares is not None:
        norm = sum(shares.values())
        share = {name: jnp.asarray(shares[name] / norm, share[name].dtype) for name in share}
    return replace(
        response,
        chi=chi,
        stderr=stderr,
        halves=halves,
        mass=share,
        base=response.base if columns.grouped else response.mass,
        loss_shapes=tuple(zip(columns.names, columns.loss_shapes or (), strict=False)),
    )


@partial(jax.jit, static_argnames="columns")
def _grouped(
    chi: dict[str, Array],
    halves: dict[str, Array] | None,
    batches: dict[str, Array],
    mass: dict[str, Array],
    *,
    columns: Columns,
) -> tuple[list[Array], ...]:
    """Of each probe set: χ, χ of halves of the draws, the error of χ from the batches, the mass."""
    flat = columns.join(mass)

    def mean(values: dict[str, Array] | None) -> list[Array]:
        if values is None:
            return []
        return list(columns.group().split(columns.mean(columns.join(values), flat)).values())

    stderr = [mean_stderr(batches[name]) for name in columns.names]
    return mean(chi), mean(halves), stderr, [jnp.sum(mass[name]) for name in columns.names]


def describe(response: Response) -> tables.Page:
    """What a response says of itself: the effect of each probe set on each row, with errors."""
    columns = response.columns
    kind = "one per probe set" if columns.grouped else "one per loss"
    title = (
        f"Response of {len(response.rows)} rows to {len(columns.names)} probe sets "
        f"({columns.size} columns, {kind})"
    )
    if response.estimator:
        title += f", by {response.estimator}"
    tables.refuse_unreadable(title, response, response.nbeta)
    effect, error = effects(response)
    header = ["row", "⟨φ⟩", *columns.names, "R-hat", "ESS"]
    rhat, ess = np.asarray(response.rhat), np.asarray(response.ess)
    phi, phi_error = np.asarray(response.mean), np.asarray(response.mean_stderr)
    body = []
    for k, row in enumerate(response.rows):
        mean = tables.measured(float(phi[k]), float(phi_error[k]))
        cells = [tables.measured(*pair) for pair in zip(effect[k], error[k], strict=True)]
        health = [f"{rhat[k]:.3f}", f"{ess[k]:.0f}"]
        body.append([row, mean, *cells, *health])
    notes = [
        "Under a probe set: the change of ⟨φ⟩, in the units of φ, per unit of its weight ρ (1 → 2) "
        "to first order, nβ·q·χ ± one standard error. Negative: more weight lowers ⟨φ⟩.",
        f"nβ = {float(response.nbeta):g}; cost {response.cost:.3g} gradient equivalents.",
    ]
    lost = int(np.asarray(response.diverged).any(axis=-1).sum())
    if lost:
        notes.append(f"Chains diverged in {lost} rows; they count in no number.")
    notes.append(f"Verdict: {response.verdict}.")
    return tables.Page(title, (tables.Grid(header, body),), tuple(notes))


def effects(response: Response) -> tuple[np.ndarray, np.ndarray]:
    """nβ q χ of each row and probe set, `[K, G]`, and its error; NaN where that is not known.

    As `group_mean` has them, in float64 on the host: nothing is compiled to print a result.
    """
    columns, rows = response.columns, len(response.rows)
    known = set(response.batches) == set(columns.names)
    effect, error = [], []
    for name in columns.names:
        mass = np.asarray(response.mass[name], np.float64).ravel()
        chi = np.asarray(response.chi[name], np.float64).reshape(rows, -1)
        used = mass > 0
        effect.append(chi[:, used] @ mass[used])
        if columns.grouped:
            sigma = np.asarray(response.stderr[name], np.float64)
        elif known:
            sigma = mean_stderr(np.asarray(response.batches[name], np.float64))
        else:
            sigma = np.full(rows, np.nan)
        error.append(sigma * mass.sum())
    nbeta = float(response.nbeta)
    return nbeta * np.stack(effect, axis=-1), nbeta * np.stack(error, axis=-1)
