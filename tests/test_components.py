"""The named parts of a transformer: which weights they are, and that like parts run together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import config

import jaxpattern as jp
from jaxpattern.models import TransformerConfig, make_loss_fn, transformer
from jaxpattern.response.groups import component_groups

VOCAB, CONTEXT = 11, 6


def config_of(**changes):
    shape = {"vocab_size": VOCAB, "context": CONTEXT, "num_layers": 2, "num_heads": 2, "d_model": 8}
    return TransformerConfig(**(shape | changes))


def params_of(config_, seed=0):
    return transformer.init(jax.random.key(seed), config_)


WITH_MLP = config_of(mlp_width=12)


def test_every_part_has_a_name():
    names = tuple(jp.components(params_of(WITH_MLP)))
    heads = ("l0h0", "l0h1", "l1h0", "l1h1")
    assert names == ("embed", *heads, "l0.mlp", "l1.mlp", "l0", "l1", "unembed")
    tied = params_of(config_of(positions="learned", tied=True, num_layers=1))
    assert tuple(jp.components(tied)) == ("embed", "positions", "l0h0", "l0h1", "l0")


def test_kinds_are_chosen_and_ordered():
    params = params_of(WITH_MLP)
    assert tuple(jp.components(params, kinds="mlp")) == ("l0.mlp", "l1.mlp")
    assert tuple(jp.components(params, kinds=("unembed", "layer"))) == ("unembed", "l0", "l1")
    many = params_of(config_of(num_layers=11, num_heads=1))
    assert tuple(jp.components(many, kinds="layer"))[-2:] == ("l9", "l10")


def by_hand():
    """The same parts by path and by slice."""
    heads = {
        f"l{i}h{h}": jp.by_slice({f"layers/{i}/attn/{n}": (0, h) for n in ("bias", *"koqv")})
        for i in range(2)
        for h in range(2)
    }
    layers = {f"l{i}": jp.by_path(f"layers/{i}/*") for i in range(2)}
    mlps = {f"l{i}.mlp": jp.by_path(f"layers/{i}/mlp/*") for i in range(2)}
    whole = {name: jp.by_path(name) for name in ("embed", "unembed")}
    return heads | layers | mlps | whole


@pytest.mark.parametrize("across_layers", [True, False])
def test_parts_are_the_weights_their_names_say(across_layers):
    params = params_of(WITH_MLP)
    found, expected = jp.components(params, across_layers=across_layers), by_hand()
    assert set(found) == set(expected)
    for name, part in found.items():
        masks = (jp.restriction_mask(r, params) for r in (part, expected[name]))
        jax.tree.map(np.testing.assert_array_equal, *masks)


@pytest.mark.parametrize("name", ["l1h0", "l0.mlp", "l1"])
def test_what_is_written_is_what_was_selected(name):
    params, other = params_of(WITH_MLP), params_of(WITH_MLP, seed=1)
    part, expected = jp.components(params)[name], by_hand()[name]

    @jax.jit
    def transplant(restriction, source, target):
        return restriction.embed(restriction.select(source), target)

    moved = transplant(part, other, params)
    jax.tree.map(np.testing.assert_array_equal, moved, transplant(expected, other, params))
    jax.tree.map(np.testing.assert_array_equal, transplant(part, params, moved), params)


def test_a_model_is_as_good_as_its_weights():
    model = nnx.merge(transformer._graphdef(WITH_MLP), params_of(WITH_MLP))
    assert tuple(jp.components(model)) == tuple(jp.components(params_of(WITH_MLP)))


def posterior_of(config_, loss_fn=None, num=6):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (num, CONTEXT + 1)))
    return jp.localized_posterior(
        make_loss_fn(config_) if loss_fn is None else loss_fn,
        params_of(config_),
        tokens,
        nbeta=30.0,
        localization=50.0,
    )


def test_parts_of_one_shape_are_one_group():
    posterior = posterior_of(config_of(num_heads=8, mlp_width=12))
    groups = component_groups(posterior, jp.components(posterior.params))
    heads = tuple(f"l{i}h{h}" for i in range(2) for h in range(8))
    expected = [("embed",), heads, ("l0.mlp", "l1.mlp"), ("l0", "l1"), ("unembed",)]
    assert [group.names for group in groups] == expected
    apart = jp.components(posterior.params, kinds="head", across_layers=False)
    groups = component_groups(posterior, apart)
    assert [group.names for group in groups] == [heads[:8], heads[8:]]


PLAN = jp.Plan(num_chains=1, num_burnin=0, num_draws=4, thin=1, batch_size=None)


def respond(posterior, parts):
    return jp.susceptibilities(
        jax.random.key(1), posterior, jp.sgld(step_size=1e-4), PLAN,
        probes={"p": posterior.data[:2]}, components=parts, estimator=jp.covariance(),
        progress=False,
    )  # fmt: skip


def test_all_heads_are_one_program_with_shared_probes():
    """As many traces of the loss for the 8 heads of two layers as for one of them."""
    config_ = config_of(num_heads=4)
    plain, traces = make_loss_fn(config_), []

    def counted():
        """A function that no earlier call has compiled."""

        def loss_fn(params, tokens):
            traces.append(None)
            return plain(params, tokens)

        return loss_fn

    def count(parts):
        before = len(traces)
        respond(posterior_of(config_, counted()), parts)
        return len(traces) - before

    heads = jp.components(params_of(config_), kinds="head")
    assert count(heads) == count({"l0h0": heads["l0h0"]}) > 0


def test_the_response_is_that_of_heads_by_slice():
    config_ = config_of()
    posterior = posterior_of(config_)
    heads = jp.components(posterior.params, kinds="head")
    expected = respond(posterior, {name: by_hand()[name] for name in heads})
    response = respond(posterior, heads)
    assert response.rows == ("l0h0", "l0h1", "l1h0", "l1h1")
    scale = float(jnp.abs(expected.chi["p"]).max())
    np.testing.assert_allclose(response.chi["p"], expected.chi["p"], atol=1e-3 * scale)
    directions = jp.principal_directions(response)
    assert directions.coordinates["p"].shape == (4, 2, CONTEXT)
    rows = jp.extreme_tokens(directions.coordinates["p"][0], posterior.data[:2])
    assert rows[0].coordinate == pytest.approx(float(directions.coordinates["p"][0].max()))


BAD = {
    "kind": (
        lambda: jp.components(params_of(WITH_MLP), kinds=("heads",)),
        ValueError,
        r"kinds must be some of .*'head'.*got \('heads',\)",
    ),
    "kind twice": (
        lambda: jp.components(params_of(WITH_MLP), kinds=("mlp", "mlp")),
        ValueError,
        "each once",
    ),
    "no kind": (lambda: jp.components(params_of(WITH_MLP), kinds=()), ValueError, "kinds must be"),
    "absent": (
        lambda: jp.components(params_of(config_of()), kinds="mlp"),
        ValueError,
        r"no part of kinds \('mlp',\)",
    ),
    "not a tree": (lambda: jp.components([1.0]), TypeError, "params must be a nested dict.*list"),
    "another model": (
        lambda: jp.components({"W": jnp.ones(3)}),
        ValueError,
        r"params must be the weights of a decoder-only transformer.*\['W'\]",
    ),
    "heads of another layout": (
        lambda: jp.components({"layers": {"0": {"attn": {"q": jnp.ones(2), "b": jnp.ones(3)}}}}),
        ValueError,
        "layers/0/attn must share a leading head axis",
    ),
    "no attention": (
        lambda: jp.components({"layers": {"0": {"mlp": {"up": jnp.ones((2, 3))}}}}),
        ValueError,
        "layers/0/attn must share a leading head axis",
    ),
}


@pytest.mark.parametrize(("act", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(act, error, message):
    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            act()
    finally:
        config.update("jaxtyping_disable", False)
