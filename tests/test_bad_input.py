"""Bad input meets a clear error that names the argument and what came, before any sampling."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.base import SamplingAlgorithm
from jaxtyping import config

import jaxpattern as jp

KEY = jax.random.key(0)
# NumPy makes arrays that compile nothing when tests are collected.
ROWS = np.linspace(-1.0, 1.0, 21, dtype=np.float32).reshape(7, 3)
ONES = np.ones((2, 3), np.float32)
PARAMS = jax.device_put({"a": np.array([0.1, 0.2, 0.3], np.float32), "b": ONES})
DATA = jax.device_put({"x": ROWS, "y": np.zeros(7, np.float32)})
BAD_ROW = jax.device_put({"x": np.where(ROWS[4, 1] == ROWS, np.nan, ROWS), "y": DATA["y"]})
ALL = jp.by_path("*")


def loss_fn(params: Any, batch: Any) -> jax.Array:
    return (batch["x"] @ (params["a"] + params["b"].sum(0)) - batch["y"]) ** 2


def token_loss(params: Any, batch: Any) -> jax.Array:
    return loss_fn(params, batch)[:, None] * jnp.ones((1, 2))


def first(params: Any) -> jax.Array:
    return params["a"][0]


def position_init(position: Any, key: Any) -> Any:
    del key
    return position


def untouchable(*arguments: Any) -> Any:
    raise AssertionError("sampled before the arguments were checked")


def trap(posterior: jp.Posterior) -> SamplingAlgorithm:
    """A sampler that must never step."""
    return SamplingAlgorithm(position_init, lambda key, state, minibatch: untouchable())


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        return loss_fn(params, batch)


@pytest.fixture(autouse=True)
def annotations_unchecked() -> Iterator[None]:
    """Users have no beartype in front of the package: what they meet is the package itself."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def good() -> SimpleNamespace:
    posterior = jp.localized_posterior(loss_fn, PARAMS, DATA, nbeta=3.0, localization=1.0)
    return SimpleNamespace(
        posterior=posterior,
        head=jp.restrict(posterior, jp.by_path("a")),
        plan=jp.Plan(num_chains=2, num_burnin=1, num_draws=4, thin=1),
    )


def posterior(
    loss: Any = loss_fn, params: Any = PARAMS, data: Any = DATA, **changes: Any
) -> Callable:
    settings = {"nbeta": 3.0, "localization": 1.0} | changes
    return lambda good: jp.localized_posterior(loss, params, data, **settings)


def weighted(weights: Any, loss: Any = loss_fn) -> Callable:
    return posterior(loss, weights=weights)


def plan(**settings: Any) -> Callable:
    return lambda good: jp.Plan(**settings)


def restrict(restriction: Any) -> Callable:
    """The restriction may be a function that makes it, where making it fails."""

    def act(good: SimpleNamespace) -> None:
        made = restriction() if not isinstance(restriction, jp.Restriction) else restriction
        jp.restrict(good.posterior, made)

    return act


def sample(
    key: Any = KEY,
    posterior: Any = None,
    sampler: Any = trap,
    plan: Any = None,
    observe: Any = first,
) -> Callable:
    def act(good: SimpleNamespace) -> None:
        given = posterior(good) if callable(posterior) else posterior
        jp.sample(
            key,
            good.posterior if given is None else given,
            sampler,
            good.plan if plan is None else plan,
            observe,
        )

    return act


def chi(*, head: bool = False, sampler: Any = trap, **changes: Any) -> Callable:
    def act(good: SimpleNamespace) -> None:
        settings = {"probes": {"p": DATA}, "observables": {"f": first}} | changes
        jp.susceptibilities(
            KEY, good.head if head else good.posterior, sampler, good.plan, **settings
        )

    return act


def algorithm(step: Callable, init: Callable = position_init) -> Callable:
    return lambda posterior: SamplingAlgorithm(init, step)


CASES: dict[str, tuple[Callable, type[Exception], str]] = {
    # keys
    "key raw": (
        sample(key=jnp.zeros(2, jnp.uint32)),
        TypeError,
        r"key must be a typed .*uint32\[2\]",
    ),
    "key int": (sample(key=0), TypeError, "key must be a typed key .*int"),
    "key none": (sample(key=None), TypeError, "key must be a typed key .*NoneType"),
    "keys": (sample(key=jax.random.split(KEY)), TypeError, r"key must be one key.*\(2,\)"),
    # loss
    "loss not callable": (posterior(3), TypeError, "loss_fn must be a function .*int"),
    "loss of one argument": (posterior(lambda p: p), TypeError, "loss_fn must be a function"),
    "loss unhashable": (posterior(Unhashable()), TypeError, "loss_fn must be hashable.*Unhashable"),
    "loss reduces": (
        posterior(lambda p, b: loss_fn(p, b).mean()),
        ValueError,
        r"loss_fn must return one loss a sample.*scalar",
    ),
    "loss sums tokens and batch": (
        posterior(lambda p, b: loss_fn(p, b).sum(keepdims=True)),
        ValueError,
        r"loss_fn must return losses of shape \[B\] .*B = 7, got \[1\]",
    ),
    "loss transposed": (
        posterior(lambda p, b: token_loss(p, b).T),
        ValueError,
        r"loss_fn .*B = 7, got \[2, 7\]",
    ),
    "loss 3-D": (
        posterior(lambda p, b: token_loss(p, b)[:, :, None]),
        ValueError,
        r"loss_fn .*got \[7, 2, 1\]",
    ),
    "loss without tokens": (
        posterior(lambda p, b: token_loss(p, b)[:, :0]),
        ValueError,
        r"loss_fn .*got \[7, 0\]",
    ),
    "loss int": (
        posterior(lambda p, b: jnp.zeros(7, int)),
        TypeError,
        "loss_fn must return floating-point losses, got int32",
    ),
    "loss tuple": (
        posterior(lambda p, b: (loss_fn(p, b), {})),
        TypeError,
        "loss_fn must return one array of losses, got tuple",
    ),
    "loss nan": (
        posterior(data=BAD_ROW),
        ValueError,
        r"loss_fn is not finite at params for 1 of the first 7 samples of data.*\[4\]",
    ),
    # data
    "data empty": (posterior(data={}), ValueError, "data is an empty pytree"),
    "data without samples": (
        posterior(data={"x": jnp.ones((0, 3)), "y": jnp.ones(0)}),
        ValueError,
        "data holds no samples",
    ),
    "data ragged": (
        posterior(data={"x": DATA["x"], "y": jnp.zeros(6)}),
        ValueError,
        "data must share one leading sample axis.*7.*6",
    ),
    "data scalar leaf": (
        posterior(data={"x": DATA["x"], "y": jnp.zeros(())}),
        ValueError,
        "data/y must have a leading sample axis, got a scalar",
    ),
    "data number": (posterior(data={"x": 3.0}), TypeError, "data/x must be an array .*3.0"),
    "data of strings": (
        posterior(data={"x": np.array(["a"] * 7)}),
        TypeError,
        "data/x must hold numbers, got dtype <U1",
    ),
    # params
    "params int": (
        posterior(params={"a": jnp.arange(3), "b": jnp.ones((2, 3))}),
        TypeError,
        "params/a must be floating point, got int32",
    ),
    "params empty": (posterior(params={}), ValueError, "params is an empty pytree"),
    "params number": (
        posterior(params={"a": 1.0}),
        TypeError,
        "params/a must be an array, got float",
    ),
    "params nan": (
        posterior(params=PARAMS | {"b": jnp.full((2, 3), jnp.nan)}),
        ValueError,
        "params/b holds values that are not finite",
    ),
    # nβ, γ, ε
    "nbeta zero": (posterior(nbeta=0.0), ValueError, "nbeta must be finite and above 0, got 0"),
    "nbeta negative": (posterior(nbeta=-1), ValueError, "nbeta must be .*, got -1"),
    "nbeta nan": (posterior(nbeta=float("nan")), ValueError, "nbeta must be finite .*nan"),
    "nbeta array": (posterior(nbeta=jnp.ones(2)), TypeError, "nbeta must be a number"),
    "nbeta none": (posterior(nbeta=None), TypeError, "nbeta must be a number, got None"),
    "nbeta complex": (posterior(nbeta=1j), TypeError, "nbeta must be a number, got 1j"),
    "nbeta string": (posterior(nbeta="30"), TypeError, "nbeta must be a number, got '30'"),
    "localization negative": (
        posterior(localization=-0.5),
        ValueError,
        "localization must be finite and at least 0, got -0.5",
    ),
    "nbeta replaced": (
        sample(posterior=lambda good: replace(good.posterior, nbeta=-1.0)),
        ValueError,
        "posterior.nbeta must be finite and above 0, got -1",
    ),
    "nbeta replaced by several": (
        sample(posterior=lambda good: replace(good.posterior, nbeta=jnp.ones(2))),
        TypeError,
        "posterior.nbeta must be a number",
    ),
    "step size zero": (lambda good: jp.sgld(step_size=0), ValueError, "step_size .*above 0, got 0"),
    "step size nan": (
        lambda good: jp.sgld(step_size=float("nan")),
        ValueError,
        "step_size must be finite .*nan",
    ),
    "decay one": (
        lambda good: jp.rmsprop_sgld(step_size=1e-3, decay=1.0),
        ValueError,
        "decay must be below 1, got 1",
    ),
    # plan
    "thin zero": (plan(thin=0), ValueError, "thin must be at least 1, got 0"),
    "draws float": (plan(num_draws=10.0), TypeError, "num_draws must be an integer, got 10.0"),
    "chains zero": (plan(num_chains=0), ValueError, "num_chains must be at least 1, got 0"),
    "chains bool": (plan(num_chains=True), TypeError, "num_chains must be an integer, got True"),
    "burnin negative": (plan(num_burnin=-1), ValueError, "num_burnin must be at least 0, got -1"),
    "batches beyond draws": (
        plan(num_draws=5, num_batches=6),
        ValueError,
        "num_batches must be at most num_draws = 5, got 6",
    ),
    "one batch": (
        plan(num_chains=1, num_batches=1),
        ValueError,
        "num_chains × num_batches must be at least 2",
    ),
    "batch beyond data": (
        sample(plan=jp.Plan(batch_size=8)),
        ValueError,
        "plan.batch_size must be at most the 7 samples of data, got 8",
    ),
    "plan dict": (sample(plan={"num_draws": 3}), TypeError, "plan must be a Plan, got dict"),
    # weights
    "weights length": (weighted(jnp.ones(6)), ValueError, r"weights .*\[7\], got \[6\]"),
    "weights per sample of tokens": (
        weighted(jnp.ones(7), token_loss),
        ValueError,
        r"weights must have the shape of the losses, \[7, 2\], got \[7\]",
    ),
    "weights zero": (weighted(jnp.zeros(7)), ValueError, "weights must have a positive sum, got 0"),
    "weights nan": (weighted(jnp.full(7, jnp.nan)), ValueError, "weights must be finite"),
    "weights negative": (weighted(-jnp.ones(7)), ValueError, "weights .*positive sum, got -7"),
    "weights complex": (weighted(np.ones(7) * 1j), TypeError, "weights must be real .*complex128"),
    "weights dict": (weighted({"p": 1.0}), TypeError, "weights must be real numbers, got object"),
    "reweight length": (
        lambda good: good.posterior.reweight(jnp.ones((7, 1))),
        ValueError,
        r"weights must have the shape of the losses, \[7\], got \[7, 1\]",
    ),
    # restrictions
    "path without match": (restrict(jp.by_path("c/*")), ValueError, r"no parameter matches 'c/\*'"),
    "path none": (restrict(jp.by_path), ValueError, "patterns must be one or more"),
    "slice unknown": (
        restrict(jp.by_slice({"c": (0, 1)})),
        ValueError,
        "no parameter is called 'c'",
    ),
    "slice outside": (
        restrict(jp.by_slice({"b": (0, [0, 2])})),
        ValueError,
        r"slices\['b'\]: index \[0, 2\] is outside axis 0 of length 2",
    ),
    "slice negative": (
        restrict(jp.by_slice({"b": (0, -1)})),
        ValueError,
        r"slices\['b'\]: index -1 is outside",
    ),
    "slice twice": (
        restrict(lambda: jp.by_slice({"b": (1, [2, 2])})),
        ValueError,
        r"slices\['b'\] names an index twice: \[2, 2\]",
    ),
    "slice axis outside": (
        restrict(jp.by_slice({"b": (2, 0)})),
        ValueError,
        r"slices\['b'\]: axis 2 does not exist in shape \[2, 3\]",
    ),
    "slice axis float": (
        restrict(lambda: jp.by_slice({"b": (0.5, 0)})),
        TypeError,
        r"slices\['b'\]: axis must be an integer, got 0.5",
    ),
    "slice index float": (
        restrict(lambda: jp.by_slice({"b": (0, 1.5)})),
        TypeError,
        r"slices\['b'\]: index must be integers, got float64",
    ),
    "slice mask": (
        restrict(lambda: jp.by_slice({"b": (0, np.array([True, False]))})),
        TypeError,
        r"slices\['b'\]: index must be integers, got bool",
    ),
    "slice without axis": (
        restrict(lambda: jp.by_slice({"b": 3})),
        TypeError,
        r"slices\['b'\] must be \(axis, index\), got 3",
    ),
    "slice of nothing": (
        restrict(lambda: jp.by_slice({"b": (0, [])})),
        ValueError,
        r"slices\['b'\] selects nothing",
    ),
    "slices empty": (restrict(lambda: jp.by_slice({})), ValueError, "slices is empty"),
    "mask shape": (
        restrict(jp.by_mask({"a": np.ones(3, bool), "b": np.ones((3, 2), bool)})),
        ValueError,
        r"mask must have the structure and shapes.*\(2, 3\).*got .*\(3, 2\)",
    ),
    "mask partial": (
        restrict(jp.by_mask({"a": np.ones(3, bool)})),
        ValueError,
        "mask must have the structure and shapes",
    ),
    "mask int": (
        restrict(lambda: jp.by_mask({"a": np.ones(3, int)})),
        TypeError,
        "mask at 'a' must be boolean, got int64",
    ),
    "mask false": (
        restrict(lambda: jp.by_mask({"a": np.zeros(3, bool)})),
        ValueError,
        "mask is false everywhere",
    ),
    "union overlaps": (
        restrict(lambda: jp.union(PARAMS, jp.by_path("b"), jp.by_slice({"b": (0, 1)}))),
        ValueError,
        "restrictions overlap: 3 weights",
    ),
    "union of nothing": (
        restrict(lambda: jp.union(PARAMS)),
        ValueError,
        "union needs at least one restriction",
    ),
    "union of a pattern": (
        restrict(lambda: jp.union(PARAMS, "b")),
        TypeError,
        "must be a Restriction, got str",
    ),
    "complement empty": (
        restrict(lambda: jp.complement(PARAMS, ALL)),
        ValueError,
        "its complement is empty",
    ),
    "coordinates of a rotation": (
        restrict(
            lambda: jp.restriction_mask(
                jp.Restriction(lambda p: p["a"][:1], lambda z, p: p | {"a": p["a"] + z}), PARAMS
            )
        ),
        ValueError,
        "its position has 1 numbers but writes 3 weights",
    ),
    "restriction of nothing": (
        restrict(jp.Restriction(lambda p: {}, lambda z, p: p)),
        ValueError,
        "restriction selects nothing",
    ),
    "restriction that moves w*": (
        restrict(jp.Restriction(lambda p: p["a"], lambda z, p: p | {"a": z + 1})),
        ValueError,
        r"restriction.embed\(select\(params\), params\) changes a",
    ),
    "restriction that drops": (
        restrict(jp.Restriction(lambda p: p["a"], lambda z, p: {"a": z})),
        ValueError,
        "restriction.embed must return a tree of the structure of params",
    ),
    "restriction that reshapes": (
        restrict(jp.Restriction(lambda p: p["a"], lambda z, p: p | {"a": z[:1]})),
        ValueError,
        r"restriction.embed changes a from float32\[3\] to float32\[1\]",
    ),
    "restriction to integers": (
        restrict(jp.Restriction(lambda p: jnp.zeros(2, int), lambda z, p: p)),
        TypeError,
        "restriction must select floating-point weights, got int32",
    ),
    "restriction of numbers": (
        restrict(lambda: jp.Restriction(3, 4)),
        TypeError,
        "restriction.select must be a function, got 3",
    ),
    "restriction string": (
        lambda good: jp.restrict(good.posterior, "a"),
        TypeError,
        "restriction must be a Restriction, got str",
    ),
    "restrict twice": (
        lambda good: jp.restrict(good.head, ALL),
        ValueError,
        "posterior is restricted already",
    ),
    "restrict swapped": (
        lambda good: jp.restrict(ALL, good.posterior),
        TypeError,
        "posterior must come from localized_posterior, got Restriction",
    ),
    "two paths of one name": (
        lambda good: jp.by_path("a/b").select({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}),
        ValueError,
        "two parameters are called 'a/b'",
    ),
    # samplers
    "posterior tuple": (
        sample(posterior=(1, 2)),
        TypeError,
        "posterior must come from localized_posterior, got tuple",
    ),
    "sampler string": (sample(sampler="sgld"), TypeError, "sampler must be a function .*got str"),
    "sampler not made": (
        sample(sampler=jp.sgld),
        TypeError,
        r"sampler must be .*got sgld\(\*, step",
    ),
    "sampler applied": (
        sample(sampler=blackjax.sgld(untouchable)),
        TypeError,
        "sampler must be a function .*got SamplingAlgorithm",
    ),
    "sampler returns none": (
        sample(sampler=lambda posterior: None),
        TypeError,
        "sampler must be .*it returned NoneType",
    ),
    "step unbound": (
        sample(sampler=lambda posterior: blackjax.sgld(untouchable)),
        TypeError,
        r"step must take \(key, state\) .*'step_size'\]: bind",
    ),
    "step keyword unbound": (
        sample(sampler=algorithm(lambda key, state, minibatch, *, eps: untouchable())),
        TypeError,
        r"step must take .*'eps'\]: bind",
    ),
    "state without position": (
        sample(
            sampler=algorithm(lambda k, s, m: untouchable(), lambda position, key: (position, 0.0))
        ),
        TypeError,
        "state of the sampler must be the position, or have it as `position`",
    ),
    # observe
    "observe not callable": (sample(observe=3), TypeError, "observe must be a function .*got int"),
    "observe of nothing": (
        sample(observe=lambda: 1.0),
        TypeError,
        r"observe must be a function of params, got <lambda>\(\)",
    ),
    "observe returns none": (
        sample(observe=lambda params: None),
        ValueError,
        "observe returned an empty pytree",
    ),
    "observe returns text": (
        sample(observe=lambda params: "a"),
        TypeError,
        "observe must return arrays, got str",
    ),
    "observe returns integers": (
        sample(observe=lambda params: {"n": jnp.arange(3)}),
        TypeError,
        r"observe\['n'\] must return floating point.*got int32",
    ),
    # observables
    "observables empty": (chi(observables={}), ValueError, "observables is empty"),
    "observables none": (chi(observables=None), ValueError, "observables must be given"),
    "observables list": (chi(observables=[first]), TypeError, "observables must map names"),
    "observable matrix": (
        chi(observables={"f": lambda p: p["b"]}),
        ValueError,
        r"observables\['f'\] must return a scalar, or one row each \[K\], got \(2, 3\)",
    ),
    "observable empty": (
        chi(observables={"f": lambda p: p["a"][:0]}),
        ValueError,
        r"observables\['f'\] must return a scalar, or one row each \[K\], got \(0,\)",
    ),
    "observable int": (
        chi(observables={"f": lambda p: 3}),
        TypeError,
        r"observables\['f'\] must return a float, got int32",
    ),
    "observable string": (
        chi(observables={"f": "loss"}),
        TypeError,
        r"observables\['f'\] must be a function of params, got str",
    ),
    "observable nan": (
        chi(observables={"f": lambda p: jnp.log(p["a"][0] - 0.1)}),
        ValueError,
        r"observables\['f'\] is -?(nan|inf) at w\*",
    ),
    "observable name": (chi(observables={3: first}), TypeError, "observables must be named by .*3"),
    "observable weights": (
        chi(observables={"f": jp.mean_loss(loss_fn, DATA, weights=jnp.ones(3))}),
        ValueError,
        r"weights must have the shape of the losses, \[7\], got \[3\]",
    ),
    "observable of a reduced loss": (
        chi(observables={"f": jp.mean_loss(lambda p, b: loss_fn(p, b).sum(), DATA)}),
        ValueError,
        "loss_fn must return one loss a sample",
    ),
    "rows alike": (
        chi(components={"a/b": ALL, "a": ALL}, observables={"c": first, "b/c": first}),
        ValueError,
        "make two rows alike: .*'a/b/c'",
    ),
    # probes
    "probes empty": (chi(probes={}), ValueError, "probes is empty"),
    "probes none": (chi(probes=None), TypeError, "probes must map names to values, got NoneType"),
    "probes twice": (chi(probes=[("p", DATA), ("p", DATA)]), ValueError, "probes uses .*'p' twice"),
    "probes a batch": (chi(probes=DATA), ValueError, r"probes\['x'\] must be like the data"),
    "probe structure": (
        chi(probes={"p": (DATA["x"], DATA["y"])}),
        ValueError,
        r"probes\['p'\] must be like the data",
    ),
    "probe dtype": (
        chi(probes={"p": DATA | {"y": jnp.zeros(7, int)}}),
        ValueError,
        r"probes\['p'\] must be like the data, .*float32.*int32",
    ),
    "probe ragged": (
        chi(probes={"p": DATA | {"y": jnp.zeros(3)}}),
        ValueError,
        r"probes\['p'\] must share one leading sample axis",
    ),
    "probe nan": (
        chi(probes={"p": BAD_ROW}),
        ValueError,
        r"probes\['p'\] has losses that are not finite at w\*.*\[4\]",
    ),
    "reference nan": (chi(reference=BAD_ROW), ValueError, r"reference has losses .*\[4\]"),
    "reference structure": (
        chi(reference=DATA["x"]),
        ValueError,
        "reference must be like the data",
    ),
    # components
    "components empty": (chi(components={}), ValueError, "components is empty"),
    "components bare": (chi(components=ALL), TypeError, "components must map names .*Restriction"),
    "components of a component": (
        chi(head=True, components={"c": ALL}),
        ValueError,
        "components need an unrestricted posterior",
    ),
    "component string": (
        chi(components={"c": "a"}),
        TypeError,
        r"components\['c'\]: restriction must be a Restriction, got str",
    ),
    "component unmatched": (
        chi(components={"c": jp.by_path("zz")}),
        ValueError,
        r"components\['c'\]: no parameter matches 'zz'",
    ),
    # estimators
    "hybrid alone": (chi(estimator=jp.covariance(form="hybrid")), ValueError, "give components"),
    "form": (
        lambda good: jp.covariance(form="full"),
        ValueError,
        "form must be 'centered' or 'hybrid', got 'full'",
    ),
    "estimator string": (chi(estimator="covariance"), TypeError, "estimator must be .*got str"),
    "estimator not made": (
        chi(estimator=jp.covariance),
        TypeError,
        r"estimator must be .*got covariance\(",
    ),
    # results
    "summary of a flat trace": (
        lambda good: jp.summarize(jnp.ones(8), num_batches=2),
        ValueError,
        r"trace must be \[chains, draws\], got shape \[8\]",
    ),
    "summary of few draws": (
        lambda good: jp.summarize(jnp.ones((2, 8)), num_batches=9),
        ValueError,
        "num_batches must be at most 8 draws, got 9",
    ),
}


@pytest.mark.parametrize(("act", "error", "message"), CASES.values(), ids=CASES.keys())
def test_bad_input_is_named(
    good: SimpleNamespace, act: Callable, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        act(good)
    assert len(str(caught.value)) < 700


STEPS: dict[str, tuple[Callable, str]] = {
    "returns a pair": (lambda key, state, minibatch: (state, state), "must return a state like"),
    "returns no info": (lambda key, state: state, r"must return \(state, info\), got dict"),
    "changes dtype": (
        lambda key, state, minibatch: jax.tree.map(lambda x: x.astype(jnp.bfloat16), state),
        "float32.*got .*bfloat16",
    ),
    "changes shape": (
        lambda key, state, minibatch: jax.tree.map(lambda x: x[None], state),
        r"got .*\(1, 3\)",
    ),
}


@pytest.mark.parametrize(("step", "message"), STEPS.values(), ids=STEPS.keys())
def test_a_step_that_breaks_its_contract_is_named(
    good: SimpleNamespace, step: Callable, message: str
) -> None:
    """Known when the step is traced, before anything has run."""
    with pytest.raises(TypeError, match=f"the sampler's step.*{message}"):
        jp.sample(KEY, good.posterior, algorithm(step), good.plan, first, progress=False)


def test_the_trap_works(good: SimpleNamespace) -> None:
    """With good input the sampler of the table does step."""
    with pytest.raises(AssertionError, match="sampled before"):
        jp.sample(KEY, good.posterior, trap, good.plan, first)
    with pytest.raises(AssertionError, match="sampled before"):
        chi()(good)
