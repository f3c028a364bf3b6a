"""Building the network to which a file of weights belongs, or the call that builds it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from nonlocal_jax import models
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.models.video_tables import ClipFormat, Inflation
from nonlocal_jax.types import Instantiation
from nonlocal_jax.weights.entries import NATIVE, naming_tables
from nonlocal_jax.weights.infer import MNIST, Architecture

# From the name of a naming table to the preset of the networks whose files have these names.
PRESET_OF_NAMES: dict[str, Preset] = {
    names: preset for preset, conventions in PRESETS.items() for names in conventions.names
}
# Files with native names tell a preset only by the biases of their blocks, which several presets
# share. These come first. They are followed by the other presets in the order of the table.
PREFERRED_PRESETS: tuple[Preset, ...] = ("paper", "slowfast", "mmcv")
# The numbers of blocks for which `video_resnet` knows the places.
BLOCK_COUNTS = (0, 1, 5, 10)
LONG_MAPS = ("32x4", "128x1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """Choices where a file leaves several networks possible.

    None takes what the file shows or, failing that, the default.
    """

    # Frames x stride, for the layout. The default is that of the preset.
    clip: ClipFormat | None = None
    # Inflate an image network or a C2D to this. By default, an image network becomes a C2D.
    kind: Inflation | None = None
    # The pairwise function. Defaults to embedded_gaussian.
    instantiation: Instantiation | None = None
    # The conventions. Defaults to those of the source of the file.
    preset: Preset | None = None
    # Fold running statistics of BatchNorm into affine maps.
    fold: bool = False


def options(found: Architecture, choices: Choices = Choices()) -> dict[str, Any]:
    """Returns the arguments of the function of `nonlocal_jax.models` that builds the network.

    Args:
        found: The architecture that a file shows.
        choices: Choices where the file leaves several networks possible.

    Returns:
        Arguments by name.

    Raises:
        ValueError: A choice does not exist for the network of digits.
    """
    if found.network == MNIST:
        return _digit_options(found, choices)
    preset = choices.preset or PRESET_OF_NAMES.get(found.source) or _native_preset(found, choices)
    clip = choices.clip or PRESETS[PRESET_OF_NAMES.get(found.source, "paper")].clip
    arguments: dict[str, Any] = {
        "depth": found.depth,
        "kind": choices.kind or ("c2d" if found.kind == "image" else found.kind),
        "nonlocal_blocks": _block_count(found, preset),
        "clip": clip,
        "preset": preset,
    }
    if found.num_classes is not None:
        arguments["num_classes"] = found.num_classes
    if found.nonlocal_blocks:
        arguments |= _block_arguments(found, choices, preset, clip)
    if found.frozen_bn or choices.fold:
        arguments["frozen_bn"] = True
    if (found.groups, found.width_per_group) != (1, 64):
        arguments |= {"groups": found.groups, "width_per_group": found.width_per_group}
    table = naming_tables().get(found.source)
    return arguments | dict(table.network_options if table else {})


def build(found: Architecture, choices: Choices = Choices()) -> nn.Module:
    """Builds the network of a file, without its weights.

    Args:
        found: The architecture that the file shows.
        choices: Choices where the file leaves several networks possible.

    Returns:
        The module, for `load`.

    Raises:
        ValueError: The choices do not fit the network.
    """
    return getattr(models, found.network)(**options(found, choices))


def call(found: Architecture, choices: Choices = Choices()) -> str:
    """Returns the call that `build` makes, as code: "nl.models.video_resnet(50, 'c2d', ...)"."""
    arguments = options(found, choices)
    positional = ("instantiation",) if found.network == MNIST else ("depth", "kind")
    parts = [repr(arguments.pop(name)) for name in positional if name in arguments]
    parts += [f"{name}={value!r}" for name, value in arguments.items()]
    return f"nl.models.{found.network}({', '.join(parts)})"


def open_questions(found: Architecture, choices: Choices = Choices()) -> list[str]:
    """Lists what the file does not show and was not chosen, with the default that is used."""
    questions = []
    is_mnist = found.network == MNIST
    has_blocks = is_mnist or found.nonlocal_blocks
    if has_blocks and found.instantiation is None and choices.instantiation is None:
        questions.append(
            "pairwise function: embedded_gaussian and dot_product have the same weights; "
            "embedded_gaussian is assumed"
        )
    if is_mnist:
        return questions
    if choices.clip is None:
        clip = options(found, choices)["clip"]
        questions.append(f"clip: all layouts have the same weights; {clip} is assumed")
    if found.source in (NATIVE, "torchvision") and choices.preset is None:
        questions.append(f"preset: {options(found, choices)['preset']} is assumed")
    if found.kind == "image" and choices.kind is None:
        questions.append(
            "kind: the weights are those of an image network; it becomes a c2d unless another kind "
            "is chosen, for which it is inflated"
        )
    if found.num_classes is None:
        questions.append(
            "number of classes: there is no classifier; any num_classes fits, with "
            "initialise=('classifier',)"
        )
    if found.frozen_bn:
        questions.append("norms: there are no running statistics; frozen norms are assumed")
    return questions


def _digit_options(found: Architecture, choices: Choices) -> dict[str, Any]:
    for name in ("clip", "kind", "preset", "fold"):
        if value := getattr(choices, name):
            raise ValueError(f"{MNIST} has no {name} to choose; got {value!r}.")
    return {"instantiation": _instantiation(found, choices)}


def _instantiation(found: Architecture, choices: Choices) -> Instantiation:
    return choices.instantiation or found.instantiation or "embedded_gaussian"


def _block_count(found: Architecture, preset: Preset) -> int | dict[str, tuple[int, ...]]:
    """Returns the number of non-local blocks if they are in the usual places, else the places."""
    for count in BLOCK_COUNTS:
        if not found.nonlocal_blocks or _places(found, count, preset) == found.nonlocal_blocks:
            return count
    return dict(found.nonlocal_blocks)


def _places(
    found: Architecture, count: int, preset: Preset
) -> Mapping[str, tuple[int, ...]] | None:
    """Returns the usual places of `count` blocks; None if there are none at this depth."""
    try:
        blocks: Any = found.blocks
        model = models.video_resnet(blocks, "c2d", count, preset=preset)
    except ValueError:
        return None
    return model.nonlocal_blocks


def _block_arguments(
    found: Architecture, choices: Choices, preset: Preset, clip: ClipFormat
) -> dict[str, Any]:
    """Returns the arguments that the non-local blocks need."""
    arguments: dict[str, Any] = {"instantiation": _instantiation(found, choices)}
    if block_options := _block_options(found, preset):
        arguments["block_options"] = block_options
    table = naming_tables().get(found.source)
    group_size = dict(table.frozen_group_size) if table else {}
    is_frozen = found.frozen_bn and not found.nonlocal_norm
    has_groups = (
        is_frozen and clip in LONG_MAPS and group_size.keys() & found.nonlocal_blocks.keys()
    )
    return arguments | ({"group_size": group_size} if has_groups else {})


def _block_options(found: Architecture, preset: Preset) -> dict[str, Any]:
    """Returns the options in which the blocks differ from the preset."""
    conventions = PRESETS[preset].block
    block: dict[str, Any] = {} if found.nonlocal_norm else {"norm": None}
    if found.embedding_bias != conventions.use_bias:
        block["use_bias"] = found.embedding_bias
    is_default = conventions.out_bias is None
    if found.out_bias != (not found.nonlocal_norm if is_default else conventions.out_bias):
        block["out_bias"] = found.out_bias
    if found.subsample is False:
        block["subsample"] = False
    return block


def _native_preset(found: Architecture, choices: Choices) -> Preset:
    """Returns the first preset that has the pairwise function and the biases of the file."""
    if not found.nonlocal_blocks:
        return "paper"
    instantiation = _instantiation(found, choices)
    for preset in dict.fromkeys((*PREFERRED_PRESETS, *PRESETS)):
        has_biases = not _block_options(found, preset).keys() - {"norm"}
        if has_biases and instantiation in PRESETS[preset].block.instantiations:
            return preset
    return "paper"
