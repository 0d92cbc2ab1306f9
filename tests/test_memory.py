"""Memory does not grow with the number of draws."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
import jaxpattern as jp

loss = lambda params, x: 0.5 * ((params["w"] - x) ** 2).sum(axis=1)
data = jnp.linspace(-1.0, 1.0, 1024).reshape(512, 2)
posterior = jp.localized_posterior(loss, {"w": jnp.zeros(2)}, data, nbeta=5.0, localization=1.0)
for draws in map(int, sys.argv[1:]):
    plan = jp.Plan(num_chains=2, num_burnin=0, num_draws=draws, thin=1, batch_size=4)
    response = jp.susceptibilities(
        jax.random.key(0), posterior, jp.sgld(step_size=0.01), plan, probes={"p": data},
        observables={"a": lambda params: params["w"][0]}, estimator=jp.covariance(),
        progress=False,
    )
    jax.block_until_ready(response.chi["p"])
    print(draws, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
"""


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_thousand_draws():
    """Of what is kept of a draw only the trace of φ grows: 8 bytes here, and R-hat ranks it."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "1000", "2000", "100000"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    _, few, many = (int(line.split()[1]) for line in run.stdout.splitlines())
    # The losses of all draws would be 512 × 2 × 4 bytes a draw, 391 MiB; the rest is a program
    # that is compiled for another number of draws, and the ranks of R-hat.
    assert many - few < 150 * 2**20, run.stdout
