"""The SLURM script of the documentation, with an `srun` and a `scontrol` that only act."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "many_hosts.md"


def run_example(folder, srun):
    """Runs the script; returns its exit code and whether the job is requeued."""
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", DOCS.read_text(), re.DOTALL)[1]
    for name, content in (("srun", srun), ("scontrol", 'echo "$@" > "$REQUEUED"')):
        (folder / name).write_text(f"#!/bin/bash\n{content}\n")
        (folder / name).chmod(0o755)
    requeued = folder / "requeued"
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "REQUEUED": str(requeued),
        "SLURM_JOB_ID": "1234",
    }
    completed = subprocess.run(["bash", "-c", script], env=environment)
    if requeued.exists():
        assert requeued.read_text() == "requeue 1234\n"
    return completed.returncode, requeued.exists()


@pytest.mark.parametrize(
    ("code", "is_requeued"), [(0, False), (1, False), (75, True), (134, False), (143, True)]
)
def test_what_is_requeued(code, is_requeued, tmp_path):
    assert run_example(tmp_path, f"exit {code}") == (code, is_requeued)


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_signal_while_python_starts(seconds, tmp_path):
    """Real processes, whose status a shell reports as `srun` does."""
    number = int(signal.SIGTERM)
    command = f"{sys.executable} -m experiments.cifar --depth 8"
    srun = f"{command} & sleep {seconds}; kill -{number} $!; wait $!"
    assert run_example(tmp_path, srun) == (143, True)
