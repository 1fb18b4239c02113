"""Every chapter of the study guide runs from top to bottom, and is kept without outputs."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
CHAPTERS = sorted(FOLDER.glob("*.ipynb"))
NEEDED = ("nbclient", "nbformat", "ipykernel", "matplotlib")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the installed wheel has no notebooks"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: Any, directory: Path) -> None:
    """Run all cells in a new process of this very Python; raise at the first one that fails."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    # Without directories to search, "python3" is sys.executable's own ipykernel, and never a
    # kernel of that name that another environment has installed for this user.
    specs = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    client = NotebookClient(
        notebook, km=manager, timeout=300, resources={"metadata": {"path": str(directory)}}
    )
    client.execute(cleanup_kc=True)


def printed(notebook: Any, stream: str) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.get("name") == stream)


@pytest.mark.slow
@each_chapter
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbformat.v4 import new_code_cell

    # The user's own IPython profile, startup files and history stay out of it.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells.append(new_code_cell("import sys; print(sys.prefix)"))
    (tmp_path / "empty").mkdir()
    execute(notebook, tmp_path / "empty")
    assert printed(notebook, "stdout").endswith(f"{sys.prefix}\n")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "Warning" not in printed(notebook, "stderr")
    assert not list((tmp_path / "empty").iterdir())


@each_chapter
def test_keeps_no_outputs(path: Path) -> None:
    notebook = read(path)
    kept = [
        f"cell {i}: {len(cell.outputs)} outputs, execution count {cell.execution_count}"
        for i, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None)
    ]
    assert not kept
    # What an editor adds would differ from machine to machine.
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}


def test_the_table_lists_every_chapter() -> None:
    table = (FOLDER / "README.md").read_text()
    assert CHAPTERS
    assert not [path.name for path in CHAPTERS if f"]({path.name})" not in table]
