"""Verifying loaded weights against the file, and layers against their definitions."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from nonlocal_jax.models import VideoResNet
from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.by_definition import definition_differences, finite_or_infinity
from nonlocal_jax.weights.entries import read_names, strip_prefix, table_name
from nonlocal_jax.weights.load_reports import LoadedWeight, LoadReport, dims, table
from nonlocal_jax.weights.loading import load_checkpoint
from nonlocal_jax.weights.names import NamingTable, Weights, flatten, unflatten
from nonlocal_jax.weights.readers import Checkpoint, checkpoint_files
from nonlocal_jax.weights.saving import export

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """The differences of one layer, each relative to the largest absolute value.

    Attributes:
        place: Path of the module, as in `params`.
        shapes: Shapes of its arrays that come from the file.
        weights: Difference of these arrays, exported to the file's names and shapes, from those of
            the file; None if no array comes from the file.
        output: Difference of its output from that of its definition on the same input; None if the
            layer is only compared as a part of the whole network.
    """

    place: str
    shapes: tuple[tuple[int, ...], ...]
    weights: float | None
    output: float | None


@dataclasses.dataclass(frozen=True)
class Verification:
    """The results of `verify`. `print` shows them as tables.

    Attributes:
        report: What happened to every entry of the file.
        layers: The layers, in the order in which they run.
        stages: For each stage and the logits, the largest difference between the network and the
            network computed by the definitions of its layers, relative to the largest value.
        problems: Anything else that is wrong: values that are not finite, entries or leaves that
            are not accounted for.
        tolerance: The largest difference that is accepted.
    """

    report: LoadReport
    layers: tuple[LayerCheck, ...]
    stages: Mapping[str, float]
    problems: tuple[str, ...]
    tolerance: float

    @property
    def largest(self) -> dict[str, tuple[float, str]]:
        """The largest difference of weights, layers and stages, each with its place."""
        return {
            "weights": _largest((layer.weights, layer.place) for layer in self.layers),
            "layers": _largest((layer.output, layer.place) for layer in self.layers),
            "stages": _largest((difference, name) for name, difference in self.stages.items()),
        }

    @property
    def ok(self) -> bool:
        """Whether there are no problems and no difference exceeds the tolerance."""
        differences = [difference for difference, _ in self.largest.values()]
        return not self.problems and all(value <= self.tolerance for value in differences)

    def __str__(self) -> str:
        layer_header = ("layer", "arrays", "shape", ">weights − file", ">output − definition")
        layer_rows = map(_layer_row, self.layers)
        stage_header = ("stage", ">network − definition")
        stage_rows = [(name, _format(value)) for name, value in self.stages.items()]
        largest = [
            f"largest difference, {name}: {_format(difference)} ({place})"
            for name, (difference, place) in self.largest.items()
        ]
        lines = [
            table("Layer by layer, relative to the largest value", layer_header, layer_rows),
            table("The whole network on a random clip", stage_header, stage_rows),
            self.report.summary,
            *largest,
            *(f"wrong: {problem}" for problem in self.problems),
            f"{'verified' if self.ok else 'NOT VERIFIED'}, tolerance {self.tolerance:g}",
        ]
        return "\n".join(lines)


def _largest(differences: Iterable[tuple[float | None, str]]) -> tuple[float, str]:
    compared = [(value, place) for value, place in differences if value is not None]
    return max(compared, key=lambda pair: pair[0], default=(0.0, "nothing"))


def _layer_row(layer: LayerCheck) -> tuple[str, ...]:
    count = str(len(layer.shapes) or "–")
    shape = dims(max(layer.shapes, key=len, default=()))
    return layer.place, count, shape, _format(layer.weights), _format(layer.output)


def _format(difference: float | None) -> str:
    if difference is None:
        return "–"
    return "0" if difference == 0 else f"{difference:.1e}"


def verify(
    path: str | os.PathLike[str] | Checkpoint,
    model: nn.Module,
    *,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    **options: Any,
) -> Verification:
    """Loads a file, and verifies the weights and the network.

    The weights are exported back to the file's names and shapes and must equal those of the file.
    Inflated kernels are summed over their frames first; folded norms are compared with γ / √(var +
    ε) and β − mean · γ / √(var + ε).

    A small random clip is then run through the network, and through the same network with
    `jax.lax.conv_general_dilated` for every convolution, `jnp.einsum` for every dense layer, the
    formula of BatchNorm, and the dense definition for every non-local operation. What the network
    and its definitions share, such as the sizes of poolings, is not tested.

    Args:
        path: The file or folder, or what `read` returned for it.
        model: The network.
        shape: Shape of the clip; Defaults to a small one that is large enough for all stages.
        seed: Seed of the clip.
        tolerance: The largest difference that is accepted, relative to the largest value.
        **options: Options of `load`.

    Returns:
        The differences, layer by layer and stage by stage.

    Raises:
        ValueError, FileNotFoundError: As `load`.

    >>> import pathlib, tempfile, jax, jax.numpy as jnp, nonlocal_jax as nl
    >>> model = nn.Dense(2)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "dense.safetensors")
    >>> nl.weights.save(path, {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}})
    >>> verify(path, model, example=jax.ShapeDtypeStruct((1, 3), jnp.float32)).ok
    True
    """
    checkpoint = path if isinstance(path, Checkpoint) else checkpoint_files.read(path)
    variables, report = load_checkpoint(checkpoint, model, **options)
    leaves = {target: np.asarray(leaf) for target, leaf in flatten(variables).items()}
    shape = shape or _clip_shape(model, options.get("example"))
    clip = jax.random.normal(jax.random.key(seed), shape)
    layer_differences, stage_differences = definition_differences(model, variables, clip)
    weight_differences = _weight_differences(checkpoint, report, leaves)
    return Verification(
        report,
        _layer_checks(layer_differences, weight_differences, leaves),
        stage_differences,
        tuple(_problems(checkpoint, report, leaves)),
        tolerance,
    )


def _clip_shape(model: nn.Module, example: jax.ShapeDtypeStruct | None) -> tuple[int, ...]:
    """Returns the shape of a clip with 4 frames from res3 on, or of the model's example."""
    if isinstance(model, VideoResNet):
        return 2, 4 * model.stride_in_time, 64, 48, 3
    return tuple((example or model.example).shape)  # type: ignore[attr-defined]


def _layer_checks(
    layer_differences: Mapping[str, float | None],
    weight_differences: Mapping[str, float],
    leaves: Mapping[str, Weights],
) -> tuple[LayerCheck, ...]:
    """Joins the differences of weights and outputs by layer. Layers with neither are left out."""
    checks = []
    for place in dict.fromkeys([*layer_differences, *map(_module_path, weight_differences)]):
        module_differences = {
            target: difference
            for target, difference in weight_differences.items()
            if _module_path(target) == place
        }
        output = layer_differences.get(place)
        shapes = tuple(leaves[target].shape for target in module_differences)
        if module_differences or output is not None:
            checks.append(
                LayerCheck(place, shapes, max(module_differences.values(), default=None), output)
            )
    return tuple(checks)


def _module_path(target: str) -> str:
    """Returns the path of the module that owns a leaf."""
    return target.partition("/")[2].rpartition("/")[0]


def _problems(
    checkpoint: Checkpoint, report: LoadReport, leaves: Mapping[str, Weights]
) -> list[str]:
    """Lists values that are not finite, and what the report leaves out or has twice."""
    counts = {target: int((~np.isfinite(leaf)).sum()) for target, leaf in leaves.items()}
    problems = [
        f"{target} has {count} values that are not finite"
        for target, count in counts.items()
        if count
    ]
    entries = [*checkpoint.arrays, *checkpoint.ignored]
    reported_entries = [weight.source for weight in report.weights if weight.source]
    reported_leaves = [weight.target for weight in report.weights if weight.target]
    problems += _accounting_problems("entry", entries, reported_entries)
    problems += _accounting_problems("leaf", list(leaves), reported_leaves)
    return problems


def _accounting_problems(term: str, names: list[str], reported: list[str]) -> list[str]:
    """Names the first entry or leaf that is not reported exactly once."""
    if sorted(names) == sorted(reported):
        return []
    unmatched = sorted(set(names) ^ set(reported))
    repeated = sorted(name for name in set(reported) if reported.count(name) > 1)
    name = printable((unmatched or repeated)[0])
    return [f"the {term} {name} is not accounted for exactly once"]


def _weight_differences(
    checkpoint: Checkpoint, report: LoadReport, leaves: Mapping[str, Weights]
) -> dict[str, float]:
    """Computes how far each leaf from the file is from what the file says."""
    naming_table, entries, _ = read_names(checkpoint)
    epsilon = NamingTable.epsilon if naming_table is None else naming_table.epsilon
    arrays = {entry.target: entry.array for entry in entries}
    differences = {}
    for row in report.weights:
        if not (row.source and row.target):
            continue
        leaf = leaves[row.target]
        folded = _folded(row.target, arrays, leaves, epsilon)
        if folded is None:
            source_array = checkpoint.arrays[row.source]
            differences[row.target] = _export_difference(naming_table, row, leaf, source_array)
        else:
            differences[row.target] = _relative_difference(leaf, folded)
    return differences


def _folded(
    target: str, arrays: Mapping[str, Weights], leaves: Mapping[str, Weights], epsilon: float
) -> Weights | None:
    """Folds the running statistics of the file; None if the leaf is not folded.

    The formula is written out here again, to check `layers.norm.fold_batch_norm` independently.
    """
    norm, _, leaf = target.removeprefix("params/").rpartition("/")
    paths = (f"params/{norm}/scale", f"batch_stats/{norm}/mean", f"batch_stats/{norm}/var")
    has_statistics = all(path in arrays for path in paths)
    if leaf not in ("scale", "bias") or paths[2] in leaves or not has_statistics:
        return None
    gamma, mean, var = (np.asarray(arrays[path], np.float64) for path in paths)
    scale = gamma / np.sqrt(var + epsilon)
    return scale if leaf == "scale" else np.asarray(arrays[target], np.float64) - mean * scale


def _export_difference(
    naming_table: NamingTable | None, row: LoadedWeight, leaf: Weights, source_array: Weights
) -> float:
    """Exports a leaf to the file's name and shape, and compares it; ∞ if name or size differ."""
    try:
        [(name, array)] = export(unflatten({row.target: leaf}), table_name(naming_table)).items()
    except ValueError:
        return math.inf
    key = strip_prefix(row.source)
    if name != key:  # some weights have two spellings, which mean the same native name
        spellings = naming_table and (naming_table.native_name(name), naming_table.native_name(key))
        if not spellings or spellings[0] != spellings[1]:
            return math.inf
    if array.size != source_array.size:  # inflated, so it is summed over the frames
        array = array.sum(0 if naming_table is None else 2, dtype=np.float64)
    if array.size != source_array.size:
        return math.inf
    return _relative_difference(array.reshape(source_array.shape), source_array)


def _relative_difference(array: Weights, expected: Weights) -> float:
    """Returns the largest difference, relative to the largest value. NaN equals NaN."""
    array, expected = np.asarray(array, np.float64), np.asarray(expected, np.float64)
    with np.errstate(invalid="ignore"):
        is_same = (array == expected) | (np.isnan(array) & np.isnan(expected))
        difference = np.where(is_same, 0.0, np.abs(array - expected)).max(initial=0.0)
    if not difference:
        return 0.0
    return finite_or_infinity(difference / (np.abs(expected).max(initial=0.0) or 1.0))
