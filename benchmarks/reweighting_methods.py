"""Ways to choose the weights of sources for a wish: each gives weights, and says what it cost.

A wish is to lower the held-out loss of one source and let that of another not rise. Methods look
at models of `measured` seeds only; what comes of their weights is seen on others. Costs are in
gradient equivalents, one forward and backward pass of one window, and include all runs that a
method makes, but not the run that its weights are for.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

import jaxpattern as jp
from jaxpattern.models import TransformerConfig, make_loss_fn, transformer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import quickstart

ROUNDS = 4  # parts of a run between which weights can change
HALF = 2  # of them a proxy run takes


class Wish(NamedTuple):
    """Numbers of the source whose loss is to fall, and of the one whose loss is not to rise."""

    lower: int
    hold: int


def small(settings: Any) -> Any:
    """The quickstart's problem with a smaller model and shorter runs."""
    return settings._replace(
        model=TransformerConfig(256, context=32, num_layers=1, num_heads=2, d_model=32), steps=120,
        batch_size=16, held_out_windows=32,
    )  # fmt: skip


class Mixtures:
    """The quickstart's sources, models trained on any mixture of them, and what methods measure."""

    def __init__(self, settings: Any, seeds: int, measured: int) -> None:
        self.settings = settings
        self.train, self.held_out = quickstart.load_text(quickstart.parse([]), settings)
        self.sources = list(self.train)
        self.equal = np.ones(len(self.sources))
        self.loss_fn = make_loss_fn(settings.model)
        self.data = np.concatenate(list(self.train.values()))
        self.places = quickstart.rows_of(self.train)
        self.keys = jax.random.split(jax.random.key(0), seeds)
        self.measured = jax.random.split(jax.random.key(1), measured)
        self.held_out_losses = quickstart.make_observable(self.loss_fn, self.held_out)
        self.losses = jax.jit(jax.vmap(self.held_out_losses))
        schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
        self.optimizer = optax.adamw(schedule)
        self.part = settings.steps // ROUNDS
        self.run = float(settings.steps * settings.batch_size)  # cost of one
        self.look = sum(len(x) for x in self.held_out.values()) / 3  # of the held-out losses

    def start(self, keys: Any) -> Any:
        """Fresh models, one for each key."""
        return jax.vmap(lambda key: transformer.init(key, self.settings.model))(keys)

    def token_weights(self, weights: np.ndarray) -> np.ndarray:
        """ρ of every token, from one weight per source."""
        mixture = dict(zip(self.sources, weights.tolist(), strict=True))
        return quickstart.token_weights(mixture, self.train)

    def one_part(self, keys: Any, here: tuple[Any, Any], r: int, weights: np.ndarray) -> Any:
        """Part r of a run, from parameters and optimizer state to the next."""
        params, history = jp.train(
            jax.vmap(lambda key: jax.random.fold_in(key, r))(keys), self.loss_fn, here[0],
            self.data, self.optimizer, num_steps=self.part, batch_size=self.settings.batch_size,
            weights=self.token_weights(weights), optimizer_state=here[1], progress=False,
        )  # fmt: skip
        return params, history.optimizer_state

    def train_on(self, schedule: np.ndarray, keys: Any = None) -> tuple[Any, np.ndarray]:
        """Models of weights `[rounds, sources]`, and their held-out losses `[seeds, sources]`."""
        keys = self.keys if keys is None else keys
        here = self.start(keys), None
        for r, weights in enumerate(schedule):
            here = self.one_part(keys, here, r, weights)
        return here[0], np.asarray(self.losses(here[0]), np.float64)


def divergence(weights: np.ndarray) -> float:
    """KL(ρ‖1) of weights of mean 1."""
    return float(np.mean(scipy.special.xlogy(weights, weights)))


def at_distance(weights: np.ndarray, distance: float) -> np.ndarray:
    """ρ ∝ exp(t log ρ) with t where KL(ρ‖1), a mean over rounds, is the one wanted."""
    with np.errstate(divide="ignore"):  # weights of 0 stay 0
        logs = np.log(weights)
    low, high = 0.0, 1.0

    def tilt(t: float) -> np.ndarray:
        tilted = np.exp(t * (logs - np.max(logs, axis=-1, keepdims=True)))
        return tilted / tilted.mean(axis=-1, keepdims=True)

    while divergence(tilt(high)) < distance and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(tilt(middle)) < distance else (low, middle)
    return tilt(high)


def along(logs: np.ndarray) -> np.ndarray:
    """Weights of mean 1 with these logarithms, up to their size."""
    logs = logs - logs.mean()
    weights = np.exp(0.1 * logs / max(float(np.abs(logs).max()), 1e-30))
    return weights / weights.mean()


def steepest(slopes: np.ndarray, wish: Wish) -> np.ndarray:
    """Weights along which the one loss falls fastest while the other does not rise, to first order.

    Args:
        slopes: derivative of each held-out loss with respect to each weight, `[sources, sources]`.
        wish: which of them.
    """
    slopes = slopes - slopes.mean(axis=1, keepdims=True)
    way, held = -slopes[wish.lower], slopes[wish.hold]
    if way @ held > 0:
        way = way - (way @ held) / (held @ held) * held
    return along(way)


def solved(problem: Mixtures, response: jp.Response, wish: Wish, by: float) -> np.ndarray:
    """The entropic weights of a measured response; a held loss that does not rise is left free."""
    response = dataclasses.replace(response, rows=tuple(problem.sources))
    target = {response.rows[wish.lower]: -by}
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", jp.UnreachableTargetWarning)
            warnings.simplefilter("ignore", jp.WeightsWarning)
            solution = jp.solve_weights(response, target, method=jp.entropic())
        held = response.rows[wish.hold]
        if held in target or float(solution.predicted_shift[held]) <= 0:
            break
        target[held] = 0.0
    return np.array([float(solution.weights[s]) for s in problem.sources])


def of_training(problem: Mixtures, mode: str) -> jp.Response:
    """Response of the whole training run on equal parts, over the measured seeds."""
    return jp.training_response(
        problem.measured, problem.loss_fn, problem.start(problem.measured), problem.data,
        problem.optimizer, num_steps=problem.settings.steps,
        batch_size=problem.settings.batch_size, observables={"loss": problem.held_out_losses},
        sources=problem.places, progress=False, mode=mode,
    )  # fmt: skip


def posterior_responses(
    problem: Any, models: Any, estimator: Any, plan: jp.Plan, *, seed: int, data: Any, **asked: Any
) -> list[jp.Response]:
    """Response of the localized posterior around each of several trained models.

    Args:
        problem: whose loss function and settings (nβ, γ, ε) are taken.
        models: parameters with a leading axis.
        estimator: how each is measured.
        plan: of the chains.
        seed: of the first; the others count on.
        data: what the posteriors are of.
        asked: observables, probes and the like, as `susceptibilities` takes them.
    """
    settings, responses = problem.settings, []
    for i in range(len(jax.tree.leaves(models)[0])):
        posterior = jp.localized_posterior(
            problem.loss_fn, jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), models), data,
            nbeta=settings.nbeta, localization=settings.localization,
        )  # fmt: skip
        responses.append(
            jp.susceptibilities(
                jax.random.key(seed + i), posterior, jp.sgld(step_size=settings.step_size), plan,
                estimator=estimator, progress=False, **asked,
            )
        )  # fmt: skip
    return responses


def of_posterior(problem: Mixtures, models: Any, estimator: Any, count: int | None) -> jp.Response:
    """Mean response of the localized posteriors of several trained models.

    Args:
        problem: the problem.
        models: trained on equal parts, with a leading axis.
        estimator: how each is measured.
        count: windows of each source that are used; None: all.
    """
    probes = {s: x[:count] for s, x in problem.train.items()}
    found = posterior_responses(
        problem, models, estimator, problem.settings.measure, seed=2,
        data=np.concatenate(list(probes.values())),
        observables={"loss": problem.held_out_losses}, probes=probes,
    )  # fmt: skip
    responses = [jp.group_mean(response) for response in found]

    def mean(*values: Any) -> Any:
        return jnp.stack(values).mean(0)

    first, number = responses[0], len(responses)
    errors = [r.stderr for r in responses]
    return dataclasses.replace(
        first,
        chi=jax.tree.map(mean, *(r.chi for r in responses)),
        halves=jax.tree.map(mean, *(r.halves for r in responses)),
        stderr=jax.tree.map(lambda *x: jnp.sqrt(sum(y * y for y in x)) / number, *errors),
        cost=sum(r.cost for r in responses) + number * problem.run,
    )


def slopes_of(problem: Mixtures, response: jp.Response) -> np.ndarray:
    """Derivative of each row with respect to each source's weight, nβ χ q."""
    columns = [response.chi[s] * response.mass[s] * response.nbeta for s in problem.sources]
    return np.asarray(jnp.stack(columns, axis=1), np.float64)


def doge(problem: Mixtures, count: int = 64) -> tuple[np.ndarray, float]:
    """⟨∇L of a source, ∇L of a held-out loss⟩ `[losses, sources]`, averaged along runs.

    DoGE's weights are the exponential of the row of the wished loss (arXiv 2310.15393).
    """
    keys = problem.measured
    batch = jnp.asarray(np.stack([problem.train[s][:count] for s in problem.sources]))

    def alignment(params: Any) -> jax.Array:
        held = jax.jacrev(problem.held_out_losses)(params)
        mine = jax.jacrev(lambda p: jax.lax.map(lambda x: problem.loss_fn(p, x).mean(), batch))(
            params
        )
        pairs = jax.tree.map(
            lambda a, b: a.reshape(len(a), -1) @ b.reshape(len(b), -1).T, held, mine
        )
        return sum(jax.tree.leaves(pairs))

    aligned = jax.jit(jax.vmap(alignment))
    here, total = (problem.start(keys), None), 0.0
    for r in range(ROUNDS):
        here = problem.one_part(keys, here, r, problem.equal)
        total = total + np.asarray(aligned(here[0]), np.float64).mean(0) / ROUNDS
    held = len(next(iter(problem.held_out.values())))
    each = problem.run + ROUNDS * (batch.shape[0] * batch.shape[1] + held)
    return total, len(keys) * each


def doremi(problem: Mixtures, reference: np.ndarray, rate: float = 1.0) -> tuple[np.ndarray, float]:
    """Weights that grow with the excess loss over a reference, averaged over a run.

    DoReMi (arXiv 2305.10429), with held-out losses, and weights that change once per round.

    Args:
        problem: the problem.
        reference: held-out losses of models trained on equal parts, `[seeds, sources]`.
        rate: of the exponentiated gradient.
    """
    keys = problem.measured
    weights, total, here = problem.equal, 0.0, (problem.start(keys), None)
    for r in range(ROUNDS):
        here = problem.one_part(keys, here, r, weights)
        excess = np.maximum((np.asarray(problem.losses(here[0])) - reference).mean(0), 0.0)
        weights = weights * np.exp(rate * excess)
        weights = weights / weights.mean()
        total = total + weights / ROUNDS
    # The reference and the proxy, each trained once, and its losses.
    return np.asarray(total), len(keys) * (2 * problem.run + (1 + ROUNDS) * problem.look)


def regmix(problem: Mixtures, number: int) -> tuple[np.ndarray, float]:
    """Slopes of a linear fit of held-out losses to the weights of random mixtures (RegMix).

    As in arXiv 2407.01492: so many proxy runs, here of half the steps, each on a mixture of its
    own, Dirichlet around equal parts. Runs share their starts and batches in as many groups as
    there are measured seeds, and each group has its own intercept.
    """
    keys, sources = problem.measured, len(problem.sources)
    number -= number % len(keys)
    rng = np.random.default_rng(0)
    mixtures = sources * rng.dirichlet(np.full(sources, 4.0), number)
    lengths = [problem.train[s].shape for s in problem.sources]
    which = np.repeat(np.arange(sources), [n for n, _ in lengths])
    steps = HALF * problem.part
    optimizer = optax.adamw(optax.cosine_decay_schedule(problem.settings.learning_rate, steps))

    def proxy(key: Any, start: Any, mixture: jax.Array) -> jax.Array:
        weights = jnp.broadcast_to(mixture[which][:, None], (len(which), lengths[0][1] - 1))
        params, _ = jp.train(
            key, problem.loss_fn, start, problem.data, optimizer, num_steps=steps,
            batch_size=problem.settings.batch_size, weights=weights, progress=False,
        )  # fmt: skip
        return problem.held_out_losses(params)

    each = jax.jit(jax.vmap(proxy))
    starts, losses = problem.start(keys), []
    for several in mixtures.reshape(-1, len(keys), sources):
        losses.append(np.asarray(each(keys, starts, jnp.asarray(several, jnp.float32)), float))
    found = np.concatenate(losses)
    group = np.tile(np.eye(len(keys)), (number // len(keys), 1))
    design = np.concatenate([group, mixtures - 1], axis=1)
    fit = np.linalg.lstsq(design, found, rcond=None)[0]
    return fit[len(keys) :].T, number * (problem.run * HALF / ROUNDS + problem.look)


def online(
    problem: Mixtures, wish: Wish, *, by: float, share: float, method: Any
) -> tuple[np.ndarray, float]:
    """The weights of each round that `pattern` arrives at, `[rounds, sources]`.

    Args:
        problem: the problem.
        wish: what is wanted.
        by: how far the loss is to fall in all.
        share: the effective sample size that every round keeps.
        method: of the inversion.
    """
    keys = problem.measured
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = jp.pattern(
            keys, problem.loss_fn, problem.start(keys), problem.data, problem.optimizer,
            target={f"loss/{wish.lower}": -by}, hold=[f"loss/{wish.hold}"],
            observables={"loss": problem.held_out_losses}, sources=problem.places,
            num_rounds=ROUNDS, num_steps=problem.part, batch_size=problem.settings.batch_size,
            min_effective_share=share, method=method, mode="secant", progress=False,
        )  # fmt: skip
    schedule = np.array(
        [
            [float(np.asarray(r.weights)[i[0], 0]) for i in problem.places.values()]
            for r in result.rounds
        ]
    )
    measuring = sum(r.response.cost for r in result.rounds)
    # Beside the measuring: each part on the old weights, on the new ones, and the control.
    return schedule, measuring + len(keys) * (3 * problem.run + 3 * ROUNDS * problem.look)
