"""What an exported file is: names, parameters, refusals, what is written to disk."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from exported import check, ops, run, same

from fnml.core import ConfigError, DataError, Model, Param, leaf_names
from fnml.interop.onnx import UnsupportedError, from_onnx, to_onnx

PARAMS = {
    "layers": [
        {"kernel": jnp.full((3, 4), 0.5), "bias": jnp.arange(4.0)},
        {"kernel": jnp.full((4, 2), -0.25, jnp.bfloat16), "steps": jnp.arange(3)},
    ],
    "scale": jnp.float32(2),
}


def forward(params, x, *, shift=0.0):
    first, second = params["layers"]
    x = jnp.tanh(x @ first["kernel"] + first["bias"][None] + shift)
    return {"logits": x @ second["kernel"].astype(jnp.float32) * params["scale"]}


def test_names_are_arguments_and_paths() -> None:
    model = check(to_onnx(forward, jnp.ones((2, 3)), params=PARAMS))
    assert [port.name for port in model.graph.input] == ["x"]
    assert [port.name for port in model.graph.output] == ["output/logits"]
    own = [tensor.name for tensor in model.graph.initializer][:5]
    assert own == leaf_names(PARAMS)

    def with_trees(batch, *rest, **options):
        return batch["a"] + rest[0], (rest[1],)

    model = to_onnx(with_trees, {"a": jnp.ones(2)}, jnp.ones(2), jnp.ones(3))
    assert [port.name for port in model.graph.input] == ["batch/a", "rest/0", "rest/1"]
    assert [port.name for port in model.graph.output] == ["output/0", "output/1/0"]


def test_parameters_come_back_bit_for_bit() -> None:
    """Every one of them, whatever its dtype and rank; and no other constant of the file."""
    table = np.linspace(0, 1, 4, dtype=np.float32)[None]
    model = to_onnx(lambda p, x: forward(p, x, shift=table), jnp.ones((2, 3)), params=PARAMS)
    back, params = from_onnx(model)
    assert leaf_names(params) == leaf_names(PARAMS)
    for ours, theirs in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(params), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert leaf_names(back.spec) == leaf_names(params)
    got = back.apply(params, jnp.ones((2, 3)))
    want = forward(PARAMS, jnp.ones((2, 3)), shift=table)["logits"]
    assert jnp.allclose(got, want, rtol=1e-6)


def test_names_are_kept_whatever_they_are() -> None:
    params = {"net/~/linear 0": {"w:0": jnp.ones(2), "ü": jnp.ones(2)}, "x": jnp.ones(2)}
    model = check(to_onnx(lambda p, x: x + sum(jax.tree.leaves(p)), jnp.ones(2), params=params))
    assert leaf_names(from_onnx(model)[1]) == leaf_names(params)
    [port] = model.graph.input
    assert port.name == "x_1", "an input gives way to a parameter of its name"


def test_it_trains_after_the_round_trip() -> None:
    weights = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    x = jax.random.normal(jax.random.key(0), (5, 3))

    def loss(apply, params):
        return (apply(params, x) ** 2).mean()

    def line(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None])

    back, params = from_onnx(to_onnx(line, x, params=weights))
    ours = jax.grad(partial(loss, line))(weights)
    theirs = jax.grad(partial(loss, back.apply))(params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jnp.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_model_is_its_apply() -> None:
    zeros = jax.nn.initializers.zeros
    line = Model({"w": Param((3, 2), (None, None), zeros)}, lambda params, x: x @ params["w"])
    model = to_onnx(line, jnp.ones((4, 3)), params={"w": jnp.ones((3, 2))})
    assert ops(model) == ["MatMul"] and model.graph.input[0].name == "x"


def test_without_params_all_is_input() -> None:
    model = to_onnx(forward, PARAMS, jnp.ones((2, 3)))
    names = [port.name for port in model.graph.input]
    assert names == [*(f"params/{name}" for name in leaf_names(PARAMS)), "x"]
    assert json.loads(model.metadata_props[0].value) == []


def test_the_function_works_afterwards() -> None:
    step = jax.jit(forward)
    x = jnp.ones((2, 3))
    before = step(PARAMS, x)["logits"]
    to_onnx(step, x, params=PARAMS)
    assert (step(PARAMS, x)["logits"] == before).all()
    assert (jax.jit(forward)(PARAMS, x)["logits"] == before).all()


def test_an_input_or_parameter_may_be_returned() -> None:
    def through(p, x):
        return x, p["w"], x + 1, x + 1, jnp.zeros(2)

    model = to_onnx(through, jnp.ones(3), params={"w": jnp.arange(3.0)})
    got = run(check(model), jnp.ones(3))
    for a, b in zip(got, through({"w": jnp.arange(3.0)}, jnp.ones(3)), strict=True):
        assert (a == b).all()


def test_numbers_and_shapes_stand_for_arrays() -> None:
    model = to_onnx(lambda x, n: x * n, jax.ShapeDtypeStruct((2,), "float32"), 3.0)
    [got] = run(model, jnp.ones(2), np.float32(3))
    assert (got == 3).all()


def test_everything_that_cannot_be_exported_is_named_at_once(tmp_path) -> None:
    def refused(x, key):
        y = jnp.linalg.cholesky(x)  # line one
        z = jax.lax.scan(lambda c, a: (c, jnp.fft.fft(a)), 0, x)[1]  # line two
        return y, z, jax.random.bits(key, (3,)), jax.pure_callback(lambda x: x, x, x)

    path = tmp_path / "model.onnx"
    keys = jax.random.key(0, impl="rbg")
    with pytest.raises(UnsupportedError) as caught:
        to_onnx(refused, jnp.eye(3), keys, path=path)
    said = str(caught.value)
    here = refused.__code__.co_firstlineno
    for name, line in (("cholesky", 1), ("fft", 2), ("random_bits", 3), ("pure_callback", 3)):
        assert any(
            entry.strip().startswith(f"{name}, at {__file__}:{here + line} (")
            for entry in said.splitlines()
        ), (name, said)
    assert "rbg" in said and not path.exists()


def test_what_no_result_needs_is_no_hindrance() -> None:
    def unused(x):
        jnp.linalg.cholesky(x)
        jax.debug.print("{}", x)
        return x + 1

    assert ops(to_onnx(unused, jnp.eye(3))) == ["Add"]


@pytest.mark.parametrize("opset", [17, 0, 99])
def test_opsets_that_are_refused(opset: int) -> None:
    with pytest.raises(ConfigError, match="expected 18 to"):
        to_onnx(jnp.tanh, jnp.ones(2), opset=opset)


def test_parameters_have_to_be_arrays() -> None:
    with pytest.raises(ConfigError) as caught:
        params = {"a": jax.ShapeDtypeStruct((2,), "float32"), "b": 1.0}
        to_onnx(lambda p, x: x, jnp.ones(2), params=params)
    assert "a: " in str(caught.value) and "b: " in str(caught.value)


def test_arguments_that_are_none_are_named() -> None:
    with pytest.raises(ConfigError, match="x/name: expected an array"):
        to_onnx(lambda x: x["v"], {"v": jnp.ones(2), "name": "text"})


def test_a_file_beside_the_arrays(tmp_path) -> None:
    weights = {"big": jnp.arange(3000.0), "small": jnp.ones(3)}

    def total(p, x):
        return x * p["big"].sum() + p["small"].sum()

    path = tmp_path / "model.onnx"
    model = to_onnx(total, jnp.ones(2), params=weights, path=path, external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert len(model.graph.initializer[0].raw_data) == 12_000
    kept = onnx.load(path, load_external_data=False)
    [moved] = [t for t in kept.graph.initializer if t.external_data]
    assert moved.name == "big" and not moved.raw_data
    assert {e.key: e.value for e in moved.external_data}["location"] == "model.onnx.data"
    onnx.checker.check_model(path, full_check=True)
    [want] = run(model, jnp.ones(2))
    [got] = ort.InferenceSession(path).run(None, {"x": np.ones(2, np.float32)})
    assert (got == want).all()
    back, params = from_onnx(path)
    assert (params["big"] == weights["big"]).all()
    assert jnp.allclose(back.apply(params, jnp.ones(2)), want)


def test_more_than_a_file_holds_goes_beside_it(tmp_path, monkeypatch) -> None:
    from fnml.interop.onnx import _write

    monkeypatch.setattr(_write, "_MOST_BYTES", 5000)
    weights = {"w": jnp.arange(3000.0)}
    path = tmp_path / "model.onnx"
    with pytest.raises(DataError, match="external_data"):
        to_onnx(
            lambda p, x: x * p["w"], jnp.ones(1), params=weights, path=path, external_data=False
        )
    assert not list(tmp_path.iterdir())
    to_onnx(lambda p, x: x * p["w"], jnp.ones(1), params=weights, path=path)
    assert (tmp_path / "model.onnx.data").stat().st_size == 12_000


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    from fnml.interop.onnx import _write

    path = tmp_path / "model.onnx"
    to_onnx(jnp.tanh, jnp.ones(2), path=path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(_write, "_moved_out", full)
    with pytest.raises(OSError, match="full"):
        to_onnx(jnp.exp, jnp.ones(2), path=path, external_data=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_large_constant_of_the_function_is_no_parameter() -> None:
    table = jnp.arange(2000.0)
    model = same(lambda p, x: x * p["w"] + table, jnp.ones(2000), params={"w": jnp.ones(2000)})
    assert leaf_names(from_onnx(model)[1]) == ["w"]
