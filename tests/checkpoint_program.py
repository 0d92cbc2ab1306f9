"""Small runs of every driver, and a program that keeps one in a folder and logs what it does.

python tests/checkpoint_program.py DRIVER FOLDER LOG RESULT [EVERY_SECONDS]
"""

import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpattern as jp
from jaxpattern.runtime.checkpoint import Stage

PLAN = jp.Plan(num_chains=2, num_burnin=3, num_draws=6, thin=2, batch_size=3, num_batches=2)
RNG = np.random.default_rng(0)
DATA = {
    "x": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32),
    "y": jnp.asarray(RNG.normal(size=5), jnp.float32),
}
PARAMS = {"a": jnp.asarray(RNG.normal(size=3), jnp.float32), "b": jnp.zeros((2,), jnp.float32)}
SAMPLER = jp.sgld(step_size=0.01)
OPTIMIZER = optax.adam(1e-2)
PROBES = {  # not all of the data: the weights of that would ask for no change
    "p": jax.tree.map(lambda x: x[:2], DATA),
    "q": jax.tree.map(lambda x: x[1:], DATA),
}
COMPONENTS = {"a": jp.by_path("a"), "b": jp.by_path("b")}  # of different shapes: two groups


def loss_fn(params, batch):
    return 0.5 * (batch["x"] @ params["a"] + params["b"].sum() - batch["y"]) ** 2


def key():
    """Fresh each time: a key is used once."""
    return jax.random.key(3)


def posterior():
    return jp.localized_posterior(loss_fn, PARAMS, DATA, nbeta=6.0, localization=10.0)


def weights_of(params):
    return params["a"]


def chi(estimator, progress=False, **settings):
    return jp.susceptibilities(
        key(), posterior(), SAMPLER, PLAN, probes=PROBES, components=COMPONENTS,
        estimator=estimator, progress=progress, **settings,
    )  # fmt: skip


def sample(**settings):
    return jp.sample(key(), posterior(), SAMPLER, PLAN, weights_of, progress=False, **settings)


def llc(**settings):
    return jp.llc(key(), posterior(), SAMPLER, PLAN, progress=False, **settings)


def train(**settings):
    return jp.train(
        key(), loss_fn, PARAMS, DATA, OPTIMIZER, num_steps=9, batch_size=3,
        metrics=weights_of, record_every=2, progress=False, **settings,
    )  # fmt: skip


DRIVERS = {
    "sample": sample,
    "llc": llc,
    "covariance": partial(chi, jp.covariance()),
    "adjoint": partial(chi, jp.pathwise(window=2, every=1)),
    "tangent": partial(chi, jp.pathwise(mode="tangent")),
    "train": train,
}


def record(log, line):
    """One line, written at once."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def main(driver, folder, log, result, every_seconds="0"):
    resume, save = Stage.resume, Stage.save

    def logged_resume(stage, *args):
        position, state = resume(stage, *args)
        record(log, f"resumed {stage.name} {position}")
        return position, state

    def logged_save(stage, position, state):
        record(log, f"computed {stage.name} {position}")
        save(stage, position, state)
        record(log, f"passed {stage.name} {position}")

    Stage.resume, Stage.save = logged_resume, logged_save
    checkpoint = jp.Checkpoint(folder, every_seconds=float(every_seconds))
    leaves = jax.tree.leaves(DRIVERS[driver](checkpoint=checkpoint))
    np.savez(result, *map(np.asarray, leaves))


if __name__ == "__main__":
    main(*sys.argv[1:])
