"""Ways to say what each training window does to each held-out loss: matrices `[held out, windows]`.

All are in one sign: an entry is the change of the held-out loss when the window's weight rises,
up to a factor common to a row, so that negative is helpful. Each is the mean over models that were
trained on all windows, and comes with its cost in gradient equivalents of one window.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpattern as jp
from jaxpattern.models import TransformerConfig, make_loss_fn, transformer
from reweighting_methods import posterior_responses, quickstart


class Settings(NamedTuple):
    """Sizes of the problem, none of them tuned to what a method scores."""

    model: TransformerConfig = TransformerConfig(
        256, context=32, num_layers=1, num_heads=2, d_model=16
    )
    windows: int = 256
    held_out: int = 8
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-2
    measured: int = 2  # models that methods look at
    retrained: int = 2  # other models, of each subset
    halves: int = 100
    filtered: int = 6  # held-out windows whose most helpful data are left out
    nbeta: float = 1500.0
    localization: float = 2500.0
    step_size: float = 5e-5  # mini-batches add a fifth to the temperature
    projected: int = 256  # directions that TRAK keeps
    plan: jp.Plan = jp.Plan(num_chains=2, num_burnin=90, num_draws=2, thin=30, batch_size=32)


TINY = Settings(
    model=TransformerConfig(256, context=8, num_layers=1, num_heads=2, d_model=8),
    windows=24, held_out=2, steps=4, batch_size=4, measured=2, retrained=2, halves=6, filtered=1,
    projected=8,
    plan=jp.Plan(num_chains=2, num_burnin=4, num_draws=4, thin=2, batch_size=4),
)  # fmt: skip


class Windows:
    """Windows of all sources of the quickstart's text, and models trained on some of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        shape = quickstart.Settings()._replace(
            model=settings.model, train_windows=-(-settings.windows // 6),
            held_out_windows=-(-settings.held_out // 6),
        )  # fmt: skip
        train, held_out = quickstart.load_text(quickstart.parse([]), shape)
        rng = np.random.default_rng(0)
        self.data = rng.permutation(np.concatenate(list(train.values())))[: settings.windows]
        rest = rng.permutation(np.concatenate(list(held_out.values())))[: settings.held_out]
        self.held_out = jax.device_put(rest)
        tokens = make_loss_fn(settings.model)
        # One loss per window, which is what gets a weight here.
        self.loss_fn = lambda params, batch: tokens(params, batch).mean(axis=1)
        self.observe = lambda params: self.loss_fn(params, self.held_out)
        self.optimizer = optax.adamw(
            optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
        )
        keys = jax.random.split(jax.random.key(0), settings.measured + settings.retrained)
        self.measured, self.others = keys[: settings.measured], keys[settings.measured :]
        self.run = float(settings.steps * settings.batch_size)
        self._retrain = jax.jit(
            jax.vmap(lambda keys, rho: jax.vmap(self.observe)(self.train(keys, rho)), (None, 0))
        )

    def start(self, keys: Any) -> Any:
        """Fresh models."""
        return jax.vmap(lambda key: transformer.init(key, self.settings.model))(keys)

    def train(self, keys: Any, rho: Any = None) -> Any:
        """Models of window weights ρ."""
        return jp.train(
            keys, self.loss_fn, self.start(keys), self.data, self.optimizer,
            num_steps=self.settings.steps, batch_size=self.settings.batch_size, weights=rho,
            progress=False,
        )[0]  # fmt: skip

    def retrain(self, rho: np.ndarray, at_once: int = 25) -> np.ndarray:
        """Held-out losses of models trained on each of several weights, `[R, seeds, held out]`."""
        at_once = min(at_once, len(rho))
        padded = np.concatenate([rho, np.ones((-len(rho) % at_once, rho.shape[1]))])
        parts = padded.astype(np.float32).reshape(-1, at_once, rho.shape[1])
        found = [np.asarray(self._retrain(self.others, part), np.float64) for part in parts]
        return np.concatenate(found)[: len(rho)]


class Attribution(NamedTuple):
    """Effects of windows, and what finding them cost."""

    effects: np.ndarray
    cost: float


def of_response(responses: list[jp.Response]) -> Attribution:
    """nβ χ q of each window, mean over models."""
    effects = [
        np.asarray(r.chi["data"], np.float64) * np.asarray(r.mass["data"]) * float(r.nbeta)
        for r in responses
    ]
    return Attribution(np.mean(effects, axis=0), sum(r.cost for r in responses))


def of_posterior(problem: Windows, models: Any, estimator: Any, plan: jp.Plan) -> Attribution:
    """The response of the localized posteriors of the models."""
    found = posterior_responses(
        problem, models, estimator, plan, seed=1, data=problem.data,
        observables={"held out": problem.observe}, probes={"data": problem.data},
        reference=problem.data,
    )  # fmt: skip
    return of_response(found)


def metagradient(problem: Windows) -> Attribution:
    """The response of the training run itself, backwards (Engstrom et al. 2025)."""
    settings = problem.settings
    response = jp.training_response(
        problem.measured, problem.loss_fn, problem.start(problem.measured), problem.data,
        problem.optimizer, num_steps=settings.steps, batch_size=settings.batch_size,
        observables={"held out": problem.observe}, sources={"data": np.arange(settings.windows)},
        mode="reverse", progress=False,
    )  # fmt: skip
    return of_response([response])


def gradients(problem: Windows, models: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Gradients of the held-out losses and of the windows' losses, `[K, P]` and `[N, P]`."""

    @jax.jit
    def of(params: Any) -> tuple[jax.Array, jax.Array]:
        def flat(batch: jax.Array) -> jax.Array:
            one = jax.vmap(
                jax.grad(lambda p, x: problem.loss_fn(p, x[None])[0]), (None, 0)
            )(params, batch)  # fmt: skip
            return jnp.concatenate([x.reshape(len(batch), -1) for x in jax.tree.leaves(one)], 1)

        return flat(problem.held_out), flat(jnp.asarray(problem.data))

    found = []
    for i in range(problem.settings.measured):
        held, data = of(jax.tree.map(lambda leaf, i=i: leaf[i], models))
        found.append((np.asarray(held, np.float64), np.asarray(data, np.float64)))
    return found


def cosine(held: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Minus the cosine of two gradients."""
    lengths = np.linalg.norm(held, axis=1)[:, None] * np.linalg.norm(data, axis=1)
    return -(held @ data.T) / np.maximum(lengths, 1e-30)


def trak(held: np.ndarray, data: np.ndarray, directions: int, seed: int = 0) -> np.ndarray:
    """−g_kᵀ P (PᵀGᵀG P + λ)⁻¹ Pᵀ g_i with P of random signs (after TRAK, Park et al. 2023).

    λ is the mean eigenvalue, since there are fewer windows than directions. TRAK's weights, one
    less the probability of the right answer, are those of classes, and are left out.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (held.shape[1], directions))
    held, data = held @ signs / directions**0.5, data @ signs / directions**0.5
    kernel = data.T @ data
    ridge = np.trace(kernel) / directions * np.eye(directions)
    return -held @ np.linalg.solve(kernel + ridge, data.T)


def covariance_plan(problem: Windows, cost: float) -> jp.Plan:
    """The burn-in and thinning of `plan`, and as many draws as that cost pays for."""
    settings, plan = problem.settings, problem.settings.plan
    passes = (settings.windows + settings.held_out) / 3
    each = plan.num_chains * (plan.thin * plan.batch_size + passes)
    spent = plan.num_chains * plan.num_burnin * plan.batch_size
    draws = max(8, int((cost / settings.measured - spent) / each))
    return dataclasses.replace(plan, num_draws=draws)
