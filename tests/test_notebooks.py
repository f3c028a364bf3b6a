"""Every notebook runs from the first cell to the last, and is the Python file beside it, without outputs."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PATIENCE = 300  # seconds of a cell


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_six():
    assert [file.stem[:2] for file in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_its_python_file_without_outputs(file):
    """`make notebooks` writes the one from the other."""
    notebook = nbformat.read(file, 4)
    assert cells(notebook) == cells(jupytext.read(file.with_suffix(".py")))
    assert all(
        cell.outputs == [] and cell.execution_count is None
        for cell in notebook.cells
        if cell.cell_type == "code"
    )
    assert f"/blob/main/notebooks/{file.name})" in notebook.cells[0].source  # Colab's badge
    assert "google.colab" in notebook.cells[1].source


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS")  # the devices of the tests
    notebook = nbformat.read(file, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3", resources=resources).execute()
    shown = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any(
        output.output_type in ("stream", "display_data", "execute_result") for output in shown
    )
    assert [path.name for path in tmp_path.iterdir()] == (
        ["explore.html"] if file.stem.startswith("02") else []
    )
