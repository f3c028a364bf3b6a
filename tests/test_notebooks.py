"""Every notebook runs from the first to the last cell and equals its Python file."""

import hashlib
import http.client
import io
import urllib.error
import urllib.request
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


def download_function(**constants):
    """Returns `download` of notebook 03, with other constants."""
    notebook = nbformat.read(FOLDER / "03_your_network.ipynb", 4)
    (source,) = [c.source for c in code_cells(notebook) if "def download" in c.source]
    names = {"hashlib": hashlib, "http": http, "urllib": urllib}
    exec(source, names)
    names |= constants
    return names["download"]


@pytest.mark.parametrize(
    "error",
    [
        http.client.IncompleteRead(b"part", 100),
        http.client.RemoteDisconnected(),
        urllib.error.URLError("no host"),
        TimeoutError(),
        ConnectionResetError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_a_download_that_fails(when, error, tmp_path, monkeypatch):
    class Response(io.BytesIO):
        def read(self, *arguments):
            raise error

    def urlopen(*arguments, **options):
        if when == "opening":
            raise error
        return Response()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert not download_function()(tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "content", [b"the expected file", b"the expected", b"another file, longer"]
)
def test_only_the_expected_file_is_kept(content, tmp_path, monkeypatch):
    expected = b"the expected file"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **b: io.BytesIO(content))
    download = download_function(SIZE=17, SHA256=hashlib.sha256(expected).hexdigest())
    assert download(tmp_path / "file") == (content == expected)
    assert (tmp_path / "file").exists() == (content == expected)
