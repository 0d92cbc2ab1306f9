"""A Hugging Face checkpoint: load it, measure its heads per token, find directions, save it."""

import sys
from pathlib import Path

import jax
import numpy as np
import optax

import jaxpattern as jp


def read_tokens(folder, vocab_size, num, length):
    """Windows of the text beside the model, or random tokens where it has no tokenizer."""
    if (Path(folder) / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        from jaxpattern.data import text

        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        words = b"\n".join(text.python_corpus(300_000)["docstrings"]).decode(errors="replace")
        ids = np.asarray(tokenizer.encode(words).ids, np.int32)
        return ids[: num * length].reshape(num, length)
    return np.random.default_rng(0).integers(0, vocab_size, (num, length)).astype(np.int32)


def main(folder, out=None, num=16, length=16, num_draws=10):
    # --8<-- [start:load]
    model = jp.lm.load(folder)  # model.params, model.loss_fn, model.logits
    print(model)
    tokens = read_tokens(folder, model.spec.vocab_size, num, length)
    # --8<-- [end:load]

    # --8<-- [start:split]
    # Only the last layer is to move: what lies below is computed once.
    tail = jp.lm.split(model, layer=model.spec.num_layers - 1)
    data = tail.data(tokens)
    heads = jp.components(tail, kinds="head")
    # --8<-- [end:split]

    # --8<-- [start:measure]
    posterior = jp.localized_posterior(
        tail.loss_fn, tail.params, data, nbeta=30.0, localization=300.0
    )
    plan = jp.Plan(num_chains=4, num_burnin=40, num_draws=num_draws, thin=8, batch_size=8)
    response = jp.susceptibilities(
        jax.random.key(0), posterior, jp.sgld(step_size=1e-3), plan,
        probes={"text": data}, components=heads, progress=False,
    )  # fmt: skip
    print(response)  # one row per head, one column per token
    # --8<-- [end:measure]

    # --8<-- [start:directions]
    directions = jp.principal_directions(response)
    print("variance explained", np.round(np.asarray(directions.explained), 2))
    print("reliability       ", np.round(np.asarray(directions.reliability), 2))
    first = directions.coordinates["text"][0]
    for row in jp.extreme_tokens(first, tokens, decode=lambda ids: " ".join(map(str, ids)), num=3):
        print(f"{row.coordinate:+.2f}  …{row.before[-24:]} [{row.token}]")
    # --8<-- [end:directions]

    # --8<-- [start:weights]
    size = 0.1
    solution = jp.solve_weights(response, directions.target(0, size), method=jp.ridge())
    tuned, _ = jp.train(
        jax.random.key(1), tail.loss_fn, tail.params, data, optax.adamw(1e-5), num_steps=20,
        batch_size=8, weights=solution.over({"text": data}), progress=False,
    )  # fmt: skip
    if out is not None:
        jp.lm.save(model, out, params=tail.merge(tuned))  # transformers' from_pretrained reads it
    # --8<-- [end:weights]
    return response, directions, solution


if __name__ == "__main__":
    main(*sys.argv[1:3])
