"""Settings of every test: annotations checked, eight CPU devices, careless JAX refused."""

import functools
import importlib.util

import jax
import matplotlib
import pytest
from jaxtyping import install_import_hook

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
    return None if importlib.util.find_spec(marker) else f"{marker} is not installed"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("gpu", "torch", "libtpu"):
        if item.get_closest_marker(marker) and (reason := missing(marker)):
            pytest.skip(reason)
