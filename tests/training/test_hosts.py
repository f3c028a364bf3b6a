"""Two real processes with two devices each, on loopback, train as one process does, and end together."""

import json
import shutil
import signal
import socket
import sys
import time

import chex
import jax
import numpy as np
import pytest
from training.processes import PATIENCE, command, finish, start, start_command
from training.split_over_hosts import rows as rows_of_split_training

from experiments import cifar
from nonlocal_jax import training

# With seed 0 a rounding turns a ReLU in step 6, on four devices of one process against one device too: 2e-5 at once.
OPTIONS = (
    "--depth 8 --nonlocal-blocks res2_0 --steps 10 --batch-size 16 --save-every 4 --evaluate-every 5 --precise-bn 2 "
    "--learning-rate 0.01 --seed 1"
)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_two(folder, *more):
    joint = [
        "--distributed",
        "--coordinator",
        f"127.0.0.1:{free_port()}",
        "--processes",
        "2",
        *more,
    ]
    return [start(OPTIONS, folder, *joint, "--process-id", str(i), devices=2) for i in range(2)]


def state_of(folder):
    """The last checkpoint's arrays, read by this process."""
    trainer = cifar.make_trainer(
        cifar.Config(depth=8, nonlocal_blocks=("res2_0",), steps=10, learning_rate=0.01), 10
    )
    example = {
        "inputs": np.zeros((1, 8, 8, 1), np.uint8),
        "labels": np.zeros(1, np.int32),
        "position": np.zeros(1, np.uint32),
    }
    checkpoints = training.Checkpoints(folder / "checkpoints")
    restored = checkpoints.restore(jax.eval_shape(trainer.init, jax.random.key(0), example))
    checkpoints.close()
    assert restored.step == 10
    return jax.device_get(restored.state), restored.record["metrics"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(start(OPTIONS, folder, devices=4))
    return state_of(folder)


def test_two_processes_equal_one(alone, tmp_path):
    folder = tmp_path / "run"
    printed = [finish(process) for process in start_two(folder, "--placement", "sharded")]
    assert "step 10: accuracy" in printed[0]
    assert "step 10: accuracy" not in printed[1]  # one writer
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 11))
    state, metrics = state_of(folder)
    chex.assert_trees_all_close(state, alone[0], rtol=1e-5, atol=1e-6)
    assert metrics["count"] == alone[1]["count"] == 450
    assert metrics["accuracy"] == pytest.approx(alone[1]["accuracy"], abs=1e-6)


@pytest.mark.parametrize("positions", [2, 4])
@pytest.mark.skipif(len(jax.devices()) < 4, reason="four devices are absent")
def test_positions_are_split_over_two_processes(positions):
    """Within each process, and over both."""
    address = f"127.0.0.1:{free_port()}"
    arguments = [sys.executable, "-m", "training.split_over_hosts", address, "2"]
    processes = [start_command([*arguments, str(i), str(positions)], devices=2) for i in range(2)]
    first, second = (json.loads(finish(process).splitlines()[-1]) for process in processes)
    assert first == second
    chex.assert_trees_all_close(first, rows_of_split_training(positions), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is absent")
def test_mpirun_needs_no_addresses(alone, tmp_path):
    folder = tmp_path / "run"
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]
    finish(start_command([*mpirun, *command(OPTIONS, folder, "--distributed")], devices=2))
    state, metrics = state_of(folder)
    chex.assert_trees_all_close(state, alone[0], rtol=1e-5, atol=1e-6)
    assert metrics["count"] == 450


def wait_for_steps(folder, processes, count):
    begun = time.monotonic()
    log = folder / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert time.monotonic() - begun < PATIENCE
        assert all(process.poll() is None for process in processes), [
            finish(process) for process in processes
        ]
        time.sleep(0.01)


def test_a_signal_to_one_stops_both_after_the_same_step(alone, tmp_path):
    folder = tmp_path / "run"
    processes = start_two(folder)
    wait_for_steps(folder, processes, 1)
    processes[1].send_signal(signal.SIGTERM)
    printed = [finish(process, 75) for process in processes]
    step = int(printed[0].split("stopped by a signal; step ")[1].split()[0])
    assert (folder / "checkpoints" / str(step)).is_dir()
    for process in start_two(folder):
        finish(process)
    chex.assert_trees_all_close(state_of(folder)[0], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_the_other_ends(killed, tmp_path):
    folder = tmp_path / "run"
    processes = start_two(folder, "--timeout", "20")
    wait_for_steps(folder, processes, 1)
    processes[killed].kill()
    begun = time.monotonic()
    _, code = processes[1 - killed].communicate(timeout=PATIENCE), processes[1 - killed].returncode
    assert code != 0
    assert time.monotonic() - begun < 60
    processes[killed].communicate()


def test_one_that_never_comes_is_not_waited_for_for_ever(tmp_path):
    joint = [
        "--distributed",
        "--coordinator",
        f"127.0.0.1:{free_port()}",
        "--processes",
        "2",
        "--process-id",
        "0",
        "--timeout",
        "5",
    ]
    begun = time.monotonic()
    process = start(OPTIONS, tmp_path, *joint)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert time.monotonic() - begun < 60
    assert "DEADLINE_EXCEEDED" in printed or "deadline" in printed.lower()


def test_a_refused_folder_is_refused_on_both(tmp_path):
    (tmp_path / "config.json").write_text('{"depth": 20}')
    for process in start_two(tmp_path):
        assert "depth is 8 now, and was 20" in finish(process, 1)


def test_half_an_address_is_an_error():
    with pytest.raises(ValueError, match="must be given together, or none of them"):
        training.initialize("localhost:1234")
