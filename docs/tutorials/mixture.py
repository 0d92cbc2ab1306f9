"""Steer a data mixture: measure, invert, retrain, check, and compare with a control."""

import jax
import jax.numpy as jnp
import optax

import jaxpattern as jp
from jaxpattern.data import text

SOURCES = ("docstrings", "library", "reference")


# --8<-- [start:loss]
def loss_fn(params, tokens):
    """Bytes predicted from the byte before them; tokens [B, T + 1] -> losses [B, T], in nats."""
    logits = params["read"][tokens[:, :-1]] @ params["write"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


# --8<-- [end:loss]


def main(num_steps=600, num_windows=96, num_draws=40):
    # --8<-- [start:data]
    corpus = text.python_corpus(100_000)
    files = {name: text.split_by_file(corpus[name]) for name in SOURCES}
    probes = {s: jnp.asarray(text.windows(fit, 33, num_windows)) for s, (fit, _) in files.items()}
    held_out = {s: text.windows(rest, 33, 16) for s, (_, rest) in files.items()}
    observables = jp.mean_losses(loss_fn, held_out)
    data = jnp.concatenate(list(probes.values()))
    # --8<-- [end:data]

    # --8<-- [start:train]
    start = {"read": jax.random.normal(jax.random.key(0), (256, 12)), "write": jnp.zeros((12, 256))}

    def train(weights=None):
        """The same start and the same batches each time: only the weights differ."""
        params, _ = jp.train(
            jax.random.key(1), loss_fn, start, data, optax.adam(1e-2), num_steps=num_steps,
            batch_size=32, weights=weights, progress=False,
        )  # fmt: skip
        return params

    params = train()
    # --8<-- [end:train]

    # --8<-- [start:measure]
    posterior = jp.localized_posterior(loss_fn, params, data, nbeta=1e3, localization=3e3)
    plan = jp.Plan(num_chains=4, num_burnin=100, num_draws=num_draws, thin=4, batch_size=16)
    response = jp.susceptibilities(
        jax.random.key(2), posterior, jp.sgld(step_size=1e-4), plan,
        observables=observables, probes=probes,
        estimator=jp.pathwise(mode="tangent", probe_batch=16), progress=False,
    )  # fmt: skip
    print(response)
    # --8<-- [end:measure]

    # --8<-- [start:invert]
    target = {"library": -0.002}  # nats; other rows are free to move
    solution = jp.solve_weights(response, target, method=jp.entropic())
    print(solution)
    # --8<-- [end:invert]

    # --8<-- [start:check]
    steered = train(solution.over(probes))
    moved = jnp.roll(jnp.stack([solution.weights[name] for name in probes]), 1)
    control = train(jnp.repeat(moved, num_windows)[:, None] * jnp.ones((1, 32)))
    for name, phi in observables.items():
        shifts = [float(phi(model) - phi(params)) for model in (steered, control)]
        predicted = float(solution.predicted_shift[name])
        print(f"{name:12} predicted {predicted:+.4f}  weighted {shifts[0]:+.4f}"
              f"  permuted {shifts[1]:+.4f}")  # fmt: skip
    # --8<-- [end:check]
    return response, solution, {n: float(phi(steered) - phi(params))
                                for n, phi in observables.items()}  # fmt: skip


if __name__ == "__main__":
    main()
