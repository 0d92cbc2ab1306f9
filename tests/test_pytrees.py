"""Pytrees of two classes are two structures, whatever JAX says of dataclasses."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import pytest

import jaxpattern as jp
from jaxpattern.chains.programs import shape_of
from jaxpattern.chains.record import Trace
from jaxpattern.pytrees import node_types, register_pytree
from jaxpattern.validation import as_pytree_function


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plus:
    number: object

    def __call__(self, params):
        return params["w"] + self.number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Times:
    number: object

    def __call__(self, params):
        return params["w"] * self.number


@register_pytree
@dataclasses.dataclass(frozen=True)
class Both:
    one: object
    name: str = dataclasses.field(metadata={"static": True})


@pytest.mark.parametrize("classes", [
    [jp.ridge(), jp.entropic()],
    [jp.least_norm(), jp.ridge(), jp.truncated(), jp.truncated(rank=1), jp.box(), jp.entropic()],
    [as_pytree_function(Plus(2.0)), as_pytree_function(Times(2.0))],
    [Both(1.0, "a"), Both(1.0, "b")],
])  # fmt: skip
def test_structures_differ(classes):
    for one, other in itertools.combinations(map(jax.tree.structure, classes), 2):
        assert one != other


def test_what_is_wrapped_is_what_it_was():
    plus, own = (
        as_pytree_function(Plus(jnp.ones(()))),
        jp.mean_loss(lambda p, b: p["w"] * b, jnp.ones(3)),
    )
    assert plus({"w": 2.0}) == 3.0
    again = jax.tree.map(lambda x: 2 * x, plus)
    assert again({"w": 2.0}) == 4.0
    assert jax.tree.structure(again) == jax.tree.structure(plus)
    assert as_pytree_function(own) is own
    ((path, _),) = jax.tree_util.tree_leaves_with_path(Both(1.0, "a"))
    assert jax.tree_util.keystr(path) == ".one"
    assert node_types((Both(1.0, "a"), {"b": 2.0}))[1] is Both


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class First(Trace):
    def value(self, posterior, state, key, batch_size):
        return jnp.ones(()), ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Second(Trace):
    def value(self, posterior, state, key, batch_size):
        return jnp.zeros(()), ()


def test_recorders_of_two_classes_are_two_programs():
    """Without fields of their own, which is all that JAX compares."""
    plan = jp.Plan(num_chains=2, num_burnin=1, num_draws=2, thin=1)
    one, other = (shape_of(plan, None, (None, recorder, None)) for recorder in (First(), Second()))
    assert one != other


def test_no_class_is_registered_otherwise():
    folder = pathlib.Path(jp.__file__).parent
    files = [
        p for p in folder.rglob("*.py") if "@jax.tree_util.register_dataclass" in p.read_text()
    ]
    assert files == []
