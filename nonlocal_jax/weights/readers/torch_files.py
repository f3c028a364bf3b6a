"""Files of `torch.save`, read without torch.

Since torch 1.6 they are zip archives, before that a sequence of pickles and raw storages. Both hold
a pickle whose tensors are views of storages that lie outside it. The pickle is read first, with
stand-ins for the tensors. Of the storages only those of the weights are read, after every size has
been checked.
"""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nonlocal_jax.weights.readers.errors import FileFormatError
from nonlocal_jax.weights.readers.pickles import ByteStream, explained_steps, read_pickle
from nonlocal_jax.weights.readers.torch_objects import (
    TORCH_NAMES,
    Storage,
    Tensor,
    find_storage,
)
from nonlocal_jax.weights.readers.values import (
    Contents,
    check_explained,
    check_size,
    describe_value,
    ignored_reason,
    text_keyed,
)
from nonlocal_jax.weights.readers.zip_archives import ZIP_MAGIC, ZipArchive

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_PICKLE_BYTES = 64 << 20  # of data.pkl; that of a ResNet-152 has 100 thousand

# Entries of a checkpoint under which training scripts keep the state dict.
STATE_DICT_KEYS = ("state_dict", "model_state", "model_state_dict", "model", "net")


@dataclass(frozen=True)
class TorchFile:
    """The object that `torch.save` was given, with a `Tensor` for each tensor.

    Attributes:
        tree: The object.
        content: From a storage to its bytes, which are read when it is called.
        byte_order: Order of these bytes, "little" or "big".
    """

    tree: object
    content: Callable[[Storage], bytes]
    byte_order: str


def is_torch(head: bytes) -> bool:
    """Whether a file that starts with these bytes can be one of `torch.save`."""
    is_legacy = head[:1] == b"\x80" and LEGACY_MAGIC.to_bytes(10, "little") in head[:32]
    return head[:4] in ZIP_MAGIC or is_legacy


def read_torch(file: io.BufferedIOBase, size: int, max_bytes: int) -> tuple[Contents, str]:
    """Reads the tensors of a state dict, or of a checkpoint that holds one.

    Args:
        file: The file.
        size: Its size in bytes.
        max_bytes: Limit of what the tensors may take in memory.

    Returns:
        The contents, and the text of the training configuration, "" if there is none.

    Raises:
        UnsafeFileError: The file has a name, opcode, member or size that weights never need.
        FileFormatError: The file is damaged, truncated, a program, or has tensors of an unsupported
            type.
    """
    file.seek(0)
    is_zip = file.read(4) in ZIP_MAGIC
    file.seek(0)
    saved = _open_zip(file, size) if is_zip else _open_legacy(file, size)
    if not isinstance(saved.tree, dict):
        raise FileFormatError(
            f"torch.save was given {describe_value(saved.tree)}; "
            "expected a state dict, or a dict that holds one."
        )
    entries = text_keyed(saved.tree)
    state, ignored = _find_state_dict(entries)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    ignored |= {name: ignored_reason(value) for name, value in state.items() if name not in tensors}
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    tensor_bytes = sum(tensor.nbytes for tensor in tensors.values())
    storage_bytes = sum(storage.nbytes for storage in storages.values())
    check_size(tensor_bytes, max_bytes, "its tensors")
    check_size(storage_bytes, max_bytes, "the storages of its tensors")
    check_explained(tensor_bytes, size, "its tensors")
    check_explained(storage_bytes, size, "the storages of its tensors")
    return (_read_arrays(saved, tensors), ignored), _configuration(entries)


def _read_arrays(saved: TorchFile, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Reads the arrays of tensors, one storage after the other.

    A storage is freed before the next one is read, unless an array is a view of it.
    """
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.storage.key, []).append(name)
    arrays = {}
    for views in names.values():
        content = saved.content(tensors[views[0]].storage)
        for name in views:
            arrays[name] = tensors[name].array(content, saved.byte_order)
    return {name: arrays[name] for name in tensors}


def _find_state_dict(entries: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the state dict of a checkpoint, and why each other entry is ignored.

    Where all entries are tensors, they are the state dict themselves.
    """
    if all(isinstance(value, Tensor) for value in entries.values()):
        return entries, {}
    for key in STATE_DICT_KEYS:
        state = entries.get(key)
        if isinstance(state, dict) and any(isinstance(value, Tensor) for value in state.values()):
            ignored = {
                name: ignored_reason(value) for name, value in entries.items() if name != key
            }
            return text_keyed(state), ignored
    return entries, {}


def _configuration(entries: dict[str, Any]) -> str:
    """Returns the training configuration: `cfg` of PySlowFast, or what mmaction2 has in `meta`."""
    meta = entries.get("meta")
    parents = [entries, meta] if isinstance(meta, dict) else [entries]
    values = (parent.get(key) for parent in parents for key in ("cfg", "config"))
    return next((value for value in values if isinstance(value, str)), "")


def _open_zip(file: io.BufferedIOBase, size: int) -> TorchFile:
    archive = ZipArchive(file, size)
    root = next(iter(archive.members), "").split("/")[0]
    has_code = any(name.startswith(f"{root}/code/") for name in archive.members)
    if has_code or f"{root}/constants.pkl" in archive:
        raise FileFormatError(
            "it is a TorchScript archive, a program with weights; save its state_dict() instead."
        )
    if f"{root}/data.pkl" not in archive:
        members = ", ".join(list(archive.members)[:3])
        raise FileFormatError(
            "it is a zip archive that torch.save did not write: "
            f"it has no data.pkl, but {members!a:.100}."
        )
    byte_order = "little"
    if f"{root}/byteorder" in archive:
        byte_order = archive.read(f"{root}/byteorder", 8).decode("latin1")
    if byte_order not in ("little", "big"):
        raise FileFormatError(f"its byte order must be little or big; got {byte_order!a}.")
    data = archive.read(f"{root}/data.pkl", MAX_PICKLE_BYTES)
    stream = ByteStream(io.BytesIO(data), len(data), explained_steps(size))
    tree = read_pickle(stream, TORCH_NAMES, functools.partial(find_storage, {}))

    def content(storage: Storage) -> bytes:
        data = archive.read(f"{root}/data/{storage.key}", storage.nbytes)
        if len(data) != storage.nbytes:
            raise FileFormatError(
                f"storage {storage.key!a:.40} must have {storage.nbytes} bytes; it has {len(data)}."
            )
        return data

    return TorchFile(tree, content, byte_order)


def _open_legacy(file: io.BufferedIOBase, size: int) -> TorchFile:
    """Opens five pickles (magic number, protocol, machine, object, keys) with storages after them.

    Each storage follows its size in elements.
    """
    stream = ByteStream(file, size)
    magic = read_pickle(stream, {})
    if magic != LEGACY_MAGIC or read_pickle(stream, {}) != LEGACY_PROTOCOL:
        raise FileFormatError(
            f"it starts like a torch file, but is not one of protocol {LEGACY_PROTOCOL}."
        )
    read_pickle(stream, {})
    storages: dict[str, Storage] = {}
    tree = read_pickle(stream, TORCH_NAMES, functools.partial(find_storage, storages))
    keys = read_pickle(stream, {})
    if not isinstance(keys, list) or any(
        not isinstance(key, str) or key not in storages for key in keys
    ):
        raise FileFormatError("its list of storages does not match its tensors.")
    positions: dict[str, int] = {}
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        if count != storages[key].size:
            raise FileFormatError(
                f"storage {key!a:.40} must have {storages[key].size} elements; it has {count}."
            )
        positions[key] = stream.skip(storages[key].nbytes)

    def content(storage: Storage) -> bytes:
        if storage.key not in positions:
            raise FileFormatError(f"it lacks storage {storage.key!a:.40}.")
        file.seek(positions[storage.key])
        return file.read(storage.nbytes)

    # Legacy files are little-endian whatever machine wrote them.
    return TorchFile(tree, content, "little")
