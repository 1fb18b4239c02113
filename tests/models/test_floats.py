"""Integers are refused where weights would be rounded to them."""

import jax
import jax.numpy as jnp
import pytest

from fnml.core import ShapeError, init
from fnml.models import CNNConfig, MLPConfig, cnn, mlp


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool])
def test_models_refuse_integer_images(dtype) -> None:
    images = jnp.ones((2, 4, 4, 1), dtype)
    perceptron = mlp(MLPConfig(inputs=16, hidden=(4,), outputs=3))
    with pytest.raises(ShapeError, match=f"linear got x of {jnp.dtype(dtype)}.*astype"):
        perceptron.apply(init(perceptron.spec, jax.random.key(0)), images)
    network = cnn(CNNConfig(classes=3, widths=(4,)))
    params, state = (init(tree, jax.random.key(0)) for tree in (network.spec, network.state))
    with pytest.raises(ShapeError, match=f"conv2d got x of {jnp.dtype(dtype)}.*astype"):
        network.apply(params, images, state=state, train=False)
