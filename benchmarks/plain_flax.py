"""The paper's I3D in idiomatic Flax: 3-D convolutions, `nn.BatchNorm`, and all pairs."""

import functools
from typing import Any

import flax.linen as nn
import jax

import nonlocal_jax as nl

STAGES = (
    ("res2", 64, (3, 3, 3)),
    ("res3", 128, (3, 1, 3, 1)),
    ("res4", 256, (3, 1, 3, 1, 3, 1)),
    ("res5", 512, (1, 3, 1)),
)
BLOCKS = {("res3", 1), ("res3", 3), ("res4", 1), ("res4", 3), ("res4", 5)}


class PlainI3D(nn.Module):
    """I3D R50 8×8 with five non-local blocks.

    Its variables equal those of `models.video_resnet`.
    """

    num_classes: int = 400

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> jax.Array:
        """Computes logits of clips (B, T, H, W, 3)."""
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        x = nn.relu(norm(name="conv1_norm")(_conv(64, (5, 7, 7), 2, "conv1")(x)))
        x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1)))
        for stage, width, taps in STAGES:
            for i, frames in enumerate(taps):
                x = _PlainBlock(
                    width, frames, 2 if stage != "res2" and i == 0 else 1, norm, name=f"{stage}_{i}"
                )(x)
                if (stage, i) in BLOCKS:
                    block = nl.layers.nonlocal_block(
                        "embedded_gaussian",
                        "slowfast",
                        implementation="dense",
                        norm=functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5),
                        name=f"nonlocal_{stage}_{i}",
                    )
                    x = block(x, train=train)
            if stage == "res2":
                x = nn.max_pool(x, (2, 1, 1), (2, 1, 1))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2, 3)))


class _PlainBlock(nn.Module):
    width: int
    frames: int
    stride: int
    norm: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.relu(
            self.norm(name="norm_a")(_conv(self.width, (self.frames, 1, 1), 1, "conv_a")(x))
        )
        y = nn.relu(
            self.norm(name="norm_b")(_conv(self.width, (1, 3, 3), self.stride, "conv_b")(y))
        )
        y = self.norm(name="norm_c")(_conv(4 * self.width, (1, 1, 1), 1, "conv_c")(y))
        if x.shape[-1] != y.shape[-1]:
            x = self.norm(name="shortcut_norm")(
                _conv(4 * self.width, (1, 1, 1), self.stride, "shortcut")(x)
            )
        return nn.relu(x + y)


def _conv(features: int, taps: tuple[int, int, int], stride: int, name: str) -> nn.Conv:
    padding = [(size // 2, size // 2) for size in taps]
    return nn.Conv(features, taps, (1, stride, stride), padding, use_bias=False, name=name)
