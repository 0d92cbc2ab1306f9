"""Tiny models of every family as transformers makes them, with random parameters."""

import functools
import json
import shutil

import numpy as np

VOCAB, CONTEXT = 29, 16
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_NO_GROUPS = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
FAMILIES = {
    "gpt2": ("GPT2", {
        "vocab_size": VOCAB, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT,
        "n_inner": 20, "bos_token_id": None, "eos_token_id": None,
    }),
    "gpt2 by layer": ("GPT2", {
        "vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT,
        "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None,
    }),
    "pythia": ("GPTNeoX", _NO_GROUPS | {"rope_parameters": {
        "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.67}}),
    "neox serial": ("GPTNeoX", _NO_GROUPS | {
        "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}),
    "llama": ("Llama", _SIZES),
    "llama3": ("Llama", _SIZES | {
        "rope_parameters": _LLAMA3, "head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    "smollm": ("Llama", _SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral": ("Mistral", _SIZES | {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2", _SIZES | {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", _SIZES | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3Text", _SIZES | {
        "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 13,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "final_logit_softcapping": 20.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    }),
}  # fmt: skip
"""Name → transformers' class prefix, and settings of its configuration."""


@functools.cache
def torch_model(name, seed=0):
    """The model of transformers in float32; every parameter random, norms and biases too."""
    import torch
    import transformers

    torch.set_num_threads(1)
    prefix, settings = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**settings, attn_implementation="eager")
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    model = getattr(transformers, kind.get(prefix, f"{prefix}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            wide = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            if parameter.ndim == 1 and prefix != "Gemma3Text":
                parameter.add_(wide * noise)
            else:
                parameter.copy_(wide * noise)
    return model


def folder_of(name, path, dtype=None):
    """A folder that transformers wrote."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = torch_model(name)
    if dtype is not None:
        import copy

        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(path)
    return path


def tokens_of(num=3, length=CONTEXT, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (num, length)).astype(np.int32)


def edit_config(folder, **changes):
    """Change settings of a folder; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def copy_of(folder, to):
    return shutil.copytree(folder, to)


CONFIGS = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 24, "n_layer": 3, "n_head": 4,
        "n_positions": CONTEXT,
    },
    "pythia": _NO_GROUPS | {"model_type": "gpt_neox"},
    "llama": _SIZES | {"model_type": "llama"},
    "gemma3": _SIZES | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
    "qwen2": _SIZES | {"model_type": "qwen2"},
}  # fmt: skip
"""Name → a `config.json` written by hand."""


def random_folder(name, path, seed=0, **changes):
    """A folder with random parameters, made without torch."""
    from safetensors.numpy import save_file

    from jaxpattern.lm import checkpoint_files
    from jaxpattern.lm.spec import family_of, read_spec

    config = CONFIGS[name] | changes
    family, spec = family_of(config), read_spec(config)
    rng, sizes = np.random.default_rng(seed), spec.axis_sizes()

    def tensor(rule, to):
        shape = checkpoint_files._shape(rule, sizes, len(to))
        return np.float32(rng.normal(size=shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5))

    outer = checkpoint_files._outer(family, config, spec)
    tensors = {family.prefix + n.split("|")[0]: tensor(*t[:2]) for n, t in outer.items()}
    for i in range(spec.num_layers):
        for n, t in checkpoint_files._inner(family, config).items():
            tensors[family.prefix + family.layer.format(i=i) + n] = tensor(*t[:2])
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@functools.cache
def random_model(name, **changes):
    """A loaded model with random parameters."""
    import tempfile
    from pathlib import Path

    import jaxpattern as jp

    with tempfile.TemporaryDirectory() as folder:
        return jp.lm.load(random_folder(name, Path(folder) / "model", **changes))
