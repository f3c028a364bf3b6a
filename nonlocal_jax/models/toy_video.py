"""A small C2D or I3D network for toy videos, with a place for one block."""

import functools
from typing import Any, Literal, get_args

import flax.linen as nn
import jax

from nonlocal_jax import checks
from nonlocal_jax.layers import BatchNorm
from nonlocal_jax.layers.convolution import VideoConv
from nonlocal_jax.layers.residual import relu_of_sum
from nonlocal_jax.types import Features, Logits, Video

TrunkKind = Literal["c2d", "i3d"]


class ToyBottleneck(nn.Module):
    """A residual block t×1×1, 1×3×3, 1×1×1, each with BatchNorm, with a ReLU after the sum.

    Attributes:
        inner_features: Number of channels inside.
        frames: Number of taps in time of the first convolution, t.
    """

    inner_features: int
    frames: int = 1

    @nn.compact
    def __call__(self, x: Features, *, train: bool = False) -> Features:
        """Maps x (B, T, H, W, C) to the same shape."""
        norm = functools.partial(BatchNorm, use_running_average=not train)
        y = VideoConv(self.inner_features, (self.frames, 1, 1), name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = VideoConv(self.inner_features, (1, 3, 3), name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y))
        y = VideoConv(x.shape[-1], name="conv3")(y)
        # With a scale of 0 the block starts as the identity.
        y = norm(name="norm3", scale_init=nn.initializers.zeros)(y)
        return relu_of_sum(x, y)


class LocalBlock(nn.Module):
    """The control: an ordinary residual block 1×1×1, 3×3×3, 1×1×1 in place of a non-local one.

    Like a non-local block it starts as the identity and has no ReLU after the sum. With 24 inner
    features of 64 channels it has more parameters than the non-local block that it replaces, and
    needs more multiply-adds on clips of 8×16×16.

    Attributes:
        inner_features: Number of channels inside.
    """

    inner_features: int = 24

    @nn.compact
    def __call__(self, x: Features, *, train: bool = False) -> Features:
        """Maps x (B, T, H, W, C) to the same shape."""
        norm = functools.partial(BatchNorm, use_running_average=not train)
        y = VideoConv(self.inner_features, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = VideoConv(self.inner_features, (3, 3, 3), name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y))
        y = VideoConv(x.shape[-1], name="conv3")(y)
        return x + norm(name="norm3", scale_init=nn.initializers.zeros)(y)


class ToyVideoNet(nn.Module):
    """A stem, three bottlenecks, global average pooling and a linear classifier.

    A block may be added right before the last bottleneck.

    | layer        | kernel                   | stride  | channels   |
    |--------------|--------------------------|---------|------------|
    | stem1        | 1×3×3                    | 1, 1, 1 | 16         |
    | stem2        | 1×3×3                    | 1, 2, 2 | 32         |
    | stem3        | 1×3×3                    | 1, 2, 2 | 64         |
    | res1, res2   | bottleneck               | 1, 1, 1 | 64, 32, 64 |
    | block        | any                      |         | 64         |
    | res3         | bottleneck               | 1, 1, 1 | 64, 32, 64 |
    | head         | average, fully connected |         | classes    |

    Attributes:
        num_classes: Number of classes.
        block: A module of x and `train` that keeps the shape, such as `nonlocal_block(...)` or
            `LocalBlock()`. None adds no block.
        kind: "c2d" has no taps in time, so that frames meet only in the block and in the average.
            "i3d" has three taps in time in res1 and res3, one of every two residual blocks as in
            the paper.
        freeze_stem: Whether the stem is not trained, including the statistics of its BatchNorms.

    >>> import jax, jax.numpy as jnp
    >>> from nonlocal_jax.layers import nonlocal_block
    >>> net = ToyVideoNet(num_classes=2, block=nonlocal_block("embedded_gaussian"))
    >>> clips = jnp.ones((3, 8, 16, 16, 1))
    >>> jax.eval_shape(net.init_with_output, jax.random.key(0), clips)[0].shape
    (3, 2)
    """

    num_classes: int
    block: nn.Module | None = None
    kind: TrunkKind = "c2d"
    freeze_stem: bool = False

    @nn.compact
    def __call__(self, clip: Video, *, train: bool = False) -> Logits:
        """Computes the logits (B, num_classes) of clip (B, T, H, W, channels)."""
        checks.one_of("kind", self.kind, get_args(TrunkKind))
        x: Any = clip
        stem_norm = functools.partial(BatchNorm, use_running_average=self.freeze_stem or not train)
        for i, (features, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
            x = VideoConv(features, (1, 3, 3), (1, stride, stride), name=f"stem{i}")(x)
            x = nn.relu(stem_norm(name=f"stem{i}_norm")(x))
        if self.freeze_stem:
            x = jax.lax.stop_gradient(x)
        frames = 3 if self.kind == "i3d" else 1
        x = ToyBottleneck(32, frames, name="res1")(x, train=train)
        x = ToyBottleneck(32, name="res2")(x, train=train)
        if self.block is not None:
            x = self.block(x, train=train)
        x = ToyBottleneck(32, frames, name="res3")(x, train=train)
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2, 3)))
