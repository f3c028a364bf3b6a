"""The fields of a preset: what published sources do differently, without the sources themselves.

`nonlocal_jax.layers.presets` fills these fields in, once for each source.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn

from nonlocal_jax.layers.initializers import Initializer
from nonlocal_jax.layers.instantiations import he_normal, zero_bias
from nonlocal_jax.layers.norm import BatchNorm
from nonlocal_jax.types import Instantiation

# Frames × their stride in the video.
ClipFormat = Literal["8x8", "16x4", "32x4", "32x2", "128x1"]
Triple = tuple[int, int, int]
RGB = tuple[float, float, float]

INSTANTIATIONS: tuple[Instantiation, ...] = (
    "gaussian",
    "embedded_gaussian",
    "dot_product",
    "concatenation",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConventions:
    """How a source builds its non-local block. The defaults are the paper's.

    Attributes:
        epsilon: ε of every BatchNorm of the source, in its blocks and in its networks.
        instantiations: The pairwise functions that the source has.
        use_scale: Whether the logits of the embedded Gaussian are multiplied by
            inner_features^-0.5.
        subsample: Whether keys and values are max pooled.
        pool_order: Whether pooling comes "after" φ and g, or once "before" both.
        use_bias: Whether θ, φ and g have a bias.
        out_bias: Whether W_z has a bias. If None, a bias is used only when no norm follows.
        kernel_init: Initializer of W_θ, W_φ and W_g.
        bias_init: Maps the fan-in to the initializer of the biases.
        out_kernel_init: Initializer of W_z. Defaults to `kernel_init`.
        w_f_init: Initializer of w_f. Defaults to `kernel_init`.
        initialisation: The initialisation in words, for the table.
    """

    epsilon: float
    instantiations: tuple[Instantiation, ...] = INSTANTIATIONS
    use_scale: bool = False
    subsample: bool = True
    pool_order: Literal["after", "before"] = "after"
    use_bias: bool = False
    out_bias: bool | None = False
    kernel_init: Initializer = he_normal
    bias_init: Callable[[int], Initializer] = zero_bias
    out_kernel_init: Initializer | None = None
    w_f_init: Initializer | None = None
    initialisation: str = "He"

    # Cached because partials compare by identity: blocks with equal options must compare equal.
    @functools.cached_property
    def norm(self) -> Callable[..., nn.Module]:
        """The norm after W_z and in the network around the block."""
        return functools.partial(BatchNorm, epsilon=self.epsilon)


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
        pool2: The pooling after res2; None if there is none.
    """

    conv1_stride: int
    pool1: Pool
    pool2: Pool | None

    @property
    def stride_in_time(self) -> int:
        """Frames of the clip for each frame of the last stage."""
        return self.conv1_stride * math.prod(pool.strides[0] for pool in self.pools)

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The poolings that there are."""
        return (self.pool1,) if self.pool2 is None else (self.pool1, self.pool2)


@dataclasses.dataclass(frozen=True)
class BackboneConventions:
    """How a source builds the ResNet around its blocks.

    Attributes:
        short_clips: Layout for clips of 8×8, 16×4 and 32×4 (frames × stride).
        long_clips: Layout for clips of 32×2 and 128×1.
        c2d_short_clips: Layout of a C2D for short clips. Defaults to `short_clips`.
        without_pool2: Layout for short clips of the networks that the source builds without pool2.
            None if it builds none.
        zero_init_residual: Whether each residual branch starts at 0, by the scale of its last norm.
        head_window: (H, W) of the windows that the head averages over at test time. None averages
            over the whole map.
        five_blocks_spread: Whether 5 blocks in a ResNet-101 are spread over res4 (6, 13, 20), as in
            video-nonlocal-net, or placed where those of a ResNet-50 are (1, 3, 5), as in
            PySlowFast.
        subsample: Whether blocks inside the network pool their keys, where that differs from the
            block alone.
        use_scale: Whether blocks inside the network scale their logits, likewise.
    """

    short_clips: Layout
    long_clips: Layout
    c2d_short_clips: Layout | None = None
    without_pool2: Layout | None = None
    zero_init_residual: bool = False
    head_window: tuple[int, int] | None = (7, 7)
    five_blocks_spread: bool = True
    subsample: bool | None = None
    use_scale: bool | None = None


@dataclasses.dataclass(frozen=True)
class InputConventions:
    """What a source feeds its video networks.

    Attributes:
        mean: Mean of red, green and blue, for values from 0 to 255.
        std: Standard deviation, likewise.
        sampling: "consecutive" takes frames a fixed stride apart. "slowfast" spreads them over the
            clip, first and last included, as PySlowFast's decoder does.
        short_video: For a video shorter than a clip, "loop" starts again and "hold" repeats the
            last frame.
    """

    mean: RGB
    std: RGB
    sampling: Literal["consecutive", "slowfast"] = "consecutive"
    short_video: Literal["loop", "hold"] = "loop"


@dataclasses.dataclass(frozen=True)
class Conventions:
    """Everything that one source does in its own way.

    Attributes:
        title: Name of the source.
        block: Conventions of its non-local block.
        backbone: Conventions of its video ResNet.
        input: Conventions of its clips.
        names: Naming tables (`weights/sources.py`) whose files hold networks of this source.
    """

    title: str
    block: BlockConventions
    backbone: BackboneConventions
    input: InputConventions
    names: tuple[str, ...] = ()
