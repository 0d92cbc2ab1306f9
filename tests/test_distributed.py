"""Meshes: the same numbers on any number of devices, and no word between chains."""

import contextlib
import re
from dataclasses import replace
from functools import partial

import checkpoint_program as program
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import doomed, interrupted, near, often

import jaxpattern as jp
from jaxpattern.chains.lanes import ComponentGroup
from jaxpattern.chains.lower import lower_chains
from jaxpattern.runtime.mesh import param_specs, resolve_mesh
from jaxpattern.sampling import observed

COLLECTIVES = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")


def on(count, **axes):
    return jp.mesh(devices=jax.devices()[:count], **axes)


def bits(result):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result)]


def collectives(text, *, within_loops):
    """Names of the collectives of a compiled program, or of the bodies of its loops."""
    bodies = re.split(r"\n(?=(?:ENTRY )?%\S+ \()", text)
    by_name = {m.group(1): b for b in bodies if (m := re.match(r"(?:ENTRY )?%(\S+) \(", b))}
    names = set(by_name)
    if within_loops:
        names, frontier = set(), set(re.findall(r"body=%(\S+?)[,\s]", text))
        while frontier:
            names |= frontier
            called = {n for name in frontier for n in re.findall(r"%([\w.\-]+)", by_name[name])}
            frontier = (called & set(by_name)) - names
    return [
        op
        for name in sorted(names)
        for op in re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", by_name[name])
    ]


# The same bits


DRIVERS = {
    "sample": program.sample,
    "llc": program.llc,
    "covariance": partial(program.chi, jp.covariance(), progress=True),
    "adjoint": partial(program.chi, jp.pathwise(window=2, every=1)),
    "tangent": partial(program.chi, jp.pathwise(mode="tangent"), progress=True),
    "train": program.train,
}


def test_chains_have_the_same_bits_on_any_number_of_devices():
    plan = replace(program.PLAN, num_chains=5)
    run = partial(
        jp.sample, program.key(), program.posterior(), program.SAMPLER, plan, program.weights_of,
        progress=False,
    )  # fmt: skip
    wanted = bits(run())
    for count in (1, 2, 8):
        assert bits(run(mesh=on(count))) == wanted, count


@pytest.mark.parametrize(
    "driver",
    [pytest.param(d, marks=() if d == "llc" else pytest.mark.slow) for d in DRIVERS],
)
def test_drivers_on_any_number_of_devices(driver):
    """Bits do not depend on how many devices share the work, and are near those of one device.

    XLA compiles for one device by other passes than for several: last places of what is computed
    from a chain may differ there.
    """
    run = DRIVERS[driver]
    several = [run(mesh=on(count)) for count in (2, 4, 8)]
    assert bits(several[0]) == bits(several[1]) == bits(several[2])
    alone = run()
    assert bits(run(mesh=on(1))) == bits(alone)
    near(several[0], alone)


def test_training_seeds_on_any_number_of_devices():
    keys = jax.random.split(jax.random.key(3), 3)
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), program.PARAMS)

    def run(mesh):
        return jp.train(
            jax.random.clone(keys), program.loss_fn, params, program.DATA, program.OPTIMIZER,
            num_steps=9, batch_size=3, metrics=program.weights_of, progress=False, mesh=mesh,
        )  # fmt: skip

    alone = run(None)
    assert bits(run(on(1))) == bits(alone)
    for count in (2, 4):  # two seeds a device and one: XLA multiplies stacked matrices otherwise
        near(run(on(count)), alone)


def test_the_current_mesh_is_used():
    with jax.set_mesh(on(2)):
        assert bits(program.sample()) == bits(program.sample(mesh=on(2)))
        assert resolve_mesh(None) == on(2)
    other = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with jax.set_mesh(other):
        assert resolve_mesh(None) is None


@pytest.mark.parametrize("at_once", [1, 2])
def test_blocks_of_chains(at_once):
    """chains_at_once changes when a chain is computed, not what."""
    plan = replace(program.PLAN, num_chains=5, chains_at_once=at_once)
    run = partial(
        jp.sample, program.key(), program.posterior(), program.SAMPLER, observe=program.weights_of,
        progress=False,
    )  # fmt: skip
    wanted = bits(run(plan=replace(plan, chains_at_once=None)))
    for mesh in (None, on(2)):
        assert bits(run(plan=plan, mesh=mesh)) == wanted


def test_probes_cut_over_data_are_the_same_to_rounding():
    probes = {"p": jax.tree.map(lambda x: x[:4], program.DATA)}
    run = partial(
        jp.susceptibilities, program.key(), program.posterior(), program.SAMPLER, program.PLAN,
        probes=probes, observables={"a": lambda params: params["a"].sum()},
        estimator=jp.covariance(), progress=False,
    )  # fmt: skip
    near(run(mesh=on(4, chain=2, data=2)), run())
    with pytest.raises(ValueError, match=r"probes\['p'\] must have a multiple of 8 samples"):
        run(mesh=on(8, data=8))


def test_batches_cut_over_data_are_the_same_to_rounding():
    def run(mesh):
        return jp.train(
            program.key(), program.loss_fn, program.PARAMS, program.DATA, program.OPTIMIZER,
            num_steps=9, batch_size=4, progress=False, mesh=mesh,
        )  # fmt: skip

    near(run(on(4, data=4)), run(None))
    with pytest.raises(ValueError, match="batch_size must be a multiple of 8"):
        run(on(8, data=8))


# What is compiled


WIDTH = 64


def wide_loss(params, batch):
    hidden = jnp.tanh(batch @ params["in"])
    return jnp.sum((hidden @ params["out"]) ** 2, axis=-1)


def wide_posterior():
    key = jax.random.key(0)
    shapes = {"in": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)}
    params = {
        name: jax.random.normal(jax.random.fold_in(key, i), shape) / 8
        for i, (name, shape) in enumerate(shapes.items())
    }
    data = jax.random.normal(jax.random.fold_in(key, 2), (8, WIDTH))
    return jp.localized_posterior(wide_loss, params, data, nbeta=2.0, localization=10.0)


def compiled(mesh, posterior, plan, sampler=program.SAMPLER, group=None):
    """The program of the steps and draws, as `run_chains` compiles it."""
    run = jp.Run(jax.random.key(1), posterior, sampler, plan)
    recorder = observed(lambda params: jnp.sum(params["in"]), posterior)
    with jaxtyping_off():
        return lower_chains(run, recorder, mesh, group).advance.compile()


@contextlib.contextmanager
def jaxtyping_off():
    """What `lower` unflattens are descriptions of arguments, which are no arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


PLAN = jp.Plan(num_chains=8, num_burnin=0, num_draws=2, thin=2, batch_size=4)


def test_chains_exchange_nothing():
    program_ = compiled(on(8), wide_posterior(), PLAN)
    assert collectives(program_.as_text(), within_loops=False) == []


def test_components_exchange_nothing():
    posterior = wide_posterior()
    parts = [jp.by_slice({"in": (0, i)}) for i in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    plan = replace(PLAN, num_chains=2, num_batches=1)
    group = ComponentGroup(names=tuple("abcd"), ids=(0, 1, 2, 3), restrictions=stacked)
    program_ = compiled(on(8), posterior, plan, group=group)
    assert collectives(program_.as_text(), within_loops=False) == []


def test_a_device_holds_its_own_chains():
    posterior = wide_posterior()
    one, eight = (compiled(mesh, posterior, PLAN).memory_analysis() for mesh in (on(1), on(8)))
    position = 2 * WIDTH * WIDTH * 4
    assert one.output_size_in_bytes >= 8 * position
    assert position <= eight.output_size_in_bytes < 1.2 * position
    assert eight.temp_size_in_bytes < one.temp_size_in_bytes / 4


def free_loss(params, batch):
    """A loss of zero gradient: what is left of a step is the tether and the noise."""
    return 0.0 * batch[:, 0]


@pytest.mark.parametrize(
    "sampler",
    [
        jp.sgld(step_size=1e-3, noise="leaf"),
        jp.rmsprop_sgld(step_size=1e-3, noise="leaf"),
        jp.sgnht(step_size=1e-3, noise="leaf"),
    ],
    ids=["sgld", "rmsprop_sgld", "sgnht"],
)
def test_noise_is_drawn_where_parameters_lie(sampler):
    mesh = on(8, chain=2, model=4)
    posterior = replace(wide_posterior(), loss_fn=free_loss)
    posterior = replace(posterior, params=jp.shard_params(posterior.params, mesh, least_size=1))
    text = compiled(mesh, posterior, replace(PLAN, num_chains=2), sampler).as_text()
    found = collectives(text, within_loops=True)
    scalars = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    assert set(found) <= {"all-reduce"}  # whether all is finite
    assert all(re.search(r"= \(?\w+\[(1)?\]", line) for line in scalars), scalars


def test_sharded_parameters_stay_sharded():
    mesh = on(4, chain=1, model=4)
    posterior = wide_posterior()
    cut = replace(posterior, params=jp.shard_params(posterior.params, mesh, least_size=1))
    plan = replace(PLAN, num_chains=2, num_batches=1)
    whole, parts = (compiled(on(4, model=4), p, plan).memory_analysis() for p in (posterior, cut))
    position = 2 * 2 * WIDTH * WIDTH * 4
    assert whole.output_size_in_bytes >= position
    assert parts.output_size_in_bytes < 1.1 * position / 4
    observe = lambda params: params["in"]  # noqa: E731
    run = partial(jp.sample, jax.random.key(1), sampler=program.SAMPLER, plan=plan,
                  observe=observe, progress=False)  # fmt: skip
    near(run(posterior=cut, mesh=mesh), run(posterior=posterior), places=40)


def test_which_axis_is_cut():
    shapes = {
        "q": jax.ShapeDtypeStruct((2, 64, 8), jnp.float32),
        "scale": jax.ShapeDtypeStruct((64,), jnp.float32),
        "odd": jax.ShapeDtypeStruct((3, 5), jnp.float32),
    }
    specs = param_specs(shapes, 4, {"scale": 0}, least_size=10)
    assert specs == {
        "q": PartitionSpec(None, "model"),
        "scale": PartitionSpec("model"),
        "odd": PartitionSpec(),
    }
    with pytest.raises(ValueError, match=r"axes\['q'\]: axis 0 of q, of shape \[2, 64, 8\]"):
        param_specs(shapes, 4, {"q": 0})


# Faults


def test_a_lost_chain_is_named_on_a_mesh():
    """NaN at step 0 in about half of six chains, two of them on a device with others."""
    run = partial(
        jp.llc, program.key(), program.posterior(), doomed(step=0, share=0.5),
        replace(program.PLAN, num_chains=6), progress=False,
    )  # fmt: skip
    with pytest.warns(jp.DivergenceWarning, match="chains") as expected:
        alone = run()
    with pytest.warns(jp.DivergenceWarning, match="chains") as caught:
        shared = run(mesh=on(4))
    assert 0 < int(alone.diverged.sum()) < 6
    assert str(caught[0].message) == str(expected[0].message)
    np.testing.assert_array_equal(alone.diverged, shared.diverged)
    near(shared, alone)


def test_all_chains_lost_on_a_mesh():
    with pytest.raises(jp.DivergenceError, match=r"chains \[0, 1\]"):
        jp.sample(
            program.key(), program.posterior(), doomed(step=3, share=1.0), program.PLAN,
            program.weights_of, progress=False, mesh=on(8),
        )  # fmt: skip


def test_a_lost_component_is_named_on_a_mesh():
    def explode(params):
        return jnp.where(jnp.all(params["a"] == program.PARAMS["a"]), params["a"].sum(), jnp.nan)

    with pytest.raises(jp.DivergenceError, match=r"a: chains \[0, 1\]"):
        jp.susceptibilities(
            program.key(), program.posterior(), program.SAMPLER, program.PLAN,
            probes={"p": program.DATA}, components=program.COMPONENTS,
            observables={"x": explode}, estimator=jp.covariance(), mesh=on(4), progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("driver", ["sample", pytest.param("llc", marks=pytest.mark.slow)])
def test_a_run_goes_on_on_another_mesh(driver, tmp_path, monkeypatch):
    """Begun on eight devices, with lanes that fill them up, and continued on two, then on one."""
    wanted = DRIVERS[driver](mesh=on(4))
    with monkeypatch.context() as patch:
        patch.setitem(program.DRIVERS, driver, partial(DRIVERS[driver], mesh=on(8)))
        interrupted(patch, driver, tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(program.DRIVERS, driver, partial(DRIVERS[driver], mesh=on(2)))
        interrupted(patch, driver, tmp_path, saves=2)
    got = DRIVERS[driver](checkpoint=often(tmp_path))
    near(got, wanted)
    if driver == "sample":
        assert bits(got) == bits(wanted)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(chain=3), r"chain × data × model must be the number of devices, 8, got 3 × 1 × 1"),
        (dict(data=0), "data must be at least 1, got 0"),
    ],
)
def test_meshes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        jp.mesh(**arguments)


def test_meshes_of_another_kind():
    explicit = jax.make_mesh((8,), ("chain",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="must be of type Auto"):
        program.sample(mesh=explicit)
    with pytest.raises(ValueError, match="mesh must have an axis of"):
        program.sample(mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)))
    with pytest.raises(TypeError, match="mesh must be"):
        resolve_mesh("chain")


def test_arrays_on_a_mesh_of_jax_are_taken():
    """`jax.make_mesh` makes Explicit axes; arrays on them come without a mesh for the driver."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    assert mesh.axis_types == (AxisType.Explicit,) * 2
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    data = jnp.asarray(np.random.default_rng(1).normal(size=(8, WIDTH)), jnp.float32)
    weights = jnp.arange(1.0, 9.0)
    params = wide_posterior().params
    cut_params = jax.tree.map(lambda x: place(x, None, "tensor"), params)
    optimizer = optax.adam(1e-3)

    def run(params, data, weights):
        posterior = jp.localized_posterior(
            wide_loss, params, data, nbeta=2.0, localization=10.0, weights=weights
        )
        plan = replace(PLAN, num_chains=2, num_batches=1)
        lam = jp.llc(jax.random.key(1), posterior, program.SAMPLER, plan, progress=False)
        trained, _ = jp.train(
            jax.random.key(2), wide_loss, params, data, optimizer, num_steps=3, batch_size=4,
            weights=weights, optimizer_state=optimizer.init(params), progress=False,
        )  # fmt: skip
        return lam.mean, trained

    got = run(cut_params, place(data, "data"), place(weights, "data"))
    near(got, run(params, data, weights), places=200)
    assert got[1]["in"].sharding.spec == PartitionSpec(None, "tensor")


def test_results_lie_on_the_first_device():
    trace = program.sample(mesh=on(8))
    assert trace.devices() == {jax.devices()[0]}
    assert not isinstance(trace.sharding, NamedSharding)
