"""Building the network to which a file of weights belongs, or the call that builds it."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from nonlocal_jax import models
from nonlocal_jax.layers.conventions import ClipFormat
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.types import Instantiation
from nonlocal_jax.weights.entries import naming_tables
from nonlocal_jax.weights.infer import MNIST, Architecture
from nonlocal_jax.weights.published import hint
from nonlocal_jax.weights.questions import (
    NO_CHOICES,
    Choices,
    OpenQuestionsError,
    bias_options,
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
        if question.name == "key_pool":
            block_options = arguments.pop("block_options", {})
            arguments["block_options"] = block_options | {"subsample": ...}
        else:
            arguments[question.name] = ...
        if question.name == "clip" and _group_sizes(found, "32x4"):
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
    for preset in presets:
        block = PRESETS[preset].block
        facts = [f"ε of BatchNorm is {block.epsilon:.8g}"]
        if found.nonlocal_blocks:
            scale = likely_options(found, choices).get("block_options", {}).get("use_scale")
            inside = PRESETS[preset].backbone.use_scale
            default = block.use_scale if inside is None else inside
            is_scaled = default if scale is None else scale
            facts.append(f"softmax logits are {'' if is_scaled else 'not '}scaled by d^-0.5")
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
    clip = choices.clip or found.configuration.clip or "8x8"
    arguments: dict[str, Any] = {
        "depth": found.depth,
        "kind": choices.kind or ("c2d" if found.kind == "image" else found.kind),
        "nonlocal_blocks": _block_count(found, presets),
        "clip": clip,
        "preset": preset,
    }
    if found.num_classes is not None:
        arguments["num_classes"] = found.num_classes
    if (found.pool2 if choices.pool2 is None else choices.pool2) is False:
        arguments["pool2"] = False
    if found.nonlocal_blocks:
        arguments |= _block_arguments(found, choices, preset, clip)
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
        for name in ("clip", "kind", "preset", "pool2", "key_pool", "stride_at", "fold"):
            value = getattr(choices, name)
            if value is not None and value is not False:
                raise ValueError(f"{MNIST} has no {name} to choose; got {value!r}.")
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


def _block_arguments(
    found: Architecture, choices: Choices, preset: Preset, clip: ClipFormat
) -> dict[str, Any]:
    """Returns the arguments that the non-local blocks need."""
    instantiation = _instantiation(found, choices)
    arguments: dict[str, Any] = {"instantiation": instantiation}
    if block_options := _block_options(found, choices, preset, instantiation):
        arguments["block_options"] = block_options
    if group_size := _group_sizes(found, clip):
        arguments["group_size"] = group_size
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
    use_scale = found.configuration.use_scale
    default = PRESETS[preset].backbone.use_scale
    default = PRESETS[preset].block.use_scale if default is None else default
    is_embedded = instantiation == "embedded_gaussian"
    if is_embedded and use_scale is not None and use_scale != default:
        block["use_scale"] = use_scale
    return block


def _group_sizes(found: Architecture, clip: ClipFormat) -> dict[str, int]:
    """Returns the frames of a temporal group of the blocks, by stage."""
    if found.configuration.group_size:
        return dict(found.configuration.group_size)
    table = naming_tables().get(found.source)
    group_size = dict(table.frozen_group_size) if table else {}
    is_frozen = found.frozen_bn and not found.nonlocal_norm
    has_groups = group_size.keys() & found.nonlocal_blocks.keys()
    return group_size if is_frozen and clip in LONG_MAPS and has_groups else {}
