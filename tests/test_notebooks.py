"""Every notebook runs from the first to the last cell and equals its Python file."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELL_TIMEOUT = 300  # seconds
FILES_WRITTEN = {"02_train_and_look": ["explore.html"]}

pytestmark = pytest.mark.notebooks


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_six():
    assert [file.stem[:2] for file in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_equals_its_python_file_and_has_no_outputs(file):
    """`make notebooks` writes the notebook from the Python file."""
    notebook = nbformat.read(file, 4)
    assert cells(notebook) == cells(jupytext.read(file.with_suffix(".py")))
    assert all(cell.outputs == [] for cell in code_cells(notebook))
    assert all(cell.execution_count is None for cell in code_cells(notebook))
    assert f"/blob/main/notebooks/{file.name})" in notebook.cells[0].source  # Colab's badge
    assert "google.colab" in notebook.cells[1].source


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS")  # the simulated devices of the tests
    notebook = nbformat.read(file, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    options = {"timeout": CELL_TIMEOUT, "kernel_name": "python3", "resources": resources}
    NotebookClient(notebook, **options).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    types = {output.output_type for output in outputs}
    assert types & {"stream", "display_data", "execute_result"}
    written = [path.name for path in tmp_path.iterdir()]
    assert written == FILES_WRITTEN.get(file.stem, [])
