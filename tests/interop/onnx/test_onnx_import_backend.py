"""The ONNX backend suite: what passes, what is listed as not supported, and nothing between.

To write the table of operators in the docs anew:
``FNML_WRITE_DOCS=1 pytest tests/interop/onnx/test_onnx_import_backend.py -k docs``.
"""

import os
from pathlib import Path

import jax
import onnx_backend
import pytest

from fnml.interop.onnx import _operators

# Cases compile thousands of small programs, which nothing needs again.
_CHUNK = 250
_SAMPLE = 40
DOCS = Path(__file__).parents[3] / "docs" / "onnx.md"
_BEGIN, _END = "<!-- operators -->\n", "<!-- end of operators -->\n"


def _outcomes(kind):
    """Return the kind's cases with what failed, or ``None``."""
    found = []
    for number, case in enumerate(onnx_backend.cases(kind)):
        if number % _CHUNK == 0:
            jax.clear_caches()
        try:
            onnx_backend.run(case)
        except Exception as error:  # noqa: BLE001 - whatever it is, the case fails
            found.append((case, f"{type(error).__name__}: {str(error).strip()[:300]}"))
        else:
            found.append((case, None))
    return found


def _check_list(kind, outcomes):
    listed = onnx_backend.listed().get(kind, {})
    broken = {case.name: why for case, why in outcomes if why and case.name not in listed}
    mended = sorted(case.name for case, why in outcomes if not why and case.name in listed)
    assert not broken, "these cases passed before:\n" + "\n".join(map(str, broken.items()))
    assert not mended, f"these cases pass now; take them off the list: {mended}"
    assert set(listed) <= {case.name for case, _ in outcomes}


@pytest.mark.slow
def test_node_cases_pass_but_for_those_listed():
    outcomes = _outcomes("node")
    _check_list("node", outcomes)
    core = [(case, why) for case, why in outcomes if onnx_backend.is_core(case)]
    plain = [why for case, why in core if not onnx_backend.is_expanded(case)]
    assert plain.count(None) >= 1_350
    assert [why for _, why in core].count(None) >= 1_800


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("simple", 21),
        ("pytorch-operator", 35),
        pytest.param("pytorch-converted", 82, marks=pytest.mark.slow),
        pytest.param("real", 9, marks=pytest.mark.slow),
    ],
)
def test_model_cases_pass_but_for_those_listed(kind, least):
    outcomes = _outcomes(kind)
    _check_list(kind, outcomes)
    assert [why for _, why in outcomes].count(None) >= least


def test_some_node_cases_agree_operation_by_operation():
    listed = onnx_backend.listed()["node"]
    cases = [case for case in onnx_backend.cases("node") if case.name not in listed]
    for case in cases[:: len(cases) // _SAMPLE]:
        onnx_backend.run(case, compiled=False)


def test_no_operator_is_written_twice():
    families = [family.OPERATORS for family in _operators._FAMILIES]
    assert sum(map(len, families)) == len(_operators.OPERATORS)


def test_the_docs_hold_the_table_of_operators():
    if not DOCS.exists():
        pytest.skip("the installed wheel has no docs")
    before, rest = DOCS.read_text().split(_BEGIN)
    held, after = rest.split(_END)
    table = f"\n{onnx_backend.table()}\n\n"
    if os.environ.get("FNML_WRITE_DOCS"):
        DOCS.write_text(f"{before}{_BEGIN}{table}{_END}{after}")
        held = table
    assert held == table, "out of date: see this file's head"
