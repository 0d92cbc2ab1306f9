"""Choose which of two rules a transformer learns, by weights on training data that fit both.

Strings of brackets are to be told apart: nested ones from ones whose counts of "(" and ")" differ.
A model may learn NESTED (no prefix closes more than it opened, and the counts agree) or
EQUAL-COUNT (the counts agree); strings with equal counts that are not nested are withheld, and
tell which. Around several solutions of each kind the local learning coefficient is measured, with
a check that its chains stay in the basin, and how it answers to the weight of every training
string. Fresh seeds are trained on weights along the difference, normalised per string, of the part
of the response that re-weighting the loss inside the LLC adds, ⟨ℓ_z⟩ − ℓ_z(w*): "towards NESTED" it
is followed so that LLC(EQUAL-COUNT) − LLC(NESTED) rises, "towards EQUAL-COUNT" so that it falls.
The last steps, a quarter (half in one arm by hand), are unweighted and at a lower rate: the weights
decide which rule is taken up, and then all strings are learned. Beside them stand the same weights
on permuted strings, and weightings by hand. `docs/parentheses.md` has every variant that was tried.

    python examples/parentheses.py [--scale small|paper] [--out parentheses_results]

writes `parentheses.png` and `parentheses.json`. Stages that are done, eight seeds at a time, are
read from the folder when it is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.stats
from matplotlib.figure import Figure

import jaxpattern as jp
from jaxpattern.data import brackets
from jaxpattern.models import classifier
from jaxpattern.models.transformer import TransformerConfig
from stages import Stages
from weighting import area, sample_share

START, END, VOCABULARY = 3, 4, 5
# The shortest length at which a kind has strings that begin with "(" and end with ")".
SHORTEST = {
    brackets.nested_strings: 2, brackets.uneven_strings: 4, brackets.out_of_distribution: 6,
}  # fmt: skip
LEARNED = 0.99  # the least training accuracy of a seed that counts
KINDS = ("NESTED", "EQUAL-COUNT")
ARMS = (
    "unweighted",
    "towards NESTED",
    "permuted NESTED",
    "by hand NESTED",
    "towards EQUAL-COUNT",
    "permuted EQUAL-COUNT",
    "by hand EQUAL-COUNT",
)
# The share of the steps that is weighted; the others, unweighted, come after.
WEIGHTED = 0.75
WEIGHTED_BY_ARM = dict.fromkeys(ARMS, WEIGHTED) | {"by hand EQUAL-COUNT": 0.5}


class Settings(NamedTuple):
    """What the time and the precision depend on."""

    model: TransformerConfig = TransformerConfig(
        vocab_size=VOCABULARY, context=22, num_layers=1, num_heads=2, d_model=16, mlp_width=64,
        positions="none",
    )  # fmt: skip
    lengths: tuple[int, ...] = (12, 14, 16, 18, 20)
    shares: tuple[float, ...] = (0.2,) * 5
    strings: int = 4_000
    withheld: int = 1_000
    steps: int = 800
    batch: int = 48
    rate: float = 5e-3
    final_rate: float = 1.5e-3  # of the unweighted steps that end the training of fresh seeds
    decay: float = 0.3
    base_seeds: int = 24  # from 1000
    solutions: int = 6  # of each kind
    fresh_seeds: int = 96  # from 9000
    together: int = 8  # seeds in one compiled program
    nbeta: float = 1000.0
    localization: float = 3000.0
    step_size: float = 3e-6
    plan: jp.Plan = jp.Plan(num_chains=2, num_burnin=500, num_draws=20, thin=30, batch_size=64)
    pathwise_window: int = 480
    sample_share: float = 0.15  # effective sample size of the weights, over the number of strings


PAPER_LENGTHS = tuple(range(2, 41, 2))
SCALES = {
    "small": Settings(),
    "paper": Settings(
        model=TransformerConfig(
            vocab_size=VOCABULARY, context=42, num_layers=3, num_heads=4, d_model=64,
            mlp_width=256, positions="none",
        ),
        lengths=PAPER_LENGTHS,
        shares=tuple(scipy.stats.binom.pmf(np.arange(20), 19, 0.5).tolist()),
        strings=200_000, withheld=10_000, steps=5 * 200_000 // 64, batch=64, rate=1e-3,
        final_rate=3e-4,
    ),
    "test": Settings(
        lengths=(8, 10), shares=(0.5, 0.5), strings=200, withheld=50, steps=200, base_seeds=4,
        solutions=1, fresh_seeds=4, together=4, pathwise_window=10,
        plan=jp.Plan(num_chains=2, num_burnin=5, num_draws=4, thin=2, batch_size=16),
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the stages, print the tables, write the figure; returns what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--out", type=Path, default=Path("parentheses_results"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    options = parser.parse_args(argv)
    settings = SCALES[options.scale]
    stages = Stages(options.out, settings)
    train_set, withheld = make_data(settings)
    texts = strings_of(train_set)
    category = brackets.categories(texts)

    stages.title("a. solutions of both kinds, on unweighted data")
    base = train_all(
        stages, "base", settings, 1000, settings.base_seeds, train_set, withheld, None,
        weights_too=True, final_rate=settings.rate,
    )  # fmt: skip
    print(f"   {count(base)}")

    stages.title("b. LLC of the solutions, and its response to every string")
    measured: dict[str, list[dict[str, np.ndarray]]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for seed in chosen(settings, base, kind):
            params = params_of(settings, base, int(seed))
            values = stages.stage(
                f"solution-{seed}", partial(measure, settings, train_set, withheld, params)
            )
            stayed = bool(values["stayed"])
            value = f"{values['llc']:.2f} ± {values['llc_stderr']:.2f}" if stayed else "withheld"
            if values["llc"] < -2 * values["llc_stderr"]:
                value += ", negative: these weights are no minimum"
            print(
                f"   {kind:11s} seed {1000 + seed}: LLC {value}; along the chains accuracy ≥ "
                f"{values['accuracy'].min():.4f}, out of distribution "
                f"{values['out'].min():.2f} to {values['out'].max():.2f}"
            )
            if stayed:
                measured[kind].append({**values, "seed": seed})
    if not all(measured.values()):
        raise SystemExit("no healthy chain around a solution of each kind: train more base seeds")

    stages.title("c. what tells the solutions apart, and weights from it")
    classes = classes_of(category, texts)
    nested = np.asarray(train_set["label"]) > 0.5
    scores = differences(measured)
    areas = {
        name: {
            label: area(score, members, ~nested & ~members) for label, members in classes.items()
        }
        for name, score in scores.items()
    }
    for label in classes:
        print(f"   {label:42s}" + "".join(f" {name} {areas[name][label]:.2f}" for name in areas))
    weights = weights_of(settings, scores, classes, nested, texts)

    stages.title("d. fresh seeds")
    finals, rows = {}, {}
    for arm in dict.fromkeys(("unweighted", *options.arms)):
        rho = weights[arm]
        finals[arm] = train_all(
            stages, "arm-" + arm.replace(" ", "-"), settings, 9000, settings.fresh_seeds,
            train_set, withheld, rho, weighted=WEIGHTED_BY_ARM[arm],
            final_rate=settings.final_rate,
            weights=hashlib.sha256(np.float32(rho).tobytes()).hexdigest(),
        )  # fmt: skip
        rows[arm] = row_of(finals[arm], finals["unweighted"])
        print(
            f"   {arm:22s} {count(finals[arm])}; sample share {sample_share(rho):.2f}", flush=True
        )

    stages.title("e. the response with φ fixed, by differentiating the chain and by covariance")
    pages = {kind: options.out / f"report-{kind.lower()}.html" for kind in KINDS}
    both = stages.stage(
        "both-estimators", lambda: compare(settings, train_set, base, measured, pages)
    )
    for i, kind in enumerate(KINDS):
        print(
            f"   {kind:11s} correlation {both['correlation'][i]:.2f}; difference over its error "
            f"{both['difference'][i]:.2f}; size over error pathwise {both['pathwise'][i]:.1f}, "
            f"covariance {both['covariance'][i]:.1f}; the steps "
            f"furthest back add {both['tail'][i]:.3f} of it"
        )

    result = {
        "base": count(base), "areas": areas, "arms": rows,
        "estimators": {name: values.tolist() for name, values in both.items()},
        "llc": {kind: [(float(v["llc"]), float(v["llc_stderr"])) for v in measured[kind]]
                for kind in KINDS},
    }  # fmt: skip
    (options.out / "parentheses.json").write_text(json.dumps(result, indent=1))
    draw(finals).savefig(options.out / "parentheses.png", dpi=150)
    print("", options.out / "parentheses.png", *pages.values(), sep="\n")
    return result


def make_data(settings: Settings) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Training strings, half of them nested and half uneven, and the withheld ones.

    All begin with "(" and end with ")", so that neither end alone gives the answer away.
    """
    rng = np.random.default_rng(0)

    def gated(num: int, draw: Any) -> np.ndarray:
        kept: list[np.ndarray] = []
        while sum(map(len, kept)) < num:
            strings = draw(2 * num)
            ends = (strings[:, 0] == brackets.OPEN) & (strings[:, -1] == brackets.CLOSE)
            kept.append(strings[ends])
        return np.concatenate(kept)[:num]

    def collect(num: int, kinds: dict[Any, tuple[float, bool]]) -> dict[str, jax.Array]:
        tokens, labels = [], []
        for length, share in zip(settings.lengths, settings.shares, strict=True):
            for make, (part, label) in kinds.items():
                size = round(num * share * part)
                if not size or length < SHORTEST[make]:
                    continue
                strings = (
                    make(rng, size, length) if label
                    else gated(size, partial(make, rng, length=length))
                )  # fmt: skip
                marks = [np.full((len(strings), 1), mark, np.int32) for mark in (START, END)]
                strings = np.concatenate([marks[0], strings, marks[1]], axis=1)
                tokens.append(brackets.pad(strings, max(settings.lengths) + 2))
                labels.append(np.full(len(strings), label, np.float32))
        return {"tokens": jnp.asarray(np.concatenate(tokens)),
                "label": jnp.asarray(np.concatenate(labels))}  # fmt: skip

    train_set = collect(
        settings.strings,
        {brackets.nested_strings: (0.5, True), brackets.uneven_strings: (0.5, False)},
    )
    return train_set, collect(settings.withheld, {brackets.out_of_distribution: (1.0, False)})


def strings_of(data: dict[str, jax.Array]) -> np.ndarray:
    """The strings without their marks."""
    strings = np.asarray(data["tokens"])[:, 1:]
    return np.where(strings == END, brackets.PAD, strings)


def outcome(
    model: TransformerConfig, data: Any, withheld: Any, params: Any
) -> dict[str, jax.Array]:
    """Accuracy on the training strings and on the withheld ones: 1 is NESTED, 0 EQUAL-COUNT."""
    z = partial(classifier.logit, params, config=model)
    return {
        "accuracy": jnp.mean((z(data["tokens"]) > 0) == (data["label"] > 0.5)),
        "out": jnp.mean(z(withheld["tokens"]) < 0),
    }


@cache
def outcomes(model: TransformerConfig) -> Any:
    """The outcome of several seeds; compiled once."""
    return jax.jit(jax.vmap(partial(outcome, model), in_axes=(None, None, 0)))


@cache
def optimizer(rate: float, decay: float) -> optax.GradientTransformation:
    """One object for all runs, so that they share a compiled program."""
    return optax.adamw(rate, weight_decay=decay)


@cache
def observer(model: TransformerConfig) -> Any:
    """What is recorded along a chain; one object for all solutions."""
    loss_fn = classifier.make_loss_fn(model)

    def observe(data: Any, withheld: Any, reference: Any, params: Any) -> dict[str, jax.Array]:
        return {
            "excess": loss_fn(params, data) - reference,
            **outcome(model, data, withheld, params),
        }

    return observe


def train(
    settings: Settings,
    data: Any,
    withheld: Any,
    weights: np.ndarray | None,
    seeds: Sequence[int],
    weights_too: bool,
    weighted: float,
    final_rate: float,
) -> dict[str, Any]:
    """Accuracies of some seeds; the same seed is the same start and batches."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    start = jax.vmap(lambda key: classifier.init(jax.random.fold_in(key, 10**6), settings.model))(
        keys
    )
    first = round(weighted * settings.steps)
    params = start
    parts = (weights, first, settings.rate), (None, settings.steps - first, final_rate)
    for part, (rho, steps, rate) in enumerate(parts):
        params, _ = jp.train(
            jax.vmap(jax.random.fold_in, (0, None))(keys, part),
            classifier.make_loss_fn(settings.model), params, data,
            optimizer(rate, settings.decay), num_steps=steps,
            batch_size=settings.batch, weights=rho, progress=False,
        )  # fmt: skip
    values = outcomes(settings.model)(data, withheld, params)
    if weights_too:
        values["params"] = jax.vmap(lambda p: jax.flatten_util.ravel_pytree(p)[0])(params)
    return values


def train_all(
    stages: Stages, name: str, settings: Settings, first_seed: int, num: int, *args: Any,
    final_rate: float, weights_too: bool = False, weighted: float = WEIGHTED, **depends: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Seeds from `first_seed` on, some together; each such group is a stage."""
    runs = []
    for first in range(first_seed, first_seed + num, settings.together):
        seeds = range(first, min(first + settings.together, first_seed + num))
        runs.append(
            stages.stage(
                f"{name}/{first}",
                partial(train, settings, *args, list(seeds), weights_too, weighted, final_rate),
                weighted=weighted,
                final_rate=final_rate,
                **depends,
            )
        )
    return {key: np.concatenate([run[key] for run in runs]) for key in runs[0]}


def params_of(settings: Settings, base: dict[str, np.ndarray], seed: int) -> Any:
    """The weights of one base seed."""
    _, unravel = jax.flatten_util.ravel_pytree(classifier.init(jax.random.key(0), settings.model))
    return unravel(jnp.asarray(base["params"][seed]))


def kinds_of(runs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Which seeds learned which rule, among those that learned the training strings."""
    learned = runs["accuracy"] > LEARNED
    return {KINDS[0]: learned & (runs["out"] > 0.9), KINDS[1]: learned & (runs["out"] < 0.1)}


def chosen(settings: Settings, base: dict[str, np.ndarray], kind: str) -> np.ndarray:
    """The first base seeds of a kind; where a test has none, the nearest one."""
    seeds = np.flatnonzero(kinds_of(base)[kind] & (base["accuracy"] > 0.9985))
    if not len(seeds):
        order = np.argsort(base["out"])
        seeds = order[-1:] if kind == KINDS[0] else order[:1]
    return seeds[: settings.solutions]


def count(runs: dict[str, np.ndarray]) -> str:
    """The counts as text."""
    learned, kinds = int((runs["accuracy"] > LEARNED).sum()), kinds_of(runs)
    named = ", ".join(f"{int(kinds[kind].sum())} {kind}" for kind in KINDS)
    return f"{learned} of {len(runs['out'])} learned the training strings: {named}"


def measure(settings: Settings, data: Any, withheld: Any, params: Any) -> dict[str, Any]:
    """LLC of a solution, health of its chains, and the response of the LLC to every string.

    `fixed` holds φ = L − L(w*) as it is; `excess`, ⟨ℓ_z⟩ − ℓ_z(w*), is what re-weighting the loss
    inside φ adds, up to a factor nβ and to its mean.
    """
    loss_fn = classifier.make_loss_fn(settings.model)
    posterior = jp.localized_posterior(
        loss_fn, params, data, nbeta=settings.nbeta, localization=settings.localization
    )
    run = (jax.random.key(7), posterior, jp.sgld(step_size=settings.step_size), settings.plan)
    reference = loss_fn(params, data)

    observe = jax.tree_util.Partial(observer(settings.model), data, withheld, reference)
    trace = jp.sample(*run, observe, progress=False)
    excess = np.asarray(trace["excess"])
    value = jp.summarize(
        settings.nbeta * jnp.mean(trace["excess"], axis=-1), num_batches=settings.plan.batches
    )
    start = outcome(settings.model, data, withheld, params)
    # A chain has left its basin where a draw forgot strings, or changed sides on withheld ones.
    kept = np.asarray(trace["accuracy"]).min() > float(start["accuracy"]) - 0.01
    side = np.abs(np.asarray(trace["out"]) - float(start["out"])).max() < 0.5
    # −nβ Cov(L, ℓ_z − L), from the same draws.
    draws = excess.reshape(-1, excess.shape[-1]).astype(float)
    level = draws.mean(axis=1)
    deviation = draws - level[:, None]
    fixed = -settings.nbeta * np.mean((level - level.mean())[:, None] * deviation, axis=0)
    added = draws.mean(axis=0)
    return {
        "llc": value.mean, "llc_stderr": value.stderr, "stayed": kept and side,
        "accuracy": trace["accuracy"], "out": trace["out"], "excess": added,
        "fixed": fixed, "re-weighted": fixed + added - added.mean(),
    }  # fmt: skip


def compare(
    settings: Settings,
    data: Any,
    base: Any,
    measured: dict[str, list[dict[str, Any]]],
    pages: dict[str, Path],
) -> dict[str, Any]:
    """The response with φ fixed, by both estimators, around one solution of each kind, and pages.

    `pathwise` and `covariance` are root mean squares of χ over its standard error, 1 for noise;
    `difference` that of their difference over its own.
    """
    rows = []
    for kind in KINDS:
        posterior = jp.localized_posterior(
            classifier.make_loss_fn(settings.model),
            params_of(settings, base, measured[kind][0]["seed"]),
            data,
            nbeta=settings.nbeta,
            localization=settings.localization,
        )  # fmt: skip
        estimators = {
            "pathwise": jp.pathwise(window=settings.pathwise_window, every=settings.plan.thin),
            "covariance": jp.covariance(),
        }
        chi, stderr, row = {}, {}, {}
        for name, estimator in estimators.items():
            response = jp.susceptibilities(
                jax.random.key(8), posterior, jp.sgld(step_size=settings.step_size), settings.plan,
                probes={"strings": data}, components={"all": jp.by_path("*")}, progress=False,
                estimator=estimator,
            )  # fmt: skip
            if name == "pathwise":
                texts = [brackets.to_text(string) for string in strings_of(data)]
                title = f"Response of a {kind} solution to its training strings"
                jp.report(response, pages[kind], tokens={"strings": texts}, title=title)
            chi[name] = np.asarray(response.chi["strings"][0], float)
            stderr[name] = np.asarray(response.stderr["strings"][0], float)
            row[name] = root_mean_square(chi[name] / stderr[name])
            if "tail" in response.diagnostics:
                row["tail"] = float(response.diagnostics["tail"][0, -1])
        row["correlation"] = np.corrcoef(*chi.values())[0, 1]
        row["difference"] = root_mean_square(
            (chi["pathwise"] - chi["covariance"]) / np.hypot(*stderr.values())
        )
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def root_mean_square(x: np.ndarray) -> float:
    """√⟨x²⟩."""
    return float(np.sqrt(np.mean(x**2)))


def classes_of(category: brackets.Category, strings: np.ndarray) -> dict[str, np.ndarray]:
    """Kinds of uneven strings that might tell the solutions apart."""
    depth, length = brackets.depth(strings), (strings != brackets.PAD).sum(axis=1)
    below = (depth < 0) & (strings != brackets.PAD)
    first = np.where(below.any(axis=1), below.argmax(axis=1), length)
    uneven, near = ~category.nested, np.abs(category.imbalance) == 2
    dips = uneven & (category.excess_dip > 0)
    short = uneven & (category.imbalance < 0)
    return {
        "dips in excess": dips,
        "dips in excess, counts differ by 2": dips & near,
        "never dips": uneven & (category.dip == 0),
        "never dips, counts differ by 2": uneven & (category.dip == 0) & near,
        'more ")", no excess, counts differ by 2': short & ~dips & near,
        "dips first in its last four symbols": short & (first >= length - 4),
    }


def differences(measured: dict[str, list[dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """How much more the LLC of EQUAL-COUNT solutions answers to a string than that of NESTED ones.

    Mean responses are normalised per string: their difference over their root mean square, and,
    for what re-weighting adds, also the logarithm of their ratio.
    """
    scores = {}
    for name in ("fixed", "re-weighted", "excess"):
        nested, equal = (np.stack([v[name] for v in measured[kind]]) for kind in KINDS)
        size = np.sqrt((nested**2).mean(axis=0) + (equal**2).mean(axis=0))
        scores[name] = (equal.mean(axis=0) - nested.mean(axis=0)) / np.maximum(size, 1e-12)
    scores["log excess"] = np.log(
        np.maximum(equal.mean(axis=0), 1e-6) / np.maximum(nested.mean(axis=0), 1e-6)
    )
    return scores


def weights_of(
    settings: Settings,
    scores: dict[str, np.ndarray],
    classes: dict[str, np.ndarray],
    nested: np.ndarray,
    strings: np.ndarray,
) -> dict[str, np.ndarray]:
    """The weights of every arm."""
    tilt = partial(tilted, nested=nested, share=settings.sample_share)
    weights = {
        "unweighted": np.ones(len(nested)),
        "towards NESTED": tilt(scores["excess"]),
        "towards EQUAL-COUNT": tilt(-scores["excess"]),
    }
    rng = np.random.default_rng(1)
    for kind in KINDS:
        permuted = weights[f"towards {kind}"].copy()
        for label in (nested, ~nested):
            permuted[label] = rng.permutation(permuted[label])
        weights[f"permuted {kind}"] = permuted
    excess, near, never = (
        classes[name] for name in ("dips in excess", "dips in excess, counts differ by 2",
                                   "never dips")
    )  # fmt: skip
    depth, dipping = brackets.depth(strings), ~nested & ~never
    inside = np.arange(depth.shape[1]) < (strings != brackets.PAD).sum(axis=1)[:, None] - 1
    lifted = nested & ((depth > 0) | ~inside).all(axis=1)  # back at depth 0 only at its end
    weights["by hand NESTED"] = np.select(
        [near, dipping & ~excess, never, lifted, nested], [10.0, 0.05, 2.0, 3.0, 0.1], default=1.0
    )
    weights["by hand EQUAL-COUNT"] = np.where(dipping, 0.0, 1.0)
    return weights


def tilted(score: np.ndarray, nested: np.ndarray, share: float) -> np.ndarray:
    """The weights of least relative entropy along a score, of a wanted effective sample size.

    ρ_z ∝ exp(a s_z), where s is centred on either label and each label keeps its total weight.
    """
    score = score.astype(float)
    for label in (nested, ~nested):
        score = score - np.where(label, score[label].mean(), 0)
    score = score / score.std()

    def weights(a: float) -> np.ndarray:
        rho = np.exp(a * (score - score.max()))
        for label in (nested, ~nested):
            rho[label] *= label.sum() / rho[label].sum()
        return rho

    return weights(scipy.optimize.brentq(lambda a: sample_share(weights(a)) - share, 0, 50))


def interval(successes: int, trials: int) -> tuple[float, float]:
    """The exact 95 % interval of a share."""
    if not trials:
        return 0.0, 1.0
    ends = scipy.stats.binomtest(successes, trials).proportion_ci()
    return float(ends.low), float(ends.high)


def row_of(runs: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, Any]:
    """Counts of an arm, and exact tests against the unweighted one.

    Over seeds that learned in both arms: McNemar's test of who changed kind, two-sided. Over all
    that learned in either: Fisher's.
    """
    learned, kinds = runs["accuracy"] > LEARNED, kinds_of(runs)
    base_learned, base_kinds = base["accuracy"] > LEARNED, kinds_of(base)
    row: dict[str, Any] = {"seeds": len(learned), "learned": int(learned.sum())}
    for kind in KINDS:
        now, before = kinds[kind], base_kinds[kind]
        both = learned & base_learned
        gained, lost = int((both & now & ~before).sum()), int((both & before & ~now).sum())
        table = [
            [now.sum(), (learned & ~now).sum()],
            [before.sum(), (base_learned & ~before).sum()],
        ]
        row[kind] = {
            "count": int(now.sum()), "interval": interval(int(now.sum()), int(learned.sum())),
            "gained": gained, "lost": lost,
            "mcnemar": scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1,
            "fisher": float(scipy.stats.fisher_exact(table).pvalue),
        }  # fmt: skip
    return row


def draw(arms: dict[str, dict[str, np.ndarray]]) -> Any:
    """Out-of-distribution accuracy of every seed that learned, by arm."""
    figure = Figure(figsize=(9, 0.75 * len(arms) + 1), layout="constrained")
    axis = figure.subplots()
    for height, runs in enumerate(arms.values()):
        learned = runs["accuracy"] > LEARNED
        kinds = kinds_of(runs)
        jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(learned))
        color = np.where(kinds[KINDS[0]], "tab:blue", np.where(kinds[KINDS[1]], "tab:red", "0.5"))
        axis.scatter(
            runs["out"][learned], -height + jitter[learned], s=9, c=color[learned], alpha=0.7
        )
        for kind, place, side in ((KINDS[1], -0.03, "right"), (KINDS[0], 1.03, "left")):
            share = kinds[kind].sum() / max(learned.sum(), 1)
            axis.text(place, -height, f"{share:.0%}", ha=side, va="center")
    axis.set(
        yticks=-np.arange(len(arms)), xlim=(-0.13, 1.13), xticks=(0, 0.5, 1),
        xlabel="EQUAL-COUNT      ←      accuracy on the withheld strings      →      NESTED",
    )  # fmt: skip
    axis.set_yticklabels(
        [
            f"{name}\n{(r['accuracy'] > LEARNED).sum()} of {len(r['out'])}"
            for name, r in arms.items()
        ]
    )
    return figure


if __name__ == "__main__":
    main()
