"""Tier 3: what is lowered for each platform holds the kernels it should, and no other ones."""

import jax
import pytest
from kernel_cases import all_cases, cudnn_calls, custom_calls, pallas_calls

CASES = all_cases()
PLATFORMS = ("tpu", "cuda", "rocm", "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_platform_gets_its_kernels(case):
    calls = custom_calls(case.function, case.arguments, *PLATFORMS)
    found = {platform: pallas_calls(calls[platform]) for platform in PLATFORMS}
    assert found == dict.fromkeys(PLATFORMS, 0) | case.calls
    assert cudnn_calls(calls["cuda"]) == case.cudnn
    # A choice by platform is gone once it is lowered: one body is left.
    assert "tpu_custom_call" not in calls["cuda"] and "mosaic_gpu_v2" not in calls["tpu"]


def test_the_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_count_would_notice():
    calls = custom_calls(jax.numpy.sin, (jax.ShapeDtypeStruct((4,), "float32"),), "tpu")
    assert pallas_calls(calls["tpu"]) == 0
