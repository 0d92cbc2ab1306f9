"""Find a circuit in the response of heads to tokens, and steer whether it forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import jaxpattern as jp
from jaxpattern.models import TransformerConfig, make_loss_fn, transformer

MODEL = TransformerConfig(vocab_size=32, context=32, num_layers=2, num_heads=2, d_model=32)
FORMED = 0.3  # the attention of an induction head from which the circuit counts as formed


# --8<-- [start:data]
def windows(rng, num):
    """Text of a bigram table, parts of which are copies of what stands before in the window.

    Returns tokens [num, T + 1], and [num, T]: which next tokens a copy gives away.
    """
    successors = rng.integers(MODEL.vocab_size, size=(MODEL.vocab_size, 8))
    tokens = np.zeros((num, MODEL.context + 1), np.int32)
    copied = np.zeros(tokens.shape, bool)
    for row, copy in zip(tokens, copied, strict=True):
        at = 1
        row[0] = rng.integers(MODEL.vocab_size)
        while at < len(row):
            length = min(int(rng.integers(5, 9)), len(row) - at)
            if at > length and rng.random() < 0.75:
                start = rng.integers(at - length + 1)
                row[at : at + length] = row[start : start + length]
                copy[at + 1 : at + length] = True  # where a copy begins is a surprise
            else:
                for i in range(at, at + length):
                    row[i] = rng.choice(successors[row[i - 1]])
            at += length
    return tokens, copied[:, 1:]


# --8<-- [end:data]


def letters(tokens):
    """Tokens as text."""
    return "".join("abcdefghijklmnopqrstuvwxyzABCDEF"[token] for token in tokens)


def area(score, member):
    """AUC: the chance that a random member has a higher score than a random other."""
    test = scipy.stats.mannwhitneyu(score[member], score[~member])
    return float(test.statistic / (member.sum() * (~member).sum()))


def main(num_steps=300, num_windows=512, num_probes=96, num_draws=8, seeds=(0, 1)):
    tokens, copied = windows(np.random.default_rng(0), num_windows)
    data, probes = jax.device_put((tokens, tokens[:num_probes]))

    # --8<-- [start:train]
    loss_fn = make_loss_fn(MODEL)  # (params, tokens [B, T + 1]) -> losses [B, T]
    optimizer = optax.adamw(2e-2)
    repeated = partial(jp.repeated_tokens, num=32, length=32, vocab_size=MODEL.vocab_size)
    blocks = jax.jit(repeated)(jax.random.key(7))

    def watch(params):
        attention = transformer.attention_patterns(params, blocks, config=MODEL)
        induction = jp.prefix_matching_score(attention, blocks)  # [layer, head]
        return {
            "induction": induction, "previous": jp.previous_token_score(attention),
            "params": params,
        }  # fmt: skip

    start = jax.jit(lambda key: transformer.init(jax.random.fold_in(key, 10**6), MODEL))

    def train(seed, weights):
        key = jax.random.key(seed)
        _, history = jp.train(
            key, loss_fn, start(key), data, optimizer, num_steps=num_steps, batch_size=32,
            weights=weights, metrics=watch, record_every=num_steps // 25, progress=False,
        )  # fmt: skip
        return history

    even = np.ones(copied.shape, np.float32)
    history = train(seeds[0], even)
    early, last = (jax.tree.map(lambda x, at=at: x[at], history.metrics) for at in (3, -1))
    # --8<-- [end:train]

    # --8<-- [start:measure]
    heads = jp.components(last["params"], kinds="head")  # l0h0, l0h1, l1h0, l1h1
    plan = jp.Plan(num_chains=2, num_burnin=30, num_draws=num_draws, thin=5, batch_size=8)

    def measure(params):
        posterior = jp.localized_posterior(loss_fn, params, data, nbeta=30.0, localization=20.0)
        return jp.susceptibilities(
            jax.random.key(1), posterior, jp.sgld(step_size=1e-2), plan,
            probes={"text": probes}, components=heads,
            estimator=jp.pathwise(window=20, every=10), progress=False,
        )  # fmt: skip

    response = measure(last["params"])
    # --8<-- [end:measure]

    # --8<-- [start:directions]
    directions = jp.principal_directions(response)
    print(directions)
    score = -np.asarray(directions.coordinates["text"][0])  # high: more weight protects the heads
    rows = jp.extreme_tokens(score, tokens[:num_probes], decode=letters, num=10, per_token=1)
    print(jp.format_tokens(rows))
    # --8<-- [end:directions]

    # --8<-- [start:check]
    before = measure(early["params"])
    print("head   looks at what followed, at the token before   AUC of copied tokens, and early on")
    found, known = {}, copied[:num_probes]
    for i, head in enumerate(response.rows):
        found[head] = [area(-np.asarray(r.chi["text"])[i], known) for r in (response, before)]
        looks = [float(last[name].ravel()[i]) for name in ("induction", "previous")]
        print(f"{head} {looks[0]:20.2f} {looks[1]:20.2f} {found[head][0]:25.2f}"
              f" {found[head][1]:14.2f}")  # fmt: skip
    print(f"first direction: AUC {area(score, known):.2f}")
    # --8<-- [end:check]

    # --8<-- [start:extend]
    @jax.jit
    def features(params, tokens):
        state = transformer.residual_states(params, tokens[:, :-1], config=MODEL)[-1]
        then = params["unembed"].T[tokens[:, 1:]]
        loss = loss_fn(params, tokens)[..., None]
        return jnp.concatenate([state, then, state * then, loss, jnp.exp(-loss)], axis=-1)

    x = features(last["params"], data)
    fit = jp.regress_coordinates(jax.random.key(2), x[:num_probes], score)
    score = np.asarray(fit.predict(x))
    print(f"all tokens from states of the model: held-out R² {float(fit.held_out_r2):.2f}, "
          f"AUC {area(score, copied):.2f}")  # fmt: skip
    # --8<-- [end:extend]

    # --8<-- [start:weights]
    tilt = score / score.std()
    arms = {"unweighted": even, "up": 1 + tilt, "down": 1 - tilt}
    arms = {arm: np.maximum(rho, 0).astype(np.float32) for arm, rho in arms.items()}
    arms["permuted up"] = np.random.default_rng(1).permutation(arms["up"].ravel())
    arms["permuted up"] = arms["permuted up"].reshape(copied.shape)
    steps = {}
    for arm, rho in arms.items():
        steps[arm] = []
        for seed in seeds:
            run = train(seed, rho) if (arm, seed) != ("unweighted", seeds[0]) else history
            best = np.asarray(run.metrics["induction"]).max(axis=(1, 2))
            formed = np.asarray(run.step)[best > FORMED]
            steps[arm].append(int(formed[0]) if formed.size else None)
        print(f"{arm:12} the circuit forms at step {steps[arm]}, effective sample size "
              f"{rho.sum() ** 2 / (rho**2).sum() / rho.size:.0%}")  # fmt: skip
    # --8<-- [end:weights]
    return found, area(score, copied), steps


if __name__ == "__main__":
    main()
