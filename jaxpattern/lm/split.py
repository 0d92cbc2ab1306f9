"""The upper layers of a model as a model of its own, on cached residual streams.

Where only upper layers move, the layers below compute the same numbers at every step. The tail of
a model has them as its data, so nothing below is computed or differentiated again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpattern.lm.forward import embed, read_out, run_layers
from jaxpattern.lm.model import Model, check_tokens, run, token_losses
from jaxpattern.lm.spec import Spec
from jaxpattern.types import Params
from jaxpattern.validation import check_count


class Residuals(NamedTuple):
    """The residual stream before a layer, and the tokens it was made of.

    Attributes:
        residual: of all tokens but the last, in the dtype of the parameters.
        tokens: all of them.
    """

    residual: Float[Array, "B T D"]
    tokens: Int[Array, "B T+1"]


@dataclass(frozen=True)
class TailLoss:
    """Losses of next tokens from a residual stream; equal tails give equal functions."""

    spec: Spec
    layer: int
    remat: bool = False

    def __call__(self, params: Params, data: Residuals) -> Float[Array, "B T"]:
        """The loss of each next token.

        Args:
            params: as `tail.params`.
            data: as `tail.data(tokens)`, or samples of it.

        Returns:
            What `model.loss_fn` gives on the same tokens.
        """
        return run(self, params, data)

    def compute(self, params: Params, data: Residuals) -> Array:
        """Losses, without a look at the data."""
        x_BxTxD = run_layers(
            self.spec, params["layers"], data.residual, first=self.layer, remat=self.remat
        )
        return token_losses(self.spec, read_out(self.spec, params, x_BxTxD), data.tokens)


@dataclass(frozen=True, eq=False)
class Tail:
    """The layers of a model from one on; its components keep the names that they have there.

    Attributes:
        model: the whole model.
        first_layer: the first layer of the tail.
        params: its parameters: layers, final norm and read-out.
    """

    model: Model = field(repr=False)
    first_layer: int
    params: Params = field(repr=False)

    @property
    def spec(self) -> Spec:
        """What the whole model computes."""
        return self.model.spec

    @property
    def loss_fn(self) -> TailLoss:
        """`loss_fn(params, tail.data(tokens)) -> [B, T − 1]`."""
        return TailLoss(self.spec, self.first_layer, self.model.remat)

    def data(
        self, tokens: Int[Array | np.ndarray, "B T"], *, chunk: int | None = None
    ) -> Residuals:
        """The residual stream before the tail, computed once.

        Args:
            tokens: `[B, T]`.
            chunk: sequences computed at a time, by default all.

        Returns:
            `Residuals`, whose leading axis is that of the tokens.

        Raises:
            TypeError, ValueError: as `model.loss_fn`.
        """
        tokens = check_tokens(self.spec, tokens, least=2)
        if chunk is not None:
            check_count("chunk", chunk, minimum=1)
        residual = _below(self.spec, self.first_layer, chunk, self.model.params, tokens[:, :-1])
        return Residuals(residual, tokens)

    def merge(self, params: Params) -> Params:
        """Parameters of the whole model with those of the tail in their place.

        Args:
            params: as `tail.params`.

        Returns:
            As `model.params`.
        """
        whole = self.model.params
        layers = jax.tree.map(
            lambda old, new: old.at[self.first_layer :].set(new), whole["layers"], params["layers"]
        )
        return {
            **whole,
            **params,
            "layers": layers,
            "embed": {**whole["embed"], **params.get("embed", {})},
        }


def split(model: Model, layer: int) -> Tail:
    """The model from a layer on: `tail.params`, `tail.loss_fn`, `tail.data(tokens)`.

    Losses and gradients of what lies in the tail are those of the whole model. With tied weights
    the read-out of the tail is a copy of the embedding: moved there, it is not moved below.

    Args:
        model: from `load`.
        layer: the first layer of the tail, 0 to L − 1.

    Raises:
        TypeError: `model` is not from `load`, or `layer` is no integer.
        ValueError: there is no such layer.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model must come from jaxpattern.lm.load, got {type(model).__name__}")
    check_count("layer", layer, minimum=0)
    if layer >= model.spec.num_layers:
        raise ValueError(f"layer must be below {model.spec.num_layers}, got {layer}")
    params = {k: v for k, v in model.params.items() if k != "embed"}
    params["layers"] = jax.tree.map(lambda leaf: leaf[layer:], params["layers"])
    if model.spec.tied:
        params["embed"] = {"W_E": model.params["embed"]["W_E"]}
    return Tail(model, int(layer), params)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _below(spec: Spec, layer: int, chunk: int | None, params: Params, tokens: Array) -> Array:
    layers = jax.tree.map(lambda leaf: leaf[:layer], params["layers"])

    def residual(tokens_T: Array) -> Array:
        x_BxTxD = embed(spec, params, tokens_T[None])
        return run_layers(spec, layers, x_BxTxD)[0]

    return jax.lax.map(residual, tokens, batch_size=chunk or tokens.shape[0])
