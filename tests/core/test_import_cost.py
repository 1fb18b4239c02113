"""``import fnml`` brings JAX and nothing else of weight."""

import subprocess
import sys

import pytest

HEAVY = {
    "chex",
    "fsspec",
    "flax",
    "google.protobuf",
    "grain",
    "hypothesis",
    "onnx",
    "optax",
    "orbax",
    "pandas",
    "prometheus_client",
    "pytest",
    "rich",
    "safetensors",
    "scipy.stats",
    "sklearn",
    "tensorboard",
    "tensorflow",
    "tokenizers",
    "torch",
    "transformers",
    "tyro",
}


def modules_after(statement):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    return set(run.stdout.split())


@pytest.fixture(scope="module")
def modules_of_jax():
    return modules_after("import jax, jax.numpy")


@pytest.mark.parametrize("name", ["fnml", "fnml.core"])
def test_importing_brings_no_heavy_package(name, modules_of_jax):
    found = modules_after(f"import {name}")
    assert name in found
    assert "jax" in found
    assert not (found - modules_of_jax) & HEAVY


def test_importing_brings_no_package_at_all_beside_jax(modules_of_jax):
    new = modules_after("import fnml") - modules_of_jax
    outside = {module.split(".")[0] for module in new} - sys.stdlib_module_names
    assert outside == {"fnml"}


def test_the_check_would_notice():
    assert "rich" in modules_after("import fnml, rich") & HEAVY
