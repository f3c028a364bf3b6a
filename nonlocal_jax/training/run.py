"""The directory of one run, which one process at a time owns and one configuration describes.

config.json      what was asked for; a run resumes only with the same
metrics.jsonl    one row a step, one an evaluation; each step once, however often the run was killed
events.out.*     the same for TensorBoard
checkpoints/     see `nonlocal_jax.training.checkpoints`
nonfinite/       the batch at which the loss or the gradient stopped being finite
profile/         for TensorBoard's profiler, or https://ui.perfetto.dev

The directory may be remote, such as gs://bucket/run. Object stores can neither append nor lock, so
the log, TensorBoard's events and the profile are written to a temporary local directory, which is
copied before every checkpoint and at the end. Nothing keeps two runs out of one remote directory.
"""

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from nonlocal_jax import files
from nonlocal_jax.lazy import extra
from nonlocal_jax.training.distributed import broadcast_message

with extra("experiments"):
    from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


class RunError(Exception):
    """A directory cannot be used for this run; the message says why."""


class Run:
    """Context manager that owns a run's directory.

    Attributes:
        folder: Absolute path of the directory.
        growing: Directory of the files that grow, set by `with`: `folder`, or a temporary local
            directory if that is remote.
        config: Configuration, as JSON holds it.
        writes: Whether this process writes the log: process 0 does.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Run(folder, {"learning_rate": 0.1}) as run:
    ...     run.log(1, "train", {"loss": 2.5})
    >>> json.loads((folder / "metrics.jsonl").read_text())
    {'step': 1, 'kind': 'train', 'loss': 2.5}
    """

    def __init__(
        self, folder: files.PathLike, config: Mapping[str, Any], may_differ: tuple[str, ...] = ()
    ) -> None:
        """Does not access the directory until `with`.

        Args:
            folder: Directory of the run, which is created if it does not exist.
            config: Configuration. What JSON cannot hold is stored as a string.
            may_differ: Names of the configuration that may change from one start to the next.
        """
        self.folder = files.as_path(folder).absolute()
        self.growing: Path
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._uploaded: dict[Path, tuple[int, int]] = {}  # size and time of what was copied
        self._lock = None
        if isinstance(self.folder, Path):
            self._lock = FileLock(self.folder / ".lock", timeout=0)
        self.config = json.loads(json.dumps(config, default=str))
        self.may_differ = may_differ
        self.writes = jax.process_index() == 0
        self._log_file: Any = None
        self._events: Any = None

    def __enter__(self) -> "Run":
        """Locks the directory.

        Raises:
            RunError: If another process uses it, it belongs to another configuration, or it cannot
                be written.
        """
        # Every process must raise if process 0 does, or the others would wait for it forever.
        problem = broadcast_message(self._acquire() if self.writes else None)
        if problem:
            raise RunError(problem)
        if isinstance(self.folder, Path):
            self.growing = self.folder
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="run-")
            self.growing = Path(self._temporary.name)
        return self

    def _acquire(self) -> str | None:
        """Locks and checks the directory; returns what is wrong, if anything."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock is not None:
                self._lock.acquire()
            self._check_config()
        except Timeout:
            return (
                f"another process is training in {self.folder}; wait for it, or use another "
                "directory."
            )
        except OSError as error:
            reason = error.strerror or error
            return f"{self.folder} must be a directory that can be written: {reason}."
        except RunError as error:
            self._release()
            return str(error)
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._log_file, self._events):
            if file is not None:
                file.close()
        self._events = None  # a closed one cannot be flushed
        if self._temporary is not None:
            try:
                self.upload()
            except RunError as upload_error:
                if error is None:
                    raise
                logger.warning("%s", upload_error)  # what ended the run is the error to report
            finally:
                self._temporary.cleanup()
        if self.writes:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def upload(self) -> None:
        """Copies the files that grow to a remote directory; does nothing if it is local.

        Raises:
            RunError: If a file cannot be written.
        """
        if isinstance(self.folder, Path):
            return
        if self._events is not None:
            self._events.flush()  # waits for the thread that writes them
        for file in sorted(self.growing.rglob("*")):
            status = file.stat()
            version = status.st_size, status.st_mtime_ns
            if not file.is_file() or self._uploaded.get(file) == version:
                continue
            target = self.folder / file.relative_to(self.growing).as_posix()
            try:
                target.upload(file)
            except OSError as error:
                raise RunError(f"{target} cannot be written: {error.strerror}.") from error
            self._uploaded[file] = version

    def _check_config(self) -> None:
        file = self.folder / "config.json"
        if file.exists():
            try:
                stored = json.loads(file.read_text())
            except ValueError as error:
                raise RunError(
                    f"{file} must be JSON; got {error}. Repair it, or use another directory."
                ) from error
            for name in _differences(stored, self.config):
                if name.split(".")[0] not in self.may_differ:
                    raise RunError(
                        f"{name} must be {_value(stored, name)}, as when the run in {self.folder} "
                        f"started; got {_value(self.config, name)}. Change it back, or use another "
                        "directory."
                    )
        files.write_text(file, json.dumps(self.config, indent=2) + "\n")

    def open_log(self, step: int) -> None:
        """Continues the log after `step`; rows of later steps and half-written rows are dropped."""
        if not self.writes:
            return
        # TensorBoard takes a second to import, and only process 0 needs it.
        with extra("experiments"):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

        stored, file = self.folder / "metrics.jsonl", self.growing / "metrics.jsonl"
        if stored.exists():
            lines = stored.read_text(errors="replace").splitlines()
            kept = [line + "\n" for line in lines if _step_of_row(line) <= step]
            files.write_text(file, "".join(kept))
        self._log_file = file.open("a")
        self._events = EventFileWriter(str(self.growing))
        # This event makes TensorBoard drop the points that it has of later steps.
        restart = SessionLog(status=SessionLog.START)
        self._events.add_event(Event(wall_time=time.time(), step=step + 1, session_log=restart))

    def log(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Appends a row to the log.

        Args:
            step: Number of updates made.
            kind: "train" or "evaluation".
            values: Metrics.

        Raises:
            RunError: If the log cannot be written.
        """
        if not self.writes:
            return
        if self._log_file is None:
            self.open_log(step - 1)
        try:
            self._log_file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            self._log_file.flush()
        except OSError as error:
            raise RunError(
                f"the log in {self.folder} cannot be written: {error.strerror}."
            ) from error
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [
            Summary.Value(tag=f"{kind}/{name}", simple_value=value)
            for name, value in values.items()
        ]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=points))
        self._events.add_event(event)

    def keep_batch(self, step: int, batch: Any, values: Mapping[str, float]) -> files.AnyPath:
        """Saves the batch, or this process's rows of it, whose step was not finite.

        Args:
            step: Number of updates made, this one included.
            batch: Tree of arrays; nested names are joined by "/".
            values: Metrics of the step, which are saved as JSON.

        Returns:
            The file.
        """
        file = self.folder / "nonfinite" / f"step-{step}-process-{jax.process_index()}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        }
        with files.atomic_write(file) as partial, partial.open("wb") as stream:
            np.savez(stream, **arrays)
        row = {"step": step, **{name: str(value) for name, value in values.items()}}
        file.with_suffix(".json").write_text(json.dumps(row) + "\n")
        return file


def _step_of_row(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a row that a kill cut off
        return float("inf")


def _differences(stored: Any, current: Any, prefix: str = "") -> list[str]:
    """Lists the names of values that differ; nested names are joined by dots."""
    if not isinstance(stored, dict) or not isinstance(current, dict):
        return [] if stored == current else [prefix]
    names = [*stored, *(name for name in current if name not in stored)]
    found: list[str] = []
    for name in names:
        path = f"{prefix}.{name}" if prefix else name
        found += _differences(stored.get(name), current.get(name), path)
    return found


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
