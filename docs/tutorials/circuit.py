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
            if at > length and rng.random() < 0.75:
                start = rng.integers(at - length + 1)
                row[at : at + length] = row[start : start + length]
                copy[at + 1 : at + length] = True  # the first one of a copy comes by surprise
            else:
                for i in range(at, at + length):
                    row[i] = rng.choice(successors[row[i - 1]])
            at += length
    return jnp.asarray(tokens), copied[:, 1:]


# --8<-- [end:data]


def main(num_steps=800, num_windows=1024, num_draws=12, seeds=(1, 2)):
    rng = np.random.default_rng(0)
    successors = rng.integers(MODEL.vocab_size, size=(MODEL.vocab_size, 4))
    data, copied = windows(rng, num_windows, successors)

    # --8<-- [start:train]
    loss_fn = make_loss_fn(MODEL)  # (params, tokens [B, T + 1]) -> losses [B, T]
    optimizer = optax.adamw(1e-2)
    blocks = jp.repeated_tokens(jax.random.key(7), 32, MODEL.context, MODEL.vocab_size)

    def scores(params):
        attention = transformer.attention_patterns(params, blocks, config=MODEL)
        return {
            "induction": jp.prefix_matching_score(attention, blocks),  # [layer, head]
            "previous": jp.previous_token_score(attention),
        }

    @jax.jit
    def start(seed):
        return jax.random.key(seed), transformer.init(jax.random.key(1000 + seed), MODEL)

    def train(seed, weights=None, num_steps=num_steps):
        key, params = start(seed)
        return jp.train(
            key, loss_fn, params, data, optimizer, num_steps=num_steps, batch_size=32,
            weights=np.ones(copied.shape, np.float32) if weights is None else weights,
            metrics=scores, record_every=20, progress=False,
        )  # fmt: skip

    params, history = train(0)
    # --8<-- [end:train]

    # --8<-- [start:measure]
    heads = jp.components(params, kinds="head")  # l0h0, l0h1, l1h0, l1h1
    plan = jp.Plan(num_chains=4, num_burnin=30, num_draws=num_draws, thin=5, batch_size=8)

    def measure(params):
        posterior = jp.localized_posterior(loss_fn, params, data, nbeta=30.0, localization=20.0)
        return jp.susceptibilities(
            jax.random.key(1), posterior, jp.sgld(step_size=1e-2), plan,
            probes={"text": data[:96]}, components=heads,
            estimator=jp.pathwise(window=20, every=5), progress=False,
        )  # fmt: skip

    response = measure(params)
    # --8<-- [end:measure]

    # --8<-- [start:directions]
    directions = jp.principal_directions(response)
    print(directions)
    coordinate = np.asarray(directions.coordinates["text"][0])
    rows = jp.extreme_tokens(coordinate, np.asarray(data[:96]), num=5, per_sequence=1)
    print(jp.format_tokens(rows))
    # --8<-- [end:directions]
    return history, response, directions, copied
