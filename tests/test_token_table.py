"""Tables of the most extreme tokens: the right tokens, the right context, readable."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config

import jaxpattern as jp

TEXT = ("the cat\tsat\n", "on the mat. ")
TOKENS = np.array([list(text.encode()) for text in TEXT], np.int32)
COORDINATES = np.random.default_rng(0).normal(size=(2, 11))


@pytest.mark.parametrize("largest", [True, False])
def test_tokens_come_in_order_with_their_context(largest):
    rows = jp.extreme_tokens(
        jnp.asarray(COORDINATES, jnp.float32), TOKENS, num=22, largest=largest, context=4
    )
    listed = [row.coordinate for row in rows]
    expected = sorted(COORDINATES.ravel(), reverse=largest)
    np.testing.assert_allclose(listed, expected, rtol=1e-6)
    for row in rows:
        text = TEXT[row.sequence]
        assert row.coordinate == pytest.approx(COORDINATES[row.sequence, row.position - 1])
        assert row.token == text[row.position]
        assert row.before == text[max(row.position - 4, 0) : row.position]
        assert row.after == text[row.position + 1 : row.position + 5]


def test_tokens_of_more_than_a_byte_are_decoded():
    words = ("alpha ", "beta ", "gamma ")
    rows = jp.extreme_tokens(
        np.array([[0.1, 3.0]]), np.array([[0, 2, 1]]),
        decode=lambda tokens: "".join(words[i] for i in tokens), num=1,
    )  # fmt: skip
    assert rows == [jp.TokenInContext(3.0, 0, 2, "alpha gamma ", "beta ", "")]


def test_limits_a_token_and_a_sequence():
    tokens = np.zeros((3, 6), np.int32) + np.array([97, 98, 97, 98, 97, 98])
    coordinates = np.arange(15.0).reshape(3, 5)
    rows = jp.extreme_tokens(coordinates, tokens, per_sequence=1)
    assert [row.coordinate for row in rows] == [14, 9, 4]
    rows = jp.extreme_tokens(coordinates, tokens, per_token=2)
    assert [row.coordinate for row in rows] == [14, 13, 12, 11]
    rows = jp.extreme_tokens(coordinates, tokens, per_token=1, per_sequence=1)
    assert [(row.coordinate, row.token) for row in rows] == [(14, "b"), (8, "a")]


def test_padding_is_not_listed():
    coordinates = COORDINATES.copy()
    coordinates[0, 5:] = np.nan
    rows = jp.extreme_tokens(
        coordinates, TOKENS, num=100, weights=np.isfinite(coordinates).astype(float)
    )
    assert len(rows) == 16
    assert np.isfinite([row.coordinate for row in rows]).all()


def test_means_by_token_match_loops():
    rng = np.random.default_rng(1)
    tokens, coordinates = rng.integers(97, 103, (4, 9)), rng.normal(size=(4, 8))
    weights = rng.integers(0, 3, (4, 8)).astype(float)
    coordinates[weights == 0] = np.nan
    found = jp.mean_by_token(coordinates, tokens, min_count=3, weights=weights)
    means = [row.mean for row in found]
    assert means == sorted(means, reverse=True)
    names = set()
    for token in range(97, 103):
        places = [(b, t) for b in range(4) for t in range(8) if weights[b, t]]
        values = [coordinates[b, t] for b, t in places if tokens[b, t + 1] == token]
        if len(values) < 3:
            continue
        names.add(chr(token))
        (row,) = [row for row in found if row.token_id == token]
        assert (row.token, row.occurrences) == (chr(token), len(values))
        assert row.mean == pytest.approx(np.mean(values))
        assert row.stderr == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))
    assert {row.token for row in found} == names
    assert len(names) > 2


def test_tables_are_for_reading():
    rows = [
        jp.TokenInContext(12.345, 0, 3, "a long line of text before\n\t", "it", " and more after"),
        jp.TokenInContext(-0.5, 1, 1, "x", "\x00", ""),
    ]
    assert jp.format_tokens(rows, width=10).split("\n") == [
        "+12.3  … before↵→⟦it⟧ and more…",
        " -0.5           x⟦·⟧",
    ]
    assert jp.format_tokens([]) == ""


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (
            lambda: jp.extreme_tokens(COORDINATES, TOKENS[:, 1:]),
            ValueError,
            r"tokens \[B, T \+ 1\], got shapes \[2, 11\] and \[2, 11\]",
        ),
        (
            lambda: jp.extreme_tokens(COORDINATES, TOKENS + 200),
            ValueError,
            "decode must be given for tokens that are not bytes",
        ),
        (
            lambda: jp.extreme_tokens(COORDINATES, TOKENS, decode="utf-8"),
            TypeError,
            "decode must be a function",
        ),
        (
            lambda: jp.extreme_tokens(COORDINATES * np.nan, TOKENS),
            ValueError,
            "coordinates are not finite",
        ),
        (
            lambda: jp.extreme_tokens(COORDINATES, TOKENS, weights=np.ones(11)),
            ValueError,
            r"weights must have shape \[2, 11\], got \[11\]",
        ),
        (
            lambda: jp.mean_by_token(COORDINATES, TOKENS, min_count=1),
            ValueError,
            "min_count must be at least 2, got 1",
        ),
        (lambda: jp.extreme_tokens(COORDINATES, TOKENS, num=0), ValueError, "num must be at least"),
    ],
)
def test_bad_input_is_named(act, error, message):
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            act()
    finally:
        config.update("jaxtyping_disable", False)


def test_a_tokenizer_decodes():
    """Its bound method says that it takes `self`, too."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    tokens = np.zeros((2, 12), np.int32)
    tokens[0, 4] = 1
    (row,) = jp.extreme_tokens(np.float32(tokens[:, 1:]), tokens, decode=tokenizer.decode, num=1)
    assert (row.token, row.before) == ("b", "a a a a")
