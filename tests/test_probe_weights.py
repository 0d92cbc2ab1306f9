"""Weights of losses mean one thing: shares, means, χ, solutions; weight 0 counts nowhere.

Losses ½‖w − c_z‖² per token: the posterior under weights ρ has mean (nβ c̄ + γ w*)/(nβ + γ) with
c̄ = Σρc/Σρ, and χ_z(w_0) = (c_z − c̄)_0 / (nβ + γ), without noise for a pathwise estimate. The
losses of weight 0 are NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpattern as jp

NBETA, GAMMA = 10.0, 10.0
PLAN = jp.Plan(num_chains=4, num_burnin=60, num_draws=8, thin=4)
ADJOINT = jp.pathwise(window=60, every=1, hessian_batch=6)  # exact but for the window
rng = np.random.default_rng(0)
CENTRES = rng.normal(size=(6, 3, 2)).astype(np.float32)
# Rows 1 and 4 are padded, row 5 is all padding.
REAL = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
BASE = rng.uniform(0.5, 2.0, size=(6, 3)) * REAL
DATA = {"c": jnp.asarray(CENTRES), "real": jnp.asarray(REAL)}
ESTIMATORS = {
    "adjoint": ADJOINT,
    "laplace": jp.laplace(num_signs=2),
    "covariance": jp.covariance(),
}


def loss_fn(params, batch):
    squares = jnp.sum((params["w"][None, None] - batch["c"]) ** 2, axis=2)
    return jnp.where(batch["real"], 0.5 * squares, jnp.nan)


def first(params):
    return params["w"][0]


def rows(data, index):
    return jax.tree.map(lambda x: x[index], data)


def posterior_of(weights, data=DATA):
    return jp.localized_posterior(
        loss_fn, {"w": jnp.zeros(2)}, data, nbeta=NBETA, localization=GAMMA, weights=weights
    )


def measure(posterior, probes, estimator=None, **settings):
    return jp.susceptibilities(
        jax.random.key(0), posterior, jp.sgld(step_size=2e-2), PLAN, probes=probes,
        observables={"w": first}, estimator=estimator or ADJOINT, progress=False,
        **settings,
    )  # fmt: skip


def exact(weights, centres=CENTRES):
    """χ of w_0 to each loss, were it counted."""
    mean = np.tensordot(weights, CENTRES, 2) / weights.sum()
    return (centres - mean)[..., 0] / (NBETA + GAMMA)


def shifted(weights):
    """⟨w_0⟩ under weights, w* = 0."""
    return NBETA * np.tensordot(weights, CENTRES, 2)[0] / weights.sum() / (NBETA + GAMMA)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_excluded_losses_count_nowhere(estimator):
    probes = {"a": rows(DATA, slice(0, 3)), "b": rows(DATA, slice(3, 6))}
    weights = {"a": BASE[:3], "b": BASE[3:]}
    response = measure(posterior_of(BASE), probes, ESTIMATORS[estimator], probe_weights=weights)
    grouped = jp.group_mean(response)
    for name, part in (("a", slice(0, 3)), ("b", slice(3, 6))):
        share = BASE[part] / BASE.sum()
        np.testing.assert_allclose(response.mass[name], share, rtol=1e-5)
        np.testing.assert_allclose(grouped.mass[name], share.sum(), rtol=1e-5)
        chi, stderr = (np.asarray(x[name][0]) for x in (response.chi, response.stderr))
        assert (chi[~REAL[part]] == 0).all()
        assert (stderr[~REAL[part]] == 0).all()
        wanted = np.where(REAL[part], exact(BASE)[part], 0)
        mean = (share * wanted).sum() / share.sum()
        # Six standard errors of each of the columns: false alarm below 1e-6 for a normal law.
        slack = 6 * stderr if estimator == "covariance" else 2e-5 * np.ones_like(stderr)
        assert (np.abs(chi - wanted) <= slack + 1e-6).all()
        group_slack = 6 * grouped.stderr[name][0] if estimator == "covariance" else 2e-5
        assert abs(grouped.chi[name][0] - mean) <= group_slack
        # The batches are means over the same columns with the same shares.
        batches = np.asarray(response.batches[name][:, 0], np.float64)
        np.testing.assert_allclose(batches.mean(), grouped.chi[name][0], atol=2e-3)
    assert response.num_samples == REAL.sum()


@pytest.mark.parametrize("probe_batch", [None, 4])
def test_tangents_weigh_their_groups(probe_batch):
    probes = {"a": rows(DATA, slice(0, 3)), "b": rows(DATA, slice(3, 6))}
    response = measure(
        posterior_of(BASE), probes, jp.pathwise(mode="tangent", probe_batch=probe_batch),
        probe_weights={"a": BASE[:3], "b": BASE[3:]},
    )  # fmt: skip
    for name, part in (("a", slice(0, 3)), ("b", slice(3, 6))):
        share = BASE[part] / BASE.sum()
        wanted = (share * exact(BASE)[part]).sum() / share.sum()
        slack = 2e-5 if probe_batch is None else 6 * float(response.stderr[name][0])
        assert abs(response.chi[name][0] - wanted) < slack
        np.testing.assert_allclose(response.mass[name], share.sum(), rtol=1e-5)


@pytest.mark.parametrize("reference", [False, True])
def test_sources_of_tokens_within_packed_rows(reference):
    code = np.arange(18).reshape(6, 3) % 2 == 0
    weights = {"code": BASE * code, "prose": BASE * ~code}
    response = measure(
        posterior_of(BASE), {"code": DATA, "prose": DATA}, probe_weights=weights,
        reference=DATA if reference else None,
    )  # fmt: skip
    grouped = jp.group_mean(response)
    for name, each in weights.items():
        np.testing.assert_allclose(grouped.mass[name], each.sum() / BASE.sum(), rtol=1e-5)
        wanted = (each * exact(BASE)).sum() / each.sum()
        np.testing.assert_allclose(grouped.chi[name][0], wanted, atol=2e-5)


def test_probes_of_another_length():
    centres = rng.normal(size=(2, 5, 2)).astype(np.float32)
    probes = {"long": {"c": jnp.asarray(centres), "real": jnp.ones((2, 5), bool)}}
    response = measure(posterior_of(BASE), probes, probe_weights={"long": np.ones((2, 5))})
    np.testing.assert_allclose(response.chi["long"][0], exact(BASE, centres), atol=2e-5)
    fixed = jp.localized_posterior(
        lambda p, b: jnp.sum(p["w"][None] * b["x"], axis=1), {"w": jnp.zeros(3)},
        {"x": jnp.ones((4, 3))}, nbeta=1.0, localization=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"probes\['p'\] must be like the data.*loss_fn takes it"):
        measure(fixed, {"p": {"x": jnp.ones((4, 5))}})


@pytest.mark.parametrize("split", [False, True])
def test_a_second_round_realizes_what_it_predicts(split):
    """Probes are the weighted data, or samples of them: columns stand for shares of ρ₀."""
    base = np.where(REAL, BASE, 1.0) * np.array([9, 9, 9, 1, 1, 1])[:, None]
    data = DATA | {"real": jnp.ones((6, 3), bool)}
    probes = {"all": data}
    if split:
        probes = {"b": rows(data, slice(3, 6)), "a": rows(data, slice(0, 3))}
    response = measure(posterior_of(base, data), probes)
    order = np.concatenate([np.arange(3, 6), np.arange(3)]) if split else np.arange(6)
    mass = np.concatenate([np.asarray(response.mass[name]) for name in probes])
    np.testing.assert_allclose(mass, (base / base.sum())[order], rtol=1e-5)
    solution = jp.solve_weights(response, {"w": 1e-3}, method=jp.least_norm())
    rho = np.concatenate([np.asarray(solution.weights[name], np.float64) for name in probes])
    composed = jp.compose_weights(base[order], rho)
    got = shifted(np.asarray(composed, np.float64)[np.argsort(order)]) - shifted(base)
    # Second order in ρ − 1, whose mean square is about a hundredth.
    np.testing.assert_allclose(got, float(solution.predicted_shift["w"]), rtol=0.05)
    np.testing.assert_allclose(solution.over(probes), composed, rtol=1e-4)


def test_grouped_weights_leave_padding_out():
    probes = {"a": rows(DATA, slice(0, 3)), "b": rows(DATA, slice(3, 6))}
    response = measure(posterior_of(BASE), probes, probe_weights={"a": BASE[:3], "b": BASE[3:]})
    grouped = jp.group_mean(response)
    solution = jp.solve_weights(grouped, {"w": 1e-3}, method=jp.least_norm())
    weights = np.asarray(solution.over(probes), np.float64)
    assert (weights[~REAL] == 0).all()
    got = shifted(weights) - shifted(BASE)
    np.testing.assert_allclose(got, float(solution.predicted_shift["w"]), rtol=0.05)


def test_probes_without_weights_beside_weighted_data_are_named():
    other = {"c": DATA["c"] + 1, "real": jnp.ones((6, 3), bool)}
    with pytest.warns(UserWarning, match=r"\['x'\] come without weights.*probe_weights"):
        response = measure(posterior_of(BASE), {"x": other}, jp.laplace(num_signs=2))
    np.testing.assert_allclose(response.mass["x"], 1 / 18, rtol=1e-6)
    with pytest.warns(UserWarning, match=r"\['a'\] come without weights.*whose weights are taken"):
        response = measure(
            posterior_of(BASE), {"a": rows(DATA, slice(0, 3))}, jp.laplace(num_signs=2)
        )
    np.testing.assert_allclose(response.mass["a"], BASE[:3] / BASE[:3].sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        ({"y": np.ones((6, 3))}, ValueError, r"probe_weights names \['y'\], the probes are"),
        ({"x": np.ones((6, 2))}, ValueError, r"probe_weights\['x'\] must have the shape"),
        ({"x": -np.ones((6, 3))}, ValueError, r"probe_weights\['x'\] must not be negative"),
        ({"x": np.zeros((6, 3))}, ValueError, r"probe_weights\['x'\] excludes every loss"),
        ({"x": np.full((6, 3), np.nan)}, ValueError, r"probe_weights\['x'\] must be finite"),
        ({"x": np.full((6, 3), "a")}, TypeError, r"probe_weights\['x'\] must be real numbers"),
    ],
)
def test_bad_probe_weights(weights, error, match):
    with pytest.raises(error, match=match):
        measure(posterior_of(BASE), {"x": DATA}, probe_weights=weights)


@pytest.mark.parametrize(
    "form",
    [
        lambda w: w.tolist(), lambda w: w > 0, lambda w: (w > 0).astype(int),
        lambda w: w * 1e300, lambda w: w * 1e-300, lambda w: jnp.asarray(w, jnp.bfloat16),
    ],
)  # fmt: skip
def test_weights_in_any_form(form):
    given = form(BASE)
    exact_weights = np.asarray(given, np.float64)
    exact_weights /= exact_weights.max()
    response = measure(
        posterior_of(given), {"x": DATA}, jp.laplace(num_signs=2), probe_weights={"x": given}
    )
    share = exact_weights / exact_weights.sum()
    np.testing.assert_allclose(response.mass["x"], share, rtol=1e-5)
    wanted = np.where(REAL, exact(exact_weights), 0)
    np.testing.assert_allclose(response.chi["x"][0], wanted, atol=1e-5)
    loss = jp.mean_loss(loss_fn, DATA, weights=given)({"w": jnp.zeros(2)})
    squares = np.where(REAL, 0.5 * (CENTRES.astype(float) ** 2).sum(axis=2), 0)
    np.testing.assert_allclose(loss, (share * squares).sum(), rtol=1e-5)


def distance(params, batch):
    """Its derivative at distance 0 is infinite."""
    return jnp.sqrt(jnp.sum((params["w"][None, None] - batch["c"]) ** 2, axis=2))


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_samples_of_no_weight_are_never_evaluated(batch_size):
    data = {"c": jnp.asarray(CENTRES).at[5].set(0.0)}
    posterior = jp.localized_posterior(
        distance, {"w": jnp.zeros(2)}, data, nbeta=NBETA, localization=GAMMA,
        weights=np.where(REAL.any(axis=1, keepdims=True), 1.0, 0.0) * np.ones((6, 3)),
    )  # fmt: skip
    for seed in range(4):
        minibatch = posterior.minibatch(jax.random.key(seed), batch_size)
        gradient = posterior.loss_gradient(posterior.center, minibatch)
        assert np.isfinite(np.asarray(gradient["w"])).all()
    # Without bias: the mean over all draws of one sample is the gradient on all data.
    keys = jax.random.split(jax.random.key(9), 4000)
    each = jax.vmap(
        lambda key: posterior.loss_gradient(posterior.center, posterior.minibatch(key, 1))["w"]
    )(keys)
    whole = posterior.loss_gradient(posterior.center)["w"]
    error = np.asarray(each).std(axis=0) / 4000**0.5
    assert (np.abs(np.asarray(each).mean(axis=0) - np.asarray(whole)) < 5 * error).all()


def test_an_infinite_derivative_of_an_excluded_token_is_named():
    data = {"c": jnp.asarray(CENTRES).at[4, 2].set(0.0)}
    weights = np.ones((6, 3))
    weights[4, 2] = 0
    make = lambda fn: jp.localized_posterior(  # noqa: E731
        fn, {"w": jnp.zeros(2)}, data, nbeta=NBETA, localization=GAMMA, weights=weights
    )
    with pytest.raises(ValueError, match=r"gradient of loss_fn .* samples \[4\] of data"):
        make(distance)

    def safe(params, batch):
        squares = jnp.sum((params["w"][None, None] - batch["c"]) ** 2, axis=2)
        return jnp.sqrt(jnp.where(squares > 0, squares, 1.0))

    assert np.isfinite(make(safe).loss_gradient({"w": jnp.zeros(2)})["w"]).all()
