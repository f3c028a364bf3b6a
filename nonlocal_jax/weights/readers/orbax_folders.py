"""Folders of Orbax: those of its checkpointers, and of its manager, one level down."""

import math
from typing import Any

import numpy as np

from nonlocal_jax.files import AnyPath
from nonlocal_jax.remote_paths import orbax_can_use
from nonlocal_jax.weights.readers.errors import FileFormatError, UnsafeFileError
from nonlocal_jax.weights.readers.values import Contents, check_size, ignored_reason


def read_orbax(path: AnyPath, max_bytes: int) -> Contents:
    """Reads the arrays of a checkpoint onto the host, whatever devices they were on.

    Args:
        path: The folder.
        max_bytes: Limit of what the arrays may take in memory.
    """
    if not orbax_can_use(path):
        raise FileFormatError(
            f"Orbax reads local folders and gs:// only; got {path}. "
            "Copy the folder to this machine."
        )
    candidates = (path, path / "default")
    folders = [folder for folder in candidates if (folder / "_METADATA").is_file()]
    if not folders:
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise FileFormatError(
            "it is a folder without the _METADATA of Orbax; "
            f"it holds {names}. Pass a file, or the folder of one step."
        )
    try:
        return _restore(str(folders[0].absolute()), max_bytes)
    except (FileFormatError, UnsafeFileError):
        raise
    except Exception as error:  # Orbax, TensorStore and JSON do not declare what they raise
        raise FileFormatError(
            f"Orbax cannot read it ({type(error).__name__}: {error!s:.200})."
        ) from error


def _restore(folder: str, max_bytes: int) -> Contents:
    import jax
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

    def restore_args(leaf: Any) -> Any:
        is_array = type(leaf) is ocp.metadata.ArrayMetadata
        return ocp.RestoreArgs(restore_type=np.ndarray if is_array else None)

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        nbytes = sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(tree)
            if isinstance(leaf, ocp.metadata.ArrayMetadata)
        )
        check_size(nbytes, max_bytes, "its arrays")
        restored = checkpointer.restore(folder, restore_args=jax.tree.map(restore_args, tree))
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    entries = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves
    }
    if len(entries) < len(leaves):
        raise FileFormatError("two of its entries have the same name.")
    arrays = {name: leaf for name, leaf in entries.items() if isinstance(leaf, np.ndarray)}
    ignored = {name: ignored_reason(leaf) for name, leaf in entries.items() if name not in arrays}
    return arrays, ignored
