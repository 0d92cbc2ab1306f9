"""The closed loss of the toy model of superposition, against quadrature and the known polygons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpattern.models import superposition
from jaxpattern.models.superposition import relu_product_integral, relu_square_integral

SLOPES = np.array([-2.0, -0.7, -1e-3, -1e-7, -1e-20, 0.0, 1e-20, 1e-7, 1e-3, 0.4, 1.0, 3.0])
BIASES = np.array([-1.5, -0.3, -5e-4, -1e-7, 0.0, 1e-7, 5e-4, 0.2, 0.7, 2.0])
A, B = (grid.ravel() for grid in np.meshgrid(SLOPES, BIASES))


def quadrature(power_of_u, power_of_relu, a, b):
    """∫₀¹ u^p ReLU(au + b)^q du in float64, with Gauss points on the part where the line is > 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.where(a != 0, -b / np.where(a != 0, a, 1), np.inf)
    low = np.where(a > 0, np.clip(root, 0, 1), 0.0)
    high = np.where(a < 0, np.clip(root, 0, 1), 1.0)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    u = low + (high - low) * (nodes[:, None] + 1) / 2
    values = u**power_of_u * np.maximum(a * u + b, 0) ** power_of_relu
    return (weights[:, None] / 2 * values).sum(0) * (high - low)


@pytest.mark.parametrize(
    ("integral", "powers"),
    [(relu_square_integral, (0, 2)), (relu_product_integral, (1, 1))],
)
def test_integrals_match_quadrature(integral, powers):
    values = jax.jit(integral)(jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32))
    np.testing.assert_allclose(values, quadrature(*powers, A, B), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("integral", "power"), [(relu_square_integral, 0), (relu_product_integral, 1)]
)
def test_gradients_match_quadrature_also_at_zero_slope(integral, power):
    """∂_b ∫ u^p ReLU^q = q ∫ u^p ReLU^(q−1), and ∂_a has one more factor u."""
    # At b = 0 exactly, slopes too flat to count as a crossing have no gradient.
    kept = (A == 0) | (np.abs(A) > 1e-12) | (B != 0)
    a, b = jnp.asarray(A[kept], jnp.float32), jnp.asarray(B[kept], jnp.float32)
    by_slope, by_bias = jax.jit(jax.vmap(jax.grad(integral, argnums=(0, 1))))(a, b)

    def expected(power_of_u):
        if integral is relu_square_integral:
            return 2 * quadrature(power_of_u, 1, A[kept], B[kept])
        ever_positive = np.maximum(B, A + B)[kept] > 0
        return quadrature(power_of_u, 0, A[kept], B[kept]) * ever_positive

    np.testing.assert_allclose(by_slope, expected(power + 1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_bias, expected(power), rtol=1e-4, atol=1e-6)
    hessian = jax.jit(jax.vmap(jax.hessian(integral, argnums=(0, 1))))(a, b)
    assert all(np.isfinite(part).all() for part in jax.tree.leaves(hessian))


@jax.jit
def mean_gradient(params):
    """∇ of the population loss for uniform features."""
    return jax.grad(lambda p: superposition.feature_losses(p).mean())(params)


def sampled_losses(params, points=4001):
    """E_u Σ_j (x_j − x̂_j)² with one active feature, by Simpson's rule in float64."""
    weights, bias = (np.asarray(params[name], np.float64) for name in ("W", "b"))
    u = np.linspace(0, 1, points)
    simpson = np.full(points, 2.0)
    simpson[1::2], simpson[[0, -1]] = 4.0, 1.0
    losses = []
    for i in range(weights.shape[1]):
        x = np.zeros((weights.shape[1], points))
        x[i] = u
        errors = (x - np.maximum(weights.T @ weights @ x + bias[:, None], 0)) ** 2
        losses.append(errors.sum(0) @ simpson / (3 * (points - 1)))
    return np.array(losses)


def test_losses_match_numerical_expectation():
    params = superposition.init(jax.random.key(0), num_features=7, num_dimensions=3)
    params["b"] = 0.3 * jax.random.normal(jax.random.key(1), (7,))
    features = jnp.array([3, 0, 6, 3])
    expected = sampled_losses(params)
    np.testing.assert_allclose(superposition.feature_losses(params), expected, rtol=1e-5, atol=1e-6)
    losses = jax.jit(superposition.loss_fn)(params, features)
    np.testing.assert_allclose(losses, expected[np.asarray(features)], rtol=1e-5, atol=1e-6)


def test_loss_gradient_matches_finite_differences():
    params = superposition.init(jax.random.key(2), num_features=5)
    params["b"] = 0.3 * jax.random.normal(jax.random.key(3), (5,))
    mixture = np.array([0.1, 0.3, 0.2, 0.25, 0.15])

    def loss(p):
        return jnp.asarray(mixture, jnp.float32) @ superposition.feature_losses(p)

    gradient = jax.jit(jax.grad(loss))(params)
    for name, index in [("W", (0, 1)), ("W", (1, 4)), ("b", (2,)), ("b", (3,))]:
        ends = []
        for step in (1e-4, -1e-4):
            moved = {key: np.array(value, np.float64) for key, value in params.items()}
            moved[name][index] += step
            ends.append(mixture @ sampled_losses(moved))
        expected = (ends[0] - ends[1]) / 2e-4
        np.testing.assert_allclose(gradient[name][index], expected, rtol=1e-3, atol=1e-5)


def test_gradient_is_finite_where_features_are_orthogonal_or_absent():
    for params in (superposition.polygon(4, 9), superposition.polygon(1, 9)):
        gradient = mean_gradient(params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("corners", "unused_bias", "loss"),
    [(5, 0.0, 0.0687436), (5, 1 / 12, 0.0617991), (6, 0.0, 0.0481924), (4, 0.0, 1 / 9)],
)
def test_polygons_of_six_features(corners, unused_bias, loss):
    params = superposition.polygon(corners, 6, unused_bias=unused_bias)
    np.testing.assert_allclose(superposition.feature_losses(params).mean(), loss, atol=2e-7)


@pytest.mark.parametrize("corners", range(1, 10))
def test_polygons_are_critical_points_in_what_they_use(corners):
    params = superposition.polygon(corners, 9)
    gradient = mean_gradient(params)
    np.testing.assert_allclose(gradient["W"], 0, atol=1e-6)
    np.testing.assert_allclose(gradient["b"][:corners], 0, atol=1e-6)


def test_a_polygon_needs_as_many_features_as_corners():
    with pytest.raises(ValueError, match="at most c = 4, got 5"):
        superposition.polygon(5, 4)
    assert np.isnan(superposition.loss_fn(superposition.polygon(3, 3), jnp.array([7]))[0])
