"""Corpora: what is read, how it is divided, and that it is the same every time."""

import hashlib

import numpy as np
import pytest

from jaxpattern.data import text
from jaxpattern.data.text import (
    fingerprint,
    folder_corpus,
    python_corpus,
    split_by_file,
    windows,
)

DOCUMENTS = [bytes([65 + i]) * size for i, size in enumerate([40, 100, 7, 63, 30, 160])]


@pytest.fixture(scope="module")
def corpus():
    return python_corpus(60_000, min_bytes=20_000)


def test_the_python_installation_holds_labelled_text(corpus):
    assert list(corpus) == [name for name in text.SOURCES if name in corpus]
    assert {"library", "docstrings"} <= corpus.keys()
    for documents in corpus.values():
        assert all(type(document) is bytes and document for document in documents)
        assert 20_000 <= sum(map(len, documents)) <= 60_000
        assert len(set(documents)) == len(documents)


def test_the_same_seed_gives_the_same_corpus_and_another_a_different_one(corpus):
    assert python_corpus(60_000, min_bytes=20_000) == corpus
    assert python_corpus(60_000, min_bytes=20_000, seed=1)["library"] != corpus["library"]


def test_sources_with_too_little_text_are_left_out(monkeypatch):
    monkeypatch.setattr(text, "_reference_topics", lambda: [b"a little"])
    monkeypatch.setattr(text, "_test_files", lambda: [])
    found = python_corpus(5_000, min_bytes=1_000)
    assert {"reference", "tests"}.isdisjoint(found)
    assert "library" in found
    with pytest.raises(ValueError, match="min_bytes must be at most max_bytes, got 9 > 8"):
        python_corpus(8, min_bytes=9)


def test_docstrings_are_taken_out_of_the_code():
    source = b'''"""Module."""
import os

def f(x):
    """What f does.

    More.
    """
    return "kept"

class A: "on the line"
'''
    code, docstrings = text._split_docstrings(source)
    assert code == b'import os\n\ndef f(x):\n    return "kept"\n\nclass A: "on the line"\n'.replace(
        b"import", b"\nimport", 1
    ).lstrip(b"\n")
    assert docstrings.startswith(b"Module.")
    assert b"What f does.\n\nMore." in docstrings
    assert text._split_docstrings(b"def (") is None


def test_files_are_on_one_side_of_the_split():
    for seed in range(20):
        train, held_out = split_by_file(DOCUMENTS, 0.3, seed)
        assert train
        assert held_out
        assert sorted(train + held_out) == sorted(DOCUMENTS)
        assert split_by_file(DOCUMENTS, 0.3, seed) == (train, held_out)
    many = [bytes([i]) * 10 for i in range(100)]
    assert len(split_by_file(many, 0.2)[1]) == 20


def test_a_single_file_is_split_by_position():
    assert split_by_file([b"abcdefghij"], 0.3) == ([b"abcdefg"], [b"hij"])
    with pytest.raises(ValueError, match="documents must hold text"):
        split_by_file([])
    with pytest.raises(ValueError, match="held_out must be below 1"):
        split_by_file(DOCUMENTS, 1.0)


def test_windows_do_not_overlap_or_cross_documents():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, size).astype(np.uint8).tobytes() for size in (90, 8, 400)]
    drawn = windows(documents, 9, 10 + 44, seed=3)
    assert drawn.shape == (54, 9)
    assert drawn.dtype == np.int32
    places = []
    for window in drawn.astype(np.uint8):
        found = [(i, d.find(window.tobytes())) for i, d in enumerate(documents)]
        places += [(i, at) for i, at in found if at >= 0]
    assert len(places) == 54
    covered = {(i, at + j) for i, at in places for j in range(9)}
    assert len(covered) == 54 * 9


def test_windows_are_repeatable_and_say_how_many_there_are():
    first = windows(DOCUMENTS, 10, 12, seed=1)
    assert fingerprint(first) == fingerprint(windows(DOCUMENTS, 10, 12, seed=1))
    assert fingerprint(first) != fingerprint(windows(DOCUMENTS, 10, 12, seed=2))
    with pytest.raises(ValueError, match=r"at most the 39 windows of length 10 that the 6 doc.*40"):
        windows(DOCUMENTS, 10, 40)
    assert windows(DOCUMENTS, 10, 39).shape == (39, 10)


def test_fingerprint_is_of_type_shape_and_content():
    tokens = np.arange(6, dtype=np.int32)
    header = b"<i4[6]" + tokens.tobytes()
    assert fingerprint(tokens) == hashlib.sha256(header).hexdigest()
    assert fingerprint(tokens) != fingerprint(tokens.reshape(2, 3))
    assert fingerprint(tokens) != fingerprint(tokens.astype(np.int64))
    assert fingerprint(tokens) == fingerprint(tokens.astype(">i4"))


def test_a_folder_is_a_corpus(tmp_path):
    for name in ("b/x/one.txt", "b/two.md", "a/three", "a/.hidden", "a/picture.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\1" if name.endswith("png") else name.encode())
    (tmp_path / "loose.txt").write_text("not in a source")
    corpus = folder_corpus(tmp_path)
    assert list(corpus) == ["a", "b"]
    assert corpus["a"] == [b"a/three"]
    assert sorted(corpus["b"]) == [b"b/two.md", b"b/x/one.txt"]
    assert folder_corpus(str(tmp_path)) == corpus


def test_folders_that_are_no_corpus_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"existing folder.*nowhere"):
        folder_corpus(tmp_path / "nowhere")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "file").write_text("text")
    with pytest.raises(ValueError, match=r"at least two sub-folders.*only"):
        folder_corpus(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'empty'.*no text"):
        folder_corpus(tmp_path)
