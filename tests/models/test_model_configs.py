import dataclasses

import jax.numpy as jnp
import pytest

from fnml.core import ConfigError, ShapeError
from fnml.models import CNNConfig, EncoderConfig, GPTConfig, MLPConfig, cnn, gpt, mlp


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (MLPConfig, {"inputs": 0, "outputs": 2}, "inputs=0: expected 1 or more"),
        (MLPConfig, {"inputs": 1, "outputs": 2, "hidden": (3, 0)}, r"hidden=\(3, 0\): expected 1"),
        (MLPConfig, {"inputs": 1, "outputs": 2, "activation": "rel"}, "Did you mean 'relu'?"),
        (MLPConfig, {"inputs": 1, "outputs": 2, "dropout": 1.0}, r"dropout=1.0: .* below 1"),
        (CNNConfig, {"classes": 0}, "classes=0: expected 1 or more"),
        (CNNConfig, {"classes": 2, "widths": ()}, "at least one stage"),
        (CNNConfig, {"classes": 2, "dropout": -0.1}, "dropout=-0.1"),
        (GPTConfig, {"width": 128, "heads": 5}, "heads=5 does not divide width=128: expected"),
        (GPTConfig, {"width": 12, "heads": 4}, "heads of width 3: expected an even one"),
        (GPTConfig, {"heads": 4, "kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        (GPTConfig, {"kv_heads": 0}, "kv_heads=0: expected 1 or more"),
        (GPTConfig, {"dtype": "bfloat"}, "dtype='bfloat': expected .* Did you mean 'bfloat16'?"),
        (GPTConfig, {"rope_base": 0.0}, "rope_base=0.0: expected more than 1"),
        (GPTConfig, {"unroll": 0}, "unroll=0: expected 1 or more"),
        (EncoderConfig, {"width": 10, "heads": 4}, "heads=4 does not divide width=10"),
        (EncoderConfig, {"types": -1}, "types=-1: expected 0 or more"),
        (EncoderConfig, {"eps": 0.0}, "eps=0.0: expected more than 0"),
        (EncoderConfig, {"dtype": "float16"}, "dtype='float16': expected"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(config, fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        config(**fields)
    assert str(error.value).startswith(config.__name__)


def test_all_faults_come_in_one_error():
    with pytest.raises(ConfigError) as error:
        GPTConfig(vocab=0, dropout=2.0, dtype="int8")
    assert all(field in str(error.value) for field in ("vocab=0", "dropout=2.0", "dtype='int8'"))


@pytest.mark.parametrize("config", [MLPConfig, CNNConfig, GPTConfig, EncoderConfig])
def test_configs_are_frozen_and_hashable(config):
    needed = {MLPConfig: {"inputs": 2, "outputs": 2}, CNNConfig: {"classes": 2}}.get(config, {})
    one = config(**needed)
    assert hash(one) == hash(config(**needed))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.dropout = 0.5


def test_defaults_follow_width_and_heads():
    config = GPTConfig(width=128, heads=4)
    assert (config.groups, config.head_width, config.hidden) == (4, 32, 352)
    assert GPTConfig(width=96, heads=4).hidden == 256


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"flattens to \[B, 4\]"):
        mlp(MLPConfig(inputs=4, outputs=2)).apply({}, jnp.ones((2, 5)))
    with pytest.raises(ShapeError, match=r"expected \[B, H, W, 1\]"):
        cnn(CNNConfig(classes=2)).apply({}, jnp.ones((2, 5, 5)), state={}, train=True)
    with pytest.raises(ShapeError, match="context=4"):
        gpt(GPTConfig(context=4)).apply({}, jnp.ones((2, 5), jnp.int32))
