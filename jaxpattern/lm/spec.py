"""What a language model computes, read from its `config.json`: one description for all families."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxpattern.lm.families import FAMILIES, Family

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the angle of pair j at position t is t · frequencies[j]."""

    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class Spec:
    """The computation of a decoder-only transformer; hashable, so equal models share programs.

    Attributes:
        family: `model_type` of the configuration.
        vocab_size: number of tokens V.
        context: longest sequence T.
        num_layers: number of layers L.
        num_heads: query heads H of a layer.
        num_kv_heads: key/value heads G of a layer, each shared by H / G query heads.
        d_model: width D of the residual stream.
        d_head: width K of a head.
        d_mlp: width F of the MLP.
        norm: "layer" or "rms".
        norm_offset: added to the scale of a norm.
        epsilon: added to the variance in a norm.
        activation: of the MLP.
        gated: whether the MLP has a gate.
        parallel: attention and MLP both read the same residual stream.
        embed_scale: factor of the embedding.
        tied: the read-out is the embedding.
        ropes: kinds of rotary positions.
        rope_of_layer: which of them each layer uses; empty where positions are learned.
        windows: positions that each layer sees, itself included; the context where all are.
        scales: factor of q·k in each layer.
        logit_cap: c in c tanh(z / c) of the logits, 0 for none.
    """

    family: str
    vocab_size: int
    context: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    norm: Literal["layer", "rms"]
    norm_offset: float
    epsilon: float
    activation: str
    gated: bool
    parallel: bool
    embed_scale: float
    tied: bool
    ropes: tuple[Rope, ...]
    rope_of_layer: tuple[int, ...]
    windows: tuple[int, ...]
    scales: tuple[float, ...]
    logit_cap: float

    @property
    def group_size(self) -> int:
        """Query heads per key/value head, H / G."""
        return self.num_heads // self.num_kv_heads

    def axis_sizes(self) -> dict[str, int]:
        """Lengths of the axes that the rules of the families name."""
        return {
            "h": self.num_heads,
            "g": self.num_kv_heads,
            "k": self.d_head,
            "d": self.d_model,
            "f": self.d_mlp,
            "v": self.vocab_size,
            "t": self.context,
        }


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a configuration names.

    Raises:
        ValueError: it names none, or one that is not known.
    """
    kind = config.get("model_type")
    if kind is None:
        raise ValueError(f"config.json has no model_type; there are families {sorted(FAMILIES)}")
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r} is not known; there are families {sorted(FAMILIES)}. Any other "
            "model comes as a loss function of your own, (params, batch) -> [B] or [B, T]: "
            "nnx.split gives one of a flax model, torchax one of a torch model"
        )
    return FAMILIES[kind]


def read_spec(config: Mapping[str, Any]) -> Spec:
    """The description of a model from the content of its `config.json`.

    Raises:
        ValueError: the family is not known, a setting is missing, or one is not supported.
    """
    family = family_of(config)
    kind = config["model_type"]

    def raw(name: str, default: Any = None) -> Any:
        value = config.get(name)
        return family.defaults.get(name, default) if value is None else value

    def setting(name: str, default: Any = None) -> Any:
        return raw(family.names.get(name, name), default)

    def count(name: str, default: int | None = None) -> int:
        value = setting(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            key = family.names.get(name, name)
            raise ValueError(f"config.json: {key} must be a positive integer, got {value!r:.80}")
        return value

    for name, wanted in family.fixed.items():
        if raw(name, wanted) != wanted:
            raise ValueError(
                f"config.json: {name} = {config[name]!r:.80} is not supported for {kind}, "
                f"only {wanted!r}"
            )
    num_layers, num_heads, d_model = (count(n) for n in ("num_layers", "num_heads", "d_model"))
    num_kv_heads, context = count("num_kv_heads", num_heads), count("context")
    if "d_head" not in family.names and d_model % num_heads:
        raise ValueError(f"config.json: {num_heads} heads do not divide a width of {d_model}")
    if num_heads % num_kv_heads:
        raise ValueError(f"config.json: {num_kv_heads} key/value heads for {num_heads} heads")
    d_head = count("d_head", d_model // num_heads)
    activation = setting("activation")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"config.json: activation {activation!r} is not known; there are {sorted(_ACTIVATIONS)}"
        )
    layer_types = _layer_types(config, family, num_layers)
    ropes, rope_of_layer = (
        _ropes(config, raw, d_head, layer_types, context) if family.rotary else ((), ())
    )
    window = config["sliding_window"] if "sliding_window" in config else raw("sliding_window")
    scale = (
        (raw("query_pre_attn_scalar") or d_head) ** -0.5 if raw("scale_attn_weights", True) else 1.0
    )
    by_layer = raw("scale_attn_by_inverse_layer_idx", False)
    return Spec(
        family=kind,
        vocab_size=count("vocab_size"),
        context=context,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=count("d_mlp", 4 * d_model),
        norm=family.norm,
        norm_offset=family.norm_offset,
        epsilon=float(setting("epsilon")),
        activation=_ACTIVATIONS[activation],
        gated=family.gated,
        parallel=bool(raw("use_parallel_residual", False)),
        embed_scale=math.sqrt(d_model) if family.embed_scale else 1.0,
        tied=bool(raw("tie_word_embeddings", True)),
        ropes=ropes,
        rope_of_layer=rope_of_layer,
        windows=tuple(
            int(window) if kind == _LOCAL and window else context for kind in layer_types
        ),
        scales=tuple(scale / (i + 1 if by_layer else 1) for i in range(num_layers)),
        logit_cap=float(raw("final_logit_softcapping") or 0.0),
    )


def _layer_types(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[str, ...]:
    """Which layers see a window only."""
    if family.windows != "by_layer":
        return (_LOCAL if family.windows == "all" else _GLOBAL,) * num_layers
    if config["model_type"] != "gemma3_text" and not config.get("use_sliding_window"):
        return (_GLOBAL,) * num_layers
    given = config.get("layer_types")
    if given is not None:
        if len(given) != num_layers or not set(given) <= {_LOCAL, _GLOBAL}:
            raise ValueError(
                f"config.json: layer_types must be {num_layers} of {_LOCAL!r} and {_GLOBAL!r}, "
                f"got {given!r:.120}"
            )
        return tuple(given)
    if config["model_type"] == "gemma3_text":
        every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
        return tuple(_LOCAL if (i + 1) % every else _GLOBAL for i in range(num_layers))
    first = config.get("max_window_layers", 28)
    return tuple(_LOCAL if i >= first else _GLOBAL for i in range(num_layers))


def _ropes(
    config: Mapping[str, Any], raw: Any, d_head: int, layer_types: tuple[str, ...], context: int
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """Rotary positions, spelled `rope_parameters` or `rope_theta` with `rope_scaling`."""
    given = config.get("rope_parameters") or {}
    base = {
        "rope_theta": raw("rope_theta", raw("rotary_emb_base")),
        "partial_rotary_factor": raw("partial_rotary_factor", raw("rotary_pct", 1.0)),
    }
    scaling = config.get("rope_scaling") or {}
    nested = _GLOBAL in given or _LOCAL in given
    if config["model_type"] != "gemma3_text" and not nested:
        return (_rope({**base, **scaling, **given}, d_head, context),), (0,) * len(layer_types)
    # Where layers differ, old files scale the positions of the global ones only.
    local = {**base, "rope_theta": raw("rope_local_base_freq", base["rope_theta"])}
    kinds = {
        _GLOBAL: {**base, **scaling, **((given.get(_GLOBAL) or {}) if nested else given)},
        _LOCAL: {**local, **((given.get(_LOCAL) or {}) if nested else {})},
    }
    order = [kind for kind in kinds if kind in layer_types]
    ropes = tuple(_rope(kinds[kind], d_head, context) for kind in order)
    return ropes, tuple(order.index(kind) for kind in layer_types)


def _rope(settings: Mapping[str, Any], d_head: int, context: int) -> Rope:
    """θ^(−2j/n), with the scaling of the family.

    Source: Su et al. 2021, arXiv 2104.09864, eq. 15; Llama 3's scaling as transformers has it.
    """
    width = int(d_head * settings["partial_rotary_factor"])
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    frequencies = 1.0 / np.float64(settings["rope_theta"]) ** exponents
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "linear":
        frequencies = frequencies / settings["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, settings, context)
    elif kind != "default":
        raise ValueError(
            f"config.json: rope_type {kind!r} is not supported; there are 'default', 'linear' and "
            "'llama3'"
        )
    return Rope(tuple(frequencies.astype(np.float32).tolist()))


def _llama3(frequencies: np.ndarray, settings: Mapping[str, Any], context: int) -> np.ndarray:
    """Slow frequencies divided by a factor, fast ones kept, those between interpolated."""
    missing = {"factor", "low_freq_factor", "high_freq_factor"} - set(settings)
    if missing:
        raise ValueError(f"config.json: rope_type 'llama3' needs {sorted(missing)}")
    low, high, factor = (settings[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    length = settings.get("original_max_position_embeddings", context)
    turns = length * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / factor + smooth * frequencies
