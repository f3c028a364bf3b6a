"""Strict settings for every test, and a compilation cache that is kept between runs.

Rank promotion raises, annotations are checked, warnings are errors, and there are four simulated
CPU devices.
"""

import collections
import gc
import hashlib
import os
import platform
import time
from pathlib import Path

# Set before JAX starts. Without an accelerator, pmap needs simulated devices.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
# With an accelerator, the test processes share its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def cache_folder():
    """Returns the folder of compiled programs. It is outside of the clone, so that a new clone
    finds them.

    JAX's keys tell versions of JAX apart, but not CPUs, which may share a home folder.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    details = Path("/proc/cpuinfo")
    lines = details.read_text().splitlines() if details.exists() else []
    features = {line for line in lines if line.startswith(("flags", "Features"))}
    cpu = repr((platform.machine(), sorted(features)))
    return home / "nonlocal_jax" / f"compiled-{hashlib.sha256(cpu.encode()).hexdigest()[:12]}"


# In the environment, so that processes started by tests use the same cache.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": cache_folder(),
    # A small function compiles quickly, but there are thousands of them.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}
for option, default in CACHE.items():
    os.environ.setdefault(option, str(default))

import fsspec  # noqa: E402
import jax  # noqa: E402 - reads the environment
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Products of float32 are exact to float32 on accelerators as well.
jax.config.update("jax_default_matmul_precision", "highest")

CACHE_DAYS = 30
# Run by hand: it changes the environment, and requires packages that the tests do without.
collect_ignore = ["training/object_store.py"]


def pytest_addoption(parser):
    parser.addoption(
        "--mutated-files",
        type=int,
        default=100,
        help="mutated files of each format that the tests in tests/damage read; a tenth as many "
        "where one takes long, such as videos",
    )
    parser.addoption(
        "--every-nth-case",
        type=int,
        default=1,
        metavar="N",
        help="of each test with parameters, run the first case, and every Nth after it",
    )


def pytest_collection_modifyitems(config, items):
    """Keeps every Nth case of each parametrized test, as `--every-nth-case` asks."""
    nth = config.getoption("--every-nth-case")
    counts = collections.Counter()
    chosen, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (left_out if counts[test] % nth else chosen).append(item)
        counts[test] += 1
    items[:] = chosen
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def mutated_files(request):
    """Number of mutated files of one format."""
    return request.config.getoption("--mutated-files")


def pytest_sessionstart(session):
    """Deletes what was compiled long ago, once, before the worker processes start."""
    if hasattr(session.config, "workerinput"):
        return
    oldest = time.time() - CACHE_DAYS * 24 * 3600
    for entry in cache_folder().glob("*-cache"):  # never in a folder that the user has chosen
        if entry.stat().st_mtime < oldest:
            entry.unlink(missing_ok=True)


def pytest_collection_finish():
    """Looks for cycles of objects less often.

    Traced and compiled functions are kept, and are millions of objects. To look through all of them
    again and again took a tenth of the time of all tests.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Clears JAX's caches after each file of tests.

    Otherwise they grow to gigabytes and slow down the tests that follow.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def as_users_see_it():
    """Turns off the annotation checker, which would refuse bad input before the library's errors
    can.
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def remote(tmp_path):
    """An empty remote folder, in the memory of this process."""
    # Not imported earlier than the hook that checks annotations.
    from nonlocal_jax.remote_paths import RemotePath

    folder = RemotePath(f"memory://{tmp_path.name}")
    yield folder
    if folder.exists():
        fsspec.filesystem("memory").rm(str(folder), recursive=True)


@pytest.fixture
def copied(remote):
    """Copies a local folder to the remote one."""

    def copy(folder):
        for file in folder.rglob("*"):
            if file.is_file():
                (remote / file.relative_to(folder).as_posix()).upload(file)
        return remote

    return copy


class Unreachable(fsspec.AbstractFileSystem):
    """A file system without a connection, whose errors are its own."""

    protocol = "unreachable"

    def info(self, *arguments, **options):
        raise RuntimeError("no connection")

    ls = cat_file = get_file = put_file = pipe_file = makedirs = info


fsspec.register_implementation("unreachable", Unreachable, clobber=True)
