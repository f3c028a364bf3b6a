"""The folder of one run: nobody else's, of one configuration, with a log that programs and TensorBoard read.

config.json      what was asked for; a run is resumed only with the same
metrics.jsonl    one row a step, one an evaluation, each step once however often the run was killed
events.out.*     the same for TensorBoard
checkpoints/     see `nonlocal_jax.training.checkpoints`
nonfinite/       the batch at which the loss or the gradient stopped being finite
profile/         for TensorBoard's profiler, or https://ui.perfetto.dev
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

from nonlocal_jax.training.distributed import tell_all


class RunError(Exception):
    """A folder cannot be used for this run; says why."""


class Run:
    """One run in its folder, from `with` to the end of it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Run(folder, {"learning_rate": 0.1}) as run:
    ...     run.log(1, "train", {"loss": 2.5})
    >>> json.loads((folder / "metrics.jsonl").read_text())
    {'step': 1, 'kind': 'train', 'loss': 2.5}
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], may_differ: tuple[str, ...] = ()
    ) -> None:
        """Nothing is touched yet.

        Args:
            folder: of the run; it is made if it is not there.
            config: what JSON can hold, nested by name.
            may_differ: names that may change from one start to the next.
        """
        self.folder = folder.absolute()
        self.config = json.loads(json.dumps(config, default=str))
        self.may_differ = may_differ
        self.writes = jax.process_index() == 0
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        self._rows: Any = None
        self._events: Any = None

    def __enter__(self) -> "Run":
        """Take the folder.

        Raises:
            RunError: another process has it, it is of another configuration, or it cannot be written.
        """
        problem = tell_all(self._take() if self.writes else None)
        if problem:
            raise RunError(problem)
        return self

    def _take(self) -> str | None:
        """Lock and check the folder; gives what is wrong."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._check_config()
        except Timeout:
            return f"another process is training in {self.folder}; wait for it, or take another folder."
        except OSError as error:
            return f"{self.folder} must be a folder that can be written: {error.strerror or error}."
        except RunError as error:
            self._lock.release()
            return str(error)
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._rows, self._events):
            if file is not None:
                file.close()
        if self.writes:
            self._lock.release()

    def _check_config(self) -> None:
        file = self.folder / "config.json"
        if file.exists():
            try:
                before = json.loads(file.read_text())
            except ValueError as error:
                raise RunError(
                    f"{file} is not JSON ({error}); mend it, or take another folder."
                ) from error
            for name in _differences(before, self.config):
                if name.split(".")[0] not in self.may_differ:
                    was, now = (_at(tree, name) for tree in (before, self.config))
                    raise RunError(
                        f"{name} is {now} now, and was {was} when the run in {self.folder} started. Start with the same, or "
                        "take another folder."
                    )
        write_whole(file, json.dumps(self.config, indent=2) + "\n")

    def open_log(self, step: int) -> None:
        """Go on with the log after `step`: what is of later steps, or half written, is dropped."""
        if not self.writes:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        file = self.folder / "metrics.jsonl"
        if file.exists():
            kept = [
                line
                for line in file.read_text(errors="replace").splitlines()
                if _step_of(line) <= step
            ]
            write_whole(file, "".join(line + "\n" for line in kept))
        self._rows = file.open("a")
        self._events = EventFileWriter(str(self.folder))
        restart = Event(
            wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)
        )
        self._events.add_event(restart)  # TensorBoard drops what it has of later steps

    def log(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One row; `kind` is "train" or "evaluation".

        Raises:
            RunError: it cannot be written.
        """
        if not self.writes:
            return
        if self._rows is None:
            self.open_log(step - 1)
        try:
            self._rows.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            self._rows.flush()
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
        self._events.add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=points))
        )

    def keep_batch(self, step: int, batch: Mapping[str, Any], values: Mapping[str, float]) -> Path:
        """Write the batch, or this process's share of it, that a step could not bear; return the file."""
        file = self.folder / "nonfinite" / f"step-{step}-process-{jax.process_index()}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in batch.items()}
        np.savez(file, **arrays)
        file.with_suffix(".json").write_text(
            json.dumps({"step": step, **{k: str(v) for k, v in values.items()}}) + "\n"
        )
        return file


def write_whole(file: Path, text: str) -> None:
    """So that a reader, or a kill, finds the old text or the new, never a part."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """The names of what differs, with dots for what is nested."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(new for new in now if new not in before)]
        return [
            d
            for one in names
            for d in _differences(before.get(one), now.get(one), f"{name}.{one}" if name else one)
        ]
    return [] if before == now else [name]


def _at(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
