"""Inferring the architecture of a network from its arrays, and from a configuration beside them."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from nonlocal_jax import models
from nonlocal_jax.models.video_tables import DEPTHS, STAGES, Inflation
from nonlocal_jax.terminal import printable
from nonlocal_jax.types import Instantiation
from nonlocal_jax.weights.configurations import NOT_STATED, Configuration, read_configuration
from nonlocal_jax.weights.entries import Entry, naming_tables, read_names, table_name
from nonlocal_jax.weights.readers import Checkpoint

MNIST: Final = "non_local_pytorch_mnist"
KINDS: tuple[Inflation, ...] = ("c2d", "i3d_3x1x1", "i3d_3x3x3")
CONVS = ("conv_a", "conv_b", "conv_c")
Shapes = Mapping[str, tuple[int, ...]]  # of the leaves, by path without the collection


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network, as far as its file shows it.

    Attributes:
        source: The source whose names the file has.
        network: The function of `nonlocal_jax.models` that builds the network.
        blocks: Numbers of residual blocks of res2 to res5.
        kind: Inflation of the kernels. "image" is that of an image network, whose kernels have no
            time axis.
        nonlocal_blocks: For each stage, the residual blocks that a non-local block follows.
        instantiation: The pairwise function. None is the embedded Gaussian or the dot product: with
            θ and φ, without w_f.
        subsample: Whether the blocks pool their keys; None where the names do not show it.
        embedding_bias: Whether θ, φ and g have a bias.
        out_bias: Whether W_z has a bias.
        nonlocal_norm: Whether a norm follows W_z.
        frozen_bn: Whether norms are fixed affine maps, because there are no running statistics.
        num_classes: Number of classes; None without a classifier.
        groups: Groups of the 3×3 convolutions; 1 in a ResNet.
        width_per_group: Channels of each group in res2; 64 in a ResNet.
        pool2: Whether a pooling in time follows res2, where names or configuration show it.
        configuration: What the training configuration in the file states.
        file: Path of the file, for messages.
    """

    source: str
    network: Literal["video_resnet", "non_local_pytorch_mnist"]
    blocks: tuple[int, ...] = ()
    kind: Inflation | Literal["image"] = "c2d"
    nonlocal_blocks: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    instantiation: Instantiation | None = None
    subsample: bool | None = None
    embedding_bias: bool = False
    out_bias: bool = False
    nonlocal_norm: bool = True
    frozen_bn: bool = False
    num_classes: int | None = None
    groups: int = 1
    width_per_group: int = 64
    pool2: bool | None = None
    configuration: Configuration = NOT_STATED
    file: str = dataclasses.field(default="the file", compare=False)

    @property
    def depth(self) -> int | tuple[int, ...]:
        """50, 101 or 152, or the numbers of residual blocks of each stage."""
        matches = (depth for depth, blocks in DEPTHS.items() if blocks == self.blocks)
        return next(matches, self.blocks)


def architecture(checkpoint: Checkpoint) -> Architecture:
    """Infers the architecture of the network that a file belongs to.

    Args:
        checkpoint: The contents of the file.

    Returns:
        What names, shapes and configuration show. Whether all arrays fit is checked by `load`.

    Raises:
        ValueError: The names are of no known source, the network is none of this library, a number
            of a block is missing, or shapes or the configuration contradict each other. The message
            names the first problem.

    >>> import pathlib, tempfile, jax, jax.numpy as jnp, nonlocal_jax as nl
    >>> model = nl.models.non_local_pytorch_mnist("gaussian")
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), model.example)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "digits.safetensors")
    >>> nl.weights.save(path, jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes))
    >>> found = architecture(nl.weights.read(path))
    >>> found.network, found.instantiation, found.num_classes
    ('non_local_pytorch_mnist', 'gaussian', 10)
    """
    table, entries, _ = read_names(checkpoint)
    source = table_name(table)
    entries = [entry for entry in entries if entry.target]
    try:
        found = _with_configuration(_architecture(source, entries), checkpoint.configuration)
        return dataclasses.replace(found, file=printable(checkpoint.path))
    except ValueError as error:
        message = f"{checkpoint.path}, named as in {source}: {error}."
        raise ValueError(printable(message)) from error


def _architecture(source: str, entries: list[Entry]) -> Architecture:
    shapes = {entry.target.partition("/")[2]: entry.array.shape for entry in entries}
    if {"conv2/kernel", "fc1/kernel"} <= shapes.keys():
        block_options = _block_options(shapes, ["nonlocal1", "nonlocal2"])
        num_classes = _num_classes(shapes, "fc2")
        return Architecture(source, MNIST, num_classes=num_classes, **block_options)
    blocks = _residual_blocks(shapes)
    places = _nonlocal_places(shapes, blocks)
    stages = itertools.groupby(places, lambda place: place[0])
    convs = re.compile(r"/conv(1|_[abc])/kernel$")
    has_flat = {entry.flat for entry in entries if convs.search(entry.target)}
    table = naming_tables().get(source)
    return Architecture(
        source=source,
        network="video_resnet",
        blocks=blocks,
        kind="image" if has_flat == {True} else _kind(shapes, blocks),
        nonlocal_blocks={stage: tuple(i for _, i in group) for stage, group in stages},
        subsample=_subsample(source, entries),
        frozen_bn=_is_frozen(shapes),
        num_classes=_num_classes(shapes, "head"),
        pool2=True if table is not None and table.shows_pool2 else None,
        **_block_options(shapes, [f"nonlocal_{stage}_{i}" for stage, i in places]),
        **_widths(shapes, blocks),
    )


def _with_configuration(found: Architecture, text: str) -> Architecture:
    """Adds what the configuration states, after comparing it with the arrays."""
    if not text or found.network == MNIST:
        return found
    stated = read_configuration(text, found.source, found.kind, found.nonlocal_blocks)
    open_functions = (None, "embedded_gaussian", "dot_product")
    is_stated = found.nonlocal_blocks and stated.instantiation is not None
    expected = open_functions if found.instantiation is None else (None, found.instantiation)
    if is_stated and stated.instantiation not in expected:
        raise ValueError(
            f"its configuration has the pairwise function {stated.instantiation}, whose weights it "
            "does not have"
        )
    return dataclasses.replace(
        found,
        instantiation=found.instantiation or (stated.instantiation if is_stated else None),
        pool2=stated.pool2 if found.pool2 is None else found.pool2,
        configuration=stated,
    )


def _num_classes(shapes: Shapes, classifier: str) -> int | None:
    shape = shapes.get(f"{classifier}/kernel")
    return None if shape is None else shape[-1]


def _residual_blocks(shapes: Shapes) -> tuple[int, ...]:
    """Counts the residual blocks of each stage, after checking that no number is left out."""
    counts = []
    for stage in STAGES:
        matches = (re.match(rf"{stage}_(\d+)/", path) for path in shapes)
        numbers = sorted({int(match[1]) for match in matches if match})
        if not numbers:
            raise ValueError(f"it has no {stage}, so it is none of the networks here")
        gaps = [i for i in range(numbers[-1]) if i not in numbers]
        if gaps:
            raise ValueError(f"{stage} has a residual block {numbers[-1]} but no {gaps[0]}")
        for i, conv in itertools.product(numbers, CONVS):
            _kernel_shape(shapes, f"{stage}_{i}/{conv}")
        counts.append(len(numbers))
    return tuple(counts)


def _kernel_shape(shapes: Shapes, layer: str) -> tuple[int, ...]:
    shape = shapes.get(f"{layer}/kernel")
    if shape is None or len(shape) != 5:
        found = "none" if shape is None else shape
        raise ValueError(f"{layer} must have a kernel of 4 or 5 axes; it has {found}")
    return shape


def _nonlocal_places(shapes: Shapes, blocks: tuple[int, ...]) -> list[tuple[str, int]]:
    """Returns the stage and the number of the residual block that each non-local block follows."""
    matches = (re.match(r"nonlocal_(res[2-5])_(\d+)/", path) for path in shapes)
    places = sorted({(match[1], int(match[2])) for match in matches if match})
    for stage, i in places:
        count = blocks[STAGES.index(stage)]
        if i >= count:
            raise ValueError(
                f"there is a non-local block after residual block {i} of {stage}, which has {count}"
            )
    return places


def _kind(shapes: Shapes, blocks: tuple[int, ...]) -> Inflation:
    """Returns the kind whose kernels have the same sizes in time."""
    differences: dict[Inflation, list[str]] = {}
    for kind in KINDS:
        frames = _kernel_frames(blocks, kind)
        differences[kind] = [
            f"{layer} is {_kernel_shape(shapes, layer)[0]} where it has {count}"
            for layer, count in frames.items()
            if _kernel_shape(shapes, layer)[0] != count
        ]
    nearest = min(KINDS, key=lambda kind: len(differences[kind]))
    if differences[nearest]:
        raise ValueError(
            f"its kernels are those of none of {', '.join(KINDS)}; the nearest is {nearest}, "
            f"but in frames {differences[nearest][0]}"
        )
    return nearest


def _kernel_frames(blocks: tuple[int, ...], kind: Inflation) -> dict[str, int]:
    """Returns the size in time of each kernel that depends on the kind, by layer."""
    model = models.video_resnet(blocks, kind, 0)  # type: ignore[arg-type]
    frames = {"conv1": model.conv1_frames}
    for stage, taps in zip(STAGES, model.taps, strict=True):
        for i, (frames_a, frames_b) in enumerate(taps):
            frames[f"{stage}_{i}/conv_a"] = frames_a
            frames[f"{stage}_{i}/conv_b"] = frames_b
    return frames


def _widths(shapes: Shapes, blocks: tuple[int, ...]) -> dict[str, Any]:
    """Returns groups and their width by the 3×3 of res2_0, after checking every other block."""
    *_, group_width, inner = _kernel_shape(shapes, "res2_0/conv_b")
    groups = inner // group_width if group_width and inner % group_width == 0 else 0
    if not groups or inner % groups:
        raise ValueError(
            f"res2_0/conv_b has {inner} channels, of which each filter reads {group_width}: "
            "that is not a whole number of groups"
        )
    for s, (stage, count) in enumerate(zip(STAGES, blocks, strict=True)):
        width = inner << s
        expected = {
            "conv_a": (None, width),  # its input depends on the block before
            "conv_b": (width // groups, width),
            "conv_c": (width, 256 << s),
        }
        for i, (conv, (inputs, outputs)) in itertools.product(range(count), expected.items()):
            *_, found_inputs, found_outputs = _kernel_shape(shapes, f"{stage}_{i}/{conv}")
            inputs = found_inputs if inputs is None else inputs
            if (found_inputs, found_outputs) != (inputs, outputs):
                raise ValueError(
                    f"{stage}_{i}/{conv} has {found_inputs} input and {found_outputs} output "
                    f"channels; with {inner} channels in {groups} groups in res2_0/conv_b, it must "
                    f"have {inputs} and {outputs}"
                )
    return {"groups": groups, "width_per_group": inner // groups}


def _block_options(shapes: Shapes, places: list[str]) -> dict[str, Any]:
    """Returns the options of the non-local blocks, which must be the same for all of them."""

    def blocks_have(name: str, leaf: str) -> bool:
        return _agree(name, (f"{place}/{leaf}" in shapes for place in places))

    instantiation: Instantiation | None
    if blocks_have("θ", "operation/theta/kernel"):
        instantiation = "concatenation" if blocks_have("w_f", "operation/w_f") else None
    else:
        instantiation = "gaussian" if places else None
    return {
        "instantiation": instantiation,
        "embedding_bias": blocks_have("a bias of g", "operation/g/bias"),
        "out_bias": blocks_have("a bias of W_z", "out/bias"),
        "nonlocal_norm": blocks_have("a norm", "out_norm/scale"),
    }


def _agree(name: str, values: Iterable[bool]) -> bool:
    """Returns the value on which all blocks agree; False if there are no blocks."""
    found = set(values)
    if len(found) > 1:
        raise ValueError(f"some non-local blocks have {name} and some do not")
    return found == {True}


def _subsample(source: str, entries: list[Entry]) -> bool | None:
    """Whether the blocks pool their keys, where the source's names show it."""
    table = naming_tables().get(source)
    keys = [entry.key for entry in entries if "/operation/g/" in entry.target]
    if not keys or table is None or table.pooled_key is None:
        return None
    return _agree("a pooling of their keys", (table.pooled_key in key for key in keys))


def _is_frozen(shapes: Shapes) -> bool:
    """Whether norms have no running statistics, after checking that all have them or none."""
    norms = sorted(path.removesuffix("/scale") for path in shapes if path.endswith("/scale"))
    trained = [norm for norm in norms if f"{norm}/mean" in shapes and f"{norm}/var" in shapes]
    frozen = sorted(set(norms) - set(trained))
    if trained and frozen:
        raise ValueError(f"{trained[0]} has running statistics, but {frozen[0]} has none")
    return not trained
