"""The site is built without a warning; `make docs` runs the notebooks as well, which tests/test_notebooks.py does here."""

import functools
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
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-D",
        "nb_execution_mode=off",
        "docs",
        str(folder),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_public_name_is_in_it(site):
    for part in (
        "ops",
        "layers",
        "models",
        "weights",
        "visualize",
        "training",
        "data",
        "evaluation",
    ):
        page = (site / "api" / f"{part}.html").read_text()
        named = set(re.findall(r'id="(nonlocal_jax\.[\w.]+)"', page))
        module = importlib.import_module(f"nonlocal_jax.{part}")
        for name in module.__all__:
            if inspect.isfunction(thing := getattr(module, name)) or inspect.isclass(thing):
                assert f"nonlocal_jax.{part}.{name}" in named, f"{part}.{name}"


def test_every_module_of_data_is_in_it(site):
    page = (site / "api" / "data.html").read_text()
    for file in (ROOT / "nonlocal_jax" / "data").glob("[a-z]*.py"):
        if file.stem != "convert":  # of `video`
            assert f'id="module-nonlocal_jax.data.{file.stem}"' in page, file.stem


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_functions_that_are_named_exist(page):
    named = set(re.findall(r"\bnl\.([a-z_]+(?:\.[A-Za-z_]+)*)", page.read_text()))
    assert [
        name
        for name in named
        if functools.reduce(lambda at, part: getattr(at, part, None), name.split("."), nl) is None
    ] == []


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_flags_that_are_named_exist(monkeypatch, capsys):
    """Of every command in the pages."""
    commands = {
        (page.stem, command)
        for page in PAGES
        for command in re.findall(
            r"python -m ((?:experiments|nonlocal_jax)\.[^`#\"'\n]*)", page.read_text()
        )
    }
    assert len(commands) > 10
    for page, command in sorted(commands):
        module, *arguments = shlex.split(command)
        subcommand = arguments[:1] if module.startswith("nonlocal_jax") else []
        monkeypatch.setattr(sys, "argv", [module, *subcommand, "--help"])
        with pytest.raises(SystemExit) as left:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        assert left.value.code == 0
        has = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        assert {argument for argument in arguments if argument.startswith("--")} <= has, (
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
def test_the_names_of_the_sources_are_those_of_their_weights(column, source, block):
    """The page's table, against those by which weights are loaded."""
    rows = {
        line.split("|")[1].split()[0].strip(","): line
        for line in (DOCS / "conventions.md").read_text().splitlines()
        if "|" in line
    }
    leaves = {"θ": "operation/theta/kernel", "φ": "operation/phi/kernel", "g": "operation/g/kernel", "w_f": "operation/w_f",
              "W_z": "out/kernel", "the": "out_norm/scale"}  # fmt: skip
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


def test_recipes_that_are_named_exist():
    text = (DOCS / "paper_to_code.md").read_text()
    named = re.findall(r"\b(?:c2d|i3d)\w*_r\d+_\w+", text)
    assert len(named) > 3
    assert set(named) <= set(kinetics.recipes())


def test_what_the_pages_name_is_there(site):
    """References in the pages have become links."""
    for page in ("paper_to_code", "conventions", "how_to"):
        text = (site / f"{page}.html").read_text()
        source = (DOCS / f"{page}.md").read_text()
        wanted = re.findall(r"\{py:obj\}`[^<]*<(nonlocal_jax[\w.]+)>`", source)
        assert all(f"#{name}" in text for name in wanted), page
    assert all(
        (site / "notebooks" / f"{file.stem}.html").is_file()
        for file in ROOT.glob("notebooks/*.ipynb")
    )
