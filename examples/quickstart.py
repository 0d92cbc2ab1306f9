"""Steer the data mixture of a small language model, and check what came of it.

A small transformer is trained on several sources of text in equal parts. How much does each
source's weight move the loss on each source? That is the response matrix, measured here by sampling
around the trained weights. Inverted, it says which mixture lowers the loss on one source while
another stays where it is. Two checks follow: the same posterior sampled again under the new
mixture, and models trained from scratch on both mixtures.

    python examples/quickstart.py
    python examples/quickstart.py --lower reference --by 0.002 --hold library
    python examples/quickstart.py --text FOLDER      # your own text: one sub-folder a source

The text is what the running Python installation carries, bytes are the tokens, and the files of a
source are either trained on or held out. Some minutes on two cores; needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxpattern as jp
from jaxpattern import plot
from jaxpattern.data import text
from jaxpattern.models import TransformerConfig, make_loss_fn, transformer
from stages import writable


class Settings(NamedTuple):
    """Everything that decides how long the run takes and how well it measures."""

    model: TransformerConfig = TransformerConfig(
        256, context=64, num_layers=1, num_heads=2, d_model=64, mlp_width=128
    )
    max_sources: int | None = None
    max_bytes: int = 400_000  # of a source
    train_windows: int = 768  # of a source, like the next
    held_out_windows: int = 24
    seeds: int = 4
    steps: int = 400
    batch_size: int = 8
    learning_rate: float = 4e-3
    nbeta: float = 3e4
    localization: float = 5e4
    step_size: float = 2.5e-6  # εP of about .7 in the stiffest direction
    measure: jp.Plan = jp.Plan(
        num_chains=4, num_burnin=54, num_draws=2, thin=12, num_batches=2, batch_size=8
    )
    check: jp.Plan = jp.Plan(
        num_chains=4, num_burnin=54, num_draws=4, thin=6, num_batches=4, batch_size=8
    )


QUICK = Settings(
    model=TransformerConfig(256, context=16, num_layers=1, num_heads=2, d_model=16),
    max_bytes=30_000, train_windows=48, held_out_windows=8, max_sources=3, seeds=2, steps=30,
    batch_size=8,
    measure=jp.Plan(num_chains=2, num_burnin=0, num_draws=4, thin=4, num_batches=2, batch_size=8),
    check=jp.Plan(num_chains=2, num_burnin=0, num_draws=4, thin=4, num_batches=2, batch_size=8),
)  # fmt: skip

# Follows how the chain itself answers to each source's weight. `jp.covariance()` is the estimator
# of the published work; it needs many more draws for the same error.
ESTIMATOR = jp.pathwise(mode="tangent", probe_batch=8)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure, solve, check and write; returns what the JSON file holds."""
    args = parse(argv)
    writable(args.out)
    settings = QUICK if args.quick else Settings()
    model = settings.model
    keys = jax.random.split(jax.random.key(args.seed), 3)
    clock = Clock()

    clock.stage("0. text")
    train, held_out = load_text(args, settings)
    sources = list(train)
    check_names(args, sources)
    for name in sources:
        print(
            f"   {name:12} {len(train[name])} windows to train on, {len(held_out[name])} held out"
        )

    clock.stage(f"1. train on equal parts ({settings.seeds} seeds at once)")
    loss_fn = make_loss_fn(model)
    data = np.concatenate(list(train.values()))
    seeds = jax.random.split(keys[0], settings.seeds)
    starts = [transformer.init(seed, model) for seed in seeds]
    start = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
    # One optimizer and one function of losses: another object would be compiled again.
    optimizer = optax.adamw(optax.cosine_decay_schedule(settings.learning_rate, settings.steps))
    held_out_losses = make_observable(loss_fn, held_out)
    losses_of = jax.jit(jax.vmap(held_out_losses))

    def train_on(mixture: dict[str, float]) -> tuple[Any, np.ndarray]:
        """Models trained on a mixture, from the same start and in the same order each time."""
        params, _ = jp.train(
            seeds, loss_fn, start, data, optimizer, num_steps=settings.steps,
            batch_size=settings.batch_size, weights=token_weights(mixture, train),
        )  # fmt: skip
        return params, np.asarray(losses_of(params))

    models, old_loss = train_on(dict.fromkeys(sources, 1.0))
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[0], models)  # the model to look into
    for name, loss in zip(sources, old_loss[0], strict=True):
        print(f"   held-out loss on {name:12} {loss:.3f} nats a byte")
    lower, hold = choose(args, dict(zip(sources, old_loss[0], strict=True)))

    clock.stage("2. measure the response of each held-out loss to the weight of each source")
    posterior = jp.localized_posterior(
        loss_fn, params, data, nbeta=settings.nbeta, localization=settings.localization
    )
    sampler = jp.sgld(step_size=settings.step_size)
    response = jp.susceptibilities(
        keys[1], posterior, sampler, settings.measure,
        observables={"loss": held_out_losses}, probes=train, estimator=ESTIMATOR,
    )  # fmt: skip
    response = replace(jp.group_mean(response), rows=tuple(sources))  # from loss/0, loss/1, …
    print_response(response)

    clock.stage(f"3. the mixture that lowers {lower!r} by {args.by:g} nats and holds {hold!r}")
    # The entropic method stays closest to equal parts, with every weight above 0 and of mean 1.
    target = {lower: -args.by, hold: 0.0}
    with warnings.catch_warnings(action="ignore", category=jp.UnreachableTargetWarning):
        solution = jp.solve_weights(response, target, method=jp.entropic())
    mixture = {s: float(solution.weights[s]) for s in sources}
    for name, weight in mixture.items():
        print(f"   {name:12} {weight:6.3f}  {'█' * round(20 * weight)}")
    print(
        f"   smallest weight {min(mixture.values()):.3f}, largest {max(mixture.values()):.3f}; ",
        end="",
    )
    print(
        f"effective sample size {float(solution.effective_sample_size) / response.num_samples:.0%}"
    )
    if float(solution.reached) < 0.99:
        print(f"   No mixture is predicted to do that: this one gets {float(solution.reached):.0%}")
        print("   of the way. Ask for less with --by, or hold another source.")
    if max(mixture.values()) > 2:
        print("   Some weights more than double: the prediction, which is linear, may be far off.")

    clock.stage("4a. check: sample the posterior of the new mixture, with the same random numbers")
    predicted = {
        s: (float(solution.predicted_shift[s]), float(solution.predicted_stderr[s]))
        for s in sources
    }
    realised = realised_shift(
        keys[2], posterior, posterior.reweight(token_weights(mixture, train)), sampler,
        settings.check, held_out_losses,
    )  # fmt: skip
    realised = dict(zip(sources, realised, strict=True))
    print("   shift of the expected loss, in 10⁻³ nats")
    print("   source            predicted            realized")
    for name in sources:
        mark = {lower: "  ← to be lowered", hold: "  ← to be held"}.get(name, "")
        pair = "   ".join(
            f"{1e3 * v:+8.3f} ± {1e3 * e:<6.3f}" for v, e in (predicted[name], realised[name])
        )
        print(f"   {name:12} {pair}{mark}")

    clock.stage(f"4b. check: train from scratch on the new mixture ({settings.seeds} seeds)")
    _, new_loss = train_on(mixture)
    change = new_loss - old_loss
    retrained = {
        s: (float(change[:, i].mean()), float(change[:, i].std(ddof=1) / math.sqrt(settings.seeds)))
        for i, s in enumerate(sources)
    }
    print("   change of the held-out loss, new mixture against equal parts, same start and batches")
    for i, name in enumerate(sources):
        mean, error = retrained[name]
        each = " ".join(f"{x:+.3f}" for x in change[:, i])
        print(f"   {name:12} {mean:+.4f} ± {error:.4f} nats   (seeds: {each})")
    if args.training:
        clock.stage("4c. predict that change by twins of the training runs on equal parts")
        run = jp.training_response(
            seeds, loss_fn, start, data, optimizer, num_steps=settings.steps,
            batch_size=settings.batch_size, observables={"loss": held_out_losses},
            sources=rows_of(train),
            mode="secant",  # runs as long as these are chaotic: what changes of a finite size do
        )  # fmt: skip
        foreseen = {
            s: (float(shift.value), float(shift.stderr))
            for s, shift in zip(sources, jp.predict(run, mixture).values(), strict=True)
        }
        print("   source            by the posterior    by training         realized by training")
        for name in sources:
            each = (predicted[name], foreseen[name], retrained[name])
            print(f"   {name:12}" + "".join(f"   {v:+8.4f} ± {e:.4f}" for v, e in each))
    else:
        foreseen = {}
        print(
            "   These models are free to move as far as training takes them; the posterior is tied"
        )
        print(
            "   to one set of parameters. The signs are what to compare, not the sizes. --training"
        )
        print("   predicts this change, too, by the response of the training run (minutes more).")

    clock.stage("5. write")
    result = {
        "weights": mixture,
        "target": target,
        "reached": float(solution.reached),
        "effective_sample_share": float(solution.effective_sample_size) / response.num_samples,
        "predicted_shift": as_numbers(predicted),
        "realised_shift": as_numbers(realised),
        "predicted_by_training": as_numbers(foreseen),
        "retrained_shift": as_numbers(retrained),
        "held_out_loss": {s: float(old_loss[:, i].mean()) for i, s in enumerate(sources)},
        "unit": "nats a byte",
        "settings": {
            **settings._asdict(),
            "seed": args.seed,
            "text": args.text,
            "quick": args.quick,
        },
        "data_sha256": text.fingerprint(np.asarray(data)),
        "version": jp.__version__,
    }
    page = jp.report(
        [response, solution], args.out / "report.html",
        realised={"sampled again": realised, "retrained": retrained},
        title=f"Mixture that lowers {lower} and holds {hold}",
    )  # fmt: skip
    picture, numbers = args.out / "quickstart.png", args.out / "weights.json"
    draw(response, solution, predicted, realised, target).savefig(picture)
    numbers.write_text(json.dumps(result, indent=2, default=lambda x: vars(x)) + "\n")
    clock.report()
    print(f"\nPage:    {page}\nPicture: {picture}\nWeights: {numbers}")
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lower", metavar="SOURCE", help="whose loss to lower (default: the highest)"
    )
    parser.add_argument(
        "--by", metavar="NATS", type=float, default=0.0015, help="by how much (%(default)s)"
    )
    parser.add_argument("--hold", metavar="SOURCE", help="whose loss to hold (default: the lowest)")
    parser.add_argument("--text", metavar="FOLDER", help="your own text, one sub-folder a source")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart_results"), help="(%(default)s)"
    )
    parser.add_argument(
        "--training", action="store_true", help="also predict retraining; takes minutes more"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows nothing")
    args = parser.parse_args(argv)
    if not (math.isfinite(args.by) and args.by > 0):
        parser.error(f"--by must be a positive number of nats, got {args.by:g}")
    if args.lower is not None and args.lower == args.hold:
        parser.error(f"--lower and --hold are the same source, {args.lower!r}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    args.error = parser.error
    return args


def load_text(args: argparse.Namespace, settings: Settings) -> tuple[dict, dict]:
    """Source → windows of tokens `[count, context + 1]`, to train on and held out."""
    length, train, held_out = settings.model.context + 1, {}, {}
    try:
        if args.text is None:
            corpus = text.python_corpus(settings.max_bytes, min_bytes=settings.max_bytes // 4)
        else:
            corpus = text.folder_corpus(args.text)
        for i, (name, documents) in enumerate(list(corpus.items())[: settings.max_sources]):
            sides = text.split_by_file(documents, seed=args.seed)
            counts = (settings.train_windows, settings.held_out_windows)
            for side, count, windows in zip(sides, counts, (train, held_out), strict=True):
                available = sum(len(document) // length for document in side)
                if not available:
                    args.error(f"{name!r} needs files of at least {length} bytes on both sides")
                windows[name] = text.windows(
                    side, length, min(count, available), seed=args.seed + i
                )
    except ValueError as error:
        args.error(str(error))
    return train, held_out


def check_names(args: argparse.Namespace, sources: Sequence[str]) -> None:
    if len(sources) < 2:
        args.error(
            f"a mixture needs two sources or more, found {sources}; give a folder with --text"
        )
    for option in ("lower", "hold"):
        name = getattr(args, option)
        if name is not None and name not in sources:
            args.error(f"--{option} {name!r} is not a source; there are {', '.join(sources)}")


def choose(args: argparse.Namespace, losses: dict[str, float]) -> tuple[str, str]:
    """The source to lower, by default the worst predicted, and the one to hold, the best."""
    ranked = sorted(losses, key=losses.__getitem__)
    lower = args.lower or next(s for s in reversed(ranked) if s != args.hold)
    return lower, args.hold or next(s for s in ranked if s != lower)


def token_weights(mixture: dict[str, float], train: dict[str, np.ndarray]) -> np.ndarray:
    """One weight for each predicted token, the same within a source."""
    return np.concatenate(
        [np.full((len(train[s]), train[s].shape[1] - 1), mixture[s], np.float32) for s in train]
    )


def rows_of(train: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where the windows of each source lie among those of all."""
    ends = np.cumsum([len(windows) for windows in train.values()])
    return {s: np.arange(end - len(train[s]), end) for s, end in zip(train, ends, strict=True)}


def make_observable(loss_fn, held_out: dict[str, Any]):
    """The held-out loss on every source, `[K]`: one pass of the model, and not one per source."""
    windows = jax.device_put(np.concatenate(list(held_out.values())))
    source = np.repeat(np.arange(len(held_out)), [len(part) for part in held_out.values()])
    share = (source == np.arange(len(held_out))[:, None]).astype(np.float32)
    share /= share.sum(axis=1, keepdims=True)

    def held_out_losses(params: Any) -> jax.Array:
        return share @ loss_fn(params, windows).mean(axis=1)

    return held_out_losses


def realised_shift(key, old, new, sampler, plan, observable) -> list[tuple[float, float]]:
    """New minus old expectation, draw by draw of chains that share their random numbers."""
    before, after = (
        np.asarray(jp.sample(key, posterior, sampler, plan, observable)) for posterior in (old, new)
    )
    shifts = [
        jp.summarize((after - before)[..., k], num_batches=plan.batches)
        for k in range(before.shape[-1])
    ]
    return [(float(shift.mean), float(shift.stderr)) for shift in shifts]


def print_response(response: jp.Response) -> None:
    """The table nβ q χ: the shift of the row's expected loss when the column's weight doubles."""
    columns = response.rows  # the same sources, in the same order
    chi, stderr, mass = jax.tree.map(np.asarray, (response.chi, response.stderr, response.mass))
    print("   10⁻³ nats by which the expected loss of the row rises when the weight of the column")
    print("   doubles (nβ q χ), and its standard error")
    print("   " + " " * 13 + "".join(f"{name[:13]:>15}" for name in columns))
    for k, row in enumerate(response.rows):
        cells = []
        for name in columns:
            factor = 1e3 * float(response.nbeta) * float(mass[name])
            value, error = float(chi[name][k]), float(stderr[name][k])
            cells.append(f"{factor * value:+8.2f} ± {factor * error:<4.2f}")
        print(f"   {row:13}" + "".join(f"{cell:>15}" for cell in cells))


def as_numbers(pairs: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {name: {"value": value, "stderr": error} for name, (value, error) in pairs.items()}


def draw(response, solution, predicted, realised, target):
    """One picture: the response, the weights it leads to, and what came of them."""
    figure = plot.Figure(figsize=(13, 4.4), layout="constrained", dpi=120)
    axes = figure.subplots(1, 3, width_ratios=[1.55, 0.85, 1])
    plot.response_matrix(response, ax=axes[0])
    plot.weights(solution, ax=axes[1])
    values = [{name: pair[0] for name, pair in side.items()} for side in (predicted, realised)]
    errors = tuple({name: pair[1] for name, pair in side.items()} for side in (predicted, realised))
    plot.shifts(*values, errors, target=target, ax=axes[2])
    return figure


class Clock:
    """Announces stages and reports how long each took."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, float]] = []

    def stage(self, name: str) -> None:
        self.marks.append((name, time.perf_counter()))
        print(f"\n{name}", flush=True)

    def report(self) -> None:
        ends = [start for _, start in self.marks[1:]] + [time.perf_counter()]
        print()
        for (name, start), end in zip(self.marks, ends, strict=True):
            print(f"   {end - start:6.1f} s  {name}")
        print(f"   {ends[-1] - self.marks[0][1]:6.1f} s  in all")


if __name__ == "__main__":
    main()
