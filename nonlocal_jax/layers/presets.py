"""What each published source does differently, as one table of data: `PRESETS`.

A preset has the conventions of one source for the non-local block, for the video ResNet around it, for the colours and
frames of its input, and for its files of weights. A new source is one entry here. Everything that depends on a source
reads it from this table, and `presets_table` prints it for the documentation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.layers.instantiations import Initializer, he_normal, zero_bias
from nonlocal_jax.layers.norm import BatchNorm
from nonlocal_jax.types import Instantiation

Preset = Literal["paper", "caffe2", "slowfast", "non_local_pytorch", "mmcv"]
Triple = tuple[int, int, int]
RGB = tuple[float, float, float]

ALL_INSTANTIATIONS: tuple[Instantiation, ...] = (
    "gaussian",
    "embedded_gaussian",
    "dot_product",
    "concatenation",
)


@dataclasses.dataclass(frozen=True)
class BlockConventions:
    """How a source builds its non-local block. The defaults are the paper's.

    Attributes:
        instantiations: The pairwise functions that the source has.
        use_scale: Whether the logits of the embedded Gaussian are multiplied by inner_features^-0.5.
        subsample: Whether keys and values are max pooled.
        pool_order: Whether pooling comes "after" φ and g, or once "before" both.
        use_bias: Whether θ, φ and g have a bias.
        out_bias: Whether W_z has a bias. None means exactly when no norm follows it.
        kernel_init: Initializer of W_θ, W_φ and W_g.
        bias_init: From the fan-in to the initializer of the biases.
        norm: Makes the norm after W_z.
        out_kernel_init: Initializer of W_z. None is `kernel_init`.
        w_f_init: Initializer of w_f. None is `kernel_init`.
        initialization: The initialization in words, for the table.
    """

    instantiations: tuple[Instantiation, ...] = ALL_INSTANTIATIONS
    use_scale: bool = False
    subsample: bool = True
    pool_order: Literal["after", "before"] = "after"
    use_bias: bool = False
    out_bias: bool | None = False
    kernel_init: Initializer = he_normal
    bias_init: Callable[[int], Initializer] = zero_bias
    norm: Callable[..., nn.Module] = BatchNorm
    out_kernel_init: Initializer | None = None
    w_f_init: Initializer | None = None
    initialization: str = "He"


class Pool(NamedTuple):
    """A max pooling: its window, strides and padding along (T, H, W)."""

    window: Triple
    strides: Triple
    padding: Triple = (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Strides and poolings between the stages of a video ResNet.

    Attributes:
        conv1_stride: Stride of conv1 in time. It is 2 in space.
        pool1: The pooling after conv1.
        pool2: The pooling after res2.
    """

    conv1_stride: int
    pool1: Pool
    pool2: Pool


@dataclasses.dataclass(frozen=True)
class BackboneConventions:
    """How a source builds the ResNet around its blocks.

    Attributes:
        short_clips: Layout for clips of 8×8 and 32×4 (frames × stride).
        long_clips: Layout for clips of 32×2 and 128×1.
        zero_init_residual: Whether each residual branch starts at 0, by the scale of its last norm.
        head_window: (H, W) of the windows that the head averages over at test time; None averages over the whole map.
        five_blocks_spread: Whether 5 blocks in a ResNet-101 are spread over res4 (6, 13, 20) as video-nonlocal-net has
            them, or stand where those of a ResNet-50 do (1, 3, 5), as in PySlowFast.
        subsample: Whether blocks inside the network pool their keys, where that differs from the block alone.
        use_scale: Whether blocks inside the network scale their logits, likewise.
    """

    short_clips: Layout
    long_clips: Layout
    zero_init_residual: bool = False
    head_window: tuple[int, int] | None = (7, 7)
    five_blocks_spread: bool = True
    subsample: bool | None = None
    use_scale: bool | None = None


@dataclasses.dataclass(frozen=True)
class InputConventions:
    """What a source feeds its video networks.

    Attributes:
        mean: Mean of red, green and blue, of values from 0 to 255.
        std: Standard deviation, likewise.
        sampling: "consecutive" takes frames a fixed stride apart; "slowfast" spreads them over the clip, first and last
            included, as PySlowFast's decoder does.
        short_video: For a video shorter than a clip, "loop" starts again and "hold" repeats its last frame.
    """

    mean: RGB
    std: RGB
    sampling: Literal["consecutive", "slowfast"] = "consecutive"
    short_video: Literal["loop", "hold"] = "loop"


@dataclasses.dataclass(frozen=True)
class Conventions:
    """Everything that one source does in its own way.

    Attributes:
        title: What the source is called.
        block: Of its non-local block.
        backbone: Of its video ResNet.
        input: Of its clips.
        names: The naming tables (`weights/sources.py`) whose files are of this source's networks.
        clip: Frames × stride of its published weights, where a file does not tell.
    """

    title: str
    block: BlockConventions
    backbone: BackboneConventions
    input: InputConventions
    names: tuple[str, ...] = ()
    clip: Literal["8x8", "32x4", "32x2", "128x1"] = "8x8"


def _uniform_bias(fan_in: int) -> Initializer:
    """PyTorch's default for a bias, U(−1/√fan_in, 1/√fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


_normal_001 = nn.initializers.normal(0.01)
_he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_pytorch_default = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Table 1 pads every pooling by half a window. Of the released networks, those of PySlowFast and
# mmaction2 pad pool1 in space, and those of video-nonlocal-net pad none.
_POOL1_SHORT = Pool((1, 3, 3), (1, 2, 2), (0, 1, 1))
_POOL1_LONG = Pool((2, 3, 3), (2, 2, 2), (0, 1, 1))
_POOL2 = Pool((2, 1, 1), (2, 1, 1))
_POOL2_TABLE_1 = Pool((3, 1, 1), (2, 1, 1), (1, 0, 0))
_SHORT_CLIPS = Layout(1, _POOL1_SHORT, _POOL2)
_LONG_CLIPS = Layout(2, _POOL1_LONG, _POOL2)

_GREY = InputConventions(mean=(114.75,) * 3, std=(57.375,) * 3)
_IMAGENET = InputConventions(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))

PRESETS: dict[Preset, Conventions] = {
    "paper": Conventions(
        title="the paper",
        block=BlockConventions(),
        backbone=BackboneConventions(
            short_clips=Layout(1, _POOL1_SHORT, _POOL2_TABLE_1),
            long_clips=Layout(2, Pool((3, 3, 3), (2, 2, 2), (1, 1, 1)), _POOL2_TABLE_1),
        ),
        input=_GREY,
    ),
    "caffe2": Conventions(
        title="video-nonlocal-net",
        block=BlockConventions(
            instantiations=("embedded_gaussian", "dot_product"),
            use_scale=True,
            pool_order="before",
            use_bias=True,
            out_bias=True,
            kernel_init=_normal_001,
            # As in its configuration. In float32 this differs from 1e-5 by one unit in the last place.
            norm=functools.partial(BatchNorm, epsilon=1.0000001e-5),
            initialization="N(0, 0.01)",
        ),
        backbone=BackboneConventions(
            short_clips=Layout(1, Pool((1, 3, 3), (1, 2, 2)), _POOL2),
            long_clips=Layout(2, Pool((2, 3, 3), (2, 2, 2)), _POOL2),
            zero_init_residual=True,
        ),
        input=_GREY,
        names=("caffe2",),
    ),
    "slowfast": Conventions(
        title="PySlowFast",
        block=BlockConventions(
            instantiations=("embedded_gaussian", "dot_product"),
            use_scale=True,
            pool_order="before",
            use_bias=True,
            out_bias=True,
            kernel_init=_he_normal_fan_out,
            initialization="He, by fan-out",
        ),
        backbone=BackboneConventions(
            short_clips=_SHORT_CLIPS,
            long_clips=_LONG_CLIPS,
            zero_init_residual=True,
            five_blocks_spread=False,
        ),
        input=dataclasses.replace(_GREY, sampling="slowfast", short_video="hold"),
        names=("slowfast", "pytorchvideo", "torchvision"),  # torchvision pads its poolings as well
    ),
    "non_local_pytorch": Conventions(
        title="Non-local_pytorch",
        block=BlockConventions(
            use_bias=True,
            out_bias=True,
            kernel_init=_pytorch_default,
            bias_init=_uniform_bias,
            initialization="PyTorch's default",
        ),
        backbone=BackboneConventions(short_clips=_SHORT_CLIPS, long_clips=_LONG_CLIPS),
        input=_GREY,
    ),
    "mmcv": Conventions(
        title="mmcv",
        block=BlockConventions(
            use_scale=True,
            subsample=False,
            use_bias=True,
            out_bias=None,
            kernel_init=_normal_001,
            out_kernel_init=_he_normal_fan_out,
            w_f_init=_he_normal_fan_out,
            initialization="N(0, 0.01); W_z and w_f He, by fan-out",
        ),
        backbone=BackboneConventions(
            short_clips=_SHORT_CLIPS,
            long_clips=Layout(2, Pool((1, 3, 3), (2, 2, 2), (0, 1, 1)), _POOL2),
            head_window=None,
            # mmaction2 builds mmcv's blocks with these options.
            subsample=True,
            use_scale=False,
        ),
        input=_IMAGENET,
        names=("mmaction2",),
        clip="32x2",
    ),
}
