"""The language models that are measured: small transformers, trained on library code."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpattern as jp
from jaxpattern.data import subwords, text
from jaxpattern.models import transformer

CONTEXT = 64
PATHWISE = transformer.TransformerConfig(
    vocab_size=256, context=CONTEXT, num_layers=2, num_heads=4, d_model=64
)
GPT2 = transformer.TransformerConfig(
    vocab_size=512, context=CONTEXT, num_layers=2, num_heads=4, d_model=64, mlp_width=256,
    positions="learned",
)  # fmt: skip
LARGE = transformer.TransformerConfig(
    vocab_size=512, context=CONTEXT, num_layers=4, num_heads=8, d_model=128, mlp_width=512,
    positions="learned",
)  # fmt: skip


class Trained(NamedTuple):
    """A loss, trained weights, training windows and held-out windows, tokens [count, context+1]."""

    loss_fn: transformer.NextTokenLoss
    params: Any
    data: jax.Array
    probes: jax.Array


def trained_model(
    config: transformer.TransformerConfig, steps: int, seed: int = 0, num_probes: int = 16
) -> Trained:
    """A model of library code: of bytes where its vocabulary is 256, else of sub-words."""
    documents = text.python_corpus(400_000 if config.vocab_size == 256 else 1_200_000)["library"]
    train, held_out = text.split_by_file(documents, 0.2, seed)
    length = config.context + 1
    if config.vocab_size == 256:
        data, probes = (
            text.windows(part, length, n, seed)
            for part, n in ((train, 2048), (held_out, num_probes))
        )
    else:
        tokenizer = subwords.train_tokenizer(train, config.vocab_size)
        data, probes = (
            np.random.default_rng(seed).permutation(
                subwords.token_windows(tokenizer, part, length)
            )[:n]
            for part, n in ((train, 4096), (held_out, num_probes))
        )
    loss_fn = transformer.make_loss_fn(config)
    data, probes = jnp.asarray(data), jnp.asarray(probes)
    start = transformer.init(jax.random.key(seed), config)
    rate = optax.cosine_decay_schedule(6e-3 if config.d_model <= 64 else 3e-3, steps, 0.05)
    params, history = jp.train(
        jax.random.key(seed + 1), loss_fn, start, data, optax.adamw(rate),
        num_steps=steps, batch_size=32, progress=False,
    )  # fmt: skip
    print(
        f"trained: {float(history.loss[-20:].mean()):.3f} nats a token after {steps} steps",
        flush=True,
    )
    return Trained(loss_fn, params, data, probes)
