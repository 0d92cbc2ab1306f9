"""Settings of every test: annotations checked, eight CPU devices, careless JAX refused."""

import functools
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator


def _settings() -> None:
    """Three quarters of the tests' time is compilation: it is kept, and done with less effort.

    Through the environment, so that programs which the tests start share it; a folder or flags
    that are set already stay. A test that runs longer than it compiles is marked `optimized`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    python = ".".join(map(str, sys.version_info[:2]))
    name = f"jax-{importlib.metadata.version('jax')}-python-{python}"
    folder = pathlib.Path(home, "jaxpattern-tests", name)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # A program that is read back complains, in error messages, of features that LLVM made up.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # level 0, but see `_optimized`
    cheap = [
        "--xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
        cheap.append("--xla_cpu_use_fusion_emitters=false")  # a newer jax refuses to start with it
    for flag in cheap:
        if flag.split("=")[0] not in flags:
            flags = f"{flags} {flag}".strip()
    os.environ["XLA_FLAGS"] = flags


_settings()  # before jax is imported, which reads it then
# Traces are many small objects that live on: Python's collector looks at them less often.
gc.set_threshold(20_000, 20, 20)

import jax  # noqa: E402
import matplotlib  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Before the first array: the number of devices is fixed once a backend is up.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
matplotlib.use("Agg")

# Before the package is first imported: the hook rewrites modules as they load.
install_import_hook("jaxpattern", "beartype.beartype")


@functools.cache
def missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here, or None if they can."""
    if marker == "gpu":
        found = any(device.platform == "gpu" for device in jax.devices())
        return None if found else f"no GPU: jax runs on {jax.default_backend()}"
    if marker == "browser":
        absent = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
        absent += [] if importlib.util.find_spec("selenium") else ["selenium"]
        return f"not installed: {', '.join(absent)}" if absent else None
    return None if importlib.util.find_spec(marker) else f"{marker} is not installed"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("gpu", "torch", "libtpu", "browser"):
        if item.get_closest_marker(marker) and (reason := missing(marker)):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.node.get_closest_marker("optimized"):
        yield
        return
    usual = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", usual)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file() -> Iterator[None]:
    """What a file compiled goes with it: a worker would grow by gigabytes."""
    yield
    jax.clear_caches()
