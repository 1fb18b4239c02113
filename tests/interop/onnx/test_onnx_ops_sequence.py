import jax
import numpy as np
import onnx
import pytest
from onnx import helper

from fnml.core import ShapeError
from fnml.interop.onnx import from_onnx

X = np.arange(24, dtype=np.float32).reshape(4, 6)


def model(*nodes, constants=(), outputs=("y",)):
    """Return a model of ``x [4, 6]`` and these nodes; constants are int64."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "sequences",
        [value("x", onnx.TensorProto.FLOAT, [4, 6])],
        [value(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(np.array(v, np.int64), n) for n, v in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run(*nodes, constants=(), x=X):
    imported, params = from_onnx(model(*nodes, constants=constants))
    return jax.jit(imported.apply)(params, x)


node = helper.make_node


@pytest.mark.parametrize(
    ("split", "parts"),
    [(None, np.split(X, 6, axis=1)), (4, [X[:, :4], X[:, 4:]]), ([1, 5], [X[:, :1], X[:, 1:]])],
)
def test_split_and_concat_under_jit(split, parts):
    names = ["x"] if split is None else ["x", "split"]
    constants = [] if split is None else [("split", split)]
    split_node = node("SplitToSequence", names, ["s"], axis=1)
    whole = node("ConcatFromSequence", ["s"], ["y"], axis=1)
    np.testing.assert_array_equal(run(split_node, whole, constants=constants), X)
    for place, part in enumerate(parts):
        at = node("SequenceAt", ["s", "place"], ["y"])
        y = run(split_node, at, constants=[*constants, ("place", place)])
        np.testing.assert_array_equal(y, part)
    count = run(
        split_node,
        node("SequenceLength", ["s"], ["n"]),
        node("Cast", ["n"], ["y"], to=1),
        constants=constants,
    )
    assert count == len(parts)


def test_insert_erase_and_at_count_from_either_end():
    nodes = [
        node("Neg", ["x"], ["a"]),
        node("SequenceConstruct", ["x", "a"], ["s"]),
        node("Exp", ["a"], ["b"]),
        node("SequenceInsert", ["s", "b", "minus_one"], ["t"]),
        node("SequenceErase", ["t", "zero"], ["u"]),
        node("SequenceAt", ["u", "minus_two"], ["y"]),
    ]
    # [x, a] with b before the last is [x, b, a]; without the first [b, a], of which b.
    constants = [("zero", 0), ("minus_one", -1), ("minus_two", -2)]
    np.testing.assert_allclose(run(*nodes, constants=constants), np.exp(-X), rtol=1e-6)


def test_new_axis_stacks_and_gradients_pass():
    nodes = [
        node("SequenceEmpty", [], ["none"]),
        node("SequenceInsert", ["none", "x"], ["one"]),
        node("SequenceInsert", ["one", "x"], ["two"]),
        node("ConcatFromSequence", ["two"], ["y"], axis=-1, new_axis=1),
    ]
    imported, params = from_onnx(model(*nodes))
    y = imported.apply(params, X)
    np.testing.assert_array_equal(y, np.stack([X, X], axis=-1))
    grads = jax.grad(lambda x: imported.apply(params, x).sum())(X)
    np.testing.assert_array_equal(grads, np.full_like(X, 2))


def test_a_place_outside_is_refused():
    nodes = [node("SequenceConstruct", ["x"], ["s"]), node("SequenceAt", ["s", "p"], ["y"], "here")]
    with pytest.raises(ShapeError, match=r"'here' .SequenceAt.: position 3 of a sequence of 1"):
        run(*nodes, constants=[("p", 3)])
