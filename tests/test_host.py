"""The one loop: how it is cut, what it shows, and what it leaves to be resumed."""

import io
import time
from functools import partial

import checkpoint_program as program
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm
from jax.sharding import NamedSharding, PartitionSpec
from support import Crash, often, same

import jaxpattern as jp
from jaxpattern.runtime import host as host_module
from jaxpattern.runtime.checkpoint import Stage
from jaxpattern.runtime.host import Host, host_for
from jaxpattern.runtime.mesh import pad_lanes, put


def counting(chunks):
    """An advance that writes down its chunks, and adds up positions."""

    def advance(state, a, b):
        assert isinstance(a, int)
        assert isinstance(b, int)
        chunks.append((a, b))
        return state + sum(range(a, b))

    return advance


def run(host, total, **settings):
    chunks = []
    result = host.loop("loop", total, lambda: jnp.zeros((), int), counting(chunks), **settings)
    return chunks, int(result)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [(0, 10)]),
        ({"cuts": (4,)}, [(0, 4), (4, 10)]),
        ({"cuts": (0, 4, 4, 10, 99)}, [(0, 4), (4, 10)]),
        ({"longest": 4}, [(0, 4), (4, 8), (8, 10)]),
        ({"longest": 4, "cuts": (3,)}, [(0, 3), (3, 7), (7, 10)]),
        ({"steps": lambda p: 7 * p}, [(0, 10)]),
    ],
)
def test_without_progress_and_folder_chunks_are_as_long_as_may_be(settings, wanted):
    assert run(Host(), 10, **settings) == (wanted, 45)


def test_a_loop_of_nothing():
    assert run(Host(), 0) == ([], 0)
    assert run(Host(progress=True), 0) == ([], 0)


def test_final_is_applied_once(tmp_path):
    for _ in range(2):
        with host_for("test", checkpoint=tmp_path, mesh=None, progress=False) as host:
            state = host.loop(
                "loop", 3, lambda: {"x": jnp.ones(2), "y": jnp.zeros(1)},
                lambda s, a, b: {"x": s["x"] + (b - a), "y": s["y"]},
                final=lambda s: {"x": 2 * s["x"], "y": ()},
            )  # fmt: skip
        same(state, {"x": jnp.full(2, 8.0), "y": ()})


def test_with_progress_there_are_about_fifty_chunks(monkeypatch):
    """Counted in steps; a cut is kept to."""
    monkeypatch.setattr(host_module, "_SHOWN_SECONDS", (0.0, 1e9))
    steps = lambda p: p if p < 100 else 100 + 2 * (p - 100)  # noqa: E731
    chunks, total = run(Host(progress=True), 200, cuts=(100,), steps=steps)
    assert total == 200 * 199 // 2
    assert 45 <= len(chunks) <= 52
    assert any(b == 100 for _, b in chunks)
    assert max(steps(b) - steps(a) for a, b in chunks) <= 300 / 50 + 2


def test_chunks_follow_the_clock(monkeypatch):
    """Those that pass too fast to be read grow, those that take too long shrink."""
    now = [0.0]
    monkeypatch.setattr(host_module.time, "monotonic", lambda: now[0])

    def lengths(seconds_per_position):
        sizes = []

        def advance(state, a, b):
            now[0] += seconds_per_position * (b - a)
            sizes.append(b - a)
            return state

        Host(progress=True).loop("loop", 1000, lambda: jnp.zeros(()), advance)
        return sizes

    assert lengths(1e-4)[:5] == [20, 40, 80, 160, 320]
    assert lengths(0.1) == [20] * 50
    assert lengths(4.0)[:6] == [20, 10, 5, 2, 2, 2]


@pytest.fixture
def line(monkeypatch):
    """What is shown, as lines."""
    stream = io.StringIO()
    monkeypatch.setattr(tqdm, "tqdm", partial(tqdm.tqdm, file=stream))
    return lambda: [text.strip() for text in stream.getvalue().split("\r") if text.strip()]


def test_no_time_is_shown_that_nobody_knows(line):
    """The first chunk compiles for half a second, and one later; each of 80 steps takes 0.02."""

    def advance(state, a, b):
        time.sleep(0.5 * (a in (0, 20)) + 0.02 * (b - a))
        return state

    Host(progress=True).loop(
        "LLC", 80, lambda: jnp.zeros(()), advance, cuts=(20,), note=lambda state, a, b: f"at={b}"
    )
    first, second, *rest = line()
    assert first.startswith("LLC: compiling:   0%")
    assert "<?" in first
    assert second.startswith("LLC:")
    assert "<?" in second
    assert "at=2" in second
    (later,) = [text for text in rest if "compiling" in text]
    assert later.startswith("LLC: compiling:  25%")
    assert "<?" in later
    shown = [text for text in rest if "step/s" in text and "<?" not in text]
    assert {text in rest[: rest.index(later)] for text in shown} == {True, False}
    for text in shown:
        rate = float(text.split("step/s")[0].split()[-1].lstrip(","))
        assert 25 < rate < 51, text


def test_nothing_is_shown_or_cut_under_a_transform(line):
    chunks = []

    def whole(x):
        with host_for("test", checkpoint=None, mesh=None, progress=True, x=x) as host:
            assert not host.chunked
            return host.loop(
                "loop", 9, lambda: x, lambda s, a, b: (chunks.append((a, b)), s + (b - a))[1]
            )

    np.testing.assert_array_equal(jax.vmap(whole)(jnp.arange(3)), [9, 10, 11])
    assert chunks == [(0, 9)]
    assert line() == []


def test_chunks_in_flight_are_waited_for_where_their_length_is_bounded(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    run(Host(), 10)
    assert waited == []
    run(Host(), 10, longest=5)
    assert len(waited) == 2


def test_a_loop_goes_on_at_every_cut(tmp_path, monkeypatch):
    save = Stage.save

    def dying(stage, position, state):
        save(stage, position, state)
        raise Crash

    done = []
    for _ in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "save", dying)
            try:
                with host_for("t", checkpoint=often(tmp_path), mesh=None, progress=False) as host:
                    chunks, total = run(host, 6, cuts=(2, 5), steps=lambda p: 10 * p)
                break
            except Crash:
                done.append(1)
    assert (chunks, total, len(done)) == ([], 15, 6)


@pytest.mark.parametrize("count", [None, 2, 3, 8])
def test_lanes_go_on_on_other_devices(count, tmp_path):
    """Five lanes on four devices, complete and not, then on others: filled up as the mesh needs."""

    def arrays(mesh):
        lanes = jax.random.split(jax.random.key(1), 5)
        state = {
            "key": lanes,
            "x": jnp.arange(15.0).reshape(5, 3),
            "empty": jnp.zeros((5, 0)),
            "half": jnp.arange(5, dtype=jnp.bfloat16),
        }
        if mesh is None:
            return state
        return put(pad_lanes(state, mesh), mesh, "chain")

    def host_of(mesh):
        return host_for("t", checkpoint=often(tmp_path), mesh=mesh, progress=False)

    four = jp.mesh(devices=jax.devices()[:4])
    with host_of(four) as host:
        host.loop("one", 1, lambda: arrays(four), lambda s, a, b: s, lanes=5)
        stage = host.store.stage("two", 2, lanes=5)
        stage.save(1, arrays(four))
    mesh = None if count is None else jp.mesh(devices=jax.devices()[:count])
    with host_of(mesh) as host:
        never = lambda s, a, b: pytest.fail("it is complete")  # noqa: E731
        first = host.loop("one", 1, lambda: arrays(mesh), never, lanes=5)
        second = host.loop("two", 2, lambda: arrays(mesh), lambda s, a, b: s, lanes=5)
    wanted = arrays(mesh)
    for got in (first, second):
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)
        data = lambda t: {**t, "key": jax.random.key_data(t["key"])}  # noqa: E731
        same(data(got), data(wanted))
        if mesh is not None:
            assert got["x"].sharding == NamedSharding(mesh, PartitionSpec("chain"))


def test_bits_are_those_without_the_cache_of_programs():
    """The tests read programs back from a folder; a compiler that starts afresh gives the same."""
    cached = program.sample()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        jax.clear_caches()
        same(program.sample(), cached)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
