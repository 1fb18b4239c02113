"""Each cause of a second compilation is named, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from fnml.core import ConfigError
from fnml.transforms import explain


def placed(x, count):
    mesh = jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )
    return jax.device_put(x, NamedSharding(mesh, jax.P("data")))


ONES = jnp.ones((4, 2))
CALLS = {
    "shape": ({"w": ONES}, {"w": ONES[:2]}),
    "dtype": ({"w": ONES}, {"w": ONES.astype(jnp.bfloat16)}),
    "weak type": ({"w": jnp.float32(1)}, {"w": 1.0}),
    "sharding": ({"w": placed(ONES, 2)}, {"w": placed(ONES, 4)}),
    "tree": ({"w": ONES}, {"w": ONES, "b": ONES}),
}


def traced(before, after):
    """Count how often JAX traces for two calls."""
    count = []

    @jax.jit
    def f(x):
        count.append(1)
        return jax.tree.map(lambda v: v + 1, x)

    f(before), f(after)
    return f, len(count)


@pytest.mark.parametrize("what", CALLS)
def test_what_makes_jax_compile_again_is_named(what):
    before, after = CALLS[what]
    f, count = traced(before, after)
    found = explain(f, (before,), (after,))
    assert [c.what for c in found] == [what]
    assert found[0].path == ("x/b" if what == "tree" else "x/w") and found[0].cure in str(found[0])
    assert count == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ONES, 2 * ONES),
        (1.0, 2.5),
        (np.ones(3), np.ones(3, np.float32)),
        (np.float32(1), jnp.float32(2)),
        ((ONES, {"a": 1}), (ONES + 1, {"a": 5})),
    ],
)
def test_calls_that_share_a_program_have_no_changes(before, after):
    f, count = traced(before, after)
    assert count == 1 and explain(f, (before,), (after,)) == []


def test_static_arguments_and_keywords():
    @jax.jit
    def f(x, *, train=False, scale=1.0):
        return x

    found = explain(
        f,
        (ONES,),
        (ONES,),
        options_before={"train": True},
        options_after={"train": False, "scale": 2.0},
        static_argnames=("train",),
    )
    assert [(c.path, c.what, c.before, c.after) for c in found] == [
        ("train", "static", "True", "False"),
        ("scale", "tree", "not given", "given"),
    ]
    with pytest.raises(ConfigError, match="do not fit"):
        explain(f, (), (ONES,))


def test_an_array_read_after_it_was_donated_is_named():
    step = jax.jit(lambda params, batch: params + batch, donate_argnums=0)
    params, batch = jnp.ones(3), jnp.ones(3)
    step(params, batch)
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        step(params, batch)
    [change] = explain(step, (params, batch), (params, batch))
    assert (change.path, change.what, change.recompiles) == ("params", "donated", False)
