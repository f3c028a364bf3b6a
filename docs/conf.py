"""Configuration of the documentation site. `make docs` builds it and executes the notebooks.

The pages are the Markdown files of this directory, the notebooks, the benchmark report and the
docstrings.
"""

import importlib
import inspect
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from nonlocal_jax.layers.presets import presets_table

HERE = Path(__file__).parent
ROOT = HERE.parent
REPOSITORY = "https://github.com/nonlocal-jax/nonlocal_jax"

project, author = "nonlocal_jax", "the authors of nonlocal_jax"
release = metadata.version("nonlocal_jax")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.linkcode"]
html_theme, html_title, html_show_copyright = "furo", "nonlocal_jax", False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [{"name": "GitHub", "url": REPOSITORY, "html": "GitHub", "class": ""}],
}

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
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88  # a longer signature has one parameter a line
# Attributes of dataclasses and modules are their arguments, so they are shown like arguments.
napoleon_custom_sections = [("Attributes", "params_style")]
default_role = "code"  # `x` in a docstring


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Returns the address of an object's source on GitHub."""
    target: Any = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        target = getattr(target, name, None)
    try:
        target = inspect.unwrap(target)
        file = Path(inspect.getsourcefile(target) or "")
        lines, first = inspect.getsourcelines(target)
    except (TypeError, OSError, ValueError):
        return None  # properties, aliases and module attributes have no source of their own
    if not file.is_relative_to(ROOT):
        return None
    return f"{REPOSITORY}/blob/main/{file.relative_to(ROOT)}#L{first}-L{first + len(lines) - 1}"


def _copy_pages_from_elsewhere() -> None:
    """Copies the notebooks and the benchmark report next to the other pages, where Sphinx looks."""
    for name, patterns in {
        "notebooks": ["*.ipynb"],
        "benchmarks": ["README.md", "results/**/*.png"],
    }.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        for file in (file for pattern in patterns for file in (ROOT / name).glob(pattern)):
            copy = HERE / name / file.relative_to(ROOT / name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _docstring_to_rst(lines: list[str]) -> Iterator[str]:
    """Converts what our docstrings have in Markdown: tables, and * and | as plain characters."""
    i = 0
    while i < len(lines):
        table = []
        while i < len(lines) and lines[i].lstrip().startswith("|"):
            table.append(lines[i])
            i += 1
        if table:
            yield from _table_to_rst(table)
        elif lines[i].lstrip().startswith((">>>", "...")):
            # An example reaches to the next empty line and is left as it is.
            while i < len(lines) and lines[i].strip():
                yield lines[i]
                i += 1
        else:
            yield _escape(lines[i])
            i += 1


def _table_to_rst(table: list[str]) -> Iterator[str]:
    indent = " " * (len(table[0]) - len(table[0].lstrip()))
    rows = [[_escape(cell.strip()) for cell in row.strip().strip("|").split("|")] for row in table]
    yield from ("", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", "")
    header, _, *body = rows
    for row in (header, *body):
        for column, cell in enumerate(row):
            yield f"{indent}   {'  -' if column else '* -'} {cell}"
    yield ""


def _escape(text: str) -> str:
    """Escapes what reStructuredText would take for markup, except inside `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*|])|(?<=\w)(_)(?!\w)", r"\\\1\2", part)
        for part in parts
    )


def _process_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = _docstring_to_rst(lines)


def _skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    """Skips attributes, which the docstring of their class documents, and generated methods."""
    is_ours = str(getattr(obj, "__module__", None)).startswith("nonlocal_jax")
    is_method = "." in getattr(obj, "__qualname__", "")  # otherwise it is the value of an attribute
    is_generated = name == "__init__" or not is_ours or not is_method
    return skip or (what == "class" and not isinstance(obj, property) and is_generated)


def _insert_presets(app: Any, page: str, source: list[str]) -> None:
    source[0] = source[0].replace("<!-- presets -->", presets_table())


def setup(app: Any) -> None:
    """Connects the hooks. Docstrings are converted before napoleon, which has priority 500."""
    _copy_pages_from_elsewhere()
    app.connect("source-read", _insert_presets)
    app.connect("autodoc-process-docstring", _process_docstring, priority=100)
    app.connect("autodoc-skip-member", _skip_member)
