"""Families of language models as data: their settings, and which tensor is which parameter.

A tensor's rule is a rearrangement `"(h k) d -> h d k"` from the axes of the file to those of the
parameter: h heads, g key/value heads, k width of a head, d width of the residual stream, f width of
the MLP, v vocabulary, t positions. A leading axis c on the right deals the tensor out to several
parameters, as where queries, keys and values lie in one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class Tensor(NamedTuple):
    """Where a tensor of the file goes.

    Attributes:
        rule: rearrangement from the axes of the file.
        to: path of the parameter, or one for each index of the axis c.
        where: setting of the configuration that must be true for the tensor to exist.
    """

    rule: str
    to: tuple[str, ...]
    where: str | None = None


@dataclass(frozen=True)
class Family:
    """What the models of one family have in common.

    Attributes:
        names: our name of a setting → its name in `config.json`, where that is not ours.
        defaults: settings that a `config.json` may leave out.
        prefix: what stands before the names of tensors, in files that hold the read-out too.
        layer: prefix of the tensors of layer i.
        outer: tensors outside the layers. A name with `|` has older spellings.
        inner: tensors of a layer.
        ignored: patterns of tensors that hold nothing learned.
        norm: "layer" subtracts the mean, "rms" does not.
        norm_offset: added to the scale of an RMS norm.
        gated: the MLP is act(x G) ⊙ (x U), else act(x U).
        windows: which layers have a sliding window: none; those named in `layer_types`; all.
        embed_scale: the embedding is multiplied by √D.
    """

    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    prefix: str
    layer: str
    outer: Mapping[str, Tensor]
    inner: Mapping[str, Tensor]
    ignored: tuple[str, ...] = ()
    norm: Literal["layer", "rms"] = "rms"
    norm_offset: float = 0.0
    gated: bool = True
    rotary: bool = True
    windows: Literal["none", "by_layer", "all"] = "none"
    embed_scale: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that change the model in ways not supported, and the value they must have."""


_MAT_IN = "f d -> d f"
_MAT_OUT = "d f -> f d"
_ONE_VECTOR = "d -> d"

_HEAD = {
    "self_attn.q_proj.weight": Tensor("(h k) d -> h d k", ("attn/W_Q",)),
    "self_attn.k_proj.weight": Tensor("(g k) d -> g d k", ("attn/W_K",)),
    "self_attn.v_proj.weight": Tensor("(g k) d -> g d k", ("attn/W_V",)),
    "self_attn.o_proj.weight": Tensor("d (h k) -> h k d", ("attn/W_O",)),
}


def _head_biases(where: str | None, *, out: bool) -> dict[str, Tensor]:
    biases = {
        "self_attn.q_proj.bias": Tensor("(h k) -> h k", ("attn/b_Q",), where),
        "self_attn.k_proj.bias": Tensor("(g k) -> g k", ("attn/b_K",), where),
        "self_attn.v_proj.bias": Tensor("(g k) -> g k", ("attn/b_V",), where),
    }
    return biases | (
        {"self_attn.o_proj.bias": Tensor(_ONE_VECTOR, ("attn/b_O",), where)} if out else {}
    )


_HEAD_NORMS = {
    "self_attn.q_norm.weight": Tensor("k -> k", ("attn/q_norm",)),
    "self_attn.k_norm.weight": Tensor("k -> k", ("attn/k_norm",)),
}
_GATED_MLP = {
    "mlp.gate_proj.weight": Tensor(_MAT_IN, ("mlp/W_gate",)),
    "mlp.up_proj.weight": Tensor(_MAT_IN, ("mlp/W_in",)),
    "mlp.down_proj.weight": Tensor(_MAT_OUT, ("mlp/W_out",)),
}
_MLP_BIASES = {
    "mlp.gate_proj.bias": Tensor("f -> f", ("mlp/b_gate",), "mlp_bias"),
    "mlp.up_proj.bias": Tensor("f -> f", ("mlp/b_in",), "mlp_bias"),
    "mlp.down_proj.bias": Tensor(_ONE_VECTOR, ("mlp/b_out",), "mlp_bias"),
}
_TWO_NORMS = {
    "input_layernorm.weight": Tensor(_ONE_VECTOR, ("ln1/w",)),
    "post_attention_layernorm.weight": Tensor(_ONE_VECTOR, ("ln2/w",)),
}
_FOUR_NORMS = {
    "input_layernorm.weight": Tensor(_ONE_VECTOR, ("ln1/w",)),
    "post_attention_layernorm.weight": Tensor(_ONE_VECTOR, ("ln1_post/w",)),
    "pre_feedforward_layernorm.weight": Tensor(_ONE_VECTOR, ("ln2/w",)),
    "post_feedforward_layernorm.weight": Tensor(_ONE_VECTOR, ("ln2_post/w",)),
}
_LLAMA_OUTER = {
    "embed_tokens.weight": Tensor("v d -> v d", ("embed/W_E",)),
    "norm.weight": Tensor(_ONE_VECTOR, ("ln_final/w",)),
    "lm_head.weight": Tensor("v d -> d v", ("unembed/W_U",), "untied"),
}
_LLAMA_NAMES = {
    "d_model": "hidden_size",
    "d_mlp": "intermediate_size",
    "d_head": "head_dim",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "context": "max_position_embeddings",
    "activation": "hidden_act",
    "epsilon": "rms_norm_eps",
}
_LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
_ROTARY_BUFFER = "*rotary_emb.inv_freq"


def _like_llama(
    inner: Mapping[str, Tensor], *, defaults: Mapping[str, Any] | None = None, **changes: Any
) -> Family:
    changes.setdefault("names", _LLAMA_NAMES)
    return Family(
        defaults={**_LLAMA_DEFAULTS, **(defaults or {})},
        prefix="model.",
        layer="layers.{i}.",
        outer=_LLAMA_OUTER,
        inner=inner,
        ignored=(_ROTARY_BUFFER,),
        **changes,
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        names={
            "d_model": "n_embd",
            "d_mlp": "n_inner",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "context": "n_positions",
            "activation": "activation_function",
            "epsilon": "layer_norm_epsilon",
        },
        defaults={
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        prefix="transformer.",
        layer="h.{i}.",
        outer={
            "wte.weight": Tensor("v d -> v d", ("embed/W_E",)),
            "wpe.weight": Tensor("t d -> t d", ("embed/W_pos",)),
            "ln_f.weight": Tensor(_ONE_VECTOR, ("ln_final/w",)),
            "ln_f.bias": Tensor(_ONE_VECTOR, ("ln_final/b",)),
            "lm_head.weight": Tensor("v d -> d v", ("unembed/W_U",), "untied"),
        },
        inner={
            "ln_1.weight": Tensor(_ONE_VECTOR, ("ln1/w",)),
            "ln_1.bias": Tensor(_ONE_VECTOR, ("ln1/b",)),
            "attn.c_attn.weight": Tensor(
                "d (c h k) -> c h d k", ("attn/W_Q", "attn/W_K", "attn/W_V")
            ),
            "attn.c_attn.bias": Tensor("(c h k) -> c h k", ("attn/b_Q", "attn/b_K", "attn/b_V")),
            "attn.c_proj.weight": Tensor("(h k) d -> h k d", ("attn/W_O",)),
            "attn.c_proj.bias": Tensor(_ONE_VECTOR, ("attn/b_O",)),
            "ln_2.weight": Tensor(_ONE_VECTOR, ("ln2/w",)),
            "ln_2.bias": Tensor(_ONE_VECTOR, ("ln2/b",)),
            "mlp.c_fc.weight": Tensor("d f -> d f", ("mlp/W_in",)),
            "mlp.c_fc.bias": Tensor("f -> f", ("mlp/b_in",)),
            "mlp.c_proj.weight": Tensor("f d -> f d", ("mlp/W_out",)),
            "mlp.c_proj.bias": Tensor(_ONE_VECTOR, ("mlp/b_out",)),
        },
        ignored=("*.attn.bias", "*.attn.masked_bias"),
        norm="layer",
        gated=False,
        rotary=False,
        fixed={"add_cross_attention": False},
    ),
    "gpt_neox": Family(
        names={
            **{k: v for k, v in _LLAMA_NAMES.items() if k not in ("num_kv_heads", "d_head")},
            "epsilon": "layer_norm_eps",
        },
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10_000.0,
        },
        prefix="gpt_neox.",
        layer="layers.{i}.",
        outer={
            "embed_in.weight": Tensor("v d -> v d", ("embed/W_E",)),
            "final_layer_norm.weight": Tensor(_ONE_VECTOR, ("ln_final/w",)),
            "final_layer_norm.bias": Tensor(_ONE_VECTOR, ("ln_final/b",)),
            "embed_out.weight|lm_head.weight": Tensor("v d -> d v", ("unembed/W_U",), "untied"),
        },
        inner={
            "input_layernorm.weight": Tensor(_ONE_VECTOR, ("ln1/w",)),
            "input_layernorm.bias": Tensor(_ONE_VECTOR, ("ln1/b",)),
            "post_attention_layernorm.weight": Tensor(_ONE_VECTOR, ("ln2/w",)),
            "post_attention_layernorm.bias": Tensor(_ONE_VECTOR, ("ln2/b",)),
            "attention.query_key_value.weight": Tensor(
                "(h c k) d -> c h d k", ("attn/W_Q", "attn/W_K", "attn/W_V")
            ),
            "attention.query_key_value.bias": Tensor(
                "(h c k) -> c h k", ("attn/b_Q", "attn/b_K", "attn/b_V"), "attention_bias"
            ),
            "attention.dense.weight": Tensor("d (h k) -> h k d", ("attn/W_O",)),
            "attention.dense.bias": Tensor(_ONE_VECTOR, ("attn/b_O",), "attention_bias"),
            "mlp.dense_h_to_4h.weight": Tensor(_MAT_IN, ("mlp/W_in",)),
            "mlp.dense_h_to_4h.bias": Tensor("f -> f", ("mlp/b_in",)),
            "mlp.dense_4h_to_h.weight": Tensor(_MAT_OUT, ("mlp/W_out",)),
            "mlp.dense_4h_to_h.bias": Tensor(_ONE_VECTOR, ("mlp/b_out",)),
        },
        ignored=("*.attention.bias", "*.attention.masked_bias", _ROTARY_BUFFER),
        norm="layer",
        gated=False,
    ),
    "llama": _like_llama(
        {
            **_HEAD,
            **_head_biases("attention_bias", out=True),
            **_GATED_MLP,
            **_MLP_BIASES,
            **_TWO_NORMS,
        },
        fixed={"pretraining_tp": 1},
    ),
    "mistral": _like_llama(
        {**_HEAD, **_GATED_MLP, **_TWO_NORMS},
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "qwen2": _like_llama(
        {**_HEAD, **_head_biases(None, out=False), **_GATED_MLP, **_TWO_NORMS},
        windows="by_layer",
    ),
    "qwen3": _like_llama(
        {
            **_HEAD,
            **_head_biases("attention_bias", out=True),
            **_HEAD_NORMS,
            **_GATED_MLP,
            **_TWO_NORMS,
        },
        defaults={"head_dim": 128},
        windows="by_layer",
    ),
    "gemma3_text": _like_llama(
        {
            **_HEAD,
            **_head_biases("attention_bias", out=True),
            **_HEAD_NORMS,
            **_GATED_MLP,
            **_FOUR_NORMS,
        },
        names={**_LLAMA_NAMES, "activation": "hidden_activation"},
        defaults={
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 256,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        norm_offset=1.0,
        windows="by_layer",
        embed_scale=True,
        fixed={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    ),
}
"""`model_type` of a `config.json` → its family. SmolLM is a Llama."""
