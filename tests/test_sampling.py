"""Chains: what a draw is, the same bits for the same seed, transformations, and lost chains.

Statistical checks use fixed seeds and a limit of five standard errors (false alarm 6e-7 a number)
or a χ² test at 1e-6.
"""

import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.base import SamplingAlgorithm
from scipy import stats
from support import doomed

import jaxpattern as jp
from jaxpattern.chains.run import make_run
from jaxpattern.losses import losses_in_chunks

N, D = 9, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D))
KEY = jax.random.key(11)
susceptibilities = partial(jp.susceptibilities, estimator=jp.covariance())
# One plan for nearly all tests, and settings that are arguments: few programs to compile.
PLAN = jp.Plan(num_chains=6, num_burnin=5, num_draws=12, thin=2, batch_size=4, num_batches=3)


def loss_fn(params, batch):
    """½ (x · w)², NaN where the second row of w has gone further than the sample allows."""
    losses = 0.5 * (batch["x"] @ params["w"].reshape(-1)) ** 2
    return jnp.where(jnp.abs(params["w"][1]).max() < batch["limit"], losses, jnp.nan)


def batch(limit=np.inf, dtype=jnp.float32):
    return {"x": jnp.asarray(X, dtype), "limit": jnp.full(N, limit, dtype)}


def make(dtype=jnp.float32, **changes):
    settings = {"nbeta": 6.0, "localization": 4.0} | changes
    params = {"w": jnp.full((2, 2), 0.1, dtype)}
    return jp.localized_posterior(loss_fn, params, batch(dtype=dtype), **settings)


def run(posterior, *, key=KEY, sampler=None, plan=PLAN, progress=False):
    sampler = doomed() if sampler is None else sampler
    return jp.sample(key, posterior, sampler, plan, weights_of, progress=progress)


def weights_of(params):
    return params["w"]


def square(params):
    return params["w"][0, 0] ** 2


def chi(posterior, *, sampler=None, limit=np.inf, observables=None, components=None):
    """The response to all data, and to the same data within a limit."""
    return susceptibilities(
        KEY,
        posterior,
        doomed() if sampler is None else sampler,
        PLAN,
        probes={"p": batch(), "narrow": batch(limit)},
        observables=observables,
        components=components,
        progress=False,
    )


def row(index):
    return jp.by_slice({"w": (0, index)})


@pytest.fixture(scope="module")
def posterior():
    return make()


# What a draw is


def counting(posterior):
    """A sampler that adds one to every weight at every step."""
    del posterior
    return SamplingAlgorithm(
        lambda position, key: position,
        lambda key, state, minibatch: jax.tree.map(lambda w: w + 1, state),
    )


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize(("num_burnin", "num_draws", "thin"), [(0, 60, 1), (130, 5, 3)])
def test_a_draw_is_the_state_after_burnin_and_thinning(
    posterior, num_burnin, num_draws, thin, progress
):
    plan = jp.Plan(num_chains=2, num_burnin=num_burnin, num_draws=num_draws, thin=thin)
    centred = replace(posterior, params={"w": jnp.zeros((2, 2))})
    trace = run(centred, sampler=counting, plan=plan, progress=progress)
    assert trace.shape == (2, num_draws, 2, 2)
    wanted = num_burnin + thin * np.arange(1, num_draws + 1)
    np.testing.assert_array_equal(trace[..., 0, 0], np.stack([wanted, wanted]))
    assert plan.num_steps == wanted[-1]


def fresh_noise(posterior):
    """A sampler whose position is the noise of its last step."""
    del posterior
    return SamplingAlgorithm(
        lambda position, key: position,
        lambda key, state, minibatch: {"w": jax.random.normal(key, (2, 2))},
    )


def test_no_noise_is_used_twice(posterior):
    """Every step of every chain has randomness of its own."""
    trace = np.asarray(run(posterior, sampler=fresh_noise))
    assert len(np.unique(trace)) == trace.size
    np.testing.assert_allclose(trace.mean(), 0.0, atol=5 / np.sqrt(trace.size))
    correlation = np.corrcoef(trace.reshape(6, -1))[np.triu_indices(6, 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(trace[0].size)


# The same seed, the same bits


def test_chunks_do_not_change_a_bit(posterior):
    np.testing.assert_array_equal(run(posterior, progress=True), run(posterior))


def test_jit_does_not_change_a_bit(posterior):
    jitted = jax.jit(lambda posterior: run(posterior, progress=True))
    np.testing.assert_array_equal(jitted(posterior), run(posterior))


def test_more_chains_and_draws_do_not_change_a_bit(posterior):
    more = run(posterior, plan=replace(PLAN, num_chains=7, num_draws=20))
    np.testing.assert_array_equal(more[:6, :12], run(posterior))


def test_twice_the_loss_at_half_the_inverse_temperature(posterior):
    """nβ L enters as a product, and a factor of two is exact."""
    double = replace(posterior, loss_fn=lambda p, b: 2 * loss_fn(p, b), nbeta=3.0)
    np.testing.assert_array_equal(run(double), run(posterior))


def test_another_seed_is_another_chain(posterior):
    assert np.all(np.asarray(run(posterior, key=jax.random.key(12)) != run(posterior)))


COMPONENTS = {"first": row(0), "all": jp.by_path("w"), "second": row(1)}


def test_components_do_not_disturb_each_other(posterior):
    """The k-th component has the same chains whatever the others are, and of whatever shape."""
    pair = chi(posterior, components={"first": row(0), "second": row(1)})
    mixed = chi(posterior, components=COMPONENTS)
    assert mixed.rows == ("first", "all", "second")
    np.testing.assert_array_equal(mixed.chi["p"][0], pair.chi["p"][0])
    assert not np.allclose(mixed.chi["p"][2], pair.chi["p"][1], rtol=1e-3)
    # The first component's chains are those of the posterior restricted to it.
    trace = run(jp.restrict(posterior, row(0)))
    losses = jax.jit(jax.vmap(lambda w: posterior.loss({"w": w})))(trace.reshape(-1, 2, 2))
    excess = jnp.mean(losses) - posterior.loss(posterior.center)
    np.testing.assert_allclose(mixed.mean[0], excess, rtol=1e-4)


def test_one_component_lost_is_named(posterior):
    """Only chains that move the second row can leave what the data allow."""
    close = replace(posterior, data=batch(0.10001))
    with pytest.raises(jp.DivergenceError, match=r"\(second: chains \[0, 1, 2, 3, 4, 5\]\)"):
        chi(close, components=COMPONENTS)


# Transformations


def test_vmap_over_settings_is_one_by_one(posterior):
    """nβ, γ, step sizes, checkpoints and keys: a batch of runs is the runs."""

    def one(key, step_size, nbeta, localization, params):
        changed = replace(posterior, nbeta=nbeta, localization=localization, params=params)
        return run(changed, key=key, sampler=doomed(step_size=step_size))

    keys = jax.random.split(KEY, 3)
    steps, nbetas, gammas = (jnp.array(x) for x in ([0.01, 0.02, 0.03], [1.0, 4, 9], [2.0, 0, 5]))
    params = {"w": jnp.linspace(0.0, 0.5, 12).reshape(3, 2, 2)}
    together = jax.vmap(one)(keys, steps, nbetas, gammas, params)
    for i in range(3):
        settings = (float(x[i]) for x in (steps, nbetas, gammas))
        alone = one(keys[i], *settings, jax.tree.map(lambda x, i=i: x[i], params))
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


def test_llc_and_response_inside_vmap(posterior):
    def both(nbeta):
        changed = replace(posterior, nbeta=nbeta)
        lam = jp.llc(KEY, changed, doomed(), PLAN, progress=False)
        response = chi(changed, observables={"f": square})
        return lam.mean, lam.stderr, lam.rhat, response

    together = jax.jit(jax.vmap(both))(jnp.array([2.0, 8.0]))
    for got, wanted in zip(jax.tree.leaves(together), jax.tree.leaves(both(8.0)), strict=True):
        np.testing.assert_allclose(got[1], wanted, rtol=2e-3, atol=1e-6)


def test_reverse_mode_through_a_chain():
    """The derivative of what a short chain computes, against central differences in float64."""
    with jax.enable_x64(True):
        posterior = make(jnp.float64)
        plan = jp.Plan(num_chains=2, num_burnin=1, num_draws=2, thin=1, batch_size=4)
        target = jnp.asarray(RNG.normal(size=(2, 2, 2, 2)))

        def summary(x):
            changed = replace(
                posterior,
                nbeta=x["nbeta"],
                localization=x["localization"],
                params={"w": x["w"]},
            ).reweight(x["rho"])
            trace = run(changed, sampler=jp.sgld(step_size=x["step_size"]), plan=plan)
            return jnp.sum(target * trace)

        point = {
            "nbeta": jnp.asarray(6.0),
            "localization": jnp.asarray(4.0),
            "step_size": jnp.asarray(0.02),
            "w": jnp.asarray(RNG.normal(size=(2, 2))),
            "rho": jnp.asarray(RNG.uniform(0.5, 1.5, size=N)),
        }
        both = jax.jit(jax.value_and_grad(summary))
        gradient = both(point)[1]
        for name, value in point.items():
            direction = jnp.asarray(RNG.normal(size=value.shape))
            step = 1e-5 * float(jnp.abs(value).max())
            ends = [both(point | {name: value + s * step * direction})[0] for s in (1, -1)]
            difference = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(
                jnp.vdot(gradient[name], direction), difference, rtol=1e-6, err_msg=name
            )


@pytest.mark.parametrize("progress", [True, False])
def test_other_settings_do_not_compile_again(progress):
    """The loss is traced once: not again for another step size, nβ, γ, key or checkpoint."""
    traces = []

    def counted(params, batch):
        traces.append(None)
        return loss_fn(params, batch)

    # A new loss is looked at when weights meet it.
    base = replace(make(), loss_fn=counted).reweight(jnp.ones(N))
    run(base, progress=progress)
    first = len(traces)
    assert first > 0
    for number in (1, 2):
        changed = replace(
            base,
            nbeta=[1.0, jnp.asarray(2.0)][number - 1],
            localization=jnp.float32(number),
            params={"w": jnp.full((2, 2), 0.01 * number)},
        ).reweight(jnp.arange(N) + number)
        key = jax.random.key(number)
        run(changed, key=key, sampler=doomed(step_size=0.01 * number), progress=progress)
    assert len(traces) == first


# Lost chains


# Draw d is taken after step 5 + 2 (d + 1): steps counted from 0, one lost in step 14 spoils draw 4.
SPOILT = 4


@pytest.fixture(scope="module")
def lost(posterior):
    """Which chains the seed dooms at a share of one half."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jp.DivergenceWarning)
        trace = run(posterior, sampler=doomed(step=0, share=0.5))
    gone = np.isnan(trace).all(axis=(1, 2, 3))
    assert 0 < gone.sum() < 5
    return gone


def named(lost):
    return "chains " + str(np.flatnonzero(lost).tolist()).replace("[", r"\[").replace("]", r"\]")


@pytest.mark.parametrize("progress", [False, True])
def test_a_lost_chain_is_nan_from_there_on(posterior, lost, progress):
    healthy = run(posterior, sampler=doomed(step=14, share=0.0))
    with pytest.warns(jp.DivergenceWarning, match=named(lost)):
        trace = run(posterior, sampler=doomed(step=14, share=0.5), progress=progress)
    np.testing.assert_array_equal(trace[~lost], healthy[~lost])
    np.testing.assert_array_equal(trace[:, :SPOILT], healthy[:, :SPOILT])
    assert np.isnan(trace[lost, SPOILT:]).all()


@pytest.mark.parametrize("step", [0, 14, 28])
def test_estimates_are_those_of_the_chains_that_remain(posterior, lost, step):
    """Early draws of a lost chain count for nothing either."""
    healthy = jp.llc(KEY, posterior, doomed(step=step, share=0.0), PLAN, progress=False)
    with pytest.warns(jp.DivergenceWarning, match=named(lost)):
        got = jp.llc(KEY, posterior, doomed(step=step, share=0.5), PLAN, progress=False)
    np.testing.assert_array_equal(got.diverged, lost)
    np.testing.assert_array_equal(got.per_chain[~lost], healthy.per_chain[~lost])
    assert np.isnan(got.per_chain[lost]).all()
    rest = jp.summarize(healthy.trace[~lost], num_batches=PLAN.batches)
    for name in ("mean", "stderr", "rhat", "ess"):
        np.testing.assert_allclose(getattr(got, name), getattr(rest, name), rtol=1e-5)


def by_hand(trace):
    """−Cov of φ with ℓ_z − L over pooled draws, in float64."""
    w = np.asarray(trace, np.float64).reshape(-1, 4)
    phi, losses = w[:, 0] ** 2, 0.5 * (w @ X.T) ** 2
    columns = losses - losses.mean(axis=1, keepdims=True)
    return -(phi - phi.mean()) @ (columns - columns.mean(0)) / (len(w) - 1)


@pytest.mark.parametrize("step", [0, 14])
def test_susceptibilities_are_those_of_the_chains_that_remain(posterior, lost, step):
    trace = run(posterior)
    with pytest.warns(jp.DivergenceWarning, match=named(lost)):
        response = chi(posterior, sampler=doomed(step=step, share=0.5), observables={"f": square})
    np.testing.assert_array_equal(response.diverged[0], lost)
    wanted = by_hand(trace[~lost])
    np.testing.assert_allclose(response.chi["p"][0], wanted, rtol=1e-3, atol=1e-6)
    assert not np.allclose(by_hand(trace), wanted, rtol=1e-2)
    for field in ("chi", "stderr", "halves"):
        assert np.isfinite(getattr(response, field)["p"]).all()
    gone = np.repeat(lost, PLAN.batches)
    np.testing.assert_array_equal(np.isnan(response.batches["p"][:, 0]), gone)
    np.testing.assert_allclose(response.mean[0], np.mean(trace[~lost][..., 0, 0] ** 2), rtol=1e-4)


@pytest.mark.parametrize("progress", [False, True])
def test_all_chains_lost_is_an_error(posterior, progress):
    sampler = doomed(step=3, share=1.0)
    everything = (
        r"all chains turned non-finite \(chains \[0, 1, 2, 3, 4, 5\]\): take a smaller step_size"
    )
    with pytest.raises(jp.DivergenceError, match=everything):
        run(posterior, sampler=sampler, progress=progress)
    with pytest.raises(jp.DivergenceError, match=everything):
        jp.llc(KEY, posterior, sampler, PLAN, progress=progress)


def test_a_chain_lost_to_a_probe_alone(posterior):
    """Finite weights whose probe losses are NaN end a chain too; the others go on."""
    reach = np.abs(np.asarray(run(posterior)))[..., 1, :].max(axis=(1, 2))
    limit = float(np.mean(np.sort(reach)[2:4]))
    with pytest.warns(jp.DivergenceWarning, match=named(reach > limit)):
        response = chi(posterior, observables={"f": square}, limit=limit)
    np.testing.assert_array_equal(response.diverged[0], reach > limit)
    for name in ("p", "narrow"):
        assert np.isfinite(response.chi[name]).all()
        assert np.isfinite(response.stderr[name]).all()
    np.testing.assert_array_equal(response.chi["p"], response.chi["narrow"])


def test_an_overflowing_chain_is_lost_not_averaged(posterior):
    """No injected NaN: a step size beyond stability."""
    with pytest.raises(jp.DivergenceError, match="smaller step_size"):
        run(posterior, sampler=doomed(step_size=1e20))


def test_bad_data_that_were_not_looked_at_are_named(posterior):
    """Only the first samples are checked when a posterior is made."""
    data = batch() | {"limit": jnp.full(N, jnp.inf).at[7].set(0.0)}
    hidden = replace(posterior, data=data)
    with pytest.raises(jp.DivergenceError, match=r"not finite at w\* for samples \[7\] of data"):
        jp.llc(KEY, hidden, doomed(), PLAN, progress=False)
    with pytest.raises(ValueError, match=r"data has losses .* not finite at w\*.* \[7\]"):
        chi(hidden, observables={"f": square})


def test_a_slope_that_is_infinite_at_the_start_is_the_cause_that_is_named():
    def root(params, batch):
        return jnp.sqrt(jnp.abs(batch["x"] @ params["w"].reshape(-1)))

    data = {"x": batch()["x"].at[5].set(0.0)}  # √ at 0, whatever w
    steep = jp.localized_posterior(root, make().params, data, nbeta=1.0, localization=1.0)
    with pytest.raises(jp.DivergenceError, match=r"gradient .* not finite at w\* .* \[5\] of data"):
        run(steep)
    spared = steep.reweight(jnp.ones(N).at[5].set(0.0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(spared)))


# Mini-batches


def test_minibatches_are_uniform_with_replacement(posterior):
    """Counts of samples by a χ² test, and of repeated samples by its expectation."""
    draws, size = 4000, 4
    numbered = replace(posterior, data=batch() | {"index": jnp.arange(N)})
    index = np.asarray(
        jax.jit(jax.vmap(lambda k: numbered.minibatch(k, size).batch["index"]))(
            jax.random.split(jax.random.key(4), draws)
        )
    )
    assert stats.chisquare(np.bincount(index.ravel(), minlength=N)).pvalue > 1e-6
    pairs = np.bincount(index[:, 0] * N + index[:, 3], minlength=N * N)
    assert stats.chisquare(pairs).pvalue > 1e-6
    distinct = np.mean([len(set(row)) == size for row in index])
    wanted = np.prod([(N - i) / N for i in range(size)])
    assert abs(distinct - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / draws)


@pytest.mark.parametrize("weighted", [False, True])
def test_minibatch_losses_and_gradients_are_unbiased(posterior, weighted):
    rho = jnp.asarray(RNG.uniform(0, 3, size=N), jnp.float32) if weighted else None
    target = posterior.reweight(rho)
    position = {"w": jnp.asarray(RNG.normal(size=(2, 2)), jnp.float32)}

    @jax.jit
    @jax.vmap
    def one(key):
        minibatch = target.minibatch(key, 3)
        return target.loss(position, minibatch), target.loss_gradient(position, minibatch)["w"]

    keys = jax.random.split(jax.random.key(5), 4000)
    wanted = (target.loss(position), target.loss_gradient(position)["w"])
    for values, mean in zip(one(keys), wanted, strict=True):
        error = np.std(values, axis=0) / np.sqrt(len(keys))
        assert np.all(np.abs(np.mean(values, axis=0) - mean) < 5 * error)


@pytest.mark.parametrize("chunk", [None, *range(1, N + 2)])
def test_chunks_of_losses(chunk):
    params = {"w": jnp.asarray(RNG.normal(size=(2, 2)), jnp.float32)}
    tokens = lambda p, b: loss_fn(p, b)[:, None] * jnp.array([[1.0, 2.0, 3.0]])  # noqa: E731
    for loss in (loss_fn, tokens):
        got = losses_in_chunks(loss, params, batch(), chunk)
        np.testing.assert_allclose(got, loss(params, batch()), rtol=1e-6)


# Plans


def test_a_plan_counts_its_steps_and_batches():
    plan = jp.Plan(num_chains=4, num_burnin=100, num_draws=50, thin=10)
    assert plan.num_steps == 600
    assert plan.batches == 5
    assert replace(plan, num_batches=7).batches == 7
    assert replace(plan, num_chains=3).batches == 7
    assert replace(plan, num_chains=64).batches == 1
    assert replace(plan, num_chains=1, num_draws=3).batches == 3
    assert plan == jp.Plan(num_chains=4, num_burnin=100, num_draws=50, thin=10)
    assert len({plan, replace(plan), replace(plan, thin=3)}) == 2


@pytest.mark.parametrize(("sampler", "localization", "numbers"), [
    (jp.sgld(step_size=1e-3), 100.0, (120, 10)),  # 2/(εγ) = 20 steps
    (jp.sgld(step_size=1e-2), 100.0, (12, 1)),
    (jp.sgld(step_size=1e-3), 0.0, (100, 1)),  # never settles: no relaxation time
    (jp.mala(step_size=1e-3), 100.0, (100, 1)),  # says nothing of its own
])  # fmt: skip
def test_a_plan_without_numbers_takes_them_from_the_relaxation_time(sampler, localization, numbers):
    posterior = make(localization=localization)
    with pytest.raises(ValueError, match="num_burnin or no thin yet"):
        _ = jp.Plan().num_steps
    run = make_run(KEY, posterior, sampler, jp.Plan(num_draws=7))
    assert (run.plan.num_burnin, run.plan.thin) == numbers
    assert str(run.plan).startswith(f"Plan(num_chains=4, num_burnin={numbers[0]}, num_draws=7, th")
    one = make_run(KEY, posterior, sampler, jp.Plan(num_burnin=3))
    assert (one.plan.num_burnin, one.plan.thin) == (3, 1)
    assert jp.Run(KEY, posterior, sampler, jp.Plan(num_draws=7)).plan == run.plan


def test_a_plan_without_numbers_does_not_grow_without_a_word():
    with pytest.warns(jp.UnreliableWarning, match="a relaxation time is 50000 steps"):
        run = make_run(KEY, make(), jp.sgld(step_size=1e-5), jp.Plan())
    assert (run.plan.num_burnin, run.plan.thin) == (3000, 250)
