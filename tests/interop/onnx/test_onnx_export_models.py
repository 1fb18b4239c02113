"""The zoo, its gradients and whole train steps: exported, run, and imported again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import assert_near, check, host, ops, run, same
from onnx import TensorProto, helper, numpy_helper

from fnml.core import init
from fnml.interop.onnx import from_onnx, to_onnx
from fnml.models import (
    CNNConfig,
    EncoderConfig,
    GPTConfig,
    MLPConfig,
    cnn,
    encoder,
    gpt,
    gpt_cache,
    gpt_decode,
    mlp,
    moe,
)
from fnml.recipes import find_recipe, from_json
from fnml.recipes._training import initial_state, make_step

KEY = jax.random.key(0)
GPT = GPTConfig(vocab=11, width=8, layers=2, heads=2, kv_heads=1, context=16)
TOKENS = jax.random.randint(KEY, (2, 5), 0, 11)


def gradient(apply):
    """Return the gradient of a loss of a model's first output."""

    def loss(params, *inputs):
        logits = apply(params, *inputs)
        return (jax.nn.log_softmax(logits) ** 2).mean()

    return jax.grad(loss)


def test_mlp_and_its_gradient() -> None:
    model = mlp(MLPConfig(inputs=6, hidden=(8,), outputs=3))
    params, x = init(model.spec, KEY), jax.random.normal(KEY, (4, 6))
    file = same(model.apply, x, params=params, dynamic={"x": "B, _"})
    assert file.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "B"
    same(gradient(model.apply), x, params=params)


def test_cnn_with_batch_norm_and_its_gradient() -> None:
    model = cnn(CNNConfig(classes=3, widths=(2, 4), pool=2))
    params, state = init(model.spec, KEY), init(model.state, KEY)
    x = jax.random.normal(KEY, (2, 8, 8, 1))

    def train(params, x, state):
        return model.apply(params, x, state=state, train=True)

    def infer(params, x, state):
        return model.apply(params, x, state=state, train=False)[0]

    same(train, x, state, params=params, importer=False)
    same(infer, x, state, params=params, dynamic={"x": "B, ..."})
    same(gradient(infer), x, state, params=params, importer=False)


def test_cnn_of_plain_convolutions_trains_in_onnxruntime() -> None:
    """Convolution, max pooling and both gradients in one step."""

    def loss(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jax.lax.reduce_window(
            jax.nn.relu(y), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
        return (y.reshape(y.shape[0], -1) ** 2).mean()

    def step(params, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))

    params = {"w": jax.random.normal(KEY, (3, 3, 1, 4))}
    same(step, jax.random.normal(KEY, (2, 8, 8, 1)), params=params)


def test_gpt_and_its_gradient() -> None:
    model = gpt(GPT)
    params = init(model.spec, KEY)
    file = same(model.apply, TOKENS, params=params)
    assert ops(file).count("Scan") == 1
    same(gradient(model.apply), TOKENS, params=params)
    assert "Scan" not in ops(same(model.apply, TOKENS, params=params, unroll=2, importer=False))


def test_encoder_with_padding() -> None:
    model = encoder(EncoderConfig(vocab=11, width=8, layers=2, heads=2, context=16, types=2))
    lengths = jnp.array([TOKENS.shape[1], 3])

    def apply(params, tokens):
        there = jnp.arange(tokens.shape[1])[None, :, None] < lengths[:, None, None]
        return jnp.where(there, model.apply(params, tokens, lengths=lengths), 0.0)

    same(apply, TOKENS, params=init(model.spec, KEY))


def test_gpt_in_bfloat16() -> None:
    model = gpt(GPTConfig(vocab=11, width=8, layers=1, heads=2, context=16, dtype="bfloat16"))
    # bfloat16 keeps 8 bits, and the libraries round sums at different places.
    same(model.apply, TOKENS, params=init(model.spec, KEY), tolerance=2e-2)


def test_gpt_of_symbolic_batch_and_length() -> None:
    model = gpt(GPT)
    params = init(model.spec, KEY)
    options = {"dynamic": "B, T", "constraints": (f"T <= {GPT.context}",)}
    file = check(to_onnx(model, TOKENS, params=params, **options))
    same(gradient(model.apply), TOKENS, params=params, importer=False, **options)
    for shape in ((2, 5), (1, 16), (3, 2)):
        tokens = jax.random.randint(KEY, shape, 0, GPT.vocab)
        [got] = run(file, tokens)
        assert_near(got, np.asarray(model.apply(params, tokens)), 1e-5, str(shape))


def test_an_imported_gpt_is_exported_again_with_open_sizes() -> None:
    model = gpt(GPT)
    options = {"dynamic": "B, T", "constraints": (f"T <= {GPT.context}",)}
    file = to_onnx(model, TOKENS, params=init(model.spec, KEY), **options)
    imported, params = from_onnx(file)
    again = check(to_onnx(imported, TOKENS, params=params, **options))
    for shape in ((5, 7), (1, 16)):
        tokens = jax.random.randint(KEY, shape, 0, GPT.vocab)
        [got], [expected] = run(again, tokens), run(file, tokens)
        assert_near(got, expected, 1e-5, str(shape))


def test_shape_arithmetic_of_a_file_stays_symbolic() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Gather", ["shape", "one"], ["columns"]),
        helper.make_node("Div", ["columns", "two"], ["half"]),  # known, beside what is not
        helper.make_node("Mul", ["rows", "two"], ["twice"]),
        helper.make_node("Concat", ["twice", "half"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["r"]),
        helper.make_node("Slice", ["r", "one", "far", "zero"], ["s"]),
        helper.make_node("Cast", ["rows"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "count"], ["y"]),
    ]
    numbers = {"zero": 0, "one": 1, "two": 2, "far": 2**63 - 1}
    own = [numpy_helper.from_array(np.array([v], np.int64), k) for k, v in numbers.items()]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
        for name, width in (("x", 6), ("y", 3))
    ]
    graph = helper.make_graph(nodes, "shapes", ports[:1], ports[1:], own)
    imported, params = from_onnx(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )
    file = check(to_onnx(imported, np.ones((2, 6), np.float32), params=params, dynamic="B, _"))
    for rows in (1, 4):
        x = np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32)
        [got] = run(file, x)
        np.testing.assert_allclose(got, x.reshape(2 * rows, 3)[1:] * rows, rtol=1e-6)


def test_gpt_decodes_with_its_cache() -> None:
    decode = gpt_decode(GPT)
    params, cache = init(gpt(GPT).spec, KEY), gpt_cache(GPT, 2, 16)
    _, cache = decode(params, cache, TOKENS, 0)
    file = same(decode, cache, TOKENS[:, :1], jnp.int32(5), params=params)
    names = [port.name for port in file.graph.input]
    assert names == ["cache/key", "cache/value", "tokens", "position"]


def test_dropout_is_that_of_jax() -> None:
    model = mlp(MLPConfig(inputs=6, hidden=(8,), outputs=3, dropout=0.5))
    params, x = init(model.spec, KEY), jax.random.normal(KEY, (4, 6))
    same(lambda params, x, key: model.apply(params, x, key=key), x, KEY, params=params)


def test_the_digits_train_step() -> None:
    """A whole step of the recipe: loss, gradient, clipping, AdamW, counters and metrics."""
    recipe = find_recipe("digits")
    settings = {
        "network": "mlp",
        "mlp": {"inputs": 64, "hidden": [8], "outputs": 10},
        "run": {"steps": 6, "batch_size": 16},
    }
    config = from_json(recipe.config, settings)
    task = recipe.build(config, None)
    step, state = make_step(task, config), initial_state(task, config)
    file = check(to_onnx(step, state, task.train.at(0)))
    # Three steps in a row, each from the state before: the file trains.
    ours, theirs = state, host(state)
    for number in range(3):
        batch = task.train.at(16 * number)
        ours, metrics = jax.jit(step)(ours, batch)
        theirs = run(file, theirs, batch)
        expected = host((ours, metrics))
        for port, got, want in zip(file.graph.output, theirs, expected, strict=True):
            # AdamW's first updates are signs of gradients: their last digits decide nothing else.
            assert_near(got, want, 1e-4, port.name)
        theirs = theirs[: len(host(ours))]


def test_experts_and_their_gradient() -> None:
    sizes = {"router": (3, 4), "gate": (4, 3, 5), "up": (4, 3, 5), "down": (4, 5, 3)}
    params = {
        name: jax.random.normal(jax.random.fold_in(KEY, i), shape)
        for i, (name, shape) in enumerate(sizes.items())
    }
    x = jax.random.normal(KEY, (2, 7, 3))
    same(lambda params, x: moe(x, params), x, params=params)
    loss = jax.grad(lambda params, x: (moe(x, params)[0] ** 2).sum())
    same(loss, x, params=params, importer=False)


@pytest.mark.parametrize("opset", [18, 23])
def test_gpt_in_other_opsets(opset: int) -> None:
    model = gpt(GPT)
    same(model.apply, TOKENS, params=init(model.spec, KEY), opset=opset, importer=False)
