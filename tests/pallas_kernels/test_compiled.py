"""Tier 4: the real compilers take every kernel, for TPUs and an H200 that are not there."""

from pathlib import Path

import elsewhere
import pytest
from kernel_cases import all_cases, one_per_kernel

HERE = Path(__file__).parent


def compiled(platform):
    return elsewhere.run(HERE / "compile_kernels.py", platform)


def expected(platform, most, *others):
    """Return the calls by row and target: all rows for one target, one of each kernel for others."""
    every = [case for case in all_cases() if case.calls.get(platform)]
    rows = [(most, every), *((target, one_per_kernel(every, platform)) for target in others)]
    return {(case.name, target): case.calls[platform] for target, some in rows for case in some}


@pytest.mark.slow
def test_the_tpu_compiler_fits_every_kernel_into_vector_memory():
    rows = compiled("tpu")
    assert [row for row in rows if "error" in row and not row["oversized"]] == []
    found = {(r["case"], r["target"]): r["hlo_calls"] for r in rows if not r["oversized"]}
    # The bodies are the same for a v6e, and its memory is twice a v5e's: each kernel goes once.
    assert found == expected("tpu", "v5e", "v6e")
    assert len([target for _, target in found if target == "v6e"]) == 7
    # The compiler does refuse what does not fit: tiles of 65,536 keys.
    oversized = [row for row in rows if row["oversized"]]
    assert len(oversized) == 2
    assert all("vmem" in row["error"].lower() for row in oversized)


@pytest.mark.slow
def test_the_cuda_compiler_spills_no_register():
    rows = compiled("cuda")
    assert [row for row in rows if "error" in row and not row["oversized"]] == []
    rows, oversized = ([r for r in rows if r["oversized"] is flag] for flag in (False, True))
    assert {(r["case"], r["target"]): len(r["ptxas"]) for r in rows} == expected("cuda", "h200")
    spills = {r["case"]: [k["spilled_bytes"] for k in r["ptxas"]] for r in rows}
    assert {name: found for name, found in spills.items() if any(found)} == {}
    assert all(0 < kernel["registers"] <= 255 for r in rows for kernel in r["ptxas"])
    assert len(oversized) == 1
    assert "shared memory" in oversized[0]["error"].lower()
