"""The network that a file of weights is of, as the call that makes it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from nonlocal_jax import models
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.models.video_tables import ClipFormat as Clip
from nonlocal_jax.models.video_tables import Inflation as Kind
from nonlocal_jax.types import Instantiation
from nonlocal_jax.weights.entries import NATIVE
from nonlocal_jax.weights.infer import MNIST, Architecture

# By the names in a file, whose networks those are.
PRESET_OF_NAMES: dict[str, Preset] = {
    names: preset for preset, conventions in PRESETS.items() for names in conventions.names
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What a file does not tell, or what is wanted instead. None is what the file says or, failing that, the default."""

    clip: Clip | None = None  # frames x stride, for the layout; by default 8x8, for mmaction2 32x2
    kind: Kind | None = (
        None  # inflates the kernels of an image network or a C2D; by default an image network becomes a C2D
    )
    instantiation: Instantiation | None = (
        None  # by default embedded_gaussian, where the file leaves it and dot_product open
    )
    preset: Preset | None = (
        None  # whose conventions; by default those of the source whose names the file has
    )
    fold: bool = False  # fold running statistics of BatchNorm into affine maps


def options(found: Architecture, choices: Choices = Choices()) -> dict[str, Any]:
    """The arguments of the function of `nonlocal_jax.models` that makes the network.

    Args:
        found: of a file.
        choices: what the file does not tell.

    Returns:
        By the name of the argument.

    Raises:
        ValueError: choices that the network of digits does not have.
    """
    instantiation = choices.instantiation or found.instantiation or "embedded_gaussian"
    if found.network == MNIST:
        if wrong := [name for name in ("clip", "kind", "preset", "fold") if getattr(choices, name)]:
            raise ValueError(
                f"{MNIST} has no {wrong[0]} to choose; got {getattr(choices, wrong[0])!r}."
            )
        return {"instantiation": instantiation}
    preset = choices.preset or PRESET_OF_NAMES.get(found.source) or _preset(found, instantiation)
    kind = choices.kind or ("c2d" if found.kind == "image" else found.kind)
    arguments: dict[str, Any] = {
        "depth": found.depth,
        "kind": kind,
        "nonlocal_blocks": dict(found.nonlocal_blocks),
    }
    for count in (0, 1, 5, 10):
        if (
            not found.nonlocal_blocks
            or _positions(found.blocks, count, preset) == found.nonlocal_blocks
        ):
            arguments["nonlocal_blocks"] = count
            break
    arguments |= {
        "clip": choices.clip or PRESETS[PRESET_OF_NAMES.get(found.source, "paper")].clip,
        "preset": preset,
    }
    if found.num_classes is not None:
        arguments["num_classes"] = found.num_classes
    if found.nonlocal_blocks:
        arguments["instantiation"] = instantiation
        if block := _block_options(found, preset):
            arguments["block_options"] = block
        # video-nonlocal-net sums over groups of frames where it has frozen norms and long maps.
        frozen_net = found.source == "caffe2" and found.frozen_bn and not found.nonlocal_norm
        if (
            frozen_net
            and arguments["clip"] in ("32x4", "128x1")
            and "res3" in found.nonlocal_blocks
        ):
            arguments["group_size"] = {"res3": 4}
    if found.frozen_bn or choices.fold:
        arguments["frozen_bn"] = True
    if (found.groups, found.width_per_group) != (1, 64):
        arguments |= {"groups": found.groups, "width_per_group": found.width_per_group}
    if found.source == "pytorchvideo":
        arguments["window_average"] = "logits"
    return arguments


def build(found: Architecture, choices: Choices = Choices()) -> nn.Module:
    """The network of a file, without its weights.

    Args:
        found: of the file.
        choices: what the file does not tell.

    Returns:
        The module that `load` fills.

    Raises:
        ValueError: choices that do not fit.
    """
    return getattr(models, found.network)(**options(found, choices))


def call(found: Architecture, choices: Choices = Choices()) -> str:
    """What `build` does, to be written down: "nl.models.video_resnet(50, 'c2d', ...)"."""
    arguments = options(found, choices)
    first = [repr(arguments.pop(name)) for name in ("depth", "kind") if name in arguments]
    if found.network == MNIST:
        first = [repr(arguments.pop("instantiation"))]
    return f"nl.models.{found.network}({', '.join([*first, *(f'{name}={value!r}' for name, value in arguments.items())])})"


def open_questions(found: Architecture, choices: Choices = Choices()) -> list[str]:
    """What the file does not tell and was not chosen, a sentence each."""
    out, has_blocks = [], found.network == MNIST or found.nonlocal_blocks
    if has_blocks and found.instantiation is None and choices.instantiation is None:
        out.append(
            "pairwise function: embedded_gaussian and dot_product have the same weights; embedded_gaussian is taken"
        )
    if found.network == MNIST:
        return out
    if choices.clip is None:
        out.append(
            f"clip: layouts have the same weights; {options(found, choices)['clip']} is taken"
        )
    if found.source in (NATIVE, "torchvision") and choices.preset is None:
        out.append(f"preset: {options(found, choices)['preset']} is taken")
    if found.kind == "image" and choices.kind is None:
        out.append(
            "kind: an image network; it becomes a c2d, or is inflated if another kind is asked for"
        )
    if found.num_classes is None:
        out.append("no classifier: any num_classes fits, with initialise=('classifier',)")
    if found.frozen_bn:
        out.append("no running statistics: norms are taken to be frozen")
    return out


def _positions(
    blocks: tuple[int, ...], count: int, preset: Preset
) -> Mapping[str, tuple[int, ...]] | None:
    """Where so many blocks would be; None where they have no place."""
    try:
        return models.video_resnet(blocks, "c2d", count, preset=preset).nonlocal_blocks  # type: ignore[arg-type]
    except ValueError:
        return None


def _block_options(found: Architecture, preset: Preset) -> dict[str, Any]:
    """Where the blocks are not as the preset has them."""
    convention = PRESETS[preset].block
    block: dict[str, Any] = {} if found.nonlocal_norm else {"norm": None}
    if found.embedding_bias != convention.use_bias:
        block["use_bias"] = found.embedding_bias
    usual = not found.nonlocal_norm if convention.out_bias is None else convention.out_bias
    if found.out_bias != usual:
        block["out_bias"] = found.out_bias
    if found.subsample is False:
        block["subsample"] = False
    return block


def _preset(found: Architecture, instantiation: Instantiation) -> Preset:
    """For our own names: the first with the file's biases."""
    order: tuple[Preset, ...] = ("paper", "slowfast", "mmcv", "non_local_pytorch")
    if not found.nonlocal_blocks:
        return "paper"
    fits = (
        p
        for p in order
        if instantiation in PRESETS[p].block.instantiations
        and not _block_options(found, p).keys() - {"norm"}
    )
    return next(fits, "paper")
