"""How many programs a first result compiles, and what compiles none again.

Counted by the compiler's own events, in a fresh process: a program that is found in the persistent
cache counts like one that is compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import jax
import jax.numpy as jnp
import numpy as np
import optax
import blackjax  # which computes two constants when it is imported
import jaxpattern as jp

compiled = []


def note(event, seconds, **about):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(about["fun_name"].removeprefix("jit(").removesuffix(")"))


jax.monitoring.register_event_duration_secs_listener(note)
rows = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
params = {"a": jnp.asarray(rows[0]), "b": jnp.zeros(2)}


def loss(params, x):
    return 0.5 * (jnp.tanh(x @ params["a"]) + params["b"].sum() - x[:, 0]) ** 2


posterior = jp.localized_posterior(loss, params, jnp.asarray(rows), nbeta=6.0, localization=10.0)
sampler = jp.sgld(step_size=0.02)
PLAN = dict(num_chains=2, num_burnin=3, num_draws=6, thin=2, batch_size=4, num_batches=2)
probes = {"p": jnp.asarray(rows[:5])}
observables = {"a": jp.mean_loss(loss, jnp.asarray(rows[:4]))}
estimators = {"pathwise": jp.pathwise(window=4), "covariance": jp.covariance()}
keys = list(jax.random.split(jax.random.key(1), 50))  # made before anything is counted
found = {}


def compiles(name, function, *arguments, **changes):
    compiled.clear()
    jax.block_until_ready(jax.tree.leaves(function(*arguments, jp.Plan(**(PLAN | changes)))))
    found[name] = list(compiled)


def chi(estimator, plan):
    return jp.susceptibilities(
        keys.pop(), posterior, sampler, plan, probes=probes, observables=observables,
        estimator=estimators[estimator], progress=False,
    )


def influence(plan, correlation=False):
    return jp.influence(
        keys.pop(), posterior, sampler, plan, queries={"q": jnp.asarray(rows[:8])},
        probes={"p": jnp.asarray(rows)}, correlation=correlation, progress=False,
    )


def sample(plan):
    observe = lambda params: params["a"]
    return jp.sample(keys.pop(), posterior, sampler, plan, observe, progress=False)


def llc(plan):
    return jp.llc(keys.pop(), posterior, sampler, plan, progress=False)


optimizer = optax.adam(1e-2)


def train(plan, number):
    weights = np.arange(1.0, 13.0, dtype=np.float32) + number
    found = jp.train(
        keys.pop(), loss, params, jnp.asarray(rows), optimizer, num_steps=5,
        batch_size=4, weights=weights, progress=False,
    )
    return found[0]


CHANGES = dict(num_burnin=4, num_batches=3, thin=3, num_draws=7)
drivers = {name: (chi, name) for name in estimators} | {"influence": (influence,)}
for driver, call in drivers.items():
    compiles(f"{driver}: first", *call)
    compiles(f"{driver}: again", *call)
    for name, value in CHANGES.items():
        compiles(f"{driver}: {name}", *call, **{name: value})
compiles("influence: correlation", lambda plan: influence(plan, True))
compiles("sample", sample)
compiles("llc", llc)
compiles("llc: num_burnin", llc, num_burnin=0)
for number in (0, 1):
    compiles(f"train: {number}", lambda plan: train(plan, number))
print(json.dumps(found))
"""

DRIVERS = ["pathwise", "covariance", "influence"]
WITH_THE_MODEL = {"start", "advance", "look_back", "_at_start"}


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[str]]:
    """Call → names of the functions that it compiled."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_first_response_compiles_at_most_eight(compiled, driver):
    found = compiled[f"{driver}: first"]
    assert len(found) <= 8, found
    assert found.count("advance") == 1


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_same_call_compiles_nothing(compiled, driver):
    assert compiled[f"{driver}: again"] == []


@pytest.mark.parametrize("change", ["num_burnin", "num_batches", "thin", "num_draws"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_other_lengths_compile_no_model_again(compiled, driver, change):
    assert WITH_THE_MODEL.isdisjoint(compiled[f"{driver}: {change}"])


def test_the_other_form_of_influence_compiles_no_chains(compiled):
    assert compiled["influence: correlation"] == ["estimate"]


def test_another_burn_in_compiles_nothing(compiled):
    assert compiled["covariance: num_burnin"] == []
    assert compiled["llc: num_burnin"] == []


def test_the_step_of_the_sampler_is_in_one_program(compiled):
    """Burn-in and draws share it; another recorder is another program, and one."""
    for driver in ("sample", "llc"):
        found = [name for name in compiled[driver] if name in WITH_THE_MODEL]
        assert sorted(found) == ["advance", "start"], compiled[driver]


def test_training_on_other_weights_compiles_nothing(compiled):
    assert "_advance" in compiled["train: 0"]
    assert compiled["train: 1"] == []
