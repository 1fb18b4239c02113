"""Sets of rules for the zoo, and how they join."""

import jax
import pytest

from fnml.core import ConfigError, LayoutError, make_mesh, shardings
from fnml.models import CNNConfig, GPTConfig, MLPConfig, cnn, gpt, mlp
from fnml.parallel import DATA, EXPERT, FSDP, TENSOR, combine, parse_rules

GPT = gpt(GPTConfig(vocab=32, width=16, layers=2, heads=4, kv_heads=2, context=8, experts=4))


def specs(rules, **axes):
    placed = shardings(GPT.spec, make_mesh(axes), rules)
    return jax.tree.map(lambda where: tuple(where.spec), placed)


def test_fsdp_divides_every_parameter_of_the_models_width():
    placed = jax.tree.leaves(shardings(GPT.spec, make_mesh({"data": 8}), FSDP))
    for param, where in zip(jax.tree.leaves(GPT.spec), placed, strict=True):
        assert where.shard_shape(param.shape) == tuple(
            size // 8 if name == "embed" else size
            for name, size in zip(param.axes, param.shape, strict=True)
        )


def test_tensor_and_fsdp_divide_different_dimensions_of_one_parameter():
    placed = specs(combine(FSDP, TENSOR), data=4, model=2)
    assert placed["embed"]["table"] == ("model", "data")
    assert placed["layers"]["attention"]["key"] == (None, "data", "model", None)
    assert placed["layers"]["mlp"]["down"] == (None, None, "model", "data")
    assert placed["norm"]["scale"] == ("data",)


def test_expert_divides_experts_alone():
    placed = specs(EXPERT, data=2, expert=4)
    assert placed["layers"]["mlp"]["up"] == (None, "expert", None, None)
    assert placed["layers"]["mlp"]["router"] == (None, None, None)
    assert not any(jax.tree.leaves(specs(DATA, data=8)))


def test_every_model_of_the_zoo_has_a_place_under_every_set():
    zoo = [GPT, mlp(MLPConfig(inputs=64, hidden=(32, 32), outputs=10)), cnn(CNNConfig(classes=10))]
    mesh = make_mesh({"data": 2, "model": 2, "expert": 2})
    for model in zoo:
        for rules in (DATA, FSDP, TENSOR, EXPERT, combine(FSDP, TENSOR, EXPERT)):
            shardings(model.spec, mesh, rules)


def test_equal_rules_join_and_different_ones_are_refused_by_name():
    assert dict(combine(FSDP, FSDP, {"a": ["x", "y"]})) == {"embed": "data", "a": ("x", "y")}
    with pytest.raises(LayoutError) as error:
        combine(TENSOR, {"mlp": "data", "vocab": "data"})
    for words in ("'mlp'", "'vocab'", "('model',) and along ('data',)"):
        assert words in str(error.value)


def test_rules_are_read_from_text():
    assert parse_rules("") == parse_rules("data") == {}
    assert parse_rules("fsdp + tensor") == combine(FSDP, TENSOR)
    with pytest.raises(ConfigError, match=r"'tensr'\. Did you mean 'tensor'"):
        parse_rules("fsdp+tensr")
