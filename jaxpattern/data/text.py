"""Labelled text without a network: what the running Python installation holds, or a folder.

A *corpus* maps the name of a source to its documents, each the bytes of one file. Bytes are the
tokens, so the vocabulary is 256 and nothing has to be trained. Everything is deterministic: files
are sorted, then shuffled with a seed, and the same corpus and seed give the same windows.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Int, Shaped

from jaxpattern.validation import check_count, check_number

SOURCES = ("library", "tests", "docstrings", "reference", "headers", "licences")
"""What `python_corpus` looks for, in this order."""

Item = TypeVar("Item")

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


def python_corpus(
    max_bytes: int = 1_000_000, *, min_bytes: int = 50_000, seed: int = 0
) -> dict[str, list[bytes]]:
    """Six kinds of text from the running Python installation.

    `library` is the code of the standard library without its docstrings and test folders,
    `docstrings` are the docstrings taken out of it (one document a file), `tests` the code of its
    test folders, `reference` the language reference that `help()` prints (one document a topic),
    `headers` the C headers of Python, numpy and jaxlib, and `licences` the licence texts of Python
    and of the installed packages. A text that occurs twice is kept once.

    Args:
        max_bytes: most bytes a source; the last document is cut there. No more files are read
            than that takes.
        min_bytes: sources with fewer bytes are left out, as installations differ in what they
            hold: `set(SOURCES) - corpus.keys()` are the missing ones.
        seed: order of the files.

    Returns:
        Source → documents, sources in the order of `SOURCES`.
    """
    check_count("max_bytes", max_bytes, minimum=1)
    check_count("min_bytes", min_bytes, minimum=1)
    check_count("seed", seed, minimum=0)
    if min_bytes > max_bytes:
        raise ValueError(f"min_bytes must be at most max_bytes, got {min_bytes} > {max_bytes}")
    code, docstrings = _take_split(_shuffled(_library_files(), seed), max_bytes)
    corpus = {
        "library": code,
        "tests": _take(_read(_shuffled(_test_files(), seed)), max_bytes),
        "docstrings": docstrings,
        "reference": _take(_shuffled(_reference_topics(), seed), max_bytes),
        "headers": _take(_read(_shuffled(_header_files(), seed)), max_bytes),
        "licences": _take(_read(_shuffled(_licence_files(), seed)), max_bytes),
    }
    return {name: texts for name, texts in corpus.items() if sum(map(len, texts)) >= min_bytes}


def folder_corpus(folder: str | os.PathLike[str], *, seed: int = 0) -> dict[str, list[bytes]]:
    """The text files of a folder, one sub-folder a source.

    Args:
        folder: holds at least two sub-folders; their files are taken at any depth. Hidden files
            and folders, empty files, and files with a zero byte (which are not text) are skipped,
            and a text that occurs twice in a source is kept once.
        seed: order of the files.

    Returns:
        Name of the sub-folder → documents, sources sorted by name.

    Raises:
        ValueError: if the folder is missing, holds fewer than two sources, or a source has no
            text.
    """
    check_count("seed", seed, minimum=0)
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"folder must be an existing folder, got {str(root)!r}")
    sources = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(sources) < 2:
        raise ValueError(
            f"folder must hold at least two sub-folders, one a source; {str(root)!r} holds "
            f"{[source.name for source in sources]}"
        )
    corpus = {}
    for source in sources:
        texts = (text for text in _read(_shuffled(_walk(source), seed)) if b"\0" not in text)
        corpus[source.name] = _take(texts, None)
        if not corpus[source.name]:
            raise ValueError(f"source {source.name!r} in {str(root)!r} holds no text files")
    return corpus


def split_by_file(
    documents: Sequence[bytes], held_out: float = 0.2, seed: int = 0
) -> tuple[list[bytes], list[bytes]]:
    """Training and held-out documents of one source; no file is in both.

    The shuffled documents are cut where the held-out share of the bytes is nearest to the one
    asked for, with at least one document on each side. A single document has no files to divide:
    its last part is held out instead, so both sides come from one file and are more alike than
    two files are.

    Args:
        documents: the files of one source.
        held_out: share of the bytes to hold out, between 0 and 1.
        seed: which files are held out.

    Returns:
        (training, held-out) documents.

    Raises:
        ValueError: if there are no documents, or a single one with fewer than two bytes.
    """
    check_number("held_out", held_out, minimum=0.0, exclusive=True)
    if held_out >= 1:
        raise ValueError(f"held_out must be below 1, got {held_out:g}")
    check_count("seed", seed, minimum=0)
    if not documents or (len(documents) == 1 and len(documents[0]) < 2):
        raise ValueError(f"documents must hold text to split, got {list(documents)!r:.80}")
    if len(documents) == 1:
        (text,) = documents
        cut = min(max(round(len(text) * (1 - held_out)), 1), len(text) - 1)
        return [text[:cut]], [text[cut:]]
    shuffled = _shuffled(documents, seed)
    share = np.cumsum([len(text) for text in shuffled])[:-1] / sum(map(len, shuffled))
    cut = 1 + int(np.argmin(np.abs(share - held_out)))
    return shuffled[cut:], shuffled[:cut]


def windows(
    documents: Sequence[bytes], length: int, count: int, seed: int = 0
) -> Int[np.ndarray, "count length"]:
    """Sequences of bytes, none of which overlap or cross from one document to the next.

    Each document is cut, from a random offset, into as many windows as fit; `count` of all these
    are drawn without replacement, so a long file is drawn from as often as its length says.

    Args:
        documents: the files of one source; those shorter than a window are passed over.
        length: tokens a window; a model that predicts T tokens reads windows of T + 1.
        count: number of windows.
        seed: which windows.

    Returns:
        Tokens 0 … 255, `[count, length]`, int32.

    Raises:
        ValueError: if the documents hold fewer windows than asked for.
    """
    check_count("length", length, minimum=1)
    check_count("count", count, minimum=1)
    check_count("seed", seed, minimum=0)
    fitting = [text for text in documents if len(text) >= length]
    sizes = np.array([len(text) for text in fitting], np.int64)
    available = int(np.sum(sizes // length))
    if count > available:
        raise ValueError(
            f"count must be at most the {available} windows of length {length} that the "
            f"{len(documents)} documents hold without overlap, got {count}"
        )
    rng = np.random.default_rng(seed)
    offsets = rng.integers(0, sizes % length + 1)
    first = np.cumsum(sizes) - sizes
    starts = np.concatenate(
        [
            f + o + length * np.arange(n // length)
            for f, o, n in zip(first, offsets, sizes, strict=True)
        ]
    )
    chosen = rng.choice(starts, count, replace=False)
    tokens = np.frombuffer(b"".join(fitting), np.uint8)
    return tokens[chosen[:, None] + np.arange(length)].astype(np.int32)


def fingerprint(tokens: Shaped[Array, "..."] | Shaped[np.ndarray, "..."]) -> str:
    """SHA-256 of an array's type, shape and content, to record which data were used."""
    array = np.ascontiguousarray(tokens)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{array.dtype.str}{list(array.shape)}".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()


def _shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """The items in a random order that the seed fixes."""
    listed = list(items)
    return [listed[i] for i in np.random.default_rng(seed).permutation(len(listed))]


def _read(paths: Iterable[Path]) -> Iterator[bytes]:
    """The content of each file that can be read, one at a time."""
    for path in paths:
        try:
            yield path.read_bytes()
        except OSError:
            continue


def _take(texts: Iterable[bytes], max_bytes: int | None) -> list[bytes]:
    """Texts that are not empty and not seen before, up to so many bytes."""
    taken: dict[bytes, None] = {}
    room = float("inf") if max_bytes is None else max_bytes
    for text in texts:
        if not text or text in taken:
            continue
        taken[text if len(text) <= room else text[: int(room)]] = None
        room -= len(text)
        if room <= 0:
            break
    return list(taken)


def _take_split(paths: Iterable[Path], max_bytes: int) -> tuple[list[bytes], list[bytes]]:
    """Code without docstrings, and docstrings, of Python files, until there is enough of both."""
    code, docstrings = [], []
    code_bytes = docstring_bytes = 0
    for text in _read(paths):
        if min(code_bytes, docstring_bytes) >= max_bytes:
            break
        if code_bytes >= max_bytes and text.count(b'"""') < 2:
            continue
        parts = _split_docstrings(text)
        if parts is None:
            continue
        code.append(parts[0])
        docstrings.append(parts[1])
        code_bytes, docstring_bytes = (
            code_bytes + len(parts[0]),
            docstring_bytes + len(parts[1]),
        )
    return _take(code, max_bytes), _take(docstrings, max_bytes)


def _split_docstrings(source: bytes) -> tuple[bytes, bytes] | None:
    """A Python file as (code without docstrings, docstrings); None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    lines = source.splitlines(keepends=True)
    texts = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        texts.append(text)
        statement = node.body[0]
        if statement.lineno == getattr(node, "lineno", 0):
            continue  # on the line of its `def`, which stays
        for line in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
            lines[line] = b""
    return b"".join(lines), "\n\n".join(texts).encode("utf-8", "replace")


def _walk(root: Path, skip: frozenset[str] | set[str] = frozenset()) -> Iterator[Path]:
    """All files below a folder, sorted, without hidden ones and the folders to be skipped."""
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in skip and name[0] != ".")
        for file in sorted(files):
            if file[0] != ".":
                yield Path(folder, file)


def _library_files() -> Iterator[Path]:
    """Python files of the standard library, without its tests and its tables of encodings."""
    root = Path(sysconfig.get_path("stdlib"))
    return (p for p in _walk(root, _NOT_LIBRARY | _TEST_FOLDERS) if p.suffix == ".py")


def _test_files() -> Iterator[Path]:
    """Python files in the test folders of the standard library; some systems leave them out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, _NOT_LIBRARY):
        if path.suffix == ".py" and _TEST_FOLDERS & set(path.relative_to(root).parts):
            yield path


def _reference_topics() -> list[bytes]:
    """The topics that `help()` knows, sorted by name."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name].encode() for name in sorted(topics)]


def _header_files() -> Iterator[Path]:
    """C headers of Python, where they are installed, and of numpy and jaxlib."""
    roots = [Path(sysconfig.get_path("include"))]
    for package in ("numpy", "jaxlib"):
        spec = importlib.util.find_spec(package)
        roots += [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    return (path for root in roots for path in _walk(root) if path.suffix == ".h")


def _licence_files() -> Iterator[Path]:
    """Licence texts of Python and of the packages beside it."""
    library = Path(sysconfig.get_path("stdlib"))
    yield from (path for path in (library / "LICENSE.txt", library / "LICENSE") if path.is_file())
    for root in dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")):
        for folder in sorted(root.glob("*.dist-info")):
            for path in _walk(folder):
                name = path.name.upper()
                if any(word in name for word in ("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                    yield path
