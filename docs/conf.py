"""The site: pages in Markdown beside this file, the notebooks, the benchmarks' report, and the docstrings. `make docs`."""

import re
import shutil
from collections.abc import Iterator
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent

project, author, release = "nonlocal_jax", "the authors of nonlocal_jax", installed("nonlocal_jax")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title, html_show_copyright = "furo", "nonlocal_jax", False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "special-members": "__call__",
}
autodoc_typehints = "none"  # shapes and types are in the docstrings
autodoc_class_signature = "separated"
napoleon_custom_sections = [
    ("Attributes", "params_style")
]  # as arguments are, for they are the arguments of dataclasses
default_role = "code"  # `x` in a docstring


def _copy_what_lies_elsewhere() -> None:
    for name, patterns in {
        "notebooks": ["*.ipynb"],
        "benchmarks": ["README.md", "results/**/*.png"],
    }.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        for file in (file for pattern in patterns for file in (ROOT / name).glob(pattern)):
            to = HERE / name / file.relative_to(ROOT / name)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)


def _as_rst(lines: list[str]) -> Iterator[str]:
    """Docstrings are written to be read in the source: tables as Markdown's, * and | as themselves."""
    i = 0
    while i < len(lines):
        table = []
        while i < len(lines) and lines[i].lstrip().startswith("|"):
            table.append(lines[i])
            i += 1
        if table:
            indent = " " * (len(table[0]) - len(table[0].lstrip()))
            rows = [
                [_escaped(cell.strip()) for cell in row.strip().strip("|").split("|")]
                for row in table
            ]
            yield from ("", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", "")
            for row in (rows[0], *rows[2:]):
                for first, cell in enumerate(row):
                    yield f"{indent}   {'  -' if first else '* -'} {cell}"
            yield ""
        elif lines[i].lstrip().startswith((">>>", "...")):  # until an empty line
            while i < len(lines) and lines[i].strip():
                yield lines[i]
                i += 1
        else:
            yield _escaped(lines[i])
            i += 1


def _escaped(text: str) -> str:
    """Outside of `code`, what reStructuredText would take for markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*|])|(?<=\w)(_)(?!\w)", r"\\\1\2", part)
        for part in parts
    )


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _as_rst(lines)


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    """Attributes are in the docstring of their class; what Python made, such as a dataclass's __init__, says nothing more."""
    ours = str(getattr(obj, "__module__", None)).startswith("nonlocal_jax")
    of_class = "." in getattr(obj, "__qualname__", "")  # else the value of an attribute
    return skip or (
        what == "class"
        and not isinstance(obj, property)
        and (name == "__init__" or not ours or not of_class)
    )


def setup(app: Any) -> None:
    """Before napoleon, which runs at 500."""
    _copy_what_lies_elsewhere()
    app.connect("autodoc-process-docstring", _docstring, priority=100)
    app.connect("autodoc-skip-member", _skip)
