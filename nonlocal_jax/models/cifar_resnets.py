"""The residual networks for 32×32 images, with non-local blocks at chosen places."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.layers.block import nonlocal_block
from nonlocal_jax.layers.convolution import VideoConv
from nonlocal_jax.layers.norm import BatchNorm
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.layers.residual import relu_of_sum
from nonlocal_jax.types import Array, Features, Image, Instantiation, Logits

STAGES = ("res1", "res2", "res3")


class BasicBlock(nn.Module):
    """ReLU(x + 3×3 ∘ 3×3); where the shape changes, x is every other pixel with zeros for the new channels.

    Attributes:
        features: channels of the result.
        stride: of the first convolution.
        dtype, param_dtype: of the convolutions and norms.
    """

    features: int
    stride: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Features, train: bool = False) -> Array:
        """X (B, 1, H, W, C) -> (B, 1, H / stride, W / stride, features)."""
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(BatchNorm, use_running_average=not train, **options)
        y = VideoConv(
            self.features, (1, 3, 3), (1, self.stride, self.stride), name="conv_a", **options
        )(x)
        y = VideoConv(self.features, (1, 3, 3), name="conv_b", **options)(
            nn.relu(norm(name="norm_a")(y))
        )
        x = x[:, :, :: self.stride, :: self.stride]
        x = jnp.pad(x, (*[(0, 0)] * 4, (0, self.features - x.shape[-1])))
        return relu_of_sum(x, norm(name="norm_b")(y))


class CifarResNet(nn.Module):
    """conv1 3×3, 16; three stages of 16, 32 and 64 channels at 32×32, 16×16 and 8×8; average; fc.

    Attributes:
        blocks: residual blocks of each stage.
        num_classes: of the logits.
        nonlocal_blocks: after which residual blocks of which stage ("res1", "res2", "res3"), counted from 0.
        instantiation, preset, block_options: of the non-local blocks.
        remat: whether residual blocks are computed again in the backward pass instead of kept.
        dtype: of the computation; None is that of the input and parameters.
        param_dtype: of the parameters.
    """

    blocks: int
    num_classes: int = 10
    nonlocal_blocks: Mapping[str, tuple[int, ...]] | None = None
    instantiation: Instantiation = "embedded_gaussian"
    preset: Preset = "paper"
    block_options: Mapping[str, Any] | None = None
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """An input, for who wants the shapes of the variables."""
        return jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    @nn.compact
    def __call__(self, image: Image, *, train: bool = False) -> Logits:
        """Image (B, H, W, channels) -> logits (B, num_classes)."""
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        of_block = {
            "norm": PRESETS[self.preset].block.norm,
            **options,
            **(self.block_options or {}),
        }
        x: Any = VideoConv(16, (1, 3, 3), name="conv1", **options)(image[:, None])
        x = nn.relu(BatchNorm(use_running_average=not train, name="conv1_norm", **options)(x))
        residual_block: Any = (
            nn.remat(BasicBlock, static_argnums=(2,)) if self.remat else BasicBlock
        )
        for stage, name in enumerate(STAGES):
            for i in range(self.blocks):
                stride = 2 if stage and i == 0 else 1
                x = residual_block(16 * 2**stage, stride, name=f"{name}_{i}", **options)(x, train)
                if i in (self.nonlocal_blocks or {}).get(name, ()):
                    block = nonlocal_block(
                        self.instantiation, self.preset, name=f"nonlocal_{name}_{i}", **of_block
                    )
                    x = block(x, train=train)
        x = x.astype(jnp.float32).mean(axis=(1, 2, 3))
        return nn.Dense(
            self.num_classes, name="head", dtype=jnp.float32, param_dtype=self.param_dtype
        )(x)


def cifar_resnet(
    depth: int = 20,
    nonlocal_blocks: Mapping[str, tuple[int, ...]] | None = None,
    num_classes: int = 10,
    *,
    instantiation: Instantiation = "embedded_gaussian",
    preset: Preset = "paper",
    block_options: Mapping[str, Any] | None = None,
    remat: bool = False,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> CifarResNet:
    """The residual networks for CIFAR, with non-local blocks at chosen places.

    Args:
        depth: layers, 6n + 2: 20, 32, 44, 56, 110.
        nonlocal_blocks: after which residual blocks of which stage, counted from 0: {"res2": (1,)}.
        num_classes: of the logits.
        instantiation: the pairwise function.
        preset: whose conventions the blocks follow.
        block_options: overrides of `nonlocal_block`.
        remat: whether residual blocks are computed again in the backward pass instead of kept.
        dtype: of the computation; None is that of the input and parameters.
        param_dtype: of the parameters.

    Returns:
        The network. `model.apply(variables, image (B, 32, 32, 3), train=False)` gives logits (B, num_classes).

    Raises:
        ValueError: a depth that is not 6n + 2, or a stage or residual block that there is not.

    Source: He, Zhang, Ren, Sun, Deep Residual Learning (CVPR 2016), section 4.2, shortcuts of option A.

    >>> import jax, jax.numpy as jnp
    >>> model = cifar_resnet(20, {"res2": (1,)}, num_classes=100)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 32, 32, 3)))[0].shape
    (2, 100)
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2, such as 20, 32 or 56; got {depth}.")
    blocks = (depth - 2) // 6
    for name, at in (nonlocal_blocks or {}).items():
        if name not in STAGES:
            raise ValueError(
                f"a stage of nonlocal_blocks must be one of {', '.join(map(repr, STAGES))}; got {name!r}."
            )
        if wrong := [i for i in at if not 0 <= i < blocks]:
            raise ValueError(
                f"{name} has residual blocks 0 to {blocks - 1}; got {wrong[0]} in nonlocal_blocks."
            )
    nonlocal_block(instantiation, preset, **(block_options or {}))  # raises what is wrong with them
    return CifarResNet(
        blocks,
        num_classes,
        nonlocal_blocks,
        instantiation,
        preset,
        block_options,
        remat,
        dtype,
        param_dtype,
    )
