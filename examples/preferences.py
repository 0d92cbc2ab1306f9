"""A reward head on pairs of texts: which pairs teach which preference, measured and inverted.

The loss of a pair is that of Bradley and Terry, −log σ(r(chosen) − r(rejected)). Each kind of pairs
prefers one source of the Python corpus to another. From the response of the held-out loss of each
kind to every pair come weights of the pairs that lower the first and hold the others; the head is
trained on from where it is on weighted and on unweighted pairs, and the shifts are compared.

    python examples/preferences.py      # half a minute
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpattern as jp
from jaxpattern.data import text

KINDS = {"prose": ("docstrings", "library"), "use": ("library", "tests"),
         "manual": ("reference", "docstrings")}  # fmt: skip
FEATURES, WIDTH = 128, 8


def features(windows):
    """Root counts of hashed pairs of bytes, [count, FEATURES]."""
    place = (windows[:, :-1] * 31 + windows[:, 1:] * 17) % FEATURES
    return np.sqrt(np.stack([np.bincount(row, minlength=FEATURES) for row in place])) / 8


def pairs(corpus, count, side):
    """Kind → pairs of features; training and held-out pairs are of different files."""

    def read(source, seed):
        documents = text.split_by_file(corpus[source], 0.3)[side]
        return jnp.asarray(features(text.windows(documents, 200, count, seed)), jnp.float32)

    return {kind: {"chosen": read(a, 0), "rejected": read(b, 1)} for kind, (a, b) in KINDS.items()}


def reward(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"][None]) @ params["out"]


def loss_fn(params, batch):
    """−log σ of the margin, one number a pair."""
    return jax.nn.softplus(reward(params, batch["rejected"]) - reward(params, batch["chosen"]))


def main(count=128, num_steps=600, num_draws=100, seeds=8):
    corpus = text.python_corpus(400_000, min_bytes=1000)
    probes, held_out = pairs(corpus, count, 0), pairs(corpus, count, 1)
    data = jax.tree.map(lambda *x: jnp.concatenate(x), *probes.values())
    noise = np.random.default_rng(0).normal(size=(FEATURES, WIDTH)).astype(np.float32)
    params = {"in": jnp.asarray(noise / 8), "bias": jnp.zeros(WIDTH), "out": jnp.ones(WIDTH) / 4}
    decay = optax.adamw(3e-3, weight_decay=0.1)
    params, _ = jp.train(
        jax.random.key(0), loss_fn, params, data, decay, num_steps=num_steps, batch_size=32,
        progress=False,
    )  # fmt: skip
    nbeta, localization = 100.0, 200.0
    posterior = jp.localized_posterior(
        loss_fn, params, data, nbeta=nbeta, localization=localization
    )
    observables = {kind: jp.mean_loss(loss_fn, batch) for kind, batch in held_out.items()}
    plan = jp.Plan(num_chains=4, num_burnin=60, num_draws=num_draws, thin=5, batch_size=32)
    response = jp.susceptibilities(
        jax.random.key(1), posterior, jp.sgld(step_size=1e-3), plan, observables=observables,
        probes=probes, progress=False,
    )  # fmt: skip
    print(response)
    target = {"prose": -0.004, "use": 0.0, "manual": 0.0}
    solution = jp.solve_weights(response, target, method=jp.box(lower=0.0, upper=4.0))
    print(solution)

    # Descent over a time nβ/γ moves expectations as the posterior does, to first order.
    descent = optax.sgd(nbeta / localization / num_steps)
    metrics = {kind: jax.jit(phi) for kind, phi in observables.items()}
    shifts = []
    for seed in range(seeds):
        ends = [
            jp.train(
                jax.random.key(2 + seed), loss_fn, params, data, descent, num_steps=num_steps,
                batch_size=32, weights=weights, progress=False,
            )[0]
            for weights in (None, solution.over(probes))
        ]  # fmt: skip
        shifts.append([float(phi(ends[1]) - phi(ends[0])) for phi in metrics.values()])
    shifts = np.array(shifts)
    for k, kind in enumerate(KINDS):
        error = shifts[:, k].std(ddof=1) / np.sqrt(seeds)
        print(f"{kind:8s} predicted {1e3 * float(solution.predicted_shift[kind]):+7.2f}, by other "
              f"draws {1e3 * float(solution.cross_fitted_shift[kind]):+7.2f}, realised "
              f"{1e3 * shifts[:, k].mean():+7.2f} ± {1e3 * error:.2f} 10⁻³ nats")  # fmt: skip
    return response, solution, shifts


if __name__ == "__main__":
    main()
