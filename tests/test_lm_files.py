"""Folders that cannot be read, tokens that cannot be, and what says so; files written back."""

import json
import pickle

import jax
import jax.numpy as jnp
import lm_models
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import config as jaxtyping_config

import jaxpattern as jp
from jaxpattern.lm.checkpoint_files import _deal, _gather, _shape
from jaxpattern.lm.families import FAMILIES, Tensor
from jaxpattern.lm.spec import read_spec

pytest.importorskip("safetensors", reason="safetensors is not installed")


def edited(folder, **changes):
    """The folder with tensors changed by functions, and taken out where there is None."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for key, change in changes.items():
        name = next(name for name in tensors if name.endswith(key.replace("__", ".")))
        value = tensors.pop(name)
        if change is not None:
            tensors[name] = change(value)
    save_file(tensors, folder / "model.safetensors")


def shards(folder):
    """The folder as two files with an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    where = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    return where


def lose_a_shard(folder):
    (folder / shards(folder).popitem()[1]).unlink()


def lie_in_the_index(folder):
    where = shards(folder)
    name = next(iter(where))
    other = next(file for file in where.values() if file != where[name])
    index = {"weight_map": where | {name: other}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def nan(value):
    value[0] = np.nan
    return value


def configure(**changes):
    return lambda folder: lm_models.edit_config(folder, **changes)


BAD_FOLDERS = {
    "missing shard": (lose_a_shard, r"files that are not in the folder: \['model-0000"),
    "index names another shard": (lie_in_the_index, "does not hold .* which the index says"),
    "truncated": (truncate, "model.safetensors is not a whole safetensors file"),
    "pickle": (pickled, r"pickled weights \['pytorch_model.bin'\], which run code .* are refused"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "must hold an object, got list"),
    "no model type": (configure(model_type=None), "no model_type; there are families .*'gpt2'"),
    "unknown family": (
        configure(model_type="mamba"),
        "'mamba' is not known; there are families .*'llama'.*nnx.split .* torchax",
    ),
    "no width": (configure(hidden_size=None), "hidden_size must be a positive integer, got None"),
    "heads": (configure(num_key_value_heads=3), "3 key/value heads for 4 heads"),
    "activation": (configure(hidden_act="mish"), "activation 'mish' is not known"),
    "rope": (
        configure(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        "rope_type 'yarn' is not supported",
    ),
    "llama3 rope": (configure(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "needs .*low"),
    "not supported": (configure(pretraining_tp=2), "pretraining_tp = 2 is not supported"),
    "wrong shape": (
        lambda f: edited(f, q_proj__weight=lambda x: x[:-1]),
        r"q_proj.weight must have shape \[24, 24\], got \[23, 24\]",
    ),
    "missing tensor": (
        lambda f: edited(f, q_proj__weight=None),
        "the files lack model.layers.*q_proj",
    ),
    "too many layers": (
        configure(num_hidden_layers=2),
        r"hold 9 tensors that a llama of 2 layers does not have, such as \['model.layers.2",
    ),
    "NaN": (lambda f: edited(f, norm__weight=nan), "norm.weight holds values that are not finite"),
    "float8": (
        lambda f: edited(f, q_proj__weight=lambda x: x.astype(ml_dtypes.float8_e4m3fn)),
        "q_proj.weight is stored as F8_E4M3.*dequantize",
    ),
    "integers": (
        lambda f: edited(f, q_proj__weight=lambda x: x.astype(np.int8)),
        "q_proj.weight is stored as I8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_bad_folder_is_refused(spoil, message, tmp_path):
    folder = lm_models.random_folder("llama", tmp_path / "model")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        jp.lm.load(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"must be a directory .*snapshot_download"):
        jp.lm.load(tmp_path / "nowhere")


TOKENS = {
    "outside": (np.full((1, 4), lm_models.VOCAB), ValueError, "vocabulary, 0 to 28, got 29 to 29"),
    "negative": (np.array([[1, -1]]), ValueError, "got -1 to 1"),
    "floats": (np.ones((1, 4), np.float32), TypeError, "array of integers, got float32"),
    "list": ([[1, 2]], TypeError, "array of integers, got list"),
    "flat": (np.arange(4), ValueError, r"must be \[B, T\].*got \[4\]"),
    "too long": (np.ones((1, 17), int), ValueError, "at most 16 positions long.*got 17"),
    "nothing to predict": (np.ones((2, 1), int), ValueError, "T at least 2"),
}


@pytest.mark.parametrize(("tokens", "error", "message"), TOKENS.values(), ids=TOKENS.keys())
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bad_tokens_are_explained(family, tokens, error, message):
    model = lm_models.random_model(family)
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            model.loss_fn(model.params, tokens)
        with pytest.raises(error, match=message):
            jp.lm.split(model, 1).data(tokens)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


def test_padding_may_be_any_number_and_touches_nothing_before_it():
    """In a trace a loss that read a strange token is NaN, earlier ones and gradients are right."""
    model = lm_models.random_model("llama")
    tokens = jnp.asarray(lm_models.tokens_of(2))
    padded = tokens.at[:, 10:].set(-100)
    losses = jax.jit(model.loss_fn)(model.params, padded)
    expected = jax.jit(model.loss_fn)(model.params, tokens)
    np.testing.assert_allclose(losses[:, :9], expected[:, :9], atol=1e-6)
    assert jnp.isnan(losses[:, 9:]).all()

    @jax.jit
    def gradient(tokens):
        return jax.grad(lambda p: jnp.sum(model.loss_fn(p, tokens)[:, :9]))(model.params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient(padded), gradient(tokens)
    )


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int32"])
def test_parameters_are_at_least_16_bits(dtype, tmp_path):
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16 or float16, got"):
        jp.lm.load(tmp_path, dtype=dtype)


@pytest.mark.parametrize("name", lm_models.CONFIGS)
def test_what_is_saved_is_what_is_loaded(name, tmp_path):
    folder = lm_models.random_folder(name, tmp_path / "one")
    (folder / "tokenizer.json").write_text("{}")
    model = jp.lm.load(folder)
    moved = jax.tree.map(lambda x: x + 1, model.params)
    jp.lm.save(model, tmp_path / "two", moved)
    again = jp.lm.load(tmp_path / "two")
    assert again.spec == model.spec
    assert (tmp_path / "two" / "tokenizer.json").is_file()
    jax.tree.map(np.testing.assert_array_equal, again.params, moved)


def test_only_what_fits_is_saved(tmp_path):
    model = lm_models.random_model("llama")
    with pytest.raises(ValueError, match="structure and shapes"):
        jp.lm.save(model, tmp_path, {**model.params, "embed": {"W_E": jnp.ones(3)}})
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        for act in (lambda: jp.lm.save(model.params, tmp_path), lambda: jp.lm.split(3, layer=1)):
            with pytest.raises(
                TypeError, match=r"must come from jaxpattern.lm.load, got (dict|int)"
            ):
                act()
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
    with pytest.raises(ValueError, match="layer must be below 3, got 3"):
        jp.lm.split(model, layer=3)


def test_equal_models_are_one_program(tmp_path):
    folder = lm_models.random_folder("llama", tmp_path / "model")
    one, two = jp.lm.load(folder), jp.lm.load(folder)
    assert one.loss_fn == two.loss_fn
    assert hash(one.logits) == hash(two.logits)
    assert str(one) == (
        f"llama: {sum(x.size for x in jax.tree.leaves(one.params)):,} parameters, 3 layers of 4 "
        "heads on 2 keys and values, width 24, vocabulary 29, 16 positions"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_are_their_own_inverse(family):
    sizes = {"h": 4, "g": 2, "k": 3, "d": 5, "f": 7, "v": 11, "t": 6}
    rng = np.random.default_rng(0)
    for tensor in (*FAMILIES[family].outer.values(), *FAMILIES[family].inner.values()):
        value = rng.normal(size=_shape(tensor.rule, sizes, len(tensor.to)))
        parts = dict(_deal(value, tensor, sizes))
        assert tuple(parts) == tensor.to
        back = _gather([parts[path] for path in tensor.to], tensor.rule, sizes)
        np.testing.assert_array_equal(back, value)


def test_a_fused_tensor_is_dealt_out():
    tensor = Tensor("(h c k) d -> c h d k", ("q", "k", "v"))
    value = np.arange(2 * 3 * 4 * 5).reshape(24, 5)
    parts = dict(_deal(value, tensor, {"h": 2, "k": 4, "d": 5}))
    for c, name in enumerate("qkv"):
        for h in range(2):
            start = (h * 3 + c) * 4
            np.testing.assert_array_equal(parts[name][h], value[start : start + 4].T)


def test_rotary_frequencies_of_llama_3():
    """The published values of Llama 3.1: fast ones kept, slow ones divided by 8."""
    config = lm_models.CONFIGS["llama"] | {
        "head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }  # fmt: skip
    (rope,) = read_spec(config).ropes
    plain = 500000.0 ** -(np.arange(64) / 64)
    turns = 8192 * plain / (2 * np.pi)
    found = np.asarray(rope.frequencies)
    np.testing.assert_allclose(found[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(found[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    assert (np.diff(found) < 0).all()


def test_compilation_does_not_depend_on_depth():
    """The gradient of 24 layers is lowered to a program as long as that of 4."""
    lengths = []
    for num_layers in (4, 24):
        model = lm_models.random_model("llama", num_hidden_layers=num_layers)
        loss = lambda p, m=model: jnp.mean(m.loss_fn(p, lm_models.tokens_of(1)))  # noqa: E731
        text = jax.jit(jax.grad(loss)).lower(model.params).as_text()
        lengths.append(text.count("\n"))
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama", "gemma3", "qwen2"])
def test_an_abstract_model_has_the_shapes_of_the_loaded_one(name, tmp_path):
    folder = lm_models.random_folder(name, tmp_path / "model")
    model, shapes = jp.lm.load(folder), jp.lm.abstract(folder)
    assert shapes.spec == model.spec
    spoken = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    assert shapes.params == spoken
    narrow = jp.lm.abstract(model.config, dtype=jnp.bfloat16).params
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    assert set(jp.components(shapes)) == set(jp.components(model))
