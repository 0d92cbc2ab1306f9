"""Sub-word windows: round trips, and scores of copying against counts by hand."""

import numpy as np
import pytest

from jaxpattern.data import subwords

pytest.importorskip("tokenizers")

TEXT = b"def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))\n" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return subwords.train_tokenizer([TEXT], 280)


def test_windows_are_the_text_in_pieces(tokenizer):
    texts = subwords.vocabulary(tokenizer)
    assert len(texts) == 280
    windows = subwords.token_windows(tokenizer, [TEXT, b"short", TEXT], 16)
    assert windows.dtype == np.int32
    assert windows.shape[1] == 16
    half = len(windows) // 2
    read = "".join(texts[i] for i in windows[:half].ravel())
    assert TEXT.decode().startswith(read)
    np.testing.assert_array_equal(windows[:half], windows[half:])


def test_a_vocabulary_holds_the_bytes():
    with pytest.raises(ValueError, match="vocab_size must be at least 256, got 255"):
        subwords.train_tokenizer([TEXT], 255)


def test_bigram_log_probs_are_smoothed_counts():
    tokens = np.array([[0, 1, 0, 1, 2]], np.int32)
    log_p = subwords.bigram_log_probs(tokens, 3, smoothing=1.0)
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, rtol=1e-6)
    # Next tokens 1, 0, 1, 2: unigrams (counts + 1) / 7; 0 was followed by 1 twice.
    expected = [(2 / 7) / 3, (2 + 3 / 7) / 3, (2 / 7) / 3]
    np.testing.assert_allclose(np.exp(log_p[0]), expected, rtol=1e-6)


def test_last_successor():
    tokens = np.array([[5, 6, 5, 7, 5, 9], [1, 2, 3, 4, 5, 6]], np.int32)
    expected = [[-1, -1, 6, -1, 7], [-1] * 5]
    np.testing.assert_array_equal(subwords.last_successor(tokens), expected)


def test_copy_gain_is_the_log_ratio_where_there_is_something_to_copy():
    tokens = np.array([[0, 1, 0, 1], [0, 1, 0, 2], [0, 1, 2, 3]], np.int32)
    p = np.full((4, 4), 0.25)
    gain = subwords.copy_gain(tokens, np.log(p), share=0.5, chunk=2)
    np.testing.assert_allclose(gain, [np.log(0.625 / 0.25), np.log(0.5), 0], rtol=1e-6)


def test_token_classes():
    texts = ["def", " x", "y", "(", "\n    ", " 12", " ", "é"]
    tokens = np.array([[0, 1, 2, 3, 4, 5, 1, 2]], np.int32)
    found = subwords.token_classes(tokens, texts)
    rows = {
        "repeated bigram": [0, 0, 0, 0, 0, 0, 1],  # "x", "y" comes twice
        "word part": [0, 1, 0, 0, 0, 0, 1],
        "word start": [1, 0, 0, 0, 0, 1, 0],
        "delimiter": [0, 0, 1, 0, 0, 0, 0],
        "indentation": [0, 0, 0, 1, 0, 0, 0],
        "number": [0, 0, 0, 0, 1, 0, 0],
    }
    for name, row in rows.items():
        np.testing.assert_array_equal(found[name][0], np.array(row, bool), err_msg=name)
    assert set(found) == set(rows)


def test_bytes_saved_are_those_of_what_was_seen_before():
    texts = [chr(97 + i) * 2 + chr(65 + i) * 9 for i in range(8)]
    fresh, again = np.arange(8), np.tile(np.arange(4), 2)
    saved = subwords.bytes_saved(np.stack([fresh, again]), texts)
    assert saved.shape == (2, 7)
    assert saved[1, 3:].mean() > saved[0, 3:].mean() + 1
