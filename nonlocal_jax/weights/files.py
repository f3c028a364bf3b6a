"""Any file of trained weights, as named NumPy arrays. What a file is shows in its content, not in its suffix."""

import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nonlocal_jax.weights.torch_file import LEGACY_MAGIC, ZIP_MAGIC, Tensor, read_torch
from nonlocal_jax.weights.unpickle import (
    FileFormatError,
    NumpyArray,
    Source,
    UnsafeFileError,
    kind,
    load,
)

Format = Literal["caffe2", "torch", "safetensors", "orbax"]

SUPPORTED = (
    "Supported are pickles of Caffe2, files of torch.save, safetensors and folders of Orbax."
)
MAX_HEADER = 100 << 20  # bytes, as in the safetensors library
STATE_DICTS = (
    "state_dict",
    "model_state",
    "model_state_dict",
    "model",
    "net",
)  # where torch checkpoints keep it
TRAINING = ("lr", "model_iter")  # and whatever ends in _momentum
SAFETENSORS = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U64",
    "U32",
    "U16",
    "U8",
    "BOOL",
)
PICKLE = re.compile(rb"\x80[\x00-\x05]|\([dl]p\d+\n|[}\]]q|\(?c[\w.]+\n[\w.]+\n")
OTHERS = {  # what else a file may turn out to be, by how it starts
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; `git lfs pull` gets it",
    b"<!doctype html": "a web page; was it a page that asks to log in or to confirm the download?",
    b"<html": "a web page; was it a page that asks to log in or to confirm the download?",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"\x89hdf\r\n": "HDF5",
    b"\x93numpy": "a NumPy .npy file",
}


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds, under the names that the file gives.

    Attributes:
        path: the file, or the folder.
        format: what its content showed it to be.
        arrays: the weights, in the order of the file, read-only.
        ignored: every other entry of the file, with the reason.
    """

    path: Path
    format: Format
    arrays: dict[str, np.ndarray]
    ignored: dict[str, str]


Contents = tuple[Format, dict[str, np.ndarray], dict[str, str]]


def read(path: str | os.PathLike[str], *, max_bytes: int = 8 << 30) -> Checkpoint:
    """The weights in a file, without running anything that the file asks for.

    Args:
        path: a pickle of Caffe2, a file of torch.save, a safetensors file, or a folder that Orbax wrote.
        max_bytes: the most that the weights may take in memory.

    Returns:
        The arrays by name, and what else is there.

    Raises:
        FileNotFoundError: there is no such path.
        FileFormatError: a file that is damaged, of another kind, or without weights.
        UnsafeFileError: a file that asks for code, or for more memory than `max_bytes` or than its size explains.

    >>> import pickle, pathlib, tempfile, numpy as np
    >>> path = pathlib.Path(tempfile.mkdtemp(), "weights.pkl")
    >>> _ = path.write_bytes(pickle.dumps({"blobs": {"conv1_w": np.ones((2, 3), np.float32), "lr": 0.01}}))
    >>> checkpoint = read(path)
    >>> checkpoint.format, checkpoint.arrays["conv1_w"].shape, checkpoint.ignored
    ('caffe2', (2, 3), {'lr': 'training state'})
    """
    path = Path(path)
    try:
        form, arrays, ignored = (
            _read_folder(path, max_bytes) if path.is_dir() else _read_file(path, max_bytes)
        )
        if not arrays:
            some = (
                ", ".join(f"{name!a:.40} ({why})" for name, why in list(ignored.items())[:8])
                or "nothing"
            )
            raise FileFormatError(f"it holds no weights, but {some}.")
    except (FileFormatError, UnsafeFileError) as error:
        raise type(error)(f"{path}: {error}") from error
    for array in arrays.values():
        array.flags.writeable = False
    return Checkpoint(path, form, arrays, ignored)


def _read_file(path: Path, max_bytes: int) -> Contents:
    size = path.stat().st_size
    if not path.is_file():
        raise FileFormatError(f"it is neither a file nor a folder. {SUPPORTED}")
    with path.open("rb") as file:
        head = file.read(1024)
        file.seek(0)
        if head[:4] in ZIP_MAGIC or (
            head[:1] == b"\x80" and LEGACY_MAGIC.to_bytes(10, "little") in head[:32]
        ):
            return _torch(file, size, max_bytes)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
            return _safetensors(path, head, size, max_bytes)
        if PICKLE.match(head):
            return _caffe2(file, size, max_bytes)
    raise FileFormatError(f"it {_looks_like(head)}. {SUPPORTED}")


def _looks_like(head: bytes) -> str:
    for start, what in OTHERS.items():
        if head.lower().startswith(start.lower()):
            return f"looks like {what}"
    if head[257:262] == b"ustar":
        return "looks like a tar archive, as torch wrote before version 0.2; load it there and save it again"
    text = head.decode("utf-8", "replace")
    if not head:
        return "is empty"
    if all(
        (letter.isprintable() or letter.isspace()) and letter != "\ufffd" for letter in text[:200]
    ):
        return f"looks like text that starts with {text[:40]!r}"
    return f"is of an unknown kind that starts with the bytes {head[:8].hex(' ')}"


def _within(nbytes: int, max_bytes: int, what: str) -> None:
    if nbytes > max_bytes:
        raise UnsafeFileError(
            f"{what} would take {nbytes} bytes, over max_bytes={max_bytes}. If that is meant, pass a larger one."
        )


def _named(tree: dict[Any, Any]) -> dict[str, Any]:
    """With keys of text: some pickles have them of bytes."""
    names = {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value
        for key, value in tree.items()
    }
    if len(names) < len(tree):
        raise FileFormatError("two of its entries have the same name.")
    return names


def _caffe2(file: io.BufferedIOBase, size: int, max_bytes: int) -> Contents:
    """A dict of blobs, or one that has it under "blobs"."""
    _within(size, max_bytes, "its pickle")
    tree = load(Source(file, size))
    if not isinstance(tree, dict):
        raise FileFormatError(
            f"it is a pickle of {kind(tree)}; expected a dict of arrays, or one under 'blobs'."
        )
    blobs, ignored = _named(tree), {}
    if isinstance(blobs.get("blobs"), dict):
        ignored = {
            name: f"not weights: {kind(value)}" for name, value in blobs.items() if name != "blobs"
        }
        blobs = _named(blobs["blobs"])
    weights: dict[str, NumpyArray] = {}
    for name, value in blobs.items():
        if name in TRAINING or name.endswith("_momentum"):
            ignored[name] = "training state"
        elif not isinstance(value, NumpyArray) or not value.shape:
            ignored[name] = (
                f"not weights: {'a number' if isinstance(value, NumpyArray) else kind(value)}"
            )
        else:
            weights[name] = value
    _within(sum(array.nbytes for array in weights.values()), max_bytes, "its arrays")
    return "caffe2", {name: array.array() for name, array in weights.items()}, ignored


def _torch(file: io.BufferedIOBase, size: int, max_bytes: int) -> Contents:
    saved = read_torch(file, size)
    if not isinstance(saved.tree, dict):
        raise FileFormatError(
            f"torch.save was given {kind(saved.tree)}; expected a state dict, or a dict that has one."
        )
    state, ignored = _state_dict(_named(saved.tree))
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    ignored |= {
        name: f"not weights: {kind(value)}" for name, value in state.items() if name not in weights
    }
    storages = {tensor.storage.key: tensor.storage for tensor in weights.values()}
    _within(sum(tensor.nbytes for tensor in weights.values()), max_bytes, "its tensors")
    _within(
        sum(storage.nbytes for storage in storages.values()),
        max_bytes,
        "the storages of its tensors",
    )
    contents = {key: saved.content(storage) for key, storage in storages.items()}
    arrays = {
        name: tensor.array(contents[tensor.storage.key], saved.order)
        for name, tensor in weights.items()
    }
    return "torch", arrays, ignored


def _state_dict(entries: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries themselves where all are tensors, else the first of `STATE_DICTS` that has any; and what lies beside it."""
    if not all(isinstance(value, Tensor) for value in entries.values()):
        for name in STATE_DICTS:
            state = entries.get(name)
            if isinstance(state, dict) and any(
                isinstance(value, Tensor) for value in state.values()
            ):
                beside = {
                    other: f"not weights: {kind(value)}"
                    for other, value in entries.items()
                    if other != name
                }
                return _named(state), beside
    return entries, {}


def _safetensors(path: Path, head: bytes, size: int, max_bytes: int) -> Contents:
    from safetensors import SafetensorError, safe_open

    if (header := int.from_bytes(head[:8], "little")) > size - 8:
        raise FileFormatError(
            f"cut short: its header has {header} bytes, of which {size - 8} follow. Fetch it again."
        )
    _within(size, max_bytes, "its tensors")
    try:
        with safe_open(path, framework="np") as file:
            names = file.offset_keys()
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in SAFETENSORS:
                    raise FileFormatError(
                        f"{name!a:.80} is of {dtype}, which is not read. Convert it before saving."
                    )
            arrays = {name: file.get_tensor(name) for name in names}
            ignored = (
                {"__metadata__": f"not weights: {kind(file.metadata())}"} if file.metadata() else {}
            )
    except (SafetensorError, OverflowError, TypeError) as error:
        raise FileFormatError(
            f"it is a damaged safetensors file ({error!s:.200}). Fetch it again."
        ) from error
    return "safetensors", arrays, ignored


def _read_folder(path: Path, max_bytes: int) -> Contents:
    """As the checkpointers of Orbax write it, or their manager, which puts it one level down."""
    folders = [folder for folder in (path, path / "default") if (folder / "_METADATA").is_file()]
    if not folders:
        some = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise FileFormatError(
            f"it is a folder without the _METADATA of Orbax; it has {some}. Name a file, or one step."
        )
    try:
        return _orbax(folders[0].absolute(), max_bytes)
    except (FileFormatError, UnsafeFileError):
        raise
    except Exception as error:  # of Orbax, TensorStore or JSON: they declare none
        raise FileFormatError(
            f"Orbax cannot read it ({type(error).__name__}: {error!s:.200})."
        ) from error


def _orbax(folder: Path, max_bytes: int) -> Contents:
    import jax
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

    def as_numpy(leaf: Any) -> Any:  # on the host, whatever devices it was on
        return ocp.RestoreArgs(
            restore_type=np.ndarray if type(leaf) is ocp.metadata.ArrayMetadata else None
        )

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        declared = [
            leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, ocp.metadata.ArrayMetadata)
        ]
        _within(
            sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in declared),
            max_bytes,
            "its arrays",
        )
        restored = checkpointer.restore(folder, restore_args=jax.tree.map(as_numpy, tree))
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    named = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}
    if len(named) < len(leaves):
        raise FileFormatError("two of its entries have the same name.")
    arrays = {name: leaf for name, leaf in named.items() if isinstance(leaf, np.ndarray)}
    return (
        "orbax",
        arrays,
        {name: f"not weights: {kind(leaf)}" for name, leaf in named.items() if name not in arrays},
    )
