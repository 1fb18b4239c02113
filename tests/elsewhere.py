"""Compilers of hardware that is not there: a test's side, and that of the script it runs with them.

``FNML_TPU_PYTHON`` names a Python with libtpu, ``FNML_CUDA_PYTHON`` one with the CUDA plugin, each
in an environment of its own (CONTRIBUTING.md).
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from fnml.plan import parse_target
from fnml.plan._worker import devices as worker_devices
from fnml.plan._worker import environment

TESTS = Path(__file__).parent


def run(script: Path, platform: str, seconds: int = 900) -> Any:
    """Run a script with a platform's compiler; return what it printed last, as JSON, or skip."""
    import pytest

    variable = {"tpu": "FNML_TPU_PYTHON", "cuda": "FNML_CUDA_PYTHON"}[platform]
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: no compiler for {platform}")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    done = subprocess.run(
        [os.environ[variable], script, platform],
        env=keep | environment(platform) | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def devices(text: str) -> list[Any]:
    """Return the devices of a target such as ``v5e:4x4``, in a script that :func:`run` started."""
    target = parse_target(text)
    return worker_devices(
        {
            "platform": target.chip.platform,
            "chip": target.chip.name,
            "shape": target.shape,
            "mesh": {"all": target.chips},
            "compiler": target.chip.compiler,
        }
    )
