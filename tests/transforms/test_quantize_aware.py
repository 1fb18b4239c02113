"""quantize_aware: trained with rounding, converted without a change of one bit."""

import jax
import jax.numpy as jnp
import optax
import pytest
from adapted_models import KEY, case, same_bits

from fnml.core import ConfigError, State
from fnml.train import train_step
from fnml.transforms import adapt, merge, mixed_precision, quantize, quantize_aware

SETTINGS = [
    {"bits": 8},
    {"bits": 4, "group": 4, "zero_point": True, "targets": "layers/mlp/*"},
]


@pytest.mark.parametrize("options", SETTINGS)
def test_the_converted_model_is_the_trained_one(options):
    c = case("gpt")
    aware, stored = quantize_aware(c.model, **options), quantize(c.model, **options)
    optimizer = optax.adam(1e-2)
    step = jax.jit(train_step(jax.value_and_grad(c.loss_fn(aware), has_aux=True), optimizer))
    state = State.create(c.params, optimizer, KEY)
    for _ in range(3):
        state, _ = step(state, c.batch)
    converted = adapt(stored, state.params)
    same_bits(c.call(stored, converted, KEY), c.call(aware, state.params, KEY))
    same_bits(jax.jit(lambda p: merge(aware, p))(state.params), merge(stored, converted))


@pytest.mark.parametrize("name", ["cnn", "nnx"])
def test_it_converts_on_models_with_state_and_guests(name):
    c = case(name)
    converted = adapt(quantize(c.model, 4), c.params)
    same_bits(
        c.call(quantize(c.model, 4), converted, KEY),
        c.call(quantize_aware(c.model, 4), c.params, KEY),
    )


def test_the_gradient_passes_straight_through():
    c = case("mlp")
    aware = quantize_aware(c.model, 4)
    loss_fn = c.loss_fn(c.model)
    straight = jax.jit(jax.grad(c.loss_fn(aware), has_aux=True))(c.params, c.batch, None)[0]
    rounded = jax.jit(lambda p: merge(aware, p))(c.params)
    same_bits(straight, jax.jit(jax.grad(loss_fn, has_aux=True))(rounded, c.batch, None)[0])
    assert jnp.any(straight["head"]["kernel"] != 0)
    # The dtype follows a policy of mixed precision.
    loss, _ = jax.jit(mixed_precision(c.loss_fn(aware)))(c.params, c.batch, None)
    assert abs(float(loss) - float(loss_fn(rounded, c.batch, None)[0])) < 0.05


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="quantize_aware: bits=3"):
        quantize_aware(case("mlp").model, 3)
