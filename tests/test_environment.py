"""What the package takes for granted: right numbers from XLA, and a core that imports little."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

CORE = [
    "losses",
    "posterior",
    "restriction",
    "samplers",
    "chains.run",
    "chains.loop",
    "chains.lower",
    "sampling",
    "diagnostics",
    "moments",
    "observables",
    "response.susceptibilities",
    "llc",
    "several",
    "inversion",
]
NOT_IN_CORE = ["flax", "matplotlib", "orbax", "tqdm"]
OPTIONAL = [
    "arviz_base", "datasets", "devinterp", "grain", "matplotlib", "pandas", "safetensors",
    "tokenizers", "torch", "xarray",
]  # fmt: skip

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])

bare_reduction_is_wrong = pytest.mark.xfail(
    JAX_VERSION < (0, 11),
    reason="jax before 0.11 also gets the reduction of the bare product wrong on CPU",
    strict=False,  # which rows go wrong is up to the instruction set
)


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(lambda xp, z: xp.square(z), id="square"),
        pytest.param(lambda xp, z: xp.tanh(z), id="tanh"),
        pytest.param(lambda xp, z: xp.maximum(z, 0), id="relu"),
        pytest.param(lambda xp, z: z, id="identity", marks=bare_reduction_is_wrong),
    ],
)
def test_reduced_matrix_vector_products_of_many_rows(f):
    """jit(vmap(row -> sum(f(M @ row)))), which jax 0.10.2 miscompiles past 32,768 rows."""
    num_rows, dim = 40_000, 3
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(dim, dim)).astype(np.float32)
    rows = rng.normal(size=(num_rows, dim)).astype(np.float32)

    with jax.default_device(jax.devices("cpu")[0]):
        result = jax.jit(jax.vmap(lambda row: jnp.sum(f(jnp, matrix @ row))))(rows)

    matrix, rows = matrix.astype(np.float64), rows.astype(np.float64)
    expected = f(np, rows @ matrix.T).sum(axis=1)
    # Each f moves by at most 2(1 + |z|) times the error of z, itself a few ulp of Σ|M||row|.
    magnitude = np.square(1 + np.abs(rows) @ np.abs(matrix).T).sum(axis=1)
    error = np.abs(np.asarray(result) - expected) / magnitude
    wrong = int(np.sum(error > 8 * np.finfo(np.float32).eps))
    assert wrong == 0, f"jax {jax.__version__}: {wrong} of {num_rows} rows are wrong"


def test_checks_of_the_test_session_are_on():
    assert len(jax.devices("cpu")) == 8
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    key = jax.random.key(0)
    jax.random.normal(key)
    with pytest.raises(jax.errors.KeyReuseError):
        jax.random.normal(key)


def loaded_by(program: str) -> dict:
    """What a fresh interpreter, with warnings as errors, prints as JSON in its last line."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_public_face_imports_no_optional_dependency():
    program = f"""
import json, sys
import jaxpattern
print(json.dumps([name for name in {OPTIONAL!r} if name in sys.modules]))
"""
    assert loaded_by(program) == []


@pytest.fixture(scope="module")
def imported_by_core() -> dict[str, list[str]]:
    """Core module -> what it imports of NOT_IN_CORE."""
    # An empty package in place of jaxpattern: its own __init__ may import what the core may not.
    program = f"""
import importlib, importlib.util, json, sys, types
path = importlib.util.find_spec("jaxpattern").submodule_search_locations
package = types.ModuleType("jaxpattern")
package.__path__ = list(path)
sys.modules["jaxpattern"] = package
imported = {{}}
for module in {CORE!r}:
    name = "jaxpattern." + module
    importlib.import_module(name)
    imported[module] = [other for other in {NOT_IN_CORE!r} if other in sys.modules]
print(json.dumps(imported))
"""
    return loaded_by(program)


@pytest.mark.parametrize("module", CORE)
def test_core_imports_neither_flax_nor_files_nor_plots(module, imported_by_core):
    assert imported_by_core[module] == []
