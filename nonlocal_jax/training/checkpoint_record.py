"""The record of a checkpoint: what it must hold, in JSON that is protected by a digest."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from jax.tree_util import keystr, tree_leaves_with_path

from nonlocal_jax.files import AnyPath
from nonlocal_jax.training.digests import digests

Tree = Any
LARGEST_INTEGER = 1 << 53  # up to which floats hold every integer
LEAF_FIELDS = {"shape": list, "dtype": str, "digest": str}

# A file that is missing, or is no file, is damage. After other system errors it may be intact.
DAMAGE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# TensorStore and XLA raise errors whose text starts with one of absl's status codes.
UNREACHABLE_STATUS = (
    "ABORTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)
SYSTEM_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")  # in the text of TensorStore
# Packages that reach gs://. Not all of their errors are `OSError`s.
REMOTE_PACKAGES = ("aiohttp", "gcsfs", "google.api_core", "google.auth", "requests", "tensorflow")


class MismatchError(ValueError):
    """A checkpoint belongs to another model or optimiser."""


class CheckpointError(Exception):
    """No checkpoint of a directory can be trusted, or one cannot be read or written."""


class DamagedError(Exception):
    """One checkpoint cannot be trusted."""


def read_error(name: Any, error: BaseException) -> CheckpointError | DamagedError:
    """Returns what to raise where reading failed.

    Args:
        name: What was read.
        error: What reading raised.

    Returns:
        A `DamagedError`, or a `CheckpointError` if the files may be intact: the connection failed,
        this process may not read them, or it ran out of memory.

    >>> type(read_error("a file", ValueError("not JSON"))).__name__
    'DamagedError'
    >>> type(read_error("a file", OSError(5, "Input/output error"))).__name__
    'CheckpointError'
    """
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    cause: BaseException | None = error
    while cause is not None:
        if _is_unreachable(cause):
            return CheckpointError(
                f"{name} cannot be read ({reason}). It may be intact, so nothing was changed. "
                "Start again when it can be read."
            )
        cause = cause.__cause__ or cause.__context__
    return DamagedError(f"{name} cannot be read ({reason})")


def _is_unreachable(error: BaseException) -> bool:
    text = str(error)
    if code := SYSTEM_ERROR.search(text):
        error = OSError(int(code[1]), text)  # of the subclass for this number
    if isinstance(error, OSError):
        return not isinstance(error, DAMAGE_ERRORS)
    return (
        isinstance(error, MemoryError)
        or text.startswith(UNREACHABLE_STATUS)
        or type(error).__module__.startswith(REMOTE_PACKAGES)
    )


def seal(content: Mapping[str, Any]) -> dict[str, str]:
    """Returns JSON data that `unseal` only accepts unchanged."""
    text = _as_text(content)
    return {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unseal(sealed: Any) -> dict[str, Any]:
    """Returns the content of a record: "step", "leaves", "record" and perhaps "metrics".

    Raises:
        DamagedError: If the record is not what `seal` returned, or is not that of a checkpoint.

    >>> unseal(seal({"step": 1, "leaves": {}, "record": {"seconds": 2.5}}))["record"]
    {'seconds': 2.5}
    """
    text = sealed.get("text") if isinstance(sealed, dict) else None
    # `seal` writes ASCII, and some of the rest has no digest: UTF-8 has no bytes for "\ud800".
    if not isinstance(text, str) or not text.isascii():
        raise DamagedError("its record must be text with a digest")
    if hashlib.sha256(text.encode()).hexdigest() != sealed.get("sha256"):
        raise DamagedError("its record changed on the disk")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its record must be JSON; got {error}") from error
    if not _is_record(content):
        raise DamagedError("its record must have step, leaves, record and metrics")
    return content


def _is_record(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        return False
    parts = content.get("leaves"), content.get("record"), content.get("metrics", {})
    if not all(isinstance(part, dict) for part in parts):
        return False
    return all(
        isinstance(leaf, dict) and isinstance(leaf.get(name), kind)
        for leaf in content["leaves"].values()
        for name, kind in LEAF_FIELDS.items()
    )


def read_record(folder: AnyPath, step: int) -> dict[str, Any]:
    """Reads the record of a checkpoint, and checks it and the file of the metrics.

    Args:
        folder: Directory of the checkpoint.
        step: Its step.

    Returns:
        The content that was sealed. Its "metrics" are never missing.

    Raises:
        DamagedError: If the record or the metrics are missing, or changed on the disk.
        CheckpointError: If they cannot be read now, and may be intact.
    """
    content = unseal(_read_json(folder / "record" / "metadata"))
    if content["step"] != step:
        raise DamagedError(f"it is that of step {content['step']}")
    file = _metrics_file(folder)
    metrics = _read_json(file)
    if metrics is None:
        metrics = {}
    is_valid = isinstance(metrics, dict) and all(map(_is_number, metrics.values()))
    # Earlier versions did not put the metrics into the record.
    sealed_metrics = content.setdefault("metrics", metrics)
    # As text, NaN equals NaN.
    if not is_valid or _as_text(metrics) != _as_text(sealed_metrics):
        raise DamagedError(f"its metrics changed on the disk ({file})")
    return content


def can_read_metrics(folder: AnyPath) -> bool:
    """Whether Orbax can read the metrics of a checkpoint, if there are any.

    Raises:
        CheckpointError: If they cannot be read now, and may be intact.
    """
    try:
        _read_json(_metrics_file(folder))
    except DamagedError:
        return False
    return True


def _is_number(value: Any) -> bool:
    """Whether a value of JSON can be a float. Integers of JSON can be too large."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST_INTEGER)


def _as_text(content: Any) -> str:
    return json.dumps(content, sort_keys=True)


def _metrics_file(folder: AnyPath) -> AnyPath:
    return folder / "metrics" / "metrics"  # the name is Orbax's


def _read_json(file: AnyPath) -> Any:
    """Returns the content of a file of JSON, or None if it does not exist."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise read_error(file, error) from error


def describe(state: Tree) -> dict[str, Any]:
    """Returns shape, dtype and digest of every leaf, by path."""
    leaves = leaves_by_path(state)
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digest}
        for (path, leaf), digest in zip(leaves.items(), digests(state), strict=True)
    }


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Returns the leaves by path, in the order of `jax.tree.leaves`."""
    return {
        keystr(path, simple=True, separator="/"): leaf for path, leaf in tree_leaves_with_path(tree)
    }


def check_leaves(saved: Mapping[str, Any], expected: Mapping[str, Any], step: int) -> None:
    """Checks that paths, shapes and dtypes of a checkpoint are the expected ones.

    Raises:
        MismatchError: If they are not.
    """
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
