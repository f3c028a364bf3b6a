"""The entries of a file under native names, found by the naming table of their source."""

import dataclasses

from nonlocal_jax.terminal import printable
from nonlocal_jax.weights import sources
from nonlocal_jax.weights.load_reports import LoadedWeight
from nonlocal_jax.weights.names import NamingTable, Weights, variable_path
from nonlocal_jax.weights.readers import Checkpoint

NATIVE = "nonlocal_jax"  # the names of this library, which need no table


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a file.

    Attributes:
        key: Its name in the file.
        target: The leaf of the variables that it becomes; "" if there is none.
        array: The array in its native layout.
        flat: Whether it is a kernel of an image network, with two position axes.
        source_shape: Its shape in the file.
        transform: What was done to the array, or why there is no target.
    """

    key: str
    target: str
    array: Weights
    flat: bool
    source_shape: tuple[int, ...]
    transform: str


def read_names(
    checkpoint: Checkpoint,
) -> tuple[NamingTable | None, list[Entry], list[LoadedWeight]]:
    """Translates the name of every array to the native name.

    Args:
        checkpoint: The contents of a file.

    Returns:
        The naming table, None for native names; the entries in the order of the file, without a
        target where the name is unknown; and the entries that are known to be no weights, as rows
        of the load report.

    Raises:
        ValueError: The names are of no known source.
    """
    table = detect(checkpoint)
    entries = []
    non_weights = [
        LoadedWeight(key, "", (), (), reason) for key, reason in checkpoint.ignored.items()
    ]
    for key, array in checkpoint.arrays.items():
        name = strip_prefix(key)
        if table is None:
            entries.append(Entry(key, name, array, False, array.shape, "unchanged"))
        elif found := table.native_name(name):
            native_name, row = found
            native_array = row.transform.import_array(array)
            target, is_flat = variable_path(native_name), array.ndim == 4
            entry = Entry(key, target, native_array, is_flat, array.shape, row.transform.shapes)
            entries.append(entry)
        elif table.holds_no_weights(name):
            non_weights.append(LoadedWeight(key, "", array.shape, (), "not a weight"))
        else:
            entries.append(Entry(key, "", array, False, array.shape, "unknown"))
    return table, entries, non_weights


def detect(checkpoint: Checkpoint) -> NamingTable | None:
    """Finds the naming table that knows the most names of a file, at least half of them.

    Returns:
        The table; None if all names are native.

    Raises:
        ValueError: No table knows half of the names.
    """
    names = [strip_prefix(key) for key in checkpoint.arrays]
    if names and all(name.startswith(("params/", "batch_stats/")) for name in names):
        return None
    counts = {
        table.name: sum(table.native_name(name) is not None for name in names)
        for table in sources.NAMING_TABLES
    }
    best = max(sources.NAMING_TABLES, key=lambda table: counts[table.name])
    candidates = sum(not best.holds_no_weights(name) for name in names)
    if not counts[best.name] or 2 * counts[best.name] < candidates:
        first_names = ", ".join(map(printable, names[:4]))
        raise ValueError(
            f"{printable(checkpoint.path)} must have the names of {', '.join(counts)} or of this "
            f"library; its first names are {first_names}."
        )
    return best


def strip_prefix(key: str) -> str:
    """Removes the prefix that wrappers such as DataParallel put before every name."""
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def table_name(table: NamingTable | None) -> str:
    """Returns the name of a table; native names have none."""
    return NATIVE if table is None else table.name


def naming_tables() -> dict[str, NamingTable]:
    """Returns the tables by name."""
    return {table.name: table for table in sources.NAMING_TABLES}
