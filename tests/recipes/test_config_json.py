"""Configurations as JSON: nothing changes on the way, and nothing wrong gets in."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnml.core import ConfigError
from fnml.models import CNNConfig, GPTConfig, MLPConfig
from fnml.recipes import FLAT, Output, RunConfig, SampleConfig, find_recipe, from_json, to_json
from fnml.recipes._digits import DigitsConfig
from fnml.recipes._finetune import FinetuneConfig
from fnml.recipes._lm import LmConfig
from fnml.train import OptimizerConfig

positive = st.integers(1, 10**6)
share = st.floats(0, 1, exclude_max=True)
rate = st.floats(1e-300, 1e300)

runs = st.builds(
    lambda size, accumulate, **fields: RunConfig(
        batch_size=size * accumulate, accumulate=accumulate, **fields
    ),
    size=st.integers(1, 64),
    accumulate=st.integers(1, 8),
    steps=positive,
    seed=st.integers(0, 2**63 - 1),
    remat=st.sampled_from(["off", "nothing", "dots", "dots_no_batch", "everything"]),
    save_minutes=rate,
    keep_best=st.integers(0, 9),
    patience=st.integers(0, 9),
)
optimizers = st.builds(
    OptimizerConfig,
    name=st.sampled_from(["adamw", "adam", "sgd"]),
    learning_rate=rate,
    final_fraction=share,
    weight_decay=st.floats(0, 1e10),
    decay=st.lists(st.text(), max_size=3).map(tuple),
    b2=share,
)
recipes = {
    "digits": st.builds(
        DigitsConfig,
        run=runs,
        optimizer=optimizers,
        network=st.sampled_from(["cnn", "mlp"]),
        cnn=st.builds(
            CNNConfig,
            classes=st.just(10),
            widths=st.lists(positive, min_size=1, max_size=3).map(tuple),
            dropout=share,
        ),
        mlp=st.builds(
            MLPConfig,
            inputs=st.just(64),
            outputs=st.just(10),
            hidden=st.lists(positive, max_size=3).map(tuple),
        ),
        shift=st.integers(0, 3),
        label_smoothing=share,
    ),
    "lm": st.builds(
        LmConfig,
        run=runs,
        optimizer=optimizers,
        model=st.builds(
            GPTConfig,
            vocab=st.integers(257, 10**6),
            width=st.sampled_from([32, 64]),
            heads=st.sampled_from([1, 4]),
            kv_heads=st.sampled_from([None, 1]),
            tied=st.booleans(),
            dtype=st.sampled_from([None, "float32", "bfloat16"]),
            rope_base=st.floats(1.5, 1e6),
        ),
        text=st.lists(st.text(), max_size=3).map(tuple),
        tokens=st.just("bpe"),
    ),
    "finetune": st.builds(
        FinetuneConfig,
        run=runs,
        optimizer=optimizers,
        onnx=st.text(),
        data=st.text(),
        loss=st.sampled_from(["cross_entropy", "mse"]),
        lora=positive,
        quantize=st.sampled_from([0, 4, 8]),
        targets=st.lists(st.text(), max_size=3).map(tuple),
    ),
}


@pytest.mark.parametrize("name", recipes)
@given(data=st.data())
def test_a_recipes_configuration_survives_json(name, data):
    config = data.draw(recipes[name])
    text = json.dumps(to_json(config), allow_nan=False)
    assert from_json(type(config), json.loads(text)) == config


@pytest.mark.parametrize("name", recipes)
def test_every_field_is_written_and_defaults_fill_what_is_absent(name):
    cls = find_recipe(name).config
    assert set(to_json(cls())) == {field.name for field in dataclasses.fields(cls)}
    assert from_json(cls, {}) == cls()


@given(
    st.builds(
        Output,
        sinks=st.lists(st.text()).map(tuple),
        prometheus_port=st.integers(0, 65535),
        quiet=st.booleans(),
    )
)
def test_output_survives_json(output):
    assert from_json(Output, json.loads(json.dumps(to_json(output)))) == output


@dataclass(frozen=True)
class Inner:
    count: int = 1
    pair: tuple[int, str] = (1, "a")


@dataclass(frozen=True)
class Outer:
    inner: Annotated[Inner, FLAT] = Inner()
    many: tuple[float, ...] = ()
    maybe: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    nested: tuple[Inner, ...] = ()
    on: bool = False
    hidden: int = field(default=3, init=False)


def test_nested_values_come_back_in_their_own_types():
    data = {
        "inner": {"count": 2, "pair": [3, "b"]},
        "many": [1, 2.5],
        "maybe": 7,
        "mode": "slow",
        "nested": [{}, {"count": 5}],
        "on": True,
    }
    value = from_json(Outer, data)
    assert value == Outer(Inner(2, (3, "b")), (1.0, 2.5), 7, "slow", (Inner(), Inner(5)), True)
    assert [type(x) for x in value.many] == [float, float]
    assert from_json(Outer, {"maybe": None}).maybe is None


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ({"inner": {"count": "2"}}, "inner/count: expected int, got '2'"),
        ({"inner": {"count": True}}, "inner/count: expected int, got True"),
        ({"inner": {"count": 2.0}}, "inner/count: expected int, got 2.0"),
        ({"inner": {"count": None}}, "inner/count: expected int, got None"),
        ({"inner": []}, "inner: expected an object, got []"),
        ({"inner": {"pair": [1, 2]}}, "inner/pair/1: expected str, got 2"),
        ({"inner": {"pair": [1]}}, "inner/pair: expected tuple[int, str], got [1]"),
        ({"many": [1, "x"]}, "many/1: expected float, got 'x'"),
        ({"many": [True]}, "many/0: expected float, got True"),
        ({"many": "12"}, "many: expected tuple[float, ...], got '12'"),
        ({"many": [10**400]}, "many/0: expected float, got 1000"),
        ({"many": [math.nan]}, "many/0: expected float, got nan"),
        ({"maybe": "no"}, "maybe: expected int | None, got 'no'"),
        ({"mode": "quick"}, "mode: expected typing.Literal['fast', 'slow'], got 'quick'"),
        ({"mode": ["fast"]}, "mode: expected typing.Literal['fast', 'slow'], got ['fast']"),
        ({"nested": [{}, {"count": []}]}, "nested/1/count: expected int, got []"),
        ({"on": 1}, "on: expected bool, got 1"),
        ({"hidden": 4}, "hidden: no such field."),
        ({"mdoe": "fast"}, "mdoe: no such field. Did you mean 'mode'?"),
        ({"inner": {"cuont": 1}}, "inner/cuont: no such field. Did you mean 'count'?"),
        ([], "value: expected an object, got []"),
        (None, "value: expected an object, got None"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(data, fault):
    with pytest.raises(ConfigError) as caught:
        from_json(Outer, data)
    assert fault in str(caught.value)


def test_all_faults_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        from_json(Outer, {"inner": {"count": "2", "x": 1}, "on": 3, "zzz": 0, "many": [[]]})
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0] for line in sorted(lines)] == [
        "inner/count",
        "inner/x",
        "many/0",
        "on",
        "zzz",
    ]


@pytest.mark.parametrize("name", recipes)
def test_what_a_configuration_itself_refuses_keeps_its_path(name):
    with pytest.raises(ConfigError, match=r"run: steps=0: expected at least 1; log_every=-1"):
        from_json(find_recipe(name).config, {"run": {"steps": 0, "log_every": -1}})


def test_numbers_that_json_has_no_word_for_are_refused_by_path():
    config = DigitsConfig(
        run=RunConfig(save_minutes=math.inf), optimizer=OptimizerConfig(learning_rate=math.inf)
    )
    with pytest.raises(ConfigError) as caught:
        to_json(config)
    assert "run/save_minutes: expected a finite number, got inf" in str(caught.value)
    assert "optimizer/learning_rate: expected a finite number, got inf" in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "fields", "faults"),
    [
        (
            RunConfig,
            {"steps": 2**31, "fuse": -1, "seed": -1},
            ["steps=2147483648: expected at most 2147483647", "fuse=-1", "seed=-1"],
        ),
        (RunConfig, {"batch_size": 10, "accumulate": 3}, ["accumulate=3: expected a divisor of b"]),
        (RunConfig, {"save_minutes": math.nan}, ["save_minutes=nan: expected more than 0"]),
        (SampleConfig, {"length": 0, "seed": -1}, ["length=0: expected", "seed=-1: expected"]),
        (SampleConfig, {"temperature": math.nan, "top_k": -1}, ["temperature=nan", "top_k=-1"]),
        (Output, {"prometheus_port": 65536}, ["prometheus_port=65536: expected 0 to 65535"]),
        (DigitsConfig, {"shift": 4, "label_smoothing": 1.0}, ["shift=4", "label_smoothing=1.0"]),
        (
            DigitsConfig,
            {"cnn": CNNConfig(classes=5), "mlp": MLPConfig(inputs=63, hidden=(), outputs=9)},
            ["cnn.classes=5: expected 10", "mlp.inputs=63: expected 64", "mlp.outputs=9"],
        ),
        (LmConfig, {"model": GPTConfig(vocab=300)}, ["vocab=300", "use --tokens bpe"]),
    ],
)
def test_configurations_list_every_value_out_of_range(cls, fields, faults):
    with pytest.raises(ConfigError) as caught:
        cls(**fields)
    assert [fault for fault in faults if fault not in str(caught.value)] == []
