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

import contextlib
import json
import logging
import os
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
from nonlocal_jax.training.run_config import RunError, check_config

with extra("experiments"):
    from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

__all__ = ["Run", "RunError"]


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
        # Open files: the lock and the log must not be removed while the run is using them.
        self._lock_file: Any = None
        self._log_file: Any = None
        self._events: Any = None

    def __enter__(self) -> "Run":
        """Locks the directory.

        Raises:
            RunError: If another process uses it, it belongs to another configuration, a file in it
                is damaged, or it cannot be written.
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
            self._check_kinds()
            check_config(self.folder, self.config, self.may_differ)
            if self._lock is not None:
                self._lock_file = Path(self._lock.lock_file).open("rb")  # noqa: SIM115
        except Timeout:
            return (
                f"another process is training in {self.folder}; wait for it, or use another "
                "directory."
            )
        except OSError as error:
            self._release()
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
        removal = self._removal()
        with contextlib.ExitStack() as stack:  # what is added first happens last
            if self.writes:
                stack.callback(self._release)
            if self._temporary is not None:
                stack.callback(self._temporary.cleanup)
            # TensorBoard opens its file by name, so it cannot write what is left.
            with contextlib.suppress(OSError) if removal else contextlib.nullcontext():
                self._close_log()
            if self._temporary is not None:
                try:
                    self.upload()
                except RunError as upload_error:
                    if error is None:
                        raise
                    logger.warning("%s", upload_error)  # what ended the run is reported instead
        if removal and not isinstance(error, RunError):
            raise RunError(removal) from error

    def _release(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None
        if self._lock is not None:
            self._lock.release()

    def _close_log(self) -> None:
        log_file, events = self._log_file, self._events
        self._log_file = self._events = None
        with contextlib.ExitStack() as stack:
            for file in (log_file, events):
                if file is not None:
                    stack.callback(file.close)

    def _removal(self) -> str | None:
        """Returns which file of this run was removed while it is in use, if any."""
        for file in (self._lock_file, self._log_file):
            if file is not None and _is_removed(file):
                return (
                    f"{file.name} was removed while a run was using it, so the run cannot go on. "
                    f"Start it again, and do not remove files in {self.folder} until it has ended."
                )
        return None

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

    def _check_kinds(self) -> None:
        file, folder = self.folder / "metrics.jsonl", self.folder / "checkpoints"
        if file.exists() and not file.is_file():
            raise RunError(f"{file} must be a file, the log of the run; move it away.")
        if folder.exists() and not folder.is_dir():
            raise RunError(f"{folder} must be a directory of checkpoints; move it away.")

    def open_log(self, step: int) -> None:
        """Continues the log after `step`; rows of later steps and half-written rows are dropped.

        Raises:
            RunError: If the log cannot be read or written.
        """
        if not self.writes:
            return
        # TensorBoard takes a second to import, and only process 0 needs it.
        with extra("experiments"):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

        stored, file = self.folder / "metrics.jsonl", self.growing / "metrics.jsonl"
        try:
            if stored.exists():
                lines = stored.read_text(errors="replace").splitlines()
                steps = [_step_of_row(line) for line in lines]
                rows = zip(lines, steps, strict=True)
                kept = [f"{line}\n" for line, own in rows if own is not None and own <= step]
                files.write_text(file, "".join(kept))
            self._close_log()  # `fit` may be called again
            self._log_file = file.open("a")
            self._events = EventFileWriter(str(self.growing))
        except OSError as error:
            raise RunError(
                f"{stored} must be a file that can be read and written: {error.strerror or error}."
            ) from error
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
            RunError: If the log cannot be written, or a file of the run was removed.
        """
        if not self.writes:
            return
        if self._log_file is None:
            self.open_log(step - 1)
        if removal := self._removal():
            raise RunError(removal)
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [
            Summary.Value(tag=f"{kind}/{name}", simple_value=value)
            for name, value in values.items()
        ]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=points))
        try:
            self._log_file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            self._log_file.flush()
            self._events.add_event(event)
        except OSError as error:
            raise RunError(
                f"the log in {self.folder} cannot be written: {error.strerror}."
            ) from error

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


def _is_removed(file: Any) -> bool:
    """Whether the path of an open file is now missing, or that of another file.

    The number of links of the open file does not show this on FUSE file systems, some of which
    report a constant.
    """
    try:
        return not os.path.samestat(Path(file.name).stat(), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # it cannot be seen; the next write reports what is wrong
        return False


def _step_of_row(line: str) -> int | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # a row that a kill cut off
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
