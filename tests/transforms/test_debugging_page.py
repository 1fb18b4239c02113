"""The snippets of docs/debugging.md run from top to bottom."""

import re
import runpy
from pathlib import Path

import jax
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "debugging.md"


def test_every_snippet_runs(capsys, tmp_path):
    if not PAGE.exists():
        pytest.skip("the installed wheel has no docs")
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 7
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        (tmp_path / "page.py").write_text("\n".join(snippets))
        runpy.run_path(str(tmp_path / "page.py"))
    assert "made the first" in capsys.readouterr().out
