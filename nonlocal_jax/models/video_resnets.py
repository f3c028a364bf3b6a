"""C2D and I3D ResNets with non-local blocks: the paper's Table 1, in the layouts and conventions of each published source."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.layers.block import nonlocal_block
from nonlocal_jax.layers.convolution import VideoConv
from nonlocal_jax.layers.norm import Affine, across_devices
from nonlocal_jax.layers.pooling import strided_max_pool
from nonlocal_jax.layers.presets import PRESETS, Layout, Preset
from nonlocal_jax.layers.residual import relu_of_sum
from nonlocal_jax.types import Array, Features, Instantiation, Logits, Video

Kind = Literal["c2d", "i3d_3x1x1", "i3d_3x3x3"]
Clip = Literal["8x8", "32x4", "32x2", "128x1"]
Triple = tuple[int, int, int]

STAGES = ("res2", "res3", "res4", "res5")
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Bottleneck(nn.Module):
    """ReLU(x + 1×1×1 ∘ k×3×3 ∘ t×1×1), each with a norm, ReLU between; where the shape changes, x goes through 1×1×1 too.

    Attributes:
        features: channels of the result.
        inner_features: channels inside.
        taps: (t, k), the taps in time of the first and of the second convolution.
        stride: in space, of one convolution and of the shortcut.
        stride_at: which convolution has it.
        groups: of the second convolution.
        norm: makes a norm.
        zero_init: whether the scale of the last norm starts at 0.
        dtype, param_dtype: of the convolutions and norms.
        axis_name: the mapped axis over whose devices T is split.
    """

    features: int
    inner_features: int
    taps: tuple[int, int]
    stride: int
    stride_at: Literal["conv_a", "conv_b"]
    groups: int
    norm: Callable[..., nn.Module]
    zero_init: bool
    dtype: Any
    param_dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Features, train: bool = False) -> Array:
        """X (B, T, H, W, C) -> (B, T, H / stride, W / stride, features)."""
        conv = functools.partial(
            VideoConv, dtype=self.dtype, param_dtype=self.param_dtype, axis_name=self.axis_name
        )
        norm = functools.partial(
            _norm,
            self.norm,
            train=train,
            axis_name=self.axis_name,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        strides, none = (1, self.stride, self.stride), (1, 1, 1)
        of_a, of_b = (strides, none) if self.stride_at == "conv_a" else (none, strides)
        (t, k), inner = self.taps, self.inner_features
        y = nn.relu(norm("norm_a")(conv(inner, (t, 1, 1), of_a, name="conv_a")(x)))
        y = nn.relu(norm("norm_b")(conv(inner, (k, 3, 3), of_b, self.groups, name="conv_b")(y)))
        last: dict[str, Any] = {"scale_init": nn.initializers.zeros} if self.zero_init else {}
        y = norm("norm_c", **last)(conv(self.features, name="conv_c")(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = norm("shortcut_norm")(conv(self.features, strides=strides, name="shortcut")(x))
        return relu_of_sum(x, y)


def _norm(
    make: Callable[..., nn.Module], name: str, *, train: bool, axis_name: str | None, **options: Any
) -> Callable[[Array], Array]:
    module = make(name=name, **options, **across_devices(make, axis_name))
    if isinstance(module, nn.BatchNorm):
        return functools.partial(module, use_running_average=not train)
    return module


class VideoResNet(nn.Module):
    """A ResNet over clips; `video_resnet` makes the published ones.

    | layer | kernel | output of 32×224×224 | output of 8×224×224 |
    |---|---|---|---|
    | conv1 | 1×7×7 or 5×7×7, 64 | 16×112×112 | 8×112×112 |
    | pool1 | `layout.pool1` | 8×56×56 | 8×56×56 |
    | res2 | bottlenecks, 256 | 8×56×56 | 8×56×56 |
    | pool2 | `layout.pool2` | 4×56×56 | 4×56×56 |
    | res3 | bottlenecks, 512 | 4×28×28 | 4×28×28 |
    | res4 | bottlenecks, 1024 | 4×14×14 | 4×14×14 |
    | res5 | bottlenecks, 2048 | 4×7×7 | 4×7×7 |
    | head | average, dropout, fc | | |

    A non-local block comes after its residual block, as `nonlocal_res3_1`. `mutable=["intermediates"]` gives what each of
    pool1, res2, pool2, res3, res4 and res5 put out, beside the affinity of every block.

    Attributes:
        blocks: residual blocks of res2 to res5.
        taps: for each of those stages, the taps in time of each of its residual blocks, (first, second convolution).
        conv1_frames: taps in time of conv1.
        layout: strides and poolings.
        nonlocal_blocks: after which residual blocks of which stage, counted from 0.
        make_block: makes a non-local block, given the stage and a name.
        norm: makes a norm.
        num_classes: of the logits.
        zero_init_residual: whether each residual branch starts at 0, by the scale of its last norm.
        dropout: share of the averaged features that is dropped in training.
        head_window: (H, W) of the windows that the head averages over at test time, one logit vector each, sliding by 1;
            None, or a map no larger than that, or training: one average over all positions.
        window_average: of several windows, "softmax" averages the softmaxes and gives their logarithm, as the paper's
            fully convolutional testing; "logits" averages the logits.
        stride_at: the convolution of a residual block that has the stride of its stage; every network released with or
            after the paper has it on the 3×3, "conv_b"; the first ResNets on the 1×1, "conv_a".
        groups, width_per_group: of ResNeXt; 1 and 64 are a ResNet.
        remat: whether residual blocks are computed again in the backward pass instead of kept; a policy of
            `jax.checkpoint_policies` says what is kept.
        dtype: of the computation, except norms' statistics and logits; None is that of the input and parameters.
        param_dtype: of the parameters.
        axis_name: under `jax.shard_map`, the mapped axis over whose devices T is split, for clips that one device cannot
            hold; parameters are made outside of it. Windows take frames from the neighbours, and BatchNorm's statistics are
            of all devices of this axis.

    Source: Table 1.
    """

    blocks: tuple[int, int, int, int]
    taps: tuple[tuple[tuple[int, int], ...], ...]
    conv1_frames: int
    layout: Layout
    nonlocal_blocks: Mapping[str, tuple[int, ...]]
    make_block: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    num_classes: int = 400
    zero_init_residual: bool = False
    dropout: float = 0.5
    head_window: tuple[int, int] | None = (7, 7)
    window_average: Literal["softmax", "logits"] = "softmax"
    stride_at: Literal["conv_a", "conv_b"] = "conv_b"
    groups: int = 1
    width_per_group: int = 64
    remat: bool | Callable[..., bool] = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """An input, for who wants the shapes of the variables: 64 frames, or as many more as make whole temporal groups."""
        operations = [
            getattr(self.make_block(stage), "operation", None) for stage in self.nonlocal_blocks
        ]
        groups = math.lcm(
            *(getattr(operation, "group_size", None) or 1 for operation in operations)
        )
        whole = groups * self._stride_in_time
        return jax.ShapeDtypeStruct((1, -(-64 // whole) * whole, 64, 64, 3), jnp.float32)

    @nn.compact
    def __call__(self, clip: Video, *, train: bool = False) -> Logits:
        """Logits of clips.

        Args:
            clip: (B, T, H, W, 3), normalised as the source of the weights does.
            train: whether BatchNorm uses, and updates, the statistics of this batch ("batch_stats" must then be mutable),
                and features are dropped (an rng "dropout" is then wanted, unless dropout is 0).

        Returns:
            (B, num_classes), float32.

        Raises:
            ValueError: a clip of another rank or channel count, or too short or small for the strides.
        """
        axis_name = None if self.is_initializing() else self.axis_name
        self._check(clip, axis_name)
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "axis_name": axis_name,
        }
        x: Any = VideoConv(
            64, (self.conv1_frames, 7, 7), (self.layout.conv1_stride, 2, 2), name="conv1", **options
        )(clip)
        x = nn.relu(_norm(self.norm, "conv1_norm", train=train, **options)(x))
        x = self._keep("pool1", strided_max_pool(x, *self.layout.pool1, axis_name))
        for stage in range(4):
            x = self._stage(stage, x, train, axis_name)
            if stage == 0:
                x = self._keep("pool2", strided_max_pool(x, *self.layout.pool2, axis_name))
        return self._head(x, train, axis_name)

    def _stage(self, stage: int, x: Array, train: bool, axis_name: str | None) -> Array:
        name, width = STAGES[stage], 2**stage
        of_block = {} if axis_name is None else {"axis_name": axis_name}
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
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                axis_name=axis_name,
                name=f"{name}_{i}",
            )(x, train)
            if i in self.nonlocal_blocks.get(name, ()):
                x = self.make_block(name, name=f"nonlocal_{name}_{i}", **of_block)(x, train=train)
        return self._keep(name, x)

    def _head(self, x: Array, train: bool, axis_name: str | None) -> Array:
        window = self.head_window
        slides = (
            not train
            and window is not None
            and any(n > size for n, size in zip(x.shape[2:4], window, strict=True))
        )
        x = x.astype(jnp.float32)
        x = x.mean(axis=1 if slides else (1, 2, 3))
        if axis_name is not None:
            x = jax.lax.pmean(x, axis_name)
        if slides and window is not None:
            x = nn.avg_pool(x, tuple(map(min, window, x.shape[1:3])))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.normal(0.01),
            param_dtype=self.param_dtype,
            dtype=jnp.float32,
            name="head",
        )(x)
        if not slides:
            return x
        if self.window_average == "logits":
            return x.mean(axis=(1, 2))
        windows = x.shape[1] * x.shape[2]
        return jax.nn.logsumexp(jax.nn.log_softmax(x), axis=(1, 2)) - math.log(windows)

    def _keep(self, name: str, x: Array) -> Array:
        self.sow("intermediates", name, x)
        return x

    @property
    def _stride_in_time(self) -> int:
        return (
            self.layout.conv1_stride * self.layout.pool1.strides[0] * self.layout.pool2.strides[0]
        )

    def _check(self, clip: Array, axis_name: str | None) -> None:
        if clip.ndim != 5 or clip.shape[-1] != 3:
            raise ValueError(
                f"clip must have shape (B, T, H, W, 3), three colour channels last; got {clip.shape}."
            )
        if axis_name is not None and clip.shape[1] % self._stride_in_time:
            raise ValueError(
                f"each device of {axis_name!r} must hold a multiple of {self._stride_in_time} frames, for the strides of this "
                f"layout; got {clip.shape[1]}."
            )
        smallest = [next(n for n in range(1, 64) if self._survives(n, axis)) for axis in range(3)]
        if any(n < least for n, least in zip(clip.shape[1:4], smallest, strict=True)):
            t, h, w = smallest
            raise ValueError(
                f"clip must have at least {t} frames of {h}×{w} pixels for the strides of this layout; got "
                f"{clip.shape[1]} of {clip.shape[2]}×{clip.shape[3]}."
            )

    def _survives(self, n: int, axis: int) -> bool:
        """Whether n frames, or rows, leave at least one position after pool1 and pool2."""
        n = -(-n // (self.layout.conv1_stride if axis == 0 else 2))
        for pool in (self.layout.pool1, self.layout.pool2):
            n = (n + 2 * pool.padding[axis] - pool.window[axis]) // pool.strides[axis] + 1
            if n < 1:
                return False
        return True


def video_resnet(
    depth: int | tuple[int, int, int, int] = 50,
    kind: Kind = "i3d_3x1x1",
    nonlocal_blocks: int | Mapping[str, tuple[int, ...]] = 5,
    clip: Clip = "8x8",
    preset: Preset = "paper",
    num_classes: int = 400,
    *,
    instantiation: Instantiation = "embedded_gaussian",
    group_size: int | Mapping[str, int] | None = None,
    block_options: Mapping[str, Any] | None = None,
    frozen_bn: bool = False,
    **options: Any,
) -> VideoResNet:
    """The paper's video networks.

    Args:
        depth: 50, 101 or 152, or the residual blocks of res2 to res5.
        kind: "c2d" looks at each frame alone; "i3d_3x1x1" inflates the first convolution of one in two residual blocks
            to 3×1×1, "i3d_3x3x3" the second to 3×3×3; both have a conv1 of 5×7×7.
        nonlocal_blocks: 0, 1 (right before the last residual block of res4), 5 (every other one of res3 and res4 of R50;
            for R101 where the preset's source has them), 10 (every one of res3 and res4 of R50), or after which residual
            blocks of which stages, counted from 0: {"res3": (1, 3), "res4": (1, 3, 5)}.
        clip: frames × their stride, which choose the layout: "32x2" and "128x1" have stride 2 in time in conv1 and pool1,
            "8x8" and "32x4" have none. Any length runs.
        preset: whose conventions: the blocks' (`nonlocal_block`), the poolings' sizes and padding, ε of BN, and whether
            residual branches start at 0.
        num_classes: of the logits.
        instantiation: the pairwise function.
        group_size: frames of one temporal group of a non-local block, for all or by stage; {"res3": 4} in the 32×4 and
            128×1 networks of video-nonlocal-net.
        block_options: overrides of `nonlocal_block`, such as `subsample` or `axes`.
        frozen_bn: whether every BatchNorm is a fixed affine map (`freeze_batch_norm` makes its weights).
        **options: more attributes of `VideoResNet`: `dropout`, `zero_init_residual`, `groups`, `width_per_group`, `remat`,
            `stride_at`, `head_window`, `window_average`, `dtype`, `param_dtype`, `axis_name`.

    Returns:
        The network. `model.apply(variables, clip (B, T, H, W, 3), train=False)` gives logits (B, num_classes).

    Raises:
        ValueError: an unknown depth, kind, clip, preset or stage, or a non-local block after a residual block that there
            is not.
        TypeError: an unknown option.

    Source: Table 1 and section 4; where the sources differ, the preset's.

    >>> import jax, jax.numpy as jnp
    >>> model = video_resnet(50, "c2d", nonlocal_blocks=1, preset="slowfast", num_classes=7)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 8, 64, 64, 3)))[0].shape
    (2, 7)
    """
    _one_of("kind", kind, get_args(Kind))
    _one_of("clip", clip, get_args(Clip))
    _one_of("preset", preset, tuple(PRESETS))
    if isinstance(depth, int):
        _one_of("depth", depth, tuple(DEPTHS))
    blocks = DEPTHS[depth] if isinstance(depth, int) else tuple(depth)
    if len(blocks) != 4 or min(blocks) < 1:
        raise ValueError(
            f"depth must have the residual blocks of res2 to res5, each at least 1; got {depth}."
        )
    norm: Callable[..., nn.Module] = Affine if frozen_bn else PRESETS[preset].block.norm
    make_block = functools.partial(
        _make_block, instantiation, preset, {"norm": norm, **(block_options or {})}, group_size
    )
    make_block("res3")  # raises what is wrong with the options
    backbone = PRESETS[preset].backbone
    defaults: dict[str, Any] = {
        "zero_init_residual": backbone.zero_init_residual,
        "head_window": backbone.head_window,
    }
    return VideoResNet(
        blocks=blocks,  # type: ignore[arg-type]
        taps=_taps(kind, blocks),
        conv1_frames=1 if kind == "c2d" else 5,
        layout=backbone.long_clips if clip in ("32x2", "128x1") else backbone.short_clips,
        nonlocal_blocks=flax.core.FrozenDict(
            _positions(nonlocal_blocks, blocks, preset)
        ),  # hashable
        make_block=make_block,
        # Large maps, of which x − mean would be one more; after a convolution no mean is many deviations from 0.
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
    **options: Any,
) -> nn.Module:
    size = group_size.get(stage) if isinstance(group_size, Mapping) else group_size
    defaults: dict[str, Any] = {"group_size": size}
    backbone = PRESETS[preset].backbone
    if backbone.subsample is not None:
        defaults["subsample"] = backbone.subsample
    if backbone.use_scale is not None and instantiation == "embedded_gaussian":
        defaults["use_scale"] = backbone.use_scale
    return nonlocal_block(instantiation, preset, **defaults | overrides | options)


def _taps(kind: Kind, blocks: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """One residual block of every two is inflated; in res2 all are."""

    def inflated(stage: int, i: int) -> bool:
        return kind != "c2d" and (stage == 0 or i % 2 == (1 if stage == 3 else 0))

    both = {"c2d": (1, 1), "i3d_3x1x1": (3, 1), "i3d_3x3x3": (1, 3)}[kind]
    return tuple(
        tuple(both if inflated(s, i) else (1, 1) for i in range(n)) for s, n in enumerate(blocks)
    )


def _positions(
    nonlocal_blocks: int | Mapping[str, tuple[int, ...]], blocks: tuple[int, ...], preset: Preset
) -> dict[str, tuple[int, ...]]:
    count = dict(zip(STAGES, blocks, strict=True))
    if isinstance(nonlocal_blocks, Mapping):
        for name, at in nonlocal_blocks.items():
            _one_of("a stage of nonlocal_blocks", name, STAGES)
            if wrong := [i for i in at if not 0 <= i < count[name]]:
                raise ValueError(
                    f"{name} has residual blocks 0 to {count[name] - 1}; got {wrong[0]} in nonlocal_blocks."
                )
        return {name: tuple(at) for name, at in nonlocal_blocks.items() if at}
    _one_of("nonlocal_blocks", nonlocal_blocks, (0, 1, 5, 10))
    res3, res4 = count["res3"], count["res4"]
    if nonlocal_blocks == 0:
        return {}
    if nonlocal_blocks == 1:
        if res4 < 2:
            raise ValueError(
                f"one block stands right before the last residual block of res4, which has {res4}."
            )
        return {"res4": (res4 - 2,)}
    of_res3, of_res4 = (2, 3) if nonlocal_blocks == 5 else (4, 6)
    if res3 < of_res3 or res4 < of_res4:
        raise ValueError(
            f"{nonlocal_blocks} blocks want {of_res3} residual blocks in res3 and {of_res4} in res4; got {blocks}."
        )
    spread = nonlocal_blocks == 10 or PRESETS[preset].backbone.five_blocks_spread
    every = 2 if not spread else res4 // of_res4
    return {
        "res3": tuple(range(1, 4, 2)) if nonlocal_blocks == 5 else tuple(range(4)),
        "res4": tuple(every * (i + 1) - 1 for i in range(of_res4)),
    }


def _one_of(name: str, value: Any, options: tuple[Any, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}.")
