"""Parts of loaded models: which parameters they are, that like parts run together, memory."""

import jax
import jax.numpy as jnp
import lm_models
import numpy as np
import pytest
from jaxtyping import config as jaxtyping_config

import jaxpattern as jp
from jaxpattern.lm import patches

pytest.importorskip("safetensors", reason="safetensors is not installed")


def mask_of(model, name):
    """Path → indices of the parameters that a part is."""
    mask = jp.restriction_mask(jp.component(model, name), model.params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(mask)
        if leaf.any()
    }


def test_a_head_is_its_slices_and_the_key_and_value_it_reads():
    model = lm_models.random_model("qwen2")
    mask = mask_of(model, "l1h3")
    expected = {}
    for name, slot in (
        ("W_Q", 3),
        ("W_O", 3),
        ("W_K", 1),
        ("W_V", 1),
        ("b_Q", 3),
        ("b_K", 1),
        ("b_V", 1),
    ):
        leaf = np.zeros(model.params["layers"]["attn"][name].shape, bool)
        leaf[1, slot] = True
        expected[f"layers/attn/{name}"] = leaf
    jax.tree.map(np.testing.assert_array_equal, mask, expected)


def test_a_group_is_the_union_of_its_heads():
    model = lm_models.random_model("llama")
    jax.tree.map(
        np.testing.assert_array_equal, mask_of(model, "l2g1"), mask_of(model, ["l2h2", "l2h3"])
    )


def test_output_bias_and_norms_belong_to_no_head():
    model = lm_models.random_model("gpt2")
    heads = mask_of(model, [f"l0h{h}" for h in range(4)])
    assert set(heads) == {
        f"layers/attn/{n}" for n in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
    }
    assert all(leaf[0].all() and not leaf[1:].any() for leaf in heads.values())


SPELLINGS = {
    "l0h1": ("L0H1", "l0 h1", "0:1", " l0h1 "),
    "l2": ("L2",),
    "l1 attn": ("L1 Attn", "l1.attn"),
    "l1 mlp": ("l1.mlp", "L1 MLP"),
    "l0g1": ("L0G1",),
    "embed": ("Embed",),
    "unembed": ("UNEMBED",),
    "full": ("Full",),
    "layers/attn/W_Q": (),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    model = lm_models.random_model("llama")
    expected = jp.component(model, name)
    count = sum(leaf.size for leaf in jax.tree.leaves(expected.select(model.params)))
    assert str(expected) == f"{name}: {count:,} parameters"
    for spelling in SPELLINGS[name]:
        part = jp.component(model, spelling)
        assert str(part) == str(expected)
        assert jax.tree.structure(part) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, part, expected)


def test_unions_name_their_parts_and_count_once():
    model = lm_models.random_model("llama")
    part = jp.component(model, ["l1h0", "l1h1", "l2 mlp"])
    sizes = {n: sum(leaf.sum() for leaf in mask_of(model, n).values()) for n in ("l1g0", "l2 mlp")}
    assert str(part) == f"l1h0 + l1h1 + l2 mlp: {sum(sizes.values()):,} parameters"
    both = mask_of(model, ["l1", "l1h2"])
    jax.tree.map(np.testing.assert_array_equal, both, mask_of(model, "l1"))


def test_all_parts_are_listed():
    model = lm_models.random_model("llama")
    names = list(jp.components(model))
    heads = [f"l{i}h{h}" for i in range(3) for h in range(4)]
    groups = [f"l{i}g{g}" for i in range(3) for g in range(2)]
    blocks = [f"l{i}{k}" for k in (" attn", " mlp", "") for i in range(3)]
    assert names == ["embed", *heads, *groups, *blocks, "unembed"]
    assert list(jp.components(model, kinds="mlp")) == ["l0 mlp", "l1 mlp", "l2 mlp"]
    assert list(jp.components(model, ["L1H3", "0:1"])) == ["l1h3", "l0h1"]
    assert "unembed" not in jp.components(lm_models.random_model("gpt2"))


@pytest.mark.parametrize("kind", ["head", "group", "attn", "mlp", "layer"])
def test_parts_of_a_kind_differ_in_leaves_only(kind):
    model = lm_models.random_model("qwen2")
    parts = list(jp.components(model, kinds=kind).values())
    shapes = [(jax.tree.structure(p), [leaf.shape for leaf in jax.tree.leaves(p)]) for p in parts]
    assert len(parts) > 1
    assert shapes == [shapes[0]] * len(parts)


CASES = {
    "qwen2": ["l1h3", "l2g1", "l2 mlp", "l1", "embed", ["l0h1", "l2h3", "l1 mlp"], ["l1", "l1h0"]],
    "gemma3": ["l1h3", "l1 attn"],
    "pythia": ["l1h3"],
}


@pytest.mark.parametrize("family", CASES)
def test_losses_and_gradients_are_those_of_the_written_parameters(family):
    """The forward pass that puts a part in layer by layer, against the plain parameters."""
    model, tokens = lm_models.random_model(family), lm_models.tokens_of(2)

    def loss(params):
        return jnp.mean(model.loss_fn(params, tokens))

    plain = jax.jit(jax.value_and_grad(loss))
    for name in CASES[family]:
        part = jp.component(model, name)
        position = jax.tree.map(lambda x: 1.3 * x + 0.05, part.select(model.params))
        found = jax.jit(jax.value_and_grad(lambda x, p=part: loss(p.embed(x, model.params))))
        value, gradient = found(position)
        expected, whole = plain(part.embed(position, model.params))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, part.select(whole)
        )


def test_what_is_written_last_holds():
    model, tokens = lm_models.random_model("qwen2"), lm_models.tokens_of(2)
    head, layer = (jp.component(model, name) for name in ("l1h0", "l1 attn"))

    def twice(first, second, scale):
        params = first.embed(
            jax.tree.map(lambda x: 0 * x, first.select(model.params)), model.params
        )
        return second.embed(jax.tree.map(lambda x: scale * x, second.select(model.params)), params)

    for first, second in ((head, layer), (layer, head), (head, head)):
        found = jax.jit(lambda s, a=first, b=second: model.loss_fn(twice(a, b, s), tokens))(1.5)
        expected = model.loss_fn(twice(first, second, 1.5), tokens)
        np.testing.assert_allclose(found, expected, atol=2e-6)
    assert not patches._made


def gradients_of(model, names, num_chains, tokens):
    """The vmapped gradient of chains of different parts of a kind, lowered and compiled."""
    parts = list(jp.components(model, names).values())
    chosen = [parts[c % len(parts)] for c in range(num_chains)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chosen)
    positions = jax.vmap(lambda part: part.select(model.params))(stacked)

    def gradient(part, position, params):
        return jax.grad(lambda x: jnp.mean(model.loss_fn(part.embed(x, params), tokens)))(position)

    return jax.jit(jax.vmap(gradient, (0, 0, None))).lower(
        stacked, positions, model.params
    ).compile(), stacked, positions  # fmt: skip


WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 12, "vocab_size": 31}


@pytest.mark.parametrize("kind", ["head", "mlp"])
def test_a_chain_holds_its_part_and_no_copy_of_the_stack(kind):
    """Seven chains more cost less than one copy of what they are written into."""
    model, tokens = lm_models.random_model("llama", **WIDE), lm_models.tokens_of(1, 3)
    names = list(jp.components(model, kinds=kind))
    memory = {
        chains: gradients_of(model, names, chains, tokens)[0].memory_analysis().temp_size_in_bytes
        for chains in (1, 8)
    }
    folder = model.params["layers"]["attn" if kind == "head" else "mlp"]
    stack = sum(leaf.nbytes for leaf in jax.tree.leaves(folder))
    part = jp.component(model, names[0]).select(model.params)
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(part))
    per_chain = (memory[8] - memory[1]) / 7
    assert per_chain < stack / 4
    assert per_chain < 3 * own + 2**20


def test_vmapped_gradients_are_those_of_each_chain():
    model, tokens = lm_models.random_model("qwen2"), lm_models.tokens_of(2)
    names = list(jp.components(model, kinds="head"))
    program, stacked, positions = gradients_of(model, names, 8, tokens)
    found = program(stacked, positions, model.params)
    whole = jax.jit(jax.grad(lambda p: jnp.mean(model.loss_fn(p, tokens))))(model.params)
    for c, name in enumerate(names[:8]):
        expected = jp.component(model, name).select(whole)
        jax.tree.map(
            lambda a, b, c=c: np.testing.assert_allclose(a[c], b, atol=2e-6), found, expected
        )


@pytest.mark.slow
def test_a_susceptibility_of_heads_of_all_layers():
    model, tokens = lm_models.random_model("llama"), jnp.asarray(lm_models.tokens_of(6))
    posterior = jp.localized_posterior(
        model.loss_fn, model.params, tokens, nbeta=30.0, localization=50.0
    )
    response = jp.susceptibilities(
        jax.random.key(1), posterior, jp.sgld(step_size=1e-4),
        jp.Plan(num_chains=1, num_burnin=0, num_draws=4, thin=1, batch_size=None),
        probes={"p": tokens[:2]}, components=jp.components(model, ["l0h1", "l2h3"]),
        estimator=jp.covariance(), progress=False,
    )  # fmt: skip
    assert response.rows == ("l0h1", "l2h3")
    assert np.isfinite(response.chi["p"]).all()


BAD = {
    "near": (
        lambda m: jp.component(m, "l0 mlq"),
        ValueError,
        "no part 'l0 mlq'; did you mean 'l0 mlp'",
    ),
    "layer": (lambda m: jp.component(m, "l3h0"), ValueError, "no layer 3 .*layers are 0 to 2"),
    "head": (lambda m: jp.component(m, "l0h4"), ValueError, "no head 4 .*a layer has 4"),
    "group": (lambda m: jp.component(m, "l0g2"), ValueError, "no group 2 .*a layer has 2"),
    "no string": (lambda m: jp.component(m, [3]), TypeError, "must be a string, got int"),
    "none": (lambda m: jp.component(m, []), ValueError, "at least one part"),
    "twice": (lambda m: jp.components(m, ["l0h1", "0:1"]), ValueError, "must be different.*l0h1"),
    "one string": (lambda m: jp.components(m, "l0h1"), TypeError, "must be a list"),
    "kind": (
        lambda m: jp.components(m, kinds="heads"),
        ValueError,
        r"kinds must be some of .*'head'",
    ),
    "two ways": (lambda m: jp.components(m, ["l0"], kinds="head"), ValueError, "give one of them"),
    "plain": (
        lambda m: jp.component(m.params, "l0h1"),
        TypeError,
        "must come from jaxpattern.lm.load",
    ),
    "names of plain": (
        lambda m: jp.components(m.params, ["l0"]),
        TypeError,
        "of plain parameters kinds",
    ),
}


@pytest.mark.parametrize(("act", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_names_are_explained(act, error, message):
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            act(lm_models.random_model("llama"))
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


def test_the_readout_of_a_tied_model_is_refused():
    with pytest.raises(ValueError, match="tied, its read-out is the embedding"):
        jp.component(lm_models.random_model("gpt2"), "unembed")


@pytest.mark.parametrize(("family", "layer"), [("gemma3", 1), ("llama", 0), ("gpt2", 2)])
def test_a_tail_is_the_model_on_cached_residuals(family, layer):
    model, tokens = lm_models.random_model(family), lm_models.tokens_of(3)
    tail = jp.lm.split(model, layer=layer)
    data = tail.data(tokens, chunk=2)
    np.testing.assert_allclose(
        tail.loss_fn(tail.params, data), model.loss_fn(model.params, tokens), atol=2e-6
    )
    whole = jax.jit(jax.grad(lambda p: jnp.mean(model.loss_fn(p, tokens))))(model.params)
    own = jax.jit(jax.grad(lambda p: jnp.mean(tail.loss_fn(p, data))))(tail.params)
    for name in (f"l{layer}h1", "l2 mlp", "l2", "ln_final/w"):
        a, b = (jp.component(m, name) for m in (tail, model))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), a.select(own), b.select(whole)
        )
    moved = jax.tree.map(lambda x: 1.1 * x, tail.params)
    if model.spec.tied:
        moved["embed"] = tail.params["embed"]
    np.testing.assert_allclose(
        model.loss_fn(tail.merge(moved), tokens), tail.loss_fn(moved, data), atol=5e-6
    )


def test_a_tail_keeps_the_names_of_layers_and_has_no_embedding():
    tail = jp.lm.split(lm_models.random_model("llama"), layer=1)
    assert list(jp.components(tail, kinds=("embed", "mlp"))) == ["l1 mlp", "l2 mlp"]
    for name, message in (
        ("l0", "layers are 1 to 2"),
        ("embed", "embed is not a part of the layers"),
    ):
        with pytest.raises(ValueError, match=message):
            jp.component(tail, name)


@pytest.mark.slow
def test_a_tail_is_a_posterior_like_any_other():
    tail = jp.lm.split(lm_models.random_model("llama"), layer=1)
    posterior = jp.localized_posterior(
        tail.loss_fn, tail.params, tail.data(lm_models.tokens_of(5)), nbeta=30.0, localization=50.0
    )
    head = jp.restrict(posterior, jp.component(tail, "l2h1"))
    plan = jp.Plan(num_chains=2, num_burnin=2, num_draws=4, thin=1, batch_size=2)
    result = jp.llc(jax.random.key(0), head, jp.sgld(step_size=1e-5), plan, progress=False)
    assert np.isfinite(result.mean)


@pytest.mark.slow
def test_a_part_answers_alike_on_the_tail_and_on_the_whole():
    """Same noise, same batches: χ of the last layer's MLP differs by rounding alone."""
    model, tokens = lm_models.random_model("llama"), lm_models.tokens_of(6)
    tail = jp.lm.split(model, layer=2)
    plan = jp.Plan(num_chains=2, num_burnin=2, num_draws=6, thin=1, batch_size=4, num_batches=2)
    found = [
        jp.susceptibilities(
            jax.random.key(3),
            jp.localized_posterior(
                side.loss_fn, side.params, data, nbeta=30.0, localization=10.0
            ),
            jp.sgld(step_size=3e-2), plan, probes={"p": data},
            components={"l2 mlp": jp.component(side, "l2 mlp")}, estimator=jp.covariance(),
            progress=False,
        )
        for side, data in ((model, jnp.asarray(tokens)), (tail, tail.data(tokens)))
    ]  # fmt: skip
    whole, part = (np.asarray(response.chi["p"]) for response in found)
    assert np.abs(whole).max() > 1e-4
    # Losses of 3 are rounded by 2e-7, and χ is a mean of their products with φ of up to 0.1.
    np.testing.assert_allclose(part, whole, rtol=1e-3, atol=1e-7)
