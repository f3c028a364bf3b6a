"""Two processes with two devices each, on loopback, train as one does, and end together."""

import json
import shutil
import signal
import socket
import sys

import chex
import jax
import pytest
from training import split_over_hosts
from training.networks import SmallVideo
from training.processes import PATIENCE, command, finish, last_step, start, start_command, wait_for
from training.small_run import parser, small_trainer, train

from nonlocal_jax import training

pytestmark = pytest.mark.processes
STEPS = 10
OPTIONS = f"--steps {STEPS} --save-every 4 --evaluate-every 5"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
needs_four = pytest.mark.skipif(len(jax.devices()) < 4, reason="four devices are absent")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def joint_options(process_id, port):
    address = f"--coordinator 127.0.0.1:{port} --processes 2 --process-id {process_id}"
    return ["--distributed", *address.split()]


def start_two(folder, *arguments, options=OPTIONS, module="training.small_run", killed=False):
    port = free_port()
    settings = {"devices": 2, "module": module, "killed": killed}
    return [
        start(options, folder, *joint_options(i, port), *arguments, **settings) for i in range(2)
    ]


def start_two_that_wait(folder, *arguments, killed=False):
    """Starts two processes that wait at a batch for a file, and waits until they do."""
    go = folder.parent / "go"
    hold = ["--hold-at", "5", "--hold-until", str(go)]
    processes = start_two(folder, *hold, *arguments, killed=killed)
    wait_for(lambda: last_step(folder) >= 3, *processes)
    return processes, go


def last_state(folder):
    """The last checkpoint's arrays and metrics, read by this process."""
    trainer = small_trainer()
    example = jax.tree.map(lambda x: x[:1], next(split_over_hosts.make_batches(1, channels=64)))
    checkpoints = training.Checkpoints(folder / "checkpoints")
    restored = checkpoints.restore(jax.eval_shape(trainer.init, jax.random.key(0), example))
    checkpoints.close()
    assert restored.step == STEPS
    return jax.device_get(restored.state), restored.record["metrics"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """State and metrics of one process with four devices: this one."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(parser().parse_args([*OPTIONS.split(), "--output", str(folder)]))
    return last_state(folder)


def assert_equal(folder, alone):
    state, metrics = last_state(folder)
    chex.assert_trees_all_close(state, alone[0], **CLOSE)
    assert metrics["count"] == alone[1]["count"] == 27
    assert metrics["accuracy"] == pytest.approx(alone[1]["accuracy"], abs=1e-6)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Folder and output of two processes that have trained to the end."""
    folder = tmp_path_factory.mktemp("together") / "run"
    return folder, [finish(process) for process in start_two(folder, "--placement", "sharded")]


@needs_four
def test_two_processes_equal_one(alone, together):
    folder, printed = together
    assert "step 10: accuracy" in printed[0]
    assert "step 10: accuracy" not in printed[1]  # one writer
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 11))
    assert_equal(folder, alone)


@needs_four
def test_a_file_that_only_one_process_reads_is_damaged(alone, together, tmp_path):
    """The other one can read its part, and takes the same checkpoint before."""
    folder = tmp_path / "run"
    shutil.copytree(together[0], folder)
    files = (folder / "checkpoints" / str(STEPS) / "state").rglob("d/*")
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    for process in start_two(folder, "--placement", "sharded"):
        printed = finish(process)
        assert f"the checkpoint of step {STEPS} is damaged" in printed
    assert (folder / "checkpoints" / f"corrupt-{STEPS}").is_dir()
    assert_equal(folder, alone)


@needs_four
def test_positions_are_split_over_two_processes():
    """Within each process, and over both; equal to a model whose positions are on one device."""
    arguments = [sys.executable, "-m", "training.split_over_hosts", f"127.0.0.1:{free_port()}", "2"]
    processes = [start_command([*arguments, str(i)], devices=2) for i in range(2)]
    first, second = (json.loads(finish(process).splitlines()[-1]) for process in processes)
    assert first == second
    mesh = training.make_mesh(devices=jax.devices()[:1])
    whole = split_over_hosts.rows(SmallVideo(conv=True), mesh)
    assert len(first) == len(split_over_hosts.POSITIONS)
    for rows in first:
        chex.assert_trees_all_close(rows, whole, **CLOSE)


@needs_four
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is absent")
def test_mpirun_needs_no_addresses(alone, tmp_path):
    folder = tmp_path / "run"
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]
    finish(start_command([*mpirun, *command(OPTIONS, folder, "--distributed")], devices=2))
    assert_equal(folder, alone)


@needs_four
def test_a_signal_to_one_stops_both_after_the_same_step(alone, tmp_path):
    folder = tmp_path / "run"
    processes, go = start_two_that_wait(folder, "--pause", "0.3")
    processes[1].send_signal(signal.SIGTERM)
    go.touch()
    printed = [finish(process, 75) for process in processes]
    step = int(printed[0].split("stopped by a signal; step ")[1].split()[0])
    assert (folder / "checkpoints" / str(step)).is_dir()
    for process in start_two(folder):
        finish(process)
    assert_equal(folder, alone)


@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_the_other_ends(killed, tmp_path):
    processes, go = start_two_that_wait(tmp_path / "run", "--timeout", "10", killed=True)
    processes[killed].kill()
    go.touch()
    survivor = processes[1 - killed]
    survivor.communicate(timeout=PATIENCE)
    assert survivor.returncode != 0
    processes[killed].communicate()


def test_one_that_never_comes_is_not_waited_for_forever(tmp_path):
    joint = joint_options(0, free_port())
    process = start("--timeout 5", tmp_path, *joint, module="experiments.cifar")
    printed = finish(process, 1)
    assert printed.startswith("error: all 2 processes must connect to 127.0.0.1:")
    assert "before the deadline, 5 s; missing: process 1. Start each" in " ".join(printed.split())


def test_different_numbers_of_processes_are_noticed(tmp_path):
    """As they are in threads, in tests of the rendezvous."""
    port, counts = free_port(), (2, 3)
    processes = []
    for i, count in enumerate(counts):
        joint = joint_options(i, port)
        joint[joint.index("--processes") + 1] = str(count)
        output = tmp_path / str(i)
        processes.append(start("--timeout 600", output, *joint, module="experiments.cifar"))
    for process in processes:
        printed = " ".join(finish(process, 1).split())
        message = f"process 0 was started with {counts[0]}, process 1 with {counts[1]}."
        assert printed.startswith("error: all processes must be started with the same number")
        assert printed.endswith(message)
    assert not list(tmp_path.iterdir())


def test_a_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        joint = joint_options(0, server.getsockname()[1])
        printed = finish(start("", tmp_path, *joint, module="experiments.cifar"), 1)
    assert printed.startswith("error: process 0 must be able to listen at port")
    assert "Address already in use" in printed


def test_addresses_without_distributed(tmp_path):
    _, *address = joint_options(0, free_port())
    printed = finish(start("", tmp_path, *address, module="experiments.cifar"), 1)
    assert "--coordinator, --processes and --process-id require --distributed" in printed


def test_a_refused_folder_is_refused_on_both(tmp_path):
    (tmp_path / "config.json").write_text('{"depth": 32}')
    processes = start_two(tmp_path, options="--depth 20 --timeout 600", module="experiments.cifar")
    printed = [finish(process, 1) for process in processes]
    assert all("depth must be 32" in text for text in printed)


def test_half_an_address_is_an_error():
    with pytest.raises(ValueError, match="must be passed together, or not at all"):
        training.initialize("localhost:1234")
