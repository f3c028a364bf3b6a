"""Whether a network here is the one in the file: its weights against the file's, its layers against their definitions."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from nonlocal_jax.models import VideoResNet
from nonlocal_jax.weights import files
from nonlocal_jax.weights.by_definition import against_definition, or_infinite
from nonlocal_jax.weights.entries import name_of, read_names, strip_prefix
from nonlocal_jax.weights.loading import FROZEN_EPSILON, load_checkpoint
from nonlocal_jax.weights.names import Source, Weights, flatten, unflatten
from nonlocal_jax.weights.report import LoadedWeight, LoadReport, dims, table
from nonlocal_jax.weights.saving import export

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One layer. Differences are the largest, over the largest number of what should be there.

    Attributes:
        place: the path of the module, as in `params`.
        shapes: of its arrays that come from the file.
        weights: of those arrays, exported to the file's names and shapes, to the file's own; None where none is from it.
        output: of what it puts out, on the same input, to what its definition does; None where only the whole is compared.
    """

    place: str
    shapes: tuple[tuple[int, ...], ...]
    weights: float | None
    output: float | None


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was compared; `print` shows the tables.

    Attributes:
        report: what became of every entry of the file.
        layers: in the order in which they run.
        stages: of what each stage puts out, and of the logits, the largest difference between the network as it runs and
            the network by its definitions, over the largest number there.
        problems: what else is wrong: numbers that are not finite, entries or leaves without an account.
        tolerance: the largest difference that is accepted.
    """

    report: LoadReport
    layers: tuple[LayerCheck, ...]
    stages: Mapping[str, float]
    problems: tuple[str, ...]
    tolerance: float

    @property
    def largest(self) -> dict[str, tuple[float, str]]:
        """The largest difference of the weights, of the layers and of the stages, and where it is."""
        each = {
            "weights": [
                (layer.weights, layer.place) for layer in self.layers if layer.weights is not None
            ],
            "layers": [
                (layer.output, layer.place) for layer in self.layers if layer.output is not None
            ],
            "stages": [(difference, name) for name, difference in self.stages.items()],
        }
        return {
            name: max(found, key=lambda pair: pair[0], default=(0.0, "nothing"))
            for name, found in each.items()
        }

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong and no difference exceeds the tolerance."""
        return not self.problems and all(
            difference <= self.tolerance for difference, _ in self.largest.values()
        )

    def __str__(self) -> str:
        header = ("layer", "arrays", "shape", ">weights − file", ">output − definition")
        rows = [
            (
                layer.place,
                str(len(layer.shapes) or "–"),
                dims(max(layer.shapes, key=len, default=())),
                _number(layer.weights),
                _number(layer.output),
            )
            for layer in self.layers
        ]
        stages = [(name, _number(difference)) for name, difference in self.stages.items()]
        largest = [
            f"largest difference, {name}: {_number(d)} ({place})"
            for name, (d, place) in self.largest.items()
        ]
        return "\n".join(
            [
                table("Layer by layer, relative to the largest value", header, rows),
                table(
                    "The whole network on a random clip",
                    ("stage", ">as it runs − by definition"),
                    stages,
                ),
                self.report.summary,
                *largest,
                *(f"wrong: {problem}" for problem in self.problems),
                f"{'verified' if self.ok else 'NOT VERIFIED'}, tolerance {self.tolerance:g}",
            ]
        )


def verify(
    path: str | os.PathLike[str] | files.Checkpoint,
    model: nn.Module,
    *,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    **options: Any,
) -> Verification:
    """Load a file and hold the result against the file, and the network against its definitions.

    The weights are exported back to the file's names and shapes: they must be the file's own (kernels that were inflated,
    summed over their frames; folded norms, γ / √(var + ε) and β − mean · γ / √(var + ε)). A small random clip is then
    sent through the network as it runs, and through the same network with `jax.lax.conv_general_dilated` for every
    convolution, `jnp.einsum` for every dense layer, the formula of BatchNorm, and the dense definition for every non-local
    operation.

    Args:
        path: the file or folder, or what `read` made of it.
        model: the network.
        shape: of the clip; None is a small one that passes all stages.
        seed: of the clip.
        tolerance: the largest difference that is accepted, relative to the largest value.
        **options: as of `load`.

    Returns:
        The differences, layer by layer and stage by stage. Those of another implementation of the network are not among
        them: what is the same in the network and in its definitions, such as the sizes of poolings, is not tested here.

    Raises:
        ValueError, FileNotFoundError: as `load`.

    >>> import pathlib, tempfile, jax, jax.numpy as jnp, nonlocal_jax as nl
    >>> model = nl.models.non_local_pytorch_mnist()
    >>> path = pathlib.Path(tempfile.mkdtemp(), "digits.safetensors")
    >>> nl.weights.save(path, model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1))), names="non_local_pytorch")
    >>> verify(path, model).ok
    True
    """
    checkpoint = path if isinstance(path, files.Checkpoint) else files.read(path)
    variables, report = load_checkpoint(checkpoint, model, **options)
    leaves = {target: np.asarray(leaf) for target, leaf in flatten(variables).items()}
    of_weights = _against_file(checkpoint, report, leaves)
    shape = shape or _shape(model, options.get("example"))
    clip = jax.random.normal(jax.random.key(seed), shape)
    of_layers, of_stages = against_definition(model, variables, clip)
    layers = []
    for place in dict.fromkeys([*of_layers, *map(_place, of_weights)]):
        output = of_layers.get(place)
        own = {
            target: difference
            for target, difference in of_weights.items()
            if _place(target) == place
        }
        shapes = tuple(leaves[target].shape for target in own)
        if own or output is not None:
            layers.append(LayerCheck(place, shapes, max(own.values(), default=None), output))
    return Verification(
        report, tuple(layers), of_stages, tuple(_problems(checkpoint, report, leaves)), tolerance
    )


def _problems(
    checkpoint: files.Checkpoint, report: LoadReport, leaves: Mapping[str, Weights]
) -> list[str]:
    """Numbers that are not finite, and what the report leaves out or has twice."""
    problems = [
        f"{target} has {n} values that are not finite"
        for target, leaf in leaves.items()
        if (n := int((~np.isfinite(leaf)).sum()))
    ]
    sources, targets = (
        [row for row in rows if row]
        for rows in zip(*((w.source, w.target) for w in report.weights), strict=True)
    )
    for what, wanted, got in (
        ("entry", [*checkpoint.arrays, *checkpoint.ignored], sources),
        ("leaf", list(leaves), targets),
    ):
        if sorted(wanted) != sorted(got):
            odd = sorted(set(wanted).symmetric_difference(got)) or sorted(
                name for name in set(got) if got.count(name) > 1
            )
            problems.append(f"the {what} {odd[0]} is not accounted for exactly once")
    return problems


def _against_file(
    checkpoint: files.Checkpoint, report: LoadReport, leaves: Mapping[str, Weights]
) -> dict[str, float]:
    """For every leaf from the file, how far it is from what the file says."""
    source, entries, _ = read_names(checkpoint)
    by_target = {entry.target: entry.array for entry in entries}
    differences = {}
    for row in report.weights:
        if row.source and row.target:
            expected = _folded(row.target, by_target, leaves)
            if expected is not None:
                differences[row.target] = _relative(leaves[row.target], expected)
            else:
                differences[row.target] = _back(
                    source, row, leaves[row.target], checkpoint.arrays[row.source]
                )
    return differences


def _folded(
    target: str, by_target: Mapping[str, Weights], leaves: Mapping[str, Weights]
) -> Weights | None:
    """What an affine map should be where the file has running statistics and the network none; else None."""
    norm, _, leaf = target.removeprefix("params/").rpartition("/")
    names = [f"params/{norm}/scale", f"batch_stats/{norm}/mean", f"batch_stats/{norm}/var"]
    if (
        leaf not in ("scale", "bias")
        or names[2] in leaves
        or not all(name in by_target for name in names)
    ):
        return None
    gamma, mean, var = (np.asarray(by_target[name], np.float64) for name in names)
    scale = gamma / np.sqrt(var + FROZEN_EPSILON)
    return scale if leaf == "scale" else np.asarray(by_target[target], np.float64) - mean * scale


def _back(source: Source | None, row: LoadedWeight, leaf: Weights, theirs: Weights) -> float:
    """How far a leaf, under the file's name and in its shape, is from the file's array; ∞ where it does not get there."""
    try:
        [(name, array)] = export(unflatten({row.target: leaf}), name_of(source)).items()
    except ValueError:
        return math.inf
    key = strip_prefix(row.source)
    if name != key and (
        source is None or source.to_ours(name) != source.to_ours(key)
    ):  # some weights have two spellings
        return math.inf
    if array.size != theirs.size:  # inflated
        array = array.sum(0 if source is None else 2, dtype=np.float64)
    return _relative(array.reshape(theirs.shape), theirs) if array.size == theirs.size else math.inf


def _relative(array: Weights, expected: Weights) -> float:
    """The largest difference over the largest value; numbers that are the same, NaN too, do not differ."""
    array, expected = np.asarray(array, np.float64), np.asarray(expected, np.float64)
    with np.errstate(invalid="ignore"):
        same = (array == expected) | (np.isnan(array) & np.isnan(expected))
        difference = np.where(same, 0.0, np.abs(array - expected)).max(initial=0.0)
    return (
        or_infinite(difference / (np.abs(expected).max(initial=0.0) or 1.0)) if difference else 0.0
    )


def _shape(model: nn.Module, example: jax.ShapeDtypeStruct | None) -> tuple[int, ...]:
    """A clip that has 4 frames from res3 on; of other networks, their example."""
    if isinstance(model, VideoResNet):
        layout = model.layout
        return (
            2,
            4 * layout.conv1_stride * layout.pool1.strides[0] * layout.pool2.strides[0],
            64,
            48,
            3,
        )
    return tuple((example or model.example).shape)  # type: ignore[attr-defined]


def _place(target: str) -> str:
    """The module of a leaf."""
    return target.partition("/")[2].rpartition("/")[0]


def _number(difference: float | None) -> str:
    return "–" if difference is None else "0" if difference == 0 else f"{difference:.1e}"
