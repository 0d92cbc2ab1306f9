"""Choose which feature a toy model of superposition leaves out, by the mixture of its features.

The model x̂ = ReLU(WᵀWx + b) has two dimensions for six features, of which one at a time is active.
Trained on equally frequent features it mostly ends as a pentagon: five features at its corners,
and one, a different one from seed to seed, left out. Around one such pentagon the response of the
six norms ‖W_j‖² to the six frequencies is measured by sampling, and beside it exactly: the loss is
closed, so long Metropolis chains have neither step bias nor mini-batch noise. The inverse of the
response gives mixtures that raise or lower the norm of the feature that was left out there; fresh
seeds are trained on each mixture, and, as a control, on the same frequencies with those of that
feature and of the next one exchanged.

    python examples/superposition.py [--scale small] [--out superposition_results]

takes about a minute and writes `superposition.png` and `superposition.json`. Stages that are done
are read from the folder when it is run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from matplotlib.figure import Figure

import jaxpattern as jp
from jaxpattern.models import superposition
from stages import Stages

FEATURES = 6
PRESENT = 0.4  # the least length of a feature that counts as represented
NAMES = [f"feature {j}" for j in range(FEATURES)]
NORMS = {
    name: (lambda params, j=j: jnp.sum(params["W"][:, j] ** 2)) for j, name in enumerate(NAMES)
}


class Settings(NamedTuple):
    """What the time and the precision depend on."""

    seeds: int = 64
    steps: int = 12_000
    rate: float = 0.1
    nbeta: float = 1000.0
    localization: float = 30.0
    step_size: float = 1e-4
    sampled: jp.Plan = jp.Plan(num_chains=32, num_burnin=1000, num_draws=50, thin=60)
    exact: jp.Plan = jp.Plan(num_chains=256, num_burnin=1000, num_draws=400, thin=20, num_batches=1)
    # Wanted shifts of ⟨‖W_j‖²⟩ of the feature that was left out.
    shifts: tuple[float, ...] = (-0.012, -0.008, -0.004, 0.004, 0.008, 0.016)


SCALES = {
    "small": Settings(),
    "test": Settings(
        seeds=8,
        steps=600,
        sampled=jp.Plan(num_chains=4, num_burnin=100, num_draws=10, thin=60),
        exact=jp.Plan(num_chains=8, num_burnin=50, num_draws=20, thin=5, num_batches=1),
        shifts=(-0.008, 0.008),
    ),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the stages, print the table, write the figure; returns what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--out", type=Path, default=Path("superposition_results"))
    options = parser.parse_args(argv)
    settings = SCALES[options.scale]
    stages = Stages(options.out, settings)

    stages.title("a. equal frequencies")
    uniform = np.full(FEATURES, 1 / FEATURES)
    base = stages.stage("base", lambda: train(settings, uniform, first_seed=0))
    present = represented(base["W"])
    pentagon = int(np.flatnonzero(present.sum(axis=1) == 5)[0])
    absent = int(np.flatnonzero(~present[pentagon])[0])
    params = {name: jnp.asarray(base[name][pentagon]) for name in ("W", "b")}
    print(f"   {sides(present)}; seed {pentagon} is a pentagon without feature {absent}")

    stages.title("b. response of the norms to the mixture, sampled and exact")
    page = options.out / "report.html"
    sampled = stages.stage("sampled", lambda: measure(settings, params, absent, page))
    exact = stages.stage("exact", lambda: measure_exactly(settings, params))
    deviation = np.abs(sampled["chi"] - exact["chi"]) / np.hypot(sampled["stderr"], exact["stderr"])
    agreement = np.corrcoef(sampled["chi"].ravel(), exact["chi"].ravel())[0, 1]
    print(
        f"   largest of {deviation.size} differences: {deviation.max():.1f} standard errors; "
        f"correlation {agreement:.3f}"
    )

    stages.title("c. mixtures, and fresh seeds trained on them")
    other = (absent + 1) % FEATURES
    mixtures = {"equal": (0.0, uniform)}
    for shift, mixture in zip(settings.shifts, sampled["mixtures"], strict=True):
        # The control exchanges the frequencies of the feature and of the next one.
        swapped = mixture.copy()
        swapped[[absent, other]] = mixture[[other, absent]]
        mixtures[f"{shift:+.3f}"] = (shift, mixture)
        mixtures[f"{shift:+.3f} swapped"] = (shift, swapped)
    rows, finals = [], {}
    print(f"   wanted shift      frequency of {absent}   seeds without it [95 %]   polygons")
    for name, (shift, mixture) in mixtures.items():
        finals[name] = stages.stage(
            name.replace(" ", "-"),
            lambda mixture=mixture: train(settings, mixture, first_seed=1000),
            mixture=mixture.tolist(),
        )["W"]
        row = row_of(name, mixture, finals[name], absent) | {"shift": shift, "absent": absent}
        rows.append(row)
        low, high = row["interval"]
        print(
            f"   {name:16s} {mixture[absent]:10.3f} {row['without']:13d} of {row['seeds']} "
            f"[{low:.2f}, {high:.2f}]   {row['polygons']}"
        )

    result = {
        "absent": absent, "arms": rows, "largest_deviation": float(deviation.max()),
        **{f"{kind} {key}": values[key].tolist() for kind, values in
           (("sampled", sampled), ("exact", exact)) for key in ("chi", "stderr")},
    }  # fmt: skip
    (options.out / "superposition.json").write_text(json.dumps(result, indent=1))
    ends = {"equal": "equal", "down": f"{min(settings.shifts):+.3f}",
            "up": f"{max(settings.shifts):+.3f}"}  # fmt: skip
    pictures = {
        f"{ends[end]} ({end})" if end != "equal" else end: finals[ends[end]]
        for end in ("down", "equal", "up")
    }
    draw(sampled, exact, rows, pictures).savefig(options.out / "superposition.png", dpi=150)
    print(f"\n{options.out / 'superposition.png'}\n{page}")
    return result


def train(settings: Settings, mixture: np.ndarray, first_seed: int) -> dict[str, Any]:
    """Final weights of all seeds, by gradient descent on the population loss of a mixture."""
    keys = jax.vmap(jax.random.key)(first_seed + jnp.arange(settings.seeds))
    start = jax.vmap(partial(superposition.init, num_features=FEATURES))(keys)
    optimizer = optax.sgd(settings.rate)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.asarray(mixture) * superposition.feature_losses(params))

    def step(t: jax.Array, carry: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def one(params: Any) -> Any:
        return jax.lax.fori_loop(0, settings.steps, step, (params, optimizer.init(params)))[0]

    return jax.jit(jax.vmap(one))(start)


def represented(weights: np.ndarray) -> np.ndarray:
    """Which features of each seed `[seeds, 2, c]` have a direction."""
    return np.linalg.norm(weights, axis=1) > PRESENT


def sides(present: np.ndarray) -> str:
    """How many seeds end as which polygon."""
    numbers, counts = np.unique(present.sum(axis=1), return_counts=True)
    return ", ".join(f"{c} × {n}-gon" for n, c in zip(numbers, counts, strict=True))


def posterior(settings: Settings, params: Any) -> jp.Posterior:
    """The posterior around the pentagon; its data are the six features."""
    return jp.localized_posterior(
        superposition.loss_fn, params, jnp.arange(FEATURES),
        nbeta=settings.nbeta, localization=settings.localization,
    )  # fmt: skip


def respond(settings: Settings, params: Any, **how: Any) -> jp.Response:
    """χ of every norm to every feature."""
    return jp.susceptibilities(
        jax.random.key(1), posterior(settings, params), observables=NORMS,
        probes={name: jnp.arange(j, j + 1) for j, name in enumerate(NAMES)}, **how,
    )  # fmt: skip


def matrix(values: dict[str, jax.Array]) -> jax.Array:
    """One column a feature."""
    return jnp.concatenate([values[name] for name in NAMES], axis=1)


def measure(settings: Settings, params: Any, absent: int, page: Path) -> dict[str, Any]:
    """The sampled response, the mixtures it gives for the wanted shifts, and a page of both."""
    response = respond(
        settings, params, sampler=jp.sgld(step_size=settings.step_size), plan=settings.sampled,
        estimator=jp.pathwise(),
    )  # fmt: skip
    solutions = [
        jp.solve_weights(response, {NAMES[absent]: shift}, method=jp.entropic())
        for shift in settings.shifts
    ]
    jp.report([jp.group_mean(response), *solutions], page, unit="squared length")
    weights = jnp.array([[s.weights[name][0] for name in NAMES] for s in solutions])
    return {
        "chi": matrix(response.chi),
        "stderr": matrix(response.stderr),
        "mixtures": weights / weights.sum(axis=1, keepdims=True),
    }


def measure_exactly(settings: Settings, params: Any) -> dict[str, Any]:
    """The response of the exact law, from long Metropolis chains on the closed loss."""
    response = respond(
        settings, params, sampler=jp.mala(step_size=4 * settings.step_size), plan=settings.exact,
        estimator=jp.covariance(),
    )  # fmt: skip
    return {"chi": matrix(response.chi), "stderr": matrix(response.stderr)}


def row_of(name: str, mixture: np.ndarray, weights: np.ndarray, absent: int) -> dict[str, Any]:
    """How many seeds leave the feature out, with the exact 95 % interval of that share."""
    present = represented(weights)
    gone, seeds = int((~present[:, absent]).sum()), len(present)
    interval = scipy.stats.binomtest(gone, seeds).proportion_ci()
    return {
        "name": name, "mixture": mixture.tolist(), "without": gone, "seeds": seeds,
        "interval": (float(interval.low), float(interval.high)), "polygons": sides(present),
    }  # fmt: skip


def draw(
    sampled: dict[str, np.ndarray],
    exact: dict[str, np.ndarray],
    rows: list[dict[str, Any]],
    pictures: dict[str, np.ndarray],
) -> Any:
    """The response beside the exact one, the path of mixtures, and the models at its ends."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    response, path = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    axes = response.subplots(2, 1)
    limit = 1e4 * np.abs(exact["chi"]).max()
    for axis, values, title in zip(
        axes, (sampled, exact), ("χ, sampled", "χ, exact law"), strict=True
    ):
        image = axis.imshow(1e4 * values["chi"], cmap="RdBu_r", vmin=-limit, vmax=limit)
        for (j, i), x in np.ndenumerate(values["chi"]):
            axis.text(
                i, j, f"{1e4 * x:.1f}\n±{1e4 * values['stderr'][j, i]:.1f}", ha="center",
                va="center", fontsize=6, color="w" if abs(x) > 0.6e-4 * limit else "k",
            )  # fmt: skip
        axis.set(title=title, xlabel="more of feature", ylabel="squared length of feature")
    response.colorbar(image, ax=axes, label="10⁻⁴", shrink=0.6)

    top, bottom = path.subfigures(2, 1, height_ratios=(1.2, 1))
    axis = top.subplots()
    absent = rows[0]["absent"]
    exchanged = f"frequencies of {absent} and {(absent + 1) % FEATURES} exchanged"
    for kind, marker, label in (
        (False, "o-", "mixtures from the response"),
        (True, "s--", exchanged),
    ):
        chosen = [row for row in rows if ("swapped" in row["name"]) == kind or row["shift"] == 0]
        chosen.sort(key=lambda row: row["shift"])
        share = np.array([row["without"] / row["seeds"] for row in chosen])
        low, high = np.array([row["interval"] for row in chosen]).T
        axis.errorbar(
            [row["shift"] for row in chosen], share, (share - low, high - share), fmt=marker,
            capsize=2, label=label, color="0.6" if kind else "tab:blue",
        )  # fmt: skip
    for row in rows:
        if "swapped" not in row["name"]:
            axis.annotate(
                f"p = {row['mixture'][absent]:.2f}", (row["shift"], 1.04), ha="center", fontsize=7
            )
    axis.axhline(1 / FEATURES, color="0.8", lw=0.8)
    axis.set(
        xlabel=f"wanted shift of the squared length of feature {absent}", ylim=(-0.04, 1.12),
        ylabel=f"share of seeds without feature {absent}",
    )  # fmt: skip
    axis.legend(frameon=False)

    for axis, (title, weights) in zip(
        bottom.subplots(1, len(pictures)), pictures.items(), strict=True
    ):
        for columns in weights:
            for j in range(FEATURES):
                color = "tab:red" if j == absent else "0.6"
                axis.plot(*columns[:, j], "o", ms=2.5, color=color, zorder=2 + (j == absent))
        axis.set(title=title, aspect="equal", xticks=[], yticks=[], xlim=(-1.5, 1.5),
                 ylim=(-1.5, 1.5))  # fmt: skip
        axis.axhline(0, lw=0.4, color="0.8", zorder=0)
        axis.axvline(0, lw=0.4, color="0.8", zorder=0)
    return figure


if __name__ == "__main__":
    main()
