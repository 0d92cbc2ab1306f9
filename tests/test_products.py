"""Hessian products as differences of gradients: exact on quadratic losses, right on kinks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpattern as jp
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.pilot import fly
from jaxpattern.chains.run import make_run
from jaxpattern.losses import precision_of
from jaxpattern.models import TransformerConfig, make_loss_fn, transformer
from jaxpattern.response.products import derivatives_along, hessian_products

KEY = jax.random.key(3)
RNG = np.random.default_rng(8)
MATRIX = RNG.normal(size=(4, 4))
MATRIX = MATRIX @ MATRIX.T


def quadratic(w):
    flat = jnp.concatenate([w["a"], w["b"]])
    return 0.5 * flat @ jnp.asarray(MATRIX, flat.dtype) @ flat


@pytest.mark.parametrize("product", ["central", "one-sided", "autodiff"])
@pytest.mark.parametrize(
    "metric", [{"a": np.full(1, x), "b": np.full(3, y)} for x, y in ((0.03, 0.03), (0.01, 0.2))]
)
def test_products_of_a_quadratic_are_exact(product, metric):
    at = {"a": jnp.asarray([0.3]), "b": jnp.asarray([1.0, -2.0, 0.5])}
    directions = {
        "a": jnp.asarray(RNG.normal(size=(2, 1))),
        "b": jnp.asarray(RNG.normal(size=(2, 3))),
    }
    with jax.enable_x64(True):
        at, directions = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (at, directions))
        got = hessian_products(
            jax.grad(quadratic), at, directions,
            product=product, scale=metric, width=1.0, key=jax.random.fold_in(KEY, 1),
        )  # fmt: skip
    flat = np.concatenate([directions["a"], directions["b"]], axis=1)
    wanted = flat @ MATRIX
    np.testing.assert_allclose(np.concatenate([got["a"], got["b"]], 1), wanted, rtol=1e-10)


def test_no_direction_has_no_product():
    at = {"a": jnp.zeros(1), "b": jnp.zeros(3)}
    zero = jax.tree.map(lambda x: jnp.zeros((2, *x.shape)), at)
    got = hessian_products(
        jax.grad(quadratic),
        at,
        zero,
        product="central",
        scale={"a": np.full(1, 0.1), "b": np.full(3, 0.1)},
        width=1.0,
        key=jax.random.fold_in(KEY, 1),
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(got))


@jax.custom_vjp
def fused(x):
    return x**2


fused.defvjp(lambda x: (x**2, x), lambda x, g: (2 * g * x,))


def test_derivatives_of_what_forward_mode_cannot_enter():
    """A difference of values stands in, exact for a square up to rounding."""
    at, directions = jnp.asarray([1.0, -2.0]), jnp.asarray([[1.0, 0.0], [0.5, 2.0]])
    value, along = derivatives_along(fused, at, directions, scale=jnp.full(2, 0.1))
    plain, exact = derivatives_along(lambda x: x**2, at, directions, scale=jnp.full(2, 0.1))
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    # Rounding of values of size 4 over a distance of 0.025: 2e-5.
    np.testing.assert_allclose(along, exact, atol=2e-4)


def kinked(params, batch):
    return batch["slope"] * jnp.abs(params["w"]) + batch["tilt"] * params["w"]


def exact_chi(slope):
    """−Var[w] of exp(−slope |w| − w²/2), by quadrature in float64."""
    x = np.linspace(-9.0, 9.0, 400_001)
    weight = np.exp(-slope * np.abs(x) - x**2 / 2)
    return -np.sum(weight * x**2) / weight.sum()


def kink(slope, estimator):
    data = {"slope": jnp.full(2, slope), "tilt": jnp.asarray([1.0, -1.0])}
    posterior = jp.localized_posterior(
        kinked, {"w": jnp.zeros(())}, data, nbeta=1.0, localization=1.0
    )
    plan = jp.Plan(num_chains=48, num_burnin=2000, num_draws=20, thin=100)
    return jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=5e-3), plan, observables={"w": lambda p: p["w"]},
        probes={"up": jax.tree.map(lambda x: x[:1], data)}, estimator=estimator, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "estimator",
    [jp.pathwise(), jp.pathwise(product="one-sided"), jp.pathwise(mode="tangent")],
    ids=["central", "one-sided", "tangent"],
)
def test_an_absolute_value_has_its_kink(estimator):
    """Autodiff's Hessian of slope |w| is 0, which makes χ = −1 whatever the slope."""
    response, wanted = kink(3.0, estimator), exact_chi(3.0)
    chi, stderr = float(response.chi["up"].ravel()[0]), float(response.stderr["up"].ravel()[0])
    # The step adds about εP/4 of a variance; an error of 5 σ has a chance of 6e-7.
    assert abs(chi - wanted) < 5 * stderr + 0.02 * abs(wanted)
    assert 5 * stderr < 0.3 * abs(wanted)


def test_autodiff_misses_a_kink_and_the_covariance_beside_says_so():
    with pytest.warns(jp.UnreliableWarning, match="covariance of the same draws"):
        response = kink(3.0, jp.pathwise(product="autodiff"))
    assert float(response.chi["up"].ravel()[0]) == pytest.approx(-1.0, rel=0.01)
    slope = float(response.diagnostics["slope"][0])
    assert slope == pytest.approx(-exact_chi(3.0), rel=0.3)


def test_what_an_unreliable_row_becomes():
    with pytest.raises(jp.UnreliableError, match="covariance of the same draws"):
        kink(3.0, jp.pathwise(product="autodiff", on_unreliable="raise"))
    response = kink(3.0, jp.pathwise(product="autodiff", on_unreliable="covariance"))
    chi, stderr = float(response.chi["up"].ravel()[0]), float(response.stderr["up"].ravel()[0])
    assert abs(chi - exact_chi(3.0)) < 5 * stderr


def narrow(params, batch):
    return jnp.sum((params["w"].astype(jnp.bfloat16) @ batch["x"].T.astype(jnp.bfloat16)) ** 2, 0)


def wide(params, batch):
    return jnp.sum((params["w"] @ batch["x"].T) ** 2, 0)


@pytest.mark.parametrize(("loss", "product"), [(narrow, "autodiff's Hessian"), (wide, "secants")])
def test_low_precision_takes_autodiffs_product(loss, product):
    data = {"x": jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)}
    params = {"w": jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32)}
    posterior = jp.localized_posterior(
        lambda p, b: loss(p, b).astype(jnp.float32), params, data, nbeta=10.0, localization=100.0
    )
    plan = jp.Plan(num_chains=2, num_burnin=10, num_draws=4, thin=2)
    response = jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=1e-4), plan, probes={"x": data}, progress=False,
        observables={"first": lambda p: p["w"][0, 0]}, estimator=jp.pathwise(window=5),
    )  # fmt: skip
    assert response.estimator.endswith(f"{product})")
    eps = precision_of(posterior.loss_fn, params, data)
    assert eps == jnp.finfo(jnp.bfloat16 if loss is narrow else jnp.float32).eps


def test_the_pilot_finds_the_stiffest_direction():
    x = RNG.normal(size=(32, 5)).astype(np.float32) * np.asarray([1, 1, 1, 1, 4], np.float32)
    data = {"x": jnp.asarray(x)}
    posterior = jp.localized_posterior(
        lambda p, b: 0.5 * (b["x"] @ p["w"]) ** 2, {"w": jnp.zeros(5)}, data,
        nbeta=10.0, localization=20.0,
    )  # fmt: skip
    step = 2e-3
    run = make_run(KEY, posterior, jp.sgld(step_size=step), jp.Plan())
    pilot = fly(run, ComponentGroup())
    largest = np.linalg.eigvalsh(x.T.astype(np.float64) @ x / 32)[-1]
    np.testing.assert_allclose(pilot.stiffness, step * (10 * largest + 20), rtol=0.02)
    assert pilot.rounding < 0.01
    assert (
        fly(make_run(KEY, posterior, jp.mala(step_size=step), jp.Plan()), ComponentGroup()) is None
    )


def test_preconditioned_chains_forget_as_their_gradients_say():
    """2 (√v̂ + e) / (εγ)."""
    posterior = jp.localized_posterior(
        lambda p, b: b * p["w"][0], {"w": jnp.zeros(1)}, jnp.full(4, 7.0),
        nbeta=1.0, localization=2.0,
    )  # fmt: skip
    sampler = jp.rmsprop_sgld(step_size=0.01, stability=0.5)
    assert sampler.relaxation(posterior, 7.0) == pytest.approx(2 * 7.5 / (0.01 * 2))
    assert sampler.relaxation(posterior) == pytest.approx(2 * 1.0 / (0.01 * 2))


def absolute_error(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["a"] + params["b"][None])
    return jnp.abs(hidden @ params["c"] - batch["y"])


def absolute(estimator):
    rng = np.random.default_rng(2)
    x, a, c = (rng.normal(size=shape) for shape in ((24, 2), (2, 3), 3))
    y = np.tanh(x @ a) @ c + 0.05 * rng.normal(size=24)
    data, params = jax.tree.map(
        lambda x: np.asarray(x, np.float32),
        ({"x": x, "y": y}, {"a": a, "b": np.zeros(3), "c": c}),
    )
    posterior = jp.localized_posterior(absolute_error, params, data, nbeta=100.0, localization=30.0)
    plan = jp.Plan(num_chains=8, num_burnin=1333, num_draws=10, thin=133)
    return jp.susceptibilities(
        KEY, posterior, jp.sgld(step_size=3e-4), plan,
        observables={"c": lambda p: p["c"][0], "b": lambda p: p["b"][0]}, probes={"all": data},
        estimator=estimator, progress=False,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::jaxpattern.UnreliableWarning")
@pytest.mark.optimized
def test_secants_are_widened_where_the_derivative_grew():
    """A contracting chain stays below 1, which secants as narrow as the noise do not, by little."""
    limit = 1.005
    with pytest.warns(jp.GrowthWarning, match="adjoint grew past"):
        narrow = absolute(jp.pathwise(width=1.0, growth_limit=limit))
    wide = absolute(jp.pathwise(growth_limit=limit))
    width = float(wide.estimator.split("of width ")[1].rstrip(")"))
    assert width in (2, 4, 8)
    assert wide.diagnostics["growth"].max() < limit < narrow.diagnostics["growth"].max()
    again = absolute(jp.pathwise(width=width, growth_limit=limit))
    np.testing.assert_array_equal(wide.chi["all"], again.chi["all"])
    assert wide.cost > again.cost


def test_a_loss_without_forward_mode():
    """Pathwise, in both modes, needs gradients alone; laplace says what it lacks. χ is exact."""
    data = {"c": jnp.asarray([1.0, 0.5, -0.5, -1.0])}
    posterior = jp.localized_posterior(
        lambda p, b: fused(p["w"][0] - b["c"]) / 2, {"w": jnp.zeros(1)}, data,
        nbeta=10.0, localization=10.0,
    )  # fmt: skip
    plan = jp.Plan(num_chains=2, num_burnin=100, num_draws=8, thin=30)
    measure = lambda **settings: jp.susceptibilities(  # noqa: E731
        KEY, posterior, jp.sgld(step_size=2e-2), plan, observables={"w": lambda p: p["w"][0]},
        progress=False, **settings,
    )  # fmt: skip
    exact = np.asarray(data["c"]) / 20
    backwards = measure(probes={"data": data})
    np.testing.assert_allclose(backwards.chi["data"][0], exact, atol=2e-4)
    forwards = measure(probes={"up": {"c": data["c"][:2]}}, estimator=jp.pathwise(mode="tangent"))
    np.testing.assert_allclose(forwards.chi["up"], exact[:2].mean(), atol=2e-4)
    with pytest.raises(TypeError, match=r"laplace needs second derivatives .* pathwise"):
        measure(probes={"data": data}, estimator=jp.laplace())


@pytest.mark.filterwarnings("ignore::jaxpattern.UnreliableWarning")
@pytest.mark.optimized
def test_bfloat16_activations_give_what_float32_gives():
    """LLC and χ of a transformer, on the same key, within a fraction of a standard error."""
    tokens = np.random.default_rng(4).integers(0, 32, size=(16, 9))
    tokens = jnp.asarray(tokens, jnp.int32)
    plan = jp.Plan(num_chains=4, num_burnin=60, num_draws=20, thin=10)
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = TransformerConfig(
            32, context=8, num_layers=1, num_heads=2, d_model=16, dtype=dtype
        )
        posterior = jp.localized_posterior(
            make_loss_fn(config), transformer.init(KEY, config), tokens,
            nbeta=300.0, localization=100.0,
        )  # fmt: skip
        run = (jax.random.key(1), posterior, jp.sgld(step_size=1e-3), plan)
        phi = jp.mean_loss(posterior.loss_fn, tokens)
        chi = jp.Chi(probes={"some": tokens[:4]}, observables={"loss": phi})
        measured = jp.measure(*run, {"llc": jp.LLC(), "chi": chi}, progress=False)
        llc, response = measured["llc"], jp.group_mean(measured["chi"])
        found[dtype] = [
            (float(llc.mean), float(llc.stderr)),
            (float(response.chi["some"][0]), float(response.stderr["some"][0])),
        ]
        assert ("autodiff" in response.estimator) == (dtype == "bfloat16")
    for (wide, error), (narrow, _) in zip(found["float32"], found["bfloat16"], strict=True):
        assert abs(wide - narrow) < 0.5 * error
        assert abs(wide) > 3 * error
