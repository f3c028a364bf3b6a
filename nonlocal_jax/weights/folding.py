"""Folding the running statistics of a file into the affine maps of a network with frozen norms."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_jax.layers.norm import fold_batch_norm
from nonlocal_jax.weights.entries import Entry
from nonlocal_jax.weights.names import NamingTable, Weights

FOLDED = "folded into"  # how the transform of an entry starts that became part of other leaves


def fold_entries(
    entries: list[Entry], leaves: Mapping[str, Any], epsilon: float = NamingTable.epsilon
) -> list[Entry]:
    """Folds running statistics that the network has no leaves for into its affine maps.

    scale = γ / √(var + ε), bias = β − mean · scale, computed in float64.

    Args:
        entries: The entries of a file.
        leaves: The leaves of the network by path.
        epsilon: ε of BatchNorm.

    Returns:
        The entries with folded scales and biases. The statistics have no target any more.
    """
    arrays = {entry.target: entry.array for entry in entries}
    return [_fold_entry(entry, arrays, leaves, epsilon) for entry in entries]


def _fold_entry(
    entry: Entry, arrays: Mapping[str, Weights], leaves: Mapping[str, Any], epsilon: float
) -> Entry:
    collection, _, name = entry.target.partition("/")
    norm, _, leaf = name.rpartition("/")
    is_frozen = f"params/{norm}/scale" in leaves and f"batch_stats/{norm}/var" not in leaves
    if not is_frozen or leaf not in ("scale", "bias", "mean", "var"):
        return entry
    paths = (f"params/{norm}/scale", f"batch_stats/{norm}/mean", f"batch_stats/{norm}/var")
    if any(path not in arrays or arrays[path].shape != entry.array.shape for path in paths):
        return entry  # loading reports what is missing or of another shape
    if collection == "batch_stats":
        return dataclasses.replace(entry, target="", transform=f"{FOLDED} params/{norm}")
    gamma, mean, var = (np.asarray(arrays[path], np.float64) for path in paths)
    beta = np.asarray(entry.array, np.float64) if leaf == "bias" else 0.0
    scale, bias = fold_batch_norm(gamma, beta, mean, var, epsilon)
    array = scale if leaf == "scale" else bias
    transform = "γ / √(var + ε)" if leaf == "scale" else "β − mean · γ / √(var + ε)"
    return dataclasses.replace(entry, array=array.astype(np.float32), transform=transform)
