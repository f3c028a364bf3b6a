"""What a file of weights leaves open about its network, and the choices that answer it.

Poolings, strides and the normalisation of a pairwise function have no weights, so networks that
compute different things can have the same arrays. Nothing of that is guessed: what neither the
arrays, nor the names, nor a configuration in the file show is asked for.
"""

import dataclasses
from typing import Any

from nonlocal_jax.layers.conventions import ClipFormat, Triple
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.models.bottleneck import StrideAt
from nonlocal_jax.models.video_tables import CLIP_FORMATS, INFLATIONS, LONG_CLIPS, Inflation
from nonlocal_jax.types import Instantiation
from nonlocal_jax.weights.entries import NATIVE, naming_tables
from nonlocal_jax.weights.infer import MNIST, Architecture

# From the name of a naming table to the preset of the networks whose files have these names.
PRESET_OF_NAMES: dict[str, Preset] = {
    names: preset for preset, conventions in PRESETS.items() for names in conventions.names
}
# PySlowFast's model zoo has files with the names of Caffe2.
CAFFE2_PRESETS: tuple[Preset, ...] = ("caffe2", "slowfast")
# Files with native names tell a preset only by the biases of their blocks, which several presets
# share. These come first. They are followed by the other presets in the order of the table.
PREFERRED_PRESETS: tuple[Preset, ...] = ("paper", "slowfast", "mmcv")
# Non-local_pytorch has no video networks.
VIDEO_PRESETS = tuple(preset for preset in PRESETS if preset != "non_local_pytorch")
# Names whose networks have no stride in time before pool2, whatever the clip.
SHORT_CLIP_NAMES = ("slowfast", "pytorchvideo")
SHORT_CLIPS = tuple(clip for clip in CLIP_FORMATS if clip not in LONG_CLIPS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """Choices where a file leaves several networks possible. None takes what the file shows."""

    # Frames x stride of a clip, which chooses the strides in time.
    clip: ClipFormat | None = None
    # Inflation of the kernels, for an image network or a C2D.
    kind: Inflation | None = None
    # The pairwise function.
    instantiation: Instantiation | None = None
    # The source whose conventions the network has.
    preset: Preset | None = None
    # Whether a pooling in time follows res2.
    pool2: bool | None = None
    # Frames, rows and columns of the window in which keys are pooled. 1 1 1 is no pooling.
    key_pool: Triple | None = None
    # Whether the logits of the embedded Gaussian are scaled by d^-0.5.
    use_scale: bool | None = None
    # The convolution of a residual block that has the stride: 1x1 (conv_a) or 3x3 (conv_b).
    stride_at: StrideAt | None = None
    # Fold running statistics of BatchNorm into affine maps.
    fold: bool = False


NO_CHOICES = Choices()


@dataclasses.dataclass(frozen=True)
class Question:
    """A fact of a network that its file does not show.

    Attributes:
        name: The attribute of `Choices` that answers it.
        answers: The possible answers.
        reason: Why the file does not show it.
    """

    name: str
    answers: tuple[Any, ...]
    reason: str

    def __str__(self) -> str:
        *others, last = (_spelling(answer) for answer in self.answers)
        answers = f"{', '.join(others)} or {last}" if others else last
        return f"--{self.name.replace('_', '-')} {answers}: {self.reason}"


def _spelling(answer: Any) -> str:
    """Spells an answer as on the command line."""
    return " ".join(map(str, answer)) if isinstance(answer, tuple) else str(answer)


class OpenQuestionsError(ValueError):
    """The file leaves open which network it is of, and the choices do not say it."""


def open_questions(found: Architecture, choices: Choices = NO_CHOICES) -> list[Question]:
    """Lists what the file does not show and was not chosen.

    Args:
        found: The architecture that the file shows.
        choices: What was chosen.

    Returns:
        The questions. Each different answer is another network with the same arrays.

    >>> found = Architecture("slowfast", "video_resnet", blocks=(3, 4, 6, 3), num_classes=400)
    >>> for question in open_questions(found):
    ...     print(question.name, question.answers)
    clip ('8x8', '16x4', '32x4')
    pool2 (True, False)
    """
    questions = []
    if found.network != MNIST:
        questions += _network_questions(found, choices)
    has_blocks = found.network == MNIST or bool(found.nonlocal_blocks)
    if has_blocks and found.instantiation is None and choices.instantiation is None:
        functions = ("embedded_gaussian", "dot_product")
        questions.append(Question("instantiation", functions, "both have the same weights"))
    shows_pooling = found.subsample is not None or found.configuration.key_pool is not None
    if found.nonlocal_blocks and not shows_pooling and choices.key_pool is None:
        reason = "the pooling of the keys has no weights; any window is possible"
        questions.append(Question("key_pool", ((1, 2, 2), (2, 2, 2), (1, 1, 1)), reason))
    if _has_open_scale(found, choices):
        reason = "the scale of the embedded Gaussian has no weights, and blocks of mmcv have both"
        questions.append(Question("use_scale", (True, False), reason))
    return questions


def _network_questions(found: Architecture, choices: Choices) -> list[Question]:
    """Lists the questions about the network around the blocks."""
    questions = []
    presets = possible_presets(found, choices)
    if choices.preset is None and _has_names_of_several(found):
        reason = "networks of these sources have the same names"
        if found.source == NATIVE:
            reason = "the weights of a network do not name its source"
        questions.append(Question("preset", presets, reason))
    if choices.preset is None and _has_open_padding(found, choices):
        reason = (
            "its kernels have one frame, as those of mmaction2's ResNet3d without inflation. That "
            "pads pool1, and with pool2 no network here does; the C2D of this preset pads none"
        )
        questions.append(Question("preset", presets, reason))
    if choices.kind is None and found.kind == "image" and not _is_flat_c2d(found):
        reason = "the weights are those of an image network, which is inflated"
        questions.append(Question("kind", tuple(INFLATIONS), reason))
    clip, can_be_long = chosen_clip(found, choices), has_long_clips(found, choices)
    if clip is None:
        clips, reason = SHORT_CLIPS, "the length of a clip has no weights"
        if can_be_long:
            clips = CLIP_FORMATS
            reason = (
                f"strides in time have no weights; {' and '.join(LONG_CLIPS)} have some in conv1 "
                "and pool1"
            )
        if other := found.configuration.other_clip:
            reason += f"; its configuration has {other}"
        questions.append(Question("clip", clips, reason))
    has_both = any(PRESETS[preset].backbone.without_pool2 for preset in presets)
    is_long = can_be_long and clip in LONG_CLIPS
    if chosen_pool2(found, choices) is None and has_both and not is_long:
        reason = "the pooling in time after res2 has no weights, and some networks do not have it"
        questions.append(Question("pool2", (True, False), reason))
    return questions


def chosen_clip(found: Architecture, choices: Choices) -> ClipFormat | None:
    """Returns the clip that was chosen or that the configuration states."""
    return choices.clip or found.configuration.clip


def chosen_pool2(found: Architecture, choices: Choices) -> bool | None:
    """Returns whether there is a pool2, as chosen or shown by the file."""
    return found.pool2 if choices.pool2 is None else choices.pool2


def has_long_clips(found: Architecture, choices: Choices) -> bool:
    """Whether networks of the file's source can have strides in time in conv1 and pool1."""
    is_model_zoo = found.source == "caffe2" and choices.preset == "slowfast"
    return found.source not in SHORT_CLIP_NAMES and not is_model_zoo


def possible_presets(found: Architecture, choices: Choices) -> tuple[Preset, ...]:
    """Returns the presets whose networks can have this file, the most likely one first."""
    if choices.preset is not None:
        return (choices.preset,)
    if found.source == "caffe2":
        return CAFFE2_PRESETS
    if not _has_names_of_several(found):
        return (PRESET_OF_NAMES[found.source],)
    presets = tuple(dict.fromkeys((*PREFERRED_PRESETS, *VIDEO_PRESETS)))
    instantiation = choices.instantiation or found.instantiation or "embedded_gaussian"
    fitting = tuple(
        preset
        for preset in presets
        if not bias_options(found, preset) and instantiation in PRESETS[preset].block.instantiations
    )
    return (fitting if found.nonlocal_blocks else presets) or ("paper",)


def bias_options(found: Architecture, preset: Preset) -> dict[str, Any]:
    """Returns the options of the blocks' biases in which the file differs from the preset."""
    conventions = PRESETS[preset].block
    options: dict[str, Any] = {}
    if found.embedding_bias != conventions.use_bias:
        options["use_bias"] = found.embedding_bias
    is_default = conventions.out_bias is None
    if found.out_bias != (not found.nonlocal_norm if is_default else conventions.out_bias):
        options["out_bias"] = found.out_bias
    return options


def _has_names_of_several(found: Architecture) -> bool:
    """Whether networks of several presets have the names of this file."""
    return found.source in (NATIVE, "torchvision", "caffe2")


def _has_open_scale(found: Architecture, choices: Choices) -> bool:
    """Whether the logits may or may not be scaled. The other sources always do the same."""
    instantiation = choices.instantiation or found.instantiation
    is_stated = (choices.use_scale, found.configuration.use_scale) != (None, None)
    can_scale = bool(found.nonlocal_blocks) and instantiation in (None, "embedded_gaussian")
    return found.source == "mmaction2" and can_scale and not is_stated


def _has_open_padding(found: Architecture, choices: Choices) -> bool:
    """Whether mmaction2 may have padded pool1 of a C2D where no network here does.

    A configuration that states the clip answers it: those of such networks are refused.
    """
    is_c2d = (found.source, found.kind, found.configuration.clip) == ("mmaction2", "c2d", None)
    can_be_short = chosen_clip(found, choices) not in LONG_CLIPS
    can_have_pool2 = chosen_pool2(found, choices) is not False
    return is_c2d and can_be_short and can_have_pool2


def _is_flat_c2d(found: Architecture) -> bool:
    table = naming_tables().get(found.source)
    return table is not None and table.flat_c2d
