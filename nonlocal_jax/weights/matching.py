"""Matching the entries of a file with the leaves of a network."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.entries import Entry
from nonlocal_jax.weights.folding import FOLDED
from nonlocal_jax.weights.inflation import inflate
from nonlocal_jax.weights.load_reports import LoadedWeight, dims
from nonlocal_jax.weights.names import Weights

Part = Literal["classifier", "nonlocal", "statistics"]
PARTS: dict[Part, str] = {
    "classifier": "the last layer",
    "nonlocal": "the non-local blocks",
    "statistics": "the running statistics of BatchNorm",
}
CLASSIFIERS = ("params/head/", "params/fc2/")


def match_entry(
    entry: Entry,
    leaves: Mapping[str, Any],
    loaded: dict[str, Weights],
    initialise: Sequence[Part],
    inflate_flat: bool,
) -> tuple[LoadedWeight, str | None]:
    """Adds an entry to `loaded`, if it fits a leaf.

    Args:
        entry: An entry of the file.
        leaves: The leaves of the network by path, with shape and dtype.
        loaded: The arrays that were matched before, by path.
        initialise: The parts that may keep their initial values.
        inflate_flat: Whether 3-D kernels of one frame are inflated.

    Returns:
        The row of the load report, and what is wrong with the entry, if anything is.
    """
    if not entry.target and entry.transform.startswith(FOLDED):
        return _skipped(entry, entry.transform), None
    if problem := _placement_problem(entry, leaves, loaded):
        return _skipped(entry, "does not fit"), problem
    leaf = leaves[entry.target]
    shape = tuple(leaf.shape)
    array, transform = entry.array, entry.transform
    if _is_flat(array, shape) and (entry.flat or inflate_flat):
        # In the leaf's dtype: a fifth of a float16 kernel would lose digits.
        array = np.asarray(inflate(jnp.asarray(array[0], leaf.dtype), shape[0]))
        transform += f", inflated to {shape[0]} frames"
    if array.shape != shape:
        if "classifier" in initialise and entry.target.startswith(CLASSIFIERS):
            return _skipped(entry, f"the leaf has another size, {dims(shape)}"), None
        fits_inflated = array.ndim == 5 and array.shape == (1, *shape[1:])
        hint = ". The kernel is flat: pass inflate_flat=True" if fits_inflated else ""
        sizes = f"becomes {dims(array.shape)}; {entry.target} has {dims(shape)}"
        problem = f"{_describe(entry)} {sizes}{hint}"
        return _skipped(entry, "does not fit"), problem
    loaded[entry.target] = array
    return LoadedWeight(entry.key, entry.target, entry.source_shape, shape, transform), None


def _skipped(entry: Entry, reason: str) -> LoadedWeight:
    return LoadedWeight(entry.key, "", entry.source_shape, (), reason)


def _describe(entry: Entry) -> str:
    return f"{printable(entry.key)} {dims(entry.source_shape)}"


def _placement_problem(
    entry: Entry, leaves: Mapping[str, Any], loaded: Mapping[str, Weights]
) -> str | None:
    """Describes why an entry has no place in the network; None if it has one."""
    if not entry.target:
        return f"{_describe(entry)} is not a weight of any network here"
    if entry.target not in leaves:
        target = printable(entry.target)
        return f"{_describe(entry)} belongs at {target}, which the network does not have"
    if entry.target in loaded:
        return f"{_describe(entry)} is a second {printable(entry.target)}"
    if not jnp.issubdtype(entry.array.dtype, jnp.floating):
        name = printable(entry.key)
        return f"{name} is of {entry.array.dtype}; convert it to a floating-point type first"
    return None


def _is_flat(array: Weights, shape: tuple[int, ...]) -> bool:
    """Whether an array is a kernel of one frame where the leaf has several."""
    return array.ndim == len(shape) == 5 and array.shape[0] == 1 < shape[0]


def missing_leaves(
    missing: Sequence[str],
    leaves: Mapping[str, Any],
    loaded: Mapping[str, Weights],
    initialise: Sequence[Part],
) -> list[str]:
    """Describes the leaves that the file does not have and that may not keep their initial values.

    Args:
        missing: Paths of the leaves that the file does not have.
        leaves: All leaves of the network by path.
        loaded: The arrays that were matched, by path.
        initialise: The parts that may keep their initial values.

    Returns:
        One sentence for each leaf.
    """
    problems = []
    for path in missing:
        part = _part_of(path)
        if path.startswith("batch_stats/"):
            norm = path.split("/", 1)[1].rpartition("/")[0]
            if f"params/{norm}/scale" in loaded:
                part = "statistics"
            elif part == "statistics":
                continue  # the whole norm is missing, which is reported for its scale
        if part is not None and part in initialise:
            continue
        hint = f"; to keep the initial values of {PARTS[part]}, pass " if part else ""
        hint += f"initialise=({part!r},)" if part else ""
        problems.append(f"{path} {dims(leaves[path].shape)} is not in the file{hint}")
    return problems


def _part_of(path: str) -> Part | None:
    if path.startswith(CLASSIFIERS):
        return "classifier"
    if "/nonlocal" in path:
        return "nonlocal"
    return "statistics" if path.startswith("batch_stats/") else None
