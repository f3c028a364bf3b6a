"""Real processes, signals and full disks: what is saved, and how the next start continues."""

import dataclasses
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
from training.processes import PATIENCE, finish, last_step, wait_for

from experiments import cifar
from nonlocal_jax import training

pytestmark = pytest.mark.processes
STEPS = 36
HOLD_AT = 30  # a batch that only the last start gets


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "run"


def go_file(folder):
    return folder.parent / "go"


def start(folder, hold_at=HOLD_AT, pause=0.01, killed=False):
    """Starts a run that waits for the file `go_file` at a batch."""
    options = f"--steps {STEPS} --pause {pause} --hold-at {hold_at}"
    return processes.start(options, folder, "--hold-until", str(go_file(folder)), killed=killed)


def start_and_finish(folder):
    go_file(folder).touch()
    return finish(start(folder, pause=0.0))


def outcome(folder, steps=STEPS):
    """Digests of every array of the last checkpoint, and the log without times."""
    with ocp.CheckpointManager(folder / "checkpoints", item_names=("record",)) as manager:
        assert manager.latest_step() == steps
        item = ocp.args.Composite(record=ocp.args.JsonRestore())
        sealed = manager.restore(steps, args=item).record
    content = json.loads(sealed["text"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return content["leaves"], content["record"]["metrics"], rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    start_and_finish(folder)
    return outcome(folder)


def saved_step(folder):
    """The step of the latest complete checkpoint."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def created(path):
    """When a checkpoint got its name; 0 if it is deleted meanwhile."""
    return path.stat().st_ctime if path.exists() else 0


def is_saving(folder):
    return any("tmp" in path.name for path in (folder / "checkpoints").glob("*"))


def is_held(folder):
    return (folder / "held").exists()


def start_and_kill(folder, rng, is_due, saving=False):
    """Starts a run and kills it soon after `is_due()`, perhaps while a checkpoint is written."""
    (folder / "held").unlink(missing_ok=True)
    process = start(folder, killed=True)
    wait_for(is_due, process)
    if saving:
        wait_for(lambda: is_saving(folder) or is_held(folder), process)
    time.sleep(rng.uniform(0, 0.03))
    process.kill()
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert "Traceback" not in printed, printed


def kill_often(folder, kills, seed):
    """Kills a run again and again, some steps after the checkpoint from which each start continued.

    Every other kill comes while a checkpoint is being written. Returns what the last start, which
    is left alone, printed.
    """
    rng = np.random.default_rng(seed)
    for number in range(kills):
        goal = saved_step(folder) + rng.integers(1, 9)
        begun = time.time()
        log = folder / "metrics.jsonl"

        def has_reached_goal(goal=goal, begun=begun, log=log):
            is_current = log.exists() and log.stat().st_mtime > begun
            return is_held(folder) or (is_current and last_step(folder) >= goal)

        start_and_kill(folder, rng, has_reached_goal, saving=number % 2 == 1)
    return start_and_finish(folder)


def test_killed_while_it_trains_and_while_it_saves(undisturbed, run_folder):
    kill_often(run_folder, 2, seed=0)
    assert outcome(run_folder) == undisturbed


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again(seed, undisturbed, run_folder):
    assert "resumed at step" in kill_often(run_folder, 5, seed + 1)
    assert outcome(run_folder) == undisturbed


@pytest.mark.faults
def test_killed_and_one_byte_flipped_of_the_latest_checkpoint(
    undisturbed, run_folder, mutated_files
):
    """Every file of a checkpoint gets its turn."""
    rng = np.random.default_rng(0)
    checkpoints = run_folder / "checkpoints"
    kills = max(mutated_files // 50, 2)
    flipped, moved = [], []

    def finish_and_check():
        assert "resumed at step" in start_and_finish(run_folder)
        assert outcome(run_folder) == undisturbed
        moved.extend(sorted(path.name for path in checkpoints.glob("corrupt-*")))

    for number in range(kills):
        if saved_step(run_folder) >= HOLD_AT - 15:  # too few checkpoints are left to be saved
            finish_and_check()
            shutil.rmtree(run_folder)
            go_file(run_folder).unlink()
        begun = time.time()

        def has_saved(begun=begun):
            """Whether this start has saved a checkpoint, and there is one before it."""
            complete = [path for path in checkpoints.glob("*") if path.name.isdecimal()]
            return len(complete) >= 2 and created(checkpoints / str(saved_step(run_folder))) > begun

        start_and_kill(run_folder, rng, has_saved, saving=number % 2 == 1)
        latest = checkpoints / str(saved_step(run_folder))
        files = sorted(path for path in latest.rglob("*") if path.is_file())
        file = files[np.random.default_rng(1).permutation(len(files))[number % len(files)]]
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        flipped.append(str(file.relative_to(checkpoints)))
    finish_and_check()
    print(f"{kills} kills, each with a flip: {flipped}; moved aside: {moved}")


@pytest.mark.parametrize("removed", ["folder", "lock"])
def test_a_folder_that_is_removed_while_it_trains(removed, run_folder):
    process = start(run_folder, hold_at=8)
    wait_for(lambda: is_held(run_folder), process)
    if removed == "folder":
        run_folder.rename(run_folder.with_name("moved"))
    else:
        (run_folder / ".lock").unlink()
    go_file(run_folder).touch()
    printed = finish(process, code=1)
    assert f"RunError: {run_folder}/.lock was removed while a run was using it" in printed


def test_terminated_it_saves_and_exits_with_75(undisturbed, run_folder):
    """Launchers and schedulers may send the signal more than once; the save goes on."""
    process = start(run_folder, hold_at=8)
    wait_for(lambda: is_held(run_folder), process)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    go_file(run_folder).touch()
    printed = finish(process, code=75)
    assert "stopped by a signal; step 8 is saved" in printed
    assert (run_folder / "checkpoints" / "8").is_dir()
    assert "resumed at step 8" in start_and_finish(run_folder)
    assert outcome(run_folder) == undisturbed


def test_interrupted_twice_it_stops_at_once_and_loses_no_checkpoint(undisturbed, run_folder):
    process = start(run_folder, hold_at=8)
    wait_for(lambda: is_held(run_folder), process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    go_file(run_folder).touch()
    wait_for(
        lambda: process.poll() is not None or saved_step(run_folder) == 8 or is_saving(run_folder)
    )
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode not in (0, None)
    assert "resumed at step" in start_and_finish(run_folder)
    assert outcome(run_folder) == undisturbed


def test_a_second_run_in_the_same_folder_is_refused(undisturbed, run_folder):
    first = start(run_folder)
    wait_for(lambda: last_step(run_folder) > 0, first)
    assert f"another process is training in {run_folder}" in finish(start(run_folder), code=1)
    go_file(run_folder).touch()
    finish(first)
    assert outcome(run_folder) == undisturbed


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(undisturbed, run_folder):
    process = start(run_folder, hold_at=12, killed=True)
    wait_for(lambda: saved_step(run_folder) >= 9 and is_held(run_folder), process)
    process.kill()
    process.communicate()
    latest = saved_step(run_folder)
    arrays = run_folder / "checkpoints" / str(latest) / "state"
    for file in arrays.rglob("d/*"):  # Orbax's files of arrays
        os.truncate(file, file.stat().st_size // 2)
    printed = start_and_finish(run_folder)
    assert f"the checkpoint of step {latest} is damaged" in printed
    assert f"resumed at step {latest - 3}" in printed
    assert outcome(run_folder) == undisturbed


def test_an_experiment_resumes_as_if_nothing_had_been(tmp_path):
    """The images are read from the step of the checkpoint on."""
    config = cifar.Config(
        depth=8,
        nonlocal_blocks=(),
        steps=6,
        batch_size=16,
        save_every=2,
        evaluate_every=6,
        output=tmp_path / "whole",
    )
    cifar.main(config)
    stopped = dataclasses.replace(config, output=tmp_path / "stopped")
    log = training.Run.log

    def log_and_signal(run, step, kind, values):
        log(run, step, kind, values)
        if step == 3 and kind == "train":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "log", log_and_signal)
        with pytest.raises(training.Stopped) as stop:
            cifar.main(stopped)
    assert stop.value.code == 75
    assert 3 <= stop.value.step <= 4
    cifar.main(stopped)
    assert outcome(tmp_path / "stopped", 6) == outcome(tmp_path / "whole", 6)


def test_another_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"depth": 32}))
    process = processes.start("--depth 20", tmp_path, module="experiments.cifar")
    printed = " ".join(finish(process, code=1).split())
    assert f"error: depth must be 32, as when the run in {tmp_path} started; got 20" in printed


def can_mount():
    """Whether this machine lets a test mount a file system of its own."""
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") and subprocess.run(mount).returncode == 0


FULL_DISK = """
import pathlib, subprocess, sys, time
disk, go, command = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
while not (disk / "run" / "held").exists():
    assert run.poll() is None, run.stdout.read()
    time.sleep(0.002)
with (disk / "filler").open("wb", buffering=0) as out:
    try:
        while out.write(bytes(4096)):
            pass
    except OSError:
        pass
go.touch()
printed, _ = run.communicate()
print("first:", run.returncode, printed, flush=True)
(disk / "filler").unlink()
second = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
print("second:", second.returncode, second.stdout, flush=True)
subprocess.run(["cp", "-r", str(disk / "run"), str(disk) + "-copy"], check=True)
"""


def test_a_disk_that_fills_up(undisturbed, tmp_path):
    if not can_mount():
        pytest.skip("mount namespaces are absent")
    disk, go = tmp_path / "disk", tmp_path / "go"
    disk.mkdir()
    options = f"--steps {STEPS} --hold-at 10"
    run = processes.command(options, disk / "run", "--hold-until", str(go))
    script = ["unshare", "-rm", sys.executable, "-c", FULL_DISK, str(disk), str(go), *run]
    environment = processes.environment(1)
    completed = subprocess.run(
        script, capture_output=True, text=True, timeout=2 * PATIENCE, env=environment
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    first, second = completed.stdout.split("second:")
    assert first.startswith("first: 1 "), first
    assert "No space left on device" in first
    assert second.startswith(" 0 "), second
    assert "resumed at step" in second
    assert outcome(tmp_path / "disk-copy") == undisturbed


def test_a_folder_that_cannot_be_written(run_folder):
    if not can_mount():
        pytest.skip("mount namespaces are absent")
    run_folder.mkdir()
    run = processes.command("", run_folder, module="experiments.cifar")
    script = f"mount -t tmpfs -o ro tmpfs {run_folder} && exec " + " ".join(run)
    completed = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=PATIENCE
    )
    assert completed.returncode == 1
    message = "must be a directory that can be written: Read-only file system"
    assert message in " ".join(completed.stderr.split())
