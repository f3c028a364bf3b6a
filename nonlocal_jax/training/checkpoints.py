"""Checkpoints written by Orbax, asynchronous and atomic, with a digest of every array.

    <folder>/<step>/state/        arrays, in Orbax's format
    <folder>/<step>/record/       JSON: shape, dtype and digest of every array, and the run's record
    <folder>/corrupt-<step>...    a damaged checkpoint, moved aside

Orbax writes into a temporary directory and renames it when everything is there, so a process killed
in between leaves no partial checkpoint. It does not notice a byte that changes on the disk
afterwards; the digests do. At gs://, where nothing can be renamed, Orbax writes the file
`commit_success.txt` last instead, and ignores a checkpoint without it.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from nonlocal_jax import checks, files
from nonlocal_jax.remote_paths import orbax_can_use
from nonlocal_jax.training.digests import digests

Tree = Any
logger = logging.getLogger(__name__)


class CheckpointError(Exception):
    """No checkpoint of a directory can be trusted, or one cannot be written."""


class MismatchError(ValueError):
    """A checkpoint belongs to another model or optimiser."""


class _DamagedError(Exception):
    """One checkpoint cannot be trusted."""


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
            CheckpointError: If the directory is remote and not at gs://.
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
        # Orbax warns at a save without the metric: a state that was not evaluated has the worst.
        self._worst = {} if best is None else {best: -math.inf if mode == "max" else math.inf}
        self._manager = ocp.CheckpointManager(
            str(self.folder),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_preservation_policy(keep, best, mode),
                cleanup_tmp_directories=True,
                # Without `best_fn` Orbax does not write metrics.
                best_fn=None if best is None else lambda metrics: metrics[best],
                best_mode=mode,
            ),
            item_names=("state", "record"),
        )

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
        sealed = _seal({"step": step, "leaves": _describe(state), "record": dict(record)})
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(sealed)
        )
        scores = {**self._worst, **(metrics or {})} or None
        try:
            self._manager.save(step, args=items, metrics=scores, force=True)
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

    def restore(self, like: Tree, shardings: Tree | None = None) -> Restored | None:
        """Reads the latest checkpoint that can be trusted.

        A checkpoint that cannot be read, or whose arrays changed on the disk, is reported and moved
        aside.

        Args:
            like: Expected structure, shapes and dtypes: a tree of arrays or `jax.ShapeDtypeStruct`.
            shardings: Sharding of each array; None puts all on the default device.

        Returns:
            The content, or None if no checkpoint was ever written.

        Raises:
            MismatchError: If the checkpoint has other leaves, or a leaf of another shape or dtype.
            CheckpointError: If there are checkpoints, but none can be trusted.
        """
        if not self.steps:
            return None
        if shardings is None:
            shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), like)
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            like,
            shardings,
        )
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                restored = self._restore(step, target)
            except _DamagedError as error:
                damaged[step] = str(error)
                logger.warning("the checkpoint of step %d is damaged: %s", step, error)
                continue
            for damaged_step in damaged:  # Orbax would refuse to save these steps again
                self._move_aside(damaged_step)
            return restored
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(
            f"no checkpoint in {self.folder} can be trusted ({reasons}). Start again in another "
            "directory, or move them away."
        )

    def _restore(self, step: int, target: Tree) -> Restored:
        content = _unseal(self._read(step, record=ocp.args.JsonRestore()).record)
        if content["step"] != step:
            raise _DamagedError(f"it is that of step {content['step']}")
        _check_leaves(content["leaves"], _leaves_by_path(target), step)
        state = self._read(step, state=ocp.args.StandardRestore(target)).state
        read = dict(zip(_leaves_by_path(state), digests(state), strict=True))
        leaves = content["leaves"]
        if changed := [path for path in leaves if leaves[path]["digest"] != read[path]]:
            raise _DamagedError(
                f"{len(changed)} of its arrays changed on the disk, the first {changed[0]}"
            )
        return Restored(step, state, content["record"])

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # a damaged file makes Orbax raise nearly any exception
            raise _DamagedError(f"{type(error).__name__}: {error}".splitlines()[0][:300]) from error

    def _move_aside(self, step: int) -> None:
        multihost_utils.sync_global_devices(f"all processes have read step {step}")
        if jax.process_index() == 0:
            folder = self._manager.directory
            free = folder / f"corrupt-{step}"
            number = 0
            while free.exists():
                number += 1
                free = folder / f"corrupt-{step}-{number}"
            (folder / str(step)).rename(free)
        multihost_utils.sync_global_devices(f"step {step} is moved aside")
        self._manager.reload()


def _preservation_policy(keep: int, best: str | None, mode: str) -> Any:
    """Returns Orbax's policy that keeps the latest checkpoints and the best one."""
    policies: list[Any] = [preservation_policy.LatestN(keep)]
    if best is not None:
        sign = 1 if mode == "max" else -1
        best_one = preservation_policy.BestN(
            get_metric_fn=lambda metrics: sign * metrics[best],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best_one)
    return preservation_policy.AnyPreservationPolicy(policies)


def _seal(content: Mapping[str, Any]) -> dict[str, str]:
    text = json.dumps(content, sort_keys=True)
    return {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _unseal(sealed: Any) -> dict[str, Any]:
    text = sealed.get("text", "") if isinstance(sealed, dict) else ""
    if not text or hashlib.sha256(text.encode()).hexdigest() != sealed.get("sha256"):
        raise _DamagedError("its record changed on the disk")
    return json.loads(text)


def _describe(state: Tree) -> dict[str, Any]:
    """Returns shape, dtype and digest of every leaf, by path."""
    leaves = _leaves_by_path(state)
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digest}
        for (path, leaf), digest in zip(leaves.items(), digests(state), strict=True)
    }


def _leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Returns the leaves by path, in the order of `jax.tree.leaves`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_leaves(saved: Mapping[str, Any], expected: Mapping[str, Any], step: int) -> None:
    """Checks that paths, shapes and dtypes of a checkpoint are the expected ones."""
    start = f"the checkpoint of step {step} belongs to another model or optimiser: "
    if extra := [path for path in saved if path not in expected]:
        raise MismatchError(
            f"{start}it has {extra[0]}, which this one does not have ({len(extra)} in all)."
        )
    if missing := [path for path in expected if path not in saved]:
        raise MismatchError(f"{start}it lacks {missing[0]} ({len(missing)} in all).")
    for path, leaf in expected.items():
        shape, dtype = tuple(saved[path]["shape"]), saved[path]["dtype"]
        if (shape, dtype) != (tuple(leaf.shape), str(leaf.dtype)):
            own_type = f"{leaf.dtype} {tuple(leaf.shape)}"
            raise MismatchError(f"{start}{path} is {dtype} {shape} in it, and {own_type} here.")
