"""Read the induction circuit of a small language model, and steer whether it forms.

An attention-only transformer learns to copy: at a token that has occurred before, some head looks
at what came after it. Here that circuit is found in the response of the heads to the training
tokens, without being told what to look for, and the tokens are weighted along it. Fresh models
trained on the weighted tokens form the circuit earlier, or not at all.

    python examples/induction_circuit.py                       # what fits in a quarter of an hour
    python examples/induction_circuit.py --seeds 8 --arms all  # everything, some hours on two cores
    python examples/induction_circuit.py --scale paper         # the published sizes, for a GPU

The default trains the arms unweighted, up, down and the permuted controls of both on two fresh
seeds. Everything is kept by stage in `--out`, so an interrupted run goes on where it stopped, and
more seeds or arms are added to those that are there. Needs tokenizers and matplotlib.

How it goes. The strongest direction of the response has all heads on one side; the next one sets
the heads of layer 0 against those of layer 1. Each of the two groups is then measured moving
together. A score has a part that bigrams and trigrams alone decide, for which no circuit is needed,
and the rest, which is about context. In context the first group turns out to be needed for repeated
bigrams (AUC 0.87, and 0.93 when measured again around a model trained on the first weights). On
seeds 500 to 507, drawn after the arms were fixed, steps to the circuit over those of the unweighted
run, median [95 % interval], at an effective sample size of 60 %:

    up 0.36 [0.36, 0.37]   half up 0.48 [0.45, 0.50], its held-out loss 1.011 times the unweighted
    down, half down: not within 1,000 steps in any of eight (unweighted: 410 to 460)
    permuted up, down 1.19, 1.23
    repeated bigrams 0.36 [0.32, 0.39]: as many steps as "up" in six seeds, 10 more in one, 20 fewer
        in one
    weights of the first round 0.41   bigram loss - loss 0.43   gzip 0.67   gradient similarity 0.80
    no landscape (nβ = 0), one round 0.42 [0.36, 0.48]   local noise, one round 0.54 [0.48, 0.59]
    second up, down 1.17 [0.95, 1.33], 1.09 [1.00, 1.24]; permuted 1.12, 1.08

So the landscape does not matter to the first round: what noise alone breaks in the heads, without
what trigrams decide, gives weights as good (the scores correlate 0.76 with those of "up").

What the second structure is about is what bigrams alone need the heads of layer 1 for, above all at
the start of words. Its weights leave the first score alone, and the time at which the circuit forms
no more than permuted weights change it; the loss at starts of words ends 0.37 ± 0.02 nats apart
between second up and down (permuted 0.01 ± 0.01). Not all is left alone: repeated bigrams end 0.29
nats worse with the second up, 0.07 with permuted weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import jaxpattern as jp
from jaxpattern.data import subwords, text
from jaxpattern.lm import scores as metrics
from jaxpattern.models import TransformerConfig, make_loss_fn, transformer
from stages import Stages
from weighting import area, sample_share

FORMED = 0.3  # the prefix-matching score of the best head from which the circuit counts as formed
RELIABLE = 0.5  # the agreement of two halves from which a direction is taken for more than noise
SHARE = 0.6  # the effective sample size of weights; arms called half go half the way to them
STRATA = 40  # of the first score, in each of which the weights of the second have mean 1
FIRST_SEED = 500  # of the retraining; the base model has seed 0


class Settings(NamedTuple):
    """Everything that decides how long the run takes and how well it measures."""

    model: TransformerConfig = TransformerConfig(
        512, context=64, num_layers=2, num_heads=4, d_model=64
    )
    sources: tuple[str, ...] = ("library",)
    max_bytes: int = 20_000_000  # of a source
    windows: int = 8192
    learning_rate: float = 1.2e-2
    batch_size: int = 32
    base_steps: int = 1200
    steps: int = 1000
    record_every: int = 10
    # Where along the base run the response is measured: when structure has formed.
    measure_at: int = 800
    nbeta: float = 30.0
    localization: float = 20.0
    step_size: float = 1.5e-2
    probe_windows: int = 96
    reference_windows: int = 64
    probe_plan: jp.Plan = jp.Plan(
        num_chains=2, num_burnin=30, num_draws=12, thin=5, num_batches=2, batch_size=8
    )
    # Windows whose tokens are measured directly; the others are predicted from the model's states.
    measured_windows: int = 2048
    token_plan: jp.Plan = jp.Plan(
        num_chains=2, num_burnin=30, num_draws=12, thin=5, num_batches=2, batch_size=8, chunk=64
    )
    window: int = 20
    token_window: int = 10
    spacing: int = 5
    # How long the base model is trained on the first weights before it is measured again.
    again_steps: int = 400
    again_windows: int = 1024
    eval_windows: int = 64
    eval_sequences: int = 32
    seeds: int = 2


SCALES = {
    "small": Settings(),
    "paper": Settings(
        model=TransformerConfig(5000, context=1024, num_layers=2, num_heads=8, d_model=256),
        sources=text.SOURCES, windows=6_000, learning_rate=1e-3, batch_size=100,
        base_steps=50_000, steps=50_000, record_every=500, measure_at=30_000,
        localization=300.0, step_size=1e-3, probe_windows=5, reference_windows=32,
        probe_plan=jp.Plan(
            num_chains=4, num_burnin=100, num_draws=200, thin=5, batch_size=16, chunk=32
        ),
        measured_windows=200,
        token_plan=jp.Plan(
            num_chains=4, num_burnin=100, num_draws=40, thin=5, batch_size=16, chunk=8
        ),
        window=60, token_window=60, again_steps=20_000, again_windows=200, eval_windows=64,
        seeds=8,
    ),
    "test": Settings(
        model=TransformerConfig(260, context=16, num_layers=2, num_heads=1, d_model=16),
        max_bytes=60_000, windows=64, batch_size=8, base_steps=20, steps=20, measure_at=20,
        localization=300.0, step_size=1e-3,
        probe_windows=8, reference_windows=8,
        probe_plan=jp.Plan(
            num_chains=2, num_burnin=4, num_draws=4, thin=2, num_batches=2, batch_size=4
        ),
        measured_windows=32,
        token_plan=jp.Plan(
            num_chains=2, num_burnin=4, num_draws=4, thin=2, num_batches=2, batch_size=4, chunk=16
        ),
        window=4, token_window=4, spacing=2, again_steps=20, again_windows=16, eval_windows=8,
        eval_sequences=8, seeds=2,
    ),
}  # fmt: skip

FEW = ("unweighted", "up", "down", "permuted up", "permuted down")
CONTROLS = ("no landscape", "local noise")
SECOND = ("second up", "second down", "permuted second up", "permuted second down")
ARMS = (
    *FEW, "half up", "half down", "first round", "repeated bigram",
    "bigram loss - loss", "gzip", "gradient", *CONTROLS, *SECOND,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """All stages; returns what `report.json` holds."""
    args = parse(argv)
    settings = SCALES[args.scale]
    store = Stages(args.out, jp.__version__)

    store.title("a. text, cut into tokens and windows in which copying pays")
    data = load_data(store, settings)
    lab = Lab(settings, data)

    store.title("b. base model")
    base = train_base(store, lab)
    print_base(lab, base)

    store.title("c. response matrix of the heads")
    params = lab.unpack(base["snapshots"][settings.measure_at // settings.record_every])
    response, probes = measure_probes(store, lab, params)
    directions = jp.principal_directions(response)
    groups = print_directions(lab, directions, probes)

    store.title("d. weights for every token of the training set")
    scores = score_tokens(store, lab, params, groups, args.arms)
    arms = build_arms(scores, args.arms)
    print_arms(lab, arms)

    store.title(f"e. training from scratch, seeds {FIRST_SEED} to {FIRST_SEED + args.seeds - 1}")
    curves = retrain(store, lab, arms, args.seeds)

    store.title("f. report")
    result = summarise(lab, arms, curves)
    result["second"] = clearest(lab, scores["second"])[1]
    result["settings"] = {"scale": args.scale, **settings._asdict(), "seeds": args.seeds}
    print_report(result)
    (args.out / "report.json").write_text(json.dumps(result, indent=2, default=vars) + "\n")
    draw(lab, curves).savefig(args.out / "induction_circuit.png")
    draw_structure(lab, directions, scores["up"], args.out)
    page = jp.report(
        response, args.out / "report.html", tokens={"tokens": np.asarray(lab.train)[probes]},
        decode=lab.decode, title="Response of the heads to the tokens of the training text",
    )  # fmt: skip
    print(f"\nPage: {page}\nResults in {args.out}")
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="small", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="(induction_results/SCALE)")
    parser.add_argument("--seeds", type=int, help="fresh seeds of every arm")
    parser.add_argument(
        "--arms", nargs="+", default=list(FEW), metavar="ARM", help=f"'all', or some of {ARMS}"
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("induction_results", args.scale)
    args.seeds = SCALES[args.scale].seeds if args.seeds is None else args.seeds
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    if args.arms == ["all"]:
        args.arms = list(ARMS)
    unknown = set(args.arms) - set(ARMS)
    if unknown:
        parser.error(f"--arms: {sorted(unknown)} are none of {', '.join(ARMS)}")
    args.arms = [arm for arm in ARMS if arm in {"unweighted", *args.arms}]
    return args


# Which settings the arrays of a stage depend on.
DATA = ("model", "sources", "max_bytes", "windows", "eval_windows")
TRAINING = (*DATA, "learning_rate", "batch_size", "record_every", "eval_sequences")
BASE = (*TRAINING, "base_steps")
MEASURE = (*BASE, "measure_at", "reference_windows")
SAMPLING = (*MEASURE, "nbeta", "localization", "step_size", "spacing")
PROBES = (*SAMPLING, "probe_windows", "probe_plan", "window")
TOKENS = (*SAMPLING, "measured_windows", "token_plan", "token_window")


def chosen_settings(settings: Settings, fields: Sequence[str]) -> dict[str, Any]:
    return {field: getattr(settings, field) for field in fields}


def digest(array: np.ndarray) -> str:
    return text.fingerprint(array)[:16]


def load_data(store: Stages, settings: Settings) -> dict[str, np.ndarray]:
    """Windows of training and of held-out files, their vocabulary, and a bigram model."""

    def compute() -> dict[str, Any]:
        corpus = text.python_corpus(settings.max_bytes, min_bytes=1_000)
        sides: tuple[list[bytes], list[bytes]] = ([], [])
        for source in settings.sources:
            for side, part in zip(
                sides, text.split_by_file(corpus.get(source, []), 0.12), strict=True
            ):
                side.extend(part)
        model = settings.model
        tokenizer = subwords.train_tokenizer(sides[0], model.vocab_size)
        train, held_out = (
            subwords.token_windows(tokenizer, side, model.context + 1) for side in sides
        )
        if len(train) < settings.windows:
            raise SystemExit(f"this Python holds {len(train)} windows, not {settings.windows}")
        bigram = subwords.bigram_log_probs(train, model.vocab_size)
        share = settings.windows / len(train)

        def keep(windows: np.ndarray, count: int) -> np.ndarray:
            """Those where copying beats the bigram model most, in their order."""
            gain = subwords.copy_gain(windows, bigram)
            return windows[np.sort(np.argsort(-gain, kind="stable")[:count])]

        return {
            "train": keep(train, settings.windows),
            "held_out": keep(held_out, max(settings.eval_windows, round(share * len(held_out)))),
            "bigram": bigram,
            "vocabulary": np.array(subwords.vocabulary(tokenizer)),
            "share": share,
        }

    data = store.stage("data", compute, **chosen_settings(settings, DATA))
    count, length = data["train"].shape
    print(f"   {count} windows of {length} tokens to train on, the {data['share']:.0%} in which")
    print(f"   copying pays most, and {len(data['held_out'])} held out")
    return data


class Lab:
    """The model, the data and what is measured along a training run."""

    def __init__(self, settings: Settings, data: dict[str, np.ndarray]) -> None:
        self.settings, self.model = settings, settings.model
        self.loss_fn = make_loss_fn(settings.model)
        self.optimizer = optax.adamw(settings.learning_rate)
        self.train = jnp.asarray(data["train"])
        self.texts = [str(word) for word in data["vocabulary"]]
        self.decode = lambda tokens: "".join(self.texts[i] for i in tokens)
        self.bigram = data["bigram"]
        self.classes = subwords.token_classes(data["train"], self.texts)
        # A random choice that is fixed: files of one kind lie side by side.
        order = np.random.default_rng(0).permutation(len(data["held_out"]))
        self.held_out = jnp.asarray(data["held_out"][order])
        self.watched = self.held_out[: settings.eval_windows]
        watched = subwords.token_classes(np.asarray(self.watched), self.texts)
        self.watched_classes = jnp.asarray(np.stack(list(watched.values())), jnp.float32)
        self.repeated = metrics.repeated_tokens(
            jax.random.key(7), settings.eval_sequences, self.model.context, self.model.vocab_size
        )
        params = transformer.init(jax.random.key(0), self.model)
        self._unravel = ravel_pytree(params)[1]

    def unpack(self, flat: np.ndarray) -> Any:
        """Weights from one long vector."""
        return self._unravel(jnp.asarray(flat))

    def watch(self, params: Any) -> dict[str, jax.Array]:
        """What is recorded along a run."""
        attention = transformer.attention_patterns(params, self.repeated, config=self.model)
        losses = self.loss_fn(params, self.watched)
        member = self.watched_classes
        return {
            "prefix": metrics.prefix_matching_score(attention, self.repeated),
            "previous": metrics.previous_token_score(attention),
            "in_context": metrics.in_context_score(losses),
            "loss": jnp.mean(losses),
            "class_loss": jnp.sum(member * losses[None], axis=(1, 2))
            / jnp.maximum(jnp.sum(member, axis=(1, 2)), 1.0),
        }

    def watch_and_keep(self, params: Any) -> dict[str, jax.Array]:
        return {**self.watch(params), "snapshots": ravel_pytree(params)[0]}

    def start(self, key: jax.Array) -> Any:
        return transformer.init(jax.random.fold_in(key, 1), self.model)

    def run(
        self, keys: jax.Array, steps: int, weights: Any = None, watch: Any = None
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """Train from scratch, one model a key; records have a leading seed axis with keys [S]."""
        weights = None if weights is None else jnp.asarray(weights)
        start = self.start(keys) if keys.ndim == 0 else jax.vmap(self.start)(keys)
        params, history = jp.train(
            keys, self.loss_fn, start, self.train, self.optimizer, num_steps=steps,
            batch_size=self.settings.batch_size, weights=weights, metrics=watch or self.watch,
            record_every=self.settings.record_every, progress=False,
        )  # fmt: skip
        return params, {"step": np.asarray(history.step), **history.metrics}


def train_base(store: Stages, lab: Lab) -> dict[str, np.ndarray]:
    def compute() -> dict[str, Any]:
        key = jax.random.key(0)
        return lab.run(key, lab.settings.base_steps, watch=lab.watch_and_keep)[1]

    return store.stage("base", compute, **chosen_settings(lab.settings, BASE))


def train_again(lab: Lab, weights: np.ndarray) -> dict[str, Any]:
    """The base model's start and batches, on weighted tokens."""
    params, curve = lab.run(jax.random.key(0), lab.settings.again_steps, weights)
    return {
        "params": ravel_pytree(params)[0],
        "formed": formation(curve["step"], curve["prefix"]),
    }


def formation(step: np.ndarray, prefix: np.ndarray) -> float:
    """The first record at which some head matches prefixes; infinite if there is none."""
    formed = np.flatnonzero(prefix.reshape(len(prefix), -1).max(axis=1) > FORMED)
    return float(step[formed[0]]) if formed.size else math.inf


def print_base(lab: Lab, base: dict[str, np.ndarray]) -> None:
    print("   step   prefix matching   previous token   in-context score   held-out loss")
    for i in range(0, len(base["step"]), max(1, len(base["step"]) // 10)):
        best = [base[name][i].max() for name in ("prefix", "previous")]
        print(
            f"   {base['step'][i]:5d} {best[0]:13.2f} {best[1]:17.2f} "
            f"{base['in_context'][i]:17.2f} {base['loss'][i]:17.3f}"
        )
    step = formation(base["step"], base["prefix"])
    print(f"   prefix matching passes {FORMED} at step {step:g}")


def heads_of(params: Any) -> dict[str, jp.Restriction]:
    return jp.components(params, kinds="head")


def group_of(params: Any, names: Sequence[str]) -> jp.Restriction:
    """Several heads as one component, with the norms through which they read."""
    heads = heads_of(params)
    layers = sorted({name[1:].split("h")[0] for name in names})
    norms = [jp.by_path(f"layers/{layer}/attn_norm/*") for layer in layers]
    return jp.union(params, *(heads[name] for name in names), *norms)


def measure_probes(store: Stages, lab: Lab, params: Any) -> tuple[jp.Response, np.ndarray]:
    """χ of every head's excess loss to the tokens of some windows, and which these are."""
    settings, rows = lab.settings, tuple(heads_of(params))
    order = np.random.default_rng(1).permutation(settings.windows)
    probes = order[: settings.probe_windows]
    by_probe = ("chi", "stderr", "halves", "batches")
    by_row = ("mean", "mean_stderr", "rhat", "ess", "diverged")

    def measure() -> dict[str, Any]:
        response = susceptibilities(
            lab, params, heads_of(params), settings.probe_plan, settings.window,
            lab.train[probes],
        )  # fmt: skip
        found = {name: getattr(response, name)["tokens"] for name in by_probe}
        return found | {name: getattr(response, name) for name in by_row}

    kept = store.stage("response", measure, **chosen_settings(settings, PROBES))
    chi = kept["chi"]
    response = jp.Response(
        rows=rows, nbeta=jnp.float32(settings.nbeta), cost=0.0, num_samples=chi[0].size,
        mass={"tokens": jnp.full(chi.shape[1:], 1 / chi[0].size)},
        **{name: {"tokens": jnp.asarray(kept[name])} for name in by_probe},
        **{name: jnp.asarray(kept[name]) for name in by_row},
    )  # fmt: skip
    return response, probes


def susceptibilities(
    lab: Lab,
    params: Any,
    components: dict[str, jp.Restriction],
    plan: jp.Plan,
    window: int,
    probes: jax.Array,
    **changes: float,
) -> jp.Response:
    """χ of the components around these weights; `changes` are to nβ, γ and ε."""
    settings = lab.settings._replace(**changes)
    posterior = jp.localized_posterior(
        lab.loss_fn, params, lab.train, nbeta=settings.nbeta, localization=settings.localization
    )
    order = np.random.default_rng(2).permutation(settings.windows)
    return jp.susceptibilities(
        jax.random.key(1), posterior, jp.sgld(step_size=settings.step_size), plan,
        probes={"tokens": probes}, reference=lab.train[order[: settings.reference_windows]],
        components=components,
        estimator=jp.pathwise(window=window, every=settings.spacing),
    )  # fmt: skip


def print_directions(
    lab: Lab, directions: jp.PrincipalDirections, probes: np.ndarray
) -> list[tuple[str, ...]]:
    """The directions, and the two groups of heads that one of them sets against each other.

    The rule knows no labels. A direction on which all heads load alike says how much a token needs
    heads at all. Taken is the strongest one that is not such, and on which two halves of the draws
    agree: the signs of its loadings divide the heads into two groups that different tokens need.
    """
    tokens = np.asarray(lab.train)[probes]
    print("   loadings   " + " ".join(f"{row:>5}" for row in directions.rows))
    taken = None
    for k, loading in enumerate(np.asarray(directions.loadings)):
        agreement = float(directions.reliability[k])
        mixed = 0.1 < float(np.sum(np.where(loading > 0, loading**2, 0.0))) < 0.9
        if taken is None and mixed and agreement > RELIABLE:
            taken = k
        print(
            f"   {k + 1:2}.        {' '.join(f'{x:+5.2f}' for x in loading)}   "
            f"{float(directions.explained[k]):4.0%} of the variance, "
            f"{float(directions.noise_variance[k] / directions.variance[k]):4.0%} of it noise, "
            f"halves agree {agreement:.2f}{'' if mixed else ', all alike'}"
        )
        if k < 3:
            score = np.asarray(directions.coordinates["tokens"][k])
            print("      " + areas_of(lab, score, probes))
            rows = jp.extreme_tokens(
                score, tokens, decode=lab.decode, num=5, per_token=1, per_sequence=1
            )
            print("      " + jp.format_tokens(rows).replace("\n", "\n      "))
    why = f"the strongest contrast on which halves agree above {RELIABLE}"
    if taken is None:
        taken, why = 1, f"though on no contrast do halves agree above {RELIABLE}: it may be noise"
    print(f"   Taken: direction {taken + 1}, {why}.")
    loading = np.asarray(directions.loadings[taken])
    groups = [
        tuple(np.array(directions.rows)[side].tolist()) for side in (loading < 0, loading > 0)
    ]
    print(f"   It sets {', '.join(groups[0])} against {', '.join(groups[1])}.")
    return groups


def areas_of(lab: Lab, score: np.ndarray, windows: Any = slice(None)) -> str:
    """How well a score tells each class of tokens from the others."""
    areas = {name: area(score, member[windows]) for name, member in lab.classes.items()}
    return "AUC: " + ", ".join(f"{name} {value:.2f}" for name, value in areas.items())


class Model(NamedTuple):
    """Weights, and what they make of every training token."""

    params: Any
    losses: np.ndarray  # [N, T]
    without: np.ndarray  # [N, T, H], how much they rise without a head, or without a layer's heads


def look_at(lab: Lab, params: Any) -> Model:
    heads = heads_of(params)
    layers = [[name for name in heads if name[1:].split("h")[0] == str(i)]
              for i in range(lab.model.num_layers)]  # fmt: skip
    losses = all_losses(lab, params)

    def rise(names: Sequence[str]) -> np.ndarray:
        rest = params
        for name in names:
            rest = heads[name].embed(jax.tree.map(jnp.zeros_like, heads[name].select(rest)), rest)
        return np.asarray(all_losses(lab, rest) - losses)

    without = [rise(names) for names in ([name] for name in heads)] + [rise(x) for x in layers]
    return Model(params, np.asarray(losses), np.stack(without, axis=-1))


def score_tokens(
    store: Stages, lab: Lab, params: Any, groups: list[tuple[str, ...]], arms: Sequence[str]
) -> dict[str, np.ndarray]:
    """A score for every training token and every idea of what is worth more weight, `[N, T]`.

    s = −χ of the excess loss of a group of heads, all of which move together, since heads that do
    the same thing stand in for one another. It is high if the token's loss rises when these heads
    are disturbed: more weight on such tokens lowers that excess loss, and protects what they do.
    Of s the part is taken that is not one of bigrams or trigrams alone: the context is wanted.

    The score is then measured a second time, around a model trained on the weights of the first:
    what these weights strengthen stands out more there.
    """
    settings = lab.settings
    base = cache(lambda: look_at(lab, params))

    def measured(
        stage: str, group: Sequence[str], model: Callable[[], Model] = base, *,
        count: int | None = None, around: str = "base", **changes: float,
    ) -> np.ndarray:  # fmt: skip
        order = np.random.default_rng(3).permutation(settings.windows)
        chosen = np.sort(order[: count or settings.measured_windows])

        def measure() -> dict[str, Any]:
            start = model().params
            found = susceptibilities(
                lab, start, {"+".join(group): group_of(start, group)}, settings.token_plan,
                settings.token_window, lab.train[chosen], **changes,
            )  # fmt: skip
            chi = np.asarray(found.chi["tokens"][0])
            kept = {"chi": chi, "halves": found.halves["tokens"][:, 0]}
            if len(chosen) < settings.windows:
                score = standardised(-chi)
                kept["predicted"], kept["r2"] = predict_scores(lab, model(), chosen, score)
            return kept

        depends = chosen_settings(settings, TOKENS) | {"group": group, "around": around} | changes
        kept = store.stage(stage, measure, windows_measured=len(chosen), **depends)
        halves = np.corrcoef(*kept["halves"].reshape(2, -1))[0, 1]
        score = -kept["chi"]
        print(f"   {stage}: {score.size} tokens measured, halves agree {halves:.2f}")
        if len(chosen) < settings.windows:
            score, fit = kept["predicted"], kept["r2"]
            print(f"      predicted for all tokens from the model's states, held-out R² {fit:.2f}")
        print("      " + areas_of(lab, score))
        return standardised(score)

    tokens = np.asarray(lab.train)
    pair = [measured("+".join(group), group) for group in groups]
    contextual = [in_context(score, tokens) for score in pair]
    for group, score in zip(groups, contextual, strict=True):
        print(f"   In context, {', '.join(group)}: {areas_of(lab, score)}")
    # Of the two structures the one that is more clearly about some class of tokens is steered.
    clear = [clearest(lab, score) for score in contextual]
    main = int(clear[1] > clear[0])
    print(
        f"   Steered is what {', '.join(groups[main])} together are needed for in context: of all "
        f"classes it tells {clear[main][1]!r} best, the other one {clear[1 - main][1]!r}."
    )
    first = at_share(contextual[main], SHARE)
    again = store.stage(
        "again", lambda: train_again(lab, first),
        weights=digest(first), **chosen_settings(settings, (*BASE, "again_steps")),
    )  # fmt: skip
    print(
        f"   The base model trained on these weights forms the circuit at step {again['formed']:g}"
    )
    measured_again = measured(
        "second_round", groups[main], lambda: look_at(lab, lab.unpack(again["params"])),
        count=settings.again_windows, around=digest(again["params"]),
    )  # fmt: skip
    other = pair[1 - main]
    scores = {
        "up": in_context(measured_again, tokens),
        "first round": contextual[main],
        # What bigrams alone need the other group for.
        "second": standardised(other - in_context(other, tokens, 2, scale=False)),
    }
    print("      in context: " + areas_of(lab, scores["up"]))
    print("      the other group, bigrams alone: " + areas_of(lab, scores["second"]))
    if "no landscape" in arms:
        found = measured("no_landscape", groups[main], nbeta=1e-3)
        scores["no landscape"] = in_context(found, tokens)
    if "local noise" in arms:
        found = measured(
            "local_noise", groups[main],
            localization=50 * settings.localization, step_size=settings.step_size / 50,
        )  # fmt: skip
        scores["local noise"] = in_context(found, tokens)
    scores["repeated bigram"] = lab.classes["repeated bigram"].astype(np.float32)
    scores["bigram loss - loss"] = -lab.bigram[tokens[:, :-1], tokens[:, 1:]] - np.asarray(
        all_losses(lab, params)
    )
    if "gzip" in arms:
        scores["gzip"] = subwords.bytes_saved(tokens, lab.texts)
    if "gradient" in arms:
        component = group_of(params, groups[main])
        kept = store.stage(
            "gradient", lambda: {"s": gradient_similarity(lab, params, component)},
            group=list(groups[main]), **chosen_settings(settings, MEASURE),
        )  # fmt: skip
        scores["gradient"] = in_context(kept["s"], tokens)
    for name, other in scores.items():
        if name != "up":
            value = np.corrcoef(scores["up"].ravel(), other.ravel())[0, 1]
            print(f"   correlation of the first with {name}: {value:+.2f}")
    return scores


@partial(jax.jit, static_argnums=0)
def _losses(loss_fn: Any, params: Any, chunks: jax.Array) -> jax.Array:
    return jax.lax.map(lambda chunk: loss_fn(params, chunk), chunks)


def in_chunks(tokens: jax.Array, most: int = 64) -> jax.Array:
    size = math.gcd(len(tokens), most)
    return tokens.reshape(-1, size, tokens.shape[-1])


def all_losses(lab: Lab, params: Any) -> jax.Array:
    losses = _losses(lab.loss_fn, params, in_chunks(lab.train))
    return losses.reshape(-1, losses.shape[-1])


def predict_scores(
    lab: Lab, model: Model, chosen: np.ndarray, score: np.ndarray
) -> tuple[np.ndarray, float]:
    """The scores of all tokens from the model's states, fitted on those measured; held-out R².

    The states are the residual stream that is read out (as far as the logits show it), the readout
    vector of the next token, the product of the two, functions of the loss, and how much it rises
    without a head. The fit replaces the measured values too: it holds less noise than they do.
    """
    params, losses, without = model
    readout = np.linalg.pinv(np.asarray(params["unembed"], np.float64)).astype(np.float32)

    @jax.jit
    def features(tokens: jax.Array, loss: jax.Array, without: jax.Array) -> jax.Array:
        state = transformer.logits(params, tokens[:, :-1], config=lab.model) @ readout
        then = params["unembed"].T[tokens[:, 1:]] * lab.model.d_model
        other = jnp.stack([loss, loss**2, jnp.exp(-loss)], axis=-1)
        parts = [state, then, state * then, other, without, jnp.tanh(without)]
        return jnp.concatenate(parts, axis=-1)

    def of(rows: np.ndarray) -> np.ndarray:
        return np.asarray(features(lab.train[rows], losses[rows], without[rows]))

    def parts(rows: np.ndarray) -> list[np.ndarray]:
        return np.array_split(rows, max(1, len(rows) // 128))

    x = np.concatenate([of(rows) for rows in parts(chosen)])
    fit = jp.regress_coordinates(jax.random.key(2), x, score)
    everything = parts(np.arange(len(lab.train)))
    predicted = np.concatenate([fit.predict(jnp.asarray(of(rows))) for rows in everything])
    return predicted, fit.held_out_r2


def gradient_similarity(lab: Lab, params: Any, restriction: jp.Restriction) -> jax.Array:
    """⟨∇φ, ∇ℓ_z⟩ in the weights of a component, for every token: −χ to first order, at w*."""
    order = np.random.default_rng(2).permutation(lab.settings.windows)
    reference = lab.train[order[: 4 * lab.settings.reference_windows]]

    def losses(position: Any, params: Any, tokens: jax.Array) -> jax.Array:
        return lab.loss_fn(restriction.embed(position, params), tokens)

    @jax.jit
    def similar(params: Any, reference: jax.Array, chunks: jax.Array) -> jax.Array:
        position = restriction.select(params)
        slope = jax.grad(lambda p: losses(p, params, reference).mean())(position)
        return jax.lax.map(
            lambda chunk: jax.jvp(lambda p: losses(p, params, chunk), (position,), (slope,))[1],
            chunks,
        )

    return similar(params, reference, in_chunks(lab.train)).reshape(len(lab.train), -1)


def standardised(score: np.ndarray) -> np.ndarray:
    return (score - score.mean()) / score.std()


def in_context(
    score: np.ndarray, tokens: np.ndarray, longest: int = 3, scale: bool = True
) -> np.ndarray:
    """The score without what bigrams, then trigrams, …, alone decide.

    That is the mean over all tokens of the same n-gram, drawn to 0 where they are few.
    """
    score, length = score - score.mean(), score.shape[1]
    size = int(tokens.max()) + 2
    ends = longest - 1  # where the first token that is predicted lies; before the window is nothing
    padded = np.pad(tokens.astype(np.int64), ((0, 0), (longest - 2, 0)), constant_values=size - 1)
    for n in range(2, longest + 1):
        words = sum(padded[:, ends - k : ends - k + length] * size**k for k in range(n))
        _, which, count = np.unique(words, return_inverse=True, return_counts=True)
        mean = np.bincount(which.ravel(), score.ravel()) / (count + 3)
        score = score - mean[which].reshape(score.shape)
    return standardised(score) if scale else score


def clearest(lab: Lab, score: np.ndarray) -> tuple[float, str]:
    """How far the best told class of tokens is from no relation, and its name."""
    return max((abs(area(score, member) - 0.5), name) for name, member in lab.classes.items())


def normalised(weights: np.ndarray) -> np.ndarray:
    """Weights of mean 1, none negative."""
    weights = np.maximum(weights, 0.0)
    return (weights / weights.mean()).astype(np.float32)


def at_share(score: np.ndarray, share: float) -> np.ndarray:
    """Weights 1 + α s, none negative, with α such that their effective sample size is this share.

    Of all weights of this sample size they have the largest mean score.
    """
    score = (score - score.min()) if set(np.unique(score)) <= {0, 1} else score - score.mean()
    score = score / score.std()
    low, high = 0.0, 100.0
    for _ in range(40):
        alpha = (low + high) / 2
        enough = sample_share(normalised(1 + alpha * score)) > share
        low, high = (alpha, high) if enough else (low, alpha)
    return normalised(1 + low * score)


def halfway(weights: np.ndarray) -> np.ndarray:
    """Half the way from no weights to these."""
    return (1 + weights) / 2


def beside(weights: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The weights with mean 1 at every level of a score that is to be left alone."""
    edges = np.quantile(held, np.linspace(0, 1, STRATA + 1)[1:-1])
    stratum = np.searchsorted(edges, held).ravel()
    mean = np.bincount(stratum, weights.ravel()) / np.maximum(1, np.bincount(stratum))
    return normalised(weights / mean[stratum].reshape(weights.shape))


def build_arms(scores: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray | None]:
    """Weights of every arm; all but the second and what goes half the way have one sample size."""

    def weights(name: str) -> np.ndarray:
        if name.startswith("permuted "):
            plain = weights(name.removeprefix("permuted "))
            rng = np.random.default_rng(ARMS.index(name))
            return rng.permutation(plain.ravel()).reshape(plain.shape)
        if name.startswith("half "):
            return halfway(weights(name.removeprefix("half ")))
        sign = -1 if name.endswith("down") else 1
        if name.startswith("second"):
            return beside(halfway(at_share(sign * scores["second"], SHARE)), scores["up"])
        return at_share(sign * scores["up" if name in ("up", "down") else name], SHARE)

    return {name: None if name == "unweighted" else weights(name) for name in names}


def print_arms(lab: Lab, arms: dict[str, np.ndarray | None]) -> None:
    print("   arm                  sample size   weight 0   largest   weight on repeated bigrams")
    member = lab.classes["repeated bigram"]
    for name, weights in arms.items():
        if weights is not None:
            print(
                f"   {name:20} {sample_share(weights):10.0%} {np.mean(weights == 0):10.0%} "
                f"{weights.max():9.1f} {weights[member].mean():14.2f}"
            )


def retrain(
    store: Stages, lab: Lab, arms: dict[str, np.ndarray | None], seeds: int
) -> dict[str, dict[str, np.ndarray]]:
    """Curves of every arm, `[seed, record, …]`; all arms share starts and batches of a seed.

    On a CPU seeds are trained one after the other: several at once, as one vmapped program, took
    1.15 times (4 seeds) to 1.36 times (8) as long for each.
    """
    size = 1 if jax.default_backend() == "cpu" else seeds
    curves: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in arms}
    for first in range(FIRST_SEED, FIRST_SEED + seeds, size):
        for arm, weights in arms.items():
            depends = {
                "seeds": [first, min(size, FIRST_SEED + seeds - first)],
                "steps": lab.settings.steps,
                "weights": "none" if weights is None else digest(weights),
            }

            def compute(weights: Any = weights, depends: Any = depends) -> dict[str, Any]:
                start, count = depends["seeds"]
                if count == 1:
                    one = lab.run(jax.random.key(start), depends["steps"], weights)[1]
                    return {name: np.asarray(value)[None] for name, value in one.items()}
                keys = jnp.stack([jax.random.key(start + i) for i in range(count)])
                return lab.run(keys, depends["steps"], weights)[1]

            name = f"runs/{arm.replace(' ', '_')}-{first}"
            curves[arm].append(
                store.stage(name, compute, **chosen_settings(lab.settings, TRAINING), **depends)
            )
            last = curves[arm][-1]
            steps = [formation(s, p) for s, p in zip(last["step"], last["prefix"], strict=True)]
            formed = " ".join("never" if math.isinf(s) else f"{s:.0f}" for s in steps)
            print(f"   seed {first}, {arm}: {formed}", flush=True)
    return {
        arm: {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for arm, parts in curves.items()
    }


def sign_test(first: np.ndarray, second: np.ndarray) -> float:
    """One-sided exact p of pairs in which `first` is smaller more often than not; ties drop out."""
    less, more = int(np.sum(first < second)), int(np.sum(first > second))
    pairs = less + more
    return sum(math.comb(pairs, k) for k in range(less, pairs + 1)) / 2**pairs


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Median, and order statistics that cover it with at least 95 % where there are enough."""
    ranked, n = np.sort(values), len(values)
    skip = 0
    while sum(math.comb(n, k) for k in range(skip + 2)) / 2 ** (n - 1) <= 0.05:
        skip += 1
    with np.errstate(invalid="ignore"):
        middle = (ranked[(n - 1) // 2] + ranked[n // 2]) / 2
    return float(middle), float(ranked[skip]), float(ranked[n - 1 - skip])


def summarise(
    lab: Lab, arms: dict[str, np.ndarray | None], curves: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Formation steps, their ratios to the unweighted run of the seed, and tests."""

    def steps_of(arm: str) -> np.ndarray:
        pairs = zip(curves[arm]["step"], curves[arm]["prefix"], strict=True)
        return np.array([formation(*pair) for pair in pairs])

    plain = steps_of("unweighted")
    result: dict[str, Any] = {"arms": {}, "classes": list(lab.classes)}
    for arm in arms:
        step, curve = steps_of(arm), curves[arm]
        known = np.isfinite(plain)
        with np.errstate(invalid="ignore"):
            ratio = (step / plain)[known]
        within = np.minimum(2 * plain, lab.settings.steps)
        entry: dict[str, Any] = {
            "formation": step.tolist(),
            "ratio": median_interval(ratio) if known.any() else None,
            "formed_within_twice": int(np.sum(step <= within)),
            "loss_ratio": (curve["loss"][:, -1] / curves["unweighted"]["loss"][:, -1]).tolist(),
            "in_context": curve["in_context"][:, -1].tolist(),
            "class_loss_change": (
                curve["class_loss"][:, -1] - curves["unweighted"]["class_loss"][:, -1]
            ).tolist(),
            "sample_share": 1.0 if arms[arm] is None else sample_share(arms[arm]),
        }  # fmt: skip
        control = f"permuted {arm}"
        if arm in ("up", "down") and control in arms:
            other = steps_of(control)
            pair = (step, other) if arm == "up" else (other, step)
            entry["p_against_permuted"] = sign_test(*pair)
        result["arms"][arm] = entry
    return result


def print_report(result: dict[str, Any]) -> None:
    def said(x: float) -> str:
        return "never" if math.isinf(x) else f"{x:.0f}"

    print("   arm                  steps to form, by seed; median ratio to unweighted [interval];")
    print("                        held-out loss at the end over unweighted; p against permuted")
    for arm, entry in result["arms"].items():
        steps = " ".join(f"{said(x):>5}" for x in entry["formation"])
        ratio = "" if entry["ratio"] is None else "{:.2f} [{:.2f}, {:.2f}]".format(*entry["ratio"])
        p = entry.get("p_against_permuted")
        print(
            f"   {arm:20} {steps}   {ratio:20} {np.median(entry['loss_ratio']):.3f}"
            + ("" if p is None else f"   p = {p:.4f}")
        )
    print("   change of the held-out loss of a class at the end, in 10⁻³ nats")
    print("   " + " " * 20 + "".join(f"{name:>17}" for name in result["classes"]))
    for arm, entry in result["arms"].items():
        change = np.mean(entry["class_loss_change"], axis=0)
        print(f"   {arm:20}" + "".join(f"{1e3 * x:+17.0f}" for x in change))
    for pair in (SECOND[:2], SECOND[2:]):
        if set(pair) <= set(result["arms"]):
            up, down = (np.array(result["arms"][arm]["class_loss_change"]) for arm in pair)
            change = 1e3 * (up - down)[:, result["classes"].index(result["second"])]
            error = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else math.nan
            print(
                f"   {pair[0]} less {pair[1]}, {result['second']}: {change.mean():+.0f} ± "
                f"{error:.0f}, above 0 in {np.sum(change > 0)} of {len(change)} seeds"
            )


def draw(lab: Lab, curves: dict[str, dict[str, np.ndarray]]) -> Any:
    """Formation curves: median of the seeds, and the band from the lowest to the highest."""
    from jaxpattern import plot

    figure = plot.Figure(figsize=(10, 3.8), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2)
    shown = {"unweighted": plot.GREY, "up": plot.BLUE, "down": plot.VERMILLION}
    for arm, colour in shown.items():
        if arm not in curves:
            continue
        curve = curves[arm]
        step = curve["step"][0]
        best = curve["prefix"].reshape(*curve["prefix"].shape[:2], -1).max(axis=-1)
        repeated = curve["class_loss"][:, :, 0]
        for ax, value in zip(axes, (best, repeated), strict=True):
            ax.plot(step, np.median(value, axis=0), color=colour, label=arm)
            ax.fill_between(
                step, value.min(axis=0), value.max(axis=0), color=colour, alpha=0.2, lw=0
            )
    axes[0].axhline(FORMED, color="black", lw=0.8, ls=":")
    axes[0].set_ylabel("prefix-matching score of the best head")
    axes[1].set_ylabel("held-out loss of repeated bigrams, nats")
    axes[1].set_ylim(top=float(np.quantile(curves["unweighted"]["class_loss"][:, 1:, 0], 0.95)))
    for ax in axes:
        ax.set_xlabel("training step")
        ax.spines[["top", "right"]].set_visible(False)
    seeds = len(curves["unweighted"]["step"])
    axes[0].set_title(f"The induction circuit forms ({seeds} seeds)", loc="left", fontsize=10)
    axes[1].set_title("What it is for", loc="left", fontsize=10)
    axes[0].legend(frameon=False, loc="upper left")
    return figure


def draw_structure(
    lab: Lab, directions: jp.PrincipalDirections, score: np.ndarray, out: Path
) -> None:
    """Loadings of the directions on heads, and the score that is steered over some of the text."""
    from jaxpattern import plot

    plot.loadings(directions).savefig(out / "directions.png")
    some = np.random.default_rng(4).permutation(lab.settings.windows)[:6]
    tokens = np.asarray(lab.train)[some]
    plot.tokens(score[some], tokens, decode=lab.decode, label="score, standard deviations").savefig(
        out / "tokens.png"
    )


if __name__ == "__main__":
    main()
