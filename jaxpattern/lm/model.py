"""A language model of one's own: a folder of Hugging Face as pure functions and a plain pytree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpattern.lm import checkpoint_files
from jaxpattern.lm.forward import embed, read_out, run_layers
from jaxpattern.lm.spec import Spec, read_spec
from jaxpattern.types import Params
from jaxpattern.validation import holds, is_concrete


@dataclass(frozen=True)
class Logits:
    """z `[B, T, V]` of tokens `[B, T]`; equal models give equal functions."""

    spec: Spec
    remat: bool = False

    def __call__(
        self, params: Params, tokens: Int[Array | np.ndarray, "B T"]
    ) -> Float[Array, "B T V"]:
        """Next-token logits, float32.

        Args:
            params: parameters, as `model.params`.
            tokens: `[B, T]`, T at most the positions of the model.

        Raises:
            TypeError: tokens are not integers.
            ValueError: tokens are not `[B, T]`, longer than the model's positions, or (where they
                can be looked at) outside the vocabulary.
        """
        return run(self, params, check_tokens(self.spec, tokens))

    def compute(self, params: Params, tokens: Array) -> Array:
        """Logits of tokens that are checked."""
        x_BxTxD = embed(self.spec, params, tokens)
        x_BxTxD = run_layers(self.spec, params["layers"], x_BxTxD, remat=self.remat)
        return read_out(self.spec, params, x_BxTxD)


@dataclass(frozen=True)
class NextTokenLoss:
    """ℓ_t = logsumexp(z_t) − z_t[token_{t+1}], a pure function of parameters and tokens."""

    spec: Spec
    remat: bool = False

    def __call__(
        self, params: Params, tokens: Int[Array | np.ndarray, "B T"]
    ) -> Float[Array, "B T-1"]:
        """The loss of each next token.

        Args:
            params: parameters, as `model.params`.
            tokens: `[B, T]`.

        Returns:
            Losses `[B, T − 1]` in nats, float32; entry t is that of token t + 1. Within a trace,
            where tokens cannot be looked at, a loss that has read or should predict a token
            outside the vocabulary is NaN; earlier ones are right, so padding may be any number.

        Raises:
            TypeError, ValueError: as `logits`.
        """
        return run(self, params, check_tokens(self.spec, tokens, least=2))

    def compute(self, params: Params, tokens: Array) -> Array:
        """Losses of tokens that are checked."""
        z_BxTxV = Logits(self.spec, self.remat).compute(params, tokens[:, :-1])
        return token_losses(self.spec, z_BxTxV, tokens)


def run(function: Any, params: Params, data: Any) -> Array:
    """`function.compute` as it is within a trace, and as one program outside of any.

    A scan outside of `jit` is compiled anew at every call; within a trace a `jit` of its own would
    hide from the layers what a restriction has written (`patches`).
    """
    if all(map(is_concrete, jax.tree.leaves((params, data)))):
        return _compiled(function, params, data)
    return function.compute(params, data)


@partial(jax.jit, static_argnums=0)
def _compiled(function: Any, params: Params, data: Any) -> Array:
    return function.compute(params, data)


def token_losses(
    spec: Spec, z_BxTxV: Float[Array, "B T V"], tokens: Int[Array | np.ndarray, "B T+1"]
) -> Float[Array, "B T"]:
    """Losses of next tokens from the logits of all tokens but the last."""
    target_BxTx1 = jnp.clip(tokens[:, 1:, None], 0, spec.vocab_size - 1)
    target_logit_BxT = jnp.take_along_axis(z_BxTxV, target_BxTx1, axis=-1)[..., 0]
    losses_BxT = jax.nn.logsumexp(z_BxTxV, axis=-1) - target_logit_BxT
    strange_BxT = jnp.cumsum((tokens < 0) | (tokens >= spec.vocab_size), axis=1)[:, 1:] > 0
    return jnp.where(strange_BxT, jnp.nan, losses_BxT)


def check_tokens(spec: Spec, tokens: Any, *, least: int = 1) -> Array:
    """Integers `[B, T]` in the vocabulary, not longer than the positions."""
    if not hasattr(tokens, "dtype") or not jnp.issubdtype(tokens.dtype, jnp.integer):
        kind = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"tokens must be an array of integers, got {kind}")
    if tokens.ndim != 2 or tokens.shape[1] < least:
        raise ValueError(f"tokens must be [B, T], T at least {least}, got {list(tokens.shape)}")
    if tokens.shape[1] > spec.context:
        raise ValueError(
            f"tokens must be at most {spec.context} positions long, as {spec.family} reads them, "
            f"got {tokens.shape[1]}"
        )
    if not holds(lambda t: ((t >= 0) & (t < spec.vocab_size)).all(), tokens):
        raise ValueError(
            f"tokens must be in the vocabulary, 0 to {spec.vocab_size - 1}, "
            f"got {np.min(tokens)} to {np.max(tokens)}"
        )
    return jnp.asarray(tokens)


@dataclass(frozen=True, eq=False)
class Model:
    """A language model: parameters, and pure functions of parameters and tokens.

    Attributes:
        spec: what it computes.
        params: nested dict of arrays. `embed/W_E` [V, D], `embed/W_pos` [T, D], `ln_final/*` [D],
            `unembed/W_U` [D, V] unless tied, and stacked over layers `layers/attn/W_Q`
            [L, H, D, K], `layers/attn/W_K` and `W_V` [L, G, D, K], `layers/attn/W_O` [L, H, K, D],
            `layers/mlp/W_in` and `W_gate` [L, D, F], `layers/mlp/W_out` [L, F, D], biases `b_*` and
            norms `layers/ln1/w` [L, D]; what a family does not have is not there.
        config: content of its `config.json`.
        names: our name of each tensor → its name in the file.
        source: the folder it came from.
        remat: whether derivatives compute layers again instead of keeping what they need.
    """

    spec: Spec
    params: Params = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    source: Path | None = field(repr=False, default=None)
    remat: bool = False

    @property
    def first_layer(self) -> int:
        """The number of the first layer in `params`."""
        return 0

    @property
    def logits(self) -> Logits:
        """`logits(params, tokens[B, T]) -> [B, T, V]`."""
        return Logits(self.spec, self.remat)

    @property
    def loss_fn(self) -> NextTokenLoss:
        """`loss_fn(params, tokens[B, T]) -> [B, T − 1]`."""
        return NextTokenLoss(self.spec, self.remat)

    def __str__(self) -> str:
        spec = self.spec
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        shared = "" if spec.group_size == 1 else f" on {spec.num_kv_heads} keys and values"
        return (
            f"{spec.family}: {count:,} parameters, {spec.num_layers} layers of "
            f"{spec.num_heads} heads{shared}, width {spec.d_model}, vocabulary "
            f"{spec.vocab_size:,}, {spec.context:,} positions"
        )


def load(folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, remat: bool = False) -> Model:
    """A model from a folder of Hugging Face: `config.json` and safetensors.

    Families: GPT-2, GPT-NeoX (Pythia), Llama (SmolLM), Mistral, Qwen2, Qwen3, Gemma 3 (text).

    Args:
        folder: where they are.
        dtype: of the parameters, and of matrix products: float32, bfloat16 or float16. Losses are
            float32 in any case.
        remat: compute layers again for derivatives, keeping only the residual stream between them:
            about a third more time, and the memory of one layer instead of all.

    Returns:
        A `Model`.

    Raises:
        ImportError: safetensors is not installed (the extra `hub`).
        TypeError: `dtype` is not a floating-point type of at least 16 bits.
        ValueError: a file is missing, not whole, or pickled; the family or a setting is not known;
            a tensor is missing, of another shape, not finite, quantized, or has no place.
    """
    kind = _check_dtype(dtype)
    path = Path(folder)
    config = checkpoint_files.read_config(path)
    spec = read_spec(config)
    params, names = checkpoint_files.read_params(path, config, spec, kind)
    return Model(spec, params, config, names, path, remat)


def abstract(
    config: Mapping[str, Any] | str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """A model of shapes, to be compiled for what it needs before there is memory for it.

        program = jax.jit(jax.grad(loss)).lower(model.params, tokens).compile()
        program.memory_analysis()

    Args:
        config: content of a `config.json`, or a folder that holds one. No parameters are read.
        dtype, remat: as `load`.

    Returns:
        A `Model` whose parameters are `jax.ShapeDtypeStruct`; parts have names as those of `load`.

    Raises:
        TypeError, ValueError: as `load`.
    """
    kind = _check_dtype(dtype)
    if not isinstance(config, Mapping):
        config = checkpoint_files.read_config(Path(config))
    spec = read_spec(config)
    params = checkpoint_files.param_shapes(config, spec, kind)
    return Model(spec, params, config, {}, None, remat)


def save(model: Model, folder: str | os.PathLike[str], params: Params | None = None) -> None:
    """Write a folder that `from_pretrained` of transformers and `load` read.

    Tensors are written in the dtype of the parameters, under the names they were read by; a
    tokenizer beside the source comes along.

    Args:
        model: from `load`.
        folder: where to; made if it is not there.
        params: parameters to write; the model's by default.

    Raises:
        TypeError: `model` is not from `load`.
        ValueError: `params` do not have the structure and shapes of the model's.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model must come from jaxpattern.lm.load, got {type(model).__name__}")
    params = model.params if params is None else params
    wanted, given = (jax.tree.map(jnp.shape, tree) for tree in (model.params, params))
    if wanted != given:
        raise ValueError("params must have the structure and shapes of model.params")
    checkpoint_files.write_folder(
        Path(folder), params, model.spec, model.config, model.names, model.source
    )


def _check_dtype(dtype: Any) -> np.dtype:
    kind = np.dtype(dtype)
    wide = [jnp.float64] if jax.config.read("jax_enable_x64") else []
    if kind not in [np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16, *wide)]:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {kind}")
    return kind
