"""C2D and I3D ResNets with non-local blocks: Table 1 of the paper, as each source builds it."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax import checks
from nonlocal_jax.layers import VideoConv, strided_max_pool
from nonlocal_jax.layers.block import nonlocal_block
from nonlocal_jax.layers.conventions import Layout
from nonlocal_jax.layers.initializers import normal
from nonlocal_jax.layers.norm import Affine, BatchNorm, apply_norm
from nonlocal_jax.layers.paired_columns import max_pool_of_paired
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.models import video_tables
from nonlocal_jax.models.bottleneck import Bottleneck, StrideAt
from nonlocal_jax.models.video_tables import STAGES, ClipFormat, Inflation, Places, StageTaps
from nonlocal_jax.types import Array, Instantiation, Logits, Video


class VideoResNet(nn.Module):
    """A ResNet over clips; `video_resnet` makes the published ones.

    | layer | kernel | output of 32×224×224 | output of 8×224×224 |
    |---|---|---|---|
    | conv1 | 1×7×7 or 5×7×7, 64 | 16×112×112 | 8×112×112 |
    | pool1 | `layout.pool1` | 8×56×56 | 8×56×56 |
    | res2 | bottlenecks, 256 | 8×56×56 | 8×56×56 |
    | pool2 | `layout.pool2`, if any | 4×56×56 | 4×56×56 |
    | res3 | bottlenecks, 512 | 4×28×28 | 4×28×28 |
    | res4 | bottlenecks, 1024 | 4×14×14 | 4×14×14 |
    | res5 | bottlenecks, 2048 | 4×7×7 | 4×7×7 |
    | head | average, dropout, fc | | |

    A non-local block follows its residual block and is named after it, such as `nonlocal_res3_1`.
    `mutable=["intermediates"]` returns the outputs of pool1, res2, pool2, res3, res4 and res5, and
    the affinity of every block.

    Attributes:
        blocks: Number of residual blocks of res2 to res5.
        taps: For each of those stages, the taps in time of each of its residual blocks (first,
            second convolution).
        conv1_frames: Taps in time of conv1.
        layout: Strides and poolings.
        nonlocal_blocks: By stage, the residual blocks that a non-local block follows, counted from
            0.
        make_block: Makes a non-local block, given the stage, `name`, `dtype` and `param_dtype`, and
            `axis_name` where positions are split.
        norm: Makes a norm.
        num_classes: Number of logits.
        zero_init_residual: Whether each residual branch starts at 0, by the scale of its last norm.
        dropout: Share of the averaged features that is dropped in training.
        head_window: (H, W) of the windows that the head averages over at test time. The windows
            slide by 1, and each gives one vector of logits. None, a map that is no larger, and
            training mean one average over all positions.
        window_average: How several windows are averaged. "softmax" averages their softmaxes and
            returns the logarithm, as in the paper's fully convolutional testing. "logits" averages
            the logits.
        stride_at: The convolution of a residual block that has the stride of its stage. Every
            network released with or after the paper has it on the 3×3, "conv_b"; the first ResNets
            have it on the 1×1, "conv_a".
        groups: Groups of ResNeXt; 1 is a ResNet.
        width_per_group: Width of a group of ResNeXt; 64 is a ResNet.
        remat: Whether residual blocks are recomputed in the backward pass instead of kept. A policy
            of `jax.checkpoint_policies` selects what is kept.
        dtype: Dtype of the computation, except norms' statistics and logits. None is that of the
            input and parameters.
        param_dtype: Dtype of the parameters.
        axis_name: Under `jax.shard_map`, the mapped axis over whose devices T is split, for clips
            that one device cannot hold. Parameters are initialised outside of the map. Windows take
            frames from the neighbouring devices, and BatchNorm's statistics are those of all
            devices.

    Source: Table 1.
    """

    blocks: tuple[int, int, int, int]
    taps: tuple[StageTaps, ...]
    conv1_frames: int
    layout: Layout
    nonlocal_blocks: Places
    make_block: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    num_classes: int = 400
    zero_init_residual: bool = False
    dropout: float = 0.5
    head_window: tuple[int, int] | None = (7, 7)
    window_average: Literal["softmax", "logits"] = "softmax"
    stride_at: StrideAt = "conv_b"
    groups: int = 1
    width_per_group: int = 64
    remat: bool | Callable[..., bool] = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def stride_in_time(self) -> int:
        """Frames of the clip for each frame of the features; devices must hold a multiple of it."""
        return self.layout.stride_in_time

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Example input for shape inference: at least 64 frames that make whole temporal groups."""
        blocks = [self.make_block(stage) for stage in self.nonlocal_blocks]
        operations = [getattr(block, "operation", None) for block in blocks]
        group_sizes = [getattr(operation, "group_size", None) or 1 for operation in operations]
        unit = math.lcm(*group_sizes) * self.stride_in_time
        frames = math.ceil(64 / unit) * unit
        return jax.ShapeDtypeStruct((1, frames, 64, 64, 3), jnp.float32)

    @nn.compact
    def __call__(self, clip: Video, *, train: bool = False) -> Logits:
        """Computes the logits of clips.

        Args:
            clip: (B, T, H, W, 3), normalised as the source of the weights does.
            train: Whether BatchNorm uses, and updates, the statistics of this batch ("batch_stats"
                must then be mutable) and features are dropped (which requires an rng "dropout",
                unless dropout is 0).

        Returns:
            (B, num_classes), float32.

        Raises:
            ValueError: If a clip has another rank or number of channels, or is too short or small
                for the strides.
        """
        axis_name = None if self.is_initializing() else self.axis_name
        self._check_clip(clip, axis_name)
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "axis_name": axis_name,
        }
        x: Any = self._sow_output("pool1", self._first_layer(clip, train, options))
        for stage in range(len(STAGES)):
            x = self._stage(stage, x, train, options)
            if stage == 0 and self.layout.pool2 is not None:
                x = self._sow_output("pool2", strided_max_pool(x, *self.layout.pool2, axis_name))
        return self._head(x, train, axis_name)

    def _first_layer(self, clip: Array, train: bool, options: dict[str, Any]) -> Array:
        kernel_size, strides = (self.conv1_frames, 7, 7), (self.layout.conv1_stride, 2, 2)
        paired = train and self._can_pair_columns(clip)
        x = VideoConv(64, kernel_size, strides, name="conv1", paired=paired, **options)(clip)
        norm_options = options | ({"paired": True} if paired else {})
        x = apply_norm(self.norm, x, train=train, name="conv1_norm", **norm_options)
        if paired:
            return max_pool_of_paired(nn.relu(x), *self.layout.pool1)
        return strided_max_pool(nn.relu(x), *self.layout.pool1, options["axis_name"])

    def _can_pair_columns(self, clip: Array) -> bool:
        """Whether conv1 can have paired columns. Only training is faster with them."""
        norm = self.norm.func if isinstance(self.norm, functools.partial) else self.norm
        is_even = clip.shape[3] % 4 == 0 and self.layout.pool1.strides[2] == 2
        return norm is BatchNorm and self.axis_name is None and is_even

    def _stage(self, stage: int, x: Array, train: bool, options: dict[str, Any]) -> Array:
        name, width = STAGES[stage], 2**stage
        axis_name = options["axis_name"]
        block_options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if axis_name is not None:
            block_options["axis_name"] = axis_name
        residual_block: Any = Bottleneck
        if self.remat:
            policy = self.remat if callable(self.remat) else None
            residual_block = nn.remat(Bottleneck, static_argnums=(2,), policy=policy)
        for i in range(self.blocks[stage]):
            x = residual_block(
                features=256 * width,
                inner_features=self.width_per_group * width * self.groups,
                taps=self.taps[stage][i],
                stride=2 if stage and i == 0 else 1,
                stride_at=self.stride_at,
                groups=self.groups,
                norm=self.norm,
                zero_init=self.zero_init_residual,
                name=f"{name}_{i}",
                **options,
            )(x, train)
            if i in self.nonlocal_blocks.get(name, ()):
                block = self.make_block(name, name=f"nonlocal_{name}_{i}", **block_options)
                x = block(x, train=train)
        return self._sow_output(name, x)

    def _head(self, x: Array, train: bool, axis_name: str | None) -> Array:
        window = None if train else self.head_window
        if window is not None and x.shape[2] <= window[0] and x.shape[3] <= window[1]:
            window = None
        x = x.astype(jnp.float32)
        x = x.mean(axis=(1, 2, 3) if window is None else 1)
        if axis_name is not None:
            x = jax.lax.pmean(x, axis_name)
        if window is not None:
            x = nn.avg_pool(x, tuple(map(min, window, x.shape[1:3])))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(
            self.num_classes,
            kernel_init=normal(0.01),
            param_dtype=self.param_dtype,
            dtype=jnp.float32,
            name="head",
        )(x)
        return x if window is None else self._average_windows(x)

    def _average_windows(self, logits: Array) -> Array:
        """Averages over the windows: (B, rows, columns, classes) -> (B, classes)."""
        if self.window_average == "logits":
            return logits.mean(axis=(1, 2))
        windows = logits.shape[1] * logits.shape[2]
        # log(mean(softmax)), without leaving the logarithm
        total = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=(1, 2))
        return total - jnp.log(jnp.asarray(windows, total.dtype))

    def _sow_output(self, name: str, x: Array) -> Array:
        self.sow("intermediates", name, x)
        return x

    def _check_clip(self, clip: Array, axis_name: str | None) -> None:
        if clip.ndim != 5 or clip.shape[-1] != 3:
            raise ValueError(
                "clip must have shape (B, T, H, W, 3), three colour channels last; "
                f"got {clip.shape}.{checks.channels_hint('clip', clip.shape, 3)}"
            )
        _, t, h, w, _ = clip.shape
        if axis_name is not None and t % self.stride_in_time:
            raise ValueError(
                f"each device of {axis_name!r} must hold a multiple of {self.stride_in_time} "
                f"frames, for the strides of this layout; got {t}."
            )
        smallest = video_tables.smallest_clip(self.layout)
        sizes = zip((t, h, w), smallest, strict=True)
        if any(isinstance(size, int) and size < minimum for size, minimum in sizes):
            frames, rows, columns = smallest
            raise ValueError(
                f"clip must have at least {frames} frames of {rows}×{columns} pixels for the "
                f"strides of this layout; got {t} of {h}×{w}."
            )


def video_resnet(
    depth: int | tuple[int, int, int, int] = 50,
    kind: Inflation = "i3d_3x1x1",
    nonlocal_blocks: int | Places = 5,
    clip: ClipFormat = "8x8",
    preset: Preset = "paper",
    num_classes: int = 400,
    *,
    pool2: bool = True,
    instantiation: Instantiation = "embedded_gaussian",
    group_size: int | Mapping[str, int] | None = None,
    block_options: Mapping[str, Any] | None = None,
    frozen_bn: bool = False,
    **options: Any,
) -> VideoResNet:
    """Makes one of the paper's video networks.

    Args:
        depth: 50, 101 or 152, or the number of residual blocks of res2 to res5.
        kind: "c2d" processes each frame alone. "i3d_3x1x1" inflates the first convolution of every
            second residual block to 3×1×1, "i3d_3x3x3" the second one to 3×3×3; both have a conv1
            of 5×7×7.
        nonlocal_blocks: 0, 1 (right before the last residual block of res4), 5 (every second one of
            res3 and res4 of R50; for R101 where the preset's source has them) or 10 (every one of
            res3 and res4 of R50). Alternatively, by stage, the residual blocks that they follow,
            counted from 0: {"res3": (1, 3), "res4": (1, 3, 5)}.
        clip: Frames × their stride, which choose the layout: "32x2" and "128x1" have stride 2 in
            time in conv1 and pool1, "8x8", "16x4" and "32x4" have none. The network accepts any
            length.
        preset: The source whose conventions the network has: the blocks' (`nonlocal_block`), the
            poolings' sizes and padding, ε of BatchNorm, whether residual branches start at 0.
        num_classes: Number of logits.
        pool2: Whether a pooling in time follows res2. The released networks without it, such as
            PySlowFast's C2D_NOPOOL, are of the presets "slowfast" and "mmcv", for short clips.
        instantiation: The pairwise function.
        group_size: Number of frames of a temporal group of a non-local block, for all or by stage;
            {"res3": 4} in the 32×4 and 128×1 networks of video-nonlocal-net.
        block_options: Overrides of `nonlocal_block`, such as `subsample` or `axes`.
        frozen_bn: Whether every BatchNorm is a fixed affine map (`freeze_batch_norm` makes its
            weights).
        **options: More attributes of `VideoResNet`: `dropout`, `zero_init_residual`, `groups`,
            `width_per_group`, `remat`, `stride_at`, `head_window`, `window_average`, `dtype`,
            `param_dtype`, `axis_name`.

    Returns:
        The network. `model.apply(variables, clip)` maps (B, T, H, W, 3) to logits (B, num_classes).

    Raises:
        ValueError: If the depth, kind, clip, preset or a stage is unknown, a non-local block
            follows a residual block that does not exist, or the preset's source has no networks
            without pool2.
        TypeError: If an option is unknown.

    Source: Table 1 and section 4; where the sources differ, the preset's.

    >>> import jax, jax.numpy as jnp
    >>> model = video_resnet((1, 1, 2, 1), "c2d", nonlocal_blocks=1, num_classes=7)
    >>> clip = jax.ShapeDtypeStruct((2, 8, 64, 64, 3), jnp.float32)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), clip)[0].shape
    (2, 7)
    """
    blocks = video_tables.residual_blocks(depth)
    taps = video_tables.stage_taps(kind, blocks)
    checks.one_of("preset", preset, PRESETS)
    conventions = PRESETS[preset]
    backbone = conventions.backbone
    layout = video_tables.layout_of(clip, backbone, kind, pool2)
    places = video_tables.block_places(nonlocal_blocks, blocks, backbone.five_blocks_spread)
    norm: Callable[..., nn.Module] = Affine if frozen_bn else conventions.block.norm
    overrides = {"norm": norm, **(block_options or {})}
    make_block = functools.partial(_make_block, instantiation, preset, overrides, group_size)
    make_block("res3")  # so that a bad option raises here, not when the network is initialised
    defaults: dict[str, Any] = {
        "zero_init_residual": backbone.zero_init_residual,
        "head_window": backbone.head_window,
    }
    return VideoResNet(
        blocks=blocks,
        taps=taps,
        conv1_frames=1 if kind == "c2d" else 5,
        layout=layout,
        nonlocal_blocks=flax.core.FrozenDict(places),  # modules must be hashable
        make_block=make_block,
        # The accurate variance would keep x − mean, one more large map. Outputs of convolutions
        # have means within a few deviations of 0, so the fast one loses no digits here.
        norm=norm if frozen_bn else functools.partial(norm, use_fast_variance=True),
        num_classes=num_classes,
        **defaults | options,
    )


def _make_block(
    instantiation: Instantiation,
    preset: Preset,
    overrides: dict[str, Any],
    group_size: int | Mapping[str, int] | None,
    stage: str,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    **options: Any,
) -> nn.Module:
    size = group_size.get(stage) if isinstance(group_size, Mapping) else group_size
    backbone = PRESETS[preset].backbone
    defaults: dict[str, Any] = {"group_size": size, "dtype": dtype, "param_dtype": param_dtype}
    if backbone.subsample is not None:
        defaults["subsample"] = backbone.subsample
    if backbone.use_scale is not None and instantiation == "embedded_gaussian":
        defaults["use_scale"] = backbone.use_scale
    return nonlocal_block(instantiation, preset, **defaults | overrides | options)
