"""The paper's I3D in idiomatic Flax: 3-D convolutions, `nn.BatchNorm`, and all pairs."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import nonlocal_jax as nl
from nonlocal_jax.layers.conventions import ClipFormat, Pool, Triple
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.models.video_tables import layout_of

STAGES = (
    ("res2", 64, (3, 3, 3)),
    ("res3", 128, (3, 1, 3, 1)),
    ("res4", 256, (3, 1, 3, 1, 3, 1)),
    ("res5", 512, (1, 3, 1)),
)
BLOCKS = {("res3", 1), ("res3", 3), ("res4", 1), ("res4", 3), ("res4", 5)}


class PlainI3D(nn.Module):
    """I3D R50 with five non-local blocks.

    Its variables equal those of `models.video_resnet`.

    Attributes:
        clip: Format of the clips.
        preset: Source of the poolings and of the blocks' conventions.
        num_classes: Number of classes.
        dtype: Dtype of the computation.
    """

    clip: ClipFormat = "8x8"
    preset: Preset = "slowfast"
    num_classes: int = 400
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> jax.Array:
        """Computes logits of clips (B, T, H, W, 3)."""
        norm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5, dtype=self.dtype)
        trained_norm = functools.partial(norm, use_running_average=not train)
        conv = functools.partial(_conv, dtype=self.dtype)
        layout = layout_of(self.clip, PRESETS[self.preset].backbone)
        strides = (layout.conv1_stride, 2, 2)
        x = nn.relu(trained_norm(name="conv1_norm")(conv(64, (5, 7, 7), strides, "conv1")(x)))
        x = _max_pool(x, layout.pool1)
        for stage, width, taps in STAGES:
            for i, frames in enumerate(taps):
                stride = 2 if stage != "res2" and i == 0 else 1
                x = _PlainBlock(width, frames, stride, trained_norm, conv, name=f"{stage}_{i}")(x)
                if (stage, i) in BLOCKS:
                    block = nl.layers.nonlocal_block(
                        "embedded_gaussian",
                        self.preset,
                        implementation="dense",
                        norm=norm,
                        dtype=self.dtype,
                        name=f"nonlocal_{stage}_{i}",
                    )
                    x = block(x, train=train)
            if stage == "res2":
                assert layout.pool2 is not None
                x = _max_pool(x, layout.pool2)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2, 3), jnp.float32))


class _PlainBlock(nn.Module):
    width: int
    frames: int
    stride: int
    norm: Any
    conv: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        strides = (1, self.stride, self.stride)
        y = self.conv(self.width, (self.frames, 1, 1), (1, 1, 1), "conv_a")(x)
        y = self.conv(self.width, (1, 3, 3), strides, "conv_b")(
            nn.relu(self.norm(name="norm_a")(y))
        )
        y = nn.relu(self.norm(name="norm_b")(y))
        y = self.norm(name="norm_c")(self.conv(4 * self.width, (1, 1, 1), (1, 1, 1), "conv_c")(y))
        if x.shape[-1] != y.shape[-1]:
            x = self.conv(4 * self.width, (1, 1, 1), strides, "shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


def _conv(features: int, taps: Triple, strides: Triple, name: str, dtype: Any) -> nn.Conv:
    padding = [(size // 2, size // 2) for size in taps]
    return nn.Conv(features, taps, strides, padding, use_bias=False, dtype=dtype, name=name)


def _max_pool(x: Any, pool: Pool) -> Any:
    padding = [(size, size) for size in pool.padding]
    return nn.max_pool(x, pool.window, pool.strides, padding)


class PlainResNet20(nn.Module):
    """CIFAR's ResNet-20 without non-local blocks.

    Attributes:
        num_classes: Number of classes.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> jax.Array:
        """Computes logits of images (B, H, W, 3)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(_conv3x3(16)(x)))
        for features in (16, 32, 64):
            for _ in range(3):
                stride = features // x.shape[-1]
                y = nn.relu(norm()(_conv3x3(features, stride)(x)))
                y = norm()(_conv3x3(features)(y))
                shortcut = x[:, ::stride, ::stride]
                padding = [(0, 0)] * 3 + [(0, features - x.shape[-1])]
                x = nn.relu(y + jnp.pad(shortcut, padding))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def _conv3x3(features: int, stride: int = 1) -> nn.Conv:
    return nn.Conv(features, (3, 3), stride, padding=1, use_bias=False)
