"""Real runs of experiments in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

TESTS = Path(__file__).parent.parent
PATIENCE = 240.0  # seconds for anything without a deadline of its own


def command(options, folder, *more, module="experiments.cifar"):
    return [sys.executable, "-m", module, *options.split(), "--output", str(folder), *more]


def environment(devices):
    """Of a process with so many simulated devices."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(TESTS),
    }


def start(options, folder, *more, devices=1, module="experiments.cifar"):
    return start_command(command(options, folder, *more, module=module), devices)


def start_command(arguments, devices):
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(devices),
    )


def finish(process, code=0):
    """Wait for it; gives what it printed. One that does not end is killed with all that it started, and its words are shown."""
    try:
        printed, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(
            recursive=True
        ):  # mpirun's are in groups of their own
            child.kill()
        process.kill()
        printed, _ = process.communicate()
        pytest.fail(f"no end within {PATIENCE:.0f} s of {process.args}, which printed:\n{printed}")
    finally:
        process.kill()
    assert process.returncode == code, printed
    return printed
