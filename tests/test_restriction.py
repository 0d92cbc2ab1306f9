"""Restrictions against NumPy masks: what is selected, what is written, what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxpattern as jp

SHAPES = {"attn": {"q": (4, 3, 2), "o": (3, 2, 4)}, "bias": (), "mlp": [(4, 5), (5, 4)]}
KEY = jax.random.key(0)


def of_shapes(make):
    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return of_shapes(lambda shape: jnp.asarray(rng.normal(size=shape), dtype))


def mask_of(**chosen):
    """A NumPy mask of the parameters: name → index expression of what is true."""
    mask = of_shapes(lambda shape: np.zeros(shape, bool))
    leaves = {"q": mask["attn"]["q"], "o": mask["attn"]["o"], "bias": mask["bias"]}
    leaves |= {"up": mask["mlp"][0], "down": mask["mlp"][1]}
    for name, index in chosen.items():
        leaves[name][index] = True
    return mask


RANDOM_MASK = of_shapes(
    lambda shape: np.random.default_rng(int(np.prod(shape))).random(shape) < 0.5
)
HEAD = {"attn/q": (1, 2), "attn/o": (0, 2)}
CASES = {
    "leaf": (lambda params: jp.by_path("attn/q"), mask_of(q=...)),
    "scalar leaf": (lambda params: jp.by_path("bias"), mask_of(bias=...)),
    "subtree": (lambda params: jp.by_path("attn/*"), mask_of(q=..., o=...)),
    "list item": (lambda params: jp.by_path("mlp/1"), mask_of(down=...)),
    "patterns": (
        lambda params: jp.by_path("*/q", "mlp/?", "mlp/0"),
        mask_of(q=..., up=..., down=...),
    ),
    "all": (lambda params: jp.by_path("*"), mask_of(q=..., o=..., bias=..., up=..., down=...)),
    "head": (lambda params: jp.by_slice(HEAD), mask_of(q=np.s_[:, 2], o=2)),
    "several": (lambda params: jp.by_slice({"attn/q": (1, [2, 0])}), mask_of(q=np.s_[:, [0, 2]])),
    "negative axis": (lambda params: jp.by_slice({"attn/q": (-2, 1)}), mask_of(q=np.s_[:, 1])),
    "last axis": (lambda params: jp.by_slice({"mlp/0": (-1, [4])}), mask_of(up=np.s_[:, 4])),
    "numpy index": (
        lambda params: jp.by_slice({"mlp/0": (0, np.array([3, 1]))}),
        mask_of(up=np.s_[[1, 3]]),
    ),
    "mask": (lambda params: jp.by_mask(RANDOM_MASK), RANDOM_MASK),
    "union": (
        lambda params: jp.union(params, jp.by_slice(HEAD), jp.by_path("bias"), jp.by_path("mlp/0")),
        mask_of(q=np.s_[:, 2], o=2, bias=..., up=...),
    ),
    "complement": (
        lambda params: jp.complement(params, jp.by_mask(RANDOM_MASK)),
        jax.tree.map(np.logical_not, RANDOM_MASK),
    ),
    "complement of a union": (
        lambda params: jp.complement(
            params, jp.union(params, jp.by_path("attn/*"), jp.by_path("mlp/1", "bias"))
        ),
        mask_of(up=...),
    ),
}


@pytest.fixture(params=CASES, ids=CASES)
def case(request):
    make, mask = CASES[request.param]
    return make(tree(0)), mask


def test_coordinates_are_the_numpy_mask(case):
    restriction, mask = case
    jax.tree.map(np.testing.assert_array_equal, jp.restriction_mask(restriction, tree(0)), mask)


def test_lens_laws(case):
    """What is read is what was written, and nothing else moves."""
    restriction, mask = case
    params, other = tree(1), tree(2)
    position = restriction.select(other)
    assert sum(leaf.size for leaf in jax.tree.leaves(position)) == sum(
        leaf.sum() for leaf in jax.tree.leaves(mask)
    )
    written = restriction.embed(position, params)
    wanted = jax.tree.map(lambda m, new, old: np.where(m, new, old), mask, other, params)
    jax.tree.map(np.testing.assert_array_equal, written, wanted)
    back = restriction.select(written)
    jax.tree.map(np.testing.assert_array_equal, back, position)
    untouched = restriction.embed(restriction.select(params), params)
    jax.tree.map(np.testing.assert_array_equal, untouched, params)


def test_gradient_through_embed(case):
    """d embed / d position is the mask: each number of a position moves one weight by as much."""
    restriction, mask = case
    params, cotangent = tree(1), tree(3)
    _, pull = jax.vjp(lambda z: restriction.embed(z, params), restriction.select(params))
    (gradient,) = pull(cotangent)
    jax.tree.map(np.testing.assert_array_equal, gradient, restriction.select(cotangent))
    outside = jax.vjp(lambda p: restriction.embed(restriction.select(tree(0)), p), params)[1]
    jax.tree.map(
        lambda g, m, c: np.testing.assert_array_equal(g, np.where(m, 0, c)),
        outside(cotangent)[0],
        mask,
        cotangent,
    )


@pytest.mark.parametrize("name", ["head", "mask"])
def test_dtypes_are_kept(name):
    params = tree(1, jnp.bfloat16)
    restriction = CASES[name][0](params)
    back = restriction.embed(restriction.select(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype(jnp.bfloat16)}


def loss_fn(params, batch):
    hidden = jnp.einsum("bi,ihd,hdj->bj", batch, params["attn"]["q"], params["attn"]["o"])
    return jnp.sum((jnp.tanh(hidden @ params["mlp"][0]) @ params["mlp"][1]) ** 2, -1)


DATA = jnp.asarray(np.random.default_rng(5).normal(size=(6, 4)), jnp.float32)


@pytest.fixture(scope="module")
def posterior():
    return jp.localized_posterior(loss_fn, tree(1), DATA, nbeta=4.0, localization=2.0)


def head(index):
    return jp.by_slice({"attn/q": (1, index), "attn/o": (0, index)})


def test_stacked_heads_are_the_heads_one_by_one(posterior):
    """Indices are leaves, so heads stack and vmap; the numbers are those of each head alone."""
    heads = [head(h) for h in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *heads)
    gradient = jax.jit(lambda p: p.grad_estimator(jax.tree.map(lambda x: x + 0.1, p.center)))
    together = jax.vmap(lambda r: gradient(jp.restrict(posterior, r)))(stacked)
    for h, alone in enumerate(heads):
        wanted = gradient(jp.restrict(posterior, alone))
        got = jax.tree.map(lambda leaf, h=h: leaf[h], together)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, wanted
        )


def test_gradient_of_a_head_is_that_part_of_the_full_gradient(posterior):
    full = posterior.loss_gradient(posterior.center)
    part = jp.restrict(posterior, head(1))
    got = part.loss_gradient(part.center)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        got,
        head(1).select(full),
    )


def test_an_index_outside_that_is_only_seen_while_tracing_is_not_silent():
    """Inside vmap an index has no value to check: it reads NaN and writes nowhere."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), head(2), head(3))
    params = tree(1)
    read = jax.vmap(lambda r: r.select(params))(stacked)
    assert bool(jnp.isfinite(read["attn/q"][0]).all())
    assert bool(jnp.isnan(read["attn/q"][1]).all())
    written = jax.vmap(lambda r: r.embed(jax.tree.map(jnp.zeros_like, r.select(params)), params))(
        stacked
    )
    np.testing.assert_array_equal(written["attn"]["q"][1], params["attn"]["q"])


def low_rank(basis):
    """w = w* + Σ_k z_k U_k on one matrix."""

    def embed(basis, position, params):
        moved = params["mlp"][0] + jnp.tensordot(position, basis, 1)
        return params | {"mlp": [moved, params["mlp"][1]]}

    zero = jnp.zeros(len(basis))
    return jp.Restriction(Partial(lambda zero, params: zero, zero), Partial(embed, basis))


def test_a_lens_of_the_users_own(posterior):
    """A low-rank subspace: no set of coordinates, but a component like any other."""
    rng = np.random.default_rng(7)
    basis = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)
    part = jp.restrict(posterior, low_rank(basis))
    np.testing.assert_array_equal(part.center, np.zeros(2))
    z = jnp.array([0.3, -0.2])
    full = posterior.loss_gradient(part.embed(z))
    wanted = np.einsum("kij,ij->k", basis, full["mlp"][0])
    np.testing.assert_allclose(part.loss_gradient(z), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must select coordinates"):
        jp.restriction_mask(low_rank(basis), posterior.params)
    plan = jp.Plan(num_chains=2, num_burnin=2, num_draws=4, thin=1)
    sampler = jp.sgld(step_size=1e-3)
    trace = jp.sample(KEY, part, sampler, plan, lambda p: p["mlp"][0], progress=False)
    moves = (np.asarray(trace) - np.asarray(posterior.params["mlp"][0])).reshape(-1, 20)
    assert np.linalg.matrix_rank(moves, tol=1e-4) == 2


def test_union_of_complements_covers_everything_once():
    params = tree(0)
    part = jp.by_mask(RANDOM_MASK)
    whole = jp.union(params, part, jp.complement(params, part))
    assert all(leaf.all() for leaf in jax.tree.leaves(jp.restriction_mask(whole, params)))


def test_numpy_parameters():
    """Weights may come from a file as NumPy arrays."""
    params = jax.tree.map(np.asarray, tree(1))
    posterior = jp.localized_posterior(loss_fn, params, DATA, nbeta=4, localization=2)
    part = jp.restrict(posterior, jp.by_slice({"mlp/0": (0, 1)}))
    np.testing.assert_array_equal(part.center["mlp/0"], params["mlp"][0][1])
    jp.union(params, jp.by_path("bias"), jp.by_path("mlp/*"))
