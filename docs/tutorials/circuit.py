"""Find a circuit in the response of heads to tokens, and steer whether a fresh model forms it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpattern as jp
from jaxpattern.models import TransformerConfig, make_loss_fn, transformer

MODEL = TransformerConfig(vocab_size=32, context=32, num_layers=2, num_heads=2, d_model=32)


# --8<-- [start:data]
def windows(rng, num, successors):
    """Text of a bigram table, part of which is a copy of what stands before it in the window.

    Returns tokens [num, T + 1], and [num, T]: which next tokens a copy gives away.
    """
    tokens = np.zeros((num, MODEL.context + 1), np.int32)
    copied = np.zeros(tokens.shape, bool)
    for row, copy in zip(tokens, copied, strict=True):
        row[0], at = rng.integers(MODEL.vocab_size), 1
        while at < len(row):
            length = min(int(rng.integers(5, 9)), len(row) - at)
            if at > length and rng.random() < 0.6:
                start = rng.integers(at - length + 1)
                row[at : at + length] = row[start : start + length]
                copy[at + 1 : at + length] = True  # the first one of a copy comes by surprise
            else:
                for i in range(at, at + length):
                    row[i] = rng.choice(successors[row[i - 1]])
            at += length
    return jnp.asarray(tokens), copied[:, 1:]


# --8<-- [end:data]
