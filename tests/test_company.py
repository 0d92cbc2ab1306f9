"""Losses whose samples see each other are refused when the posterior is made; others are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpattern as jp

rng = np.random.default_rng(0)
PARAMS = {
    "in": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
    "out": jnp.asarray(rng.normal(size=4), jnp.float32),
}
DATA = {
    "x": jnp.asarray(rng.normal(size=(100, 8)), jnp.float32),
    "y": jnp.asarray(rng.normal(size=100), jnp.float32),
}


def make(loss_fn, params=PARAMS, data=DATA, **settings):
    return jp.localized_posterior(loss_fn, params, data, nbeta=10.0, localization=10.0, **settings)


def perceptron(params, batch):
    return 0.5 * (jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2


def dropout(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"])
    keep = jax.random.bernoulli(jax.random.key(7), 0.5, hidden.shape)
    return 0.5 * ((2 * keep * hidden) @ params["out"] - batch["y"]) ** 2


def batch_norm(params, batch):
    hidden = batch["x"] @ params["in"]
    hidden = (hidden - hidden.mean(axis=0, keepdims=True)) / hidden.std(axis=0, keepdims=True)
    return 0.5 * (hidden @ params["out"] - batch["y"]) ** 2


def contrastive(params, batch):
    hidden = batch["x"] @ params["in"]
    scores = hidden @ hidden.T
    return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(len(scores)))


def capacity(params, batch):
    """A sample behind the 1.25 B/4 first ones of its expert is dropped."""
    scores = batch["x"] @ params["in"]
    expert = jax.nn.one_hot(jnp.argmax(scores, axis=1), 4)
    place = jnp.sum(jnp.cumsum(expert, axis=0) * expert, axis=1)
    output = jnp.where(place <= 1.25 * len(scores) / 4, scores @ params["out"], 0.0)
    return 0.5 * (output - batch["y"]) ** 2


def hidden_numbers(params, batch):
    noise = np.random.default_rng().normal(size=batch["y"].shape)
    return perceptron(params, batch) + jnp.asarray(noise, jnp.float32)


@pytest.mark.parametrize("loss_fn", [dropout, batch_norm, contrastive, capacity, hidden_numbers])
def test_losses_that_see_their_batch_are_refused(loss_fn):
    match = r"same loss whatever else is in its batch.*of the first 64 samples.*such as samples \["
    with pytest.raises(ValueError, match=match):
        make(loss_fn)


def narrow(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def mixed(params, batch):
    return perceptron(narrow(params), narrow(batch)).astype(jnp.float32)


def nothing(params, batch):
    return 0.0 * perceptron(params, batch)


@pytest.mark.parametrize("loss_fn", [perceptron, mixed, nothing])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_losses_of_their_own_pass(loss_fn, size):
    make(loss_fn, data=jax.tree.map(lambda x: x[:size], DATA))


def test_narrow_models_pass():
    make(perceptron, narrow(PARAMS), narrow(DATA))


def test_rounding_of_the_precision_inside_passes_and_more_does_not():
    """Another order of a sum in bfloat16 moves losses by its rounding, though they are float32."""

    def rounded(size):
        def loss_fn(params, batch):
            jitter = size * jnp.cos(jnp.arange(batch["y"].shape[0], dtype=jnp.float32))
            losses = mixed(params, batch)
            return losses + jnp.max(losses) * jitter

        return loss_fn

    make(rounded(1e-3))
    with pytest.raises(ValueError, match="same loss whatever"):
        make(rounded(0.5))


def test_what_is_excluded_may_differ():
    weights = np.arange(100) % 2

    def loss_fn(params, batch):
        odd = batch["odd"]
        return jnp.where(odd, perceptron(params, batch), jnp.nan)

    make(loss_fn, data=DATA | {"odd": jnp.asarray(weights == 1)}, weights=weights)


def test_a_loss_that_wants_a_key_is_told_what_to_do():
    def with_key(params, batch, key):
        return perceptron(params, batch)

    with pytest.raises(TypeError, match=r"got with_key\(params, batch, key\).*deterministic mode"):
        make(with_key)


def test_the_door_compiles_one_program():
    compiled = []

    def listen(event, duration, **names):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(names.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        make(lambda params, batch: perceptron(params, batch))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sum("losses" in str(name) for name in compiled) == 1


class TestParams:
    """Objects that are no plain trees of arrays."""

    def test_modules_are_told_how_to_split(self):
        from flax import nnx

        model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        loss_fn = lambda model, batch: jnp.sum(model(batch["x"]) ** 2, axis=1)  # noqa: E731
        with pytest.raises(TypeError, match=r"nnx.Module Linear; split it.*\n.*nnx.split"):
            make(loss_fn, model)
        graphdef, params = nnx.split(model, nnx.Param)
        make(lambda p, batch: loss_fn(nnx.merge(graphdef, p), batch), params)

    @pytest.mark.parametrize("module", [np, jnp])
    def test_one_array_in_two_places_is_refused(self, module):
        table = module.ones((8, 4), module.float32)
        loss_fn = lambda p, batch: jnp.sum(  # noqa: E731
            (batch["x"] @ p["embed"] - batch["x"] @ p["unembed"]) ** 2, axis=1
        )
        with pytest.raises(ValueError, match="params/unembed and params/embed are one and the"):
            make(loss_fn, {"embed": table, "unembed": table})
        make(loss_fn, {"embed": table, "unembed": module.copy(table)})

    def test_narrow_floats_are_named(self):
        with pytest.raises(TypeError, match=r"params/in must have at least 16 bits.*float8_e4m3fn"):
            make(perceptron, PARAMS | {"in": PARAMS["in"].astype(jnp.float8_e4m3fn)})
