"""The first operation that went wrong is found: line, layer, parameter, example."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from walk_programs import PROGRAMS, WS, X

from fnml.core import ConfigError, LayoutError, Metrics, NonFiniteError
from fnml.pallas_kernels import attention
from fnml.transforms import accumulate, checked, find_nonfinite, load_arguments, save_arguments

PARAMS = {"layers": {"scale": jnp.ones((3, 4)).at[1, 2].set(-1.0), "w": WS}}
BATCH = {"x": jnp.abs(X), "y": jnp.zeros((2, 4))}


def layer(x, p):
    with jax.named_scope("mlp"):
        h = jnp.log(p["scale"][None] * jnp.abs(x) + 1e-3)  # the line that goes wrong
    return jax.nn.softmax(h @ p["w"]), None


def loss(params, batch, key):
    x, _ = lax.scan(layer, batch["x"], params["layers"])
    return jnp.mean((x - batch["y"]) ** 2)


def line_of(text):
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize("function", [loss, jax.value_and_grad(loss)])
def test_operation_line_layer_and_parameter_are_named(function):
    found = find_nonfinite(function, PARAMS, BATCH, None)
    assert (found.kind, found.primitive, found.loops, found.scope) == ("NaN", "log", (1,), "mlp")
    line = line_of("the line that " + "goes wrong")
    assert found.source == f"{__file__}:{line} (layer)"
    assert found.parameters == ("layers/scale",) and found.index == (0, 2)


def test_a_result_that_is_finite_is_no_finding():
    masked = lambda p, x: jnp.sum(jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf)))
    assert find_nonfinite(masked, 0.0, jnp.arange(3.0)) is None


def test_batch_examples_are_found():
    def f(params, batch):
        return jnp.mean(jnp.log(batch["x"]) * params + batch["y"])

    batch = {"x": jnp.array([1.0, -1.0, 2.0, -3.0]), "y": jnp.ones(4)}
    found = find_nonfinite(f, jnp.float32(1), batch)
    assert found.examples == (1, 3) and found.index == (1,)


def test_a_masks_infinity_is_not_the_origin_of_a_nan():
    def layer(x, scale):
        return scale * attention(x, x, x, causal=True), None

    def loss(scales, x):
        return jnp.sum(lax.scan(layer, x, scales)[0])

    scales = jnp.array([1.0, 1e38, 1e38, 1.0])  # scores of the third overflow
    found = find_nonfinite(jax.value_and_grad(loss), scales, jnp.full((1, 4, 1, 8), 2.0))
    assert (found.kind, found.primitive, found.loops[0]) == ("infinity", "dot_general", 2)


def test_an_overflow_is_found_behind_the_nan_it_became():
    def f(params, x):
        y = jnp.exp(params * x)
        return jnp.sum(y - 2 * y)

    found = find_nonfinite(f, jnp.float32(100), jnp.ones(3))
    assert (found.kind, found.primitive) == ("infinity", "exp")
    assert "sub" in found.then and "NaN first in" in str(found)


def test_the_gradient_of_a_square_root_at_zero():
    def f(params, x):
        return jnp.sum(jnp.where(x > 0, jnp.sqrt(params * x), 0.0))

    assert find_nonfinite(f, jnp.float32(1), jnp.array([1.0, 0.0])) is None
    found = find_nonfinite(jax.grad(f), jnp.float32(1), jnp.array([1.0, 0.0]))
    assert found.kind == "infinity" and f"{__file__}:{line_of('jnp.sqrt(params')}" in found.source


def test_an_argument_that_is_not_finite_is_the_finding():
    found = find_nonfinite(loss, {"layers": PARAMS["layers"]}, {**BATCH, "x": X / 0}, None)
    assert (found.primitive, found.source) == ("argument", "1/x")


@pytest.mark.parametrize(
    ("loop", "turns"),
    [
        (lambda x: lax.scan(lambda c, _: (jnp.exp(c), None), x, None, length=9)[0], (3,)),
        (lambda x: lax.fori_loop(0, 9, lambda i, c: jnp.exp(c), x), (3,)),
        (lambda x: lax.while_loop(lambda c: c < 1e30, jnp.exp, x), (3,)),
        (lambda x: lax.scan(lambda c, v: (c + jnp.log(v), None), x, jnp.array([0.0, 1, 0]),
                            reverse=True)[0], (2,)),
        (lambda x: lax.cond(x > 0, lambda x: jnp.log(-x), lambda x: x, x), ()),
        (jax.checkpoint(jax.jit(lambda x: jnp.log(-x))), ()),
    ],
)  # fmt: skip
def test_it_goes_into_every_body_and_counts_the_turns(loop, turns):
    found = find_nonfinite(loop, jnp.float32(1.0))
    assert found.loops == turns and found.primitive in ("exp", "log")


@pytest.mark.parametrize("name", PROGRAMS)
def test_checked_has_the_bits_of_the_function_also_when_traced(name):
    f = PROGRAMS[name]
    plain = jax.jit(f)(WS, X)
    assert np.array_equal(checked(jax.jit(f))(WS, X), plain)
    assert np.array_equal(jax.jit(checked(f))(WS, X), plain)
    assert checked(f, on=False) is f


def test_checked_goes_under_grad_vmap_and_scan():
    f = checked(lambda x: jnp.sum(jnp.sqrt(x)))
    x = jnp.ones((3, 2))
    assert jax.jit(jax.vmap(jax.grad(f)))(x).tolist() == [[0.5, 0.5]] * 3
    assert lax.scan(lambda c, v: (c + f(v), None), 0.0, x)[0] == 6.0


def test_no_layout_goes_around_a_checked_layout():
    grad_fn = jax.value_and_grad(lambda p, b, k: (jnp.sum(p * b), Metrics(1.0)), has_aux=True)
    tested = checked(accumulate(grad_fn, 2))
    with pytest.raises(LayoutError, match=r"checked\(accumulate\(grad_fn, n\)\)"):
        accumulate(tested, 2)(jnp.float32(1), X, jax.random.key(0))


def test_checked_raises_with_the_origin_and_files_to_reproduce_it(tmp_path):
    with pytest.raises(NonFiniteError, match=r"log made the first NaN, at .*\(layer\)"):
        checked(jax.jit(loss), directory=tmp_path)(PARAMS, BATCH, jax.random.key(3))
    params, batch, key = load_arguments(tmp_path)
    assert jax.random.key_data(key).tolist() == [0, 3]
    again = find_nonfinite(loss, params, batch, key)
    assert again.primitive == "log" and again.loops == (1,)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["found"]["parameters"] == ["layers/scale"]
    assert not any(p.suffix in (".pkl", ".pickle") for p in tmp_path.iterdir())


def test_checked_raises_when_compiled_and_keeps_the_arguments(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)  # JAX logs what a callback raises
    with pytest.raises(Exception, match=r"loss: not finite: the result"):
        jax.block_until_ready(
            jax.jit(checked(loss, directory=tmp_path))(PARAMS, BATCH, jax.random.key(3))
        )
        jax.effects_barrier()
    assert find_nonfinite(loss, *load_arguments(tmp_path)).loops == (1,)


def test_arguments_come_back_with_dtypes_and_containers(tmp_path):
    args = ([jnp.ones(2, jnp.bfloat16), None], {"b": (np.arange(3, dtype=np.int8),), "a": 2.5})
    back = load_arguments(save_arguments(tmp_path, args))
    assert jax.tree.structure(back) == jax.tree.structure(args)
    assert [x.dtype for x in jax.tree.leaves(back)] == [jnp.bfloat16, jnp.float32, jnp.int8]
    from fnml.core import Mean

    mean = (Mean(jnp.ones(()), jnp.ones(())),)
    save_arguments(tmp_path / "other", mean)
    with pytest.raises(ConfigError, match="hold a Mean"):
        load_arguments(tmp_path / "other")
    assert float(load_arguments(tmp_path / "other", like=mean)[0].value) == 1.0
