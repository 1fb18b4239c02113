"""The docs' table of primitives is the exporter's.

To write it anew after a change:
``FNML_WRITE_DOCS=1 pytest tests/interop/onnx/test_onnx_export_docs.py``.
"""

import os
import re
from pathlib import Path

import pytest

from fnml.interop.onnx._lowerings import FAMILIES, LOWERINGS

DOCS = Path(__file__).parents[3] / "docs" / "onnx.md"


def table() -> str:
    """Return the table of primitives by family."""
    lines = ["| kind | primitives |", "|---|---|"]
    for family, lowerings in FAMILIES.items():
        names = ", ".join(f"`{name}`" for name in sorted(lowerings))
        lines.append(f"| {family} | {names} |")
    return "\n".join([f"{len(LOWERINGS)} primitives:", "", *lines])


def test_no_primitive_belongs_to_two_families() -> None:
    assert len(LOWERINGS) == sum(map(len, FAMILIES.values()))


def test_every_primitive_is_one_of_jax() -> None:
    """So that no entry is a name that JAX no longer has; older and newer names may stand together."""
    from jax.interpreters import mlir

    known = {primitive.name for primitive in mlir._lowerings}  # type: ignore[attr-defined]
    older_and_newer = {"copy_p", "pjit", "core_call", "remat", "checkpoint", "expand_dims"}
    assert not set(LOWERINGS) - known - older_and_newer


def test_the_docs_hold_the_exporters_table() -> None:
    if not DOCS.parent.is_dir():
        pytest.skip("the installed wheel has no docs")
    text = DOCS.read_text()
    if os.environ.get("FNML_WRITE_DOCS"):
        text = re.sub(
            r"(### Primitives\n.*?\n\n)(?:\d+ primitives:.*?(?=\n## |\Z))",
            lambda found: found[1] + table() + "\n",
            text,
            flags=re.DOTALL,
        )
        DOCS.write_text(text)
    assert table() in text, "out of date: see this file's head"
