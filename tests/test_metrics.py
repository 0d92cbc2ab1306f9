"""Structure metrics: heads built by hand with known scores, and loops in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config

import jaxpattern as jp
from jaxpattern.models import TransformerConfig, attention_patterns, make_loss_fn, transformer

NUM, LENGTH, VOCAB = 6, 24, 17


@functools.cache
def varying():
    return jp.repeated_tokens(jax.random.key(0), 200, 64, 100)


@functools.cache
def fixed():
    return jp.repeated_tokens(jax.random.key(0), 20, 64, 100, periods=(20, 20))


def periods_of(tokens):
    """The distance to the next occurrence of the first token."""
    return 1 + np.argmax(np.asarray(tokens)[:, 1:] == np.asarray(tokens)[:, :1], axis=1)


def pattern(tokens, attend):
    """One head `[1, B, 1, T, S]` that puts the weights `attend(sequence, t)` on s ≤ t."""
    B, T = tokens.shape
    attention = np.zeros((1, B, 1, T, T), np.float32)
    for b, sequence in enumerate(np.asarray(tokens)):
        for t in range(T):
            attention[0, b, 0, t] = attend(sequence, t)
    return jnp.asarray(attention)


def one(T, s):
    return np.eye(T)[s]


def induction(sequence, t):
    """The token after the last earlier occurrence; without one, the first token."""
    earlier = [s for s in range(t) if sequence[s] == sequence[t]]
    return one(len(sequence), earlier[-1] + 1 if earlier else 0)


def back(distance):
    return lambda sequence, t: one(len(sequence), max(t - distance, 0))


def uniform(sequence, t):
    return (np.arange(len(sequence)) <= t) / (t + 1)


def head(tokens, attend):
    return float(jp.prefix_matching_score(pattern(tokens, attend), tokens)[0, 0])


def test_repeated_tokens_repeat_at_periods_that_vary():
    tokens, periods = np.asarray(varying()), periods_of(varying())
    assert tokens.dtype == np.int32
    assert set(periods) == set(range(16, 33))
    for sequence, period in zip(tokens, periods, strict=True):
        assert len(set(sequence[:period])) == period
        np.testing.assert_array_equal(sequence[period:], sequence[:-period])
    assert set(periods_of(fixed())) == {20}
    # 200 · 64 draws of 100 tokens: each comes about 128 times, in blocks of about 24.
    counts = np.bincount(tokens.ravel(), minlength=100)
    assert counts.min() > 64
    assert counts.max() < 256


def test_an_induction_head_scores_one():
    assert head(varying(), induction) == pytest.approx(1, abs=1e-6)


def test_a_uniform_head_scores_the_share_of_the_targets():
    """(t // P) earlier occurrences among t + 1 tokens, over all t ≥ P."""
    shares = [(t // P) / (t + 1) for P in periods_of(varying()) for t in range(P, 64)]
    assert head(varying(), uniform) == pytest.approx(np.mean(shares), rel=1e-6)


def test_a_head_of_fixed_distance_scores_at_a_fixed_period_only():
    assert head(fixed(), back(19)) == pytest.approx(1, abs=1e-6)
    for distance in range(1, 40):
        # A sixteenth or so of the periods have that distance; their multiples may have it too.
        assert head(varying(), back(distance)) < 0.2


def test_previous_token_score():
    score = lambda attend: float(jp.previous_token_score(pattern(fixed(), attend))[0, 0])  # noqa: E731
    assert score(back(1)) == 1
    assert score(back(2)) == pytest.approx(1 / 63)  # at t = 1 there is only token 0 to look at
    assert score(uniform) == pytest.approx(np.mean([1 / (t + 1) for t in range(1, 64)]))


def random_attention(layers=2, heads=3):
    rng = np.random.default_rng(1)
    a = rng.gamma(1.0, size=(layers, NUM, heads, LENGTH, LENGTH)) * np.tri(LENGTH)
    return a / a.sum(-1, keepdims=True)


def random_tokens():
    """Tokens with repetitions of all sorts, also of one token in a row."""
    return np.random.default_rng(2).integers(0, 5, (NUM, LENGTH))


def test_scores_of_heads_match_loops():
    attention, tokens = random_attention(), random_tokens()
    matching, count = np.zeros((2, 3)), 0
    previous = []
    for b in range(NUM):
        for t in range(LENGTH):
            after = [s + 1 for s in range(t - 1) if tokens[b, s] == tokens[b, t]]
            matching += attention[:, b, :, t, after].sum(0)
            count += bool(after)
            if t:
                previous.append(attention[:, b, :, t, t - 1])
    given = jnp.asarray(attention, jnp.float32)
    np.testing.assert_allclose(
        jax.jit(jp.prefix_matching_score)(given, jnp.asarray(tokens)), matching / count, rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.jit(jp.previous_token_score)(given), np.mean(previous, axis=0), rtol=1e-5
    )


def test_repeated_bigrams_and_their_loss_match_loops():
    tokens = random_tokens()
    losses = np.random.default_rng(3).gamma(2.0, size=(NUM, LENGTH - 1))
    expected = np.zeros(losses.shape, bool)
    for b in range(NUM):
        for t in range(LENGTH - 1):
            bigram = tuple(tokens[b, t : t + 2])
            expected[b, t] = any(tuple(tokens[b, s : s + 2]) == bigram for s in range(t))
    assert expected.any()
    np.testing.assert_array_equal(jp.repeated_bigrams(jnp.asarray(tokens)), expected)
    given = jnp.asarray(losses, jnp.float32).at[~expected].set(jnp.nan)
    loss = jax.jit(jp.induction_loss)(given, jnp.asarray(tokens))
    assert float(loss) == pytest.approx(losses[expected].mean(), rel=1e-6)


def test_bigrams_of_repeated_tokens_repeat_from_the_second_period_on():
    expected = np.arange(63)[None] >= periods_of(varying())[:, None]
    np.testing.assert_array_equal(jp.repeated_bigrams(varying()), expected)


def test_in_context_score_of_known_losses():
    """ℓ_bt = 3 − t/100 + b: the difference of mean positions over 100."""
    losses = jnp.asarray(3 - np.arange(32)[None] / 100 + np.arange(4)[:, None], jnp.float32)
    assert float(jp.in_context_score(losses)) == pytest.approx((2.5 - 29.5) / 100, abs=1e-5)
    score = jp.in_context_score(losses, early=(0, 1), late=(10, 20))
    assert float(score) == pytest.approx(-0.145, abs=1e-5)
    # Padding: the second half of the last two sequences, whatever is there.
    weights = jnp.ones((4, 32)).at[2:, 16:].set(0)
    padded = jnp.where(weights == 0, jnp.nan, losses)
    expected = np.asarray(losses)[:2, 28:].mean() - np.asarray(losses)[:, 2:4].mean()
    score = jax.jit(jp.in_context_score)(padded, weights=weights)
    assert float(score) == pytest.approx(expected, abs=1e-5)


def test_metrics_of_seeds_by_vmap():
    config_ = TransformerConfig(vocab_size=VOCAB, context=16, num_layers=2, num_heads=2, d_model=8)
    tokens = jp.repeated_tokens(jax.random.key(1), 4, 17, VOCAB)

    def metrics(params):
        attention = attention_patterns(params, tokens[:, :-1], config=config_)
        losses = make_loss_fn(config_)(params, tokens)
        return (
            jp.prefix_matching_score(attention, tokens[:, :-1]),
            jp.previous_token_score(attention),
            jp.in_context_score(losses),
            jp.induction_loss(losses, tokens),
        )

    seeds = [transformer.init(jax.random.key(seed), config_) for seed in range(3)]
    together = jax.jit(jax.vmap(metrics))(jax.tree.map(lambda *x: jnp.stack(x), *seeds))
    assert [part.shape for part in together] == [(3, 2, 2), (3, 2, 2), (3,), (3,)]
    for i, params in enumerate(seeds):
        for part, alone in zip(together, jax.jit(metrics)(params), strict=True):
            np.testing.assert_allclose(part[i], alone, rtol=1e-4, atol=1e-6)
    # New weights bet on nothing.
    np.testing.assert_allclose(together[3], np.log(VOCAB), atol=0.5)


SQUARE = np.full((1, 2, 1, 8, 8), 1 / 8, np.float32)
TOKENS = np.zeros((2, 8), np.int32)
LOSSES = np.ones((2, 8), np.float32)
BAD = {
    "periods order": (
        lambda: jp.repeated_tokens(jax.random.key(0), 1, 16, 50, periods=(9, 5)),
        ValueError,
        r"periods must be .*length - 1 = 15 in order, got \(9, 5\)",
    ),
    "periods single": (
        lambda: jp.repeated_tokens(jax.random.key(0), 1, 16, 50, periods=5),
        TypeError,
        "periods must be two integers, got 5",
    ),
    "small vocabulary": (
        lambda: jp.repeated_tokens(jax.random.key(0), 1, 16, 7),
        ValueError,
        "vocab_size must be at least the longest period 8.*got 7",
    ),
    "short": (
        lambda: jp.repeated_tokens(jax.random.key(0), 1, 7, 50),
        ValueError,
        "length must be at least 8",
    ),
    "key": (lambda: jp.repeated_tokens(0, 1, 16, 50), TypeError, "key must be a typed key"),
    "attention": (
        lambda: jp.previous_token_score(jnp.ones((2, 8, 8))),
        ValueError,
        r"attention must be \[layer, B, H, T, T\].*got shape \[2, 8, 8\]",
    ),
    "tokens": (
        lambda: jp.prefix_matching_score(SQUARE, TOKENS[:, 1:]),
        ValueError,
        r"tokens must have shape \[2, 8\], got \[2, 7\]",
    ),
    "no repetition": (
        lambda: jp.prefix_matching_score(SQUARE, jnp.arange(16).reshape(2, 8)),
        ValueError,
        "tokens must hold a repeated token",
    ),
    "no repeated bigram": (
        lambda: jp.induction_loss(LOSSES, jnp.arange(18).reshape(2, 9)),
        ValueError,
        "tokens must hold a repeated bigram",
    ),
    "losses": (
        lambda: jp.induction_loss(LOSSES, TOKENS),
        ValueError,
        r"losses must have shape \[2, 7\], got \[2, 8\]",
    ),
    "late": (
        lambda: jp.in_context_score(LOSSES, late=(4, 9)),
        ValueError,
        r"late must be .*from 0 to 8, got \(4, 9\)",
    ),
    "all padding": (
        lambda: jp.in_context_score(LOSSES, weights=jnp.asarray(LOSSES).at[:, 7:].set(0)),
        ValueError,
        "weights are zero at all late positions, 7 to 7",
    ),
}


@pytest.mark.parametrize(("act", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(act, error, message):
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            act()
    finally:
        config.update("jaxtyping_disable", False)
