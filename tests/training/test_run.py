"""A run's directory has one owner, one configuration, and a log in which each step is once."""

import errno
import json
import os
import shutil
import subprocess
import sys

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from training.processes import PATIENCE

from nonlocal_jax.training import Run, RunError, Stopped
from nonlocal_jax.training import run as run_module

CONFIG = {"learning_rate": 0.1, "model": {"depth": 20, "blocks": ["res2_1"]}, "workers": 2}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


ENTER_RUN = """
import pathlib, sys
from nonlocal_jax.training import Run
Run(pathlib.Path(sys.argv[1]), {}).__enter__()
"""


@pytest.mark.processes
def test_a_second_process_is_refused(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", ENTER_RUN, str(folder)]
    with Run(folder, {}):
        second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert second.returncode == 1
        message = f"another process is training in {folder}; wait for it, or use another directory."
        assert message in second.stderr
    with Run(folder, {}):
        pass


def test_a_run_in_this_process_is_refused_too(tmp_path):
    with (
        Run(tmp_path, {}),
        pytest.raises(RunError, match="another process is training"),
        Run(tmp_path, {}),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"learning_rate": 0.2},
            r"learning_rate must be 0.1, as when the run in .* started; got 0.2",
        ),
        ({"model": {"depth": 32, "blocks": ["res2_1"]}}, r"model.depth must be 20, .*; got 32"),
        (
            {"model": {"depth": 20, "blocks": []}},
            r"model.blocks must be \['res2_1'\], .*; got \[\]",
        ),
        ({"new": 1}, r"new must be None, .*; got 1"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_changed(change, message, tmp_path):
    with Run(tmp_path, CONFIG):
        pass
    with pytest.raises(RunError, match=message), Run(tmp_path, CONFIG | change):
        pass
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    # The directory is free again.
    with Run(tmp_path, CONFIG | {"workers": 5}, may_differ=("workers",)):
        pass


def test_a_configuration_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text('{"learning')
    with pytest.raises(RunError, match=r"config.json must be JSON; got "), Run(tmp_path, CONFIG):
        pass


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"must be a directory that can be written: Not a directory"),
        Run(tmp_path / "file" / "a", {}),
    ):
        pass


def test_each_step_is_once_in_the_log_however_the_run_ended(tmp_path):
    with Run(tmp_path, CONFIG) as run:
        run.open_log(0)
        for step in range(1, 8):
            run.log(step, "train", {"loss": 1 / step})
        run.log(4, "evaluation", {"accuracy": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 8, "kind": "tr')  # as a kill while writing leaves it
    with Run(tmp_path, CONFIG) as run:  # the checkpoint was of step 5
        run.open_log(5)
        for step in (6, 7):
            run.log(step, "train", {"loss": 10.0 + step})
    steps = [row["step"] for row in rows(tmp_path) if row["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in rows(tmp_path) if row["step"] > 5] == [16.0, 17.0]
    assert {"step": 4, "kind": "evaluation", "accuracy": 0.5} in rows(tmp_path)


def test_tensorboard_reads_the_same(tmp_path):
    with Run(tmp_path, CONFIG) as run:
        run.open_log(0)
        for step in range(1, 6):
            run.log(step, "train", {"loss": 1 / step})
        run.log(5, "evaluation", {"accuracy": 0.5})
    with Run(tmp_path, CONFIG) as run:
        run.open_log(3)
        run.log(4, "train", {"loss": 40.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "evaluation/accuracy"}
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert loss == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 40.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 10_000, "must be JSON; got "),
        (b"\xff{}", "must be JSON; got "),
        (b"", "must be JSON; got "),
        (b"[1]", r"must be a JSON object; got \[1\]"),
        (b"null", "must be a JSON object; got None"),
        (b'{"a\\u001b[2J": 1}', r"a\\x1b\[2J must be 1, as when the run in .*config.json"),
        (b'{"a": "\\ud800"}', r"a must be \\ud800, as when"),
    ],
)
def test_a_damaged_configuration(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(RunError, match=message), Run(tmp_path, {}):
        pass
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json must be a file that can be read: Is a directory"),
        ("metrics.jsonl", "metrics.jsonl must be a file, the log of the run"),
        (".lock", "must be a directory that can be written: Is a directory"),
    ],
)
def test_a_folder_in_place_of_a_file(name, message, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(RunError, match=message), Run(tmp_path, CONFIG):
        pass


def test_a_file_in_place_of_the_checkpoints(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunError, match="checkpoints must be a directory"), Run(tmp_path, CONFIG):
        pass
    (tmp_path / "checkpoints").unlink()
    with Run(tmp_path, CONFIG):  # the directory is free again
        pass


@pytest.mark.parametrize(
    "row", ["[" * 10_000, '{"step": ' + "9" * 4000 + "}", '{"step": 1e999}', "[]", '{"step": "1"}']
)
def test_rows_that_are_damaged_are_dropped(row, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{row}\n{{"step": 1, "kind": "train"}}\n{row}')
    with Run(tmp_path, CONFIG) as run:
        run.open_log(1)
    assert rows(tmp_path) == [{"step": 1, "kind": "train"}]


REMOVALS = {
    "folder": shutil.rmtree,
    "lock": lambda folder: (folder / ".lock").unlink(),
    "log": lambda folder: (folder / "metrics.jsonl").unlink(),
    "moved": lambda folder: folder.rename(folder.with_name("moved")),
}


def put_back(folder):
    """Makes the files again, as another run in the directory would."""
    folder.mkdir(exist_ok=True)
    for name in (".lock", "metrics.jsonl"):
        (folder / name).touch()


def log_and_remove(run, remove):
    run.log(1, "train", {"loss": 1.0})
    run._events.flush()  # a thread writes them, and would create its file again
    remove(run.folder)


@pytest.mark.parametrize(
    ("removed", "is_made_again"),
    [*((name, False) for name in REMOVALS), ("folder", True), ("lock", True), ("log", True)],
)
def test_a_removed_folder_is_an_error_at_the_next_step(removed, is_made_again, tmp_path):
    folder = tmp_path / "run"

    def train():
        with Run(folder, CONFIG) as run:
            log_and_remove(run, REMOVALS[removed])
            if is_made_again:
                put_back(folder)
            run.log(2, "train", {"loss": 1.0})

    with pytest.raises(RunError, match=rf"{folder}/.* was removed while a run was using it"):
        train()


@pytest.mark.parametrize("links", [0, 1, 2])
def test_the_number_of_links_does_not_matter(links, tmp_path, monkeypatch):
    """FUSE file systems may report any."""
    original = os.fstat

    def fstat(descriptor):
        status = list(original(descriptor))
        status[3] = links
        return os.stat_result(status)

    def train():
        with Run(tmp_path, CONFIG) as run:
            monkeypatch.setattr(os, "fstat", fstat)  # not earlier: filelock relies on the number
            run.log(1, "train", {"loss": 1.0})
            run.log(2, "train", {"loss": 1.0})
            (tmp_path / "metrics.jsonl").unlink()
            (tmp_path / "metrics.jsonl").touch()
            run.log(3, "train", {"loss": 1.0})

    with pytest.raises(RunError, match=r"metrics.jsonl was removed"):
        train()


def open_files():
    return sorted(file.path for file in psutil.Process().open_files())


def fail(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "failing",
    [
        (event_file_writer.EventFileWriter, "__init__"),
        (event_file_writer.EventFileWriter, "close"),
        (run_module, "check_config"),
    ],
    ids=lambda failing: failing[1],
)
def test_a_run_that_fails_leaves_no_file_open(failing, tmp_path, monkeypatch):
    def train():
        with Run(tmp_path, {}) as run:
            run.log(1, "train", {"loss": 1.0})
            run._events._async_writer.close()  # as the `close` that fails would have done

    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(*failing, fail)
        with pytest.raises((RunError, OSError), match="No space left"):
            train()
    assert open_files() == before
    with Run(tmp_path, {}):  # the directory is free again
        pass


def test_a_run_is_entered_and_its_log_opened_again(tmp_path):
    before = open_files()
    run = Run(tmp_path, CONFIG)
    for step in (1, 2):
        with run:
            run.open_log(step - 1)
            run.open_log(step - 1)
            run.log(step, "train", {"loss": 1.0})
    assert open_files() == before
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize("error", [None, OSError("what followed"), Stopped(3)])
def test_a_folder_removed_after_the_last_step(error, tmp_path):
    folder = tmp_path / "run"

    def train():
        with Run(folder, CONFIG) as run:
            log_and_remove(run, shutil.rmtree)
            if error is not None:
                raise error

    with pytest.raises(RunError, match="was removed") as raised:
        train()
    assert raised.value.__cause__ is error
