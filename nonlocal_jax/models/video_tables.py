"""Tables of the video networks: depths, taps in time, places of non-local blocks, clip sizes.

Only data and functions of it; `nonlocal_jax.models.video_resnets` builds the networks.
"""

from collections.abc import Mapping
from typing import Literal, get_args

from nonlocal_jax import checks
from nonlocal_jax.layers.conventions import BackboneConventions, ClipFormat, Layout, Triple
from nonlocal_jax.layers.presets import PRESETS

__all__ = [
    "CLIP_FORMATS",
    "DEPTHS",
    "INFLATIONS",
    "STAGES",
    "ClipFormat",
    "Inflation",
    "Places",
    "block_places",
    "layout_of",
    "residual_blocks",
    "smallest_clip",
    "stage_taps",
]

# How 2-D kernels are inflated in time: not at all, or the first or second convolution of a block.
Inflation = Literal["c2d", "i3d_3x1x1", "i3d_3x3x3"]
Places = Mapping[str, tuple[int, ...]]  # by stage, the residual blocks that a non-local one follows
StageTaps = tuple[tuple[int, int], ...]

CLIP_FORMATS: tuple[ClipFormat, ...] = get_args(ClipFormat)
LONG_CLIPS: tuple[ClipFormat, ...] = ("32x2", "128x1")
INFLATIONS: dict[Inflation, tuple[int, int]] = {  # taps of (first, second) convolution
    "c2d": (1, 1),
    "i3d_3x1x1": (3, 1),
    "i3d_3x3x3": (1, 3),
}
STAGES = ("res2", "res3", "res4", "res5")
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NONLOCAL_COUNTS = {0: (0, 0), 1: (0, 1), 5: (2, 3), 10: (4, 6)}  # in res3 and res4


def residual_blocks(depth: int | tuple[int, ...]) -> tuple[int, int, int, int]:
    """Returns the number of residual blocks of res2 to res5.

    Args:
        depth: 50, 101 or 152, or the numbers themselves.

    Raises:
        ValueError: If the depth is unknown, or there are not four stages of at least one block.

    >>> residual_blocks(101)
    (3, 4, 23, 3)
    """
    if isinstance(depth, int):
        checks.one_of("depth", depth, DEPTHS)
        return DEPTHS[depth]
    if len(depth) != 4 or min(depth) < 1:
        raise ValueError(
            f"depth must have the residual blocks of res2 to res5, each at least 1; got {depth}."
        )
    res2, res3, res4, res5 = depth
    return res2, res3, res4, res5


def layout_of(
    clip: ClipFormat,
    backbone: BackboneConventions,
    kind: Inflation | None = None,
    pool2: bool = True,
) -> Layout:
    """Returns the strides and poolings of a source for clips of this format.

    Args:
        clip: Frames × their stride.
        backbone: Conventions of the source.
        kind: Inflation, for sources whose C2D has a layout of its own.
        pool2: Whether there is a pooling after res2.

    Raises:
        ValueError: If the format is unknown, or the source has no such layout without pool2.
    """
    checks.one_of("clip", clip, CLIP_FORMATS)
    checks.one_of("pool2", pool2, (True, False))
    is_long = clip in LONG_CLIPS
    if not pool2:
        if is_long or backbone.without_pool2 is None:
            available = [name for name, source in PRESETS.items() if source.backbone.without_pool2]
            raise ValueError(
                f"pool2 must be True for clip={clip!r} of this preset, which has no layout without "
                f"pool2. Presets {' and '.join(map(repr, available))} have one for clips of "
                f"{', '.join(name for name in CLIP_FORMATS if name not in LONG_CLIPS)}."
            )
        return backbone.without_pool2
    if is_long:
        return backbone.long_clips
    is_c2d = kind == "c2d"
    return (backbone.c2d_short_clips if is_c2d else None) or backbone.short_clips


def stage_taps(kind: Inflation, blocks: tuple[int, ...]) -> tuple[StageTaps, ...]:
    """Returns the taps in time of each residual block's first and second convolution, by stage.

    In res2 all residual blocks are inflated, in res3 and res4 those with an even index, in res5
    those with an odd one.

    Raises:
        ValueError: If the kind is unknown.

    >>> stage_taps("i3d_3x1x1", (3, 4, 6, 3))[3]
    ((1, 1), (3, 1), (1, 1))
    """
    checks.one_of("kind", kind, INFLATIONS)
    inflated, plain = INFLATIONS[kind], (1, 1)
    taps = []
    for stage, count in zip(STAGES, blocks, strict=True):
        parity = 1 if stage == "res5" else 0
        is_inflated = (stage == "res2" or i % 2 == parity for i in range(count))
        taps.append(tuple(inflated if flag else plain for flag in is_inflated))
    return tuple(taps)


def block_places(
    nonlocal_blocks: int | Places, blocks: tuple[int, ...], spread: bool
) -> dict[str, tuple[int, ...]]:
    """Returns the residual blocks that non-local blocks follow, by stage.

    Args:
        nonlocal_blocks: 0, 1, 5 or 10 non-local blocks, or the places themselves.
        blocks: Number of residual blocks of res2 to res5.
        spread: Whether five blocks are spread evenly over a res4 with more than six.

    Raises:
        ValueError: If the number or a stage is unknown, or a place does not exist.

    >>> block_places(5, (3, 4, 23, 3), spread=True)
    {'res3': (1, 3), 'res4': (6, 13, 20)}
    """
    counts = dict(zip(STAGES, blocks, strict=True))
    if isinstance(nonlocal_blocks, Mapping):
        return _checked_places(nonlocal_blocks, counts)
    checks.one_of("nonlocal_blocks", nonlocal_blocks, tuple(NONLOCAL_COUNTS))
    res3, res4 = counts["res3"], counts["res4"]
    if nonlocal_blocks == 0:
        return {}
    if nonlocal_blocks == 1:
        if res4 < 2:
            raise ValueError(
                "nonlocal_blocks must be 0 or a mapping for this depth: one block is placed right "
                f"before the last residual block of res4, which has {res4}."
            )
        return {"res4": (res4 - 2,)}
    res3_count, res4_count = NONLOCAL_COUNTS[nonlocal_blocks]
    if res3 < res3_count or res4 < res4_count:
        raise ValueError(
            f"depth must have at least {res3_count} residual blocks in res3 and {res4_count} in "
            f"res4 for {nonlocal_blocks} non-local blocks; got {blocks}."
        )
    res3_places = (1, 3) if nonlocal_blocks == 5 else (0, 1, 2, 3)
    step = res4 // res4_count if spread or nonlocal_blocks == 10 else 2
    return {"res3": res3_places, "res4": tuple(step * (i + 1) - 1 for i in range(res4_count))}


def _checked_places(places: Places, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    for stage, indices in places.items():
        checks.one_of("a stage of nonlocal_blocks", stage, STAGES)
        missing = [i for i in indices if not 0 <= i < counts[stage]]
        if missing:
            raise ValueError(
                f"nonlocal_blocks must name residual blocks 0 to {counts[stage] - 1} of {stage}; "
                f"got {missing[0]}."
            )
    return {stage: tuple(indices) for stage, indices in places.items() if indices}


def smallest_clip(layout: Layout) -> Triple:
    """Returns the fewest frames, rows and columns that leave a position after the poolings."""
    t, h, w = (
        next(size for size in range(1, 64) if _has_positions(size, axis, layout))
        for axis in range(3)
    )
    return t, h, w


def _has_positions(size: int, axis: int, layout: Layout) -> bool:
    size = -(-size // (layout.conv1_stride if axis == 0 else 2))
    for pool in layout.pools:
        size = (size + 2 * pool.padding[axis] - pool.window[axis]) // pool.strides[axis] + 1
        if size < 1:
            return False
    return True
