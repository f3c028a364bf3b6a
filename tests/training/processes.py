"""Starts runs in separate processes, and waits for them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

TESTS = Path(__file__).parent.parent
PATIENCE = 600.0  # seconds after which something is broken, not slow


def command(options, folder, *arguments, module="training.small_run"):
    return [sys.executable, "-m", module, *options.split(), "--output", str(folder), *arguments]


def environment(devices, killed=False):
    """The environment of a process with this number of simulated devices.

    One that will be killed only reads the compilation cache: it could leave half an entry.
    """
    settings = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(TESTS),
    }
    if killed:
        settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    return os.environ | settings


def start(options, folder, *arguments, devices=1, module="training.small_run", killed=False):
    return start_command(command(options, folder, *arguments, module=module), devices, killed)


def start_command(arguments, devices, killed=False):
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(devices, killed),
    )


def finish(process, code=0):
    """Waits for the end of a process and returns what it printed.

    A process that does not end is killed with all that it started, and its output is shown.
    """
    try:
        printed, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        # mpirun starts its processes in process groups of their own.
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        printed, _ = process.communicate()
        pytest.fail(f"no end within {PATIENCE:.0f} s of {process.args}, which printed:\n{printed}")
    finally:
        process.kill()
    assert process.returncode == code, printed
    return printed


def wait_for(condition, *processes):
    """Waits until a condition holds; fails, and shows the output, if a process ends before."""
    begun = time.monotonic()
    while not condition():
        for process in processes:
            if process.poll() is not None and not condition():
                pytest.fail(f"a process ended too early and printed:\n{process.communicate()[0]}")
        if time.monotonic() - begun > PATIENCE:
            for process in processes:
                process.kill()
            printed = "\n".join(process.communicate()[0] for process in processes)
            pytest.fail(f"no sign of life within {PATIENCE:.0f} s; it printed:\n{printed}")
        time.sleep(0.002)


def last_step(folder):
    """The last complete row of a run's log, by its step; 0 without one."""
    file = folder / "metrics.jsonl"
    rows = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(rows[-1])["step"] if rows else 0
