import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from one_op import in_importer, one_op, same

from fnml.core import ConfigError
from fnml.interop.onnx import from_onnx

T, B, I, H = 4, 3, 2, 3
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
STATES = {"RNN": 1, "GRU": 1, "LSTM": 2}
ACTIVATIONS = {"RNN": 1, "GRU": 2, "LSTM": 3}


def arrays(op, directions, seed=0, **present):
    """Return the operator's inputs, those that are not present as None."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.uniform(-1, 1, shape).astype(np.float32)
    gates = GATES[op] * H
    optional = {
        "bias": draw(directions, 2 * gates),
        "lengths": np.array([T, 1, 2], np.int32),
        "hidden": draw(directions, B, H),
        "cell": draw(directions, B, H),
        "peepholes": draw(directions, 3 * H),
    }
    tail = [optional[name] if present.get(name) else None for name in optional]
    tail = tail if op == "LSTM" else tail[:3]
    return [draw(T, B, I), draw(directions, gates, I), draw(directions, gates, H), *tail]


@st.composite
def layers(draw):
    op = draw(st.sampled_from(sorted(GATES)))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    directions = 2 if direction == "bidirectional" else 1
    names = ("bias", "lengths", "hidden", "cell", "peepholes")
    present = {name: draw(st.booleans()) for name in names}
    # onnxruntime wants both states or none, and clips from the second use of a value on.
    present["cell"] = present["hidden"]
    attributes = {"hidden_size": H, "direction": direction}
    if draw(st.booleans()):
        attributes["clip"] = 0.4
    if op == "GRU":
        attributes["linear_before_reset"] = draw(st.integers(0, 1))
    if op == "LSTM":
        attributes["input_forget"] = draw(st.integers(0, 1))
    if draw(st.booleans()):
        kinds = st.sampled_from(["Sigmoid", "Tanh", "Relu", "Softsign", "HardSigmoid", "Softplus"])
        count = ACTIVATIONS[op] * directions
        attributes["activations"] = draw(st.lists(kinds, min_size=count, max_size=count))
    return op, directions, present, attributes


@given(layers(), st.integers(0, 2**16))
@settings(max_examples=10)
def test_layers_equal_onnxruntime(layer, seed):
    op, directions, present, attributes = layer
    inputs = arrays(op, directions, seed, **present)
    same(op, inputs, [np.float32] * (1 + STATES[op]), opset=14, rtol=1e-4, atol=1e-5, **attributes)


@pytest.mark.parametrize("op", ["RNN", "LSTM"])
def test_batch_first_layout_is_the_other_one_transposed(op):
    inputs = arrays(op, 2, bias=True, lengths=True, hidden=True, cell=True)
    attributes = {"hidden_size": H, "direction": "bidirectional"}
    outputs = [np.float32] * (1 + STATES[op])
    time_first = in_importer(one_op(op, inputs, outputs, **attributes), inputs)
    swapped = [
        x.swapaxes(0, 1) if x is not None and i in (0, 5, 6) else x for i, x in enumerate(inputs)
    ]
    batch_first = in_importer(one_op(op, swapped, outputs, layout=1, **attributes), swapped)
    # [T, D, B, H] and [B, T, D, H]; the states are [D, B, H] and [B, D, H].
    np.testing.assert_array_equal(batch_first[0], time_first[0].transpose(2, 0, 1, 3))
    for ours, theirs in zip(batch_first[1:], time_first[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs.swapaxes(0, 1))


def test_alpha_and_beta_go_to_the_activations_that_take_them():
    inputs = arrays("LSTM", 1, bias=True)
    same(
        "LSTM",
        inputs,
        [np.float32] * 3,
        rtol=1e-4,
        atol=1e-5,
        hidden_size=H,
        activations=["HardSigmoid", "LeakyRelu", "ScaledTanh"],
        activation_alpha=[0.3, 0.2, 0.7],
        activation_beta=[0.4, 1.1],
    )


def test_lstm_gradient():
    inputs = arrays("LSTM", 1, bias=True, lengths=True)
    inputs = [x.astype(np.float64) if x is not None and x.dtype.kind == "f" else x for x in inputs]
    with jax.enable_x64(True):
        imported, params = from_onnx(one_op("LSTM", inputs, [np.float64], hidden_size=H))
        run = jax.jit(lambda *xs: imported.apply(params, *xs, inputs[4]))
        check_grads(run, [jnp.asarray(x) for x in inputs[:4]], order=1, modes=["rev"])


def test_an_unknown_activation_is_refused_by_name():
    inputs = arrays("RNN", 1)
    with pytest.raises(ConfigError, match=r"node 'node' .RNN.: no activation 'Sigmoyd'.*'sigmoid'"):
        in_importer(one_op("RNN", inputs, hidden_size=H, activations=["Sigmoyd"]), inputs)
