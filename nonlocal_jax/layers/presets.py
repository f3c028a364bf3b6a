"""What each published source does differently, as one table of data: `PRESETS`.

A preset has the conventions of one source for the non-local block, for the video ResNet around it,
for the colours and frames of its input, and for its files of weights. A new source is one entry
here; to read its weights, it also needs a table of names in `weights/sources.py`. Everything that
depends on a source reads it from this table, and `presets_table` prints it for the documentation.
`nonlocal_jax.layers.conventions` explains the fields.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from nonlocal_jax import checks
from nonlocal_jax.layers.conventions import (
    BackboneConventions,
    BlockConventions,
    Conventions,
    InputConventions,
    Layout,
    Pool,
)
from nonlocal_jax.layers.initializers import Initializer, normal, variance_scaling

# For type checkers only: at run time the keys of `PRESETS` are what is allowed.
Preset = Literal["paper", "caffe2", "slowfast", "non_local_pytorch", "mmcv"]


def _uniform_bias(fan_in: int) -> Initializer:
    """PyTorch's default for a bias, U(−1/√fan_in, 1/√fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


_normal_001 = normal(0.01)
_he_normal_fan_out = variance_scaling(2.0, "fan_out", "normal")
_pytorch_default = variance_scaling(1 / 3, "fan_in", "uniform")

# Table 1 pads every pooling by half a window. Of the released networks, those of PySlowFast and
# mmaction2 pad pool1 in space, and those of video-nonlocal-net pad none.
_POOL1_SHORT = Pool((1, 3, 3), (1, 2, 2), (0, 1, 1))
_POOL1_LONG = Pool((2, 3, 3), (2, 2, 2), (0, 1, 1))
_POOL2 = Pool((2, 1, 1), (2, 1, 1))
_POOL2_TABLE_1 = Pool((3, 1, 1), (2, 1, 1), (1, 0, 0))
_SHORT_CLIPS = Layout(1, _POOL1_SHORT, _POOL2)
_UNPADDED_SHORT_CLIPS = Layout(1, Pool((1, 3, 3), (1, 2, 2)), _POOL2)
_LONG_CLIPS = Layout(2, _POOL1_LONG, _POOL2)
_WITHOUT_POOL2 = Layout(1, _POOL1_SHORT, None)

_GREY = InputConventions(mean=(114.75,) * 3, std=(57.375,) * 3)
_IMAGENET = InputConventions(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))

PRESETS: dict[Preset, Conventions] = {
    "paper": Conventions(
        title="the paper",
        block=BlockConventions(epsilon=1e-5),
        backbone=BackboneConventions(
            short_clips=Layout(1, _POOL1_SHORT, _POOL2_TABLE_1),
            long_clips=Layout(2, Pool((3, 3, 3), (2, 2, 2), (1, 1, 1)), _POOL2_TABLE_1),
        ),
        input=_GREY,
    ),
    "caffe2": Conventions(
        title="video-nonlocal-net",
        block=BlockConventions(
            # As in its configuration; in float32, 1e-5 and one unit in the last place.
            epsilon=1.0000001e-5,
            instantiations=("embedded_gaussian", "dot_product"),
            use_scale=True,
            pool_order="before",
            use_bias=True,
            out_bias=True,
            kernel_init=_normal_001,
            initialisation="N(0, 0.01)",
        ),
        backbone=BackboneConventions(
            short_clips=_UNPADDED_SHORT_CLIPS,
            long_clips=Layout(2, Pool((2, 3, 3), (2, 2, 2)), _POOL2),
            zero_init_residual=True,
        ),
        input=_GREY,
        names=("caffe2",),
    ),
    "slowfast": Conventions(
        title="PySlowFast",
        block=BlockConventions(
            epsilon=1e-5,
            instantiations=("embedded_gaussian", "dot_product"),
            use_scale=True,
            pool_order="before",
            use_bias=True,
            out_bias=True,
            kernel_init=_he_normal_fan_out,
            initialisation="He, by fan-out",
        ),
        backbone=BackboneConventions(
            short_clips=_SHORT_CLIPS,
            long_clips=_LONG_CLIPS,
            # C2D_NOPOOL of its model zoo, and its architectures 2d, slow_c2d and slow_i3d.
            without_pool2=_WITHOUT_POOL2,
            zero_init_residual=True,
            five_blocks_spread=False,
        ),
        input=dataclasses.replace(_GREY, sampling="slowfast", short_video="hold"),
        names=("slowfast", "pytorchvideo", "torchvision"),  # torchvision pads its poolings as well
    ),
    "non_local_pytorch": Conventions(
        title="Non-local_pytorch",
        block=BlockConventions(
            epsilon=1e-5,
            use_bias=True,
            out_bias=True,
            kernel_init=_pytorch_default,
            bias_init=_uniform_bias,
            initialisation="PyTorch's default",
        ),
        backbone=BackboneConventions(short_clips=_SHORT_CLIPS, long_clips=_LONG_CLIPS),
        input=_GREY,
    ),
    "mmcv": Conventions(
        title="mmcv",
        block=BlockConventions(
            epsilon=1e-5,
            use_scale=True,
            subsample=False,
            use_bias=True,
            out_bias=None,
            kernel_init=_normal_001,
            out_kernel_init=_he_normal_fan_out,
            w_f_init=_he_normal_fan_out,
            initialisation="N(0, 0.01); W_z and w_f He, by fan-out",
        ),
        backbone=BackboneConventions(
            short_clips=_SHORT_CLIPS,
            long_clips=Layout(2, Pool((1, 3, 3), (2, 2, 2), (0, 1, 1)), _POOL2),
            # mmaction2's C2D pads no pooling, as video-nonlocal-net. What it calls C2D without
            # pooling is its ResNet for images, which pads pool1.
            c2d_short_clips=_UNPADDED_SHORT_CLIPS,
            without_pool2=_WITHOUT_POOL2,
            head_window=None,
            # mmaction2 builds mmcv's blocks with these options.
            subsample=True,
            use_scale=False,
        ),
        input=_IMAGENET,
        names=("mmaction2",),
    ),
}


def presets_table(part: Literal["block", "backbone", "input"] = "block") -> str:
    """Returns the presets as a table in Markdown, one row for each source.

    Args:
        part: "block" lists the conventions of the non-local block, "backbone" those of the video
            ResNet, "input" those of its clips.

    Raises:
        ValueError: If `part` is unknown.

    >>> print(presets_table("input").splitlines()[2])
    | `paper` | the paper | 114.75, 114.75, 114.75 | 57.375, 57.375, 57.375 | consecutive | loop |
    """
    checks.one_of("part", part, _CELLS)
    cells = _CELLS[part]
    rows = [
        {"preset": f"`{name}`", "source": conventions.title} | cells(conventions)
        for name, conventions in PRESETS.items()
    ]
    header = tuple(rows[0])
    lines = [header, ("---",) * len(header), *(tuple(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block_cells(conventions: Conventions) -> dict[str, str]:
    block = conventions.block
    pooling = {"after": "after φ and g", "before": "before φ and g"}[block.pool_order]
    return {
        "softmax scale": "d^-0.5" if block.use_scale else "1",
        "pooling": pooling if block.subsample else "none",
        "biases": _biases(block),
        "initialisation": block.initialisation,
        "ε of BatchNorm": f"{block.epsilon:.8g}".replace("e-0", "e-"),
    }


def _biases(block: BlockConventions) -> str:
    if block.use_bias and block.out_bias:
        return "all"
    embeddings = ["θ, φ, g"] if block.use_bias else []
    projection = {True: ["W_z"], None: ["W_z without norm"], False: []}[block.out_bias]
    return "; ".join(embeddings + projection) or "none"


def _backbone_cells(conventions: Conventions) -> dict[str, str]:
    backbone = conventions.backbone
    short, long, window = backbone.short_clips, backbone.long_clips, backbone.head_window
    return {
        "pool1, short clips": _pool(short.pool1),
        "pool1, short clips, C2D": _pool((backbone.c2d_short_clips or short).pool1),
        "pool1, long clips": _pool(long.pool1),
        "pool2": _pool(short.pool2),
        "networks without pool2": "yes" if backbone.without_pool2 else "no",
        "residual branches start at 0": "yes" if backbone.zero_init_residual else "no",
        "head averages": "the map" if window is None else f"windows of {_product(window)}",
    }


def _pool(pool: Pool | None) -> str:
    if pool is None:
        return "none"
    padding = f", padding {_product(pool.padding)}" if any(pool.padding) else ""
    return f"{_product(pool.window)} / {_product(pool.strides)}{padding}"


def _product(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))


def _input_cells(conventions: Conventions) -> dict[str, str]:
    clips = conventions.input
    return {
        "mean": ", ".join(map(str, clips.mean)),
        "standard deviation": ", ".join(map(str, clips.std)),
        "frames": clips.sampling,
        "short videos": clips.short_video,
    }


_CELLS: dict[str, Callable[[Conventions], dict[str, str]]] = {
    "block": _block_cells,
    "backbone": _backbone_cells,
    "input": _input_cells,
}
