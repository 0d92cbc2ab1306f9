"""Layouts: parts of trees of parameters in the shapes of other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config as jaxtyping_config

import jaxpattern as jp


def trees(kind):
    """Parameters in the shapes of flax linen, equinox and haiku, and what a layout says of them."""
    L, H, G, D, K = 2, 4, 2, 8, 3
    rng = np.random.default_rng(0)
    shape = {
        "flax": {"query/kernel": (D, H, K), "key/kernel": (D, G, K), "out/kernel": (H, K, D)},
        "equinox": {
            "query_proj/weight": (H * K, D),
            "key_proj/weight": (G * K, D),
            "output_proj/weight": (D, H * K),
        },
        "haiku": {"query": (D, H * K), "key": (D, G * K), "linear": (H * K, D)},
    }[kind]
    heads = {
        "flax": {"query/kernel": 1, "key/kernel": 1, "out/kernel": 0},
        "equinox": {
            "query_proj/weight": (0, H),
            "key_proj/weight": (0, G),
            "output_proj/weight": (1, H),
        },
        "haiku": {"query": (1, H), "key": (1, G), "linear": (0, H)},
    }[kind]

    def nest(names):
        tree = {}
        for name, s in names.items():
            *above, last = name.split("/")
            at = tree
            for key in above:
                at = at.setdefault(key, {})
            at[last] = jnp.asarray(np.float32(rng.normal(size=s)))
        return tree

    def block():
        return {
            "attn": nest(shape),
            "mlp": nest({"up/kernel": (D, 5), "down/kernel": (5, D)}),
            "norm": jnp.ones(D),
        }

    if kind == "equinox":
        return (
            {"blocks": [block() for _ in range(L)], "wte": jnp.ones((7, D))},
            "blocks/{layer}",
            heads,
            (H, G),
        )
    return (
        {**{f"layers_{i}": block() for i in range(L)}, "wte": jnp.ones((7, D))},
        "layers_{layer}",
        heads,
        (H, G),
    )


@pytest.mark.parametrize("kind", ["flax", "equinox", "haiku"])
def test_layouts_of_other_libraries(kind):
    params, prefix, heads, (H, G) = trees(kind)
    found = jp.lm.layout(
        params,
        head={f"{prefix}/attn/{name}": place for name, place in heads.items()},
        mlp=[f"{prefix}/mlp/*"],
        layer=[f"{prefix}/*"],
        embed=["wte"],
    )
    names = list(jp.components(found))
    assert names == [
        "embed",
        *(f"l{i}h{h}" for i in range(2) for h in range(H)),
        "l0 mlp",
        "l1 mlp",
        "l0",
        "l1",
    ]
    parts = jp.components(found, ["l0h1", "1:3"])
    assert jax.tree.structure(parts["l0h1"]) == jax.tree.structure(parts["l1h3"])
    mask = jp.restriction_mask(parts["l1h3"], params)
    flat = {
        jax.tree_util.keystr(p, simple=True, separator="/"): m
        for p, m in jax.tree_util.tree_leaves_with_path(mask)
    }
    for path, leaf in flat.items():
        name = path.removeprefix(prefix.format(layer=1) + "/attn/")
        if name not in heads:
            assert not leaf.any()
            continue
        axis, count = (
            heads[name]
            if isinstance(heads[name], tuple)
            else (heads[name], leaf.shape[heads[name]])
        )
        width = leaf.shape[axis] // count
        slot = 3 if count == H else 3 // (H // G)
        expected = np.zeros(leaf.shape[axis], bool)
        expected[slot * width : (slot + 1) * width] = True
        np.testing.assert_array_equal(
            leaf,
            np.moveaxis(np.broadcast_to(expected, np.moveaxis(leaf, axis, -1).shape), -1, axis),
        )
    layer = jp.restriction_mask(jp.component(found, "l0"), params)
    mlp = jp.restriction_mask(jp.component(found, ["l0 mlp", "l1 mlp"]), params)
    assert (
        sum(m.sum() for m in jax.tree.leaves(layer))
        == sum(x.size for x in jax.tree.leaves(params)) // 2 - 28
    )
    assert sum(m.sum() for m in jax.tree.leaves(mlp)) == 2 * 2 * 40


BAD_LAYOUTS = {
    "nothing": (lambda p: jp.lm.layout(p), ValueError, "names no part"),
    "no layer": (lambda p: jp.lm.layout(p, mlp=["mlp/*"]), ValueError, r"must have one \{layer\}"),
    "no match": (
        lambda p: jp.lm.layout(p, mlp=["h_{layer}/*"]),
        ValueError,
        "no parameter matches",
    ),
    "axis": (
        lambda p: jp.lm.layout(p, head={"layers_{layer}/attn/query/kernel": 3}),
        ValueError,
        "axis 3 does not",
    ),
    "heads": (
        lambda p: jp.lm.layout(p, head={"layers_{layer}/attn/query/kernel": (1, 3)}),
        ValueError,
        "3 heads do not divide",
    ),
    "type": (
        lambda p: jp.lm.layout(p, head={"layers_{layer}/attn/query/kernel": "1"}),
        TypeError,
        "must be an axis",
    ),
    "not said": (
        lambda p: jp.component(jp.lm.layout(p, embed=["wte"]), "l0"),
        ValueError,
        "no layer 0|does not say",
    ),
}


@pytest.mark.parametrize(("act", "error", "message"), BAD_LAYOUTS.values(), ids=BAD_LAYOUTS.keys())
def test_bad_layouts_are_explained(act, error, message):
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            act(trees("flax")[0])
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
