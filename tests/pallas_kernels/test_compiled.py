"""Tier 4: the real compilers take every kernel, for TPUs and an H200 that are not there.

``FNML_TPU_PYTHON`` names a Python with libtpu, ``FNML_CUDA_PYTHON`` one with the CUDA plugin, each
in an environment of its own (CONTRIBUTING.md).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from kernel_cases import all_cases

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def compiled(platform):
    variable = {"tpu": "FNML_TPU_PYTHON", "cuda": "FNML_CUDA_PYTHON"}[platform]
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: no compiler for {platform}")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    run = subprocess.run(
        [os.environ[variable], HERE / "compile_kernels.py", platform],
        env=keep | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def expected(platform, targets):
    calls = [(case.name, case.calls.get(platform, 0)) for case in all_cases()]
    return {(name, target): count for name, count in calls if count for target in targets}


@pytest.mark.slow
def test_the_tpu_compiler_fits_every_kernel_into_vector_memory():
    rows = compiled("tpu")
    assert [row for row in rows if "error" in row and not row["oversized"]] == []
    found = {(r["case"], r["target"]): r["hlo_calls"] for r in rows if not r["oversized"]}
    assert found == expected("tpu", ("v5e", "v6e"))
    # The compiler does refuse what does not fit: tiles of 65,536 keys.
    oversized = [row for row in rows if row["oversized"]]
    assert len(oversized) == 2
    assert all("vmem" in row["error"].lower() for row in oversized)


@pytest.mark.slow
def test_the_cuda_compiler_spills_no_register():
    rows = compiled("cuda")
    assert [row for row in rows if "error" in row and not row["oversized"]] == []
    rows, oversized = ([r for r in rows if r["oversized"] is flag] for flag in (False, True))
    assert {(r["case"], r["target"]): len(r["ptxas"]) for r in rows} == expected("cuda", ("H200",))
    spills = {r["case"]: [k["spilled_bytes"] for k in r["ptxas"]] for r in rows}
    assert {name: found for name, found in spills.items() if any(found)} == {}
    assert all(0 < kernel["registers"] <= 255 for r in rows for kernel in r["ptxas"])
    assert len(oversized) == 1
    assert "shared memory" in oversized[0]["error"].lower()
