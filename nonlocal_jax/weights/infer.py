"""Which network a file of weights is of, from the names and shapes of its arrays alone."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from nonlocal_jax import models
from nonlocal_jax.models.video_tables import DEPTHS, STAGES
from nonlocal_jax.models.video_tables import Inflation as Kind
from nonlocal_jax.types import Instantiation
from nonlocal_jax.weights.entries import Entry, name_of, read_names
from nonlocal_jax.weights.files import Checkpoint

MNIST: Final = "non_local_pytorch_mnist"
KINDS: tuple[Kind, ...] = ("c2d", "i3d_3x1x1", "i3d_3x3x3")
Shapes = Mapping[str, tuple[int, ...]]  # of our leaves, without "params/" and "batch_stats/"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network, as far as its weights tell.

    Attributes:
        source: whose names the file has.
        network: the function of `nonlocal_jax.models` that makes it.
        blocks: residual blocks of res2 to res5.
        kind: of its kernels; "image" for those of an image network, which have no axis of time.
        nonlocal_blocks: after which residual blocks of which stages.
        instantiation: None where θ and φ are there and w_f is not: the embedded Gaussian or the dot product.
        subsample: whether the blocks pool their keys; None where names do not tell.
        embedding_bias, out_bias: whether θ, φ and g, and W_z, have a bias.
        nonlocal_norm: whether a norm follows W_z.
        frozen_bn: whether there are no running statistics, so that norms are fixed affine maps.
        num_classes: None without a classifier.
        groups, width_per_group: 1 and 64 in a ResNet.
    """

    source: str
    network: Literal["video_resnet", "non_local_pytorch_mnist"]
    blocks: tuple[int, ...] = ()
    kind: Kind | Literal["image"] = "c2d"
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

    @property
    def depth(self) -> int | tuple[int, ...]:
        """50, 101 or 152, or the residual blocks of each stage."""
        return next(
            (depth for depth, blocks in DEPTHS.items() if blocks == self.blocks), self.blocks
        )


def architecture(checkpoint: Checkpoint) -> Architecture:
    """The network that a file is of.

    Args:
        checkpoint: a file that was read.

    Returns:
        What names and shapes tell of it. Whether all arrays fit is for `load` to say.

    Raises:
        ValueError: names of no source, a network that is none of those here, a hole in the numbering of its blocks, or
            shapes that contradict each other; the message names the first.

    >>> import pathlib, tempfile, jax, nonlocal_jax as nl
    >>> model = nl.models.non_local_pytorch_mnist("gaussian")
    >>> path = pathlib.Path(tempfile.mkdtemp(), "digits.safetensors")
    >>> nl.weights.save(path, model.init(jax.random.key(0), jax.numpy.ones((1, 28, 28, 1))))
    >>> found = architecture(nl.weights.read(path))
    >>> found.network, found.instantiation, found.num_classes
    ('non_local_pytorch_mnist', 'gaussian', 10)
    """
    source, entries, _ = read_names(checkpoint)
    try:
        return _architecture(name_of(source), [entry for entry in entries if entry.target])
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}, named as in {name_of(source)}: {error}.") from error


def _architecture(source: str, entries: list[Entry]) -> Architecture:
    shapes = {entry.target.partition("/")[2]: entry.array.shape for entry in entries}
    if {"conv2/kernel", "fc1/kernel"} <= shapes.keys():
        found = Architecture(source, MNIST, **_pairwise(shapes, ["nonlocal1", "nonlocal2"]))
        return dataclasses.replace(
            found, num_classes=shapes["fc2/kernel"][-1] if "fc2/kernel" in shapes else None
        )
    blocks = _residual_blocks(shapes)
    places = _nonlocal_blocks(shapes, blocks)
    flat = {entry.flat for entry in entries if re.search(r"/conv(1|_[abc])/kernel$", entry.target)}
    return Architecture(
        source=source,
        network="video_resnet",
        blocks=blocks,
        kind="image" if flat == {True} else _kind(shapes, blocks),
        nonlocal_blocks={
            stage: tuple(i for _, i in group)
            for stage, group in itertools.groupby(places, lambda place: place[0])
        },
        subsample=_subsample(
            source, [entry.key for entry in entries if "/operation/g/" in entry.target]
        ),
        frozen_bn=_frozen(shapes),
        num_classes=shapes["head/kernel"][-1] if "head/kernel" in shapes else None,
        **_pairwise(shapes, [f"nonlocal_{stage}_{i}" for stage, i in places]),
        **_widths(shapes, blocks),
    )


def _residual_blocks(shapes: Shapes) -> tuple[int, ...]:
    """How many each stage has, their numbers without a hole."""
    counts = []
    for stage in STAGES:
        numbers = sorted(
            {int(m[1]) for path in shapes if (m := re.match(rf"{stage}_(\d+)/", path))}
        )
        if not numbers:
            raise ValueError(f"it has no {stage}, so it is none of the networks here")
        if hole := [i for i in range(numbers[-1]) if i not in numbers]:
            raise ValueError(f"{stage} has a residual block {numbers[-1]} but no {hole[0]}")
        for i in numbers:
            for conv in ("conv_a", "conv_b", "conv_c"):
                _kernel(shapes, f"{stage}_{i}/{conv}")
        counts.append(len(numbers))
    return tuple(counts)


def _kernel(shapes: Shapes, place: str) -> tuple[int, ...]:
    shape = shapes.get(f"{place}/kernel")
    if shape is None or len(shape) != 5:
        raise ValueError(
            f"{place} must have a kernel of 4 or 5 axes; it has {'none' if shape is None else shape}"
        )
    return shape


def _nonlocal_blocks(shapes: Shapes, blocks: tuple[int, ...]) -> list[tuple[str, int]]:
    """The stage and number of the residual block that each comes after."""
    found = {
        (m[1], int(m[2])) for path in shapes if (m := re.match(r"nonlocal_(res[2-5])_(\d+)/", path))
    }
    for stage, i in sorted(found):
        if i >= (count := blocks[STAGES.index(stage)]):
            raise ValueError(
                f"there is a non-local block after residual block {i} of {stage}, which has {count}"
            )
    return sorted(found)


def _kind(shapes: Shapes, blocks: tuple[int, ...]) -> Kind:
    """The one whose taps in time the kernels have."""
    taps = {
        f"{stage}_{i}/{conv}": _kernel(shapes, f"{stage}_{i}/{conv}")[0]
        for stage, count in zip(STAGES, blocks, strict=True)
        for i in range(count)
        for conv in ("conv_a", "conv_b")
    }
    taps["conv1"] = _kernel(shapes, "conv1")[0]
    wrong = {}
    for kind in KINDS:
        model = models.video_resnet(blocks, kind, 0)  # type: ignore[arg-type]
        wanted = {"conv1": model.conv1_frames}
        for stage, of_stage in zip(STAGES, model.taps, strict=True):
            for i, pair in enumerate(of_stage):
                wanted |= {
                    f"{stage}_{i}/{conv}": n
                    for conv, n in zip(("conv_a", "conv_b"), pair, strict=True)
                }
        wrong[kind] = [
            f"{place} is {taps[place]} where it has {n}"
            for place, n in wanted.items()
            if taps[place] != n
        ]
    nearest = min(KINDS, key=lambda kind: len(wrong[kind]))
    if wrong[nearest]:
        raise ValueError(
            f"its kernels are not those of {', '.join(KINDS)}; nearest is {nearest}, but in frames {wrong[nearest][0]}"
        )
    return nearest


def _widths(shapes: Shapes, blocks: tuple[int, ...]) -> dict[str, Any]:
    """Groups and their width, from the 3×3 of res2_0; those of every other block must agree."""
    *_, per_group, inner = _kernel(shapes, "res2_0/conv_b")
    groups = inner // per_group if per_group and inner % per_group == 0 else 0
    if not groups or inner % groups:
        raise ValueError(
            f"res2_0/conv_b has {inner} channels, of which each sees {per_group}: that is no number of groups"
        )
    for s, (stage, count) in enumerate(zip(STAGES, blocks, strict=True)):
        for i in range(count):
            wanted = {
                "conv_a": (None, inner << s),
                "conv_b": ((inner << s) // groups, inner << s),
                "conv_c": (inner << s, 256 << s),
            }
            for conv, (into, out) in wanted.items():
                shape = _kernel(shapes, f"{stage}_{i}/{conv}")
                if shape[4] != out or into not in (None, shape[3]):
                    raise ValueError(
                        f"{stage}_{i}/{conv} has {shape[3]} channels in and {shape[4]} out; a network whose res2_0/conv_b has "
                        f"{inner} out, in {groups} groups, has {shape[3] if into is None else into} and {out}"
                    )
    return {"groups": groups, "width_per_group": inner // groups}


def _pairwise(shapes: Shapes, places: list[str]) -> dict[str, Any]:
    """What the non-local blocks have in common, which is all there is to choose for them."""
    instantiation: Instantiation | None
    if _all("θ", (f"{place}/operation/theta/kernel" in shapes for place in places)):
        with_w_f = _all("w_f", (f"{place}/operation/w_f" in shapes for place in places))
        instantiation = "concatenation" if with_w_f else None
    else:
        instantiation = "gaussian" if places else None
    return {
        "instantiation": instantiation,
        "embedding_bias": _all(
            "a bias of g", (f"{place}/operation/g/bias" in shapes for place in places)
        ),
        "out_bias": _all("a bias of W_z", (f"{place}/out/bias" in shapes for place in places)),
        "nonlocal_norm": _all("a norm", (f"{place}/out_norm/scale" in shapes for place in places)),
    }


def _all(what: str, each: Iterable[bool]) -> bool:
    found = set(each)
    if len(found) > 1:
        raise ValueError(f"some non-local blocks have {what} and some do not")
    return found == {True}


def _subsample(source: str, keys: list[str]) -> bool | None:
    """Whether a pooling follows g, which is then the first of two; from its names in mmaction2."""
    return (
        _all("a pooling of their keys", (".g.0." in key for key in keys))
        if keys and source == "mmaction2"
        else None
    )


def _frozen(shapes: Shapes) -> bool:
    norms = sorted(path.removesuffix("/scale") for path in shapes if path.endswith("/scale"))
    with_statistics = [
        norm for norm in norms if f"{norm}/mean" in shapes and f"{norm}/var" in shapes
    ]
    if with_statistics and (without := sorted(set(norms) - set(with_statistics))):
        raise ValueError(f"{with_statistics[0]} has running statistics, but {without[0]} has none")
    return not with_statistics
