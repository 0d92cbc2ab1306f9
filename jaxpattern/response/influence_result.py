"""The influence of losses on losses as it is returned, and its largest entries in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxpattern import tables, verdict
from jaxpattern.lm.tokens import Decode, decode_each, visible
from jaxpattern.pytrees import register_pytree
from jaxpattern.response.result import Interval, doubts, t_factor
from jaxpattern.validation import check_count, check_names, is_concrete

if TYPE_CHECKING:
    import xarray

_CONTEXT = 6  # tokens on either side


class Pair(NamedTuple):
    """One entry: which query loss, which probe loss, and the influence with its error.

    Attributes:
        query: name of the query set.
        query_place: where the loss is in it: (), (sample,) or (sample, token).
        probe: name of the probe set.
        probe_place: the same.
        influence: the number.
        stderr: its standard error.
        helps: whether more weight on the probe lowers the loss of the query.
    """

    query: str
    query_place: tuple[int, ...]
    probe: str
    probe_place: tuple[int, ...]
    influence: float
    stderr: float
    helps: bool


@register_pytree
@dataclass(frozen=True, eq=False)
class Influence:
    """How losses of probes move losses of queries, with errors; see `influence`.

    Attributes:
        influence: query set → probe set → −Cov[ℓ_q, ℓ_z] (nats²), negative where more weight on z
            lowers ℓ_q; or, with `correlation`, +Corr[ℓ_q, ℓ_z], positive there. The shape is that
            of the query's losses, then that of the probe's.
        stderr: its standard error, same shape.
        query_mass: query set → share of each row, of sum 1 over all; 0 excludes.
        probe_mass: probe set → share of each column, the same.
        nbeta: inverse temperature of the posterior.
        mean: ⟨ℓ⟩ of each set in `rows`, its mean loss, `[S]`.
        mean_stderr: its standard error, `[S]`.
        rhat: rank-normalized split R-hat of each set's mean loss, `[S]`.
        ess: effective sample size of each set's mean loss, over all chains, `[S]`.
        diverged: which chains were lost, `[S, chains]`; they count nowhere.
        diagnostics: what the verdict looks at, `[S]`.
        rows: which sets: `queries/name`, `probes/name`; one for a batch that is both.
        correlation: which of the two it is.
        itself: pairs (query set, probe set) of the same losses, whose diagonal is a variance, or 1.
        cost: gradient equivalents spent.
    """

    influence: dict[str, dict[str, Float[Array, "..."]]]
    stderr: dict[str, dict[str, Float[Array, "..."]]]
    query_mass: dict[str, Float[Array, "..."]]
    probe_mass: dict[str, Float[Array, "..."]]
    nbeta: Float[Array, "*stack"]
    mean: Float[Array, "*stack sets"]
    mean_stderr: Float[Array, "*stack sets"]
    rhat: Float[Array, "*stack sets"]
    ess: Float[Array, "*stack sets"]
    diverged: Bool[Array, "*stack sets chains"]
    diagnostics: dict[str, Shaped[Array, "..."]]
    rows: tuple[str, ...] = field(metadata={"static": True})
    correlation: bool = field(metadata={"static": True})
    itself: tuple[tuple[str, str], ...] = field(metadata={"static": True})
    cost: float = field(metadata={"static": True})

    @property
    def form(self) -> str:
        """Which number it is, in symbols."""
        return "+Corr[ℓ_q, ℓ_z]" if self.correlation else "−Cov[ℓ_q, ℓ_z]"

    @property
    def verdict(self) -> str:
        """Whether the chains behind it can be trusted, in words."""
        return verdict.say("influence", list(zip(self.rows, doubts(self), strict=True)))

    def interval(self, level: float = 0.95) -> Interval:
        """Influence ± t · stderr, with Student's t for as many groups of draws as there are.

        Args:
            level: the share of intervals that are to hold the influence.
        """
        factor = t_factor(level, np.asarray(self.diagnostics["groups"])[0])

        def ends(sign: int) -> dict[str, dict[str, Array]]:
            return jax.tree.map(
                lambda x, s: x + sign * s * factor.astype(x.dtype), self.influence, self.stderr
            )

        return Interval(low=ends(-1), high=ends(1))

    def top(
        self,
        num: int = 10,
        *,
        query: str | None = None,
        place: tuple[int, ...] = (),
        helps: bool | None = None,
    ) -> list[Pair]:
        """The entries of largest size, the largest first.

        A loss beside itself, and excluded losses, are left out. The largest of many noisy numbers
        are too large: read them with their errors, and measure again with another key.

        Args:
            num: at most how many.
            query: only those of this query set.
            place: only those of this sample, or (sample, token), of the query set.
            helps: True: only probes whose weight lowers the query's loss; False: raises.

        Raises:
            TypeError, ValueError: an argument does not fit; the values cannot be looked at.
        """
        check_count("num", num, minimum=1)
        if not all(map(is_concrete, jax.tree.leaves(self))) or np.ndim(self.nbeta):
            raise TypeError("influence has no numbers yet, or is a stack; take one of them first")
        if query is None and place:
            raise ValueError(
                f"place is one of a query set; give query, one of {list(self.influence)}"
            )
        if query is not None and query not in self.influence:
            raise ValueError(f"query must be one of {list(self.influence)}, got {query!r}")
        found: list[Pair] = []
        for q in self.influence if query is None else (query,):
            for p in self.influence[q]:
                found += self._largest(q, p, num, place, helps)
        return sorted(found, key=lambda pair: -abs(pair.influence))[:num]

    def _largest(
        self, query: str, probe: str, num: int, place: tuple[int, ...], helps: bool | None
    ) -> list[Pair]:
        """The largest entries of a query set with a probe set."""
        values = np.asarray(self.influence[query][probe])
        errors = np.asarray(self.stderr[query][probe])
        q, p = (np.asarray(self.query_mass[query]) > 0, np.asarray(self.probe_mass[probe]) > 0)
        counted = np.multiply.outer(q, p) & np.isfinite(values)
        if (query, probe) in self.itself:
            square = counted.reshape(q.size, p.size)
            square[np.arange(q.size), np.arange(p.size)] = False
            counted = square.reshape(values.shape)
        if len(place) > q.ndim or any(not 0 <= i < n for i, n in zip(place, q.shape, strict=False)):
            raise ValueError(
                f"place must lie in the losses {list(q.shape)} of {query!r}, got {place}"
            )
        if helps is not None:
            counted = counted & ((values > 0) == (helps == self.correlation)) & (values != 0)
        at = tuple(np.asarray(i) for i in place)
        size = np.where(counted, np.abs(values), -1.0)[at].reshape(-1)
        best = np.argpartition(size, -min(num, size.size))[-min(num, size.size) :]
        pairs = []
        for flat in best[size[best] >= 0]:
            rest = np.unravel_index(int(flat), values.shape[len(place) :])
            index = (*place, *map(int, rest))
            value = float(values[index])
            pairs.append(
                Pair(
                    query, index[: q.ndim], probe, index[q.ndim :], value, float(errors[index]),
                    (value > 0) == self.correlation,
                )
            )  # fmt: skip
        return pairs

    def words(
        self,
        num: int = 10,
        *,
        tokens: Mapping[str, Int[Array | np.ndarray, "B length"]] | None = None,
        decode: Decode | None = None,
        **which: object,
    ) -> str:
        """The largest entries as sentences, one a line.

            −0.0121 ± 0.0014  more weight on code[3, 17] “…for i in ⟦range⟧(len…” lowers …

        Args:
            num: at most how many.
            tokens: name of a query or probe set → its tokens `[B, T + 1]`, to be shown in context.
            decode: tokens to text; by default they are bytes.
            **which: `query`, `place`, `helps` of `top`.
        """
        if tokens is not None:
            check_names("tokens", tokens, {*self.influence, *self.probe_mass})
        named = {} if tokens is None else {n: np.asarray(x) for n, x in tokens.items()}
        lines = []
        for pair in self.top(num, **which):  # type: ignore[arg-type]
            probe = _said(pair.probe, pair.probe_place, named, decode)
            query = _said(pair.query, pair.query_place, named, decode)
            does = "lowers" if pair.helps else "raises"
            number = tables.measured(pair.influence, pair.stderr)
            lines.append(f"{number}  more weight on {probe} {does} the loss of {query}")
        return "\n".join(lines)

    def to_xarray(self) -> xarray.Dataset:
        """A Dataset over queries and probes; see `export.influence_to_xarray`."""
        from jaxpattern import export

        return export.influence_to_xarray(self)

    def __str__(self) -> str:
        return tables.text(_page, self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.html(_page, self)


def _said(
    name: str, place: tuple[int, ...], tokens: Mapping[str, np.ndarray], decode: Decode | None
) -> str:
    """A loss by its name and place, with its token in context where that is known."""
    said = f"{name}[{', '.join(map(str, place))}]" if place else name
    if len(place) < 2 or name not in tokens:
        return said
    row, at = tokens[name][place[0]], place[1] + 1  # column t is the loss of token t + 1
    start = max(at - _CONTEXT, 0)
    text = [visible(part) for part in decode_each(row[start : at + _CONTEXT + 1], decode)]
    before, token, after = text[: at - start], text[at - start], text[at - start + 1 :]
    return f"{said} “{''.join(before)}⟦{token}⟧{''.join(after)}”"


def _page(result: Influence) -> tables.Page:
    """The largest entries of each kind, with errors, and how to read their sign."""
    queries, probes = (
        {n: x.size for n, x in m.items()} for m in (result.query_mass, result.probe_mass)
    )
    title = (
        f"Bayesian influence {result.form} of {len(probes)} probe sets ({sum(probes.values())} "
        f"columns) on {len(queries)} query sets ({sum(queries.values())} rows)"
    )
    tables.refuse_unreadable(title, result, result.nbeta)
    body = [
        [
            _said(pair.query, pair.query_place, {}, None),
            _said(pair.probe, pair.probe_place, {}, None),
            tables.measured(pair.influence, pair.stderr),
            "lowers it" if pair.helps else "raises it",
        ]
        for pair in result.top(tables.MAX_ROWS)
    ]
    sign = "positive" if result.correlation else "negative"
    unit = "no unit" if result.correlation else "nats²"
    notes = [
        f"The largest, ± one standard error ({unit}). {sign.capitalize()}: more weight on the "
        "probe lowers the loss of the query.",
        f"nβ = {float(result.nbeta):g}; cost {result.cost:.3g} gradient equivalents.",
        f"Verdict: {result.verdict}.",
    ]
    header = ["query", "probe", "influence", "more weight on the probe"]
    return tables.Page(title, (tables.Grid(header, body),), tuple(notes))
