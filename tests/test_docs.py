"""The site builds without warnings, and what its pages name exists.

Notebooks are executed by tests/test_notebooks.py and `make docs`, not here.
"""

import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nonlocal_jax as nl
from experiments import kinetics
from nonlocal_jax.weights import sources

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((ROOT / "notebooks").glob("*.py"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "html"
    flags = ["-q", "-W", "--keep-going", "-D", "nb_execution_mode=off"]
    command = [sys.executable, "-m", "sphinx", *flags, "docs", str(folder)]
    sphinx = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert (sphinx.returncode, sphinx.stderr) == (0, "")
    return folder


PARTS = ("ops", "layers", "models", "weights", "visualize", "training", "data", "evaluation")


def test_every_public_name_is_documented(site):
    for part in PARTS:
        page = (site / "api" / f"{part}.html").read_text()
        named = set(re.findall(r'id="(nonlocal_jax\.[\w.]+)"', page))
        module = importlib.import_module(f"nonlocal_jax.{part}")
        for name in module.__all__:
            value = getattr(module, name)
            is_ours = getattr(value, "__module__", "").startswith("nonlocal_jax")
            if is_ours and (inspect.isfunction(value) or inspect.isclass(value)):
                assert f"nonlocal_jax.{part}.{name}" in named, f"{part}.{name}"


def test_every_module_of_data_is_documented(site):
    page = (site / "api" / "data.html").read_text()
    for file in (ROOT / "nonlocal_jax" / "data").glob("[a-z]*.py"):
        assert f'id="module-nonlocal_jax.data.{file.stem}"' in page, file.stem
    assert 'id="nonlocal_jax.data.kinetics_400.CLASSES"' in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_functions_named_in_the_pages_exist(page):
    def exists(name):
        target = nl
        for part in name.split("."):
            target = getattr(target, part, None)
        return target is not None

    names = set(re.findall(r"\bnl\.([a-z_]+(?:\.[A-Za-z_]+)*)", page.read_text()))
    assert [name for name in names if not exists(name)] == []


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_flags_named_in_the_pages_exist(monkeypatch, capsys):
    commands = {
        (page.stem, command)
        for page in PAGES
        for command in re.findall(
            r"python -m ((?:experiments|nonlocal_jax)\.[^`#\"'\n]*)",
            page.read_text().replace("\\\n", " "),  # commands of several lines
        )
    }
    assert len(commands) > 10
    # Otherwise its bytecode with annotation checks would be kept as that of the module itself.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for page, command in sorted(commands):
        module, *arguments = shlex.split(command)
        subcommand = arguments[:1] if module.startswith("nonlocal_jax") else []
        monkeypatch.setattr(sys, "argv", [module, *subcommand, "--help"])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        assert exit_info.value.code == 0
        flags = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
        assert {argument for argument in arguments if argument.startswith("--")} <= flags, (
            page,
            command,
        )


@pytest.mark.parametrize(
    ("column", "source", "block"),
    [
        (3, sources.CAFFE2, "nonlocal_res4_1"),
        (4, sources.SLOWFAST, "nonlocal_res4_1"),
        (5, sources.MMACTION2, "nonlocal_res4_1"),
        (6, sources.NON_LOCAL_PYTORCH, "nonlocal1"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_names_in_the_table_are_those_of_the_weights(column, source, block):
    rows = {
        line.split("|")[1].split()[0].strip(","): line
        for line in (DOCS / "conventions.md").read_text().splitlines()
        if "|" in line
    }
    leaves = {
        "θ": "operation/theta/kernel",
        "φ": "operation/phi/kernel",
        "g": "operation/g/kernel",
        "w_f": "operation/w_f",
        "W_z": "out/kernel",
        "the": "out_norm/scale",
    }
    for word, leaf in leaves.items():
        named, found = (
            rows[word].split("|")[column].strip(" `"),
            source.source_name(f"{block}/{leaf}"),
        )
        assert bool(named) == bool(found), word
        if named.startswith("..."):
            assert found[0].endswith(named.removeprefix("..."))
        elif named:
            assert f".{named}." in found[0]


def test_recipes_named_in_the_pages_exist():
    text = (DOCS / "paper_to_code.md").read_text()
    named = re.findall(r"\b(?:c2d|i3d)\w*_r\d+_\w+", text)
    assert len(named) > 3
    assert set(named) <= set(kinetics.recipes())


def test_references_in_the_pages_are_links(site):
    for page in ("paper_to_code", "conventions", "how_to"):
        text = (site / f"{page}.html").read_text()
        source = (DOCS / f"{page}.md").read_text()
        wanted = re.findall(r"\{py:obj\}`[^<]*<(nonlocal_jax[\w.]+)>`", source)
        assert all(f"#{name}" in text for name in wanted), page
    assert all(
        (site / "notebooks" / f"{file.stem}.html").is_file()
        for file in ROOT.glob("notebooks/*.ipynb")
    )
