"""Loading a file of trained weights into a network, with an account of every weight."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax import checks
from nonlocal_jax.files import PathLike
from nonlocal_jax.layers.variable_shapes import variable_shapes
from nonlocal_jax.terminal import printable
from nonlocal_jax.types import Array, PRNGKeyArray
from nonlocal_jax.weights.contradictions import warn_of_contradictions
from nonlocal_jax.weights.entries import read_names, table_name
from nonlocal_jax.weights.folding import fold_entries
from nonlocal_jax.weights.load_reports import LoadedWeight, LoadReport
from nonlocal_jax.weights.matching import PARTS, Part, match_entry, missing_leaves
from nonlocal_jax.weights.names import NamingTable, Weights, flatten, unflatten
from nonlocal_jax.weights.readers import Checkpoint, checkpoint_files
from nonlocal_jax.weights.readers.aligned import ALIGNMENT, aligned_copy


def load(
    path: PathLike,
    model: nn.Module,
    *,
    initialise: Sequence[Part] = (),
    inflate_flat: bool = False,
    example: jax.ShapeDtypeStruct | None = None,
    rng: PRNGKeyArray | None = None,
) -> dict[str, Any]:
    """Loads a file of trained weights into the variables of a network.

    Supported are pickles of Caffe2 (video-nonlocal-net, PySlowFast's model zoo), files of
    `torch.save` (PySlowFast, mmaction2, pytorchvideo, torchvision, Non-local_pytorch),
    `.safetensors` files (with the same names, timm's, or those of `save`) and folders of Orbax.
    Neither torch nor Caffe2 is needed. Format and source are recognised by the content. 2-D kernels
    are inflated. If the network is built with `frozen_bn=True` and the file has running statistics,
    these are folded.

    Args:
        path: The file or folder, local or remote, such as gs://bucket/file.
        model: The network. Its depth, kind and places of blocks must be those of the file. Its
            poolings, strides and pairwise function have no weights, so the file need not show them:
            `python -m nonlocal_jax.weights inspect` lists what it leaves open. If the names or a
            configuration in the file show others, or its own name is that of a published file with
            others, there is a warning.
        initialise: The parts that keep their initial values where the file has none that fit:
            "classifier" (for another number of classes), "nonlocal" (for files of a network without
            blocks), "statistics" (for files without running statistics).
        inflate_flat: Whether 3-D kernels of one frame are inflated too, such as those of a C2D
            network for an I3D.
        example: Shape and dtype of an input, if the model has no attribute `example`.
        rng: Key for the initial values; Defaults to `jax.random.key(0)`.

    Returns:
        {"params": ..., "batch_stats": ...}, in the structure of `model.init`.

    Raises:
        OSError: The path cannot be read; a `FileNotFoundError` if it does not exist.
        UnsafeFileError: The file asks for code, for files outside its folder, or for more memory
            than its size explains (see `read`).
        FileFormatError: The file is damaged, or its format is not supported.
        ValueError: The names are of no known source; or entries and leaves do not match, in which
            case the message lists the first of them with their shapes.

    >>> import tempfile, pathlib, jax, jax.numpy as jnp, nonlocal_jax as nl
    >>> model = nl.models.non_local_pytorch_mnist()
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), model.example)
    >>> variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "digits.safetensors"
    >>> nl.weights.save(path, variables)
    >>> loaded = nl.weights.load(path, model)
    >>> bool((loaded["params"]["fc2"]["kernel"] == variables["params"]["fc2"]["kernel"]).all())
    True
    """
    variables, _ = load_with_report(
        path,
        model,
        initialise=initialise,
        inflate_flat=inflate_flat,
        example=example,
        rng=rng,
    )
    return variables


def load_report(path: PathLike, model: nn.Module, **options: Any) -> LoadReport:
    """Reports what `load` does with every entry of a file and every leaf of a network.

    Args:
        path: The file or folder.
        model: The network.
        **options: Options of `load`.

    Returns:
        The report with names, shapes and transforms. `print` shows it as a table.

    Raises:
        ValueError, FileNotFoundError: As `load`.
    """
    return load_with_report(path, model, **options)[1]


def load_with_report(
    path: PathLike, model: nn.Module, **options: Any
) -> tuple[dict[str, Any], LoadReport]:
    """Returns the results of `load` and of `load_report`, reading the file once."""
    checkpoint = checkpoint_files.read(path)
    weights = _match(checkpoint, model, **options)
    warn_of_contradictions(checkpoint, model)
    checkpoint.arrays.clear()  # so that each array is freed as soon as it is converted
    return weights.convert(), weights.report


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, **options: Any
) -> tuple[dict[str, Any], LoadReport]:
    """Returns the results of `load` and of `load_report` for a file that was read before."""
    weights = _match(checkpoint, model, **options)
    warn_of_contradictions(checkpoint, model)
    return weights.convert(), weights.report


def load_arrays(
    checkpoint: Checkpoint, model: nn.Module, **options: Any
) -> tuple[dict[str, Any], LoadReport]:
    """Does what `load_checkpoint` does, for a network of which only the arrays matter."""
    weights = _match(checkpoint, model, **options)
    return weights.convert(), weights.report


@dataclasses.dataclass(frozen=True)
class _MatchedWeights:
    """Arrays for all leaves of a network.

    Attributes:
        leaves: Shape and dtype of each leaf by path.
        arrays: The arrays by path, in the layout of the leaves.
        report: The report of `load_report`.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]
    arrays: dict[str, Weights]
    report: LoadReport

    def convert(self) -> dict[str, Any]:
        """Returns the variables, and lets go of each array as it is converted."""
        leaves = self.leaves.items()
        values = {path: _to_device(self.arrays.pop(path), leaf.dtype) for path, leaf in leaves}
        return unflatten(values)


def _to_device(array: Weights, dtype: Any) -> Array:
    """Converts an array that nothing writes to any more, and puts it on JAX's default device."""
    # JAX copies an unaligned array in another thread, and keeps it in memory until then.
    is_aligned = array.ctypes.data % ALIGNMENT == 0
    if array.dtype != dtype or not (array.flags.c_contiguous and is_aligned):
        array = aligned_copy(array, dtype)
    return jax.device_put(array)


def _match(
    checkpoint: Checkpoint,
    model: nn.Module,
    *,
    initialise: Sequence[Part] = (),
    inflate_flat: bool = False,
    example: jax.ShapeDtypeStruct | None = None,
    rng: PRNGKeyArray | None = None,
) -> _MatchedWeights:
    """Finds an array for each leaf of a network, without copying it where possible."""
    for part in initialise:
        checks.one_of("initialise", part, PARTS)
    example = example or getattr(model, "example", None)
    if example is None:
        raise TypeError(
            f"{type(model).__name__} has no example input; "
            "pass example=jax.ShapeDtypeStruct(shape, dtype)."
        )
    leaves = flatten(variable_shapes(model, example))
    table, entries, rows = read_names(checkpoint)
    entries = fold_entries(entries, leaves, NamingTable.epsilon if table is None else table.epsilon)

    loaded: dict[str, Weights] = {}
    entry_problems = []
    for entry in entries:
        row, problem = match_entry(entry, leaves, loaded, initialise, inflate_flat)
        rows.append(row)
        if problem:
            entry_problems.append(problem)
    # Parameters first: a missing norm is better reported by its scale than by its statistics.
    missing = [leaf for leaf in leaves if leaf not in loaded]
    missing.sort(key=lambda leaf: leaf.startswith("batch_stats"))
    targets = {entry.target for entry in entries}
    unnamed = [leaf for leaf in missing if leaf not in targets]
    leaf_problems = missing_leaves(unnamed, leaves, loaded, initialise)
    if entry_problems or leaf_problems:
        raise ValueError(_misfit(checkpoint, table, model, entry_problems, leaf_problems))

    initial = _initial_values(model, example, rng, missing)
    rows += [
        LoadedWeight("", leaf, (), initial[leaf].shape, "keeps its initial value")
        for leaf in missing
    ]
    return _MatchedWeights(leaves, loaded | initial, LoadReport(table_name(table), tuple(rows)))


def _misfit(
    checkpoint: Checkpoint,
    table: NamingTable | None,
    model: nn.Module,
    entry_problems: list[str],
    leaf_problems: list[str],
) -> str:
    """Lists the first problems of both kinds."""
    shown = entry_problems[:4] + leaf_problems[:4]
    remaining = len(entry_problems) + len(leaf_problems) - len(shown)
    lines = "\n  ".join([*shown, f"and {remaining} more"] if remaining else shown)
    count, names = len(checkpoint.arrays), table_name(table)
    return (
        f"{printable(checkpoint.path)}, {count} arrays named as in {names}, does not fit this "
        f"{type(model).__name__}:\n  {lines}\nBuild the model with the depth, kind, places of "
        "blocks and number of classes of the file (`python -m nonlocal_jax.weights inspect` shows "
        "them), or pass `initialise`."
    )


def _initial_values(
    model: nn.Module, example: jax.ShapeDtypeStruct, rng: PRNGKeyArray | None, paths: list[str]
) -> dict[str, Weights]:
    """Initialises some leaves of a network.

    Only these leaves are compiled: compiling a network's whole initialisation takes longer than
        loading the file.
    """

    def initialise(key: PRNGKeyArray) -> dict[str, Any]:
        leaves = flatten(model.init(key, jnp.zeros(example.shape, example.dtype)))
        return {path: leaves[path] for path in paths}

    if not paths:
        return {}
    leaves = jax.jit(initialise)(jax.random.key(0) if rng is None else rng)
    return {path: np.asarray(value) for path, value in leaves.items()}
