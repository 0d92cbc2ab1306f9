"""Writing the page: what is asked for is checked first, and the file appears as a whole."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from string import Template
from typing import IO, Any, TypeAlias

import jax
import numpy as np

from jaxpattern._version import __version__
from jaxpattern.inversion.intervention import Intervention
from jaxpattern.lm.tokens import Decode
from jaxpattern.report import of_response, of_weights
from jaxpattern.report.given import pack_losses, pack_tokens
from jaxpattern.report.parts import Arm, compared, of_grid, tag, written
from jaxpattern.response.result import Response
from jaxpattern.rounds import Pattern, describe
from jaxpattern.validation import is_concrete

Result: TypeAlias = Response | Intervention | Pattern | Mapping[str, Any]

MAX_BYTES = 200e6
_COMPARISON = "Training compared"


def report(
    result: Result | Sequence[Result],
    path: str | os.PathLike[str],
    *,
    tokens: Mapping[str, Any] | None = None,
    decode: Decode | None = None,
    losses: Mapping[str, Any] | None = None,
    realised: Mapping[str, Any] | None = None,
    title: str = "",
    unit: str = "nats",
) -> Path:
    """Write a result as one HTML file to look at, which needs no network and no server.

    A response shows its verdict, the matrix nβ q χ with errors, principal directions with their
    loadings, the health of its chains, and every column colored by χ in its context. An
    intervention shows its weights, and the wanted, predicted and realized shifts. Shifts by name
    are compared side by side. Several results come one after another on the page.

        jp.report([response, solution], "report.html", realised={"retrained": {"code": (-.1, .02)}})

    Args:
        result: a `Response`, an `Intervention`, a `Pattern`, or what came of training:
            name of the run → row → shift or (shift, standard error). Or several of these.
        path: the file, in a folder that exists; replaced as a whole.
        tokens: probe set → its text. Of losses `[B, T]` tokens `[B, T + 1]`, the first without a
            loss, or `[B, T]`; of losses `[B]` one text or row of tokens per sample. Tokens are
            texts, or integers that `decode` reads. Without, columns show their positions.
        decode: tokens to text; by default they are bytes.
        losses: probe set → losses at w*, of the shape of its columns.
        realised: of an intervention, what came: row → shift or (shift, standard error), or several
            such mappings by name.
        title: of the page.
        unit: of the observables φ.

    Returns:
        The path of the file.

    Raises:
        OSError: the file cannot be written there; said before anything else is done.
        TypeError: it is no such result, it is being traced, or an argument is of another kind.
        ValueError: names or shapes do not fit, the result is a stack of several, or the page would
            hold more than 200 MB.
    """
    results = _several(result)
    with _replacing(Path(path)) as file:
        _check(results)
        shapes = _shapes(results)
        beside = {
            "tokens": pack_tokens(tokens or {}, shapes, decode),
            "losses": pack_losses(losses or {}, shapes),
        }
        arms = _realised(results, realised)
        sections: list[ET.Element] = []
        views: list[dict[str, Any]] = []
        for one in results:
            parts, view = _section(one, arms, unit)
            if view is not None:
                parts.append(tag("div", class_="view", data_view=len(views)))
                views.append(view)
            sections.append(tag("section", *parts))
        heading = title or _heading(results)
        file.write(_page(heading, sections, {"views": views, **beside}))
    return Path(path)


def _several(result: Any) -> list[Any]:
    """The results one by one; of a `Pattern` its rounds, and the last response and solution."""
    given = list(result) if isinstance(result, list | tuple) and not _is_one(result) else [result]
    if not given:
        raise ValueError("result is empty; give a Response, an Intervention or shifts by name")
    for one in given:
        if not _is_one(one):
            raise TypeError(
                "result must be a Response, an Intervention, a Pattern or a mapping of shifts by "
                f"name, got {type(one).__name__}"
            )
    return given


def _is_one(result: Any) -> bool:
    return isinstance(result, Response | Intervention | Pattern | Mapping)


def _check(results: list[Any]) -> None:
    """Numbers that can be looked at, of one result each, and not too many."""
    size = 0.0
    for one in results:
        if isinstance(one, Pattern | Mapping):
            continue
        name = type(one).__name__
        if not all(map(is_concrete, jax.tree.leaves(one))):
            raise TypeError(f"result is a {name} under jit, vmap or grad, where it has no numbers")
        if np.ndim(one.nbeta if isinstance(one, Response) else one.reached):
            raise ValueError(f"result is a stack of several of {name}; take one of them first")
        per = 2 * len(one.rows) if isinstance(one, Response) else 1
        size += 4 / 3 * 4 * per * one.columns.size
    if size > MAX_BYTES:
        raise ValueError(
            f"the page would hold {size / 1e6:.0f} MB, at most {MAX_BYTES / 1e6:.0f} can be looked "
            "at; report fewer rows, fewer columns, or group_mean(response)"
        )


def _shapes(results: list[Any]) -> dict[str, tuple[int, ...]]:
    """Probe set → shape of its columns, of results with one column per loss."""
    shapes: dict[str, tuple[int, ...]] = {}
    for one in results:
        if isinstance(one, Response | Intervention) and not one.columns.grouped:
            for name, shape in zip(one.columns.names, one.columns.shapes, strict=True):
                if shapes.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"results have probe sets {name!r} of different shapes, "
                        f"{list(shapes[name])} and {list(shape)}; write a page for each"
                    )
    return shapes


def _realised(results: list[Any], realised: Any) -> list[Arm]:
    """What came, by name; it belongs to one intervention."""
    if realised is None:
        return []
    solutions = [one for one in results if isinstance(one, Intervention)]
    if len(solutions) != 1:
        raise ValueError(
            f"realised belongs to one Intervention, got {len(solutions)} among the results; give "
            "shifts by name as a result of their own instead"
        )
    return of_weights.arms_of("realised", realised, tuple(solutions[0].predicted_shift))


def _section(
    result: Result, realised: list[Arm], unit: str
) -> tuple[list[ET.Element], dict[str, Any] | None]:
    if isinstance(result, Response):
        return of_response.section(result, unit)
    if isinstance(result, Intervention):
        return of_weights.section(result, realised, unit)
    if isinstance(result, Pattern):
        return _rounds(result, unit), None
    arms = of_weights.arms_of("result", result, None)
    return [tag("h2", _COMPARISON), *compared(arms, {}, unit)], None


def _rounds(result: Pattern, unit: str) -> list[ET.Element]:
    """Patterning in rounds: each round's prediction beside what came of it."""
    title, (grid,), notes = describe(result)
    parts = [tag("h2", title), of_grid(grid, "rounds")]
    parts += [tag("p", note, class_="note") for note in notes]
    for i, this in enumerate(result.rounds):
        arms = [
            Arm("predicted", {row: (x, float("nan")) for row, x in this.predicted.items()}),
            Arm("realized", {
                row: (x, this.realised_stderr[row]) for row, x in this.realised.items()
            }),
        ]  # fmt: skip
        parts += [tag("h3", f"Round {i + 1}"), *compared(arms, this.wanted, unit)]
    return parts


def _heading(results: list[Any]) -> str:
    names = {Response: "Response", Intervention: "Data weights", Pattern: "Patterning"}
    found = dict.fromkeys(names.get(type(one), _COMPARISON) for one in results)
    return ", ".join(found)


def _page(title: str, sections: list[ET.Element], data: Any) -> bytes:
    """The file: styles, program and numbers in it, and a policy that lets it load nothing."""
    folder = resources.files("jaxpattern.report")
    text = {n: folder.joinpath(f"page.{n}").read_text(encoding="utf-8") for n in ("css", "js")}
    seal = base64.b64encode(hashlib.sha256(text["js"].encode()).digest()).decode()
    page = Template(folder.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=written([tag("title", title)]), heading=written([tag("h1", title)]),
        version=__version__, css=text["css"], js=text["js"], seal=seal,
        sections=written(sections), data=_as_data(data),
    )  # fmt: skip
    return page.encode("utf-8", "replace")


def _as_data(value: Any) -> str:
    """JSON that ends no script element: `<`, `>`, `&` and all beyond ASCII are \\u escapes."""
    said = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        said = said.replace(character, f"\\u{ord(character):04x}")
    return said


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of the old one when all of it is there.

    Raises:
        OSError: it cannot be made, before anything is written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file such as {path / 'report.html'}, got a folder")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        file = open(part, "wb")  # noqa: SIM115
    except OSError as error:
        raise type(error)(
            f"path {str(path)!r} cannot be written: {error.strerror or error}. Its folder must "
            "exist and be writable"
        ) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
