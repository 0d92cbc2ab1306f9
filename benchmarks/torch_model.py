"""The transformer of `jaxpattern.models` in torch, and its weights carried over both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from jaxpattern.models.transformer import NextTokenLoss, TransformerConfig, logits

torch.set_num_threads(1)


class Block(nn.Module):
    """Attention and MLP; queries, keys and values are one product, as in GPT-2."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, heads = config.d_model, config.num_heads
        self.attn_norm = nn.Parameter(torch.empty(width))
        self.qkv = nn.Parameter(torch.empty(width, 3, heads, width // heads))
        self.o = nn.Parameter(torch.empty(heads, width // heads, width))
        self.mlp_norm = nn.Parameter(torch.empty(width))
        self.up = nn.Parameter(torch.empty(width, config.mlp_width))
        self.down = nn.Parameter(torch.empty(config.mlp_width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = F.rms_norm(x, (width,), self.attn_norm, 1e-6)
        qkv = (y @ self.qkv.reshape(width, -1)).view(batch, length, *self.qkv.shape[1:])
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(batch, length, width) @ self.o.reshape(-1, width)
        y = F.rms_norm(x, (width,), self.mlp_norm, 1e-6)
        return x + F.gelu(y @ self.up, approximate="tanh") @ self.down


class Transformer(nn.Module):
    """A model with learned positions, an MLP and a readout of its own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.positions == "learned"
        assert config.mlp_width
        assert not config.tied
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.positions = nn.Parameter(torch.empty(config.context, config.d_model))
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_norm = nn.Parameter(torch.empty(config.d_model))
        self.unembed = nn.Parameter(torch.empty(config.d_model, config.vocab_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed[tokens] + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.rms_norm(x, (x.shape[-1],), self.final_norm, 1e-6) @ self.unembed


def losses(model: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The loss of each next token, [B, T] of tokens [B, T + 1]."""
    scores = model(tokens[:, :-1])
    flat = F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


def to_torch(params: Any, config: TransformerConfig) -> Transformer:
    """The torch model with these weights."""
    state = {
        "embed": params["embed"],
        "positions": params["positions"],
        "final_norm": params["final_norm"]["scale"],
        "unembed": params["unembed"],
    }
    for i, layer in params["layers"].items():
        attn = layer["attn"]
        qkv = jnp.stack([attn[name] for name in "qkv"]).transpose(2, 0, 1, 3)
        state |= {
            f"layers.{i}.attn_norm": layer["attn_norm"]["scale"],
            f"layers.{i}.qkv": qkv,
            f"layers.{i}.o": attn["o"],
            f"layers.{i}.mlp_norm": layer["mlp_norm"]["scale"],
            f"layers.{i}.up": layer["mlp"]["up"],
            f"layers.{i}.down": layer["mlp"]["down"],
        }
    model = Transformer(config)
    model.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in state.items()})
    return model


def from_torch(model: Transformer) -> Any:
    """The weights of a torch model, as `transformer.init` names them."""
    state = {name: jnp.asarray(x.numpy(force=True)) for name, x in model.state_dict().items()}

    def layer(i: int) -> dict[str, Any]:
        q, k, v = state[f"layers.{i}.qkv"].transpose(1, 2, 0, 3)
        mlp = {name: state[f"layers.{i}.{name}"] for name in ("up", "down")}
        return {
            "attn": {"q": q, "k": k, "v": v, "o": state[f"layers.{i}.o"]},
            "attn_norm": {"scale": state[f"layers.{i}.attn_norm"]},
            "mlp": mlp,
            "mlp_norm": {"scale": state[f"layers.{i}.mlp_norm"]},
        }

    return {
        "embed": state["embed"],
        "positions": state["positions"],
        "layers": {str(i): layer(i) for i in range(len(model.layers))},
        "final_norm": {"scale": state["final_norm"]},
        "unembed": state["unembed"],
    }


def head_masks(model: Transformer, name: str) -> dict[str, torch.Tensor]:
    """The weights of one head, such as l1h0, as devinterp takes them."""
    layer, head = name[1:].split("h")
    masks = {}
    for part, where in (("qkv", (slice(None), slice(None), int(head))), ("o", (int(head),))):
        mask = torch.zeros_like(model.get_parameter(f"layers.{layer}.{part}"), dtype=torch.bool)
        mask[where] = True
        masks[f"layers.{layer}.{part}"] = mask
    return masks


def check_port(loss_fn: NextTokenLoss, params: Any, tokens: jax.Array) -> tuple[float, float]:
    """Largest difference of logits and of losses between the two, carried over and back again.

    Raises:
        AssertionError: the weights do not come back as they were, or ours are further from what
            torch computes in float64 than 1e-5, and than twice what torch is off in float32.
    """
    model = to_torch(params, loss_fn.config)
    back = from_torch(model)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), back, params)
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)

    def in_torch() -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return model(ids[:, :-1]).numpy(), losses(model, ids).numpy()

    ours = logits(back, tokens[:, :-1], config=loss_fn.config), loss_fn(back, tokens)
    theirs = in_torch()
    model.double()
    worst = []
    for mine, other, exact in zip(ours, theirs, in_torch(), strict=True):
        off, rounding = (float(np.abs(np.asarray(x) - exact).max()) for x in (mine, other))
        assert off <= max(1e-5, 2 * rounding), f"ours is off by {off}, torch by {rounding}"
        worst.append(float(np.abs(np.asarray(mine) - other).max()))
    return worst[0], worst[1]
