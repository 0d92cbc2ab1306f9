"""χ of a head, against the torch loop that a researcher would write.

Claimed: to the same per-token error the pathwise estimator needs at least 20 times less CPU time.

The loop is plain SGLD on the weights of one head, with gradients of every sample by `torch.func`
(or of the mini-batch by autograd, where one does without), the losses of the probes kept at every
draw, and χ their covariance at the end. Posterior, weights, text and plan are those of
`devinterp_susceptibilities.py`, and so is the gain: half the mean squared difference of two seeds,
times CPU seconds.

    python benchmarks/torch_loop.py [--quick] [--out benchmarks/results]

writes one JSON line a row and a figure, exits with 1 when the claim fails; needs the bench extra.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import jaxpattern as jp
import language_model
import measure
from devinterp_chi import Setting, Task, draw, noise
from devinterp_susceptibilities import ported

CLAIMED = 20.0
HEAD = "l1h0"


def torch_chi(task: Task, draws: int, seed: int, per_sample: bool) -> np.ndarray:
    """χ_z = −Cov[φ, ℓ_z − L], [B, T]."""
    import torch
    from torch.func import functional_call, grad, vmap

    import torch_model

    s, generator = task.setting, torch.Generator().manual_seed(seed)
    model = task.torch_model()
    model.requires_grad_(False)
    masks = {name: m.float() for name, m in task.masks(model, HEAD).items()}
    centre = {name: model.get_parameter(name).clone() for name in masks}
    data, probes, reference = (
        torch.tensor(np.asarray(x), dtype=torch.long)
        for x in (task.data, task.probes, task.reference)
    )

    def losses(part: dict[str, Any], ids: Any) -> Any:
        return torch_model.losses(lambda tokens: functional_call(model, part, (tokens,)), ids)

    gradient = grad(lambda part, ids: losses(part, ids).mean())
    of_each = vmap(lambda part, row: gradient(part, row[None]), in_dims=(None, 0))
    phis, deviations = [], []
    for _ in range(s.chains):
        w = {name: x.clone() for name, x in centre.items()}
        for t in range(1, s.burnin + s.thin * draws + 1):
            ids = data[torch.randint(len(data), (s.batch,), generator=generator)]
            if per_sample:
                g = {name: x.mean(0) for name, x in of_each(w, ids).items()}
            else:
                g = gradient(w, ids)
            for name, mask in masks.items():
                drift = s.nbeta * g[name] + s.localization * (w[name] - centre[name])
                normal = torch.randn(mask.shape, generator=generator)
                step = s.step_size**0.5 * normal - s.step_size / 2 * drift
                w[name] = w[name] + mask * step
            if t > s.burnin and (t - s.burnin) % s.thin == 0:
                level = losses(w, reference).mean()
                phis.append(level)
                deviations.append(losses(w, probes) - level)
    phi, d = torch.stack(phis).double(), torch.stack(deviations).double()
    phi, d = phi - phi.mean(), d - d.mean(0)
    return (-torch.tensordot(phi, d, 1) / (len(phi) - 1)).numpy()


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=int, default=None, help="training steps")
    parser.add_argument("--draws", type=int, default=None, help="draws of a chain")
    options = parser.parse_args(argv)
    report = measure.Report("torch_loop", options)
    steps = options.steps or (300 if options.quick else 1000)
    draws = options.draws or (24 if options.quick else 100)
    setting = Setting()
    model = language_model.trained_model(language_model.GPT2, steps, num_probes=2 * setting.batch)
    task = ported(model, [HEAD], setting)

    def library(estimator: Any, num_draws: int, seed: int) -> np.ndarray:
        return np.asarray(task.ours(estimator, num_draws, seed).chi["text"][0])

    rows = {}
    for label, run in (
        ("torch, gradients of samples", lambda seed: torch_chi(task, draws, seed, True)),
        ("torch, autograd", lambda seed: torch_chi(task, draws, seed, False)),
        ("covariance", lambda seed: library(jp.covariance(), draws, seed)),
        ("pathwise", lambda seed: library(jp.pathwise(), max(10, draws // 5), seed)),
    ):
        first, second = (measure.cpu_seconds(lambda s=seed, r=run: r(s)) for seed in range(2))
        rows[label] = {
            "cpu_seconds": second[0], "compilation": first[0] - second[0],
            "noise": noise(first[1], second[1]),
        }  # fmt: skip
    best = rows["pathwise"]
    for label, row in rows.items():
        gain = row["noise"] * row["cpu_seconds"] / (best["noise"] * best["cpu_seconds"])
        report.add(
            f"{label:28s} {row['cpu_seconds']:7.1f} CPU s, standard error {row['noise'] ** 0.5:.2e}"
            f"; pathwise to the same error: {gain:.1f} times less CPU time",
            side=label, draws=draws, gain=gain, **row,
        )  # fmt: skip
        if label.startswith("torch"):
            report.claim(f"{label}: gain {gain:.1f} >= {CLAIMED:g}", gain >= CLAIMED)
    draw(report, rows, {}, setting, draws)
    return report.close()


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
