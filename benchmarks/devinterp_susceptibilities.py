"""χ of a language model, against devinterp 2.0.1: the same posterior, weights, text and machine.

Claimed: to the same per-token error of the heads' χ, the pathwise estimator needs at least 50 times
less CPU time than devinterp, at nβ = 30, γ = 300, ε = 1e-3, mini-batches of 16, four chains. The
claim is held against the covariance of devinterp's draws, without its chains over all weights. The
form it publishes adds −E[φ](E[D] − E_full[D]), D = ℓ_z − L, which is most of it here, where all
weights together move the losses far more than a head does, and φ has the level of other data in it.

A GPT-2-shaped transformer is trained on library code and carried over to torch, where logits and
losses agree to 1e-5, or to the rounding of float32 where that is more. Then

  (a) the same estimator on as many draws, ours (hybrid form) and theirs: CPU seconds, seconds,
      peak memory above what is loaded, bytes written;
  (b) the error of χ against CPU seconds, for devinterp, our covariance (centred) and pathwise, as
      `devinterp_chi.py` compares them;
  (c) the hybrid form on devinterp's own stored losses, through our moments, equals its χ to
      rounding.

    python benchmarks/devinterp_susceptibilities.py [--quick] [--large] [--out benchmarks/results]

writes one JSON line a row and a figure, and exits with 1 when a claim fails. `--large` takes four
layers of width 128. Needs the bench extra.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jaxpattern as jp
import language_model
import measure
from devinterp_chi import Setting, Task, compare


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--large", action="store_true", help="four layers of width 128")
    parser.add_argument("--steps", type=int, default=None, help="training steps")
    parser.add_argument("--draws", type=int, default=None, help="draws of a chain")
    parser.add_argument("--heads", nargs="+", default=None, help="some heads instead of all")
    options = parser.parse_args(argv)
    import torch_model

    config = language_model.LARGE if options.large else language_model.GPT2
    name = "devinterp_susceptibilities" + ("_large" if options.large else "")
    report, setting = measure.Report(name, options), Setting()
    steps = options.steps or (300 if options.quick else 1000)
    model = language_model.trained_model(config, steps, num_probes=2 * setting.batch)
    logits, losses = torch_model.check_port(model.loss_fn, model.params, model.probes)
    report.add(
        f"ported: logits differ by {logits:.1e}, losses by {losses:.1e}",
        part="port", logits=logits, losses=losses,
    )  # fmt: skip
    every = list(jp.components(model.params, kinds="head"))
    heads = options.heads or (["l1h0"] if options.quick else every)
    if unknown := set(heads) - set(every):
        parser.error(f"--heads: no {', '.join(sorted(unknown))} among {', '.join(every)}")
    task = ported(model, heads, setting)
    draws = options.draws or (30 if options.quick else 100)
    estimators = {
        "covariance (hybrid)": (jp.covariance(form="hybrid"), draws),
        "covariance": (jp.covariance(), draws),
        "pathwise": (jp.pathwise(), max(10, draws // 5)),
    }
    truth = 2 * draws if options.quick else draws
    compare(report, task, draws, estimators, truth, of_heads=len(every))
    return report.close()


def ported(model: language_model.Trained, heads: Sequence[str], setting: Setting) -> Task:
    """χ of heads of a trained model, and the same model in torch."""
    import torch_model

    every = jp.components(model.params, kinds="head")
    return Task(
        setting, model.loss_fn, model.params, model.data, model.probes[: setting.batch],
        components={head: every[head] for head in heads},
        torch_model=lambda: torch_model.to_torch(model.params, model.loss_fn.config),
        masks=torch_model.head_masks, losses=torch_model.losses,
    )  # fmt: skip


if __name__ == "__main__":
    measure.pin()
    sys.exit(main())
