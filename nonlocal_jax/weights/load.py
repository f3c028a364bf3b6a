"""From a file of trained weights to the variables of a network here, every weight accounted for."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.types import PRNGKeyArray
from nonlocal_jax.weights import files
from nonlocal_jax.weights.inflation import inflate
from nonlocal_jax.weights.names import Source, Weights
from nonlocal_jax.weights.sources import SOURCES

Part = Literal["classifier", "nonlocal", "statistics"]
PARTS: dict[Part, str] = {
    "classifier": "the last layer",
    "nonlocal": "the non-local blocks",
    "statistics": "the running statistics of BatchNorm",
}
CLASSIFIERS = ("params/head/", "params/fc2/")
NATIVE = "nonlocal_jax"
FROZEN_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class LoadedWeight:
    """What became of one entry of a file, or of one leaf of the network.

    Attributes:
        source: the entry of the file; "" for a leaf that stays as it was initialised.
        target: the leaf, a path of `variables`; "" for an entry that is not loaded.
        source_shape, shape: theirs and ours.
        transform: what was done to the array, or why nothing was.
    """

    source: str
    target: str
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    transform: str


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every entry of a file and every leaf of a network; `print` shows the table.

    Attributes:
        source: whose names the file has.
        weights: in the order of the file.
    """

    source: str
    weights: tuple[LoadedWeight, ...]

    def __str__(self) -> str:
        lines = [
            f"{w.source or '–':<58} {_shape(w.source_shape):<18} {w.target or '–':<52} {_shape(w.shape):<18} {w.transform}"
            for w in self.weights
        ]
        loaded = [w for w in self.weights if w.source and w.target]
        left = [w for w in self.weights if not w.source]
        numbers = sum(math.prod(w.shape) for w in loaded)
        total = f"{len(loaded)} weights loaded by the names of {self.source}, {numbers:,} numbers"
        return "\n".join([*lines, total + (f"; {len(left)} left at their initialisation" if left else "")])


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
    options = {"initialise": initialise, "inflate_flat": inflate_flat, "example": example, "rng": rng}
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
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    initialise: Sequence[Part] = (),
    inflate_flat: bool = False,
    example: jax.ShapeDtypeStruct | None = None,
    rng: PRNGKeyArray | None = None,
) -> tuple[dict[str, Any], LoadReport]:
    """Both `load` and `load_report`, from one reading of the file."""
    for part in initialise:
        if part not in PARTS:
            raise ValueError(f"initialise must be of {', '.join(map(repr, PARTS))}; got {part!r}.")
    example = example or getattr(model, "example", None)
    if example is None:
        raise TypeError(f"{type(model).__name__} has no example input; pass example=jax.ShapeDtypeStruct(shape, dtype).")
    checkpoint = files.read(path)
    expected = flatten(jax.eval_shape(model.init, jax.random.key(0), example))
    source, entries, report = _name(checkpoint, expected)
    entries = _fold(entries, expected)
    found: dict[str, Weights] = {}
    problems: list[str] = []
    for entry in entries:
        row, problem = _place(entry, expected, found, initialise, inflate_flat)
        report.append(row)
        if problem:
            problems.append(problem)
    missing = sorted(
        (target for target in expected if target not in found), key=lambda target: target.startswith("batch_stats")
    )
    named = {entry.target for entry in entries}
    problems += _missing([target for target in missing if target not in named], expected, found, initialise)
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(
            f"{path}, {len(checkpoint.arrays)} arrays named as in {source}, does not fit this {type(model).__name__}:\n"
            f"  {shown}\n"
            "Build the model with the depth, kind, places of blocks and number of classes of the file "
            "(`python -m nonlocal_jax.weights inspect` tells them), or pass `initialise`."
        )
    left = _initialised(model, example, rng, missing)
    report += [LoadedWeight("", target, (), left[target].shape, "left at its initialisation") for target in missing]
    leaves = {
        target: jnp.asarray(found[target] if target in found else left[target], expected[target].dtype) for target in expected
    }
    return unflatten(leaves), LoadReport(source, tuple(report))


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One weight of a file under our name, its axes as ours."""

    key: str
    target: str
    array: Weights
    flat: bool  # of an image network: two position axes
    source_shape: tuple[int, ...]
    transform: str


def detect(checkpoint: files.Checkpoint) -> Source | None:
    """Whose names the arrays have: the source that knows the most of them, at least half; None for our own.

    Raises:
        ValueError: nobody's.
    """
    keys = [strip_prefix(key) for key in checkpoint.arrays]
    if keys and all(key.startswith(("params/", "batch_stats/")) for key in keys):
        return None
    known = {source.name: sum(source.to_ours(key) is not None for key in keys) for source in SOURCES}
    best = max(SOURCES, key=lambda source: known[source.name])
    if 2 * known[best.name] < sum(not best.holds_no_weights(key) for key in keys) or not known[best.name]:
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


def _name(checkpoint: files.Checkpoint, expected: Mapping[str, Any]) -> tuple[str, list[_Entry], list[LoadedWeight]]:
    """Every array under our name; what is none stands in the report from the start."""
    source = detect(checkpoint)
    report = [LoadedWeight(key, "", (), (), reason) for key, reason in checkpoint.ignored.items()]
    entries = []
    for key, array in checkpoint.arrays.items():
        name = strip_prefix(key)
        if source is None:
            entries.append(_Entry(key, name, array, False, array.shape, "as it is"))
        elif found := source.to_ours(name):
            ours, row = found
            entry = _Entry(
                key, variable_path(ours), row.transform.to_ours(array), array.ndim == 4, array.shape, row.transform.shapes
            )
            entries.append(entry)
        elif source.holds_no_weights(name):
            report.append(LoadedWeight(key, "", array.shape, (), "not a weight"))
        else:
            entries.append(_Entry(key, "", array, False, array.shape, "unknown"))
    return NATIVE if source is None else source.name, entries, report


def variable_path(name: str) -> str:
    """The path in `variables` of a name of ours."""
    collection = "batch_stats" if name.rsplit("/", 1)[-1] in ("mean", "var") else "params"
    return f"{collection}/{name}"


def _fold(entries: list[_Entry], expected: Mapping[str, Any]) -> list[_Entry]:
    """Running statistics that the network has no place for become part of its affine maps."""
    by_target = {entry.target: entry for entry in entries}
    folded = []
    for entry in entries:
        collection, _, name = entry.target.partition("/")
        norm, _, leaf = name.rpartition("/")
        statistics = [by_target.get(f"batch_stats/{norm}/{which}") for which in ("mean", "var")]
        frozen = f"params/{norm}/scale" in expected and f"batch_stats/{norm}/var" not in expected
        if not frozen or leaf not in ("scale", "bias", "mean", "var") or None in statistics:
            folded.append(entry)
            continue
        mean, var = (np.asarray(s.array, np.float64) for s in statistics if s is not None)
        if collection == "batch_stats":
            folded.append(dataclasses.replace(entry, target="", transform=f"folded into params/{norm}"))
            continue
        scale = np.asarray(by_target[f"params/{norm}/scale"].array, np.float64) / np.sqrt(var + FROZEN_EPSILON)
        array = scale if leaf == "scale" else np.asarray(entry.array, np.float64) - mean * scale
        transform = "γ / √(var + ε)" if leaf == "scale" else "β − mean · γ / √(var + ε)"
        folded.append(dataclasses.replace(entry, array=array.astype(np.float32), transform=transform))
    return folded


def _place(
    entry: _Entry, expected: Mapping[str, Any], found: dict[str, Weights], initialise: Sequence[Part], inflate_flat: bool
) -> tuple[LoadedWeight, str | None]:
    """Put an entry where it belongs; the row of the report, and what is wrong."""
    target, array, transform = entry.target, entry.array, entry.transform
    if not target and transform.startswith("folded"):
        return LoadedWeight(entry.key, "", entry.source_shape, (), transform), None
    nowhere = LoadedWeight(entry.key, "", entry.source_shape, (), "no place for it")
    if not target:
        return nowhere, f"{entry.key} {_shape(entry.source_shape)} is no weight of these networks"
    if target not in expected:
        return nowhere, f"{entry.key} {_shape(entry.source_shape)} would be {target}, which the network does not have"
    if target in found:
        return nowhere, f"{entry.key} {_shape(entry.source_shape)} is a second {target}"
    shape = tuple(expected[target].shape)
    if array.ndim == 5 and len(shape) == 5 and array.shape[0] == 1 < shape[0] and (entry.flat or inflate_flat):
        array = np.asarray(inflate(jnp.asarray(array[0]), shape[0]))
        transform += f", inflated to {shape[0]} frames"
    if array.shape != shape:
        if "classifier" in initialise and target.startswith(CLASSIFIERS):
            return LoadedWeight(entry.key, "", entry.source_shape, (), f"of another size than {_shape(shape)}"), None
        hint = ". It is flat: pass inflate_flat=True" if array.ndim == 5 and (1, *shape[1:]) == array.shape else ""
        return (
            nowhere,
            f"{entry.key} {_shape(entry.source_shape)} becomes {_shape(array.shape)}; {target} has {_shape(shape)}{hint}",
        )
    found[target] = array
    return LoadedWeight(entry.key, target, entry.source_shape, shape, transform), None


def _missing(
    missing: list[str], expected: Mapping[str, Any], found: Mapping[str, Weights], initialise: Sequence[Part]
) -> list[str]:
    """What is wrong with leaves that the file does not have: those that are not asked to stay as they are."""
    problems = []
    for target in missing:
        part = _part(target)
        if part is not None and part in initialise:
            continue
        if part == "statistics" and f"params/{target.split('/', 1)[1].rpartition('/')[0]}/scale" not in found:
            continue  # the norm as a whole is missing, which its scale says
        hint = f"; to leave {PARTS[part]} as initialised, pass initialise=({part!r},)" if part else ""
        problems.append(f"{target} {_shape(expected[target].shape)} is not in the file{hint}")
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
    if not missing:
        return {}
    rng = jax.random.key(0) if rng is None else rng
    initialise = jax.jit(lambda key: model.init(key, jnp.zeros(example.shape, example.dtype)))
    leaves = flatten(initialise(rng))
    return {target: leaves[target] for target in missing}


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of variables by path, "params/res2_0/conv_a/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *outer, last = path.split("/")
        inner = tree
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return tree


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else ""
