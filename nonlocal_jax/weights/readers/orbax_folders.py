"""Folders of Orbax: those of its checkpointers, and of its manager, one level down.

Of a training state, only the variables are read.

The list of arrays, `_METADATA`, is read here, and the arrays by TensorStore. Orbax itself opens
whatever path the list names, and allocates whatever the arrays declare.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nonlocal_jax.files import AnyPath
from nonlocal_jax.remote_paths import RemotePath, orbax_can_use
from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.readers.aligned import aligned_copy
from nonlocal_jax.weights.readers.errors import FileFormatError, UnsafeFileError
from nonlocal_jax.weights.readers.values import (
    FREE_BYTES,
    Contents,
    check_explained,
    check_size,
    describe_value,
    ignored_reason,
)

MAX_METADATA_BYTES = 16 << 20  # an entry takes about 300
# Chunks of all arrays, which are read one by one: in any folder, and for each KiB of a folder.
FREE_CHUNKS, CHUNKS_PER_KIB = 10_000, 32
ARRAY_TYPES = ("jax.Array", "np.ndarray")
COLLECTIONS = (("params",), ("batch_stats",))  # of the variables of a network
MAX_DEPTH = 3  # of the variables in a tree
MAX_PENDING_BYTES = 16 << 20  # of arrays that are read at once
MAX_ITEMS = 100  # entries of a folder that may be the folder of the arrays


class Entry(NamedTuple):
    """An entry of the list.

    Attributes:
        keys: Its keys in the tree, from the root.
        type: The name that Orbax has for its type.
        is_stored: Whether it has a value in the folder. Empty containers and None have none.
    """

    keys: tuple[str, ...]
    type: str
    is_stored: bool

    @property
    def name(self) -> str:
        return "/".join(self.keys)


def read_orbax(path: AnyPath, max_bytes: int) -> Contents:
    """Reads the arrays of a checkpoint onto the host, whatever devices they were on.

    Args:
        path: The folder.
        max_bytes: Limit of what the arrays may take in memory.
    """
    if not orbax_can_use(path):
        raise FileFormatError(
            f"Orbax reads local folders and gs:// only; got {printable(path)}. "
            "Copy the folder to this machine."
        )
    folder, size = _array_folder(path), None
    if isinstance(path, Path) and isinstance(folder, Path):  # object stores have no links
        size = _folder_bytes(path, folder)
        folder = Path(os.path.realpath(folder))  # TensorStore refuses `..`
    try:
        return _read(folder, size, max_bytes)
    except (FileFormatError, UnsafeFileError, OSError, MemoryError):
        raise
    except Exception as error:  # TensorStore does not declare what it raises
        raise FileFormatError(
            f"TensorStore cannot read it ({type(error).__name__}: {printable(error):.200})."
        ) from error


def _array_folder(path: AnyPath) -> AnyPath:
    """Returns the folder that lists arrays: this one, its `default`, or the only one in it."""
    usual: tuple[AnyPath, ...] = (path, path / "default")
    for folder in usual:
        if (folder / "_METADATA").is_file():
            return folder
    entries: list[AnyPath] = sorted(path.iterdir(), key=lambda entry: entry.name)
    items = [entry for entry in entries[:MAX_ITEMS] if (entry / "_METADATA").is_file()]
    if len(items) == 1:
        return items[0]
    shown = ", ".join(printable(entry.name) for entry in (items or entries)[:8])
    if items:
        raise FileFormatError(f"it holds several folders of arrays; pass one of {shown}.")
    raise FileFormatError(
        "it is a folder without the _METADATA of Orbax; "
        f"it holds {shown or 'nothing'}. Pass a file, or the folder of one step."
    )


def _folder_bytes(path: Path, folder: Path) -> int:
    """Returns the size of the files in a folder, after checking that none lies outside `path`."""
    root, size = os.path.realpath(path), 0
    entries = [folder]
    for parent, folders, names in os.walk(folder):
        entries += [Path(parent, name) for name in folders + names]
    for entry in entries:
        name = printable(entry.relative_to(path))
        if not Path(os.path.realpath(entry)).is_relative_to(root):
            raise UnsafeFileError(
                f"its entry {name} is a link to a place outside the folder. If that is intended, "
                "copy the folder with its links followed, as `cp -rL` does."
            )
        if entry.is_file():
            size += entry.lstat().st_size  # of a link, which stands for no content of its own
        elif not entry.is_dir():
            raise FileFormatError(f"its entry {name} is neither a file nor a folder.")
    return size


def _read(folder: AnyPath, size: int | None, max_bytes: int) -> Contents:
    """Reads the arrays of a folder, whose files have `size` bytes if that is known."""
    import tensorstore

    metadata = _read_metadata(folder / "_METADATA")
    entries = _entries(metadata)
    root = _variables_root(entries)
    # Numbers that are ignored are opened too, for their type.
    numbers = [
        entry
        for entry in entries
        if entry.is_stored and (entry.type == "scalar" or _is_variable_array(entry, root))
    ]
    specs = [_spec(folder, entry, metadata) for entry in numbers]
    # With fewer threads, TensorStore holds less memory beyond the arrays.
    context = tensorstore.Context(
        {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    )
    opened = [tensorstore.open(spec, read=True, open=True, context=context) for spec in specs]
    stores = {entry.name: store.result() for entry, store in zip(numbers, opened, strict=True)}
    _check_arrays(stores, size, max_bytes)
    depth = len(root or ())
    names = {
        entry.name: "/".join(entry.keys[depth:]) for entry in numbers if entry.type in ARRAY_TYPES
    }
    ignored = {
        entry.name: _reason(entry, stores.get(entry.name))
        for entry in entries
        if entry.name not in names
    }
    return _read_arrays({names[path]: stores[path] for path in names}), ignored


def _read_arrays(stores: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reads a few arrays at a time, because each takes more memory while it is decompressed."""
    arrays: dict[str, np.ndarray] = {}
    pending: dict[str, Any] = {}
    pending_bytes = 0

    def finish() -> None:
        # Copied, because this thread cannot reuse memory that TensorStore's threads have freed.
        arrays.update({name: aligned_copy(read.result()) for name, read in pending.items()})
        pending.clear()

    for name, store in stores.items():
        pending[name] = store.read()
        pending_bytes += math.prod(store.shape) * store.dtype.numpy_dtype.itemsize
        if pending_bytes > MAX_PENDING_BYTES:
            finish()
            pending_bytes = 0
    finish()
    return arrays


def _variables_root(entries: list[Entry]) -> tuple[str, ...] | None:
    """Returns the keys above the variables, which are () for a `TrainState` of Flax.

    None, which takes all arrays, if there are no variables, or several networks at one level.
    """
    for depth in range(MAX_DEPTH):
        networks = [entry for entry in entries if entry.keys[depth : depth + 1] == ("params",)]
        roots = {entry.keys[:depth] for entry in networks}
        if len(roots) > 1:
            return None
        for root in roots:
            below = {entry.keys[depth + 1 : depth + 2] for entry in networks}
            # The `params` of a state may be all of its variables.
            return (*root, "params") if ("params",) in below <= set(COLLECTIONS) else root
    return None


def _is_variable_array(entry: Entry, root: tuple[str, ...] | None) -> bool:
    if entry.type not in ARRAY_TYPES or root is None:
        return entry.type in ARRAY_TYPES
    depth = len(root)
    return entry.keys[:depth] == root and entry.keys[depth : depth + 1] in COLLECTIONS


def _read_metadata(file: AnyPath) -> dict[str, Any]:
    nbytes = file.stat().st_size
    if nbytes > MAX_METADATA_BYTES:
        raise UnsafeFileError(
            f"its _METADATA has {nbytes} bytes; expected at most {MAX_METADATA_BYTES}."
        )
    try:
        metadata = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"its _METADATA is not JSON ({printable(error):.100}).") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tree_metadata"), dict):
        raise FileFormatError(
            "its _METADATA must be a JSON object with tree_metadata; "
            f"got {describe_value(metadata)}."
        )
    return metadata


def _entries(metadata: dict[str, Any]) -> list[Entry]:
    """Returns the entries of the list, whose names are checked."""
    entries = []
    for text, value in metadata["tree_metadata"].items():
        match value:
            case {
                "key_metadata": list() as keys,
                "value_metadata": {"value_type": str() as value_type, **options},
            } if all(isinstance(key, dict) and isinstance(key.get("key"), str) for key in keys):
                is_stored = not options.get("skip_deserialize", False)
                entries.append(Entry(tuple(key["key"] for key in keys), value_type, is_stored))
            case _:
                raise FileFormatError(f"its _METADATA has a damaged entry, {text!a:.100}.")
    for entry in entries:
        # The name is a path in the folder.
        path = ".".join(entry.keys)
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise UnsafeFileError(f"its entry {path!a:.100} would lie outside the folder.")
    if len({entry.name for entry in entries}) < len(entries):
        raise FileFormatError("two of its entries have the same name.")
    return entries


def _spec(folder: AnyPath, entry: Entry, metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns TensorStore's description of where an array is, as Orbax makes it."""
    use_ocdbt = metadata.get("use_ocdbt")
    if use_ocdbt is None:  # in old checkpoints
        use_ocdbt = (folder / "manifest.ocdbt").is_file()
    name = ".".join(entry.keys)
    base = _base(folder)
    kvstore = (
        {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        if use_ocdbt
        else {**base, "path": f"{base['path']}{name}/"}
    )
    return {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        "kvstore": kvstore,
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value", False),
    }


def _base(folder: AnyPath) -> dict[str, str]:
    """Returns TensorStore's description of a folder."""
    if isinstance(folder, RemotePath):
        bucket, _, path = str(folder).partition("://")[2].partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}
    return {"driver": "file", "path": f"{folder}/"}


def _check_arrays(stores: dict[str, Any], size: int | None, max_bytes: int) -> None:
    """Checks what opened arrays declare, before they are read."""
    nbytes = chunks = decoded_bytes = 0
    for name, store in stores.items():
        itemsize, layout = store.dtype.numpy_dtype.itemsize, store.chunk_layout
        if store.dtype.numpy_dtype.kind in "OSU":
            raise FileFormatError(f"{name!a:.80} is of {store.dtype.name}, which is not supported.")
        array_bytes = math.prod(store.shape) * itemsize
        nbytes += array_bytes
        chunk_shape = layout.read_chunk_template.shape
        chunks += math.prod(-(-n // c) for n, c in zip(store.shape, chunk_shape, strict=True))
        # A chunk is decoded as a whole, even if the array needs one number of it.
        write_shape = layout.write_chunk_template.shape
        chunk_bytes = math.prod(write_shape) * itemsize
        decoded_bytes += chunk_bytes * math.prod(
            -(-n // c) for n, c in zip(store.shape, write_shape, strict=True)
        )
        if chunk_bytes > max(FREE_BYTES, array_bytes):
            raise UnsafeFileError(
                f"a chunk of {name!a:.80} would take {chunk_bytes} bytes, the whole array "
                f"{array_bytes}."
            )
        # Blosc allocates what a chunk declares. Orbax itself never compresses with it.
        if '"blosc"' in json.dumps(store.codec.to_json()):
            raise UnsafeFileError(f"{name!a:.80} is compressed with Blosc, which is not supported.")
    check_size(nbytes, max_bytes, "its arrays")
    if size is None:
        return
    check_explained(nbytes, size, "its arrays")
    # Links inside the folder, or chunks left out of it, cost nothing there.
    check_explained(decoded_bytes, size, "the chunks of its arrays")
    max_chunks = FREE_CHUNKS + CHUNKS_PER_KIB * size // 1024
    if chunks > max_chunks:
        raise UnsafeFileError(
            f"its arrays have {chunks} chunks, which its size of {size} bytes does not explain; "
            f"expected at most {max_chunks}."
        )


def _reason(entry: Entry, store: Any) -> str:
    """Returns why an entry is ignored. `store` is its array, if that was opened."""
    if store is None and entry.is_stored and entry.type in ARRAY_TYPES:
        return "training state"
    if store is not None:
        return ignored_reason(store.dtype.numpy_dtype.type().item())
    name = "str" if entry.type == "string" else printable(entry.type)
    return f"not weights: {name:.40}"
