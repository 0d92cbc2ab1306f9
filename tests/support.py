"""What several test files share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_program import DRIVERS
from jax.tree_util import Partial

import jaxpattern as jp
from jaxpattern.runtime.checkpoint import Stage
from jaxpattern.types import SamplingAlgorithm


class Crash(Exception):
    """Stands for a process that dies between two chunks."""


def often(folder):
    return jp.Checkpoint(folder, every_seconds=0)


def stop_after(monkeypatch, saves):
    """The process dies after that many calls of `save`, each of which saves."""
    save, calls = Stage.save, []

    def dying(stage, position, state):
        save(stage, position, state)
        calls.append(position)
        if len(calls) == saves:
            raise Crash

    monkeypatch.setattr(Stage, "save", dying)
    return calls


def interrupted(monkeypatch, driver, folder, saves=3):
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        with pytest.raises(Crash):
            DRIVERS[driver](checkpoint=often(folder))


def same(got, wanted):
    """Equal to the last bit."""
    got, wanted = map(jax.tree.leaves, (got, wanted))
    for x, y in zip(got, wanted, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def near(got, wanted, places=20):
    """Equal up to some last places of float32, against the size of the array."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        known = np.abs(y[np.isfinite(y)]) if y.dtype.kind == "f" else np.zeros(0)
        size = np.max(known, initial=1e-30) if y.dtype.kind == "f" else 0
        np.testing.assert_allclose(x, y, rtol=0, atol=places * 6e-8 * size)


class Doomed(NamedTuple):
    """A chain, its steps so far, and the number that decides whether it is lost."""

    position: dict
    count: jax.Array
    fate: jax.Array


def doomed(*, step=0, share=0.0, step_size=0.02):
    """SGLD in which a share of the chains, chosen by their keys, turn NaN at a step."""
    return Partial(_doomed, step=step, share=share, step_size=step_size)


def _doomed(posterior, *, step, share, step_size):
    inner = jp.sgld(step_size=step_size)(posterior)

    def init(position, key):
        return Doomed(position, jnp.zeros((), jnp.int32), jax.random.uniform(key))

    def advance(key, state, minibatch):
        position = inner.step(key, state.position, minibatch)
        lost = (state.count == step) & (state.fate < share)
        position = jax.tree.map(lambda w: jnp.where(lost, jnp.nan, w), position)
        return Doomed(position, state.count + 1, state.fate)

    return SamplingAlgorithm(init, advance)
