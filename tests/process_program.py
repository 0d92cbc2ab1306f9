"""One of several processes: runs a driver over a mesh of all of them, and writes what it got.

python tests/process_program.py ADDRESS NUMBER INDEX DEVICES DRIVER FOLDER [die]

FOLDER/result-INDEX.npz holds the leaves of the result. With `die` process 1 kills itself after
the second save. Without an address the environment says who takes part.
"""

import os
import signal
import sys
from pathlib import Path

import jax

address, number, index, devices, driver, folder, *rest = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(devices))

import jaxpattern as jp  # noqa: E402

explicit = (address, int(number), int(index)) if address else ()
try:
    jp.start(*explicit, wait_seconds=int(os.environ.get("WAIT", "60")), heartbeat_seconds=10)
except jp.ProcessError as error:
    sys.exit(f"ProcessError: {error}")

import checkpoint_program as program  # noqa: E402
import numpy as np  # noqa: E402

from jaxpattern.runtime.checkpoint import Stage  # noqa: E402

folder = Path(folder)
checkpoint = jp.Checkpoint(folder / "run", every_seconds=0) if rest else None
if "die" in rest and int(index) == 1:
    save, count = Stage.save, [0]

    def dying(stage, position, state):
        save(stage, position, state)
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Stage.save = dying

mesh = jp.mesh()
if driver == "fed":
    mine = jax.tree.map(lambda x: np.asarray(x)[2 * int(index) : 2 * int(index) + 2], program.DATA)
    mesh = jp.mesh(data=2)
    probes = {"p": jp.from_processes(mesh, mine)}
    result = jp.susceptibilities(
        program.key(), program.posterior(), program.SAMPLER, program.PLAN, probes=probes,
        observables={"a": lambda params: params["a"].sum()}, estimator=jp.covariance(),
        progress=False, mesh=mesh,
    )  # fmt: skip
else:
    result = program.DRIVERS[driver](mesh=mesh, checkpoint=checkpoint)
np.savez(folder / f"result-{index}.npz", *map(np.asarray, jax.tree.leaves(result)))
