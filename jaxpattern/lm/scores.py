"""How far an attention-only circuit has formed: scores of heads, and of losses in context.

An induction head continues what it has seen: at a token that has occurred before, it attends to
what came *after* that occurrence, which a head of an earlier layer finds by attending to the
previous token. The first two scores measure these two heads on attention patterns, the other two
what the circuit does to the loss.

All are pure functions of patterns `[layer, B, H, T, S]` (attention from position t to s) or of
losses `[B, T]`, so they can be jitted, and vmapped over seeds by vmapping what makes the patterns.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpattern.validation import check_count, check_key, holds

_HIGHEST = jax.lax.Precision.HIGHEST


def repeated_tokens(
    key: Key[Array, ""],
    num: int,
    length: int,
    vocab_size: int,
    *,
    periods: tuple[int, int] | None = None,
) -> Int[Array, "num length"]:
    """Sequences of random tokens, each repeated with a period of its own.

        token_t = block_{t mod P},   P ~ uniform{low, …, high},   block without replacement

    The period varies because a head that looks back a fixed distance, whatever is there, passes
    for an induction head where that distance is always the right one. No token is twice in a
    block, so every match is a repetition.

    Args:
        key: typed random key.
        num: number of sequences.
        length: tokens a sequence; a loss of next tokens wants one more than the model reads.
        vocab_size: tokens are 0 … vocab_size − 1.
        periods: shortest and longest period, both included. By default a quarter and a half of
            the length, so that every sequence is seen at least twice.

    Returns:
        Tokens, int32.

    Raises:
        TypeError: a number is not an integer, or `key` is not a typed key.
        ValueError: the length is below 8 without `periods`, the periods are not in order from 2
            to length − 1, or the vocabulary is smaller than the longest period.
    """
    check_key(key)
    check_count("num", num, minimum=1)
    check_count("length", length, minimum=8 if periods is None else 3)
    check_count("vocab_size", vocab_size, minimum=1)
    low, high = (length // 4, length // 2) if periods is None else _pair("periods", periods)
    if not 2 <= low <= high < length:
        raise ValueError(
            f"periods must be two numbers from 2 to length - 1 = {length - 1} in order, "
            f"got {(low, high)}"
        )
    if vocab_size < high:
        raise ValueError(
            f"vocab_size must be at least the longest period {high}, for tokens that differ, "
            f"got {vocab_size}"
        )
    block_key, period_key = jax.random.split(key)
    period = jax.random.randint(period_key, (num, 1), low, high + 1)
    block = jax.vmap(lambda k: jax.random.choice(k, vocab_size, (high,), replace=False))(
        jax.random.split(block_key, num)
    )
    place = jnp.arange(length)[None, :] % period
    return jnp.take_along_axis(block, place, axis=1).astype(jnp.int32)


def prefix_matching_score(
    attention: Float[Array, "layer B H T T"], tokens: Int[Array, "B T"]
) -> Float[Array, "layer H"]:
    """Mean attention from a repeated token to the tokens after its earlier occurrences.

        mean over (b, t) that have such an s of  Σ_s a_ts [token_{s−1} = token_t],   1 ≤ s < t

    1 is a perfect induction head. Measure it on `repeated_tokens` of varying period: on a fixed
    period a head of fixed distance scores as well.

    Args:
        attention: patterns, such as `models.attention_patterns` returns; rows sum to 1.
        tokens: what they were computed on.

    Returns:
        One score a head, from 0 to 1; NaN under `jit` if no token is repeated.

    Raises:
        ValueError: the shapes do not fit, or no token is repeated.

    References:
        Olsson et al. 2022, arXiv 2209.11895; Wang & Murfet 2026, arXiv 2601.13548.
    """
    _check_attention(attention)
    _check_shape("tokens", tokens, (attention.shape[1], attention.shape[3]))
    length = tokens.shape[1]
    # same[b, t, s]: token_t is the one before s.
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    position = jnp.arange(length)
    earlier = (position[None, :] < position[:, None]) & (position >= 1)[None, :]
    same = (tokens[:, :, None] == before[:, None, :]) & earlier[None]
    repeated = jnp.any(same, axis=-1)
    if not holds(lambda x: x.any(), repeated):
        raise ValueError("tokens must hold a repeated token, got none; see repeated_tokens")
    # Summed a row at a time first: one float32 sum over B · T · S terms loses two more digits.
    weight = same.astype(attention.dtype)
    found = jnp.einsum("lbhts,bts->lbht", attention, weight, precision=_HIGHEST)
    return jnp.sum(found, axis=(1, 3)) / jnp.sum(repeated)


def previous_token_score(attention: Float[Array, "layer B H T T"]) -> Float[Array, "layer H"]:
    """Mean attention to the token before, a_{t,t−1} over t ≥ 1.

    Args:
        attention: patterns, such as `models.attention_patterns` returns; rows sum to 1.

    Returns:
        One score a head, from 0 to 1.

    Raises:
        ValueError: the patterns are not `[layer, B, H, T, T]` with T ≥ 2.
    """
    _check_attention(attention)
    back = jnp.diagonal(attention, offset=-1, axis1=3, axis2=4)
    return jnp.mean(back, axis=(1, 3))


def in_context_score(
    losses: Float[Array, "B T"],
    *,
    early: tuple[int, int] | None = None,
    late: tuple[int, int] | None = None,
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Mean loss at late positions minus mean loss at early ones; more negative is better.

        ( Σ ρ ℓ / Σ ρ over start ≤ t < stop of late )  −  ( the same of early )

    Args:
        losses: `[B, T]` of text, in nats.
        early: start and stop of the early positions; by default those from T/16 to T/8.
        late: start and stop of the late positions; by default the last eighth.
        weights: ρ, with 0 for padding; by default 1.

    Returns:
        The difference in nats.

    Raises:
        ValueError: the shapes do not fit, or positions are empty or outside the losses.

    References:
        Olsson et al. 2022, arXiv 2209.11895.
    """
    if losses.ndim != 2:
        raise ValueError(f"losses must be [B, T], got shape {list(losses.shape)}")
    length = losses.shape[1]
    if weights is None:
        weights = jnp.ones_like(losses)
    _check_shape("weights", weights, losses.shape)
    if early is None:
        early = (length // 16, max(length // 8, 1))
    if late is None:
        late = (length - max(length // 8, 1), length)

    def mean(name: str, span: tuple[int, int]) -> Array:
        start, stop = _pair(name, span)
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"{name} must be a start and a stop, in order, from 0 to {length}, "
                f"got {(start, stop)}"
            )
        part = weights[:, start:stop]
        if not holds(lambda part: part.sum() > 0, part):
            raise ValueError(f"weights are zero at all {name} positions, {start} to {stop - 1}")
        # Padding may hold anything, also what is not finite.
        weighted = jnp.where(part == 0, 0, part * losses[:, start:stop])
        return jnp.sum(weighted) / jnp.sum(part)

    return mean("late", late) - mean("early", early)


def repeated_bigrams(tokens: Int[Array, "B length"]) -> Bool[Array, "B T"]:
    """Which next tokens follow as they did before: that of t is s + 1's, and token_s = token_t.

        repeated_t = any over s < t of  token_s = token_t and token_{s+1} = token_{t+1}

    These are what induction predicts. Entry t is that of the loss of token t + 1.

    Raises:
        ValueError: the tokens are not `[B, T + 1]` with T ≥ 1.

    Examples:
        >>> jp.repeated_bigrams(jnp.array([[1, 2, 3, 1, 2]]))
        Array([[False, False, False,  True]], dtype=bool)
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be [B, T + 1], got shape {list(tokens.shape)}")
    first, second = tokens[:, :-1], tokens[:, 1:]
    same = (first[:, :, None] == first[:, None, :]) & (second[:, :, None] == second[:, None, :])
    return jnp.any(jnp.tril(same, -1), axis=-1)


def induction_loss(losses: Float[Array, "B T"], tokens: Int[Array, "B length"]) -> Float[Array, ""]:
    """Mean loss where a bigram is repeated; on `repeated_tokens`, from the second period on.

    Args:
        losses: `[B, T]` of next tokens, in nats.
        tokens: `[B, T + 1]`, what the losses are of.

    Returns:
        The mean in nats; NaN under `jit` if nothing is repeated. A model without induction is near
        log(vocabulary) on random tokens, and one that copies perfectly is at 0.

    Raises:
        ValueError: the shapes do not fit, or nothing is repeated.
    """
    repeated = repeated_bigrams(tokens)
    _check_shape("losses", losses, repeated.shape)
    if not holds(lambda x: x.any(), repeated):
        raise ValueError("tokens must hold a repeated bigram, got none; see repeated_tokens")
    return jnp.sum(jnp.where(repeated, losses, 0)) / jnp.sum(repeated)


def _check_attention(attention: Any) -> None:
    """Square patterns of every layer and head."""
    shape = tuple(attention.shape)
    if len(shape) != 5 or shape[3] != shape[4] or shape[3] < 2:
        raise ValueError(
            f"attention must be [layer, B, H, T, T] with T at least 2, got shape {list(shape)}"
        )


def _check_shape(name: str, array: Any, wanted: tuple[int, ...]) -> None:
    if tuple(array.shape) != tuple(wanted):
        raise ValueError(f"{name} must have shape {list(wanted)}, got {list(array.shape)}")


def _pair(name: str, value: Any) -> tuple[int, int]:
    """Two integers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be two integers, got {value!r:.80}")
    for number in value:
        check_count(name, number, minimum=0)
    return int(value[0]), int(value[1])
