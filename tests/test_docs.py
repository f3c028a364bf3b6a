"""The site is built without a warning; `make docs` runs the notebooks as well, which tests/test_notebooks.py does here."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import kinetics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-D", "nb_execution_mode=off", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_public_name_is_in_it(site):
    for part in ("ops", "layers", "models", "weights", "visualize", "training", "evaluation"):
        page = (site / "api" / f"{part}.html").read_text()
        named = set(re.findall(r'id="(nonlocal_jax\.[\w.]+)"', page))
        module = importlib.import_module(f"nonlocal_jax.{part}")
        for name in module.__all__:
            if inspect.isfunction(thing := getattr(module, name)) or inspect.isclass(thing):
                assert f"nonlocal_jax.{part}.{name}" in named, f"{part}.{name}"


def test_recipes_that_are_named_exist():
    text = (ROOT / "docs" / "paper_to_code.md").read_text()
    named = re.findall(r"\b(?:c2d|i3d)\w*_r\d+_\w+", text)
    assert len(named) > 3
    assert set(named) <= set(kinetics.recipes())


def test_what_the_pages_name_is_there(site):
    """References in the pages have become links."""
    for page in ("paper_to_code", "conventions", "how_to"):
        text = (site / f"{page}.html").read_text()
        source = (ROOT / "docs" / f"{page}.md").read_text()
        wanted = re.findall(r"\{py:obj\}`[^<]*<(nonlocal_jax[\w.]+)>`", source)
        assert all(f"#{name}" in text for name in wanted), page
    assert all((site / "notebooks" / f"{file.stem}.html").is_file() for file in ROOT.glob("notebooks/*.ipynb"))
