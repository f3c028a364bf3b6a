"""Submodules are attributes after `import nonlocal_jax`, and are imported on first use only."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys
import nonlocal_jax as nl

NAMES = {submodules!r}
LAZY = ["nonlocal_jax.evaluation", *(f"nonlocal_jax.data.{{name}}" for name in NAMES)]
assert not [name for name in LAZY if name in sys.modules]
assert {{"evaluation", "training", "data"}} <= set(dir(nl))
assert set(NAMES) <= set(dir(nl.data)), dir(nl.data)
for name in NAMES:
    assert getattr(nl.data, name).__name__ == f"nonlocal_jax.data.{{name}}"
assert nl.data.video.Video and nl.data.clips.TrainingClips
assert nl.evaluation.top_k and nl.training.fit
for package in (nl, nl.data):
    try:
        package.missing
    except AttributeError as error:
        assert "has no attribute 'missing'" in str(error)
    else:
        raise AssertionError(package)
print("done")
"""


@pytest.mark.processes
def test_submodules_are_attributes_on_first_use():
    files = (ROOT / "nonlocal_jax" / "data").glob("[a-z]*.py")
    code = CODE.format(submodules=sorted(file.stem for file in files))
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert process.stdout.strip() == "done", process.stderr
