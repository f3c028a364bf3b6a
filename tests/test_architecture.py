"""Arrows point down only, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nonlocal_jax"

# What each part may import from the rest of the package.
MAY_IMPORT = {
    "types": set(),
    "checks": set(),
    "files": set(),
    "lazy": set(),
    "ops": {"types"},
    "layers": {"types", "ops"},
    "models": {"types", "ops", "layers"},
    "weights": {"types", "ops", "layers", "models"},
    "data": {"types", "ops", "layers"},  # of the layers, only what a source's input is
    "visualize": {
        "types",
        "ops",
        "layers",
    },  # it finds the blocks of a network, and follows its layers
    "evaluation": {"types", "ops"},
    "training": {"types", "ops", "evaluation"},
}
HEAVY = (
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "matplotlib",
    "PIL",
    "av",
    "grain",
    "sklearn",
    "optax",
    "orbax",
    "safetensors",
    "tensorboard",
)


def imported_parts(file):
    """The parts of the package that a file imports, by its syntax tree."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            assert not name.startswith(("experiments", "benchmarks")), f"{file} imports {name}"
            if name.startswith("nonlocal_jax."):
                yield name.split(".")[1]


@pytest.mark.parametrize(
    "file",
    [f for f in sorted(PACKAGE.rglob("*.py")) if f.parent != PACKAGE or f.name != "__init__.py"],
    ids=str,
)
def test_arrows_point_down(file):
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in MAY_IMPORT, f"{part} is a new part; say what it may import"
    above = set(imported_parts(file)) - MAY_IMPORT[part] - {part, "checks", "files", "lazy"}
    assert not above, f"{file.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def test_import_is_light():
    code = f"import sys, nonlocal_jax; print([name for name in {HEAVY} if name in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=120,
    )
    assert out.stdout.strip() == "[]"
