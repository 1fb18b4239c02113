"""The finetune recipe: a model file goes on training, and leaves again."""

import shutil

import jax
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from run_processes import QUIET, fnml, rows, sha256

from fnml.checkpoint import tree_sha256
from fnml.core import ConfigError, DataError, NonFiniteError, ShapeError, leaf_names
from fnml.interop.onnx import from_onnx
from fnml.recipes import (
    SampleConfig,
    evaluate_onnx,
    export_onnx,
    find_recipe,
    from_json,
    load,
    replay,
    resume,
    start,
)
from fnml.recipes._training import initial_state

RUN = {"steps": 12, "batch_size": 16, "save_every": 4, "eval_every": 6, "log_every": 1}
KINDS = {"plain": {}, "factors": {"lora": 1, "quantize": 8}}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"hidden.kernel": (4, 8), "hidden.bias": (8,), "head.kernel": (8, 3), "head.bias": (3,)}
    return {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def perceptron(path, batch="batch", **changed):
    """Write 4-8-3 with an input whose name is no word of Python; return its weights."""
    arrays = {**weights(), **changed}
    nodes = [
        helper.make_node("Gemm", ["input.1", "hidden.kernel", "hidden.bias"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "head.kernel", "head.bias"], ["logits"]),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, size])
        for name, size in (("input.1", 4), ("logits", 3))
    ]
    initializers = [numpy_helper.from_array(x, name) for name, x in arrays.items()]
    graph = helper.make_graph(nodes, "perceptron", ports[:1], ports[1:], initializers)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return arrays


def examples(count=90):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(count, 4))
    return {"input.1": x, "targets": x[:, :3].argmax(1)}


def config_of(folder, **fields):
    files = {"onnx": str(folder / "model.onnx"), "data": str(folder / "data.npz")}
    run = {**RUN, **fields.pop("run", {})}
    optimizer = {"learning_rate": 0.03, "warmup": 0}
    everything = {**files, "optimizer": optimizer, "run": run, **fields}
    return from_json(find_recipe("finetune").config, everything)


def build(folder, **fields):
    config = config_of(folder, **fields)
    return find_recipe("finetune").build(config, None), config


@pytest.fixture
def folder(tmp_path):
    perceptron(tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **examples())
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of each kind; the model that they began with is gone."""
    root = tmp_path_factory.mktemp("finetune")
    perceptron(root / "model.onnx")
    np.savez(root / "data.npz", **examples())
    for kind, fields in KINDS.items():
        start("finetune", config_of(root, **fields), root / kind, QUIET)
    (root / "model.onnx").unlink()
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_with_the_files_weights_and_the_loss_falls(made, kind) -> None:
    first = replay(made / kind, 1)
    params = first.state.params if kind == "plain" else first.state.params["base"]
    for name, expected in weights().items():
        part, leaf = name.split(".")
        got = params[part][leaf]
        if kind == "factors" and leaf == "kernel":
            got = got["codes"].astype(np.float32) * got["scale"]
            # Half a step of 127 for the largest weight of a column.
            assert np.all(np.abs(got - expected) <= np.abs(expected).max(0) / 254 + 1e-6)
        else:
            np.testing.assert_array_equal(got, expected)
    losses = [values["loss"] for _, what, values in rows(made / kind) if what == "train"]
    assert losses[0] == first.metrics["loss"]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_only_factors_train_and_have_optimizer_state(made) -> None:
    before = replay(made / "factors", 1).state
    after = load(made / "factors").state
    assert tree_sha256(before.params["base"]) == tree_sha256(after.params["base"])
    factors = after.params["lora"]
    assert sorted(factors) == ["head/kernel", "hidden/kernel"]
    for old, new in zip(
        jax.tree.leaves(before.params["lora"]), jax.tree.leaves(factors), strict=True
    ):
        assert np.any(np.asarray(old) != np.asarray(new))
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(factors))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(made, tmp_path, kind) -> None:
    cut = shutil.copytree(made / kind, tmp_path / "run")
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "00000012")
    done = resume(cut, QUIET)
    assert done.result["step"] == 12
    assert sha256(cut) == sha256(made / kind)
    assert rows(cut) == rows(made / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_model_leaves_with_plain_weights(made, tmp_path, kind) -> None:
    path = tmp_path / "tuned.onnx"
    export_onnx(made / kind, path)
    loaded = load(made / kind)
    x = examples()["input.1"].astype(np.float32)[:7]
    session = ort.InferenceSession(path)
    assert [port.name for port in session.get_inputs()] == ["input_1"]
    [logits] = session.run(None, {"input_1": x})
    # With factors and codes: what the run itself computes, not what was merged for the file.
    expected = loaded.task.model.apply(loaded.state.params, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    original = weights()
    assert np.any(np.asarray(expected) != np.asarray(plain(original, x)))
    _, params = from_onnx(path)
    assert sorted(leaf_names(params)) == sorted(name.replace(".", "/") for name in original)


def plain(arrays, x):
    hidden = np.maximum(x @ arrays["hidden.kernel"] + arrays["hidden.bias"], 0)
    return hidden @ arrays["head.kernel"] + arrays["head.bias"]


def test_a_file_is_measured_as_it_is(folder) -> None:
    # More than one batch, and the last one is padded.
    data = examples(300)
    np.savez(folder / "data.npz", **data)
    logits = plain({k: x.astype(np.float64) for k, x in weights().items()}, data["input.1"])
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    metrics = evaluate_onnx(folder / "model.onnx", folder / "data.npz")
    expected = -logs[np.arange(300), data["targets"]].mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)  # float32 sums of 300
    right = (logits.argmax(1) == data["targets"]).mean()
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-6)
    targets = np.random.default_rng(2).normal(size=(300, 3))
    np.savez(folder / "data.npz", **{**data, "targets": targets})
    metrics = evaluate_onnx(folder / "model.onnx", folder / "data.npz", "mse")
    np.testing.assert_allclose(metrics["loss"], ((logits - targets) ** 2).mean(), rtol=1e-5)


def test_moving_averages_of_a_file_do_not_train(tmp_path) -> None:
    names = ["scale", "shift", "mean", "variance"]
    node = helper.make_node("BatchNormalization", ["x", *names], ["y"])
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [5, 3]) for n in "xy"]
    arrays = [numpy_helper.from_array(np.full(3, 2.0, np.float32), name) for name in names]
    graph = helper.make_graph([node], "norm", ports[:1], ports[1:], arrays)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx"
    )
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, targets=x)
    task, config = build(tmp_path, loss="mse", run={"batch_size": 10, "accumulate": 2})
    state = initial_state(task, config)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * 6
    # Five rows at once, as the file wants it: a shard of the batch, and a batch of the held-out.
    [batch] = task.held_out()
    assert batch["x"].shape == (5, 3) and batch["mask"].sum() == 2
    with pytest.raises(ConfigError, match=r"takes 5 .* gives it 10: use --batch-size 5"):
        build(tmp_path, loss="mse", run={"batch_size": 10})


def test_weights_beside_a_file_are_kept_with_the_run(folder) -> None:
    proto = onnx.load(folder / "model.onnx")
    onnx.save_model(
        proto,
        folder / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    task, _ = build(folder)
    [copy] = task.files.values()
    _, params = from_onnx(copy)
    np.testing.assert_array_equal(params["head"]["kernel"], weights()["head.kernel"])


def test_samples_say_what_is_right(made) -> None:
    loaded = load(made / "plain")
    text = loaded.task.sample(loaded.state.params, (), SampleConfig(length=3))
    assert text.count("held-out example") == 3 and text.count(", is ") == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"input.1": None, "input.2": np.zeros((90, 4)), "extra": np.zeros(90)},
            [
                "input.1: not there. Did you mean 'input.2'?",
                "input.2: the model takes no such input. Did you mean 'input.1'?",
                "extra: the model takes no such input",
            ],
        ),
        ({"targets": None}, ["targets: not there"]),
        ({"input.1": np.zeros((90, 5))}, ["input.1: expected [N, 4], got [90, 5]"]),
        ({"input.1": np.zeros(90)}, ["input.1: expected [N, 4], got [90]"]),
        ({"input.1": np.zeros((90, 4), complex)}, ["input.1: expected float32, got complex128"]),
        ({"input.1": np.zeros((80, 4))}, ["the leading lengths differ"]),
        ({"targets": np.full(90, 3)}, ["targets from 3 to 3, expected 0 to 2"]),
        ({"targets": np.full(90, -1)}, ["targets from -1 to -1, expected 0 to 2"]),
        ({"targets": np.zeros(90)}, ["targets of float64, expected class numbers"]),
        ({"targets": np.zeros((90, 3), int)}, ["targets [90, 3], expected ['N']"]),
    ],
)
def test_wrong_arrays_are_all_named(folder, changed, said) -> None:
    arrays = {name: x for name, x in {**examples(), **changed}.items() if x is not None}
    np.savez(folder / "data.npz", **arrays)
    with pytest.raises(DataError) as caught:
        build(folder)
    assert [words for words in said if words not in str(caught.value)] == []


def test_what_cannot_be_used_is_refused_in_a_sentence(folder) -> None:
    with pytest.raises(ConfigError, match="finetune needs --onnx and --data"):
        build(folder, onnx="", data="")
    with pytest.raises(DataError, match=r"nowhere\.onnx: cannot be read: No such file"):
        build(folder, onnx=str(folder / "nowhere.onnx"))
    with pytest.raises(DataError, match=r"nowhere\.npz.*No such file"):
        build(folder, data=str(folder / "nowhere.npz"))
    (folder / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.npz"):
        build(folder, data=str(folder / "text.npz"))
    with pytest.raises(ConfigError, match="targets choose what gets factors"):
        build(folder, targets=["head/*"])
    with pytest.raises(ConfigError, match="codes do not train"):
        build(folder, quantize=8)
    with pytest.raises(ConfigError, match="the glob 'haed/kernel' matches none"):
        build(folder, lora=1, targets=["haed/kernel"])
    perceptron(folder / "model.onnx", batch=8)
    with pytest.raises(ConfigError, match="takes 8 examples at once"):
        build(folder)
    start("finetune", config_of(folder, run={"batch_size": 8, "steps": 1}), folder / "run", QUIET)
    with pytest.raises(ShapeError, match=r"got float32\[B, 4\]\n.* export with --dynamic \.\.\."):
        export_onnx(folder / "run", folder / "open.onnx")
    assert not (folder / "open.onnx").exists()
    assert export_onnx(folder / "run", folder / "fixed.onnx", dynamic="...").inputs == [
        "input_1 float[8, 4]"
    ]
    perceptron(folder / "model.onnx", **{"head.kernel": np.full((8, 3), np.nan, np.float32)})
    with pytest.raises(NonFiniteError, match="head/kernel"):
        build(folder, lora=1, quantize=8)


def test_a_wrong_file_leaves_no_run(folder, capsys) -> None:
    arguments = ["--onnx", folder / "nowhere.onnx", "--data", folder / "data.npz"]
    assert fnml("train", "finetune", *arguments, "--out", folder / "run") == 1
    assert "cannot be read" in capsys.readouterr().err
    assert not (folder / "run").exists()
