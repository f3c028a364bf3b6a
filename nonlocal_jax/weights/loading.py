"""From a file of trained weights to the variables of a network here, every weight accounted for."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.types import PRNGKeyArray
from nonlocal_jax.weights import files
from nonlocal_jax.weights.entries import Entry, name_of, read_names
from nonlocal_jax.weights.inflation import inflate
from nonlocal_jax.weights.names import Weights, flatten, unflatten
from nonlocal_jax.weights.report import LoadedWeight, LoadReport, dims

Part = Literal["classifier", "nonlocal", "statistics"]
PARTS: dict[Part, str] = {
    "classifier": "the last layer",
    "nonlocal": "the non-local blocks",
    "statistics": "the running statistics of BatchNorm",
}
CLASSIFIERS = ("params/head/", "params/fc2/")
FROZEN_EPSILON = 1e-5
FOLDED = "folded into"


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    initialise: Sequence[Part] = (),
    inflate_flat: bool = False,
    example: jax.ShapeDtypeStruct | None = None,
    rng: PRNGKeyArray | None = None,
) -> dict[str, Any]:
    """The variables of a network, from a file of trained weights.

    Read are pickles of Caffe2 (video-nonlocal-net, PySlowFast's model zoo), files of `torch.save` (PySlowFast, mmaction2,
    pytorchvideo, torchvision, Non-local_pytorch; torch is not wanted), `.safetensors` (the same names, timm's, or those of
    `save`) and folders of Orbax. What a file is, and whose names it has, shows in its content. 2-D kernels are inflated.
    Where the network is built with `frozen_bn=True` and the file has running statistics, they are folded.

    Args:
        path: the file or folder.
        model: the network; its depth, kind and places of blocks must be those of the file.
        initialise: which parts stay as they are initialised where the file has none that fit: "classifier" (for another
            number of classes), "nonlocal" (from a network without blocks), "statistics" (from files without running
            statistics).
        inflate_flat: whether 3-D kernels of one frame are inflated too, as a C2D network's into an I3D.
        example: shape and dtype of an input of the model, where the model has no `example` itself.
        rng: for what is initialised; None is `jax.random.key(0)`.

    Returns:
        {"params": ..., "batch_stats": ...}, as `model.init` makes them.

    Raises:
        FileNotFoundError: there is no such path.
        UnsafeFileError: the file tries to run something, or is far larger than it looks.
        FileFormatError: the file is damaged or of a kind that is not read.
        ValueError: names that are of no source known; leaves that the file lacks or has in another shape, entries that
            the network has no place for: the first of them are named, with both shapes.

    >>> import tempfile, pathlib, jax, jax.numpy as jnp, nonlocal_jax as nl
    >>> model = nl.models.non_local_pytorch_mnist()
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "digits.safetensors"
    >>> nl.weights.save(path, variables)
    >>> loaded = nl.weights.load(path, model)
    >>> bool((loaded["params"]["fc2"]["kernel"] == variables["params"]["fc2"]["kernel"]).all())
    True
    """
    options = {
        "initialise": initialise,
        "inflate_flat": inflate_flat,
        "example": example,
        "rng": rng,
    }
    return load_with_report(path, model, **options)[0]  # type: ignore[arg-type]


def load_report(path: str | os.PathLike[str], model: nn.Module, **options: Any) -> LoadReport:
    """What `load` does with every entry of a file and every leaf of a network: source key, target, shapes, transform.

    Args:
        path: the file or folder.
        model: the network.
        **options: as of `load`.

    Returns:
        The report; `print` shows the table.

    Raises:
        ValueError, FileNotFoundError: as `load`.
    """
    return load_with_report(path, model, **options)[1]


def load_with_report(
    path: str | os.PathLike[str], model: nn.Module, **options: Any
) -> tuple[dict[str, Any], LoadReport]:
    """Both `load` and `load_report`, from one reading of the file."""
    return load_checkpoint(files.read(path), model, **options)


def load_checkpoint(
    checkpoint: files.Checkpoint,
    model: nn.Module,
    *,
    initialise: Sequence[Part] = (),
    inflate_flat: bool = False,
    example: jax.ShapeDtypeStruct | None = None,
    rng: PRNGKeyArray | None = None,
) -> tuple[dict[str, Any], LoadReport]:
    """Both `load` and `load_report`, of a file that was read already."""
    for part in initialise:
        if part not in PARTS:
            raise ValueError(f"initialise must be of {', '.join(map(repr, PARTS))}; got {part!r}.")
    example = example or getattr(model, "example", None)
    if example is None:
        raise TypeError(
            f"{type(model).__name__} has no example input; pass example=jax.ShapeDtypeStruct(shape, dtype)."
        )
    expected = flatten(jax.eval_shape(model.init, jax.random.key(0), example))
    source, entries, report = read_names(checkpoint)
    entries = _fold(entries, expected)
    found: dict[str, Weights] = {}
    odd_entries: list[str] = []
    for entry in entries:
        row, problem = _place(entry, expected, found, initialise, inflate_flat)
        report.append(row)
        if problem:
            odd_entries.append(problem)
    missing = sorted(
        (leaf for leaf in expected if leaf not in found),
        key=lambda leaf: leaf.startswith("batch_stats"),
    )
    named = {entry.target for entry in entries}
    odd_leaves = _missing(
        [leaf for leaf in missing if leaf not in named], expected, found, initialise
    )
    if odd_entries or odd_leaves:
        who = f"{checkpoint.path}, {len(checkpoint.arrays)} arrays named as in {name_of(source)}"
        raise ValueError(_misfit(who, type(model).__name__, odd_entries, odd_leaves))
    left = _initialised(model, example, rng, missing)
    report += [
        LoadedWeight("", leaf, (), left[leaf].shape, "left at its initialisation")
        for leaf in missing
    ]
    leaves = {
        leaf: jnp.asarray((found if leaf in found else left)[leaf], expected[leaf].dtype)
        for leaf in expected
    }
    return unflatten(leaves), LoadReport(name_of(source), tuple(report))


def _misfit(who: str, model: str, odd_entries: list[str], odd_leaves: list[str]) -> str:
    """The first of both kinds of what does not fit."""
    shown = odd_entries[:4] + odd_leaves[:4]
    more = len(odd_entries) + len(odd_leaves) - len(shown)
    lines = "\n  ".join([*shown, f"and {more} more"] if more else shown)
    return (
        f"{who}, does not fit this {model}:\n  {lines}\nBuild the model with the depth, kind, places of blocks and number of "
        "classes of the file (`python -m nonlocal_jax.weights inspect` tells them), or pass `initialise`."
    )


def _fold(entries: list[Entry], expected: Mapping[str, Any]) -> list[Entry]:
    """Running statistics that the network has no place for become part of its affine maps."""
    by_target = {entry.target: entry.array for entry in entries}
    folded = []
    for entry in entries:
        collection, _, name = entry.target.partition("/")
        norm, _, leaf = name.rpartition("/")
        frozen = f"params/{norm}/scale" in expected and f"batch_stats/{norm}/var" not in expected
        parts = [
            by_target.get(path)
            for path in (
                f"params/{norm}/scale",
                f"batch_stats/{norm}/mean",
                f"batch_stats/{norm}/var",
            )
        ]
        gamma, mean, var = (np.asarray(part, np.float64) for part in parts)
        whole = (
            not any(part is None for part in parts)
            and gamma.shape == mean.shape == var.shape == entry.array.shape
        )
        if not frozen or not whole or leaf not in ("scale", "bias", "mean", "var"):
            folded.append(entry)
        elif collection == "batch_stats":
            folded.append(
                dataclasses.replace(entry, target="", transform=f"{FOLDED} params/{norm}")
            )
        else:
            scale = gamma / np.sqrt(var + FROZEN_EPSILON)
            array = scale if leaf == "scale" else np.asarray(entry.array, np.float64) - mean * scale
            transform = "γ / √(var + ε)" if leaf == "scale" else "β − mean · γ / √(var + ε)"
            folded.append(
                dataclasses.replace(entry, array=array.astype(np.float32), transform=transform)
            )
    return folded


def _place(
    entry: Entry,
    expected: Mapping[str, Any],
    found: dict[str, Weights],
    initialise: Sequence[Part],
    inflate_flat: bool,
) -> tuple[LoadedWeight, str | None]:
    """Put an entry where it belongs; the row of the report, and what is wrong."""
    target, array, transform = entry.target, entry.array, entry.transform
    if not target and transform.startswith(FOLDED):
        return LoadedWeight(entry.key, "", entry.source_shape, (), transform), None
    nowhere = LoadedWeight(entry.key, "", entry.source_shape, (), "no place for it")
    if not target:
        return nowhere, f"{entry.key} {dims(entry.source_shape)} is no weight of these networks"
    if target not in expected:
        return (
            nowhere,
            f"{entry.key} {dims(entry.source_shape)} would be {target}, which the network does not have",
        )
    if target in found:
        return nowhere, f"{entry.key} {dims(entry.source_shape)} is a second {target}"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return (
            nowhere,
            f"{entry.key} is of {array.dtype}; weights are floating point, convert them first",
        )
    shape = tuple(expected[target].shape)
    if (
        array.ndim == 5
        and len(shape) == 5
        and array.shape[0] == 1 < shape[0]
        and (entry.flat or inflate_flat)
    ):
        array = np.asarray(inflate(jnp.asarray(array[0], expected[target].dtype), shape[0]))
        transform += f", inflated to {shape[0]} frames"
    if array.shape != shape:
        if "classifier" in initialise and target.startswith(CLASSIFIERS):
            return LoadedWeight(
                entry.key, "", entry.source_shape, (), f"of another size than {dims(shape)}"
            ), None
        hint = (
            ". It is flat: pass inflate_flat=True"
            if array.ndim == 5 and (1, *shape[1:]) == array.shape
            else ""
        )
        return (
            nowhere,
            f"{entry.key} {dims(entry.source_shape)} becomes {dims(array.shape)}; {target} has {dims(shape)}{hint}",
        )
    found[target] = array
    return LoadedWeight(entry.key, target, entry.source_shape, shape, transform), None


def _missing(
    missing: list[str],
    expected: Mapping[str, Any],
    found: Mapping[str, Weights],
    initialise: Sequence[Part],
) -> list[str]:
    """What is wrong with leaves that the file does not have: those that are not asked to stay as they are."""
    problems = []
    for target in missing:
        part = _part(target)
        if target.startswith("batch_stats/"):
            if f"params/{target.split('/', 1)[1].rpartition('/')[0]}/scale" in found:
                part = "statistics"
            elif part == "statistics":
                continue  # the norm as a whole is missing, which its scale says
        if part is not None and part in initialise:
            continue
        hint = (
            f"; to leave {PARTS[part]} as initialised, pass initialise=({part!r},)" if part else ""
        )
        problems.append(f"{target} {dims(expected[target].shape)} is not in the file{hint}")
    return problems


def _part(target: str) -> Part | None:
    if target.startswith(CLASSIFIERS):
        return "classifier"
    if "/nonlocal" in target:
        return "nonlocal"
    return "statistics" if target.startswith("batch_stats/") else None


def _initialised(
    model: nn.Module, example: jax.ShapeDtypeStruct, rng: PRNGKeyArray | None, missing: list[str]
) -> dict[str, Weights]:
    """Those leaves alone, so that nothing else is compiled: a network's initialisation takes longer to compile than to load."""

    def initialise(key: PRNGKeyArray) -> dict[str, Any]:
        leaves = flatten(model.init(key, jnp.zeros(example.shape, example.dtype)))
        return {leaf: leaves[leaf] for leaf in missing}

    if not missing:
        return {}
    leaves = jax.jit(initialise)(jax.random.key(0) if rng is None else rng)
    return {leaf: np.asarray(value) for leaf, value in leaves.items()}
