"""Files: external data, sparse and narrow arrays, and what is damaged or hostile."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from made_models import FLOAT, draw, model, perceptron, port, tensor
from onnx import TensorProto, helper, numpy_helper

from fnml.core import ConfigError, DataError
from fnml.interop.onnx import from_onnx
from fnml.interop.onnx._dtypes import DTYPES
from fnml.interop.onnx._tensors import decode_tensor


def _line(weight):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return model(nodes, [port("x", [None, 4])], [port("y", [None, 3])], [weight])


def _external(location, offset=None, length=None):
    weight = TensorProto(name="w", data_type=FLOAT, dims=[4, 3], data_location=1)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            weight.external_data.add(key=key, value=str(value))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", [port("x", [1, 4])], [port("y", [1, 3])], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_external_data_lie_beside_the_model(tmp_path):
    value = draw(4, 3)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(b"12345678" + value.tobytes() + b"rest")
    path = tmp_path / "m.onnx"
    onnx.save(_external("sub/w.bin", 8, value.nbytes), path)
    _, params = from_onnx(path)
    assert (params["w"] == value).all()
    onnx.save(_line(tensor("w", value)), path, save_as_external_data=True, size_threshold=0)
    assert (from_onnx(str(path))[1]["w"] == value).all()


@pytest.mark.parametrize(
    ("location", "offset", "length", "message"),
    [
        ("../w.bin", None, None, "outside the model's folder"),
        ("/etc/passwd", None, None, "outside the model's folder"),
        ("a/../../w.bin", None, None, "outside the model's folder"),
        ("..\\w.bin", None, None, "outside the model's folder"),
        ("", None, None, "outside the model's folder"),
        ("link", None, None, "no file in the model's folder"),
        ("none.bin", None, None, "no file in the model's folder"),
        (".", None, None, "no file in the model's folder"),
        ("w.bin", 8, None, "needs 48 bytes from 8"),
        ("w.bin", -8, None, "names 48 at -8"),
        ("w.bin", 0, 2**40, "names 1099511627776 at 0"),
        ("w.bin", "x", None, "is no number"),
    ],
)
def test_external_data_elsewhere_are_refused(tmp_path, location, offset, length, message):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "w.bin").write_bytes(draw(4, 3).tobytes())
    (folder / "link").symlink_to(tmp_path / "w.bin")
    path = folder / "m.onnx"
    path.write_bytes(_external(location, offset, length).SerializeToString())
    with pytest.raises(DataError, match=message):
        from_onnx(path)


def test_external_data_need_the_path():
    with pytest.raises(DataError, match="give from_onnx the path"):
        from_onnx(_external("w.bin"))


def test_a_path_bytes_and_a_proto_are_the_same_model(tmp_path):
    proto, [x] = perceptron()
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    outputs = []
    for source in (proto, proto.SerializeToString(), path, str(path)):
        imported, params = from_onnx(source)
        outputs.append(np.asarray(imported.apply(params, x)))
    assert all((a == outputs[0]).all() for a in outputs)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        from_onnx(tmp_path / "none.onnx")
    with pytest.raises(DataError, match="no ONNX model"):
        from_onnx(b"\xff\xff\xff")
    with pytest.raises(DataError, match="it has no graph"):
        from_onnx(b"")
    with pytest.raises(ConfigError, match="got int"):
        from_onnx(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.dims.append(2), "takes 96 bytes, and the file has 48"),
        (lambda t: t.dims.extend([2**40, 2**40]), "and the file has 48"),
        (lambda t: t.dims.__setitem__(0, -1), r"has the shape \[-1, 3\]"),
        (lambda t: setattr(t, "data_type", 99), "element type 99"),
        (lambda t: setattr(t, "raw_data", t.raw_data[1:]), "the file has 47"),
    ],
)
def test_sizes_are_checked_before_they_are_believed(change, message):
    proto = _line(tensor("w", draw(4, 3)))
    change(proto.graph.initializer[0])
    with pytest.raises(DataError, match=message):
        from_onnx(proto)


def test_a_value_that_nothing_makes_is_refused():
    proto = _line(tensor("w", draw(4, 3)))
    proto.graph.node[0].input[1] = "weight"
    with pytest.raises(DataError, match=r"'MatMul_0' uses 'weight', which nothing"):
        from_onnx(proto)


@pytest.mark.parametrize("rows", [False, True])
def test_sparse_initializers_are_made_dense(rows):
    places = np.array([[0, 1], [3, 2]]) if rows else np.array([1, 11])
    sparse = helper.make_sparse_tensor(
        tensor("w", [2.0, 3.0]), numpy_helper.from_array(places, "i"), [4, 3]
    )
    proto = _line(tensor("w", draw(4, 3)))
    del proto.graph.initializer[:]
    proto.graph.sparse_initializer.append(sparse)
    expected = np.zeros((4, 3), np.float32)
    expected[0, 1], expected[3, 2] = 2, 3
    assert (from_onnx(proto)[1]["w"] == expected).all()
    sparse.indices.CopyFrom(numpy_helper.from_array(places + 12, "i"))
    proto.graph.sparse_initializer[0].CopyFrom(sparse)
    with pytest.raises(DataError, match="outside the shape"):
        from_onnx(proto)
    sparse.dims[:] = [2**30, 2**30]
    proto.graph.sparse_initializer[0].CopyFrom(sparse)
    with pytest.raises(DataError, match="sparse array of shape"):
        from_onnx(proto)


@pytest.mark.parametrize("number", sorted(set(DTYPES) - {8}))
def test_every_element_type_is_read_as_onnx_reads_it(number):
    dtype = DTYPES[number]
    # 1 and 2 are exact in all of them but bool and the signed integer of two bits.
    values = (
        np.array([1, 0, 1, 1, 0, 1, 1]) if number in (9, 26) else np.array([1, 2, 1, 1, 2, 1, 2])
    )
    array = values.astype(np.float32).astype(dtype)
    raw = numpy_helper.from_array(array, "a")
    listed = helper.make_tensor("a", number, [7], array.astype(object).tolist())
    for proto in (raw, listed):
        got = decode_tensor(proto, None, "a")
        assert got.dtype == dtype
        expected = numpy_helper.to_array(proto)
        assert (got.astype(np.complex64) == expected.astype(np.complex64)).all()


def test_bfloat16_weights_stay_bfloat16():
    value = draw(4, 3).astype(ml_dtypes.bfloat16)
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    weight = numpy_helper.from_array(value, "w")
    _, params = from_onnx(model(nodes, [port("x", [1, 4])], [port("y", [1, 3])], [weight]))
    assert params["w"].dtype == ml_dtypes.bfloat16 and (np.asarray(params["w"]) == value).all()
