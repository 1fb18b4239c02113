"""The real compilers take pipelines, rings and experts, for a v5e:4x4 and eight H100s not there."""

from pathlib import Path

import elsewhere
import pytest
from mapped_forms import FORMS

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_every_form_compiles_and_sends_what_it_should(platform):
    found = elsewhere.run(HERE / "compile_mapped_forms.py", platform, seconds=1200)
    assert {name: row["error"] for name, row in found.items() if "error" in row} == {}
    assert set(found) == {name for name, form in FORMS.items() if form.compiled}
    assert [name for name, row in found.items() if FORMS[name].sends not in row["sends"]] == []
    # A ring that maps all axes of its mesh is computed by the kernel that one device would use.
    with_kernel = {name for name, row in found.items() if row["kernels"]}
    assert with_kernel == {name for name, form in FORMS.items() if form.kernel}
