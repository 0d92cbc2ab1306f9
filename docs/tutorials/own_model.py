"""A model of one's own: flax nnx, flax linen, equinox and haiku as pure loss functions."""

import jax
import jax.numpy as jnp
import optax

import jaxpattern as jp


def moons(key, num_samples=96):
    """Two noisy moons: batch = {"x": [N, 2], "y": [N]}."""
    angle = jnp.pi * jax.random.uniform(jax.random.fold_in(key, 0), (num_samples,))
    y = jnp.arange(num_samples) % 2
    arc = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    arc = jnp.where((y == 1)[:, None], jnp.array([[1.0, 0.4]]) - arc, arc)
    noise = 0.15 * jax.random.normal(jax.random.fold_in(key, 1), arc.shape)
    return {"x": arc + noise, "y": y}


def cross_entropy(logits, batch):
    """One loss per sample, [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


# --8<-- [start:nnx]
def nnx_model():
    """flax nnx, with dropout that is on in training and off when χ is measured."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(2, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.1)
            self.out = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x, rngs=None):
            return self.out(self.dropout(jax.nn.tanh(self.hidden(x)), rngs=rngs))

    model = Net(nnx.Rngs(0))
    model.train()
    noisy, params, rest = nnx.split(model, nnx.Param, ...)
    model.eval()
    quiet, _, _ = nnx.split(model, nnx.Param, ...)

    def train_loss(params, batch, key):  # jp.train hands a third argument a fresh key per step
        logits = nnx.merge(noisy, params, rest)(batch["x"], rngs=nnx.Rngs(dropout=key))
        return cross_entropy(logits, batch)

    def loss_fn(params, batch):
        return cross_entropy(nnx.merge(quiet, params, rest)(batch["x"]), batch)

    return loss_fn, nnx.to_pure_dict(params), train_loss


# --8<-- [end:nnx]


# --8<-- [start:linen]
def linen_model(data):
    """flax linen with batch statistics: trained by your own loop, frozen when χ is measured."""
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
            return linen.Dense(2)(jax.nn.tanh(x))

    net = Net()
    variables = net.init(jax.random.key(0), data["x"], train=False)
    params, stats = variables["params"], variables["batch_stats"]
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        params, stats, state = carry

        def objective(params):
            logits, updates = net.apply(
                {"params": params, "batch_stats": stats}, data["x"], train=True,
                mutable=["batch_stats"],
            )  # fmt: skip
            return cross_entropy(logits, data).mean(), updates["batch_stats"]

        gradient, stats = jax.grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), stats, state), None

    carry = (params, stats, optimizer.init(params))
    (params, stats, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=300))(carry)

    def loss_fn(params, batch):  # the statistics are constants: samples do not see each other
        logits = net.apply({"params": params, "batch_stats": stats}, batch["x"], train=False)
        return cross_entropy(logits, batch)

    return loss_fn, params


# --8<-- [end:linen]


# --8<-- [start:equinox]
def equinox_model():
    """equinox: the arrays are the parameters, everything else is static."""
    import equinox as eqx

    model = eqx.nn.MLP(2, 2, width_size=8, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, batch):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(batch["x"]), batch)

    return loss_fn, params


# --8<-- [end:equinox]


# --8<-- [start:haiku]
def haiku_model(data):
    """haiku: transform, and leave the random key out."""
    import haiku as hk

    def forward(x):
        return hk.nets.MLP([8, 2], activation=jnp.tanh)(x)

    net = hk.without_apply_rng(hk.transform(forward))

    def loss_fn(params, batch):
        return cross_entropy(net.apply(params, batch["x"]), batch)

    return loss_fn, net.init(jax.random.key(0), data["x"])


# --8<-- [end:haiku]


# --8<-- [start:measure]
def measure(loss_fn, params, data, num_draws=20):
    """The same for all: how the loss on each class answers to the samples of each class."""
    posterior = jp.localized_posterior(loss_fn, params, data, nbeta=300.0, localization=100.0)
    up, down = (jax.tree.map(lambda x, i=i: x[i::2], data) for i in range(2))
    classes = {"up": up, "down": down}
    plan = jp.Plan(num_chains=4, num_burnin=160, num_draws=num_draws, thin=4)
    return jp.susceptibilities(
        jax.random.key(2), posterior, jp.sgld(step_size=1e-3), plan,
        observables=jp.mean_losses(loss_fn, classes), probes=classes, progress=False,
    )  # fmt: skip


# --8<-- [end:measure]


def train(loss_fn, params, data):
    """Trained by the library; a third argument of the loss is a key for dropout."""
    trained, _ = jp.train(
        jax.random.key(1), loss_fn, params, data, optax.adam(1e-2), num_steps=300, batch_size=32,
        progress=False,
    )  # fmt: skip
    return trained


def main(frameworks=("nnx", "linen", "equinox", "haiku"), num_draws=20):
    data = moons(jax.random.key(3))
    responses = {}
    for name in frameworks:
        if name == "nnx":
            loss_fn, params, train_loss = nnx_model()
            params = train(train_loss, params, data)
        elif name == "linen":
            loss_fn, params = linen_model(data)
        else:
            loss_fn, params = equinox_model() if name == "equinox" else haiku_model(data)
            params = train(loss_fn, params, data)
        responses[name] = measure(loss_fn, params, data, num_draws)
        print(f"\n{name}\n{responses[name]}")
    return responses


if __name__ == "__main__":
    main()
