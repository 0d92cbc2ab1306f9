"""A sampler, an estimator and an inversion method of one's own are one file each."""

import importlib.util
import sys
from functools import partial

import blackjax
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_program import PROBES, SAMPLER, posterior, weights_of

import jaxpattern as jp
from jaxpattern.types import SamplingAlgorithm

PLAN = jp.Plan(num_chains=4, num_burnin=2, num_draws=8, thin=2, batch_size=3, num_batches=2)
OBSERVABLES = {"a0": lambda params: params["a"][0], "b": lambda params: (params["b"] ** 2).sum()}

SAMPLER_FILE = '''
"""Langevin dynamics with one step size per direction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

import jaxpattern as jp
from jaxpattern.types import SamplingAlgorithm


class State(NamedTuple):
    position: dict
    scale: dict


def scaled_sgld(*, step_size, scale):
    """w ← w + (ε s/2) ∇log p + √(ε s) ξ; scale: s, like the position."""
    return jp.make_sampler(
        Partial(_build, step_size=step_size, scale=scale), gradients_per_step=1,
        relaxation_steps=lambda posterior, settings: 2 / settings["step_size"] / 10.0,
        step_scale=_noise, name="scaled_sgld",
    )


def _noise(state, settings):
    return jax.tree.map(lambda s: jnp.sqrt(settings["step_size"] * s), state.scale)


def _build(posterior, *, step_size, scale):
    def init(position, key):
        return State(position, scale)

    def step(key, state, minibatch):
        force = posterior.grad_estimator(state.position, minibatch)
        leaves, treedef = jax.tree.flatten(state.position)
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        xi = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
        xi = jax.tree.unflatten(treedef, xi)
        move = lambda w, f, s, x: w + step_size * s / 2 * f + jnp.sqrt(step_size * s) * x
        return State(jax.tree.map(move, state.position, force, state.scale, xi), state.scale)

    return SamplingAlgorithm(init, step)
'''

ESTIMATOR_FILE = '''
"""χ = −Cov[φ, ℓ_z − L] from a trace of both, which is what textbooks write."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxpattern.chains.kernel import position_of
from jaxpattern.chains.loop import run_chains
from jaxpattern.chains.record import Trace
from jaxpattern.response.measure import Estimates, by_component, over_components, part_of_chains


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Both(Trace):
    problem: object

    def value(self, posterior, state, key, batch_size):
        position = position_of(state)
        excess, columns = self.problem.columns(posterior, position)
        return (self.problem.phi(posterior, position, excess), columns), ()


@dataclass(frozen=True)
class FromTrace:
    num_batches: int = 2

    def __call__(self, run, problem, host):
        def measure(group):
            recorder = Both(problem.core.on(host.mesh))
            chains = run_chains(run, recorder, host, group, label="trace")
            phi, columns = chains.kept
            estimates = estimate(phi, columns, self.num_batches)
            return part_of_chains(
                run, problem, group, estimates, chains.alive, phi, num_batches=self.num_batches
            )

        cost = 1.0 * run.plan.num_chains * run.plan.num_steps * run.batch
        return by_component(run, problem, measure, name="from a trace", cost=cost)


@partial(jax.jit, static_argnums=2)
def estimate(phi, columns, num_batches):
    return over_components(partial(one, num_batches), phi, columns)


def one(num_batches, phi, columns):
    def chi_of(phi, d):
        phi, d = (x.reshape(-1, x.shape[-1]) for x in (phi, d))
        phi, d = phi - phi.mean(0)[None], d - d.mean(0)[None]
        return -jnp.matmul(phi.T, d, precision="highest") / (len(phi) - 1)

    def column(d):
        parts = jnp.stack([chi_of(phi[c : c + 1], d[c : c + 1]) for c in range(len(phi))])
        half = len(phi) // 2
        halves = jnp.stack([chi_of(phi[:half], d[:half]), chi_of(phi[half:], d[half:])])
        return chi_of(phi, d), parts.std(0, ddof=1) / len(parts) ** 0.5, halves, parts.mean(-1)

    found = {name: column(d) for name, d in columns.items()}
    return Estimates(*({n: f[i] for n, f in found.items()} for i in range(4)), {})
'''

METHOD_FILE = '''
"""Every column moves by the same amount, in the direction in which it helps."""

import jax.numpy as jnp

import jaxpattern as jp


def sign_method(matrix, mass, shift, noise, /):
    direction = jnp.sign(shift[0] * matrix[0])
    direction = direction - mass @ direction
    size = shift[0] / (mass * matrix[0] @ direction)
    return jp.Solution(size * direction, jnp.ones_like(shift), jnp.asarray(True))
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a file and imports it."""

    def make(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found)
        spec.loader.exec_module(found)
        return found

    return make


def chi(sampler=SAMPLER, estimator=None, **settings):
    return jp.susceptibilities(
        jax.random.key(3), posterior(), sampler, PLAN, probes=PROBES, observables=OBSERVABLES,
        estimator=estimator, progress=False, **settings,
    )  # fmt: skip


def test_a_sampler(module):
    """At one scale for all it is SGLD; its relaxation time gives the pathwise sweep its window."""
    scaled_sgld = module("my_sampler", SAMPLER_FILE).scaled_sgld
    ones = jax.tree.map(jnp.ones_like, posterior().center)
    mine = scaled_sgld(step_size=0.1, scale=ones)
    theirs = jp.sgld(step_size=0.1, noise="leaf")
    assert "scaled_sgld(step_size=0.1" in repr(mine)
    run = partial(jp.sample, plan=PLAN, observe=weights_of, progress=False)
    chex.assert_trees_all_close(
        run(jax.random.key(3), posterior(), mine), run(jax.random.key(3), posterior(), theirs),
        atol=1e-6,
    )  # fmt: skip
    got, wanted = chi(mine), chi(theirs)  # γ = 10: two steps
    assert got.estimator == wanted.estimator == "pathwise (adjoint, window 12, one-sided secants)"
    chex.assert_trees_all_close(got.chi, wanted.chi, atol=1e-6)
    slow = scaled_sgld(step_size=0.1, scale=jax.tree.map(lambda x: x / 10, ones))
    chex.assert_trees_all_close(
        run(jax.random.key(3), posterior(), slow),
        run(jax.random.key(3), posterior(), jp.sgld(step_size=0.01, noise="leaf")), atol=1e-6,
    )  # fmt: skip


def test_an_estimator(module):
    estimator = module("my_estimator", ESTIMATOR_FILE).FromTrace()
    assert isinstance(estimator, jp.Estimator)
    got, wanted = chi(estimator=estimator), chi(estimator=jp.covariance())
    assert got.estimator == "from a trace"
    assert got.rows == wanted.rows == ("a0", "b")
    for name in PROBES:
        size = float(jnp.abs(wanted.chi[name]).max())
        np.testing.assert_allclose(got.chi[name], wanted.chi[name], atol=1e-5 * size)
    np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-5)
    weights = jp.solve_weights(jp.group_mean(got), {"a0": 1e-5}, method=jp.least_norm())
    assert float(weights.predicted_shift["a0"]) == pytest.approx(1e-5, rel=1e-3)
    for_parts = chi(estimator=estimator, components={"a": jp.by_path("a"), "b": jp.by_path("b")})
    assert for_parts.rows == ("a/a0", "a/b", "b/a0", "b/b")


@pytest.mark.filterwarnings("ignore::jaxpattern.WeightsWarning")
def test_an_inversion_method(module):
    method = module("my_method", METHOD_FILE).sign_method
    response = chi(estimator=jp.covariance())
    found = jp.solve_weights(response, {"a0": 1e-4}, method=method)
    weights = jnp.concatenate([found.weights[name] for name in PROBES])
    assert len({round(float(w), 5) for w in weights}) == 2  # up or down, by as much
    assert float(found.predicted_shift["a0"]) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "changed", "text"),
    [
        (jp.pathwise, {"window": 4}, "Pathwise(window=4"),
        (jp.covariance, {"form": "hybrid"}, "Covariance(form='hybrid'"),
        (jp.laplace, {}, "Laplace("),
    ],
    ids=["pathwise", "covariance", "laplace"],
)
def test_estimators_print_compare_and_hash(make, changed, text):
    one, two = make(**changed), make(**changed)
    assert repr(one).startswith(text)
    assert one == two
    assert hash(one) == hash(two)
    assert isinstance(one, jp.Estimator)
    if changed:
        assert one != make()
        assert len({one, two, make()}) == 2


# Samplers whose chains are no smooth function of one gradient per step


def midpoint(posterior):
    """The gradient half a step ahead: it takes two."""

    def step(key, position, minibatch):
        half = jax.tree.map(
            lambda w, f: w + 0.005 * f, position, posterior.grad_estimator(position, minibatch)
        )
        force = posterior.grad_estimator(half, minibatch)
        return jax.tree.map(lambda w, f: w + 0.01 * f, position, force)

    return SamplingAlgorithm(lambda position, key: position, step)


def hmc(posterior):
    mass = jnp.ones(sum(x.size for x in jax.tree.leaves(posterior.center)))
    return blackjax.hmc(
        posterior.logdensity, step_size=0.1, inverse_mass_matrix=mass, num_integration_steps=3
    )


def sghmc(posterior):
    algorithm = blackjax.sghmc(posterior.grad_estimator, num_integration_steps=3, alpha=0.1)

    def step(key, position, minibatch):
        return algorithm.step(key, position, minibatch, 0.01)

    return SamplingAlgorithm(lambda position, key: position, step)


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
@pytest.mark.parametrize(
    "sampler",
    [
        midpoint,
        jp.make_sampler(midpoint, gradients_per_step=2, name="midpoint"),
        hmc,
        sghmc,
        jp.mala(step_size=0.01),
    ],
    ids=["midpoint", "midpoint that says so", "hmc", "sghmc", "mala"],
)
def test_pathwise_refuses_other_samplers(sampler, mode):
    with (
        jax.debug_key_reuse(sampler is not sghmc),  # blackjax uses a key of it twice
        pytest.raises(TypeError, match=r"estimator=covariance\(\)"),
    ):
        chi(sampler, jp.pathwise(window=4, mode=mode))
