"""The classifier of sequences: what it sees, against a direct NumPy computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpattern.models import classifier
from jaxpattern.models.transformer import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=5, context=8, num_layers=1, num_heads=2, d_model=4, mlp_width=6, positions="none"
)
TOKENS = np.array([[3, 1, 2, 4, 0, 0], [3, 1, 1, 2, 2, 4]], np.int32)


@pytest.fixture(scope="module")
def params():
    return classifier.init(jax.random.key(0), CONFIG)


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def by_hand(params, tokens):
    """One string without its padding, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layer = p["layers"]["0"]
    x = p["embed"][tokens]
    read = norm(x, layer["attn_norm"]["scale"])
    for h in range(2):
        q, k, v = (read @ layer["attn"][name][h] for name in "qkv")
        for t in range(len(tokens)):
            e = np.exp(q[t] @ k[: t + 1].T / np.sqrt(2))
            x[t] += (e / e.sum()) @ v[: t + 1] @ layer["attn"]["o"][h]
    hidden = norm(x, layer["mlp_norm"]["scale"]) @ layer["mlp"]["up"]
    gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    x = norm(x + gelu @ layer["mlp"]["down"], p["final_norm"]["scale"])
    return x.max(axis=0) @ p["read"] + p["bias"]


def test_logits_agree_with_numpy_and_do_not_see_padding(params):
    z = classifier.logit(params, jnp.asarray(TOKENS), config=CONFIG)
    wanted = [by_hand(params, tokens[tokens > 0]) for tokens in TOKENS]
    np.testing.assert_allclose(z, wanted, rtol=2e-5, atol=1e-6)


def test_loss_is_the_cross_entropy_of_the_label(params):
    batch = {"tokens": jnp.asarray(TOKENS), "label": jnp.array([1.0, 0.0])}
    z = np.asarray(classifier.logit(params, batch["tokens"], config=CONFIG), np.float64)
    wanted = np.log1p(np.exp([-z[0], z[1]]))
    loss_fn = classifier.make_loss_fn(CONFIG)
    np.testing.assert_allclose(loss_fn(params, batch), wanted, rtol=1e-5)
    assert loss_fn == classifier.make_loss_fn(CONFIG)


def test_positions_are_refused():
    config = TransformerConfig(vocab_size=5, context=8, num_layers=1, num_heads=1, d_model=4)
    with pytest.raises(ValueError, match="positions='none'"):
        classifier.init(jax.random.key(0), config)
