import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from one_op import in_importer, one_op, same

from fnml.interop.onnx import from_onnx

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(3, 4, 2)).astype(np.float32)
LABELS = np.array([[0, 3], [1, -1], [2, 2]], np.int64)
WEIGHT = RNG.uniform(0.5, 2, size=4).astype(np.float32)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_losses_equal_onnxruntime(weight, reduction):
    options = {"reduction": reduction, "ignore_index": -1}
    inputs = [SCORES, LABELS, weight]
    same("SoftmaxCrossEntropyLoss", inputs, [np.float32] * 2, 13, **options)
    same("NegativeLogLikelihoodLoss", inputs, [np.float32], 13, **options)


def test_loss_gradient_leaves_ignored_labels_out():
    with jax.enable_x64(True):
        scores, weight = SCORES.astype(np.float64), WEIGHT.astype(np.float64)
        model = one_op(
            "SoftmaxCrossEntropyLoss", [scores, LABELS, weight], [np.float64], 13, ignore_index=-1
        )
        imported, params = from_onnx(model)
        run = jax.jit(lambda s, w: imported.apply(params, s, LABELS, w))
        check_grads(run, [jnp.asarray(scores), jnp.asarray(weight)], 1, modes=["rev"])
        assert not np.asarray(jax.grad(run)(scores, weight))[1, :, 1].any()


def step(op, count, *tensors, **attributes):
    inputs = [np.asarray(0.1, np.float32), np.asarray(count, np.int64), *tensors]
    outputs = [np.float32] * (len(tensors) * 2 // 3 if op != "Adam" else 3)
    model = one_op(op, inputs, outputs, 1, "ai.onnx.preview.training", **attributes)
    return in_importer(model, inputs)


def test_adam_is_that_of_optax():
    x, grads = (RNG.normal(size=(2, 3)).astype(np.float32) for _ in range(2))
    # Optax adds epsilon to the corrected root, ONNX to the raw one: none here.
    adam = optax.adam(0.1, b1=0.9, b2=0.99, eps=0.0)
    state, ours, mean, square = adam.init(x), x, np.zeros_like(x), np.zeros_like(x)
    theirs = x
    for count in range(1, 4):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(jnp.asarray(grads), state)
        theirs = optax.apply_updates(theirs, updates)
        ours, mean, square = (
            np.asarray(y)
            for y in step(
                "Adam", count, ours, grads, mean, square, alpha=0.9, beta=0.99, epsilon=0.0
            )
        )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_optax(nesterov):
    x, grads = (RNG.normal(size=3).astype(np.float32) for _ in range(2))
    sgd = optax.sgd(0.1, momentum=0.8, nesterov=nesterov)
    state, ours, theirs, velocity = sgd.init(jnp.asarray(x)), x, x, np.zeros_like(x)
    options = {"mode": "nesterov" if nesterov else "standard", "norm_coefficient": 0.0}
    for count in range(3):
        updates, state = sgd.update(jnp.asarray(grads), state)
        theirs = optax.apply_updates(theirs, updates)
        ours, velocity = (
            np.asarray(y)
            for y in step("Momentum", count, ours, grads, velocity, alpha=0.8, beta=1.0, **options)
        )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_optimizers_take_several_tensors_at_once():
    tensors = [RNG.normal(size=(n,)).astype(np.float32) for n in (2, 3)]
    squares = [np.abs(t) for t in tensors]
    options = {"decay_factor": 0.5, "epsilon": 1e-6, "norm_coefficient": 0.1}
    together = step("Adagrad", 2, *tensors, *tensors, *squares, **options)
    for i, (x, s) in enumerate(zip(tensors, squares, strict=True)):
        grads = 1.1 * x
        square = s + grads**2
        np.testing.assert_allclose(together[2 + i], square, rtol=1e-5)
        expected = x - 0.05 * grads / (np.sqrt(square) + 1e-6)
        np.testing.assert_allclose(together[i], expected, rtol=1e-5)
