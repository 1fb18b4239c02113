"""Targets as they are written, and chips as their makers describe them."""

import math

import pytest

from fnml.core import ConfigError
from fnml.plan import CHIPS, parse_target


@pytest.mark.parametrize(
    ("text", "chips", "platform"),
    [
        ("v5e:4x4", 16, "tpu"),
        ("v5p:4x4x4", 64, "tpu"),
        ("v6e:16x16", 256, "tpu"),
        ("h100:8x8", 64, "cuda"),
        ("h200:1x8", 8, "cuda"),
        ("cpu", 1, "cpu"),
        ("cpu:8", 8, "cpu"),
    ],
)
def test_a_target_is_read_and_written(text, chips, platform):
    target = parse_target(text)
    assert (target.chips, target.chip.platform) == (chips, platform)
    assert parse_target(target.name) == target


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5f:4x4", "'v5e'"),
        ("v5e", "2 sizes.*v5e:4x4"),
        ("v5e:4x4x4", "2 sizes"),
        ("v5p:4x4", "3 sizes.*v5p:4x4x4"),
        ("v5e:0x4", "2 sizes"),
        ("v5e:4xx4", "2 sizes"),
        ("h100:8", "hosts x GPUs"),
        ("h100:4x16", "at most 8"),
        ("cpu:2x2", "cpu:8"),
        ("cpu:0", "cpu:8"),
        ("", "no chip"),
    ],
)
def test_what_is_no_target_is_refused_with_what_would_be_one(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_target(text)


def test_parts_of_a_cpu_share_it():
    whole, eighth = parse_target("cpu").chip, parse_target("cpu:8").chip
    assert eighth.memory == whole.memory // 8
    assert math.isclose(eighth.bandwidth * 8, whole.bandwidth)


def test_every_chip_names_its_source_and_its_own_compiler():
    assert all(chip.source and chip.name == name for name, chip in CHIPS.items())
    assert {c.platform for c in CHIPS.values() if c.compiler} == {"cuda"}
