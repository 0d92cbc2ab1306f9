"""The example of losses on pairs, at its smallest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import preferences as example


def test_the_loss_is_that_of_bradley_and_terry():
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(4, 3)), "bias": rng.normal(size=3), "out": rng.normal(size=3)}
    batch = {side: rng.normal(size=(5, 4)) for side in ("chosen", "rejected")}

    def reward(x):
        return np.tanh(x @ params["in"] + params["bias"]) @ params["out"]

    margin = reward(batch["chosen"]) - reward(batch["rejected"])
    found = example.loss_fn(*jax.tree.map(jnp.float32, (params, batch)))
    # Sums of a few float32 numbers of order one.
    np.testing.assert_allclose(found, -np.log(1 / (1 + np.exp(-margin))), rtol=2e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the weights are predicted")
@pytest.mark.filterwarnings("ignore:weights run from")
@pytest.mark.optimized
def test_runs(capsys):
    response, solution, shifts = example.main(count=16, num_steps=60, num_draws=40, seeds=2)
    said = capsys.readouterr().out
    assert response.rows == tuple(example.KINDS)
    assert {name: chi.shape for name, chi in response.chi.items()} == dict.fromkeys(
        example.KINDS, (3, 16)
    )
    assert all(kind in said for kind in example.KINDS)
    # The target alone, in the direction asked for.
    assert float(solution.predicted_shift["prose"]) == pytest.approx(-0.004, rel=0.05)
    assert np.isfinite(shifts).all()
