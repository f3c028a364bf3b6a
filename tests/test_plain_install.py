"""The library without its extras: it works, and what needs an extra names it.

The tests run in an environment of their own, which is kept in the cache folder and made again when
a requirement changes.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import nonlocal_jax as nl

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nonlocal_jax"
CACHE_DAYS = 30
EXPERIMENTS = ("kinetics", "charades", "cifar", "toy_video", "predict", "report")

pytestmark = pytest.mark.processes


def pip(*arguments):
    """Installs packages with the pip of this environment."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(list(map(str, command)), check=True, timeout=900)


def make_environment():
    """Returns the Python of an environment with the requirements of the plain package."""
    requirements = PROJECT["project"]["dependencies"]
    versions = ROOT / "requirements.txt"
    key = repr((requirements, versions.read_text(), sys.version, sys.base_prefix))
    folder = CACHE / f"plain-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "plain.lock"):
        for other in CACHE.glob("plain-*"):
            if other.stat().st_mtime < time.time() - CACHE_DAYS * 24 * 3600:
                shutil.rmtree(other)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE, ignore_cleanup_errors=True) as unfinished:
                made = Path(unfinished, "environment")
                subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
                install = ("install", "--no-compile", "--constraint", versions)
                pip("--python", made / "bin" / "python", *install, *requirements)
                made.rename(folder)  # its Python works wherever it lies
        os.utime(folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Runs Python with the plain package, installed from a wheel."""
    python = make_environment()
    folder = tmp_path_factory.mktemp("plain")
    # In a copy, since setuptools writes to the folder that it builds from.
    source = folder / "source"
    shutil.copytree(ROOT / "nonlocal_jax", source / "nonlocal_jax")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    site = folder / "site"
    pip("install", "--no-deps", "--no-build-isolation", "--target", site, source)

    def run(*arguments, folder=folder):
        environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [python, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_quick_start(plain):
    (quick_start, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    done = plain("-c", quick_start)
    assert done.returncode == 0, done.stderr
    assert done.stdout


DOORS = """
import json, runpy, sys, tempfile
from pathlib import Path
import jax, numpy as np
import nonlocal_jax as nl
from nonlocal_jax.data import cifar, clips, images, pipeline, stand_in, toy_video, transcode, video

folder = Path(tempfile.mkdtemp())
film = folder / "film.mp4"
film.write_bytes(bytes(64))
block = nl.layers.nonlocal_block("dot_product")
x = np.random.default_rng(0).random((1, 2, 4, 4, 3), np.float32)
variables = block.init(jax.random.key(0), x)
maps = nl.visualize.affinities(block, variables, x)
(affinity,) = maps.values()
clip = x[0]
examples = images.Images(np.zeros((5, 1, 1, 1), np.uint8), np.arange(5))
doors = {
    "training": lambda: nl.training,
    "fit": lambda: __import__("nonlocal_jax.training.loop"),
    "video": lambda: video.Video(film).__enter__(),
    "transcode": lambda: transcode.transcode(film, folder / "copy.mp4"),
    "stand_in": lambda: stand_in.make(folder, "kinetics"),
    "written video": lambda: stand_in.write(folder / "new.mp4", [np.zeros((8, 8, 3), np.uint8)]),
    "scans": lambda: toy_video.load_scans("train"),
    "digits": lambda: images.load_digits("train"),
    "cifar": lambda: cifar.prepare("cifar10", folder),
    "batches": lambda: pipeline.training_batches(examples, 2, seed=0),
    "evaluation batches": lambda: pipeline.evaluation_batches(examples, 2),
    "arrows": lambda: nl.visualize.arrows(affinity, clip, (0, 1, 1)),
    "heatmap": lambda: nl.visualize.heatmap(affinity, clip, [(0, 1, 1)]),
    "received": lambda: nl.visualize.received(affinity, clip),
    "entropy": lambda: nl.visualize.entropy(affinity, clip),
    "time_by_time": lambda: nl.visualize.time_by_time(affinity),
    "query_dependence": lambda: nl.visualize.query_dependence(maps),
    "gif": lambda: nl.visualize.animate(affinity, clip, [(0, 1, 1)], folder / "a.gif"),
    "mp4": lambda: nl.visualize.animate(affinity, clip, [(0, 1, 1)], folder / "a.mp4"),
    "page": lambda: nl.visualize.explore(maps, clip, folder / "page.html"),
    "top_k": lambda: nl.evaluation.top_k(np.eye(2), np.arange(2), 1),
    "interval": lambda: nl.evaluation.accuracy_interval(9, 10),
    "weights": lambda: nl.weights.save(folder / "weights.safetensors", variables),
}
sys.path.append(sys.argv[1])
for name in sys.argv[2:]:
    module = f"experiments.{name}"
    doors[module] = lambda module=module: runpy.run_module(module, run_name="__main__")
outcomes = {}
for name, door in doors.items():
    try:
        door()
    except (Exception, SystemExit) as error:
        outcomes[name] = [type(error).__name__, str(error)]
    else:
        outcomes[name] = None
print(json.dumps(outcomes))
"""
# The extra that each door needs, and a package of it.
NEEDS = {
    **dict.fromkeys(("training", "fit", "stand_in"), ("filelock", "experiments")),
    **dict.fromkeys(("video", "transcode", "written video"), ("av", "experiments")),
    **dict.fromkeys(("scans", "digits"), ("sklearn", "experiments")),
    "cifar": ("array_record", "experiments"),
    **dict.fromkeys(("batches", "evaluation batches"), ("grain", "experiments")),
    **dict.fromkeys(("arrows", "heatmap", "received", "entropy"), ("matplotlib", "visualize")),
    **dict.fromkeys(("time_by_time", "query_dependence"), ("matplotlib", "visualize")),
    "gif": ("PIL", "visualize"),
    "mp4": ("av", "visualize"),
    "page": ("PIL", "visualize"),
    **dict.fromkeys(("top_k", "interval", "weights"), None),
}


def message(package, extra):
    return f'{package} is required here and not installed: pip install "nonlocal_jax[{extra}]"'


def test_errors_name_the_extra(plain):
    done = plain("-c", DOORS, ROOT, *EXPERIMENTS)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    all_needs = NEEDS | {f"experiments.{name}": ("filelock", "experiments") for name in EXPERIMENTS}
    assert outcomes.keys() == all_needs.keys()
    for name, outcome in outcomes.items():
        needs = all_needs[name]
        expected = None if needs is None else ["MissingExtraError", message(*needs)]
        assert outcome == expected, name


def test_commands_print_one_line(plain, tmp_path):
    done = plain("-m", "experiments.kinetics", folder=ROOT)
    line = f"error: {message('filelock', 'experiments')}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    done = plain("-m", "nonlocal_jax.data", "stand-in", str(tmp_path / "videos"))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_weights_are_inspected(plain, tmp_path):
    file = tmp_path / "weights.safetensors"
    variables = {"params": {"conv1": {"kernel": np.zeros((1, 7, 7, 3, 64), np.float32)}}}
    nl.weights.save(file, variables)
    done = plain("-m", "nonlocal_jax.weights", "inspect", str(file))
    assert f"{file}: safetensors, 1 arrays" in done.stdout
