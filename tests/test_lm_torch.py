"""Checkpoints against transformers: logits, gradients, Hessian-vector products, files."""

import jax
import jax.numpy as jnp
import lm_models
import numpy as np
import pytest

import jaxpattern as jp
from jaxpattern.lm import checkpoint_files

pytestmark = [
    pytest.mark.torch,
    # What torch.func calls of torch itself.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

NAMES = list(lm_models.FAMILIES)


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """The model of transformers, and ours from its folder."""
    folder = lm_models.folder_of(request.param, tmp_path_factory.mktemp("folder"))
    return lm_models.torch_model(request.param), jp.lm.load(folder)


def torch_losses(model, tokens, parameters=None):
    """Losses of next tokens, of the given parameters."""
    import torch

    ids = torch.as_tensor(np.int64(tokens))
    if parameters is None:
        logits = model(ids, use_cache=False).logits
    else:
        logits = torch.func.functional_call(model, parameters, (ids,), {"use_cache": False}).logits
    logp = torch.log_softmax(logits[:, :-1], dim=-1)
    return -logp.gather(-1, ids[:, 1:, None])[..., 0]


def named(model):
    return dict(model.named_parameters())


def in_our_layout(values, model, like):
    """Tensors by transformers' names as a tree like our parameters."""
    spec, config, family = model.spec, model.config, checkpoint_files.family_of(model.config)
    sizes, flat = spec.axis_sizes(), {}
    for name, tensor in checkpoint_files._outer(family, config, spec).items():
        # transformers 5 renames the read-out of GPT-NeoX between file and module.
        full = model.names[name]
        full = full if full in values else "lm_head.weight"
        flat |= dict(checkpoint_files._deal(values[full], tensor, sizes))
    for name, tensor in checkpoint_files._inner(family, config).items():
        for i in range(spec.num_layers):
            full = model.names[family.layer.format(i=i) + name]
            for path, part in checkpoint_files._deal(values[full], tensor, sizes):
                flat.setdefault(f"layers/{path}", []).append(part)
    nested = checkpoint_files._nest({k: np.asarray(v) for k, v in flat.items()})
    assert jax.tree.structure(nested) == jax.tree.structure(like)
    return nested


def test_logits(pair, record_property):
    import torch

    theirs, ours = pair
    tokens = lm_models.tokens_of()
    with torch.no_grad():
        expected = theirs(torch.as_tensor(np.int64(tokens))).logits.numpy()
    found = jax.jit(ours.logits)(ours.params, tokens)
    record_property("worst", float(np.abs(found - expected).max()))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    losses = torch_losses(theirs, tokens).detach().numpy()
    np.testing.assert_allclose(ours.loss_fn(ours.params, tokens), losses, atol=1e-5)


def test_gradients_and_hessian_products(pair, record_property):
    import torch

    theirs, ours = pair
    tokens = lm_models.tokens_of(2)
    parameters = {name: value.detach() for name, value in named(theirs).items()}
    generator = torch.Generator().manual_seed(1)
    direction = {
        name: torch.randn(value.shape, generator=generator) * value.std()
        for name, value in parameters.items()
    }

    def torch_loss(values):
        return torch_losses(theirs, tokens, values).mean()

    gradient, product = torch.func.jvp(torch.func.grad(torch_loss), (parameters,), (direction,))
    gradient, product, direction = (
        in_our_layout({k: v.numpy() for k, v in tree.items()}, ours, ours.params)
        for tree in (gradient, product, direction)
    )

    def loss(params):
        return jnp.mean(ours.loss_fn(params, tokens))

    found, found_product = jax.jit(lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,)))(
        ours.params, jax.tree.map(jnp.asarray, direction)
    )
    far = [
        float(np.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (found, gradient)), strict=True)
    ]
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(product))
    away = [
        float(np.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (found_product, product)), strict=True)
    ]
    record_property("gradient", max(far))
    record_property("product", max(away) / scale)
    assert max(far) < 1e-5
    assert max(away) < 1e-4 * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_comes_back_bit_for_bit(name, dtype, tmp_path):
    import torch
    import transformers
    from safetensors.torch import load_file

    folder = lm_models.folder_of(name, tmp_path / "theirs", getattr(torch, dtype))
    model = jp.lm.load(folder, dtype=getattr(jnp, dtype))
    jp.lm.save(model, tmp_path / "ours")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value, after[key])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for key, value in named(again).items():
        assert torch.equal(value.detach(), named(lm_models.torch_model(name))[key].to(value.dtype))


OLD = {
    "pythia": {"rope_parameters": None, "rotary_pct": 0.67, "rotary_emb_base": 100},
    "llama3": {
        "rope_parameters": None,
        "rope_theta": 50.0,
        "rope_scaling": {k: v for k, v in lm_models._LLAMA3.items() if k != "rope_theta"},
    },
    "gemma3": {
        "rope_parameters": None,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "llama": {"rope_parameters": None},
}


@pytest.mark.parametrize("name", OLD)
def test_both_spellings_of_rotary_settings(name, tmp_path):
    folder = lm_models.folder_of(name, tmp_path)
    new = jp.lm.load(folder).spec
    lm_models.edit_config(folder, **OLD[name])
    assert jp.lm.load(folder).spec == new


def test_names_without_prefix_and_with_old_buffers(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = lm_models.folder_of("gpt2", tmp_path)
    expected = jp.lm.load(folder).params
    file = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.uint8)
    tensors["h.0.attn.masked_bias"] = np.full((1,), -1e4, np.float32)
    save_file(tensors, file)
    jax.tree.map(np.testing.assert_array_equal, jp.lm.load(folder).params, expected)


def test_the_readout_of_neox_in_both_spellings(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = lm_models.folder_of("pythia", tmp_path)
    expected = jp.lm.load(folder).params
    file = folder / "model.safetensors"
    swap = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "embed_out.weight"}
    save_file({swap.get(k, k): v for k, v in load_file(file).items()}, file)
    jax.tree.map(np.testing.assert_array_equal, jp.lm.load(folder).params, expected)


def test_shards(tmp_path):
    whole = lm_models.folder_of("qwen3", tmp_path / "whole")
    lm_models.torch_model("qwen3").save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    params = (jp.lm.load(folder).params for folder in (whole, tmp_path / "shards"))
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_low_precision_keeps_losses_in_float32(tmp_path):
    folder = lm_models.folder_of("llama", tmp_path)
    model, wide = jp.lm.load(folder, dtype=jnp.bfloat16), jp.lm.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.bfloat16.dtype}
    tokens = lm_models.tokens_of()
    losses = model.loss_fn(model.params, tokens)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, wide.loss_fn(wide.params, tokens), atol=0.15)


def test_remat_changes_no_gradient(tmp_path):
    folder = lm_models.folder_of("gemma3", tmp_path)
    tokens = lm_models.tokens_of()
    gradients = [
        jax.jit(jax.grad(lambda p, m=model: jnp.mean(m.loss_fn(p, tokens))))(model.params)
        for model in (jp.lm.load(folder), jp.lm.load(folder, remat=True))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)


def without_head(model, layer, head):
    """A copy of the model of transformers in which all parameters of one head are 0."""
    import copy

    model = copy.deepcopy(model)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    pair = head * num_kv // config.num_attention_heads
    own, shared = (slice(i * width, (i + 1) * width) for i in (head, pair))
    pieces = []
    if config.model_type == "gpt2":
        attn, D = model.transformer.h[layer].attn, config.hidden_size
        for c in range(3):
            piece = slice(c * D + own.start, c * D + own.stop)
            pieces += [attn.c_attn.weight[:, piece], attn.c_attn.bias[piece]]
        pieces.append(attn.c_proj.weight[own])
    elif config.model_type == "gpt_neox":
        attn = model.gpt_neox.layers[layer].attention
        piece = slice(3 * own.start, 3 * own.stop)
        pieces += [attn.query_key_value.weight[piece], attn.dense.weight[:, own]]
        if attn.query_key_value.bias is not None:
            pieces.append(attn.query_key_value.bias[piece])
    else:
        attn = model.model.layers[layer].self_attn
        for linear, piece in ((attn.q_proj, own), (attn.k_proj, shared), (attn.v_proj, shared)):
            pieces.append(linear.weight[piece])
            if linear.bias is not None:
                pieces.append(linear.bias[piece])
        pieces.append(attn.o_proj.weight[:, own])
    for piece in pieces:
        piece.data.zero_()
    return model


def test_without_a_head_logits_are_those_without_it_in_torch(pair):
    import torch

    theirs, ours = pair
    tokens = lm_models.tokens_of(2)
    ids = torch.as_tensor(np.int64(tokens))

    @jax.jit
    def ablate(part):
        zeros = jax.tree.map(jnp.zeros_like, part.select(ours.params))
        return ours.logits(part.embed(zeros, ours.params), tokens)

    whole = ours.logits(ours.params, tokens)
    for layer in range(ours.spec.num_layers):
        for head in range(ours.spec.num_heads):
            with torch.no_grad():
                expected = without_head(theirs, layer, head)(ids).logits.numpy()
            found = ablate(jp.component(ours, f"l{layer}h{head}"))
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert np.abs(found - whole).max() > 1e-3
