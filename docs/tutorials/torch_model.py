"""A transformers model as a JAX function, by torchax: parameters move, buffers do not."""

import sys

import numpy as np
import optax


# --8<-- [start:port]
def port(model):
    """(loss_fn, params) of a causal language model of transformers."""
    import torchax

    weights, apply = torchax.extract_jax(model.eval())
    moving = {name for name, _ in model.named_parameters()}
    params = {name: x for name, x in weights.items() if name in moving}
    buffers = {name: x for name, x in weights.items() if name not in moving}

    def loss_fn(params, tokens):
        output = apply({**buffers, **params}, (tokens[:, :-1],), {"use_cache": False})
        return optax.softmax_cross_entropy_with_integer_labels(output.logits, tokens[:, 1:])

    return loss_fn, params


# --8<-- [end:port]


def main(folder, num_draws=4):
    import jax
    from transformers import AutoModelForCausalLM

    import jaxpattern as jp

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    loss_fn, params = port(model)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, 12))
    tokens = jax.numpy.asarray(tokens, jax.numpy.int32)
    posterior = jp.localized_posterior(loss_fn, params, tokens, nbeta=30.0, localization=300.0)
    plan = jp.Plan(num_chains=2, num_burnin=4, num_draws=num_draws, batch_size=4)
    last = f"*layers.{model.config.num_hidden_layers - 1}.mlp*"
    return jp.susceptibilities(
        jax.random.key(0), posterior, jp.sgld(step_size=1e-4), plan, probes={"text": tokens},
        components={"mlp": jp.by_path(last)}, estimator=jp.covariance(), progress=False,
    )  # fmt: skip


if __name__ == "__main__":
    print(main(sys.argv[1]))
