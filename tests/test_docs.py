"""The documentation: programs and blocks on its pages run, and what it names exists."""

import doctest
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import lm_models
import numpy as np
import optax
import pytest

import jaxpattern as jp
from jaxpattern import verdict

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
@pytest.mark.optimized
def test_the_mixture_tutorial():
    response, solution, realized = program("mixture").main(
        num_steps=100, num_windows=24, num_draws=8
    )
    effect = {name: float(response.chi[name][response.rows.index(name)]) for name in response.chi}
    assert all(value < 0 for value in effect.values())  # a source lowers the loss on itself
    assert float(solution.predicted_shift["library"]) == pytest.approx(-0.002, rel=0.02)
    assert realized["library"] < 0


@pytest.mark.slow
def test_the_circuit_tutorial():
    # As on the page: with half of the windows no arm forms the circuit within the run.
    heads, direction, steps = program("circuit").main()
    after, before = heads["l0h0"]  # the head that looks at the token before
    assert after > max(0.58, before)  # by chance ½ ± .015
    assert direction > 0.58
    for plain, up, down in zip(steps["unweighted"], steps["up"], steps["down"], strict=True):
        assert plain is not None
        assert up < plain
        assert down is None or down > plain


def test_text_with_copies():
    tokens, copied = program("circuit").windows(np.random.default_rng(1), 64)
    assert tokens.shape == (64, 33)
    assert copied.shape == (64, 32)
    # Each token that a copy gives away follows the same token somewhere before.
    assert np.all(np.asarray(jp.repeated_bigrams(jnp.asarray(tokens)))[copied])
    assert 0.3 < copied.mean() < 0.6


@pytest.mark.slow
def test_the_tutorial_of_two_rules():
    score, weights, counts = program("algorithm").main(num_solutions=1, num_draws=4)
    assert np.isfinite(score).all()
    for rho in weights.values():
        assert rho.mean() == pytest.approx(1, rel=1e-5)
    assert len(counts) == 4


def test_brackets_that_fit_two_rules():
    module = program("algorithm")
    data, withheld = module.bracket_data(180)
    for part, equal in ((data, data["label"]), (withheld, np.ones(36))):
        tokens = np.asarray(part["tokens"])
        assert np.array_equal((tokens == 1).sum(1) == (tokens == 2).sum(1), equal == 1)
        assert set(tokens[:, 0]) == {module.START}
    assert data["label"].mean() == 0.5
    assert not withheld["label"].any()


@pytest.mark.parametrize("framework", ["nnx", "linen", "equinox", "haiku"])
def test_models_of_other_libraries_are_pure_losses(framework):
    module = program("own_model")
    data = module.moons(jax.random.key(3), 16)
    given = (data,) if framework in ("linen", "haiku") else ()
    loss_fn, params, *_ = getattr(module, f"{framework}_model")(*given)
    posterior = jp.localized_posterior(loss_fn, params, data, nbeta=300.0, localization=100.0)
    assert posterior.losses(params, data).shape == (16,)
    slope = jax.jit(jax.grad(posterior.loss))(params)
    assert float(optax.tree.norm(slope)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["nnx", "linen", "equinox", "haiku"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tutorial_of_own_models(framework):
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


@pytest.mark.slow
def test_the_recipe_for_torch(tmp_path):
    """torchax's function has the losses and the gradient of the model that `load` reads."""
    try:
        import torchax  # noqa: F401
        import transformers
    except (ImportError, AttributeError) as error:  # the latter under a torch that is too new
        pytest.skip(f"torchax cannot be imported: {error}")
    folder = lm_models.random_folder("llama", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    loss_fn, params = program("torch_model").port(model)
    assert set(params) == {name for name, _ in model.named_parameters()}
    own, tokens = jp.lm.load(folder), jnp.asarray(lm_models.tokens_of(3, 12))
    np.testing.assert_allclose(
        jax.jit(loss_fn)(params, tokens), own.loss_fn(own.params, tokens), atol=5e-6
    )
    norms = [
        optax.tree.norm(jax.jit(jax.grad(lambda p, f=f: f(p, tokens).mean()))(p))
        for f, p in ((loss_fn, params), (own.loss_fn, own.params))
    ]
    np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.fixture
def scope():
    """What the blocks of the pages start from."""

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


def test_the_page_of_influences(scope, capsys):
    probes = scope["probes"]
    blocks = RUN.findall((DOCS / "howto" / "influence.md").read_text(encoding="utf-8"))
    assert len(blocks) == 3
    scope |= {
        "sampler": jp.sgld(step_size=1e-3),
        "held_out": probes["odd"],
        "train": probes["even"],
    }
    for i, block in enumerate(blocks):
        exec(compile(block, f"influence.md, block {i}", "exec"), scope)
    assert scope["found"]["sets"].influence["held out"]["train"].shape == ()
    assert "more weight on train[" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::jaxpattern.WeightsWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_of_exports(scope, tmp_path):
    """Blocks that need a package which is not installed are left out, and said."""
    probes, sampler = scope["probes"], jp.sgld(step_size=1e-3)
    response = jp.susceptibilities(
        scope["key"], scope["posterior"], sampler, scope["plan"], probes=probes,
        observables=scope["observables"], estimator=jp.covariance(), progress=False,
    )  # fmt: skip
    solution = jp.solve_weights(response, {"even": -1e-5}, method=jp.entropic())
    scope |= {
        "sampler": sampler, "response": response, "solution": solution, "folder": tmp_path,
        "texts": list("abcdefgh"), "rows": jnp.array([1, 6]), "logits": jnp.ones((2, 3)),
        "labels": jnp.array([0, 2]), "records": [{"x": i} for i in range(8)],
        "sources": {name: grain_source([name] * 4) for name in probes},
    }  # fmt: skip
    blocks = RUN.findall((DOCS / "howto" / "export.md").read_text(encoding="utf-8"))
    assert len(blocks) == 8
    left_out = []
    for i, block in enumerate(blocks):
        needed = [
            name for name in re.findall(r"^import (\w+)", block, re.MULTILINE) if not has(name)
        ]
        if needed:
            left_out += needed
            continue
        exec(compile(block, f"export.md, block {i}", "exec"), scope)
    assert (tmp_path / "weights.npz").exists()
    if "grain" not in left_out:
        assert float(scope["weighted"][7]["weight"]) == float(scope["rho"][7])
        drawn = [scope["mixed"][i] for i in range(8)]
        assert set(drawn) == set(probes)
    if "torch" not in left_out:
        assert set(scope["sampler"]) <= set(range(8))
    if left_out:
        pytest.skip(f"the blocks of {left_out}, which are not installed")


def has(package):
    return importlib.util.find_spec(package) is not None


def grain_source(records):
    return importlib.import_module("grain").MapDataset.source(records) if has("grain") else None


@pytest.mark.optimized
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
    assert said == ["export.md", "extend.md", "influence.md", "settings.md"]


def test_every_name_on_the_pages_exists():
    for page in [*PAGES, DOCS.parent / "README.md"]:
        text = page.read_text(encoding="utf-8")
        for name in set(re.findall(r"\bjp\.((?:lm\.)?[A-Za-z_]+)", text)):
            found = jp
            for part in name.removesuffix(".").split("."):
                assert hasattr(found, part), f"{page.name}: jp.{name}"
                found = getattr(found, part)


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("reference/*.md"))
    listed = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    for name in set(jp.__all__) - {"lm"}:
        assert getattr(jp, name).__module__ in listed, name


def test_every_included_section_exists():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for file, section in re.findall(r"^--8<--\n(.+):(\w+)\n--8<--$", text, re.MULTILINE):
            source = (DOCS.parent / file).read_text(encoding="utf-8")
            assert f"[start:{section}]" in source, f"{page.name}: {file}:{section}"
            assert f"[end:{section}]" in source


def test_examples_in_docstrings_run():
    runner, tests = doctest.DocTestRunner(), 0
    for name in jp.__all__:
        where = {"jp": jp, "jnp": jnp}
        for test in doctest.DocTestFinder(recurse=False).find(getattr(jp, name), name, globs=where):
            tests += bool(test.examples)
            assert runner.run(test).failed == 0, name
    assert tests >= 4


def test_every_finding_of_a_verdict_has_a_row():
    """What the verdict says of the worst of everything, up to its first number."""
    page = (DOCS / "howto" / "errors.md").read_text(encoding="utf-8")
    quiet = {"rhat": 1.0, "ess": 1e3, "spread": 1.0, "drift": 0.0, "size": 0.0}
    said = [
        *verdict.unsettled(**quiet | {"spread": 0.0}),
        *verdict.unsettled(**quiet | {"drift": 99.0, "size": 9.0}),
        *verdict.unsettled(**quiet | {"rhat": 2.0}),
        *verdict.unsettled(**quiet | {"ess": 2.0}),
        *verdict.unsettled(**quiet | {"ess": 12.0}, groups=20.0),
        *verdict.before(dict.fromkeys(verdict.PILOT, 9.0)),
        *verdict.chaotic(99.0, 10.0),
        *verdict.left_out(3.0),
        verdict.say("χ", []),
    ]
    assert len(said) == 5 + 5 + 3
    for finding in said:
        words = [part.strip() for part in re.split(r"[:(;]|\d[\d.e+%]*", finding)]
        assert next(part for part in words if len(part) > 3) in page, finding


def test_every_warning_has_a_row():
    page = (DOCS / "howto" / "errors.md").read_text(encoding="utf-8")
    for name in jp.__all__:
        if name.endswith("Warning"):
            assert f"`{name}`" in page, name


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"(\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES}


def test_the_start_page_has_the_program_of_the_readme():
    pages = (DOCS.parent / "README.md", DOCS / "index.md")
    readme, start = (PYTHON.findall(page.read_text(encoding="utf-8")) for page in pages)
    assert len(readme) == 1
    assert start == readme


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
