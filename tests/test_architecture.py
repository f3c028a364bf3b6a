"""The structure of the package: imports point down and stay light; no function hides a module."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import nonlocal_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nonlocal_jax"
# Small modules that every part may import.
EVERYWHERE = {"checks", "files", "lazy", "path_options", "remote_paths", "terminal"}

# What each part may import from the rest of the package.
MAY_IMPORT = {
    "types": set(),
    "checks": set(),
    "files": set(),
    "lazy": set(),
    "compiler": set(),
    "path_options": set(),
    "remote_paths": set(),
    "terminal": set(),
    "ops": {"types"},
    "layers": {"types", "ops"},
    "models": {"types", "ops", "layers"},
    "weights": {"types", "ops", "layers", "models"},
    "data": {"types", "ops", "layers"},  # of the layers only `presets`, as tested below
    "visualize": {"types", "ops", "layers"},
    "evaluation": {"types", "ops"},
    "training": {"types", "ops", "compiler"},
}
HEAVY = (
    "jax.experimental.pallas",
    "fsspec",
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


def imported_names(file):
    """Yields the full names that a file imports, according to its syntax tree."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imported_parts(file):
    """Returns the parts of the package that a file imports."""
    names = list(imported_names(file))
    for name in names:
        assert not name.startswith(("experiments", "benchmarks")), f"{file} imports {name}"
    return {name.split(".")[1] for name in names if name.startswith("nonlocal_jax.")}


@pytest.mark.parametrize(
    "file",
    [f for f in sorted(PACKAGE.rglob("*.py")) if f != PACKAGE / "__init__.py"],
    ids=lambda file: file.relative_to(PACKAGE).as_posix(),
)
def test_imports_point_down(file):
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in MAY_IMPORT, f"{part} is a new part; say what it may import"
    forbidden = imported_parts(file) - MAY_IMPORT[part] - {part} - EVERYWHERE
    assert not forbidden, f"{file.relative_to(ROOT)} imports {', '.join(sorted(forbidden))}"


def test_data_reads_nothing_but_presets_of_the_layers():
    for file in (PACKAGE / "data").rglob("*.py"):
        layers = {n for n in imported_names(file) if n.startswith("nonlocal_jax.layers")}
        assert all(n.startswith("nonlocal_jax.layers.presets.") for n in layers), (file, layers)


def test_no_function_hides_a_module():
    """Otherwise the module can be neither imported as an attribute nor patched."""
    hidden = []
    for info in pkgutil.walk_packages(nonlocal_jax.__path__, "nonlocal_jax."):
        if info.ispkg:
            package = importlib.import_module(info.name)
            for module in pkgutil.iter_modules(package.__path__):
                attribute = getattr(package, module.name, None)
                if attribute is not None and not isinstance(attribute, ModuleType):
                    hidden.append(f"{info.name}.{module.name}")
    assert hidden == []


@pytest.mark.processes
def test_import_is_light():
    code = f"import sys, nonlocal_jax; print([name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    process = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    assert process.stdout.strip() == "[]"
