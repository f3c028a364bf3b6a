"""The arrays of a file under our names: whose names it has, and what each entry is here."""

import dataclasses

from nonlocal_jax.weights.files import Checkpoint
from nonlocal_jax.weights.names import Source, Weights, variable_path
from nonlocal_jax.weights.report import LoadedWeight
from nonlocal_jax.weights.sources import SOURCES

NATIVE = "nonlocal_jax"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a file.

    Attributes:
        key: the name that the file has for it.
        target: the leaf of `variables` that it becomes; "" where there is none.
        array: as it would be there, its axes as ours.
        flat: whether it is a kernel of an image network, of two position axes.
        source_shape: its shape in the file.
        transform: what was done to it, or why it has no target.
    """

    key: str
    target: str
    array: Weights
    flat: bool
    source_shape: tuple[int, ...]
    transform: str


def read_names(checkpoint: Checkpoint) -> tuple[Source | None, list[Entry], list[LoadedWeight]]:
    """Every array under our name.

    Args:
        checkpoint: a file that was read.

    Returns:
        The source, None for our own names; the entries in the order of the file, those of unknown names without a target;
        and what is known to be no weight, as the report has it.

    Raises:
        ValueError: nobody's names.
    """
    source = detect(checkpoint)
    others = [LoadedWeight(key, "", (), (), reason) for key, reason in checkpoint.ignored.items()]
    entries = []
    for key, array in checkpoint.arrays.items():
        name = strip_prefix(key)
        if source is None:
            entries.append(Entry(key, name, array, False, array.shape, "as it is"))
        elif found := source.to_ours(name):
            ours, row = found
            ours_array, flat = row.transform.to_ours(array), array.ndim == 4
            entries.append(
                Entry(key, variable_path(ours), ours_array, flat, array.shape, row.transform.shapes)
            )
        elif source.holds_no_weights(name):
            others.append(LoadedWeight(key, "", array.shape, (), "not a weight"))
        else:
            entries.append(Entry(key, "", array, False, array.shape, "unknown"))
    return source, entries, others


def detect(checkpoint: Checkpoint) -> Source | None:
    """Whose names the arrays have: the source that knows the most of them, at least half; None for our own.

    Raises:
        ValueError: nobody's.
    """
    keys = [strip_prefix(key) for key in checkpoint.arrays]
    if keys and all(key.startswith(("params/", "batch_stats/")) for key in keys):
        return None
    known = {
        source.name: sum(source.to_ours(key) is not None for key in keys) for source in SOURCES
    }
    best = max(SOURCES, key=lambda source: known[source.name])
    if (
        2 * known[best.name] < sum(not best.holds_no_weights(key) for key in keys)
        or not known[best.name]
    ):
        some = ", ".join(keys[:4])
        raise ValueError(
            f"{checkpoint.path} has the names of none of {', '.join(known)}, nor of this library; its first are {some}."
        )
    return best


def strip_prefix(key: str) -> str:
    """Without what wrappers such as DataParallel put before every name."""
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def name_of(source: Source | None) -> str:
    """What a source is called; our own names have none."""
    return NATIVE if source is None else source.name
