"""Several measurements of one run, and chains that go on."""

from dataclasses import replace
from functools import partial

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_program import COMPONENTS, PLAN, PROBES, SAMPLER, key, posterior, weights_of
from jaxtyping import config
from support import doomed, interrupted, often, same

import jaxpattern as jp

OBSERVABLES = {"a0": lambda params: params["a"][0], "both": lambda params: params["b"]}
CHI = jp.Chi(probes=PROBES, observables=OBSERVABLES, estimator=jp.covariance())
PATHWISE = jp.Chi(probes=PROBES, observables=OBSERVABLES, estimator=jp.pathwise(window=2, every=1))


def measure(what, plan=PLAN, sampler=SAMPLER, **settings):
    return jp.measure(key(), posterior(), sampler, plan, what, progress=False, **settings)


def alone(what, plan=PLAN):
    arguments = (key(), posterior(), SAMPLER, plan)
    if isinstance(what, jp.LLC):
        return jp.llc(*arguments, progress=False)
    if isinstance(what, jp.Chi):
        return jp.susceptibilities(
            *arguments, probes=what.probes, observables=what.observables,
            estimator=what.estimator, components=what.components, progress=False,
        )  # fmt: skip
    return jp.sample(*arguments, what, progress=False)


ASKED = {
    "llc": jp.LLC(),
    "trace": weights_of,
    "chi": CHI,
    "pathwise": PATHWISE,
    "parts": jp.Chi(probes=PROBES, components=COMPONENTS, estimator=jp.covariance()),
}


@pytest.fixture(scope="module")
def together():
    return measure(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_each_is_what_it_is_alone(together, name):
    same(together[name], alone(ASKED[name]))


def test_results_by_name(together):
    assert list(together) == list(ASKED)
    assert len(together) == len(ASKED)
    assert all(name in str(together) for name in ASKED)
    assert isinstance(together["chi"], jp.Response)
    assert isinstance(together["llc"], jp.LocalLearningCoefficient)
    assert together["chi"].rows == ("a0", "both/0", "both/1")
    assert together.chains.steps == PLAN.num_steps
    assert together.chains.draws == PLAN.num_draws


@pytest.mark.parametrize("sampler", [SAMPLER, jp.rmsprop_sgld(step_size=0.01)], ids=repr)
def test_chains_go_on(sampler):
    """Two runs, the second without a burn-in, are one long run."""
    what = {"trace": weights_of}
    run = partial(measure, what, sampler=sampler)
    whole = run(plan=replace(PLAN, num_draws=11, num_batches=1))
    first = run(plan=replace(PLAN, num_draws=5, num_batches=1))
    second = run(plan=replace(PLAN, num_burnin=0, num_draws=6, num_batches=1), start=first.chains)
    same(jnp.concatenate([first["trace"], second["trace"]], axis=1), whole["trace"])
    chex.assert_trees_all_equal(second.chains.state, whole.chains.state, strict=True)
    assert (second.chains.steps, second.chains.draws) == (whole.chains.steps, 11)


def test_a_lost_chain_stays_lost():
    run = partial(measure, {"trace": weights_of}, sampler=doomed(step=6, share=0.5))
    plan = replace(PLAN, num_chains=6, num_batches=1)
    with pytest.warns(jp.DivergenceWarning):
        first = run(plan=plan)
    with pytest.warns(jp.DivergenceWarning):
        second = run(plan=replace(plan, num_burnin=0), start=first.chains)
    lost = ~np.asarray(first.chains.alive)
    assert 0 < lost.sum() < 6
    np.testing.assert_array_equal(np.isnan(second["trace"]).all(axis=(1, 2)), lost)


def test_from_a_folder(tmp_path, monkeypatch):
    what = {"llc": jp.LLC(), "trace": weights_of}
    monkeypatch.setitem(interrupted.__globals__["DRIVERS"], "measure", partial(measure, what))
    interrupted(monkeypatch, "measure", tmp_path)
    same(measure(what, checkpoint=often(tmp_path)).results, measure(what).results)


@pytest.fixture
def annotations_unchecked():
    """What a user meets, who has no beartype in front of the package."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("what", "settings", "error", "message"),
    [
        ({}, {}, ValueError, "measurements is empty; give at least one"),
        ({"x": 3}, {}, TypeError, "must be a function of params.*got int"),
        ({"x": weights_of}, {"start": 3}, TypeError, "start must be the chains of measure.*int"),
        ([weights_of], {}, TypeError, "measurements must map names to values"),
        (
            {"x": jp.Chi(probes={}, observables=OBSERVABLES)}, {}, ValueError,
            "probes is empty",
        ),
        (
            {"x": jp.Chi(probes=PROBES)}, {}, ValueError,
            "observables must be given where there are no components",
        ),
    ],
)  # fmt: skip
def test_bad_measurements(what, settings, error, message, annotations_unchecked):
    with pytest.raises(error, match=message):
        measure(what, **settings)


def test_bad_starts(together):
    with pytest.raises(ValueError, match=r"start does not go with \['x'\], which have chains of"):
        measure({"x": PATHWISE}, start=together.chains)
    with pytest.raises(ValueError, match=r"start has 2 chains, plan.num_chains is 3"):
        measure({"x": weights_of}, replace(PLAN, num_chains=3), start=together.chains)
    with pytest.raises(ValueError, match="start holds states of another sampler or posterior"):
        measure({"x": weights_of}, sampler=jp.sgnht(step_size=0.01), start=together.chains)
