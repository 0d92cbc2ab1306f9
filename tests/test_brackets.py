"""Bracket strings: every string as often as it should be, and the categories by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from jaxpattern.data import brackets

RNG = 7


def parse(text):
    return np.array([[" ()".index(symbol) for symbol in text]], np.int32)


def is_nested(string):
    """By striking out "()" until nothing changes: independent of depths."""
    text, before = brackets.to_text(string), None
    while text != before:
        before, text = text, text.replace("()", "")
    return not text


def every_string(length):
    return np.array(list(itertools.product((1, 2), repeat=length)), np.int32)


@pytest.mark.parametrize("length", [4, 6, 8])
@pytest.mark.parametrize(
    ("draw", "member"),
    [
        (brackets.nested_strings, is_nested),
        (brackets.random_strings, lambda s: True),
        (brackets.equal_count_strings, lambda s: np.sum(s == 1) == np.sum(s == 2)),
        (brackets.uneven_strings, lambda s: np.sum(s == 1) != np.sum(s == 2)),
        (
            brackets.out_of_distribution,
            lambda s: np.sum(s == 1) == np.sum(s == 2) and not is_nested(s),
        ),
    ],
)
def test_every_string_is_equally_likely(draw, member, length):
    """χ² over all strings of the kind. False alarms: 15 tests at 1e-4."""
    allowed = [tuple(s) for s in every_string(length) if member(s)]
    strings = draw(np.random.default_rng(RNG), 200 * len(allowed), length)
    seen, counts = np.unique(strings, axis=0, return_counts=True)
    assert {tuple(s) for s in seen} == set(allowed)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_categories_agree_with_another_definition():
    strings = every_string(8)
    category = brackets.categories(strings)
    np.testing.assert_array_equal(category.nested, [is_nested(s) for s in strings])
    assert category.nested.sum() == 14
    assert (category.equal_count & ~category.nested).sum() == 70 - 14


@pytest.mark.parametrize(
    ("text", "imbalance", "dip", "excess"),
    [("(())", 0, 0, 0), ("((((", 4, 0, 0), ("))))", -4, -4, 0), (")(", 0, -1, 1),
     ("(()))))(", -2, -3, 1), ("))((((", 2, -2, 2)],
)  # fmt: skip
def test_categories_by_hand(text, imbalance, dip, excess):
    category = brackets.categories(parse(text))
    assert (category.imbalance[0], category.dip[0], category.excess_dip[0]) == (
        imbalance, dip, excess,
    )  # fmt: skip
    padded = brackets.categories(brackets.pad(parse(text), 12))
    assert all(a[0] == b[0] for a, b in zip(category, padded, strict=True))
    assert brackets.to_text(brackets.pad(parse(text), 12)[0]) == text


@pytest.mark.parametrize("length", [0, 3])
def test_odd_lengths_are_refused(length):
    with pytest.raises(ValueError, match="length must be"):
        brackets.nested_strings(np.random.default_rng(0), 2, length)
    with pytest.raises(ValueError, match="length must be at least 4, got 3"):
        brackets.pad(parse("(())"), 3)
