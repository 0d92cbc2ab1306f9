"""Windows of sub-word tokens, chosen for what can be copied in them, and the classes of tokens.

The vocabulary is a byte-level BPE trained on the spot by `tokenizers`, which is optional and needs
no network. A window holds T + 1 tokens; a model predicts the last T, and whatever is said here of
a token is an array [N, T] like the losses: entry t belongs to the prediction of token t + 1.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpattern.lm.scores import repeated_bigrams
from jaxpattern.validation import check_count, check_number


def train_tokenizer(documents: Sequence[bytes], vocab_size: int) -> Any:
    """A byte-level BPE of `vocab_size` tokens, the 256 bytes among them.

    Raises:
        ImportError: `tokenizers` is not installed.
    """
    check_count("vocab_size", vocab_size, minimum=256)
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            'sub-word tokens need tokenizers, which is optional: pip install "jaxpattern[text]"'
        ) from error
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text.decode("utf-8", "replace") for text in documents), trainer)
    return tokenizer


def vocabulary(tokenizer: Any) -> list[str]:
    """The text of each token; a byte that is no text on its own is a replacement character."""
    return [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]


def token_windows(
    tokenizer: Any, documents: Sequence[bytes], length: int
) -> Int[np.ndarray, "count length"]:
    """All windows of the documents, from the start of each, without overlap, int32."""
    check_count("length", length, minimum=2)
    texts = [text.decode("utf-8", "replace") for text in documents]
    pieces = []
    for encoding in tokenizer.encode_batch(texts):
        tokens = np.asarray(encoding.ids, np.int32)
        count = len(tokens) // length
        pieces.append(tokens[: count * length].reshape(count, length))
    return np.concatenate(pieces) if pieces else np.zeros((0, length), np.int32)


def bigram_log_probs(
    tokens: Int[np.ndarray, "count length"], vocab_size: int, smoothing: float = 5.0
) -> Float[np.ndarray, "vocab vocab"]:
    """log p(next | token), each row of counts mixed with `smoothing` draws of the unigrams."""
    check_number("smoothing", smoothing, minimum=0.0, exclusive=True)
    pairs = np.zeros((vocab_size, vocab_size))
    np.add.at(pairs, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1.0)
    unigram = (pairs.sum(axis=0) + 1.0) / (pairs.sum() + vocab_size)
    rows = pairs.sum(axis=1, keepdims=True)
    return np.log((pairs + smoothing * unigram) / (rows + smoothing)).astype(np.float32)


def last_successor(tokens: Int[np.ndarray, "count length"]) -> Int[np.ndarray, "count context"]:
    """What followed the last earlier occurrence of each token but the last; −1 where it is new."""
    context = tokens.shape[1] - 1
    seen = tokens[:, :context, None] == tokens[:, None, :context]
    seen &= np.tri(context, k=-1, dtype=bool)[None]
    last = context - 1 - np.argmax(seen[:, :, ::-1], axis=2)
    successor = np.take_along_axis(tokens, last + 1, axis=1)
    return np.where(seen.any(axis=2), successor, -1)


def copy_gain(
    tokens: Int[np.ndarray, "count length"],
    bigram: Float[np.ndarray, "vocab vocab"],
    share: float = 0.5,
    chunk: int = 4096,
) -> Float[np.ndarray, " count"]:
    """Nats a window by which copying beats a bigram model.

    Copying predicts (1 − share) p_bigram + share · 1[the successor of the token's last
    occurrence], where there is one.
    """
    gains = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        plain = bigram[part[:, :-1], part[:, 1:]]
        successor = last_successor(part)
        mixed = np.log((1 - share) * np.exp(plain) + share * (successor == part[:, 1:]))
        gains.append(np.where(successor >= 0, mixed - plain, 0.0).sum(axis=1))
    return np.concatenate(gains)


def token_classes(
    tokens: Int[np.ndarray, "count length"], texts: Sequence[str]
) -> dict[str, Bool[np.ndarray, "count context"]]:
    """Classes of the predicted tokens; by their text but for the first, which is by context.

    `repeated bigram`: the token and the one before occurred together earlier in the window.
    `word part`: letters that go on after a letter. `word start`: letters after something else.
    `delimiter`: brackets, quotes, commas, operators. `indentation`: white space with a line break,
    or two blanks or more. `number`: digits.
    """
    letters = np.array([bool(re.fullmatch(r"\s?[^\W\d]+", text)) for text in texts])
    ends = np.array([bool(re.search(r"[^\W\d]$", text)) for text in texts])
    glued = np.array([bool(re.match(r"[^\W\d]", text)) for text in texts])
    delimiter = np.array([bool(re.fullmatch(r"\s?[^\w\s]+", text)) for text in texts])
    blank = np.array(
        [bool(re.fullmatch(r"\s+", text)) and (len(text) > 1 or text == "\n") for text in texts]
    )
    number = np.array([bool(re.fullmatch(r"\s?\d+", text)) for text in texts])
    now, then = tokens[:, 1:], tokens[:, :-1]
    part = letters[now] & glued[now] & ends[then]
    return {
        "repeated bigram": np.asarray(repeated_bigrams(jnp.asarray(tokens))),
        "word part": part,
        "word start": letters[now] & ~part,
        "delimiter": delimiter[now],
        "indentation": blank[now],
        "number": number[now],
    }


def bytes_saved(
    tokens: Int[np.ndarray, "count length"], texts: Sequence[str], level: int = 9
) -> Float[np.ndarray, "count context"]:
    """Bytes of each token minus the bytes it adds to the window so far under DEFLATE."""
    coded = [text.encode("utf-8", "replace") for text in texts]
    saved = np.zeros((len(tokens), tokens.shape[1] - 1), np.float32)
    for row, window in enumerate(tokens):
        stream = zlib.compressobj(level, zlib.DEFLATED, -15)
        stream.compress(coded[window[0]])
        before = len(stream.copy().flush())
        for t, token in enumerate(window[1:]):
            stream.compress(coded[token])
            after = len(stream.copy().flush())
            saved[row, t] = len(coded[token]) - (after - before)
            before = after
    return saved
