"""The posterior against its formulas in NumPy float64, and as a pytree."""

from dataclasses import replace

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpattern as jp

N, T, D = 6, 3, 4
NBETA, LOCALIZATION = 7.0, 2.5
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N, T, D)), RNG.normal(size=(N, T))
CENTRE, POINT = RNG.normal(size=D), RNG.normal(size=D)
KEY = jax.random.key(3)
# Sums of N·T terms of size one in float32.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def loss_fn(params, batch):
    """ℓ_zt = ½ (x_zt · w − y_zt)²."""
    return 0.5 * (jnp.einsum("ntd,d->nt", batch["x"], params["w"]) - batch["y"]) ** 2


def data(dtype=jnp.float32):
    return {"x": jnp.asarray(X, dtype), "y": jnp.asarray(Y, dtype)}


def make(weights=None, *, loss=loss_fn, dtype=jnp.float32, **changes):
    settings = {"nbeta": NBETA, "localization": LOCALIZATION} | changes
    params = {"w": jnp.asarray(CENTRE, dtype)}
    return jp.localized_posterior(loss, params, data(dtype), weights=weights, **settings)


def losses_at(w):
    return 0.5 * (X @ w - Y) ** 2


def loss_at(w, weights):
    return np.sum(weights * losses_at(w)) / np.sum(weights)


def force_at(w, weights):
    """−nβ ∇L − γ (w − w*)."""
    gradient = np.einsum("nt,nt,ntd->d", weights, X @ w - Y, X) / np.sum(weights)
    return -NBETA * gradient - LOCALIZATION * (w - CENTRE)


PADDING = (np.arange(T) < RNG.integers(1, T + 1, size=N)[:, None]).astype(float)
WEIGHTS = {
    "none": None,
    "ones": np.ones((N, T)),
    "random": RNG.uniform(0.1, 3.0, size=(N, T)),
    "padding": PADDING,
    "boolean padding": PADDING.astype(bool),
    "integers": RNG.integers(1, 4, size=(N, T)),
    "some negative": RNG.uniform(-0.5, 2.0, size=(N, T)),
}


@pytest.fixture(params=WEIGHTS, ids=WEIGHTS)
def weights(request):
    return WEIGHTS[request.param]


def test_gradient_and_density_are_the_formulas(weights):
    posterior = make(weights)
    rho = np.ones((N, T)) if weights is None else np.asarray(weights, float)
    position = {"w": jnp.asarray(POINT, jnp.float32)}
    np.testing.assert_allclose(posterior.losses(position, data()), losses_at(POINT), **CLOSE)
    np.testing.assert_allclose(posterior.loss(position), loss_at(POINT, rho), **CLOSE)
    np.testing.assert_allclose(
        posterior.grad_estimator(position)["w"], force_at(POINT, rho), rtol=1e-4, atol=1e-4
    )
    log_ratio = -NBETA * (loss_at(POINT, rho) - loss_at(CENTRE, rho))
    log_ratio -= LOCALIZATION / 2 * np.sum((POINT - CENTRE) ** 2)
    got = posterior.logdensity(position) - posterior.logdensity(posterior.center)
    np.testing.assert_allclose(got, log_ratio, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        jax.grad(posterior.logdensity)(position),
        posterior.grad_estimator(position),
    )


def test_a_minibatch_is_weighted_by_its_own_samples(weights):
    """L_B = (1/B) Σ_{j∈B} ρ̂_j ℓ_j with ρ̂ summing to N: not normalised within the batch."""
    posterior = make(weights)
    rho = np.ones((N, T)) if weights is None else np.asarray(weights, float)
    index = np.array([4, 1, 4, 0, 2])
    minibatch = jax.tree.map(lambda x: x[index], jp.Minibatch(posterior.data, posterior.weights))
    position = {"w": jnp.asarray(POINT, jnp.float32)}
    scaled = rho * N / rho.sum()
    wanted = np.sum((scaled * losses_at(POINT))[index]) / len(index)
    np.testing.assert_allclose(posterior.loss(position, minibatch), wanted, **CLOSE)
    gradient = np.einsum("nt,nt,ntd->d", scaled[index], (X @ POINT - Y)[index], X[index]) / 5
    wanted = -NBETA * gradient - LOCALIZATION * (POINT - CENTRE)
    np.testing.assert_allclose(
        posterior.grad_estimator(position, minibatch)["w"], wanted, rtol=1e-4, atol=1e-4
    )


def test_excluded_losses_count_for_nothing():
    """Whatever stands in a padded place, to the last bit."""
    garbage = np.where(PADDING[:, :, None] > 0, X, 1e6)
    padded = {"x": jnp.asarray(garbage, jnp.float32), "y": jnp.asarray(Y, jnp.float32)}
    clean = make(PADDING)
    dirty = replace(clean, data=padded)
    position = {"w": jnp.asarray(POINT, jnp.float32)}
    assert dirty.loss(position) == clean.loss(position)
    got, wanted = dirty.grad_estimator(position)["w"], clean.grad_estimator(position)["w"]
    np.testing.assert_array_equal(got, wanted)


def test_only_ratios_of_weights_matter():
    posterior = make()
    rho = jnp.asarray(WEIGHTS["random"], jnp.float32)
    np.testing.assert_allclose(jnp.sum(posterior.reweight(rho).weights), N, rtol=1e-6)
    # A power of two is exact in floating point.
    np.testing.assert_array_equal(
        posterior.reweight(8 * rho).weights, posterior.reweight(rho).weights
    )
    np.testing.assert_allclose(
        posterior.reweight(3 * rho).weights, posterior.reweight(rho).weights, rtol=1e-6
    )
    np.testing.assert_array_equal(posterior.reweight(rho).reweight(None).weights, posterior.weights)
    np.testing.assert_array_equal(make(rho).weights, posterior.reweight(rho).weights)


def test_derivative_in_the_data_weights():
    """∂ log p / ∂ρ_m = −(nβ/Σρ) (ℓ_m − L)."""
    posterior = make()
    position = {"w": jnp.asarray(POINT, jnp.float32)}
    rho = WEIGHTS["random"]
    gradient = jax.jit(jax.grad(lambda rho: posterior.reweight(rho).logdensity(position)))(
        jnp.asarray(rho, jnp.float32)
    )
    wanted = -NBETA / rho.sum() * (losses_at(POINT) - loss_at(POINT, rho))
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_blackjax_takes_the_gradient_estimator():
    """w' = w + s g + √(2s) ξ: with one key, two mini-batches differ by s (g_A − g_B)."""
    posterior = make(WEIGHTS["random"])
    algorithm = blackjax.sgld(posterior.grad_estimator)
    state = algorithm.init(posterior.center)
    a_key, b_key = jax.random.split(KEY)
    left, right = posterior.minibatch(a_key, 4), posterior.minibatch(b_key, 4)
    size = 0.01
    step = jax.jit(algorithm.step)
    moved = [step(jax.random.key(9), state, batch, size) for batch in (left, right)]
    forces = [posterior.grad_estimator(state, batch) for batch in (left, right)]
    got, wanted = moved[0]["w"] - moved[1]["w"], size * (forces[0]["w"] - forces[1]["w"])
    assert float(jnp.abs(wanted).max()) > 1e-3
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_all_data_where_no_size_is_given():
    posterior = make()
    batch, weights = posterior.minibatch(KEY, None)
    jax.tree.map(np.testing.assert_array_equal, batch, posterior.data)
    np.testing.assert_array_equal(weights, posterior.weights)


def test_half_precision_parameters():
    """Chains move in float32, so that small steps are kept; the loss sees what it was given."""
    seen = []

    def watched(params, batch):
        seen.append(params["w"].dtype)
        return loss_fn(params, batch)

    posterior = make(loss=watched, dtype=jnp.bfloat16)
    assert posterior.center["w"].dtype == jnp.float32
    assert posterior.weights.dtype == posterior.nbeta.dtype == jnp.float32
    near = jax.tree.map(lambda x: x + 1e-5, posterior.center)
    assert bool(jnp.all(near["w"] != posterior.center["w"]))
    np.testing.assert_array_equal(posterior.embed(near)["w"], posterior.params["w"])
    gradient = posterior.loss_gradient(near)
    assert gradient["w"].dtype == posterior.loss(near).dtype == jnp.float32
    np.testing.assert_allclose(
        posterior.grad_estimator(posterior.center)["w"],
        force_at(CENTRE, np.ones((N, T))),
        atol=0.05 * np.abs(force_at(CENTRE, np.ones((N, T)))).max(),
    )
    plan = jp.Plan(num_chains=2, num_burnin=0, num_draws=3, thin=1)
    trace = jp.sample(
        KEY, posterior, jp.sgld(step_size=1e-2), plan, lambda p: p["w"], progress=False
    )
    assert trace.dtype == jnp.bfloat16
    assert len(np.unique(np.asarray(trace, np.float32)[..., 0])) > 2
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


def test_double_precision_is_double_throughout():
    with jax.enable_x64(True):
        posterior = make(WEIGHTS["random"], dtype=jnp.float64)
        kinds = {leaf.dtype for leaf in jax.tree.leaves(replace(posterior, spare=None))}
        assert kinds == {jnp.dtype(jnp.float64)}  # of all but the number of a sample
        np.testing.assert_allclose(
            posterior.grad_estimator({"w": jnp.asarray(POINT)})["w"],
            force_at(POINT, WEIGHTS["random"]),
            rtol=1e-12,
        )


def test_a_posterior_is_a_pytree():
    posterior = jp.restrict(make(), jp.by_slice({"w": (0, [1, 3])}))
    leaves, treedef = jax.tree.flatten(posterior)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    back = jax.tree.unflatten(treedef, leaves)
    through = jax.jit(lambda p: p)(posterior)
    position = {"w": jnp.array([0.3, -0.4])}
    for other in (back, through):
        assert other.loss_fn is loss_fn
        assert other.num_samples == N
        assert jax.tree.structure(other) == treedef
        np.testing.assert_array_equal(other.logdensity(position), posterior.logdensity(position))


def test_localization_acts_on_the_position_alone():
    """Outside the restriction nothing moves, so nothing is localized."""
    part = jp.restrict(make(), jp.by_slice({"w": (0, [1, 3])}))
    position = {"w": jnp.array([0.3, -0.4])}
    moved = CENTRE.copy()
    moved[[1, 3]] = [0.3, -0.4]
    np.testing.assert_allclose(part.embed(position)["w"], moved, rtol=1e-6)
    np.testing.assert_allclose(
        part.grad_estimator(position)["w"],
        force_at(moved, np.ones((N, T)))[[1, 3]],
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_stack_of_posteriors():
    """vmap over nβ, γ, checkpoints and data weights at once."""
    rho = [jnp.asarray(WEIGHTS[name], jnp.float32) for name in ("random", "padding", "integers")]
    members = [
        replace(
            make(rho[i], nbeta=2.0 + i, localization=0.5 * i),
            params={"w": jnp.asarray(CENTRE + i, jnp.float32)},
        )
        for i in range(3)
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    position = {"w": jnp.asarray(POINT, jnp.float32)}
    together = jax.vmap(lambda p: p.grad_estimator(position)["w"])(stack)
    for i, member in enumerate(members):
        np.testing.assert_allclose(
            together[i], member.grad_estimator(position)["w"], rtol=1e-5, atol=1e-4
        )


def test_made_inside_a_transformation():
    """Nothing is looked at that only a trace knows."""
    position = {"w": jnp.asarray(POINT, jnp.float32)}

    def density(nbeta, rho):
        return make(rho, nbeta=nbeta).logdensity(position)

    nbetas = jnp.array([1.0, 5.0])
    rho = jnp.asarray(WEIGHTS["random"], jnp.float32)
    together = jax.jit(jax.vmap(density, in_axes=(0, None)))(nbetas, rho)
    alone = [density(float(nbeta), rho) for nbeta in nbetas]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize(
    "twice",
    [lambda x: (x, x), lambda x: (x, x[:]), lambda x: (x, x.T), lambda x: (jnp.asarray(x),) * 2],
    ids=["one", "view", "transposed", "of jax"],
)
def test_one_array_in_two_leaves_is_refused(twice):
    """Both would be moved, each by itself, where the model holds one."""
    embed, read = twice(RNG.normal(size=(D, D)).astype(np.float32))

    def loss(params, batch):
        return ((batch["x"][:, 0] @ params["embed"] @ params["read"]) ** 2).sum(-1)

    settings = {"nbeta": 1.0, "localization": 1.0}
    tied = {"embed": embed, "read": read}
    with pytest.raises(ValueError, match="params/read and params/embed are one and the same array"):
        jp.localized_posterior(loss, tied, data(), **settings)
    jp.localized_posterior(loss, tied | {"read": jnp.array(read, copy=True)}, data(), **settings)


def test_the_old_name_of_the_center_warns():
    posterior = jp.localized_posterior(
        lambda p, b: (p - b) ** 2, jnp.ones(()), jnp.zeros(3), nbeta=2.0, localization=1.0
    )
    with pytest.warns(DeprecationWarning, match="centre is now center"):
        assert posterior.centre == posterior.center
