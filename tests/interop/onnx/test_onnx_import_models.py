"""Imported models against onnxruntime, compiled, differentiated and mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax
from made_models import (
    BOOL,
    FLOAT,
    INT64,
    MODELS,
    constant,
    draw,
    loop,
    model,
    nested_branches,
    perceptron,
    port,
    recurrent,
    tensor,
)
from onnx import helper

from fnml.core import ConfigError, ShapeError, init, leaf_names
from fnml.interop.onnx import UnsupportedError, from_onnx
from fnml.interop.onnx._decode import Decoding, Scope, decode_graph

# Both sides compute in float32, in another order.
TOLERANCE = 1e-4


def _reference(proto, inputs):
    names = [p.name for p in proto.graph.input]
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, dict(zip(names, inputs, strict=True)))


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_onnxruntime_under_jit(name):
    proto, inputs = MODELS[name]()
    before = proto.SerializeToString()
    imported, params = from_onnx(proto)
    got = jax.jit(imported.apply)(params, *inputs)
    [expected] = _reference(proto, inputs)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(
        imported.apply(params, *inputs), expected, rtol=TOLERANCE, atol=TOLERANCE
    )
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_a_branch_is_taken_when_known_and_when_not(first, second):
    proto, [x, *_] = nested_branches()
    [expected] = _reference(proto, [x, np.array(first), np.array(second)])
    imported, params = from_onnx(proto)
    got = jax.jit(imported.apply)(params, x, np.array(first), np.array(second))
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    fixed, _ = from_onnx(proto, {"first": first, "second": second})
    assert [p.name for p in fixed.apply.inputs] == ["x"]
    got = jax.jit(fixed.apply)(params, x)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert "cond" not in str(jax.make_jaxpr(fixed.apply)(params, x))


def test_a_branch_for_other_sizes_gives_nan_only_when_it_is_taken():
    def branch(name, rows):
        weight = tensor(f"{name}.weight", draw(rows, 2, seed=rows))
        nodes = [helper.make_node("MatMul", ["x", f"{name}.weight"], [name])]
        return helper.make_graph(nodes, name, [], [port(name, ["n", 2])], [weight])

    nodes = [
        helper.make_node(
            "If", ["low"], ["y"], then_branch=branch("a", 3), else_branch=branch("b", 5)
        )
    ]
    inputs = [port("x", ["n", "size"]), port("low", [], BOOL)]
    graph = helper.make_graph(nodes, "g", inputs, [port("y", ["n", 2])])
    imported, params = from_onnx(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    )
    apply = jax.jit(imported.apply)
    x = draw(4, 3)
    np.testing.assert_allclose(
        apply(params, x, np.array(True)), x @ params["a"]["weight"], rtol=1e-5, atol=1e-6
    )
    assert np.isnan(apply(params, x, np.array(False))).all()
    with pytest.raises(ShapeError, match="MatMul_0"):
        apply(params, draw(4, 4), np.array(True))
    with pytest.raises(ShapeError, match="MatMul_0"):
        imported.apply(params, x, np.array(False))


@pytest.mark.parametrize("count", [0, 3, 7, 100])
def test_a_loop_runs_as_often_when_known_and_when_not(count):
    proto, [x, _] = loop()
    [expected] = _reference(proto, [x, np.array(count)])
    for static in ({}, {"count": count}):
        imported, params = from_onnx(proto, static)
        rest = [] if static else [np.array(count)]
        got = jax.jit(imported.apply)(params, x, *rest)
        np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


def test_a_loop_of_known_length_differentiates():
    proto, [x, _] = loop()
    imported, params = from_onnx(proto, {"count": 40})

    def total(params):
        return imported.apply(params, x).sum()

    grads = jax.grad(total)(params)
    step = 1e-2
    for axis in range(3):
        moved = [params | {"rate": params["rate"].at[axis].add(sign * step)} for sign in (1, -1)]
        slope = (total(moved[0]) - total(moved[1])) / (2 * step)
        np.testing.assert_allclose(grads["rate"][axis], slope, rtol=2e-2, atol=1e-2)


def test_weights_of_constants_and_subgraphs_are_parameters():
    _, params = from_onnx(nested_branches()[0])
    assert sorted(leaf_names(params)) == ["deep/weight", "gain", "shift"]
    imported, params = from_onnx(perceptron()[0])
    assert sorted(leaf_names(params)) == ["fc1/bias", "fc1/weight", "fc2/weight"]
    drawn = init(imported.spec, jax.random.key(0))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)


def test_scales_and_single_numbers_are_no_parameters():
    _, params = from_onnx(MODELS["image_decoder"]()[0])
    assert sorted(params) == ["b", "m", "o", "s", "t", "v", "w"]
    nodes = [constant("half", [0.5]), helper.make_node("Mul", ["x", "half"], ["y"])]
    _, params = from_onnx(model(nodes, [port("x", [2])], [port("y", [2])]))
    assert params == {}


def test_a_training_step_reaches_the_target():
    proto, [x] = recurrent()
    imported, params = from_onnx(proto)
    target = jnp.asarray(draw(2, 8, seed=9)) * 0.3

    @jax.jit
    def step(params):
        def loss(params):
            return jnp.mean((imported.apply(params, x) - target) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)

    losses = []
    for _ in range(30):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2


def test_vmap_adds_an_axis():
    proto, [x] = recurrent()
    imported, params = from_onnx(proto)
    batch = jnp.stack([x, x + 1, x - 1])
    got = jax.vmap(lambda x: imported.apply(params, x))(batch)
    one = jnp.stack([imported.apply(params, x) for x in batch])
    np.testing.assert_allclose(got, one, rtol=1e-5, atol=1e-6)


def test_ports_keep_names_dtypes_and_symbolic_sizes():
    imported, _ = from_onnx(nested_branches()[0])
    assert [(p.name, str(p.dtype), p.shape) for p in imported.apply.inputs] == [
        ("x", "float32", ("n", 3)),
        ("first", "bool", ()),
        ("second", "bool", ()),
    ]
    assert [(p.name, p.shape) for p in imported.apply.outputs] == [("y", ("n", 3))]


def test_every_wrong_input_is_named():
    imported, params = from_onnx(nested_branches()[0])
    with pytest.raises(ShapeError) as caught:
        imported.apply(params, jnp.ones((2, 4)), jnp.ones((1,), bool), jnp.ones(()))
    message = str(caught.value)
    assert "x: expected float32[n, 3], got float32[2, 4]" in message
    assert "first: expected bool[], got bool[1]" in message
    assert "second: expected bool[], got float32[]" in message
    with pytest.raises(ShapeError, match=r"takes 3 inputs \(x, first, second\), and got 1"):
        imported.apply(params, jnp.ones((2, 3)))
    with pytest.raises(ShapeError, match="without shift, deep/weight"):
        imported.apply({"gain": jnp.ones(3)}, draw(2, 3), np.array(True), np.array(True))


def test_an_operand_that_gives_a_shape_has_to_be_known_under_jit():
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    proto = model(nodes, [port("x", [6]), port("shape", [2], INT64)], [port("y", ["a", "b"])])
    imported, params = from_onnx(proto)
    with pytest.raises(ShapeError, match=r"node 'Reshape_0' .*input 1 \('shape'\).*static_inputs"):
        jax.jit(imported.apply)(params, draw(6), np.array([2, 3]))
    assert imported.apply(params, draw(6), np.array([2, 3])).shape == (2, 3)
    fixed, params = from_onnx(proto, {"shape": [3, 2]})
    assert jax.jit(fixed.apply)(params, draw(6)).shape == (3, 2)
    with pytest.raises(ConfigError, match="Did you mean 'shape'"):
        from_onnx(proto, {"shap": [3, 2]})
    with pytest.raises(ShapeError, match=r"shape: expected int64\[2\], got int64\[3\]"):
        from_onnx(proto, {"shape": [3, 2, 1]})


def test_all_that_is_unsupported_is_listed_before_anything_runs():
    inner = helper.make_graph(
        [helper.make_node("Strange", ["x"], ["z"], name="deep", domain="there")],
        "inner",
        [],
        [port("z", [2])],
    )
    nodes = [
        helper.make_node("Rellu", ["x"], ["a"], name="typo"),
        helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner, name="if"),
    ]
    graph = helper.make_graph(
        nodes, "g", [port("x", [2]), port("flag", [], BOOL)], [port("y", [2]), port("a", [2])]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("there", 1)]
    with pytest.raises(UnsupportedError) as caught:
        from_onnx(helper.make_model(graph, opset_imports=opsets))
    message = str(caught.value)
    assert "Rellu (opset 21) of node 'typo'. Did you mean" in message
    assert "there.Strange (opset 1) of node 'if/then_branch/deep'" in message
    assert "there.Strange (opset 1) of node 'if/else_branch/deep'" in message


def test_a_newer_opset_is_not_refused_for_its_number():
    proto, [x] = perceptron()
    proto.opset_import[0].version = 99
    imported, params = from_onnx(proto)
    assert imported.apply(params, x).shape == (4, 3)


def test_local_functions_share_their_parameters_and_take_attributes():
    body = [
        constant("w", draw(3, 3, seed=1)),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("LeakyRelu", ["m"], ["y"]),
    ]
    body[2].attribute.append(onnx.AttributeProto(name="alpha", type=1, ref_attr_name="slope"))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Layer", ["x"], ["y"], body, opsets[:1], ["slope"])
    nodes = [
        helper.make_node("Layer", ["x"], ["h"], domain="own", slope=0.25),
        helper.make_node("Layer", ["h"], ["y"], domain="own", slope=0.5),
    ]
    proto = model(
        nodes,
        [port("x", [2, 3])],
        [port("y", [2, 3])],
        functions=[function],
        opset_imports=opsets,
    )
    imported, params = from_onnx(proto)
    assert leaf_names(params) == ["w"]
    x = draw(2, 3)
    [expected] = _reference(proto, [x])
    np.testing.assert_allclose(imported.apply(params, x), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_functions_that_call_each_other_are_refused():
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    again = [helper.make_node("B", ["x"], ["y"], domain="own")]
    back = [helper.make_node("A", ["x"], ["y"], domain="own")]
    functions = [
        helper.make_function("own", name, ["x"], ["y"], body, opsets)
        for name, body in (("A", again), ("B", back))
    ]
    graph = helper.make_graph(back, "g", [port("x", [1])], [port("y", [1])])
    with pytest.raises(Exception, match="nested deeper") as caught:
        from_onnx(helper.make_model(graph, functions=functions, opset_imports=opsets))
    assert caught.type.__name__ == "DataError"


def test_random_numbers_come_from_the_key():
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["a"], name="a"),
        helper.make_node("RandomNormalLike", ["x"], ["b"], name="b"),
        helper.make_node("Sub", ["a", "b"], ["y"]),
    ]
    imported, params = from_onnx(model(nodes, [port("x", [50])], [port("y", [50])]))
    x = jnp.zeros(50)
    first = imported.apply(params, x, key=jax.random.key(1))
    assert float(jnp.abs(first).min()) > 0
    assert (first == imported.apply(params, x, key=jax.random.key(1))).all()
    assert (first != imported.apply(params, x, key=jax.random.key(2))).all()


def test_int64_that_does_not_fit_is_refused_in_32_bit_and_kept_in_64():
    nodes = [helper.make_node("Add", ["x", "big"], ["y"])]
    proto = model(
        nodes, [port("x", [1], INT64)], [port("y", [1], INT64)], [tensor("big", [2**40], np.int64)]
    )
    imported, params = from_onnx(proto)
    with pytest.raises(ShapeError, match="enable_x64"):
        imported.apply(params, np.array([1]))
    with jax.enable_x64(True):
        imported, params = from_onnx(proto)
        assert int(imported.apply(params, np.array([1]))[0]) == 2**40 + 1


def test_casting_parameters_keeps_computing():
    imported, params = from_onnx(perceptron()[0])
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    got = imported.apply(half, draw(4, 5))
    np.testing.assert_allclose(got, imported.apply(params, draw(4, 5)), atol=0.1)
    assert FLOAT == 1 and got.dtype == jnp.float32


def test_a_depthwise_convolution_has_the_values_and_gradients_of_a_grouped_one():
    attributes = {"group": 4, "strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 2, 3]}
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)]
    weight = draw(4, 1, 3, 3, seed=1)
    proto = model(
        nodes, [port("x", [2, 4, 9, 8])], [port("y", ["b", "c", "h", "w"])], [tensor("w", weight)]
    )
    imported, params = from_onnx(proto)
    x = jnp.asarray(draw(2, 4, 9, 8))

    def ours(x, w):
        return imported.apply({"w": w}, x)

    def grouped(x, w):
        return lax.conv_general_dilated(
            x, w, (2, 1), ((1, 2), (0, 3)), rhs_dilation=(1, 2), feature_group_count=4
        )

    got, pull = jax.vjp(ours, x, params["w"])
    expected, pull_expected = jax.vjp(grouped, x, params["w"])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(pull(got), pull_expected(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got, _reference(proto, [np.asarray(x)])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("written", [constant, tensor])
def test_filled_weights_are_parameters(written):
    # Left a constant, XLA sums such a layer's rectified output to 0 on a CPU.
    sizes = written("sizes", [1000, 512, 1, 1], np.int64)
    fill = helper.make_node("ConstantOfShape", ["sizes"], ["w"], value=tensor("", [0.5]))
    nodes = [
        fill,
        helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["y"]),
    ]
    own = [tensor("b", np.full(1000, 0.5))]
    nodes, own = ([sizes, *nodes], own) if written is constant else (nodes, [sizes, *own])
    ports = [port("x", [1, 512, 13, 13])], [port("y", [1, 1000, 1, 1])]
    imported, params = from_onnx(model(nodes, *ports, own))
    assert sorted(leaf_names(params)) == ["b", "w"] and float(params["w"].min()) == 0.5
    x = np.abs(draw(1, 512, 13, 13))
    expected = 0.5 * x.astype(np.float64).sum(1).mean() + 0.5
    got = jax.jit(imported.apply)(params, x)
    np.testing.assert_allclose(got, np.full((1, 1000, 1, 1), expected), rtol=1e-6)


def test_filled_arrays_that_are_no_weights_are_no_parameters():
    fill = helper.make_node("ConstantOfShape", ["sizes"], ["h"], value=tensor("", [2.0]))
    add = helper.make_node("Add", ["x", "h"], ["y"])
    ports = [port("x", [3, 4])], [port("y", [3, 4])]
    imported, params = from_onnx(model([fill, add], *ports, [tensor("sizes", [3, 4], np.int64)]))
    assert jax.tree.leaves(params) == []
    np.testing.assert_array_equal(imported.apply(params, np.ones((3, 4), np.float32)), 3.0)


def test_a_small_file_cannot_fill_all_memory_with_weights():
    fills = [
        helper.make_node("ConstantOfShape", ["sizes"], [name], value=tensor("", [2.0]))
        for name in ("w", "v")
    ]
    products = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    ports = [port("x", [1, 3])], [port("y", [1, 3])]
    proto = model([*fills, *products], *ports, [tensor("sizes", [3, 3], np.int64)])
    decoding = Decoding(fill=10)
    graph = decode_graph(proto.graph, Scope("", {"": 21}), decoding)
    # The second one stays what it is in the file: a shape and a number.
    assert list(decoding.arrays) == ["w"]
    assert [step.node.op for step in graph.steps] == ["ConstantOfShape", "MatMul", "MatMul"]
    imported, params = from_onnx(proto)
    assert leaf_names(params) == ["v", "w"]
    np.testing.assert_array_equal(imported.apply(params, np.ones((1, 3), np.float32)), 36.0)


def test_softmax_of_products_in_the_billions_is_one():
    # 2^33 / 169 is no float32: the product that is subtracted from itself leaves 293 unrounded.
    nodes = [
        helper.make_node("Mul", ["x", "c"], ["p"]),
        helper.make_node("Softmax", ["p"], ["y"], axis=1),
    ]
    proto = model(
        nodes, [port("x", [1, 1000])], [port("y", [1, 1000])], [tensor("c", np.float32(1 / 169))]
    )
    imported, params = from_onnx(proto)
    x = np.linspace(1, 2, 7, dtype=np.float32)[:, None, None] * np.full((1, 1000), 1.6e12)
    for row in x.astype(np.float32):
        np.testing.assert_allclose(jax.jit(imported.apply)(params, row), 1e-3, rtol=1e-6)


def test_softmax_has_the_values_and_derivatives_of_jax():
    proto = model(
        [helper.make_node("Softmax", ["x"], ["y"], axis=0)],
        [port("x", [5, 3])],
        [port("y", [5, 3])],
    )
    imported, params = from_onnx(proto)
    x, direction = jnp.asarray(draw(5, 3)), jnp.asarray(draw(5, 3, seed=1))

    def ours(x):
        return imported.apply(params, x)

    def theirs(x):
        return jax.nn.softmax(x, 0)

    for mine, reference in (
        (jax.jvp(ours, (x,), (direction,)), jax.jvp(theirs, (x,), (direction,))),
        (jax.jacrev(jax.jacfwd(ours))(x), jax.jacrev(jax.jacfwd(theirs))(x)),
    ):
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    odd = jnp.array([[1.0, -jnp.inf, 0], [jnp.inf, -jnp.inf, jnp.nan], *[[0.0, -jnp.inf, 1]] * 3])
    np.testing.assert_array_equal(jnp.isnan(ours(odd)), jnp.isnan(theirs(odd)))


def test_parameters_of_one_name_in_two_branches_are_two():
    def branch(name, value):
        nodes = [helper.make_node("Add", ["x", "w"], [name])]
        return helper.make_graph(nodes, name, [], [port(name, [2])], [tensor("w", value)])

    branches = {"then_branch": branch("a", [1, 2]), "else_branch": branch("b", [3, 4])}
    node = helper.make_node("If", ["c"], ["y"], name="pick", **branches)
    proto = model([node], [port("x", [2]), port("c", [], BOOL)], [port("y", [2])])
    imported, params = from_onnx(proto)
    assert leaf_names(params) == ["pick/then_branch/w", "w"]
    for chosen, expected in ((True, [1, 2]), (False, [3, 4])):
        got = imported.apply(params, np.zeros(2, np.float32), np.array(chosen))
        np.testing.assert_array_equal(got, np.float32(expected))


@pytest.mark.parametrize("strides", [[1, 1], [2, 3]])
def test_a_convolution_of_one_place_has_the_values_and_gradients_of_jax(strides):
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=strides)
    proto = model(
        [node],
        [port("x", [2, 4, 9, 8])],
        [port("y", ["b", "c", "h", "w"])],
        [tensor("w", draw(5, 4, 1, 1, seed=1))],
    )
    imported, params = from_onnx(proto)
    x = jnp.asarray(draw(2, 4, 9, 8))
    got, pull = jax.vjp(lambda w, x: imported.apply({"w": w}, x), params["w"], x)
    expected, expected_pull = jax.vjp(
        lambda w, x: lax.conv_general_dilated(x, w, strides, "VALID"), params["w"], x
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(pull(got), expected_pull(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got, _reference(proto, [np.asarray(x)])[0], rtol=1e-5, atol=1e-5)
