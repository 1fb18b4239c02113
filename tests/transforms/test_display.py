"""Arrays and tables are shown within limits, and give what sinks and pictures take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import ConfigError, Param, Row, init
from fnml.sinks import Jsonl
from fnml.transforms import (
    capture,
    format_array,
    histogram_values,
    param_rows,
    param_table,
    plot_histograms,
    show,
)

SPEC = {
    "w": Param((2, 3), ("embed", None), jax.nn.initializers.normal(1.0)),
    "b": Param((3,), ("mlp",), jax.nn.initializers.zeros, jnp.bfloat16),
}


def layers(x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x), jnp.tanh(x)), x, None, length=2)[1]


def test_a_large_array_takes_one_short_line():
    text = format_array(np.arange(1e6, dtype=np.float32), 5)
    assert text.endswith(": 0, 1, 2, 3, 4, ...") and len(text) < 100
    assert format_array(np.array([1.0, np.nan, np.inf]), 9).count("2 not finite") == 1
    assert format_array(jax.random.key(0), 3).startswith("key[] ")
    assert format_array(np.zeros((0, 2), np.int8), 3) == "int8[0,2]"
    assert format_array(np.array([True, False]), 1).endswith(": 1, ...")


def test_the_limit_comes_from_the_environment_only_when_printing(monkeypatch, capsys):
    monkeypatch.setenv("FNML_DISPLAY_MAX", "2")
    show({"a": jnp.arange(5), "long": jnp.ones(3)})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a     int32[5] in [0, 4], mean 2: 0, 1, ..."
    assert lines[1] == "long  float32[3] in [1, 1], mean 1: 1, 1, ..."
    show(jnp.arange(3), limit=3)
    assert capsys.readouterr().out == "int32[3] in [0, 2], mean 1: 0, 1, 2\n"
    monkeypatch.setenv("FNML_DISPLAY_MAX", "few")
    with pytest.raises(ConfigError, match="FNML_DISPLAY_MAX='few'"):
        show(1.0)


def test_parameters_of_a_spec_of_arrays_and_of_both():
    params = init(SPEC, jax.random.key(0))
    norm = float(np.linalg.norm(np.asarray(params["w"], np.float64)))
    bias, weight = param_rows(SPEC, params)
    assert (weight.path, weight.shape, weight.axes, weight.count) == (
        "w",
        (2, 3),
        ("embed", None),
        6,
    )
    assert weight.norm == pytest.approx(norm) and bias.dtype == "bfloat16" and bias.norm == 0
    assert param_rows(SPEC)[1].norm is None and param_rows(params)[1].axes == ()
    with pytest.raises(ConfigError, match="other paths"):
        param_rows(SPEC, {"w": params["w"]})
    cells = [list(column.cells) for column in param_table(SPEC).columns]
    assert cells[0] == ["b", "w", "total"] and cells[4] == ["3", "6", "9"]


def test_captured_values_become_a_row_that_sinks_take(tmp_path):
    captured = capture(layers, "**/layers", stats=True)(jnp.linspace(-1, 1, 8))[1]
    values = histogram_values(captured)
    assert values["layers/max"] == pytest.approx(np.tanh(1.0), 1e-5)
    inner = histogram_values({"h": layers(jnp.ones(4))})
    assert inner["h/nonfinite"] == 0
    sink = Jsonl(tmp_path / "rows.jsonl")
    sink.write(Row(1, "eval", values))
    sink.close()
    assert "layers/max" in (tmp_path / "rows.jsonl").read_text()


def test_a_picture_has_one_histogram_for_each_layer(tmp_path):
    def deep(x):
        return jax.lax.scan(
            lambda x, _: (jax.ad_checkpoint.checkpoint_name(jnp.tanh(x), "h"), None), x, length=3
        )[0]

    captured = capture(deep, "h", stats=True)(jnp.linspace(-1, 1, 8))[1]
    figure = plot_histograms(captured, tmp_path / "h.png")
    drawn = [axes.get_title().splitlines()[0] for axes in figure.axes if axes.get_title()]
    assert drawn == ["h/0", "h/1", "h/2"] and (tmp_path / "h.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="nothing was captured"):
        plot_histograms({})
