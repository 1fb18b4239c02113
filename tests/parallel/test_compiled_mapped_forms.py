"""The real compilers take pipelines, rings and experts, for a v5e:4x4 and eight H100s not there.

``FNML_TPU_PYTHON`` names a Python with libtpu, ``FNML_CUDA_PYTHON`` one with the CUDA plugin, each
in an environment of its own (CONTRIBUTING.md).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from mapped_forms import FORMS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_every_form_compiles_and_sends_what_it_should(platform):
    variable = {"tpu": "FNML_TPU_PYTHON", "cuda": "FNML_CUDA_PYTHON"}[platform]
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: no compiler for {platform}")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    run = subprocess.run(
        [os.environ[variable], HERE / "compile_mapped_forms.py", platform],
        env=keep | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert {name: row["error"] for name, row in found.items() if "error" in row} == {}
    assert set(found) == {name for name, form in FORMS.items() if form.compiled}
    assert [name for name, row in found.items() if FORMS[name].sends not in row["sends"]] == []
    # A ring that maps all axes of its mesh is computed by the kernel that one device would use.
    with_kernel = {name for name, row in found.items() if row["kernels"]}
    assert with_kernel == {name for name, form in FORMS.items() if form.kernel}
