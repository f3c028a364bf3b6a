"""The residual networks for 32×32 images, with non-local blocks at chosen places."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax import checks
from nonlocal_jax.layers.block import nonlocal_block
from nonlocal_jax.layers.convolution import VideoConv
from nonlocal_jax.layers.norm import BatchNorm
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.layers.residual import relu_of_sum
from nonlocal_jax.types import Array, Features, Image, Instantiation, Logits

STAGES = ("res1", "res2", "res3")


class BasicBlock(nn.Module):
    """A residual block of two 3×3 convolutions, with the parameter-free shortcut of option A.

    Where the shape changes, the shortcut takes every other pixel and adds channels of zeros.

    Attributes:
        features: Number of output channels.
        stride: Stride of the first convolution.
        dtype: Dtype of the computation. None infers it from the input and the parameters.
        param_dtype: Dtype of the parameters.
    """

    features: int
    stride: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Features, train: bool = False) -> Array:
        """Maps x (B, 1, H, W, C) to (B, 1, H / stride, W / stride, features)."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(BatchNorm, use_running_average=not train, **dtypes)
        strides = (1, self.stride, self.stride)
        y = VideoConv(self.features, (1, 3, 3), strides, name="conv_a", **dtypes)(x)
        y = nn.relu(norm(name="norm_a")(y))
        y = VideoConv(self.features, (1, 3, 3), name="conv_b", **dtypes)(y)
        y = norm(name="norm_b")(y)
        shortcut = x[:, :, :: self.stride, :: self.stride]
        new_channels = self.features - x.shape[-1]
        shortcut = jnp.pad(shortcut, (*[(0, 0)] * 4, (0, new_channels)))
        return relu_of_sum(shortcut, y)


class CifarResNet(nn.Module):
    """A 3×3 convolution, three stages of basic blocks, global average pooling and a classifier.

    The stages have 16, 32 and 64 channels, at 32×32, 16×16 and 8×8.

    Attributes:
        blocks: Number of residual blocks in each stage.
        num_classes: Number of classes.
        nonlocal_blocks: For each stage ("res1", "res2", "res3"), the indices of the residual
            blocks that a non-local block follows, counted from 0.
        instantiation: The pairwise function of the non-local blocks.
        preset: The source whose conventions the non-local blocks follow.
        block_options: Overrides for `nonlocal_block`.
        remat: Whether residual blocks are recomputed in the backward pass instead of kept.
        dtype: Dtype of the computation. None infers it from the input and the parameters.
        param_dtype: Dtype of the parameters.
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
        """Example input for shape inference."""
        return jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    @nn.compact
    def __call__(self, image: Image, *, train: bool = False) -> Logits:
        """Computes the logits (B, num_classes) of image (B, H, W, channels)."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        block_options = {
            "norm": PRESETS[self.preset].block.norm,
            **dtypes,
            **(self.block_options or {}),
        }
        nonlocal_blocks = self.nonlocal_blocks or {}
        x: Any = VideoConv(16, (1, 3, 3), name="conv1", **dtypes)(image[:, None])
        x = nn.relu(BatchNorm(use_running_average=not train, name="conv1_norm", **dtypes)(x))
        residual_block: Any = BasicBlock
        if self.remat:
            residual_block = nn.remat(BasicBlock, static_argnums=(2,))
        for stage, name in enumerate(STAGES):
            for i in range(self.blocks):
                stride = 2 if stage and i == 0 else 1
                x = residual_block(16 * 2**stage, stride, name=f"{name}_{i}", **dtypes)(x, train)
                if i in nonlocal_blocks.get(name, ()):
                    place = f"nonlocal_{name}_{i}"
                    block = nonlocal_block(
                        self.instantiation, self.preset, name=place, **block_options
                    )
                    x = block(x, train=train)
        # Means and logits in float32, because half precision loses digits in sums of many terms.
        x = x.astype(jnp.float32).mean(axis=(1, 2, 3))
        head = nn.Dense(
            self.num_classes, name="head", dtype=jnp.float32, param_dtype=self.param_dtype
        )
        return head(x)


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
    """Builds a residual network for CIFAR, with non-local blocks at chosen places.

    Args:
        depth: Number of layers, 6n + 2: 20, 32, 44, 56 or 110.
        nonlocal_blocks: For each stage ("res1", "res2", "res3"), the indices of the residual
            blocks that a non-local block follows, counted from 0, such as {"res2": (1,)}.
        num_classes: Number of classes.
        instantiation: The pairwise function of the non-local blocks.
        preset: The source whose conventions the non-local blocks follow.
        block_options: Overrides for `nonlocal_block`.
        remat: Whether residual blocks are recomputed in the backward pass instead of kept.
        dtype: Dtype of the computation. None infers it from the input and the parameters.
        param_dtype: Dtype of the parameters.

    Returns:
        The network. `model.apply(variables, image, train=False)` maps image (B, 32, 32, 3) to
        logits (B, num_classes).

    Raises:
        ValueError: If the depth is not 6n + 2, or a stage or residual block does not exist.

    Source: He, Zhang, Ren, Sun, Deep Residual Learning (CVPR 2016), section 4.2, with shortcuts of
    option A.

    >>> import jax, jax.numpy as jnp
    >>> model = cifar_resnet(20, {"res2": (1,)}, num_classes=100)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 32, 32, 3)))[0].shape
    (2, 100)
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2, such as 20, 32 or 56; got {depth}.")
    blocks = (depth - 2) // 6
    for stage, indices in (nonlocal_blocks or {}).items():
        checks.one_of("a stage of nonlocal_blocks", stage, STAGES)
        if missing := [i for i in indices if not 0 <= i < blocks]:
            raise ValueError(
                f"{stage} has residual blocks 0 to {blocks - 1}; "
                f"got {missing[0]} in nonlocal_blocks."
            )
    # Raises an error for bad options now, rather than when the network is first called.
    nonlocal_block(instantiation, preset, **(block_options or {}))
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
