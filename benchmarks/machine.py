"""Describes the machine that the results come from."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import Workers


def describe(workers: Workers, command: str) -> dict[str, Any]:
    """Returns backend, versions, hardware, commit, date and command."""
    jax, torch = workers.get("jax").ask("describe"), workers.get("torch").ask("describe")
    return {
        "backend": jax["backend"],
        "torch backend": torch["backend"],
        "versions": {"python": platform.python_version()} | jax["versions"] | torch["versions"],
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


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
