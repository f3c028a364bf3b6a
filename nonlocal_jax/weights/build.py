"""Building the network to which a file of weights belongs, or the call that builds it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from nonlocal_jax import models
from nonlocal_jax.layers.conventions import ClipFormat
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.models.video_tables import LONG_CLIPS
from nonlocal_jax.types import Instantiation
from nonlocal_jax.weights.entries import naming_tables
from nonlocal_jax.weights.infer import MNIST, Architecture
from nonlocal_jax.weights.published import hint
from nonlocal_jax.weights.questions import (
    NO_CHOICES,
    SHORT_CLIPS,
    Choices,
    OpenQuestionsError,
    bias_options,
    chosen_clip,
    chosen_pool2,
    has_long_clips,
    open_questions,
    possible_presets,
)

__all__ = [
    "Choices",
    "OpenQuestionsError",
    "build",
    "build_any",
    "call",
    "notes",
    "open_questions",
    "options",
]

# The numbers of blocks for which `video_resnet` knows the places.
BLOCK_COUNTS = (0, 1, 5, 10)
LONG_MAPS = ("32x4", "128x1")
USUAL_KEY_POOL = (1, 2, 2)  # the window of `subsample=True` in a video
# Choices that are options of the blocks, and their names there.
BLOCK_OPTIONS = {"key_pool": "subsample", "use_scale": "use_scale"}


def options(found: Architecture, choices: Choices = NO_CHOICES) -> dict[str, Any]:
    """Returns the arguments of the function of `nonlocal_jax.models` that builds the network.

    Args:
        found: The architecture that a file shows.
        choices: Choices where the file leaves several networks possible.

    Returns:
        Arguments by name.

    Raises:
        OpenQuestionsError: Neither the file nor the choices tell which network it is.
        ValueError: A choice contradicts the names of the file, or does not exist for the network of
            digits.
    """
    _check_choices(found, choices)
    if questions := open_questions(found, choices):
        name = re.split(r"[/\\]", found.file)[-1]
        lines = "\n  ".join([*map(str, questions), *filter(None, [hint(name)])])
        raise OpenQuestionsError(
            f"{found.file} does not show which network its weights are of. Choose, as options or "
            f"in `Choices`:\n  {lines}"
        )
    return likely_options(found, choices)


def build(found: Architecture, choices: Choices = NO_CHOICES) -> nn.Module:
    """Builds the network of a file, without its weights.

    Args:
        found: The architecture that the file shows.
        choices: Choices where the file leaves several networks possible.

    Returns:
        The module, for `load`.

    Raises:
        OpenQuestionsError: Neither the file nor the choices tell which network it is. The message
            lists the choices.
        ValueError: The choices do not fit the network.
    """
    return getattr(models, found.network)(**options(found, choices))


def build_any(found: Architecture, choices: Choices = NO_CHOICES) -> nn.Module:
    """Builds a network with the arrays of a file, which may compute something else than its own.

    That is enough to read the weights and to write them again, since all answers to
    `open_questions` lead to the same arrays.

    Args:
        found: The architecture that the file shows.
        choices: Choices where the file leaves several networks possible.

    Returns:
        The module, for `load`.

    Raises:
        ValueError: The choices do not fit the network.
    """
    _check_choices(found, choices)
    return getattr(models, found.network)(**likely_options(found, choices))


def call(found: Architecture, choices: Choices = NO_CHOICES) -> str:
    """Returns the call that `build` makes, as code: "nl.models.video_resnet(50, 'c2d', ...)".

    What is open is written as `...`, which the function that is called does not accept.
    """
    _check_choices(found, choices)
    arguments = likely_options(found, choices)
    for question in open_questions(found, choices):
        if question.name in BLOCK_OPTIONS:
            block_options = arguments.pop("block_options", {})
            open_option = {BLOCK_OPTIONS[question.name]: ...}
            arguments["block_options"] = block_options | open_option
        else:
            arguments[question.name] = ...
        decides_groups = question.name == "clip" or (
            question.name == "pool2" and found.configuration.groups
        )
        if decides_groups and group_sizes(found, "32x4", True):
            arguments["group_size"] = ...
    positional = ("instantiation",) if found.network == MNIST else ("depth", "kind")
    parts = [_code(arguments.pop(name)) for name in positional if name in arguments]
    parts += [f"{name}={_code(value)}" for name, value in arguments.items()]
    return f"nl.models.{found.network}({', '.join(parts)})"


def notes(found: Architecture, choices: Choices = NO_CHOICES) -> list[str]:
    """Lists what was assumed by the conventions of the source, and what can be chosen freely."""
    if found.network == MNIST:
        return []
    lines = []
    presets = possible_presets(found, choices)
    asked = {question.name for question in open_questions(found, choices)}
    for preset in presets:
        block = PRESETS[preset].block
        facts = [f"ε of BatchNorm is {block.epsilon:.8g}"]
        if found.nonlocal_blocks and "use_scale" not in asked:
            scale = likely_options(found, choices).get("block_options", {}).get("use_scale")
            inside = PRESETS[preset].backbone.use_scale
            default = block.use_scale if inside is None else inside
            is_scaled = default if scale is None else scale
            facts.append(f"softmax logits are {'' if is_scaled else 'not '}scaled by d^-0.5")
        if found.nonlocal_blocks:
            facts.append(f"keys are pooled {block.pool_order} φ and g")
        lines.append(f"conventions of preset {preset}: {', '.join(facts)}")
    if choices.stride_at is None and found.configuration.stride_at is None:
        lines.append(
            "strides are in the 3×3 convolutions, as in every published video network; "
            "--stride-at conv_a has them in the 1×1"
        )
    if found.num_classes is None:
        lines.append(
            "there is no classifier: any num_classes fits, with initialise=('classifier',)"
        )
    if found.frozen_bn:
        lines.append("there are no running statistics: norms are frozen")
    return lines


def likely_options(found: Architecture, choices: Choices) -> dict[str, Any]:
    """Returns the options, with the most likely answer to each open question."""
    if found.network == MNIST:
        return {"instantiation": _instantiation(found, choices)}
    presets = possible_presets(found, choices)
    preset = presets[0]
    clip = chosen_clip(found, choices) or "8x8"
    has_pool2 = chosen_pool2(found, choices) is not False
    arguments: dict[str, Any] = {
        "depth": found.depth,
        "kind": choices.kind or ("c2d" if found.kind == "image" else found.kind),
        "nonlocal_blocks": _block_count(found, presets),
        "clip": clip,
        "preset": preset,
    }
    if found.num_classes is not None:
        arguments["num_classes"] = found.num_classes
    if not has_pool2:
        arguments["pool2"] = False
    if found.nonlocal_blocks:
        arguments |= _block_arguments(found, choices, preset)
        if group_size := group_sizes(found, clip, has_pool2):
            arguments["group_size"] = group_size
    if found.frozen_bn or choices.fold:
        arguments["frozen_bn"] = True
    if (choices.stride_at or found.configuration.stride_at) == "conv_a":
        arguments["stride_at"] = "conv_a"
    if (found.groups, found.width_per_group) != (1, 64):
        arguments |= {"groups": found.groups, "width_per_group": found.width_per_group}
    table = naming_tables().get(found.source)
    return arguments | dict(table.network_options if table else {})


def _check_choices(found: Architecture, choices: Choices) -> None:
    """Checks that the choices do not contradict what the names show."""
    if found.network == MNIST:
        for field in dataclasses.fields(Choices):
            value = getattr(choices, field.name)
            if field.name != "instantiation" and value != field.default:
                raise ValueError(f"{MNIST} has no {field.name} to choose; got {value!r}.")
    if choices.clip in LONG_CLIPS and not has_long_clips(found, choices):
        source = PRESETS["slowfast"].title if found.source == "caffe2" else found.source
        raise ValueError(
            f"clip must be {', '.join(SHORT_CLIPS)} for a file of {source}, whose networks have no "
            f"strides in time before pool2; got {choices.clip}."
        )
    instantiation = choices.instantiation or found.instantiation
    if choices.use_scale is not None and instantiation not in (None, "embedded_gaussian"):
        raise ValueError(
            f"only the embedded Gaussian has use_scale to choose; got use_scale="
            f"{choices.use_scale} for {instantiation}."
        )
    table = naming_tables().get(found.source)
    if table is not None and table.shows_pool2 and choices.pool2 is False:
        raise ValueError(f"pool2 must be True, as the names of {found.source} show; got False.")
    is_pooled = choices.key_pool is not None and choices.key_pool != (1, 1, 1)
    if None not in (found.subsample, choices.key_pool) and is_pooled != found.subsample:
        shown = "pooled" if found.subsample else "not pooled"
        raise ValueError(
            f"the names of {found.source} show that keys are {shown}; got key_pool="
            f"{choices.key_pool}."
        )


def _code(value: Any) -> str:
    """Writes a value as code. The repr of `...` is a name that few readers know."""
    if value is ...:
        return "..."
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_code(item)}' for key, item in value.items())}}}"
    return repr(value)


def _instantiation(found: Architecture, choices: Choices) -> Instantiation:
    return choices.instantiation or found.instantiation or "embedded_gaussian"


def _block_count(
    found: Architecture, presets: tuple[Preset, ...]
) -> int | dict[str, tuple[int, ...]]:
    """Returns the number of non-local blocks if they are in the usual places, else the places."""
    for count in BLOCK_COUNTS:
        places = [_places(found, count, preset) for preset in presets]
        if not found.nonlocal_blocks or all(place == found.nonlocal_blocks for place in places):
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


def _block_arguments(found: Architecture, choices: Choices, preset: Preset) -> dict[str, Any]:
    """Returns the arguments that the non-local blocks need, whatever the clip."""
    instantiation = _instantiation(found, choices)
    arguments: dict[str, Any] = {"instantiation": instantiation}
    if block_options := _block_options(found, choices, preset, instantiation):
        arguments["block_options"] = block_options
    return arguments


def _block_options(
    found: Architecture, choices: Choices, preset: Preset, instantiation: Instantiation
) -> dict[str, Any]:
    """Returns the options in which the blocks differ from the preset."""
    block: dict[str, Any] = {} if found.nonlocal_norm else {"norm": None}
    block |= bias_options(found, preset)
    key_pool = choices.key_pool or found.configuration.key_pool
    if found.subsample is False or key_pool == (1, 1, 1):
        block["subsample"] = False
    elif key_pool not in (None, USUAL_KEY_POOL):
        block["subsample"] = key_pool
    stated_scale = found.configuration.use_scale
    use_scale = stated_scale if choices.use_scale is None else choices.use_scale
    default = PRESETS[preset].backbone.use_scale
    default = PRESETS[preset].block.use_scale if default is None else default
    is_embedded = instantiation == "embedded_gaussian"
    if is_embedded and use_scale is not None and use_scale != default:
        block["use_scale"] = use_scale
    return block


def group_sizes(found: Architecture, clip: ClipFormat, has_pool2: bool) -> dict[str, int]:
    """Returns the frames of a temporal group of the blocks, by stage."""
    if found.configuration.groups:
        frames = int(clip.partition("x")[0])
        frames_after_pool2 = frames // 2 if has_pool2 else frames
        return {
            stage: max((frames if stage == "res2" else frames_after_pool2) // count, 1)
            for stage, count in found.configuration.groups.items()
        }
    table = naming_tables().get(found.source)
    group_size = dict(table.frozen_group_size) if table else {}
    is_frozen = found.frozen_bn and not found.nonlocal_norm
    has_groups = group_size.keys() & found.nonlocal_blocks.keys()
    return group_size if is_frozen and clip in LONG_MAPS and has_groups else {}
