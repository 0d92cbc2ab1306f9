"""A decoder-only transformer whose heads are slices of its weights.

    x⁰_t   = E[token_t]                                     (+ P_t with learned positions)
    aˡʰ_ts = softmax_s( q_t·k_s / √d_head + bˡʰ_{t−s} ),  s ≤ t,  with q, k, v = norm(x) Wˡʰ
    y_t    = xˡ_t + Σ_h ( Σ_s aˡʰ_ts vˡʰ_s ) Oˡʰ
    xˡ⁺¹_t = y_t + gelu( norm(y_t) U ) D                    (nothing is added if the width is 0)
    ℓ_t    = logsumexp(z_t) − z_t[token_{t+1}],             z_t = norm(xᴸ_t) R

`norm` divides by the root mean square and multiplies by a learned scale; nothing has an additive
bias but the attention pattern. Weights are float32 in a plain nested dict, such as
`layers/1/attn/q` of shape [H, D, K]: head h is the slice h of axis 0 of q, k, v, o (and of the
position bias), so a restriction to one head is a slice of each.

Names end in their axes: B batch, T position, S position attended to, H head, D width of the
residual stream, K width of a head, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpattern.types import Params
from jaxpattern.validation import check_count, check_key

Logits: TypeAlias = Float[Array, "B T V"]
Residual: TypeAlias = Float[Array, "B T D"]
Pattern: TypeAlias = Float[Array, "B H T S"]
Tokens: TypeAlias = Int[Array, "B T"]

_MASKED = -1e30
_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer; hashable, so that equal configurations share compiled code.

    Attributes:
        vocab_size: number of tokens V.
        context: longest sequence T that the model reads.
        num_layers: number of layers.
        num_heads: heads a layer, H; a head has width K = D / H.
        d_model: width D of the residual stream.
        mlp_width: width F of the hidden layer of each MLP; 0 leaves the MLPs out.
        positions: "relative_bias" adds a learned b_{t−s} to each head's attention, which starts
            at −2^−h (t−s) for head h of layer 0 and at 0 above; "learned" adds a vector a
            position to the embedding; "none" adds nothing, and only the causal mask tells order.
        tied: read out with the embedding, R = Eᵀ/√D, which is then scaled up by √D at the input.
        dtype: what activations and matrix products are computed in. Weights, norms, softmax,
            logits and losses are float32 in any case.
    """

    vocab_size: int
    context: int
    num_layers: int
    num_heads: int
    d_model: int
    mlp_width: int = 0
    positions: Literal["relative_bias", "learned", "none"] = "relative_bias"
    tied: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "num_layers", "num_heads", "d_model"):
            check_count(name, getattr(self, name), minimum=1)
        check_count("mlp_width", self.mlp_width, minimum=0)
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model must be a multiple of num_heads, got {self.d_model} and {self.num_heads}"
            )
        if self.positions not in ("relative_bias", "learned", "none"):
            raise ValueError(
                f"positions must be 'relative_bias', 'learned' or 'none', got {self.positions!r}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")


def _linear(x_BxTxD: Array, w_DxF: Array) -> Array:
    """x W as one matrix product over all tokens.

    The gradient of a product with two token axes contracts both at once, which XLA's CPU backend
    runs at half the speed.
    """
    x_NxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
    return (x_NxD @ w_DxF.astype(x_NxD.dtype)).reshape(*x_BxTxD.shape[:-1], w_DxF.shape[-1])


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param[Array]:
    """Independent normal weights of mean 0."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape))


def _position_bias(bias_HxT: Array) -> Array:
    """b_{t−s} as a matrix [H, T, S], with the causal mask in it."""
    H, T = bias_HxT.shape
    table_HxT1 = jnp.concatenate([bias_HxT, jnp.full((H, 1), _MASKED, bias_HxT.dtype)], axis=1)
    back_TxS = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    return table_HxT1[:, jnp.where(back_TxS >= 0, back_TxS, T)]


class RMSNorm(nnx.Module):
    """x / √(mean x² + 1e-6) times a scale, in float32."""

    def __init__(self, d_model: int) -> None:
        self.scale = nnx.Param(jnp.ones(d_model))

    def __call__(self, x_BxTxD: Residual) -> Residual:
        x = x_BxTxD.astype(jnp.float32)
        inverse_BxTx1 = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _NORM_EPSILON)
        return (x * inverse_BxTx1 * self.scale[None, None]).astype(x_BxTxD.dtype)


class Attention(nnx.Module):
    """Causal attention, one slice of each weight a head."""

    def __init__(self, config: TransformerConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        H, D = config.num_heads, config.d_model
        K = D // H
        self.q = _normal(rngs, (H, D, K), D**-0.5)
        self.k = _normal(rngs, (H, D, K), D**-0.5)
        self.v = _normal(rngs, (H, D, K), D**-0.5)
        self.o = _normal(rngs, (H, K, D), (D * _num_writes(config)) ** -0.5)
        slope_H = 2.0 ** -np.arange(H) if layer == 0 else np.zeros(H)
        bias_HxT = (-slope_H[:, None] * np.arange(config.context)).astype(np.float32)
        relative = config.positions == "relative_bias"
        self.bias = nnx.Param(jnp.asarray(bias_HxT)) if relative else None

    def __call__(self, x_BxTxD: Residual) -> tuple[Residual, Pattern]:
        B, T, D = x_BxTxD.shape
        H, _, K = self.q.shape
        w_3HxDxK = jnp.concatenate([self.q[...] * K**-0.5, self.k[...], self.v[...]])
        w_Dx3HK = w_3HxDxK.transpose(1, 0, 2).reshape(D, 3 * H * K)
        qkv_BxTx3xHxK = _linear(x_BxTxD, w_Dx3HK).reshape(B, T, 3, H, K)
        q_BxHxTxK, k_BxHxSxK, v_BxHxSxK = qkv_BxTx3xHxK.transpose(2, 0, 3, 1, 4)

        bias_HxT = jnp.zeros((1, T)) if self.bias is None else self.bias[:, :T]
        logit_BxHxTxS = jnp.einsum("bhtk,bhsk->bhts", q_BxHxTxK, k_BxHxSxK)
        logit_BxHxTxS = logit_BxHxTxS.astype(jnp.float32) + _position_bias(bias_HxT)[None]
        top_BxHxTx1 = jax.lax.stop_gradient(jnp.max(logit_BxHxTxS, axis=-1, keepdims=True))
        e_BxHxTxS = jnp.exp(logit_BxHxTxS - top_BxHxTx1)
        sum_BxHxTx1 = jnp.sum(e_BxHxTxS, axis=-1, keepdims=True)

        # a = e / sum; dividing after the mixing costs K divisions a row and not S.
        mixed_BxHxTxK = jnp.einsum("bhts,bhsk->bhtk", e_BxHxTxS.astype(x_BxTxD.dtype), v_BxHxSxK)
        mixed_BxHxTxK = mixed_BxHxTxK / sum_BxHxTx1.astype(x_BxTxD.dtype)
        mixed_BxTxHK = mixed_BxHxTxK.transpose(0, 2, 1, 3).reshape(B, T, H * K)
        return _linear(mixed_BxTxHK, self.o[...].reshape(H * K, D)), e_BxHxTxS / sum_BxHxTx1


class MLP(nnx.Module):
    """gelu(x U) D, with the tanh form of gelu."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        D, F = config.d_model, config.mlp_width
        self.up = _normal(rngs, (D, F), D**-0.5)
        self.down = _normal(rngs, (F, D), (F * _num_writes(config)) ** -0.5)

    def __call__(self, x_BxTxD: Residual) -> Residual:
        return _linear(jax.nn.gelu(_linear(x_BxTxD, self.up[...])), self.down[...])


def _num_writes(config: TransformerConfig) -> int:
    """How many sublayers add to the residual stream; each starts at that share of its variance."""
    return config.num_layers * (2 if config.mlp_width else 1)


class Layer(nnx.Module):
    """Attention and, if it has a width, an MLP; each reads a normed residual stream."""

    def __init__(self, config: TransformerConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        self.attn_norm = RMSNorm(config.d_model)
        self.attn = Attention(config, layer, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model) if config.mlp_width else None
        self.mlp = MLP(config, rngs=rngs) if config.mlp_width else None

    def __call__(self, x_BxTxD: Residual) -> tuple[Residual, Pattern]:
        out_BxTxD, a_BxHxTxS = self.attn(self.attn_norm(x_BxTxD))
        x_BxTxD = x_BxTxD + out_BxTxD
        if self.mlp is not None and self.mlp_norm is not None:
            x_BxTxD = x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))
        return x_BxTxD, a_BxHxTxS


class Transformer(nnx.Module):
    """The model as a module; `init` and `make_loss_fn` turn it into pure functions."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        V, D = config.vocab_size, config.d_model
        self.config = config
        self.embed = _normal(rngs, (V, D), D**-0.5 if config.tied else 1.0)
        learned = config.positions == "learned"
        self.positions = _normal(rngs, (config.context, D), 0.5) if learned else None
        self.layers = nnx.Dict(
            {str(i): Layer(config, i, rngs=rngs) for i in range(config.num_layers)}
        )
        self.final_norm = RMSNorm(D)
        # Logits of variance 1/D: a new model spreads its bets, with losses near log V.
        self.unembed = None if config.tied else _normal(rngs, (D, V), 1.0 / D)

    def states(self, tokens_BxT: Tokens) -> tuple[list[Residual], list[Pattern]]:
        """The residual stream before each layer and after the last, and the patterns."""
        config = self.config
        length = tokens_BxT.shape[1]
        if length > config.context:
            raise ValueError(
                f"tokens must be at most context = {config.context} positions, got {length}"
            )
        x_BxTxD = self.embed[...][tokens_BxT]
        if self.unembed is None:
            x_BxTxD = x_BxTxD * config.d_model**0.5
        if self.positions is not None:
            x_BxTxD = x_BxTxD + self.positions[None, :length]
        x_BxTxD = x_BxTxD.astype(config.dtype)
        states, patterns = [x_BxTxD], []
        for i in range(config.num_layers):
            x_BxTxD, a_BxHxTxS = self.layers[str(i)](x_BxTxD)
            states.append(x_BxTxD)
            patterns.append(a_BxHxTxS)
        return states, patterns

    def __call__(self, tokens_BxT: Tokens) -> tuple[Logits, list[Pattern]]:
        states, patterns = self.states(tokens_BxT)
        x_BxTxD = self.final_norm(states[-1].astype(jnp.float32))
        if self.unembed is None:
            r_DxV = self.embed[...].T * self.config.d_model**-0.5
        else:
            r_DxV = self.unembed[...]
        return _linear(x_BxTxD, r_DxV), patterns


def split_params(model: nnx.Module) -> tuple[nnx.GraphDef[Any], Params]:
    """A flax model as its structure and a plain nested dict of weights.

    Args:
        model: any nnx module whose only state is parameters.

    Returns:
        The graph definition, hashable, and the weights; `nnx.merge` joins them again.

    Raises:
        ValueError: if the model holds other state (dropout keys, batch statistics), which a pure
            loss could neither keep nor update.
    """
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states
    left = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]
    if left:
        raise ValueError(f"model must hold parameters only, got other state at {left}")
    return graphdef, nnx.to_pure_dict(params)


@functools.lru_cache
def _graphdef(config: TransformerConfig) -> nnx.GraphDef[Any]:
    """The structure of the model; costs no arrays."""
    return split_params(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]


def _model(config: TransformerConfig, params: Params) -> Transformer:
    """The module that holds these weights."""
    return cast(Transformer, nnx.merge(_graphdef(config), params))


def _forward(
    config: TransformerConfig, params: Params, tokens: Tokens
) -> tuple[Logits, list[Pattern]]:
    """Logits and attention patterns; what is not used is not computed under jit."""
    return _model(config, params)(tokens)


def init(key: Array, config: TransformerConfig) -> Params:
    """Random weights of a new model.

    E ~ N(0, 1) (1/D if tied), q, k, v ~ N(0, 1/D), R ~ N(0, 1/D²), and what writes to the
    residual stream ~ N(0, 1 / (fan-in · number of writes)): losses start near log V.

    Args:
        key: typed random key.
        config: shape of the model.

    Returns:
        A nested dict of float32 arrays, with `embed` [V, D], `unembed` [D, V] unless tied,
        `positions` [context, D] if learned, `final_norm/scale` [D], and for each layer i
        `layers/i/attn/{q,k,v}` [H, D, K], `layers/i/attn/o` [H, K, D], `layers/i/attn/bias`
        [H, context] if relative, `layers/i/attn_norm/scale` [D], and with an MLP
        `layers/i/mlp_norm/scale` [D], `layers/i/mlp/up` [D, F], `layers/i/mlp/down` [F, D].
    """
    check_key(key)
    return split_params(Transformer(config, rngs=nnx.Rngs(params=key)))[1]


@dataclass(frozen=True)
class NextTokenLoss:
    """ℓ_t = logsumexp(z_t) − z_t[token_{t+1}], a pure function of weights and tokens.

    Equal configurations give equal functions, so a compiled program is found again.
    """

    config: TransformerConfig

    def __call__(self, params: Params, tokens: Int[Array, "B length"]) -> Float[Array, "B T"]:
        """The loss of each next token.

        Args:
            params: weights, as `init` gives them.
            tokens: `[B, T+1]`, with T at most the context.

        Returns:
            Losses `[B, T]` in nats, float32; entry t is that of token t + 1. A token outside the
            vocabulary gives NaN where it is the target.
        """
        logits_BxTxV, _ = _forward(self.config, params, tokens[:, :-1])
        target_BxTx1 = tokens[:, 1:, None]
        target_logit_BxT = jnp.take_along_axis(logits_BxTxV, target_BxTx1, axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BxTxV, axis=-1) - target_logit_BxT


def make_loss_fn(config: TransformerConfig) -> NextTokenLoss:
    """The next-token loss of a model: `loss_fn(params, tokens[B, T+1]) -> losses[B, T]`."""
    return NextTokenLoss(config)


def logits(params: Params, tokens: Tokens, *, config: TransformerConfig) -> Logits:
    """Next-token logits z `[B, T, V]` of tokens `[B, T]`, float32."""
    return _forward(config, params, tokens)[0]


def attention_patterns(
    params: Params, tokens: Tokens, *, config: TransformerConfig
) -> Float[Array, "layer B H T S"]:
    """Attention a_ts of every head, `[layer, B, H, T, T]`; rows sum to 1 over the last axis."""
    return jnp.stack(_forward(config, params, tokens)[1])


def residual_states(
    params: Params, tokens: Tokens, *, config: TransformerConfig
) -> Float[Array, "state B T D"]:
    """The residual stream x⁰ … xᴸ before each layer and after the last, `[L + 1, B, T, D]`.

    Float32, before any norm; state t has read the tokens up to t.
    """
    return jnp.stack(_model(config, params).states(tokens)[0]).astype(jnp.float32)
