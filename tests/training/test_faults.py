"""Real processes, real signals, real full disks: what is kept, and that the next start ends as if nothing had been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from training import processes
from training.processes import PATIENCE, finish

STEPS = 60
OPTIONS = (
    f"--depth 8 --nonlocal-blocks res2_0 --steps {STEPS} --batch-size 16 --save-every 3 --evaluate-every 20 --precise-bn 2 "
    "--average 0.9"
)
DEADLINE = 60.0  # seconds to save after a signal, on a busy machine


def start(folder):
    return processes.start(OPTIONS, folder)


def outcome(folder):
    """Digests of every array of the last checkpoint, and the log without times."""
    with ocp.CheckpointManager(folder / "checkpoints", item_names=("record",)) as manager:
        assert manager.latest_step() == STEPS
        sealed = manager.restore(
            STEPS, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        ).record
    content = json.loads(sealed["text"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return content["leaves"], content["record"]["metrics"], rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nothing disturbs ends with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(folder))
    return outcome(folder)


def wait_for(condition, process, what):
    """Until it holds, or the process is over."""
    begun = time.monotonic()
    while process.poll() is None and not condition():
        assert time.monotonic() - begun < PATIENCE, f"no {what}"
        time.sleep(0.002)
    return process.poll() is None


def logged(folder):
    """The last step in the log."""
    file = folder / "metrics.jsonl"
    rows = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(rows[-1])["step"] if rows else 0


def saved(folder):
    """The step of the latest whole checkpoint."""
    return max(
        (int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()),
        default=0,
    )


def saving(folder):
    return any("tmp" in path.name for path in (folder / "checkpoints").glob("*"))


def kill_often(folder, kills, seed):
    """SIGKILL so many times, some steps after the checkpoint that the start went on from, every other time while one is
    being written; then let it end. Gives what it printed at the end, and how many kills there were.
    """
    rng = np.random.default_rng(seed)
    done = 0
    for number in range(kills):
        target = saved(folder) + rng.integers(1, 20)
        process = start(folder)
        begun = time.time()

        def far_enough(target=target, begun=begun):
            log = folder / "metrics.jsonl"
            return log.exists() and log.stat().st_mtime > begun and logged(folder) >= target

        alive = wait_for(far_enough, process, "step")
        if alive and number % 2:
            wait_for(lambda: saving(folder), process, "save")
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        done += process.wait(PATIENCE) == -signal.SIGKILL
        process.stdout.close()
    return finish(start(folder)), done


def test_killed_while_it_trains_and_while_it_saves(whole, tmp_path):
    _, kills = kill_often(tmp_path / "run", 2, seed=0)
    assert kills == 2
    assert outcome(tmp_path / "run") == whole


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again(seed, whole, tmp_path):
    printed, kills = kill_often(tmp_path / "run", 5, seed + 1)
    assert kills >= 3, "it was done before it could be killed; make it longer"
    assert "resumed at step" in printed
    assert outcome(tmp_path / "run") == whole


@pytest.mark.parametrize("times", [1, 3])
def test_terminated_it_saves_and_exits_with_75(times, whole, tmp_path):
    """Launchers and schedulers may send the signal more than once; the save goes on."""
    folder = tmp_path / "run"
    process = start(folder)
    assert wait_for(lambda: logged(folder) > 7, process, "step")
    begun = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    printed = finish(process, code=75)
    assert time.monotonic() - begun < DEADLINE
    assert "stopped by a signal; step" in printed
    step = int(printed.split("stopped by a signal; step ")[1].split()[0])
    assert (folder / "checkpoints" / str(step)).is_dir()
    assert f"resumed at step {step}" in finish(start(folder))
    assert outcome(folder) == whole


def test_interrupted_twice_it_stops_at_once_and_loses_no_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    assert wait_for(lambda: logged(folder) > 7, process, "step")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    process.communicate(timeout=PATIENCE)
    assert process.returncode not in (0, None)
    assert "resumed at step" in finish(start(folder))
    assert outcome(folder) == whole


def test_two_runs_in_one_folder(whole, tmp_path):
    folder = tmp_path / "run"
    first = start(folder)
    assert wait_for(lambda: logged(folder) > 0, first, "step")
    assert f"error: another process is training in {folder}" in finish(start(folder), code=1)
    finish(first)
    assert outcome(folder) == whole


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(whole, tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(lambda: (folder / "checkpoints" / "9").is_dir(), process, "checkpoint")
    process.kill()
    process.communicate()
    latest = max(
        int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()
    )
    for file in (folder / "checkpoints" / str(latest) / "state").rglob(
        "d/*"
    ):  # Orbax's files of arrays
        os.truncate(file, file.stat().st_size // 2)
    printed = finish(start(folder))
    assert f"the checkpoint of step {latest} is damaged" in printed
    assert f"resumed at step {latest - 3}" in printed
    assert outcome(folder) == whole


def test_another_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"depth": 20}))
    printed = finish(start(tmp_path), code=1)
    assert f"error: depth is 8 now, and was 20 when the run in {tmp_path} started" in " ".join(
        printed.split()
    )


def in_namespace():
    """Whether this machine lets a test mount a file system of its own."""
    return (
        shutil.which("unshare")
        and subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]).returncode
        == 0
    )


FULL_DISK = """
import pathlib, subprocess, sys, time
disk, command = pathlib.Path(sys.argv[1]), sys.argv[2:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
while not list(disk.glob("run/checkpoints/6")):
    assert run.poll() is None, run.stdout.read()
    time.sleep(0.002)
with (disk / "filler").open("wb", buffering=0) as out:
    try:
        while out.write(bytes(4096)):
            pass
    except OSError:
        pass
printed, _ = run.communicate(timeout=200)
print("first:", run.returncode, printed, flush=True)
(disk / "filler").unlink()
again = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
print("second:", again.returncode, again.stdout, flush=True)
subprocess.run(["cp", "-r", str(disk / "run"), str(disk) + "-copy"], check=True)
"""


def test_a_disk_that_fills_up(whole, tmp_path):
    if not in_namespace():
        pytest.skip("mount namespaces are absent")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = processes.command(OPTIONS, disk / "run")
    filled = ["unshare", "-rm", sys.executable, "-c", FULL_DISK, str(disk), *command]
    done = subprocess.run(
        filled, capture_output=True, text=True, timeout=2 * PATIENCE, env=processes.environment(1)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.split("second:")
    assert first.startswith("first: 1 "), first
    assert "No space left on device" in first
    assert second.startswith(" 0 "), second
    assert "resumed at step" in second
    assert outcome(tmp_path / "disk-copy") == whole


def test_a_folder_that_cannot_be_written(tmp_path):
    if not in_namespace():
        pytest.skip("mount namespaces are absent")
    (tmp_path / "run").mkdir()
    command = processes.command(OPTIONS, tmp_path / "run")
    script = f"mount -t tmpfs -o ro tmpfs {tmp_path / 'run'} && exec " + " ".join(command)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert "must be a folder that can be written: Read-only file system" in " ".join(
        done.stderr.split()
    )
