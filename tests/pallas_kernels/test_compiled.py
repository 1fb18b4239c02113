"""Tier 4: the real compilers take every kernel, for TPUs and an H200 that are not there."""

from pathlib import Path

import elsewhere
import pytest
from kernel_cases import all_cases

HERE = Path(__file__).parent


def compiled(platform):
    return elsewhere.run(HERE / "compile_kernels.py", platform)


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
    assert {(r["case"], r["target"]): len(r["ptxas"]) for r in rows} == expected("cuda", ("h200",))
    spills = {r["case"]: [k["spilled_bytes"] for k in r["ptxas"]] for r in rows}
    assert {name: found for name, found in spills.items() if any(found)} == {}
    assert all(0 < kernel["registers"] <= 255 for r in rows for kernel in r["ptxas"])
    assert len(oversized) == 1
    assert "shared memory" in oversized[0]["error"].lower()
