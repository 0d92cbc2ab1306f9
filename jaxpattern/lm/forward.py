"""One forward pass for all families: a scan over stacked layers.

    x⁰_t   = c E[token_t]                                       (+ P_t with learned positions)
    aˡʰ_ts = softmax_s( σˡ R_t q_t · R_s k_s ),  s ≤ t < s + windowˡ,  q, k, v = norm(x) W + b
    y_t    = xˡ_t + Σ_h ( Σ_s aˡʰ_ts vˡʰ_s ) Oˡʰ + b
    xˡ⁺¹_t = y_t + mlp(norm(y_t)),          or  y_t + mlp(norm(xˡ_t))  where both are parallel
    z_t    = norm(xᴸ_t) U

R turns the first pairs of a head by the angles of its position. With grouped queries several heads
share a key and a value. Norms, softmax and logits are float32; products are computed in the dtype
of the parameters.

Names end in their axes: B batch, T position, S position attended to, N = B·T, H head, G key/value
head, D width of the residual stream, K width of a head, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpattern.lm.patches import Entry, Weight, into_heads, of_layer, out_of_heads, patched
from jaxpattern.lm.spec import Spec
from jaxpattern.types import Params

_MASKED = -1e30
_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def embed(
    spec: Spec, params: Params, tokens: Int[Array | np.ndarray, "B T"]
) -> Float[Array, "B T D"]:
    """The residual stream before the first layer; tokens outside the vocabulary are 0."""
    outer = params["embed"]
    # Negative indices would count from the end.
    index = jnp.where(tokens < 0, spec.vocab_size, tokens)
    x_BxTxD = outer["W_E"].at[index].get(mode="fill", fill_value=0)
    x_BxTxD = x_BxTxD * jnp.asarray(spec.embed_scale, x_BxTxD.dtype)
    if "W_pos" in outer:
        x_BxTxD = x_BxTxD + outer["W_pos"][None, : tokens.shape[1]]
    return x_BxTxD


def run_layers(
    spec: Spec,
    layers: Params,
    x_BxTxD: Float[Array, "B T D"],
    *,
    first: int = 0,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """The residual stream after the given layers, of which the first is number `first`.

    Args:
        spec: the computation.
        layers: stacked parameters of consecutive layers.
        x_BxTxD: residual stream before them.
        first: number of the first of them, for what differs from layer to layer.
        remat: keep the residual stream only, and compute the rest of a layer again for derivatives.
    """
    leaves, tree = jax.tree.flatten(layers)
    made = [patched(leaf) for leaf in leaves]
    num = leaves[0].shape[0]
    tables = _rotations(spec, x_BxTxD.shape[1], x_BxTxD.dtype)
    own = slice(first, first + num)
    differing = (
        np.arange(num, dtype=np.int32),
        np.asarray(spec.windows[own], np.int32),
        np.asarray(spec.scales[own], np.float32),
        np.asarray(spec.rope_of_layer[own] or (0,) * num, np.int32),
    )

    def layer(
        x_BxTxD: Array, bases: list[Array], entries: list[tuple[Entry, ...]], numbers: Any
    ) -> Array:
        index, window, scale, kind = numbers
        weights = [of_layer(base, own, index) for base, own in zip(bases, entries, strict=True)]
        rotation = None if tables is None else jax.tree.map(lambda table: table[kind], tables)
        return _layer(spec, jax.tree.unflatten(tree, weights), x_BxTxD, window, scale, rotation)

    policy = None if remat else _kept
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

    def step(x_BxTxD: Array, xs: Any) -> tuple[Array, None]:
        return layer(x_BxTxD, xs[0], [own.entries for own in made], xs[1]), None

    bases = [own.base for own in made]
    return jax.lax.scan(step, x_BxTxD, (bases, jax.tree.map(jnp.asarray, differing)))[0]


def _kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """What a layer keeps for its derivative: all but choices between arrays.

    A part is put into its layer by a choice; kept, it would be a copy of the layer per chain.
    """
    return primitive is not jax.lax.select_n_p


def read_out(spec: Spec, params: Params, x_BxTxD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits, float32."""
    x_BxTxD = _norm(spec, jax.tree.map(Weight, params["ln_final"]), x_BxTxD)
    B, T, D = x_BxTxD.shape
    u_DxV = params["embed"]["W_E"].T if spec.tied else params["unembed"]["W_U"]
    z_NxV = jnp.matmul(x_BxTxD.reshape(-1, D), u_DxV).astype(jnp.float32)
    if spec.logit_cap:
        z_NxV = spec.logit_cap * jnp.tanh(z_NxV / spec.logit_cap)
    return z_NxV.reshape(B, T, -1)


def _layer(
    spec: Spec, weights: Any, x_BxTxD: Array, window: Array, scale: Array, rotation: Any
) -> Array:
    out_BxTxD = _attention(
        spec, weights["attn"], _norm(spec, weights["ln1"], x_BxTxD), window, scale, rotation
    )
    if "ln1_post" in weights:
        out_BxTxD = _norm(spec, weights["ln1_post"], out_BxTxD)
    y_BxTxD = x_BxTxD + out_BxTxD
    read_BxTxD = x_BxTxD if spec.parallel else y_BxTxD
    out_BxTxD = _mlp(spec, weights["mlp"], _norm(spec, weights["ln2"], read_BxTxD))
    if "ln2_post" in weights:
        out_BxTxD = _norm(spec, weights["ln2_post"], out_BxTxD)
    return y_BxTxD + out_BxTxD


def _norm(spec: Spec, weights: Any, x: Array) -> Array:
    """(x − mean) / √(var + ε) w + b, or x / √(mean x² + ε) w, over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    if spec.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + spec.epsilon)
    shape = (1,) * (x.ndim - 1) + (-1,)
    wide = wide * (weights["w"].base.astype(jnp.float32) + spec.norm_offset).reshape(shape)
    if "b" in weights:
        wide = wide + weights["b"].base.astype(jnp.float32).reshape(shape)
    return wide.astype(x.dtype)


def _attention(
    spec: Spec, weights: Any, x_BxTxD: Array, window: Array, scale: Array, rotation: Any
) -> Array:
    B, T, D = x_BxTxD.shape
    G, R, K = spec.num_kv_heads, spec.group_size, spec.d_head
    x_NxD = x_BxTxD.reshape(-1, D)

    def heads(name: str) -> Array:
        y_NxHxK = into_heads(x_NxD, weights[f"W_{name}"])
        if f"b_{name}" in weights:
            y_NxHxK = y_NxHxK + weights[f"b_{name}"].base[None]
        return y_NxHxK.reshape(B, T, -1, K)

    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK = heads("Q"), heads("K"), heads("V")
    if "q_norm" in weights:
        q_BxTxHxK = _norm(spec, {"w": weights["q_norm"]}, q_BxTxHxK)
        k_BxTxGxK = _norm(spec, {"w": weights["k_norm"]}, k_BxTxGxK)
    if rotation is not None:
        q_BxTxHxK, k_BxTxGxK = (_rotate(y, rotation) for y in (q_BxTxHxK, k_BxTxGxK))

    q_BxTxGxRxK = q_BxTxHxK.reshape(B, T, G, R, K)
    logit_BxGxRxTxS = jnp.einsum("btgrk,bsgk->bgrts", q_BxTxGxRxK, k_BxTxGxK)
    logit_BxGxRxTxS = logit_BxGxRxTxS.astype(jnp.float32) * scale
    back_TxS = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    seen_TxS = (back_TxS >= 0) & (back_TxS < window)
    logit_BxGxRxTxS = jnp.where(seen_TxS[None, None, None], logit_BxGxRxTxS, _MASKED)
    a_BxGxRxTxS = jax.nn.softmax(logit_BxGxRxTxS, axis=-1).astype(x_BxTxD.dtype)
    z_BxTxGxRxK = jnp.einsum("bgrts,bsgk->btgrk", a_BxGxRxTxS, v_BxTxGxK)
    out_NxD = out_of_heads(z_BxTxGxRxK.reshape(B * T, G * R, K), weights["W_O"])
    if "b_O" in weights:
        out_NxD = out_NxD + weights["b_O"].base[None]
    return out_NxD.reshape(B, T, D)


def _mlp(spec: Spec, weights: Any, x_BxTxD: Array) -> Array:
    """act(x U + b) W + b, or (act(x G) ⊙ x U) W."""
    act = _ACTIVATIONS[spec.activation]
    x_NxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])

    def product(x: Array, name: str) -> Array:
        y = x @ weights[f"W_{name}"].base
        return y + weights[f"b_{name}"].base[None] if f"b_{name}" in weights else y

    hidden_NxF = product(x_NxD, "in")
    hidden_NxF = act(product(x_NxD, "gate")) * hidden_NxF if spec.gated else act(hidden_NxF)
    return product(hidden_NxF, "out").reshape(x_BxTxD.shape)


def _rotations(spec: Spec, length: int, dtype: Any) -> Any:
    """Cosines and sines of every kind of rotary positions, `[kind, T, pairs]`."""
    if not spec.ropes:
        return None
    frequencies = np.asarray([rope.frequencies for rope in spec.ropes], np.float32)
    angles = jnp.arange(length, dtype=jnp.float32)[None, :, None] * frequencies[:, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _rotate(y_BxTxHxK: Array, rotation: tuple[Array, Array]) -> Array:
    """(a, b) → (a cos − b sin, b cos + a sin); a pair lies half the turned width apart."""
    cos, sin = (table[None, :, None, :] for table in rotation)
    width = cos.shape[-1]
    a, b, rest = (
        y_BxTxHxK[..., :width],
        y_BxTxHxK[..., width : 2 * width],
        y_BxTxHxK[..., 2 * width :],
    )
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
