"""A causal transformer that classifies sequences, and has no positions.

    xᴸ = layers of `jaxpattern.models.transformer` on E[token],  causal, without a position bias
    z  = max_t norm(xᴸ_t) · r + b,                                the maximum over each coordinate
    ℓ  = log(1 + e^{−z}) if the label is true, log(1 + e^{z}) if it is false

The maximum runs over the tokens that are not padding, which stands on the right, where causal
attention does not see it. With no positions a head that attends evenly measures shares: of "("
against ")" in a prefix, say, which is the depth of a string of brackets over its length so far.

Names end in their axes, as in `jaxpattern.models.transformer`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpattern.models.transformer import Layer, RMSNorm, TransformerConfig, split_params
from jaxpattern.types import Params
from jaxpattern.validation import check_key

PAD = 0
_LEAST = -1e30


class Classifier(nnx.Module):
    """The model as a module; `init`, `logit` and `make_loss_fn` turn it into pure functions."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        D = config.d_model
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, D)))
        self.layers = nnx.Dict(
            {str(i): Layer(config, i, rngs=rngs) for i in range(config.num_layers)}
        )
        self.final_norm = RMSNorm(D)
        self.read = nnx.Param(D**-0.5 * jax.random.normal(rngs.params(), (D,)))
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, tokens_BxT: Int[Array, "B T"]) -> Float[Array, " B"]:
        x_BxTxD = self.embed[...][tokens_BxT]
        for i in range(len(self.layers)):
            x_BxTxD, _ = self.layers[str(i)](x_BxTxD)
        seen_BxTx1 = (tokens_BxT != PAD)[..., None]
        x_BxD = jnp.max(jnp.where(seen_BxTx1, self.final_norm(x_BxTxD), _LEAST), axis=1)
        return x_BxD @ self.read[...] + self.bias[...]


def _check(config: TransformerConfig) -> None:
    if config.positions != "none" or config.tied or config.dtype != "float32":
        raise ValueError(
            "config must have positions='none', tied=False and dtype='float32', "
            f"got {config.positions!r}, {config.tied} and {config.dtype!r}"
        )


@functools.lru_cache
def _graphdef(config: TransformerConfig) -> nnx.GraphDef[Any]:
    """The structure of the model; costs no arrays."""
    _check(config)
    return split_params(nnx.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0))))[0]


def init(key: Array, config: TransformerConfig) -> Params:
    """Random weights of a new model.

    E ~ N(0, 1), r ~ N(0, 1/D), b = 0, and the layers as in `jaxpattern.models.transformer.init`.

    Args:
        key: typed random key.
        config: shape of the model, with `positions="none"`; its `context` bounds nothing here.

    Returns:
        A nested dict of float32 arrays: `embed` [V, D], `layers/...`, `final_norm/scale` [D],
        `read` [D], `bias` [].

    Raises:
        ValueError: the configuration has positions, is tied or not in float32.
    """
    check_key(key)
    _check(config)
    return split_params(Classifier(config, rngs=nnx.Rngs(params=key)))[1]


def logit(
    params: Params, tokens: Int[Array, "B T"], *, config: TransformerConfig
) -> Float[Array, " B"]:
    """z `[B]`: positive where the model says true. Token 0 is padding, on the right."""
    return cast(Classifier, nnx.merge(_graphdef(config), params))(tokens)


@dataclass(frozen=True)
class ClassificationLoss:
    """ℓ of `{"tokens": [B, T], "label": [B]}`, a pure function of weights and batch.

    Equal configurations give equal functions, so a compiled program is found again.
    """

    config: TransformerConfig

    def __call__(self, params: Params, batch: dict[str, Array]) -> Float[Array, " B"]:
        """The loss of each sequence in nats; labels are 0 or 1."""
        z_B = logit(params, batch["tokens"], config=self.config)
        return optax.sigmoid_binary_cross_entropy(z_B, batch["label"])


def make_loss_fn(config: TransformerConfig) -> ClassificationLoss:
    """The loss of a classifier: `loss_fn(params, {"tokens", "label"}) -> losses[B]`."""
    return ClassificationLoss(config)
