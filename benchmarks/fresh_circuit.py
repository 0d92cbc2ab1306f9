"""The induction circuit from fresh models: can patterning while training bring it forward?

`examples/induction_circuit.py` weights tokens by the response of a model in which the circuit has
formed. Here no such model is there: `pattern` starts from random parameters, measures by twin runs
(`mode="secant"`) how an observable at the end of each of four rounds answers to the weight of each
tenth of the training windows, ranked by how well they compress, and trains on. The observable is
the held-out loss, which knows nothing of the circuit, or the loss on random tokens that are said
twice, which does. The weights of the rounds then train fresh models of other seeds, and after the
last round those go on with its weights.

The circuit counts as formed where a head's prefix-matching score passes 0.3, as in the example.
Nothing is claimed: what is asked is whether it forms in fewer steps, and in how many when those of
the measuring count. One core needs about half an hour.

    python benchmarks/fresh_circuit.py [--quick | --tiny] [--out benchmarks/results]

writes one JSON line per observable.
"""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpattern as jp
import measure

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import induction_circuit as circuit
from stages import Stages

ROUNDS, PART, TOTAL = 4, 75, 600
PARTS = 10  # of the training windows
# How far each is to fall in all: more than can be had, so that the budget decides.
FALL = {"held-out loss": 0.5, "copying": 2.0}


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="runs of few steps, to see it work")
    parser.add_argument("--seeds", type=int, default=4, help="fresh models")
    options = parser.parse_args(argv)
    settings, part, total = circuit.SCALES["small"], PART, TOTAL
    seeds = 2 if options.quick else options.seeds
    if options.tiny:
        settings, part, total, seeds = circuit.SCALES["test"], 2, 12, 1
    report = measure.Report("fresh_circuit", options)
    kept = Stages(options.out / "fresh_circuit", (settings, part, seeds))
    lab = circuit.Lab(settings, circuit.load_data(kept, settings))
    others = [jax.random.key(circuit.FIRST_SEED + i) for i in range(seeds)]
    plain = kept.stage("unweighted", lambda: {"formed": formed(lab, others, None, part, total)})
    for name, observable in observables(lab).items():
        found = kept.stage(
            name.replace(" ", "_"), partial(patterned, lab, observable, FALL[name], part)
        )
        weights, cost = found["weights"], float(found["cost"])
        there = kept.stage(
            f"{name.replace(' ', '_')}_trained",
            lambda weights=weights: {"formed": formed(lab, others, weights, part, total)},
        )
        steps, unweighted = (
            [x if np.isfinite(x) else None for x in run["formed"].tolist()]
            for run in (there, plain)
        )
        report.add(
            f"{name}: formed after {steps} steps, unweighted after {unweighted} (None: not within "
            f"{total}); choosing the weights cost {cost:,.0f} steps",
            observable=name, formed=steps, unweighted=unweighted, total=total,
            steps_of_measuring=cost, shares=found["shares"].tolist(),
            weights=found["by_part"].tolist(), seeds=seeds,
            shift=found["shift"].tolist(), shift_stderr=found["shift_stderr"].tolist(),
        )  # fmt: skip
    return report.close()


def observables(lab: circuit.Lab) -> dict[str, Callable[[Any], jax.Array]]:
    """What the rounds lower: knowing nothing of the circuit, and knowing what it does."""
    half = lab.repeated.shape[1] // 2
    return {
        "held-out loss": lambda params: jnp.mean(lab.loss_fn(params, lab.watched)),
        "copying": lambda params: jnp.mean(lab.loss_fn(params, lab.repeated)[:, half:]),
    }


def ranked_parts(lab: circuit.Lab) -> dict[str, np.ndarray]:
    """Tenths of the training windows, by how well their text compresses."""
    texts = [lab.decode(window).encode() for window in np.asarray(lab.train)]
    share = [len(zlib.compress(each, 9)) / max(len(each), 1) for each in texts]
    parts = np.array_split(np.argsort(share, kind="stable"), PARTS)
    return {f"part {i}": np.sort(part) for i, part in enumerate(parts)}


def patterned(
    lab: circuit.Lab, observable: Callable[[Any], jax.Array], fall: float, part: int
) -> dict[str, Any]:
    """Weights of each round, `[rounds, samples]`, from two models that nothing else uses."""
    keys, parts = jax.random.split(jax.random.key(99), 2), ranked_parts(lab)
    starts = jax.tree.map(lambda *x: jnp.stack(x), *(lab.start(key) for key in keys))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = jp.pattern(
            keys, lab.loss_fn, starts, lab.train, lab.optimizer, target={"loss": -fall},
            observables={"loss": observable}, sources=parts, num_rounds=ROUNDS, num_steps=part,
            batch_size=lab.settings.batch_size, min_effective_share=circuit.SHARE, mode="secant",
            progress=False,
        )  # fmt: skip
    weights = np.stack([np.asarray(this.weights)[:, 0] for this in result.rounds])
    # Beside the response: the round on the weights before, on its own, and the control.
    measuring = sum(this.response.cost for this in result.rounds) / lab.settings.batch_size
    return {
        "weights": weights, "cost": measuring + len(keys) * 3 * ROUNDS * part,
        "by_part": [[w[index].mean() for index in parts.values()] for w in weights],
        "shares": [this.effective_share for this in result.rounds],
        "shift": [this.total["loss"] for this in result.rounds],
        "shift_stderr": [this.total_stderr["loss"] for this in result.rounds],
    }  # fmt: skip


def formed(
    lab: circuit.Lab, keys: Sequence[Any], weights: np.ndarray | None, part: int, total: int
) -> np.ndarray:
    """Steps to the circuit of each seed: the rounds, and on with the weights of the last."""
    steps = []
    shape = (len(lab.train), lab.train.shape[1] - 1)
    lengths = [part] * ROUNDS + [total - ROUNDS * part]
    for key in keys:
        params, state, records, scores = lab.start(key), None, [], []
        for r, length in enumerate(lengths):
            one = None if weights is None else weights[min(r, ROUNDS - 1)]
            rho = None if one is None else np.broadcast_to(one[:, None], shape)
            params, history = jp.train(
                jax.random.fold_in(key, r), lab.loss_fn, params, lab.train, lab.optimizer,
                num_steps=length, batch_size=lab.settings.batch_size, weights=rho,
                metrics=lab.watch, record_every=5, optimizer_state=state, progress=False,
            )  # fmt: skip
            state = history.optimizer_state
            records.append(np.asarray(history.step) + part * r)
            scores.append(np.asarray(history.metrics["prefix"]))
        steps.append(circuit.formation(np.concatenate(records), np.concatenate(scores)))
    return np.asarray(steps)


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
