"""Choose which of two rules a model learns from data that fit both."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpattern as jp
from jaxpattern.data import brackets
from jaxpattern.models import TransformerConfig, classifier

START, END = 3, 4
LENGTHS = (8, 10, 12)
MODEL = TransformerConfig(
    vocab_size=5, context=14, num_layers=1, num_heads=2, d_model=16, mlp_width=64, positions="none"
)
LOSS = classifier.make_loss_fn(MODEL)  # (params, {"tokens", "label"}) -> losses [B]


# --8<-- [start:data]
def bracket_data(num=1000):
    """Nested and uneven strings to train on, and the withheld ones: equal counts, not nested."""
    rng = np.random.default_rng(0)

    def strings(make, size, label):
        rows = []
        for length in LENGTHS:
            found = make(rng, 16 * size, length)
            # All begin with "(" and end with ")", so that the ends give nothing away.
            found = found[(found[:, 0] == brackets.OPEN) & (found[:, -1] == brackets.CLOSE)][:size]
            ends = [np.full((size, 1), mark, np.int32) for mark in (START, END)]
            marked = np.concatenate([ends[0], found, ends[1]], axis=1)
            rows.append(brackets.pad(marked, max(LENGTHS) + 2))
        tokens = np.concatenate(rows)
        return {"tokens": tokens, "label": np.full(len(tokens), label, np.float32)}

    nested = strings(brackets.nested_strings, num // 6, 1)
    uneven = strings(brackets.uneven_strings, num // 6, 0)
    data = {name: np.concatenate([nested[name], uneven[name]]) for name in nested}
    return jax.device_put((data, strings(brackets.out_of_distribution, num // 15, 0)))


# --8<-- [end:data]


# --8<-- [start:train]
@cache
def adamw(weighted):
    """One object for all arms, so that they share a compiled program."""
    rate = optax.piecewise_constant_schedule(5e-3, {weighted: 0.3})
    return optax.adamw(rate, weight_decay=0.3)


@jax.jit
@jax.vmap
def start(seed):
    """Keys of the four quarters of a training run, and a new model."""
    keys = jax.random.split(jax.random.key(seed), 5)
    return keys[:4], classifier.init(keys[4], MODEL)


def train(seeds, data, weights, num_steps):
    """Some seeds on weighted strings; in the last quarter, at a lower rate, all count alike."""
    (keys, params), state = start(np.asarray(seeds)), None
    optimizer = adamw(num_steps * 3 // 4)
    for quarter in range(4):
        params, history = jp.train(
            keys[:, quarter], LOSS, params, data, optimizer, num_steps=num_steps // 4,
            batch_size=32, weights=weights if quarter < 3 else np.ones_like(weights),
            optimizer_state=state, progress=False,
        )  # fmt: skip
        state = history.optimizer_state
    return params


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
def right(params, data):
    """The share of strings that a model classifies as they are labeled."""
    return jnp.mean(LOSS(params, data) < np.log(2))


def rules(params, data, withheld):
    """Which seeds learned the training strings by which rule."""
    learned = np.asarray(right(params, data)) > 0.99
    nested = np.asarray(right(params, withheld))
    return {"NESTED": learned & (nested > 0.9), "EQUAL-COUNT": learned & (nested < 0.1)}


# --8<-- [end:train]


def main(num_seeds=8, num_steps=500, num_solutions=4, num_draws=10):
    data, withheld = bracket_data()
    nested = np.asarray(data["label"]) > 0.5

    # --8<-- [start:solutions]
    even = np.ones(len(nested), np.float32)
    solutions = {"NESTED": [], "EQUAL-COUNT": []}
    for group in range(8):  # until there are enough of each
        base = train(range(group * num_seeds, (group + 1) * num_seeds), data, even, num_steps)
        for rule, which in rules(base, data, withheld).items():
            print(f"{sum(which)} of {num_seeds} base seeds are {rule}")
            which &= np.asarray(right(base, data)) > 0.999  # all of them; else it is no minimum
            found = [jax.tree.map(lambda x, i=i: x[i], base) for i in np.flatnonzero(which)]
            solutions[rule] = (solutions[rule] + found)[:num_solutions]
        if all(len(found) == num_solutions for found in solutions.values()):
            break
    # --8<-- [end:solutions]

    # --8<-- [start:measure]
    watched = {
        "losses": lambda params: LOSS(params, data),
        "withheld": lambda params: LOSS(params, withheld),
    }
    plan = jp.Plan(num_chains=2, num_burnin=450, num_draws=num_draws, thin=45, batch_size=64)
    excess = {rule: [] for rule in solutions}
    for rule, found in solutions.items():
        for params in found:
            posterior = jp.localized_posterior(LOSS, params, data, nbeta=1e3, localization=3e3)
            chains = jp.measure(
                jax.random.key(7), posterior, jp.sgld(step_size=3e-6), plan,
                {"llc": jp.LLC(), **watched}, progress=False,
            )  # fmt: skip
            kept, side = (np.mean(chains[name] < np.log(2), axis=-1) for name in watched)
            print(f"{rule}: accuracy along the chains at least {kept.min():.3f}, "
                  f"on withheld strings {side.min():.2f} to {side.max():.2f}")  # fmt: skip
            print(chains["llc"])
            excess[rule].append(np.mean(chains["losses"], axis=(0, 1)) - LOSS(params, data))
    # --8<-- [end:measure]

    # --8<-- [start:weights]
    of_nested, of_equal = (np.stack(excess[rule]) for rule in ("NESTED", "EQUAL-COUNT"))
    size = np.sqrt(np.mean(of_nested**2, axis=0) + np.mean(of_equal**2, axis=0))
    score = (of_equal.mean(axis=0) - of_nested.mean(axis=0)) / np.maximum(size, 1e-12)

    def tilted(score, strength=1.4):
        """ρ ∝ exp(strength · score) in standard deviations; each label keeps its total weight."""
        weights = np.zeros(len(score), np.float32)
        for label in (nested, ~nested):
            tilt = np.exp(strength * (score[label] - score[label].mean()) / score[label].std())
            weights[label] = tilt / tilt.mean()
        return weights

    weights = {"towards NESTED": tilted(score), "towards EQUAL-COUNT": tilted(-score)}
    # --8<-- [end:weights]

    # --8<-- [start:check]
    rng = np.random.default_rng(1)
    permuted = weights["towards NESTED"].copy()
    for label in (nested, ~nested):
        permuted[label] = rng.permutation(permuted[label])
    arms = {"unweighted": even, **weights, "permuted NESTED": permuted}
    counts = {}
    for arm, rho in arms.items():
        fresh = train(range(1000, 1000 + num_seeds), data, rho, num_steps)
        learned = int(np.sum(np.asarray(right(fresh, data)) > 0.99))
        counts[arm] = {rule: int(np.sum(x)) for rule, x in rules(fresh, data, withheld).items()}
        print(f"{arm:20} {learned:2} of {num_seeds} learned, of these {counts[arm]}")
    # --8<-- [end:check]
    return score, weights, counts


if __name__ == "__main__":
    main()
