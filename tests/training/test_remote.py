"""A run in a remote directory: log, events, configuration and batches."""

import json
import time

import jax
import numpy as np
import pytest
import tensorboard.summary.writer.record_writer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.networks import make_batches, make_trainer

from nonlocal_jax import remote_paths, training
from nonlocal_jax.remote_paths import RemotePath
from nonlocal_jax.training import CheckpointError, Run, RunError, checkpoints, loop
from nonlocal_jax.training.checkpoints import Checkpoints

CONFIG = {"learning_rate": 0.1, "workers": 2}


def train(folder, steps):
    batches = list(make_batches(8))
    with Run(folder, CONFIG) as run:
        training.fit(
            make_trainer(),
            training.Options(steps, save_every=2, best=None),
            run,
            training.make_mesh(),
            lambda step: iter(batches[step:]),
            key=jax.random.key(0),
        )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder, local):
    """The steps and losses that TensorBoard shows for a remote directory."""
    for file in folder.glob("events.out.*"):
        file.download(local / file.name)
    accumulator = EventAccumulator(str(local)).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("train/loss")]


def test_each_step_is_once_in_the_log_however_the_run_ended(remote, tmp_path):
    with Run(str(remote), CONFIG) as run:
        run.open_log(0)
        for step in range(1, 8):
            run.log(step, "train", {"loss": float(step)})
        temporary = run.growing
    assert [row["step"] for row in rows(remote)] == [1, 2, 3, 4, 5, 6, 7]
    assert not temporary.exists()
    with Run(remote, CONFIG) as run:  # the checkpoint was of step 5
        run.open_log(5)
        run.log(6, "train", {"loss": 16.0})
    assert [row["loss"] for row in rows(remote)] == [1.0, 2.0, 3.0, 4.0, 5.0, 16.0]
    assert events(remote, tmp_path) == [*((step, step) for step in range(1, 6)), (6, 16.0)]
    assert json.loads((remote / "config.json").read_text()) == CONFIG


def test_what_grows_is_copied_when_asked(remote, monkeypatch):
    uploads = []
    original = RemotePath.upload

    def upload(self, file):
        uploads.append(self.name.split(".")[0])
        original(self, file)

    with Run(remote, CONFIG) as run:
        monkeypatch.setattr(RemotePath, "upload", upload)
        run.log(1, "train", {"loss": 1.0})
        (run.growing / "profile/plugins").mkdir(parents=True)
        (run.growing / "profile/plugins/trace.pb").write_bytes(b"trace")
        assert not (remote / "metrics.jsonl").exists()
        run.upload()
        assert uploads == ["events", "metrics", "trace"]
        assert len(rows(remote)) == 1
        assert (remote / "profile/plugins/trace.pb").read_bytes() == b"trace"
        uploads.clear()
        run.upload()
        assert uploads == []  # nothing has grown
        run.log(2, "train", {"loss": 1.0})
        run.upload()
        assert uploads == ["events", "metrics"]
        run.log(3, "train", {"loss": 1.0})
    assert len(rows(remote)) == 3


def test_events_that_are_still_in_the_queue_are_copied(remote, monkeypatch, tmp_path):
    """A thread of the writer writes them, later than `log` returns."""
    writer = tensorboard.summary.writer.record_writer.RecordWriter
    original = writer.write

    def write_late(self, data):
        time.sleep(0.1)
        original(self, data)

    monkeypatch.setattr(writer, "write", write_late)
    with Run(remote, CONFIG) as run:
        for step in range(1, 4):
            run.log(step, "train", {"loss": 1.0})
        run.upload()
        assert [step for step, _ in events(remote, tmp_path)] == [1, 2, 3]


def test_a_local_run_copies_nothing(tmp_path):
    with Run(tmp_path, CONFIG) as run:
        run.log(1, "train", {"loss": 1.0})
        assert run.growing == run.folder == tmp_path
        run.upload()
        assert len(rows(tmp_path)) == 1


def test_another_configuration_is_refused(remote):
    with Run(remote, CONFIG):
        pass
    with (
        pytest.raises(RunError, match=rf"learning_rate must be 0.1, as when the run in {remote}"),
        Run(remote, CONFIG | {"learning_rate": 0.2}),
    ):
        pass
    with Run(remote, CONFIG | {"workers": 3}, may_differ=("workers",)):
        pass


def test_a_directory_that_cannot_be_reached():
    with (
        pytest.raises(RunError, match=r"unreachable://bucket/run must be a directory .* no conn"),
        Run("unreachable://bucket/run", CONFIG),
    ):
        pass


def failing_upload(self, file):
    raise OSError(5, "no connection", str(self))


def test_a_log_that_cannot_be_copied(remote, monkeypatch, caplog):
    def stop(error=None):
        with monkeypatch.context() as patch, Run(remote, CONFIG) as run:
            (run.growing / "profile.pb").write_bytes(b"trace")
            patch.setattr(RemotePath, "upload", failing_upload)
            if error:
                raise error

    with pytest.raises(RunError, match=r"profile.pb cannot be written: no connection\."):
        stop()
    with pytest.raises(KeyError):  # what ended the run is reported, not what followed
        stop(KeyError)
    assert "profile.pb cannot be written: no connection." in caplog.text


def test_a_batch_that_is_not_finite(remote, tmp_path):
    batch = {"inputs": np.arange(6.0).reshape(2, 3), "nested": {"labels": np.arange(2)}}
    with Run(remote, CONFIG) as run:
        file = run.keep_batch(7, batch, {"loss": float("nan")})
    assert file == remote / "nonfinite/step-7-process-0.npz"
    file.download(tmp_path / "batch.npz")
    with np.load(tmp_path / "batch.npz") as stored:
        np.testing.assert_array_equal(stored["inputs"], batch["inputs"])
        np.testing.assert_array_equal(stored["nested/labels"], batch["nested"]["labels"])
    assert json.loads(file.with_suffix(".json").read_text()) == {"step": 7, "loss": "nan"}


def test_the_log_is_copied_before_each_checkpoint(tmp_path, monkeypatch):
    """After a kill, the log then has every step of the checkpoint from which the run resumes."""
    calls = []
    original = Checkpoints.save

    def save(self, step, *arguments):
        calls.append(step)
        original(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(Run, "upload", lambda self: calls.append("upload"))
    train(tmp_path, steps=4)
    assert calls == ["upload", 2, "upload", 4, "upload"]


def test_checkpoints_where_orbax_cannot_write(remote):
    with pytest.raises(CheckpointError, match=rf"local directory or at gs://.*; got {remote}\."):
        Checkpoints(remote)


def test_checkpoints_get_the_whole_url(remote, monkeypatch):
    """Not a `pathlib.Path`, which drops a slash, and which would be a local directory."""
    directories = []

    def manager(directory, **options):
        directories.append(directory)

    monkeypatch.setattr(remote_paths, "ORBAX_PROTOCOLS", ("memory",))
    monkeypatch.setattr(checkpoints.ocp, "CheckpointManager", manager)
    Checkpoints(str(remote / "checkpoints"))
    assert directories == [f"{remote}/checkpoints"]


def test_a_resumed_run(remote, monkeypatch, tmp_path):
    """With local checkpoints, since Orbax can write to no remote path that the tests have."""

    def local_checkpoints(folder, *arguments):
        assert folder == remote / "checkpoints"
        return Checkpoints(tmp_path / "checkpoints", *arguments)

    monkeypatch.setattr(loop, "Checkpoints", local_checkpoints)
    train(remote, steps=4)
    train(remote, steps=8)
    assert [row["step"] for row in rows(remote)] == list(range(1, 9))
    assert [step for step, _ in events(remote, tmp_path)] == list(range(1, 9))
