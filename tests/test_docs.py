"""The documentation: programs and blocks on its pages run, and what it names exists."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import lm_models
import optax
import pytest

import jaxpattern as jp

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = re.compile(r"^<!-- run -->\n" + PYTHON.pattern, re.MULTILINE | re.DOTALL)


def program(name):
    """A tutorial's program, imported."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "tutorials" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::jaxpattern.WeightsWarning")
def test_the_mixture_tutorial():
    response, solution, realized = program("mixture").main(
        num_steps=200, num_windows=48, num_draws=8
    )
    effect = {name: float(response.chi[name][response.rows.index(name)]) for name in response.chi}
    assert all(value < 0 for value in effect.values())  # a source lowers the loss on itself
    assert float(solution.predicted_shift["library"]) == pytest.approx(-0.002, rel=0.02)
    assert realized["library"] < 0


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["nnx", "linen", "equinox", "haiku"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tutorial_of_own_models(framework):
    package = {"nnx": "flax", "linen": "flax"}.get(framework, framework)
    pytest.importorskip(package)
    (response,) = program("own_model").main((framework,), num_draws=10).values()
    for row in ("up", "down"):
        assert float(response.chi[row][response.rows.index(row)].mean()) < 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxpattern.WeightsWarning")
@pytest.mark.filterwarnings("ignore::jaxpattern.UnreachableTargetWarning")
def test_the_checkpoint_tutorial(tmp_path):
    pytest.importorskip("safetensors")
    folder, out = lm_models.random_folder("llama", tmp_path / "model"), tmp_path / "out"
    response, directions, _ = program("checkpoint").main(folder, out, num_draws=4)
    assert response.chi["text"].shape == (4, 16, 15)
    assert directions.coordinates["text"].shape[1:] == (16, 15)
    before, after = jp.lm.load(folder), jp.lm.load(out)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before.params, after.params)
    assert max(jax.tree.leaves(moved)) > 0
    assert moved["embed"]["W_E"] == 0  # below the split nothing moves


@pytest.fixture
def scope():
    """What the blocks of `howto/extend.md` start from."""

    def loss_fn(params, batch):
        return 0.5 * batch["h"] * (params["w"].sum() - batch["c"]) ** 2

    key = jax.random.key(0)
    data = {"h": jnp.ones(8), "c": jax.random.normal(key, (8,))}
    start = {"w": jnp.zeros(3)}
    rows = {"even": slice(0, None, 2), "odd": slice(1, None, 2)}
    probes = {name: jax.tree.map(lambda x, at=at: x[at], data) for name, at in rows.items()}
    return {
        "jax": jax, "jnp": jnp, "jp": jp, "optax": optax, "key": jax.random.key(1),
        "posterior": jp.localized_posterior(loss_fn, start, data, nbeta=10.0, localization=100.0),
        "plan": jp.Plan(num_chains=4, num_burnin=20, num_draws=8, thin=4), "probes": probes,
        "observables": jp.mean_losses(loss_fn, probes),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::jaxpattern.WeightsWarning")
def test_blocks_that_say_run(scope, monkeypatch):
    blocks = RUN.findall((DOCS / "howto" / "extend.md").read_text(encoding="utf-8"))
    assert len(blocks) == 4
    for i, block in enumerate(blocks):
        exec(compile(block, f"extend.md, block {i}", "exec"), scope)
    assert scope["response"].estimator == "pathwise, widened"
    assert scope["recorded"].kept.shape == (1, 4, 8)
    shift = float(scope["solution"].predicted_shift["even"])
    assert shift == pytest.approx(-1e-6, rel=1e-3)


def test_the_settings_page_fails_and_repairs(capsys):
    page = (DOCS / "howto" / "settings.md").read_text(encoding="utf-8")
    blocks, scope = RUN.findall(page), {}
    assert len(blocks) == 3
    for i, block in enumerate(blocks):
        exec(compile(block, f"settings.md, block {i}", "exec"), scope)
    first, second = capsys.readouterr().out.split("Proposed: ")[1:]
    assert "step too large: εP" in first
    assert "too little signal: the data lower" in first
    assert "not settled: a flat direction" in second
    assert scope["settings"].verdict == "healthy"
    assert scope["lam"].verdict == "nothing found that speaks against it"


def test_only_pages_that_are_tested_say_run():
    said = [page.name for page in PAGES if RUN.search(page.read_text(encoding="utf-8"))]
    assert said == ["extend.md", "settings.md"]


def test_every_name_on_the_pages_exists():
    for page in [*PAGES, DOCS.parent / "README.md"]:
        text = page.read_text(encoding="utf-8")
        for name in set(re.findall(r"\bjp\.((?:lm\.)?[A-Za-z_]+)", text)):
            found = jp
            for part in name.removesuffix(".").split("."):
                assert hasattr(found, part), f"{page.name}: jp.{name}"
                found = getattr(found, part)


def test_every_included_section_exists():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for file, section in re.findall(r"^--8<--\n(.+):(\w+)\n--8<--$", text, re.MULTILINE):
            source = (DOCS.parent / file).read_text(encoding="utf-8")
            assert f"[start:{section}]" in source, f"{page.name}: {file}:{section}"
            assert f"[end:{section}]" in source


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"(\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES}


def test_python_on_the_pages_compiles():
    for page in PAGES:
        for block in PYTHON.findall(page.read_text(encoding="utf-8")):
            if "--8<--" not in block:
                compile(block, page.name, "exec")


def test_the_version_is_the_same_everywhere():
    root, version = DOCS.parent, jp.__version__
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version = {{{version}}}" in (DOCS / "cite.md").read_text(encoding="utf-8")
    first = re.search(r"^## (\S+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    assert first == version
