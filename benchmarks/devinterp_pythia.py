"""χ of heads of a Pythia-14M-shaped GPT-NeoX, against devinterp 2.0.1: one folder, read by both.

Claimed: to the same per-token error of the χ of four heads, the pathwise estimator needs at least
50 times less CPU time than the covariance of devinterp's draws, without its chains over all
weights; and devinterp's formula on its own draws is ours to 1e-6.

Six layers of width 128, four heads, MLPs of width 512, rotary positions on a quarter of a head,
parallel residual, a read-out of its own: Pythia-14M but for the vocabulary, which is cut from
50,304 to the 4,096 sub-words of this text (the rest would never occur, and would be nine tenths of
the parameters). transformers makes it, `jp.lm.load` reads it, `jp.train` trains it on library code,
`jp.lm.save` writes it, and both sides read that folder: transformers for devinterp, `jp.lm.load`
for us. Then as `devinterp_chi.py` compares them: the error of χ times the square root of CPU time.

    python benchmarks/devinterp_pythia.py [--quick | --tiny] [--out benchmarks/results]

writes one JSON line a row and a figure, and exits with 1 when a claim fails; estimated at 15
minutes of CPU time, half of that with `--quick`. `--tiny` is for tests: width 32, hardly
trained. Needs the bench extra.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpattern as jp
import measure
from devinterp_chi import Setting, Task, compare
from jaxpattern.data import subwords, text

HEADS = ("l0h0", "l2h1", "l3h2", "l5h3")
ROUNDING = 1e-6


class Size(NamedTuple):
    """What the time depends on."""

    width: int = 128
    vocabulary: int = 4096
    max_bytes: int = 4_000_000
    context: int = 32
    steps: int = 200
    batch: int = 64
    draws: int = 10
    pathwise_draws: int = 8


SIZES = {
    "full": Size(),
    "quick": Size(steps=60, draws=4, pathwise_draws=4),
    "tiny": Size(32, 300, 60_000, 8, steps=4, batch=8, draws=4, pathwise_draws=4),
}
SETTING = Setting(batch=8, burnin=32, chains=2)
SHORT = SETTING._replace(batch=4, burnin=8, thin=2, step_size=5e-3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="for tests")
    options = parser.parse_args(argv)
    kind = "tiny" if options.tiny else "quick" if options.quick else "full"
    size, setting = SIZES[kind], SHORT if options.tiny else SETTING
    options.quick |= options.tiny
    report = measure.Report("devinterp_pythia", options)
    with tempfile.TemporaryDirectory() as place:
        folder, data, probes = trained(report, size, Path(place))
        task = task_of(folder, data, probes[: setting.batch], setting)
        check_port(report, folder, task)
        estimators = {"pathwise": (jp.pathwise(), size.pathwise_draws)}
        compare(
            report, task, size.draws, estimators, size.pathwise_draws,
            of_heads=6 * 4, width=size.width, vocabulary=size.vocabulary,
        )  # fmt: skip
    hybrid = next(row for row in report.rows() if row["part"] == "hybrid")
    worst = max(hybrid["ours"], hybrid["theirs"])
    report.claim(
        f"the same formula on the same draws: {worst:.1e} <= {ROUNDING}", worst <= ROUNDING
    )
    return report.close()


def trained(report: measure.Report, size: Size, place: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """The folder of a model trained on library code; its windows, and held-out ones."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    documents = text.python_corpus(size.max_bytes)["library"]
    sides = text.split_by_file(documents, 0.1)
    tokenizer = subwords.train_tokenizer(sides[0], size.vocabulary)
    rng = np.random.default_rng(0)
    data, probes = (
        rng.permutation(subwords.token_windows(tokenizer, side, size.context + 1)) for side in sides
    )
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        num_hidden_layers=6, hidden_size=size.width, num_attention_heads=4,
        intermediate_size=4 * size.width, vocab_size=size.vocabulary, max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25
        },
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(place / "random")
    model = jp.lm.load(place / "random")
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, size.steps // 10, size.steps, 1e-4)

    def train() -> Any:
        return jp.train(
            jax.random.key(0), model.loss_fn, model.params, jnp.asarray(data), optax.adamw(rate),
            num_steps=size.steps, batch_size=size.batch, progress=False,
        )  # fmt: skip

    cpu, (params, history) = measure.cpu_seconds(train)
    jp.lm.save(model, place / "trained", params)
    losses = np.asarray(history.loss)
    first, last = (float(x.mean()) for x in (losses[:4], losses[-20:]))
    held_out = float(model.loss_fn(params, probes[:64]).mean())
    report.add(
        f"{model}\ntrained {size.steps} steps of {size.batch} × {size.context} tokens in {cpu:.0f} "
        f"CPU s: {first:.2f} → {last:.2f} nats a token, held out {held_out:.2f}",
        part="trained", cpu_seconds=cpu, first=first, last=last, held_out=held_out,
        steps=size.steps, tokens=size.steps * size.batch * size.context,
    )  # fmt: skip
    return place / "trained", data, probes


def task_of(folder: Path, data: np.ndarray, probes: np.ndarray, setting: Setting) -> Task:
    """χ of the heads, by the model of a folder."""
    model = jp.lm.load(folder)
    return Task(
        setting, model.loss_fn, model.params, jnp.asarray(data), jnp.asarray(probes),
        components=jp.components(model, HEADS),
        torch_model=lambda: torch_model(folder), masks=head_masks, losses=losses,
    )  # fmt: skip


def torch_model(folder: Path) -> Any:
    """The model of a folder, as transformers reads it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def losses(model: Any, tokens: Any) -> Any:
    """The loss of each next token, [B, T] of tokens [B, T + 1]."""
    from torch.nn.functional import cross_entropy

    logits = model(tokens[:, :-1], use_cache=False).logits
    flat = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


def head_masks(model: Any, name: str) -> dict[str, Any]:
    """The weights of one head, such as l1h0, as devinterp takes them.

    Rows of `query_key_value` are query, key and value of the first head, then of the second.
    """
    import torch

    layer, head = map(int, name[1:].split("h"))
    width = model.config.hidden_size // model.config.num_attention_heads
    path = f"gpt_neox.layers.{layer}.attention"
    rows, columns = (
        slice(step * head, step * (head + 1)) for step in (3 * width, width)
    )  # of the fused product, of the output
    masks = {}
    for part, where in (
        ("query_key_value.weight", rows),
        ("query_key_value.bias", rows),
        ("dense.weight", (slice(None), columns)),
    ):
        mask = torch.zeros_like(model.get_parameter(f"{path}.{part}"), dtype=torch.bool)
        mask[where] = True
        masks[f"{path}.{part}"] = mask
    return masks


def check_port(report: measure.Report, folder: Path, task: Task) -> None:
    """Both read the same function: losses against those of torch in float64."""
    import torch

    ids = torch.tensor(np.asarray(task.probes), dtype=torch.long)
    model = task.torch_model()
    with torch.no_grad():
        theirs = losses(model, ids).numpy()
        exact = losses(model.double(), ids).numpy()
    ours = np.asarray(task.loss_fn(task.params, task.probes))
    off, rounding = (float(np.abs(x - exact).max()) for x in (ours, theirs))
    report.add(
        f"losses are off those of float64 by {off:.1e}, torch's in float32 by {rounding:.1e}",
        part="port", losses=off, rounding=rounding,
    )  # fmt: skip
    report.claim("losses are torch's to 1e-5, or to rounding", off <= max(1e-5, 2 * rounding))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    measure.pin()
    sys.exit(main())
