"""A folder is refused after any edit that changes a loss, and after none that does not."""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpattern as jp
from jaxpattern.runtime.fingerprint import about, differences, fingerprint

# A script and its two helpers; FACTOR, in one of them, is what the user edits.
PLAIN = """
import jax.numpy as jnp
def helper(x):
    return x
"""
DEEP = "from users_middle import scale\n"
MIDDLE = "import users_deep\ndef scale():\n    return users_deep.scale()\n"
BODIES = {
    "body": "def loss(p, b):\n    return FACTOR * p",
    "global": "SCALE = FACTOR\ndef loss(p, b):\n    return SCALE * p",
    "default": "def loss(p, b, scale=FACTOR):\n    return scale * p",
    "keyword default": "def loss(p, b, *, scale=FACTOR):\n    return scale * p",
    "closure": "def make(s):\n    return lambda p, b: s * p\nloss = make(FACTOR)",
    "helper": "def scale():\n    return FACTOR\ndef loss(p, b):\n    return scale() * p",
    "partial": "import functools\ndef f(s, p, b):\n    return s * p\n"
    "loss = functools.partial(f, FACTOR)",
    "lambda in a dict": "TABLE = {'s': lambda: FACTOR}\n"
    "def loss(p, b):\n    return TABLE['s']() * p",
    "nested list": "LEVELS = [1, [2, {'a': (FACTOR,)}]]\n"
    "def loss(p, b):\n    return LEVELS[1][1]['a'][0] * p",
    "class body": "class C:\n    s = FACTOR\n    def __call__(self, p, b):\n"
    "        return self.s * p\nloss = C()",
    "method": "class C:\n    def f(self):\n        return FACTOR\n    def __call__(self, p, b):\n"
    "        return self.f() * p\nloss = C()",
    "parent method": "class A:\n    def f(self):\n        return FACTOR\nclass B(A):\n"
    "    def __call__(self, p, b):\n        return self.f() * p\nloss = B()",
    "property": "class C:\n    @property\n    def s(self):\n        return FACTOR\n"
    "    def __call__(self, p, b):\n        return self.s * p\nloss = C()",
    "cached property": "import functools\nclass C:\n    @functools.cached_property\n"
    "    def s(self):\n        return FACTOR\n    def __call__(self, p, b):\n"
    "        return self.s * p\nloss = C()",
    "static method": "class C:\n    @staticmethod\n    def s():\n        return FACTOR\n"
    "    def __call__(self, p, b):\n        return self.s() * p\nloss = C()",
    "class method": "class C:\n    @classmethod\n    def s(cls):\n        return FACTOR\n"
    "    def __call__(self, p, b):\n        return self.s() * p\nloss = C()",
    "instance attribute": "class C:\n    def __init__(self, s):\n        self.s = s\n"
    "    def __call__(self, p, b):\n        return self.s * p\nloss = C(FACTOR)",
    "array attribute": "import numpy as np\nclass C:\n    def __init__(self, s):\n"
    "        self.s = np.full(1000, s)\n    def __call__(self, p, b):\n"
    "        return self.s[500] * p\nloss = C(FACTOR)",
    "slot": "class C:\n    __slots__ = ('s',)\n    def __init__(self, s):\n        self.s = s\n"
    "    def __call__(self, p, b):\n        return self.s * p\nloss = C(FACTOR)",
    "settings class": "class Config:\n    s = FACTOR\ndef loss(p, b):\n    return Config.s * p",
    "settings object": "import types\nSETTINGS = types.SimpleNamespace(model={'s': FACTOR})\n"
    "def loss(p, b):\n    return SETTINGS.model['s'] * p",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass Config:\n"
    "    s: float = FACTOR\nCONFIG = Config()\ndef loss(p, b):\n    return CONFIG.s * p",
    "dataclass method": "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Config:\n"
    "    s: float = 1.0\n    def twice(self):\n        return FACTOR * self.s\nCONFIG = Config()\n"
    "def loss(p, b):\n    return CONFIG.twice() * p",
    "named tuple method": "from typing import NamedTuple\nclass Config(NamedTuple):\n    s: float\n"
    "    def twice(self):\n        return FACTOR * self.s\nCONFIG = Config(1.0)\n"
    "def loss(p, b):\n    return CONFIG.twice() * p",
    "enumeration": "import enum\nclass Scale(enum.Enum):\n    A = FACTOR\n"
    "def loss(p, b):\n    return Scale.A.value * p",
    "bound method": "class M:\n    def s(self):\n        return FACTOR\n    def loss(self, p, b):\n"
    "        return self.s() * p\nloss = M().loss",
    "decorator": "import functools\ndef scaled(s):\n    def wrap(f):\n        @functools.wraps(f)\n"
    "        def inner(p, b):\n            return s * f(p, b)\n        return inner\n"
    "    return wrap\n@scaled(FACTOR)\ndef loss(p, b):\n    return p",
    "jitted helper": "import jax\n@jax.jit\ndef scale(p):\n    return FACTOR * p\n"
    "def loss(p, b):\n    return scale(p)",
    "backward pass": "import jax\n@jax.custom_vjp\ndef f(p):\n    return p\n"
    "f.defvjp(lambda p: (p, None), lambda _, g: (FACTOR * g,))\ndef loss(p, b):\n    return f(p)",
    "attribute of a function": "def loss(p, b):\n    return loss.s * p\nloss.s = FACTOR",
    "flax module": "from flax import nnx\nclass Net(nnx.Module):\n    def __init__(self):\n"
    "        self.s = FACTOR\n    def __call__(self, p):\n        return self.s * p\nNET = Net()\n"
    "def loss(p, b):\n    return NET(p)",
    "flax method": "from flax import nnx\nclass Net(nnx.Module):\n    def __call__(self, p):\n"
    "        return FACTOR * p\nNET = Net()\ndef loss(p, b):\n    return NET(p)",
    "linen field": "from flax import linen\nclass Net(linen.Module):\n    s: float = FACTOR\n"
    "    @linen.compact\n    def __call__(self, p):\n        return self.s * p\nNET = Net()\n"
    "def loss(p, b):\n    return NET.apply({}, p)",
    "two modules away": "import users_middle\ndef loss(p, b):\n    return users_middle.scale() * p",
    "by name in a string": "import users_deep\ndef loss(p, b):\n"
    "    return getattr(users_deep, 'SCALE') * p",
    "aliased": "from users_middle import scale as s\ndef loss(p, b):\n    return s() * p",
}  # fmt: skip


def written(folder, monkeypatch, body, factor):
    """The loss of a user's module, as it is imported by a new process."""
    modules = {
        "users_deep": f"SCALE = {factor}\ndef scale():\n    return {factor}\n",
        "users_middle": MIDDLE,
        "users_loss": PLAIN + body.replace("FACTOR", str(factor)),
    }
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    try:
        return importlib.import_module("users_loss").loss
    finally:
        for name in modules:
            monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.mark.parametrize("edit", BODIES)
def test_edits_are_seen_and_nothing_else(edit, folder, monkeypatch):
    def lines(factor):
        return fingerprint(loss_fn=written(folder, monkeypatch, BODIES[edit], factor))

    assert differences(lines(0.5), lines(0.5)) == []
    assert differences(lines(0.5), lines(2.0)) != []


def test_all_of_them_are_the_same_in_another_process(folder):
    """Whatever the hash seed, and whatever the addresses."""
    bodies = "".join(
        f"\n{body.replace('FACTOR', '0.5')}\nLOSSES[{name!r}] = loss\n"
        for name, body in BODIES.items()
    )
    (folder / "users_deep.py").write_text("SCALE = 1.0\ndef scale():\n    return 1.0\n")
    (folder / "users_middle.py").write_text(MIDDLE)
    (folder / "users_loss.py").write_text(f"{PLAIN}\nLOSSES = {{}}\n{bodies}")
    code = (
        "import json, sys, users_loss\njunk = [object() for _ in range(int(sys.argv[1]))]\n"
        "from jaxpattern.runtime.fingerprint import fingerprint\n"
        "print(json.dumps(fingerprint(losses=users_loss.LOSSES, words={'many', 'in', 'a', 'set'})))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, number], cwd=folder, check=True, capture_output=True,
            text=True, env=os.environ | {
                "PYTHONHASHSEED": number, "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": os.pathsep.join([str(Path(jp.__file__).parents[1]), str(folder)]),
            },
        ).stdout
        for number in ("1", "2000")
    ]  # fmt: skip
    one, two = map(json.loads, outputs)
    assert differences(one, two) == []
    assert len(one) > len(BODIES)


def test_an_attribute_of_a_module_read_at_run_time(folder, monkeypatch):
    (folder / "users_settings.py").write_text("SCALE = 1.0\nOTHER = 1.0\n")
    module = importlib.import_module("users_settings")

    def loss(params, batch):
        return module.SCALE * params

    try:
        before = fingerprint(loss_fn=loss)
        module.OTHER = 3.0
        assert differences(before, fingerprint(loss_fn=loss)) == []
        module.SCALE = 2.0
        (line,) = differences(before, fingerprint(loss_fn=loss))
    finally:
        del sys.modules["users_settings"]
    assert line == "loss_fn.module.SCALE: 1.0 there, 2.0 here"


def test_a_cached_property_may_be_asked_for_in_between():
    class Model:
        @functools.cached_property
        def scale(self):
            return 2.0

    model = Model()
    before = fingerprint(model=model)
    assert model.scale == 2.0
    assert differences(before, fingerprint(model=model)) == []


class Node:
    def __init__(self, value, next_node=None):
        self.value, self.next = value, next_node


def chain(length, last):
    node = Node(last)
    for i in range(length):
        node = Node(i, node)
    return node


def nested(depth, last):
    value = last
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("make", [chain, nested])
def test_deep_structures(make):
    one, two = (fingerprint(x=make(3_000, last)) for last in (1.0, 2.0))
    assert len(differences(one, two)) == 1
    assert max(map(len, one)) < 500


def test_structures_that_hold_themselves():
    def make(scale):
        registry = {"scale": scale, "list": []}
        registry["root"] = registry
        registry["list"].append(registry["list"])
        parent, child = Node(1), Node(2)
        parent.next, child.next = child, parent
        return [registry, parent]

    one, two = (fingerprint(x=make(scale)) for scale in (1.0, 2.0))
    assert differences(one, two) == ["x.0.scale: 1.0 there, 2.0 here"]
    assert differences(one, fingerprint(x=make(1.0))) == []


def test_equal_containers_count_as_equal():
    """Whether two arguments are one dictionary or two of them."""
    one = {"a": 1}
    assert fingerprint(x=one, y=one) == fingerprint(x=one, y=dict(one))


def test_numbers_may_round_otherwise():
    before = {"losses": about([1.0, np.nan, 1e-9], 1e-3)}
    assert differences(before, {"losses": about([1.0005, np.nan, 0.0], 1e-3)}) == []
    for other in ([1.002, np.nan, 0.0], [1.0, 1.0, 0.0], [1.0, np.nan]):
        assert len(differences(before, {"losses": about(other, 1e-3)})) == 1


def test_what_names_do_not_catch_is_seen_in_the_losses(tmp_path, monkeypatch):
    """A scale in the environment."""

    class Loss:
        """JAX compiles it again for each instance, as in a new process."""

        def __call__(self, params, batch):
            scale = float(os.environ["USERS_SCALE"])
            return scale * jnp.sum((params["w"][None] - batch["c"]) ** 2, axis=1)

    def run():
        posterior = jp.localized_posterior(
            Loss(), {"w": jnp.ones(4)}, {"c": jnp.zeros((8, 4))}, nbeta=1.0, localization=1.0
        )
        return jp.llc(
            jax.random.key(0), posterior, jp.sgld(step_size=1e-2),
            jp.Plan(num_chains=2, num_burnin=1, num_draws=4, thin=1), progress=False,
            checkpoint=tmp_path,
        )  # fmt: skip

    monkeypatch.setenv("USERS_SCALE", "1.0")
    run()
    run()
    monkeypatch.setenv("USERS_SCALE", "1.01")
    with pytest.raises(jp.CheckpointError, match="losses at the start: about"):
        run()
