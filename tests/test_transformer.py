"""The transformer against the same equations in NumPy float64, and the properties it promises."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpattern.models import (
    TransformerConfig,
    attention_patterns,
    make_loss_fn,
    residual_states,
    transformer,
)

VOCAB, CONTEXT, LENGTH = 11, 12, 9


def config_of(**changes):
    shape = {"vocab_size": VOCAB, "context": CONTEXT, "num_layers": 2, "num_heads": 2, "d_model": 8}
    return TransformerConfig(**(shape | changes))


CONFIGS = {
    "attention_only": config_of(),
    "mlp": config_of(mlp_width=12, num_layers=1),
    "learned_positions": config_of(positions="learned", num_layers=1),
    "learned_positions_mlp_tied": config_of(positions="learned", mlp_width=12, tied=True),
}


def params_of(config, seed=0):
    """Weights away from their starting point, so that scales and biases matter."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32),
        transformer.init(jax.random.key(seed), config),
    )


def tokens_of(batch=3, length=LENGTH + 1, seed=5):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (batch, length)))


def numpy_model(params, tokens, config):
    """(losses, patterns), one sequence, head and position at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    tokens = np.asarray(tokens)
    width = config.d_model // config.num_heads

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    root = np.sqrt(config.d_model)
    embed = params["embed"] * (root if config.tied else 1)
    unembed = params["embed"].T / root if config.tied else params["unembed"]
    losses = np.zeros((len(tokens), tokens.shape[1] - 1))
    patterns = np.zeros(
        (config.num_layers, len(tokens), config.num_heads, *[tokens.shape[1] - 1] * 2)
    )
    for b, sequence in enumerate(tokens):
        x = embed[sequence[:-1]]
        if config.positions == "learned":
            x = x + params["positions"][: len(x)]
        for i in range(config.num_layers):
            layer = params["layers"][str(i)]
            attn, h_in = layer["attn"], norm(x, layer["attn_norm"]["scale"])
            for h in range(config.num_heads):
                q, k, v = (h_in @ attn[name][h] for name in "qkv")
                for t in range(len(x)):
                    z = k[: t + 1] @ q[t] / np.sqrt(width)
                    if config.positions == "relative_bias":
                        z = z + attn["bias"][h][t - np.arange(t + 1)]
                    a = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                    patterns[i, b, h, t, : t + 1] = a
                x = x + patterns[i, b, h] @ v @ attn["o"][h]
            if config.mlp_width:
                hidden = gelu(norm(x, layer["mlp_norm"]["scale"]) @ layer["mlp"]["up"])
                x = x + hidden @ layer["mlp"]["down"]
        z = norm(x, params["final_norm"]["scale"]) @ unembed
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        losses[b] = -log_p[np.arange(len(z)), sequence[1:]]
    return losses, patterns


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_matches_numpy(name):
    config = CONFIGS[name]
    params, tokens = params_of(config), tokens_of()
    losses = jax.jit(make_loss_fn(config))(params, tokens)
    patterns = jax.jit(lambda p, t: attention_patterns(p, t, config=config))(params, tokens[:, :-1])
    expected_losses, expected_patterns = numpy_model(params, tokens, config)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(patterns, expected_patterns, rtol=2e-5, atol=2e-6)


def test_logits_give_the_losses():
    config, tokens = CONFIGS["attention_only"], tokens_of()
    params = params_of(config)
    z = jax.jit(lambda p: transformer.logits(p, tokens[:, :-1], config=config))(params)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(z), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(make_loss_fn(config)(params, tokens), losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "learned_positions_mlp_tied"])
def test_the_residual_stream_starts_at_the_embedding_and_ends_at_the_logits(name):
    config, tokens = CONFIGS[name], tokens_of()
    params = jax.tree.map(np.asarray, params_of(config))
    states = jax.jit(lambda p: residual_states(p, tokens, config=config))(params)
    assert states.shape == (config.num_layers + 1, *tokens.shape, config.d_model)
    root = config.d_model**0.5
    start = params["embed"][np.asarray(tokens)] * (root if config.tied else 1)
    if config.positions == "learned":
        start = start + params["positions"][: tokens.shape[1]]
    np.testing.assert_allclose(states[0], start, rtol=1e-5, atol=1e-6)
    x = np.asarray(states[-1], np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
    readout = params["embed"].T / root if config.tied else params["unembed"]
    z = jax.jit(lambda p: transformer.logits(p, tokens, config=config))(params)
    np.testing.assert_allclose(z, x @ readout, rtol=2e-5, atol=2e-5)


def test_parameter_paths_and_head_slices():
    config = config_of(mlp_width=12)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            transformer.init(jax.random.key(0), config)
        )
    }
    layer = {
        "attn/bias": (2, CONTEXT),
        **{f"attn/{name}": (2, 8, 4) for name in "qkv"},
        "attn/o": (2, 4, 8),
        "attn_norm/scale": (8,),
        "mlp/down": (12, 8),
        "mlp/up": (8, 12),
        "mlp_norm/scale": (8,),
    }
    assert shapes == {
        "embed": (VOCAB, 8),
        "final_norm/scale": (8,),
        "unembed": (8, VOCAB),
        **{f"layers/{i}/{name}": shape for i in range(2) for name, shape in layer.items()},
    }


def test_position_bias_starts_at_halving_slopes_in_the_first_layer():
    layers = transformer.init(jax.random.key(0), config_of(num_heads=4))["layers"]
    expected = -(2.0 ** -np.arange(4))[:, None] * np.arange(CONTEXT)[None, :]
    np.testing.assert_array_equal(layers["0"]["attn"]["bias"], expected)
    assert not np.any(layers["1"]["attn"]["bias"])


@pytest.mark.parametrize("name", ["mlp", "learned_positions_mlp_tied"])
def test_a_later_token_never_changes_an_earlier_loss(name):
    config = CONFIGS[name]
    params, tokens = params_of(config), tokens_of(batch=1)
    loss_fn = jax.jit(make_loss_fn(config))
    losses = loss_fn(params, tokens)[0]
    for at in range(1, LENGTH + 1):
        changed = loss_fn(params, tokens.at[0, at].add(1).at[0, at].apply(lambda t: t % VOCAB))[0]
        np.testing.assert_array_equal(changed[: at - 1], losses[: at - 1])
        assert changed[at - 1] != losses[at - 1]


@pytest.mark.parametrize("name", ["mlp", "learned_positions_mlp_tied"])
def test_a_new_model_spreads_its_bets(name):
    config, tokens = CONFIGS[name], tokens_of(batch=64)
    params = transformer.init(jax.random.key(1), config)
    loss = float(jax.jit(make_loss_fn(config))(params, tokens).mean())
    # Logits of variance 1/D add 1/2D; a tied model starts with a logit of 1 for its own input.
    assert abs(loss - np.log(VOCAB)) < 0.2


def test_bfloat16_compute_is_close_and_keeps_float32_outside():
    params, tokens = params_of(CONFIGS["mlp"]), tokens_of()

    def value_and_grad(config):
        loss_fn = make_loss_fn(config)
        return jax.jit(jax.value_and_grad(lambda p: loss_fn(p, tokens).mean()))(params)

    loss, gradient = value_and_grad(CONFIGS["mlp"])
    low_loss, low_gradient = value_and_grad(config_of(mlp_width=12, num_layers=1, dtype="bfloat16"))
    assert low_loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(low_gradient)} == {jnp.dtype("float32")}
    # bfloat16 rounds by 2^-9; a few dozen roundings in a row add up to a few times that.
    assert 0 < abs(float(low_loss - loss)) < 0.02
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    error = jax.tree.map(jnp.subtract, low_gradient, gradient)
    assert jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(error))) < 0.03 * norm


def test_chains_by_vmap_and_curvature_by_forward_over_reverse():
    config, tokens = CONFIGS["attention_only"], tokens_of()
    loss_fn = make_loss_fn(config)
    chains = [params_of(config, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chains)
    together = jax.jit(jax.vmap(loss_fn, in_axes=(0, None)))(stacked, tokens)
    apart = jnp.stack([jax.jit(loss_fn)(params, tokens) for params in chains])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)

    gradient = jax.jit(jax.grad(lambda params: loss_fn(params, tokens).mean()))
    direction = jax.tree.map(lambda a, b: a - b, chains[1], chains[0])
    _, product = jax.jit(lambda p, v: jax.jvp(gradient, (p,), (v,)))(chains[0], direction)
    step = 1e-3
    ahead = gradient(jax.tree.map(lambda p, v: p + step * v, chains[0], direction))
    behind = gradient(jax.tree.map(lambda p, v: p - step * v, chains[0], direction))
    for exact, a, b in zip(*map(jax.tree.leaves, (product, ahead, behind)), strict=True):
        np.testing.assert_allclose(exact, (a - b) / (2 * step), rtol=0.05, atol=2e-3)


def test_equal_configurations_share_one_compilation():
    @partial(jax.jit, static_argnums=0)
    @partial(chex.assert_max_traces, n=1)
    def compiled(loss_fn, params, tokens):
        return loss_fn(params, tokens)

    params, tokens = params_of(config_of()), tokens_of()
    compiled(make_loss_fn(config_of()), params, tokens)
    compiled(make_loss_fn(config_of()), params, tokens)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        compiled(make_loss_fn(config_of(num_layers=3)), params_of(config_of(num_layers=3)), tokens)
    assert make_loss_fn(config_of()) == make_loss_fn(config_of())
    assert make_loss_fn(config_of()) != make_loss_fn(config_of(mlp_width=4))


def test_other_state_than_parameters_is_refused():
    class Noisy(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(2))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=r"parameters only.*dropout"):
        transformer.split_params(Noisy())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"num_heads": 3},
            ValueError,
            "d_model must be a multiple of num_heads, got 8 and 3",
        ),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"mlp_width": -1}, ValueError, "mlp_width must be at least 0"),
    ],
)
def test_bad_configurations_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        config_of(**changes)


def test_sequences_longer_than_the_context_are_refused():
    config = config_of()
    with pytest.raises(ValueError, match="context = 12 positions, got 13"):
        make_loss_fn(config)(params_of(config), tokens_of(length=14))
