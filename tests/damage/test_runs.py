"""Damaged files of a run: a run goes on from an intact checkpoint, or a documented error names the
file.
"""

import collections
import errno
import gc
import itertools
import json
import os
import pathlib
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from damage.mutation import outcomes
from etils import epath
from orbax.checkpoint import StandardCheckpointHandler

from experiments.shared import results
from nonlocal_jax import training
from nonlocal_jax.training import CheckpointError, Checkpoints, Run, RunError

# What Orbax leaves behind when it finds a damaged file itself.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SCORES = {1: 0.1, 2: 0.2, 3: 0.3}


def state(step):
    return {"kernel": step * jnp.arange(12.0).reshape(3, 4), "step": jnp.int32(step)}


def save(checkpoints, step):
    metrics = {"loss": 1 / step, "accuracy": SCORES[step], "count": 27.0}
    checkpoints.save(step, state(step), {"seconds": step / 2}, metrics)
    checkpoints.wait()


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A directory of checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("intact") / "checkpoints"
    checkpoints = Checkpoints(folder, best="accuracy")
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.close()
    return folder


@pytest.fixture
def copied(intact, tmp_path):
    """Returns a function that makes a new copy of the intact directory."""

    def copy():
        folder = tmp_path / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(intact, folder)

    yield copy
    gc.collect()  # so that what Orbax leaves behind is reported while this test ignores it


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def resume(folder):
    """Restores, saves the steps that follow, and returns the step that was restored."""
    checkpoints = Checkpoints(folder, best="accuracy")
    try:
        restored = checkpoints.restore(state(0))
        np.testing.assert_array_equal(restored.state["kernel"], state(restored.step)["kernel"])
        assert restored.record == {"seconds": restored.step / 2}
        for step in range(restored.step + 1, 4):
            save(checkpoints, step)
        assert checkpoints.steps[-1] == 3
    finally:
        checkpoints.close()
    moved = sorted(path.name for path in folder.iterdir() if path.name.startswith("corrupt"))
    assert moved == (["corrupt-2"] if restored.step == 1 else [])
    return restored.step


def replace_by_folder(file):
    file.unlink()
    file.mkdir()


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: os.truncate(file, 0),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a flipped bit": flip,
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_file_of_a_checkpoint(damage, copied, intact):
    steps = {}
    for file in files_of(intact / "2"):
        folder = copied()
        DAMAGE[damage](folder / "2" / file)
        steps[file.as_posix()] = resume(folder)
    # Without digests, only what Orbax reads would be noticed.
    assert steps["record/metadata"] == steps["metrics/metrics"] == 1
    if damage != "missing":
        assert steps["state/_METADATA"] == 1


def read_metrics(folder):
    return json.loads((folder / "2/metrics/metrics").read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": 0.0},
        {"accuracy": float("nan")},
        {"accuracy": None},
        {"accuracy": "0.2"},
        {"accuracy": 10**400},
        {"loss": 0.4},
        {"accurabz": 0.2},
    ],
)
def test_a_changed_metric_is_noticed(change, copied, caplog):
    folder = copied()
    file = folder / "2/metrics/metrics"
    file.write_text(json.dumps(read_metrics(folder) | change))
    assert resume(folder) == 1
    assert "the checkpoint of step 2 is damaged: its metrics changed on the disk" in caplog.text
    assert str(file) in caplog.text


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"accuracy": 0.9}', b"[" * 10_000])
def test_damaged_metrics_do_not_decide_what_is_kept(content, copied):
    """Also without `restore`: the damaged checkpoint is not deleted until it is reported."""
    folder = copied()
    (folder / "1/metrics/metrics").write_bytes(content)
    checkpoints = Checkpoints(folder, keep=1, best="accuracy")
    save(checkpoints, 3)
    assert checkpoints.steps == [1, 3]
    checkpoints.close()


def test_a_damaged_older_checkpoint_is_moved_aside(copied, caplog):
    folder = copied()
    (folder / "1/metrics/metrics").write_text("{")
    checkpoints = Checkpoints(folder, best="accuracy")
    assert checkpoints.restore(state(0)).step == 2
    assert checkpoints.steps == [2]
    checkpoints.close()
    assert (folder / "corrupt-1").is_dir()
    assert "the checkpoint of step 1 is damaged" in caplog.text


@pytest.mark.parametrize("kind", ["file", "empty folder", "broken link"])
def test_a_checkpoint_that_is_not_one(kind, copied, caplog):
    folder = copied()
    shutil.rmtree(folder / "2")
    if kind == "file":
        (folder / "2").write_text("text")
    elif kind == "empty folder":
        (folder / "2").mkdir()
    else:
        (folder / "2").symlink_to("nowhere")
    assert resume(folder) == 1
    assert "the checkpoint of step 2 is damaged" in caplog.text
    assert kind != "file" or (folder / "corrupt-2").read_text() == "text"


@pytest.mark.parametrize("part", ["state", "record", "metrics"])
@pytest.mark.parametrize("is_file", [False, True])
def test_a_part_that_is_missing_or_a_file(part, is_file, copied):
    folder = copied()
    shutil.rmtree(folder / "2" / part)
    if is_file:
        (folder / "2" / part).touch()
    assert resume(folder) == 1


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("is_file", [False, True])
def test_what_a_killed_save_leaves(step, is_file, copied):
    folder = copied()
    left = folder / f"{step}.orbax-checkpoint-tmp"
    if is_file:
        left.touch()
    else:
        shutil.copytree(folder / "1", left)
        shutil.rmtree(left / "state")
    assert resume(folder) == 2
    assert not left.is_dir()


TENSORSTORE = "Error opening \"zarr\" driver: Failed to read: Error [os_error_code='{}'] [spec='']"
SYSTEM_ERRORS = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    PermissionError(errno.EACCES, "Permission denied"),
    TimeoutError(),
    ConnectionResetError("the connection was reset"),
]
OTHER_ERRORS = [  # of the packages that read arrays
    MemoryError(),
    ValueError("UNAVAILABLE: " + TENSORSTORE.format(errno.ECONNRESET)),
    ValueError("UNKNOWN: " + TENSORSTORE.format(errno.EIO)),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."),
]


def raising(error):
    def read(*arguments, **options):
        raise error

    return read


@pytest.mark.parametrize(
    ("part", "error"),
    [
        *itertools.product(["state"], SYSTEM_ERRORS + OTHER_ERRORS),
        *itertools.product(["record", "metrics"], SYSTEM_ERRORS),
    ],
    ids=repr,
)
def test_files_that_cannot_be_reached_are_not_damaged(part, error, copied, monkeypatch):
    """Also not where they are only looked at, when the directory is opened."""
    folder = copied()
    before = sorted(folder.rglob("*"))
    if part == "state":
        monkeypatch.setattr(StandardCheckpointHandler, "restore", raising(error))
    else:
        original = pathlib.Path.read_text

        def read_text(path, *arguments, **options):
            if path.parent == folder / "2" / part:
                raise error
            return original(path, *arguments, **options)

        monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    message = rf"{folder}/2/{part}.* cannot be read \({type(error).__name__}: .*It may be intact"
    with pytest.raises(CheckpointError, match=message) as raised:
        resume(folder)
    assert raised.value.__cause__ is error
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR])
def test_files_that_are_missing_or_folders_are_damaged(code, copied, monkeypatch):
    original = StandardCheckpointHandler.restore

    def restore(self, folder, *arguments, **options):
        if folder.parent.name == "2":
            raise ValueError("FAILED_PRECONDITION: " + TENSORSTORE.format(code))
        return original(self, folder, *arguments, **options)

    monkeypatch.setattr(StandardCheckpointHandler, "restore", restore)
    assert resume(copied()) == 1


def test_only_damaged_checkpoints_are_an_error(copied):
    folder = copied()
    for step in (1, 2):
        (folder / str(step) / "metrics/metrics").write_bytes(b"\xff")
    checkpoints = Checkpoints(folder, best="accuracy")
    with pytest.raises(CheckpointError, match=rf"no checkpoint in {folder} can be trusted"):
        checkpoints.restore(state(0))
    checkpoints.close()
    assert checkpoints.steps == [1, 2]


def test_a_damaged_checkpoint_that_cannot_be_moved(copied, monkeypatch):
    folder = copied()
    (folder / "2/record/metadata").write_text("{")
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(type(epath.Path(folder)), "rename", raising(error))
    message = r"/2 cannot be moved to .*/corrupt-2: Permission denied\. Move it away"
    with pytest.raises(CheckpointError, match=message):
        resume(folder)


def test_all_processes_learn_that_a_damaged_checkpoint_cannot_be_moved(copied, monkeypatch):
    """This process is not the one that moves it."""
    folder = copied()
    (folder / "2/record/metadata").write_text("{")
    checkpoints = Checkpoints(folder, best="accuracy")
    module = training.checkpoints
    own_messages = []

    def broadcast_message(message):
        own_messages.append(message)
        return "the damaged checkpoint cannot be moved"

    with monkeypatch.context() as patch:
        patch.setattr(module.jax, "process_index", lambda: 1)
        patch.setattr(module, "broadcast_message", broadcast_message)
        patch.setattr(checkpoints, "_rename", None)
        with pytest.raises(CheckpointError, match="the damaged checkpoint cannot be moved"):
            checkpoints.restore(state(0))
    assert own_messages == [None]
    checkpoints.close()


def test_the_hook_for_errors_that_cannot_be_raised_is_removed(copied):
    previous = sys.unraisablehook
    for file in ("state/_METADATA", "state/manifest.ocdbt"):
        folder = copied()
        flip(folder / "2" / file)
        assert resume(folder) == 1
        assert sys.unraisablehook is previous


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"checkpoints must be a directory of checkpoints"):
        Checkpoints(tmp_path / "checkpoints", best="accuracy")


def test_checkpoints_of_earlier_versions(copied, caplog):
    """Their records do not have the metrics."""
    from nonlocal_jax.training import checkpoint_record

    def without_metrics(folder):
        for step in (1, 2):
            file = folder / str(step) / "record/metadata"
            content = checkpoint_record.unseal(json.loads(file.read_text()))
            del content["metrics"]
            file.write_text(json.dumps(checkpoint_record.seal(content)))
        return folder

    folder = without_metrics(copied())
    checkpoints = Checkpoints(folder, keep=1, best="accuracy")
    assert checkpoints.restore(state(0)).step == 2
    checkpoints.save(3, state(3), {}, {"accuracy": 0.15})
    checkpoints.wait()
    assert checkpoints.steps == [2, 3]  # step 2 is still the best
    checkpoints.close()
    assert not caplog.records
    folder = without_metrics(copied())
    (folder / "2/metrics/metrics").write_text("{")
    assert resume(folder) == 1
    folder = without_metrics(copied())
    shutil.rmtree(folder / "2/metrics")  # as of a run that kept no best checkpoint
    assert resume(folder) == 2


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "text",
        {"text": 1, "sha256": ""},
        {"text": "\ud800", "sha256": ""},
        {"text": "[", "sha256": None},
    ],
)
def test_a_record_that_is_something_else(content, copied):
    folder = copied()
    (folder / "2/record/metadata").write_text(json.dumps(content))
    assert resume(folder) == 1


def test_mutated_checkpoints(copied, intact, tmp_path, mutated_files):
    """A damaged checkpoint is never an error while the one before is intact."""
    files = files_of(intact / "2")
    count = max(mutated_files // 10 // len(files), 1)
    found = collections.Counter()
    for number, file in enumerate(files):

        def read(mutated, file=file):
            folder = copied()
            shutil.copyfile(mutated, folder / "2" / file)
            found[resume(folder)] += 1

        data = (intact / "2" / file).read_bytes()
        outcomes(read, tmp_path / file.name, data, count, (), seed=number)
    print(f"restored steps of {found.total()} mutated checkpoints: {dict(found)}")
    assert found[1]


CONFIG = {"learning_rate": 0.1, "model": {"depth": 20, "blocks": ["res2_1"]}, "name": "größer"}


def test_mutated_configurations(tmp_path, mutated_files):
    def enter(file):
        with Run(file.parent, CONFIG):
            pass

    data = json.dumps(CONFIG, indent=2).encode()
    found = outcomes(enter, tmp_path / "config.json", data, mutated_files, (RunError,))
    print(f"configurations: {dict(found)}")
    assert found["RunError"] > mutated_files / 3


LOG = "".join(
    json.dumps({"step": step, "kind": kind, "loss": 1 / step, "accuracy": 0.5}) + "\n"
    for step in range(1, 8)
    for kind in ("train", "evaluation")
)


def test_mutated_logs_are_continued(tmp_path, mutated_files):
    def go_on(file):
        with Run(file.parent, CONFIG) as run:
            run.open_log(5)
            run.log(6, "train", {"loss": 0.1})
        steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
        assert steps[-1] == 6
        assert all(step <= 5 for step in steps[:-1])
        for events in file.parent.glob("events.out.*"):
            events.unlink()

    found = outcomes(go_on, tmp_path / "metrics.jsonl", LOG.encode(), mutated_files, (RunError,))
    print(f"continued logs: {dict(found)}")
    assert found["read"] == mutated_files


def test_mutated_logs_are_read(tmp_path, mutated_files):
    def read(file):
        for kind in ("train", "evaluation"):
            for row in results.read_log(file.parent, kind, ("loss", "accuracy")):
                assert isinstance(row["step"], int)
                float(row["loss"]), float(row["accuracy"])

    found = outcomes(read, tmp_path / "metrics.jsonl", LOG.encode(), mutated_files, (ValueError,))
    print(f"logs: {dict(found)}")
    assert found["ValueError"] > mutated_files / 3


RESULTS = {
    "command": "train",
    "hardware": "a device",
    "data": "digits",
    "parameters": 1234,
    "steps": 10,
    "seconds": 5.0,
    "metrics": {"accuracy": 0.9, "loss": 0.1},
}


@pytest.mark.parametrize("name", ["results.json", "config.json"])
def test_mutated_results(name, tmp_path, mutated_files):
    contents = {"results.json": RESULTS, "config.json": {**CONFIG, "seed": 0}}
    for other, content in contents.items():
        (tmp_path / other).write_text(json.dumps(content))

    def read(file):
        results.table([results.read(file.parent), results.read(file.parent)])

    data = json.dumps(contents[name]).encode()
    found = outcomes(read, tmp_path / name, data, mutated_files, (ValueError,))
    print(f"{name}: {dict(found)}")
    assert found["ValueError"] > mutated_files / 3
