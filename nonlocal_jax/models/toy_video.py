"""A small C2D or I3D for toy videos, with a place for one block."""

import functools
from typing import Any, Literal, get_args

import flax.linen as nn
import jax

from nonlocal_jax.layers import BatchNorm
from nonlocal_jax.layers.convolution import VideoConv
from nonlocal_jax.layers.residual import relu_of_sum
from nonlocal_jax.types import Features, Logits, Video

Kind = Literal["c2d", "i3d"]


class Bottleneck(nn.Module):
    """x + 1×1×1 ∘ 1×3×3 ∘ t×1×1, each with BatchNorm; ReLU after the sum.

    Attributes:
        inner_features: channels inside.
        frames: t, the taps in time of the first convolution.
    """

    inner_features: int
    frames: int = 1

    @nn.compact
    def __call__(self, x: Features, *, train: bool = False) -> Features:
        """X (B, T, H, W, C), of the same shape as the result."""
        norm = functools.partial(BatchNorm, use_running_average=not train)
        y = nn.relu(
            norm(name="norm1")(VideoConv(self.inner_features, (self.frames, 1, 1), name="conv1")(x))
        )
        y = nn.relu(norm(name="norm2")(VideoConv(self.inner_features, (1, 3, 3), name="conv2")(y)))
        y = norm(name="norm3", scale_init=nn.initializers.zeros)(
            VideoConv(x.shape[-1], name="conv3")(y)
        )
        return relu_of_sum(x, y)


class LocalBlock(nn.Module):
    """The control: an ordinary residual block in the place of a non-local one, 1×1×1 ∘ 3×3×3 ∘ 1×1×1.

    It too is the identity at first and has no ReLU after the sum. With 24 inner features of 64 it has more parameters and
    does more arithmetic, on clips of 8×16×16, than the non-local block that it stands for.

    Attributes:
        inner_features: channels inside.
    """

    inner_features: int = 24

    @nn.compact
    def __call__(self, x: Features, *, train: bool = False) -> Features:
        """X (B, T, H, W, C), of the same shape as the result."""
        norm = functools.partial(BatchNorm, use_running_average=not train)
        y = nn.relu(norm(name="norm1")(VideoConv(self.inner_features, name="conv1")(x)))
        y = nn.relu(norm(name="norm2")(VideoConv(self.inner_features, (3, 3, 3), name="conv2")(y)))
        return x + norm(name="norm3", scale_init=nn.initializers.zeros)(
            VideoConv(x.shape[-1], name="conv3")(y)
        )


class ToyVideoNet(nn.Module):
    """Stem, three bottlenecks, global average pooling, a linear classifier; a block right before the last bottleneck.

    | layer        | kernel       | stride  | channels   |
    |--------------|--------------|---------|------------|
    | stem1        | 1×3×3        | 1, 1, 1 | 16         |
    | stem2        | 1×3×3        | 1, 2, 2 | 32         |
    | stem3        | 1×3×3        | 1, 2, 2 | 64         |
    | res1, res2   | bottleneck   | 1, 1, 1 | 64, 32, 64 |
    | block        | any          |         | 64         |
    | res3         | bottleneck   | 1, 1, 1 | 64, 32, 64 |
    | head         | average, fc  |         | classes    |

    Attributes:
        num_classes: of the logits.
        block: a module of x and `train` that keeps the shape, such as `nonlocal_block(...)` or `LocalBlock()`; None
            for no block.
        kind: "c2d" looks at each frame alone; "i3d" has three taps in time in res1 and res3, one of every two
            residual blocks, as in the paper.
        freeze_stem: whether the stem is left as it is, its BatchNorms included.

    >>> import jax, jax.numpy as jnp
    >>> from nonlocal_jax.layers import nonlocal_block
    >>> net = ToyVideoNet(num_classes=2, block=nonlocal_block("embedded_gaussian"))
    >>> clips = jnp.ones((3, 8, 16, 16, 1))
    >>> net.init_with_output(jax.random.key(0), clips)[0].shape
    (3, 2)
    """

    num_classes: int
    block: nn.Module | None = None
    kind: Kind = "c2d"
    freeze_stem: bool = False

    @nn.compact
    def __call__(self, clip: Video, *, train: bool = False) -> Logits:
        """Clip (B, T, H, W, channels) -> logits (B, num_classes)."""
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind must be one of {', '.join(map(repr, get_args(Kind)))}; got {self.kind!r}."
            )
        x: Any = clip
        stem_norm = functools.partial(BatchNorm, use_running_average=self.freeze_stem or not train)
        for i, (features, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
            x = VideoConv(features, (1, 3, 3), (1, stride, stride), name=f"stem{i}")(x)
            x = nn.relu(stem_norm(name=f"stem{i}_norm")(x))
        if self.freeze_stem:
            x = jax.lax.stop_gradient(x)
        frames = 3 if self.kind == "i3d" else 1
        x = Bottleneck(32, frames, name="res1")(x, train=train)
        x = Bottleneck(32, name="res2")(x, train=train)
        if self.block is not None:
            x = self.block(x, train=train)
        x = Bottleneck(32, frames, name="res3")(x, train=train)
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2, 3)))
