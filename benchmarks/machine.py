"""Describes the machine that the results come from."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from benchmarks.measure import Workers


def describe(
    workers: Workers, command: str, libraries: Sequence[Literal["jax", "torch"]] = ("jax", "torch")
) -> dict[str, Any]:
    """Returns backends, versions, hardware, commit, date and command."""
    versions, backends = {"python": platform.python_version()}, {}
    for library in libraries:
        answer = workers.get(library).ask("describe")
        backends["backend" if library == "jax" else "torch backend"] = answer["backend"]
        versions |= answer["versions"]
    return {
        **backends,
        "versions": versions,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def describe_run(module: str, backend: str, packages: Iterable[str]) -> dict[str, Any]:
    """Returns the same about a run of another benchmark, whose module is the command."""
    return {
        "backend": backend,
        "versions": installed_versions(packages),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def cpu_model() -> str:
    """Returns the name of the processor, as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def git_commit() -> str | None:
    """Returns the commit of the working copy, followed by "+" if it has changes."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
