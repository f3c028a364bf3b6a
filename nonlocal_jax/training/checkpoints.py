"""Checkpoints written by Orbax, asynchronous and atomic, with a digest of every array.

    <folder>/<step>/state/        arrays, in Orbax's format
    <folder>/<step>/record/       JSON: shape, dtype and digest of every array, the metrics, and the
                                  run's record
    <folder>/<step>/metrics/      the metrics again, in Orbax's format
    <folder>/corrupt-<step>...    a damaged checkpoint, moved aside

Orbax writes into a temporary directory and renames it when everything is there, so a process killed
in between leaves no partial checkpoint. It does not notice a byte that changes on the disk
afterwards; the digests do. At gs://, where nothing can be renamed, Orbax writes the file
`commit_success.txt` last instead, and ignores a checkpoint without it.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from nonlocal_jax import checks, files
from nonlocal_jax.remote_paths import orbax_can_use
from nonlocal_jax.training.checkpoint_record import (
    CheckpointError,
    DamagedError,
    MismatchError,
    can_read_metrics,
    check_leaves,
    describe,
    leaves_by_path,
    read_error,
    read_record,
    seal,
)
from nonlocal_jax.training.digests import digests
from nonlocal_jax.training.distributed import broadcast_message, on_every_process

Tree = Any
logger = logging.getLogger(__name__)

__all__ = ["CheckpointError", "Checkpoints", "MismatchError", "Restored"]


class Restored(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        step: Step at which it was saved.
        state: State, with the structure that was asked for.
        record: Record that the run saved with it.
    """

    step: int
    state: Tree
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: Absolute path of the directory.
    """

    def __init__(
        self, folder: files.PathLike, keep: int = 2, best: str | None = None, mode: str = "max"
    ) -> None:
        """Opens a directory, which is created if it does not exist.

        Args:
            folder: Directory of the checkpoints, local or at gs://.
            keep: Number of latest checkpoints that are kept.
            best: Metric whose best checkpoint is kept as well; None keeps none.
            mode: Whether the "max" or the "min" of that metric is best.

        Raises:
            ValueError: If a number or the mode is out of range.
            CheckpointError: If the directory is a file, or remote and not at gs://, or the metrics
                of its checkpoints cannot be read now, and may be intact.
            OSError: If the directory cannot be written.
        """
        checks.at_least("keep", keep, 1)
        checks.one_of("mode", mode, ("max", "min"))
        self.folder = files.as_path(folder).absolute()
        if not orbax_can_use(self.folder):
            raise CheckpointError(
                "checkpoints must be in a local directory or at gs://, where Orbax writes arrays; "
                f"got {self.folder}."
            )
        if isinstance(self.folder, Path) and self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} must be a directory of checkpoints; got a file.")
        self._keep, self._best, self._mode = keep, best, mode
        # Orbax warns at a save without the metric: a state that was not evaluated has the worst.
        self._worst = {} if best is None else {best: -math.inf if mode == "max" else math.inf}
        self._scores: dict[int, float] = {}
        self._manager = self._open()
        self._hook: functools.partial[None] | None = None
        if best is not None:
            on_every_process(self._read_scores, CheckpointError)

    def _open(self) -> Any:
        best = self._best
        is_lightweight = on_every_process(self._has_unreadable_metrics, CheckpointError)
        policies: list[Any] = [preservation_policy.LatestN(self._keep)]
        if best is not None:
            policies.append(_Best(self._scores))
        return ocp.CheckpointManager(
            str(self.folder),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                # Without `best_fn` Orbax does not write metrics.
                best_fn=None if best is None else lambda metrics: metrics[best],
                best_mode=self._mode,
                # Otherwise Orbax reads the metrics, and raises at those that are damaged. Not
                # always: it then knows no times, and Orbax 0.12.8 fails to save at a preemption.
                lightweight_initialize=is_lightweight,
            ),
            item_names=("state", "record"),
        )

    def _has_unreadable_metrics(self) -> bool:
        if not self.folder.exists():
            return False
        steps = [entry for entry in self.folder.iterdir() if entry.name.isdecimal()]
        return not all(can_read_metrics(folder) for folder in steps)

    def _read_scores(self) -> None:
        for step in self.steps:
            # `restore` reports a damaged one; until then nothing deletes it.
            with contextlib.suppress(DamagedError):
                self._scores[step] = self._score(self._content(step)["metrics"])

    def _score(self, metrics: Mapping[str, float]) -> float:
        """Returns a number that is larger for a better checkpoint."""
        if self._best is None:
            return -math.inf
        value = metrics.get(self._best, math.nan)
        sign = 1 if self._mode == "max" else -1
        return -math.inf if math.isnan(value) else sign * value

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Tree,
        record: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save. The arrays may be donated or changed as soon as this returns.

        Args:
            step: Step of the state.
            state: Tree of arrays.
            record: Further content, which JSON must be able to hold.
            metrics: Metrics of the state, among them the one that decides which checkpoint is best.

        Raises:
            CheckpointError: If this save cannot begin, or the previous one could not be finished.
                Earlier checkpoints are intact.
        """
        self.wait()
        # Without a best metric Orbax does not write any.
        written = {**self._worst, **(metrics or {})} if self._best is not None else {}
        kept_metrics = {name: float(value) for name, value in written.items()}
        content = {
            "step": step,
            "leaves": describe(state),
            "record": dict(record),
            "metrics": kept_metrics,
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(seal(content))
        )
        self._scores[step] = self._score(kept_metrics)
        try:
            self._manager.save(step, args=items, metrics=kept_metrics or None, force=True)
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}"
            ) from error

    def wait(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            CheckpointError: If a checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder}: {error}"
            ) from error

    def close(self) -> None:
        """Waits, and ends the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._report_late_errors()

    def restore(self, like: Tree, shardings: Tree | None = None) -> Restored | None:
        """Reads the latest checkpoint that can be trusted.

        A checkpoint that cannot be read, or whose arrays or metrics changed on the disk, is
        reported and moved aside. So is an earlier one whose record or metrics are damaged.

        Args:
            like: Expected structure, shapes and dtypes: a tree of arrays or `jax.ShapeDtypeStruct`.
            shardings: Sharding of each array; None puts all on the default device.

        Returns:
            The content, or None if no checkpoint was ever written.

        Raises:
            MismatchError: If the checkpoint has other leaves, or a leaf of another shape or dtype.
            CheckpointError: If there are checkpoints, but none can be trusted; if one cannot be
                read now, and may be intact; or if a damaged one cannot be moved aside.
        """
        steps = sorted({*self.steps, *self._other_entries()}, reverse=True)
        if not steps:
            return None
        if shardings is None:
            shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), like)
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            like,
            shardings,
        )
        restored: Restored | None = None
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                read = functools.partial(self._content, step)
                content = on_every_process(read, DamagedError, CheckpointError)
                if restored is None:
                    restored = self._restore(step, content, target)
            except DamagedError as error:
                damaged[step] = str(error)
                logger.warning("the checkpoint of step %d is damaged: %s", step, error)
        if restored is None:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be trusted ({reasons}). Start again in "
                "another directory, or move them away."
            )
        if damaged:  # Orbax would refuse to save these steps again
            self._move_aside(*damaged)
        return restored

    def _other_entries(self) -> list[int]:
        """Returns the steps whose name a file or a broken link has. Orbax would overwrite it."""
        if not isinstance(self.folder, Path):
            return []
        names = [entry.name for entry in self.folder.iterdir() if not entry.is_dir()]
        return [int(name) for name in names if name.isdecimal() and name == str(int(name))]

    def _content(self, step: int) -> dict[str, Any]:
        return read_record(self.folder / str(step), step)

    def _restore(self, step: int, content: Mapping[str, Any], target: Tree) -> Restored:
        leaves = content["leaves"]
        check_leaves(leaves, leaves_by_path(target), step)
        read_state = functools.partial(self._read_state, step, target)
        state = on_every_process(read_state, DamagedError, CheckpointError)
        read = dict(zip(leaves_by_path(state), digests(state), strict=True))
        if changed := [path for path in leaves if leaves[path]["digest"] != read[path]]:
            raise DamagedError(
                f"{len(changed)} of its arrays changed on the disk, the first {changed[0]}"
            )
        return Restored(step, state, content["record"])

    def _read_state(self, step: int, target: Tree) -> Tree:
        # Not by `CheckpointManager.restore`, in which a process waits for one that has failed.
        handler = ocp.StandardCheckpointHandler()
        folder = self._manager.directory / str(step) / "state"
        self._hide_late_errors()
        try:
            return handler.restore(folder, args=ocp.args.StandardRestore(target))
        except Exception as error:  # a damaged file makes Orbax raise nearly any exception
            raise read_error(folder, error) from error
        finally:
            handler.close()

    def _hide_late_errors(self) -> None:
        """Sets the hook for errors that a damaged array leaves behind: some come much later."""
        if self._hook is None:
            self._hook = functools.partial(_report_unless_late, sys.unraisablehook)
            sys.unraisablehook = self._hook

    def _report_late_errors(self) -> None:
        """Removes the hook again, unless there is another one by now."""
        if self._hook is not None and sys.unraisablehook is self._hook:
            sys.unraisablehook = self._hook.args[0]
        self._hook = None

    def _move_aside(self, *steps: int) -> None:
        # Every process must raise if process 0 does, or the others would wait for it forever.
        problem = broadcast_message(self._rename(steps) if jax.process_index() == 0 else None)
        if problem:
            raise CheckpointError(problem)
        # `CheckpointManager.reload` would read the metrics.
        self._manager.close()
        self._manager = self._open()

    def _rename(self, steps: Sequence[int]) -> str | None:
        """Renames damaged checkpoints; returns what is wrong, if anything."""
        folder = self._manager.directory
        for step in steps:
            free = folder / f"corrupt-{step}"
            number = 0
            try:
                while free.exists():
                    number += 1
                    free = folder / f"corrupt-{step}-{number}"
                (folder / str(step)).rename(free)
            except Exception as error:  # remote file systems have their own errors
                reason = getattr(error, "strerror", None) or error
                return (
                    f"the damaged checkpoint {folder / str(step)} cannot be moved to {free}: "
                    f"{reason}. Move it away, and start again."
                )
        return None


def _report_unless_late(report: Callable[[Any], None], unraisable: Any) -> None:
    """Hook for errors that cannot be raised, without those that a damaged array leaves behind.

    Orbax closes its event loop at the first array that it cannot read. TensorStore, which still
    reads others, would print a traceback for each of them.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


@dataclasses.dataclass(frozen=True)
class _Best:
    """Orbax's policy that keeps the best checkpoint, and those whose score is unknown.

    Attributes:
        scores: Score of each step, of which the largest is best. It is read at every save.
    """

    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Says of each checkpoint whether it is kept."""
        steps = [info.step for info in checkpoints]
        ranked = sorted((self.scores[step], step) for step in steps if step in self.scores)
        best = [step for _, step in ranked[-1:]]
        return [step in best or step not in self.scores for step in steps]
