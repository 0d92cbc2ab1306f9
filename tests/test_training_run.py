"""The response of a training run against closed forms, retraining, and plain seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Crash, often, same, stop_after

import jaxpattern as jp
from jaxpattern import results
from jaxpattern.response.roots import root, with_safe_roots

RNG = np.random.default_rng(3)
INPUTS = jnp.asarray(RNG.normal(size=(60, 5)), jnp.float32)
DATA = (INPUTS, jnp.sin(INPUTS.sum(1)))
SOURCES = {"b": np.arange(20), "a": np.arange(20, 35), "rest": np.arange(35, 60)}
BASE = jnp.asarray(RNG.uniform(0.5, 2, size=60), jnp.float32)


def key():
    """Fresh each time: a key is used once."""
    return jax.random.key(5)


def keys(number=3):
    return jax.random.split(jax.random.key(6), number)


def network(params, batch):
    x, y = batch
    return (jnp.tanh(x @ params["in"] + params["bias"][None]) @ params["out"] - y) ** 2


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "in": jnp.asarray(rng.normal(size=(5, 8)) * 0.5, jnp.float32),
        "bias": jnp.zeros(8),
        "out": jnp.asarray(rng.normal(size=8) * 0.5, jnp.float32),
    }


def starts(number=3):
    return jax.tree.map(lambda *x: jnp.stack(x), *map(start, range(number)))


# Adam's first steps are signs of gradients but for eps: smooth at the size of these gradients.
ADAM = optax.adamw(1e-2, eps=0.1)
OBSERVABLES = {
    "first": jp.mean_loss(network, jax.tree.map(lambda x: x[:20], DATA)),
    "parts": lambda params: jnp.stack([params["out"][0], jnp.sum(params["in"] ** 2)]),
}
ROWS = ("first", "parts/0", "parts/1")
RUN = dict(num_steps=60, batch_size=16)


def respond(key, params=None, optimizer=ADAM, **settings):
    given = dict(observables=OBSERVABLES, sources=SOURCES, progress=False, weights=BASE) | RUN
    params = start() if params is None else params
    return jp.training_response(key, network, params, DATA, optimizer, **(given | settings))


def phi(params):
    return np.array(
        [float(OBSERVABLES["first"](params)), *np.asarray(OBSERVABLES["parts"](params))]
    )


def slopes(response):
    """dφ/dρ of each source, `[K, G]`."""
    grouped = jp.group_mean(response)
    return np.stack([grouped.nbeta * grouped.chi[n] * grouped.mass[n] for n in SOURCES], axis=1)


# -- closed forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_gradient_descent_on_a_quadratic_moves_by_its_filter(mode):
    """w_T = −F_T(H) B ω with F_T(λ) = (1 − (1 − ηλ)^T)/λ, and ηT where λ = 0.

    The data are one batch of one sample that holds all gradients, so that every step is the whole
    of it: the weights are those of the tokens.
    """
    rate, steps = 0.05, 80
    curvature = np.array([0.0, 0.25, 1.0, 7.0])
    gradients = np.random.default_rng(0).normal(size=(6, 4))
    gradients -= gradients.mean(0)
    diagonal, matrix = jnp.asarray(curvature, jnp.float32), jnp.asarray(gradients, jnp.float32)

    def loss(params, batch):
        quadratic = 0.5 * jnp.sum(diagonal * params["w"] ** 2)
        return quadratic + (matrix @ params["w"])[None] + 0.0 * batch[:, None]

    response = jp.training_response(
        key(), loss, {"w": jnp.zeros(4)}, jnp.zeros(2), optax.sgd(rate), num_steps=steps,
        batch_size=1, observables={"w": lambda p: p["w"]}, sources={"all": [0, 1]},
        mode="reverse", progress=False,
    )  # fmt: skip
    found = np.asarray(response.chi["all"] * response.mass["all"][None]).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = (1 - (1 - rate * curvature) ** steps) / curvature
    wanted[0] = rate * steps
    np.testing.assert_allclose(found, -wanted[:, None] * gradients.T / 6, rtol=2e-4, atol=1e-6)
    if mode == "forward":  # weights ω on one of the two samples, which hold the same gradients
        forward = jp.training_response(
            key(), loss, {"w": jnp.ones(4)}, jnp.zeros(2), optax.sgd(rate), num_steps=steps,
            batch_size=1, observables={"w": lambda p: p["w"]}, sources={"x": [0], "y": [1]},
            progress=False,
        )  # fmt: skip
        np.testing.assert_allclose(forward.chi["x"], 0, atol=1e-6)


def test_the_ratio_to_the_filter_of_the_posterior_at_the_matched_scale():
    """At ηT = nβ/γ: 1 where λ → 0, and 2(1 − 1/e) = 1.264 at λ = γ/nβ, up to (1 − 1/T)^T."""
    nbeta, gamma, steps = 30.0, 300.0, 2000
    rate = nbeta / gamma / steps
    gradient = 0.3
    for curvature, wanted in ((0.0, 1.0), (gamma / nbeta, 2 * (1 - np.exp(-1)))):

        def loss(params, batch, curvature=curvature):
            gradients = jnp.asarray([gradient, -gradient])
            each = 0.5 * curvature * params["w"] ** 2 + gradients * params["w"]
            return each[None] + 0.0 * batch[:, None]

        found = jp.training_response(
            key(), loss, {"w": jnp.zeros(())},
            jnp.zeros(1), optax.sgd(rate), num_steps=steps, batch_size=1, mode="reverse",
            observables={"w": lambda p: p["w"]}, sources={"all": [0]}, progress=False,
        )  # fmt: skip
        moved = float(found.chi["all"][0, 0, 0] * found.mass["all"][0, 0])
        posterior = -0.5 * gradient / (curvature + gamma / nbeta)
        assert moved / posterior == pytest.approx(wanted, rel=1e-3)


# -- retraining --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_it_is_the_slope_of_retraining(mode):
    """Central differences of h = 1e-2: h² of the third derivative, and 1e-7/h of rounding."""
    response = respond(key(), mode=mode)
    found, h = slopes(response), 1e-2
    wanted = np.empty_like(found)
    for g, index in enumerate(SOURCES.values()):
        ends = []
        for sign in (1, -1):
            weights = BASE.at[index].multiply(1 + sign * h)
            params, _ = jp.train(
                key(), network, start(), DATA, ADAM, weights=weights, progress=False, **RUN
            )
            ends.append(phi(params))
        wanted[:, g] = (ends[0] - ends[1]) / (2 * h)
    assert response.rows == ROWS
    scale = np.abs(wanted).max(axis=1, keepdims=True)
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=1e-3)
    assert float(response.nbeta) == 1
    np.testing.assert_allclose(sum(float(jnp.sum(q)) for q in response.mass.values()), 1, rtol=1e-6)
    # All weights together change nothing.
    np.testing.assert_allclose(found.sum(1), 0, atol=2e-5 * scale.max())


@pytest.mark.parametrize("optimizer", [ADAM, optax.sgd(0.05, momentum=0.9)])
def test_forwards_equals_backwards(optimizer):
    # Not as many seeds as rows: shapes that are mixed up would go unnoticed.
    forward = respond(keys(4), starts(4), optimizer)
    for snapshots in (None, 1, 7, 60):
        backward = respond(keys(4), starts(4), optimizer, mode="reverse", num_snapshots=snapshots)
        scale = np.abs(slopes(forward)).max(axis=1, keepdims=True)
        np.testing.assert_allclose(slopes(backward) / scale, slopes(forward) / scale, atol=1e-5)
        np.testing.assert_array_equal(backward.mean, forward.mean)
        grouped = jp.group_mean(backward)
        for name in SOURCES:
            for one, other in (
                (grouped.stderr, forward.stderr),
                (grouped.batches, forward.batches),
                (grouped.halves, forward.halves),
            ):
                near = np.abs(np.asarray(one[name]) - np.asarray(other[name]))
                assert near.max() < 1e-4 * np.abs(np.asarray(forward.chi[name])).max()


def test_the_run_is_that_of_train_to_the_last_bit():
    whole = {"w": lambda p: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(p)])}
    params, history = jp.train(
        key(), network, start(), DATA, ADAM, weights=BASE, progress=False, **RUN
    )
    for mode in ("forward", "reverse"):
        response = respond(key(), mode=mode, observables=whole)
        same(response.mean, whole["w"](params))
    on, _ = jp.train(
        keys()[0], network, params, DATA, ADAM, weights=BASE, progress=False,
        optimizer_state=history.optimizer_state, **RUN,
    )  # fmt: skip
    again = respond(keys()[0], params, observables=whole, optimizer_state=history.optimizer_state)
    same(again.mean, whole["w"](on))


def test_errors_come_from_seeds_and_one_seed_has_none():
    response = respond(keys(4), starts(4))
    each = np.stack([slopes(respond(keys(4)[s], start(s))) for s in range(4)])
    np.testing.assert_allclose(slopes(response), each.mean(0), rtol=1e-3, atol=1e-6)
    error = each.std(0, ddof=1) / 2
    for g, name in enumerate(SOURCES):
        np.testing.assert_allclose(
            response.stderr[name] * response.mass[name], error[:, g], rtol=2e-3
        )
    assert list(response.chi) == list(SOURCES)
    np.testing.assert_array_equal(response.ess, 4)
    alone = respond(key())
    assert np.isnan(alone.stderr["a"]).all()
    assert "± ?" in str(alone)


def test_solve_weights_takes_it_and_retraining_gets_there():
    """Weights to either side of 1, whose difference has no second order."""
    response = respond(keys(), starts())
    target, ends = {"first": 0.05 * float(slopes(response)[0, 0])}, []
    for scale in (1.0, -1.0):
        solution = jp.solve_weights(response, target, method=jp.least_norm(), scale=scale)
        weights = np.array(BASE)
        for name, index in SOURCES.items():
            weights[index] *= float(solution.weights[name])
        params, _ = jp.train(
            keys(), network, starts(), DATA, ADAM, weights=weights, progress=False, **RUN
        )
        each = [phi(jax.tree.map(lambda x, s=s: x[s], params)) for s in range(3)]
        ends.append((np.mean(each, axis=0), solution.predicted_shift))
    (up, more), (down, less) = ends
    for k, row in enumerate(ROWS):
        wanted = float(more[row] - less[row])
        assert up[k] - down[k] == pytest.approx(wanted, rel=0.01, abs=1e-6)


def test_samples_of_no_source_keep_their_share():
    sources = {n: SOURCES[n] for n in ("a", "b")}
    part, whole = respond(key(), sources=sources), respond(key())
    for name in sources:
        np.testing.assert_allclose(
            part.chi[name] * part.mass[name], whole.chi[name] * whole.mass[name], rtol=1e-5
        )
    assert float(sum(part.mass.values())) == pytest.approx(1)


def test_it_follows_from_the_counts_of_plain_seeds():
    """dE[w_T]/dε = Σ_i ω_i Cov(w_T, N_i) for samples drawn in proportion to 1 + εω.

    For losses ½(w − c)² the run is linear, and weights inside Σ_B ρℓ / Σ_B ρ move its mean by
    1 − 1/B of that, as the weights of a batch of B are divided by their own mean. 20,000 seeds;
    five standard errors in each of two numbers: a false alarm in 1e-6.
    """
    number, steps, batch, rate = 20_000, 12, 4, 0.1
    centers = jnp.asarray(RNG.normal(size=10), jnp.float32)
    sources = {"x": np.arange(3), "y": np.arange(3, 10)}

    def loss(params, b):
        return 0.5 * (params["w"] - b) ** 2

    many = jax.random.split(jax.random.key(11), number)
    zeros = {"w": jnp.zeros(number)}
    params, _ = jp.train(
        many, loss, zeros, centers, optax.sgd(rate), num_steps=steps, batch_size=batch,
        progress=False,
    )  # fmt: skip

    @jax.jit
    def counts(keys):
        def of(key):
            draw = lambda t: jax.random.randint(jax.random.fold_in(key, t), (batch,), 0, 10)  # noqa: E731
            return jnp.bincount(jax.vmap(draw)(jnp.arange(steps)).reshape(-1), length=10)

        return jax.vmap(of)(keys)

    drawn = np.asarray(counts(jax.random.split(jax.random.key(11), number)), np.float64)
    response = jp.training_response(
        jax.random.split(jax.random.key(12), 4000), loss, {"w": jnp.zeros(4000)}, centers,
        optax.sgd(rate), num_steps=steps, batch_size=batch, observables={"w": lambda p: p["w"]},
        sources=sources, progress=False,
    )  # fmt: skip
    w = np.asarray(params["w"], np.float64)
    for name, index in sources.items():
        n = drawn[:, index].sum(1)
        product = (w - w.mean()) * (n - n.mean())
        wanted, error = product.mean(), product.std() / np.sqrt(number)
        factor = (1 - 1 / batch) * 1.0
        found = float(response.chi[name][0] * response.mass[name])
        noise = float(response.stderr[name][0] * response.mass[name])
        assert abs(found - factor * wanted) < 5 * np.hypot(factor * error, noise)
        assert abs(factor * wanted) > 10 * factor * error


# -- what can go wrong ---------------------------------------------------------------------------


def embedding(params, batch):
    """Tokens that a batch does not hold have a gradient of exactly 0."""
    tokens, y = batch
    return (params["table"][tokens] @ params["out"] - y) ** 2


def embedded():
    tokens = jnp.asarray(RNG.integers(0, 6, size=40))
    table = jnp.asarray(RNG.normal(size=(12, 3)), jnp.float32)
    return {"table": table, "out": jnp.ones(3)}, (tokens, jnp.sin(1.0 * tokens))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("optimizer", [optax.adamw, optax.rmsprop])
def test_a_second_moment_of_zero_is_no_trap(mode, optimizer):
    params, data = embedded()
    settings = dict(
        num_steps=10, batch_size=4, observables={"w": lambda p: jnp.sum(p["table"] ** 2)},
        sources={"x": np.arange(20), "y": np.arange(20, 40)}, progress=False, mode=mode,
    )  # fmt: skip
    found = jp.training_response(key(), embedding, params, data, optimizer(1e-2), **settings)
    assert np.isfinite(found.chi["x"]).all()
    assert np.abs(found.chi["x"]).max() > 0


def test_a_root_out_of_reach_is_refused_with_words():
    def update(gradient, state, params=None):
        def body(_, v):
            return v * jnp.sqrt(v)  # within a loop

        scale = jax.tree.map(lambda g: jax.lax.fori_loop(0, 1, body, g * g), gradient)
        return jax.tree.map(lambda g, s: -0.01 * g - s, gradient, scale), state

    params, data = embedded()
    plain = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    with pytest.raises(ValueError, match="eps_root"):
        jp.training_response(
            key(), embedding, params, data, plain, num_steps=5, batch_size=4,
            observables={"w": lambda p: jnp.sum(p["table"])}, sources={"x": np.arange(40)},
            progress=False,
        )  # fmt: skip


def test_the_root_of_a_program_and_its_derivative():
    def branch(x):
        y = jnp.where(x > 0, x, 0.0)
        return jax.lax.cond(y.sum() > 100, jnp.sin, lambda z: 3 * jax.jit(jnp.sqrt)(z), y)

    x = jnp.asarray([0.0, 4.0, -1.0])
    safe = with_safe_roots(branch)
    same(safe(x), branch(x))
    np.testing.assert_allclose(jax.jvp(safe, (x,), (jnp.ones(3),))[1], [0, 0.75, 0])
    np.testing.assert_allclose(jax.grad(lambda x: safe(x).sum())(x), [0, 0.75, 0])
    np.testing.assert_allclose(jax.grad(root)(9.0), 1 / 6)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_growth_is_noticed(mode):
    """A double well left with a step beyond stability is chaotic; half of it is not."""

    def loss(params, batch):
        return 0.25 * (params["w"] ** 2 - 1) ** 2 + 0.01 * batch * params["w"]

    def at(rate, steps=300):
        return jp.training_response(
            key(), loss, {"w": jnp.asarray(0.5)}, jnp.asarray(RNG.normal(size=8), jnp.float32),
            optax.sgd(rate), num_steps=steps, batch_size=2, observables={"w": lambda p: p["w"]},
            sources={"x": np.arange(3), "y": np.arange(3, 8)}, progress=False, mode=mode,
        )  # fmt: skip

    calm = at(0.5)
    assert float(calm.diagnostics["growth"][0]) < 3
    assert float(calm.diagnostics["horizon"][0]) == 300
    with pytest.warns(jp.UnreliableWarning, match="grows"):
        wild = at(1.9, 60)
    assert float(wild.diagnostics["growth"][0]) > 100
    assert float(wild.diagnostics["horizon"][0]) < 60
    assert "can be trusted" in wild.verdict


def test_steps_left_out_are_the_identity():
    """One batch in some holds a sample whose loss overflows once the parameters moved."""

    def brittle(params, batch):
        x, _ = batch
        away = jnp.where(x[:, 0] == INPUTS[0, 0], params["bias"][0] != 0.0, False)
        return network(params, batch) * jnp.where(away, jnp.inf, 1.0)

    made = {}
    for mode in ("forward", "reverse"):
        with pytest.warns(jp.UnreliableWarning, match="left out"):
            made[mode] = jp.training_response(
                key(), brittle, start(1), DATA, ADAM, observables=OBSERVABLES, sources=SOURCES,
                progress=False, mode=mode, **RUN,
            )  # fmt: skip
    assert float(made["forward"].diagnostics["skipped"][0]) > 0
    scale = np.abs(slopes(made["forward"])).max(axis=1, keepdims=True)
    np.testing.assert_allclose(
        slopes(made["reverse"]) / scale, slopes(made["forward"]) / scale, atol=1e-5
    )


def test_a_lost_seed_counts_nowhere():
    def log(params):
        return jnp.log(params["out"][0] - 0.1)  # of a negative number in some seeds

    seeds = starts(4)
    first = np.asarray(
        jp.train(keys(4), network, seeds, DATA, ADAM, weights=BASE, progress=False, **RUN)[0]["out"]
    )[:, 0]
    assert 1 < (first > 0.1).sum() < 4
    lost = first <= 0.1
    response = respond(keys(4), seeds, observables={"log": log})
    np.testing.assert_array_equal(response.diverged[0], lost)
    np.testing.assert_allclose(response.mean[0], np.log(first[~lost] - 0.1).mean(), rtol=1e-5)
    assert np.isnan(response.batches["a"][:, 0])[lost].all()
    np.testing.assert_allclose(
        response.chi["a"][0], response.batches["a"][:, 0][~lost].mean(), rtol=1e-5
    )
    assert np.isfinite(response.stderr["a"]).all()


# -- how it is called -----------------------------------------------------------------------------


def test_files_and_transformations():
    response = respond(keys(), starts())
    mapped = jax.vmap(lambda w: respond(jax.random.key(5), weights=w).chi["a"])(
        jnp.stack([BASE, jnp.ones(60)])
    )
    for weights, chi in zip((BASE, None), mapped, strict=True):
        np.testing.assert_allclose(
            chi, respond(key(), weights=weights).chi["a"], rtol=1e-3, atol=1e-5
        )
    assert "training run" in str(response)


def test_a_file_gives_it_back(tmp_path):
    response = respond(keys(), starts())
    results.save(tmp_path / "x.npz", response)
    again = results.load(tmp_path / "x.npz")
    same(again.chi, response.chi)
    assert again.rows == response.rows


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_run_goes_on_after_a_crash_to_the_same_bits(tmp_path, monkeypatch, mode):
    plain = respond(keys(), starts(), mode=mode)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Crash):
            respond(keys(), starts(), mode=mode, checkpoint=often(tmp_path))
    again = respond(keys(), starts(), mode=mode, checkpoint=tmp_path)
    same(again.chi, plain.chi)
    same(again.mean, plain.mean)


def test_seeds_are_dealt_out():
    mesh = jp.mesh(chain=4, data=2)
    plain, dealt = respond(keys(), starts()), respond(keys(), starts(), mesh=mesh)
    np.testing.assert_allclose(slopes(dealt), slopes(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(sources={}), ValueError, "sources is empty"),
        (dict(sources={"a": [0, 1], "b": [1]}), ValueError, "sample 1 in 'a' and 'b'"),
        (dict(sources={"a": [0, 60]}), ValueError, "from 0 to 59, got 0 to 60"),
        (dict(sources={"a": np.ones(60, bool)}), TypeError, "must be indices of samples"),
        (dict(weights=jnp.ones(60).at[:20].set(0)), ValueError, "'b'.* not all 0"),
        (dict(observables={}), ValueError, "observables is empty"),
        (dict(num_snapshots=3), ValueError, "mode='reverse'"),
        (dict(num_steps=0), ValueError, "num_steps"),
    ],
)
def test_what_does_not_fit_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        respond(key(), **settings)
