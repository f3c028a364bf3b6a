"""Checkpoints by Orbax, asynchronous and atomic, with a digest of every array kept beside them.

    <folder>/<step>/state/        the arrays, in Orbax's format
    <folder>/<step>/record/       JSON: path, shape, dtype and digest of every array, and what the run wants to remember
    <folder>/corrupt-<step>...    a checkpoint that could not be trusted, put aside

Orbax writes into a temporary folder and renames it when all is there, so a process killed in between leaves no half
checkpoint. It does not notice a byte that changed on the disk afterwards; the digests do.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from nonlocal_jax.types import Array

Tree = Any
logger = logging.getLogger(__name__)


class CheckpointError(Exception):
    """No checkpoint of a folder can be trusted, or one cannot be written."""


class MismatchError(ValueError):
    """A checkpoint is of another model or optimiser."""


class _DamagedError(Exception):
    """One checkpoint cannot be trusted."""


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
        step: at which it was saved.
        state: of the structure that was asked for.
        record: what the run remembered.
    """

    step: int
    state: Tree
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: absolute.
    """

    def __init__(
        self, folder: Path, keep: int = 2, best: str | None = None, mode: str = "max"
    ) -> None:
        """Open a folder, which is made if it is not there.

        Args:
            folder: of the checkpoints.
            keep: how many of the latest are kept.
            best: the metric whose best checkpoint is kept beside them.
            mode: "max" or "min", what is best.

        Raises:
            ValueError: a number or mode out of its range.
            OSError: the folder cannot be written.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}.")
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min'; got {mode!r}.")
        self.folder = folder.absolute()
        # Of a checkpoint that was not evaluated: Orbax warns each time when there is none.
        self._unknown = {} if best is None else {best: -math.inf if mode == "max" else math.inf}
        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if best is not None:
            sign = 1 if mode == "max" else -1
            by_metric = preservation_policy.BestN(
                get_metric_fn=lambda metrics: sign * metrics[best],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(by_metric)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                best_fn=None
                if best is None
                else lambda metrics: metrics[best],  # else Orbax does not write metrics
                best_mode=mode,
            ),
            item_names=("state", "record"),
        )

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that are whole, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Tree,
        record: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to save; the arrays may be changed or given away as soon as this returns.

        Args:
            step: of the state.
            state: arrays.
            record: what JSON can hold.
            metrics: among them the one that says which checkpoint is the best.

        Raises:
            CheckpointError: this save could not begin, or the one before could not be finished; nothing earlier is lost.
        """
        self.wait()
        leaves = {
            path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digest}
            for (path, leaf), digest in zip(_flat(state).items(), _digests(state), strict=True)
        }
        text = json.dumps({"step": step, "leaves": leaves, "record": dict(record)}, sort_keys=True)
        sealed = {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(sealed)
        )
        try:
            self._manager.save(
                step, args=items, metrics={**self._unknown, **(metrics or {})} or None, force=True
            )
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}"
            ) from error

    def wait(self) -> None:
        """Until what was begun is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder}: {error}"
            ) from error

    def close(self) -> None:
        """Wait, and let the threads go."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, like: Tree, shardings: Tree | None = None) -> Restored | None:
        """The latest checkpoint that can be trusted.

        One that cannot, because it cannot be read or an array is not what it was, is reported and put aside.

        Args:
            like: the structure, shapes and dtypes to expect: arrays or `jax.ShapeDtypeStruct`.
            shardings: where each array shall lie; None is the default device.

        Returns:
            None where no checkpoint was ever written.

        Raises:
            MismatchError: the checkpoint has other leaves, or a leaf of another shape or dtype.
            CheckpointError: there are checkpoints, but none that can be trusted.
        """
        if not self.steps:
            return None
        if shardings is None:
            shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), like)
        target = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), like, shardings
        )
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                restored = self._restore(step, target)
            except _DamagedError as error:
                damaged[step] = str(error)
                logger.warning("the checkpoint of step %d is damaged: %s", step, error)
                continue
            for later in damaged:  # else no new one of that step could be saved
                self._put_aside(later)
            return restored
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(
            f"no checkpoint in {self.folder} can be trusted ({reasons}). Start again in another folder, or move them away."
        )

    def _restore(self, step: int, target: Tree) -> Restored:
        sealed = self._read(step, record=ocp.args.JsonRestore()).record
        text = sealed.get("text", "") if isinstance(sealed, dict) else ""
        if not text or hashlib.sha256(text.encode()).hexdigest() != sealed.get("sha256"):
            raise _DamagedError("its record changed on the disk")
        content = json.loads(text)
        if content["step"] != step:
            raise _DamagedError(f"it is that of step {content['step']}")
        _compare(content["leaves"], _flat(target), step)
        state = self._read(step, state=ocp.args.StandardRestore(target)).state
        expected = {path: leaf["digest"] for path, leaf in content["leaves"].items()}
        found = dict(zip(_flat(state), _digests(state), strict=True))
        if changed := [path for path in expected if found[path] != expected[path]]:
            raise _DamagedError(
                f"{len(changed)} of its arrays changed on the disk, the first {changed[0]}"
            )
        return Restored(step, state, content["record"])

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever a damaged file makes Orbax raise
            raise _DamagedError(f"{type(error).__name__}: {error}".splitlines()[0][:300]) from error

    def _put_aside(self, step: int) -> None:
        multihost_utils.sync_global_devices(f"put aside {step}")  # all have read it
        if jax.process_index() == 0:
            names = (
                self.folder / f"corrupt-{step}{suffix}"
                for suffix in ("", *(f"-{i}" for i in range(1, 1000)))
            )
            (self.folder / str(step)).rename(next(name for name in names if not name.exists()))
        multihost_utils.sync_global_devices(f"put {step} aside")
        self._manager.reload()


def _flat(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths, in the order of `jax.tree.leaves`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _compare(saved: Mapping[str, Any], wanted: Mapping[str, Any], step: int) -> None:
    start = f"the checkpoint of step {step} is of another model or optimiser: "
    if extra := [path for path in saved if path not in wanted]:
        raise MismatchError(
            f"{start}it has {extra[0]}, which this one has not ({len(extra)} such)."
        )
    if missing := [path for path in wanted if path not in saved]:
        raise MismatchError(f"{start}it lacks {missing[0]} ({len(missing)} such).")
    for path, leaf in wanted.items():
        was, now = (
            (tuple(saved[path]["shape"]), saved[path]["dtype"]),
            (tuple(leaf.shape), str(leaf.dtype)),
        )
        if was != now:
            raise MismatchError(
                f"{start}{path} is {was[1]} {was[0]} in it, and {now[1]} {now[0]} here."
            )


def _digests(tree: Tree) -> list[str]:
    """Of each leaf 16 hexadecimal digits, whatever devices it is split over.

    A sum over the leaf's words of a bijective mix of word and place: one word that changed always shows, several do but for
    one case in 2⁶⁴. Against decay, not against someone who wants to deceive.
    """
    # One at a time: XLA on CPU has too few threads for many computations between devices at once.
    pairs = [jax.device_get(_digest(leaf)) for leaf in jax.tree.leaves(tree)]
    return [f"{int(high):08x}{int(low):08x}" for high, low in pairs]


@jax.jit
def _digest(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(
        jnp.uint32
    )
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):  # no reshape: a split leaf stays where it is
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)

    def total(seed: int) -> Array:
        mixed = words ^ _mix(place + jnp.uint32(seed))
        return jnp.sum(_mix(mixed), dtype=jnp.uint32)

    return jnp.stack([total(0x9E3779B9), total(0x85EBCA6B)])


def _mix(x: Array) -> Array:
    """A bijection of the 32-bit integers (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
