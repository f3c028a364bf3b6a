"""Where one position looks: arrows across the frames, as in Figures 1 and 3 of the paper."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from nonlocal_jax.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUERY, ARROW = "#0072B2", "#E69F00"  # blue and orange of a palette that colour-blind people can tell apart


def arrows(
    axes: "Sequence[Axes]",
    clip: "Float[Array | np.ndarray, 't h w c']",
    weights: "Float[Array | np.ndarray, 'frames rows columns']",
    query: tuple[int, int, int],
    top: int = 20,
) -> None:
    """Draw a clip, a frame in each of the axes, and arrows from one position to those with the largest weights.

    The width and opacity of an arrow tell the square root of its weight, relative to the largest.

    Args:
        axes: T of them.
        clip: (T, H, W, 1) or (T, H, W, 3), values from 0 to 1; others are clipped.
        weights: (T, rows, columns), the row of an affinity map that belongs to the query, over the positions of the keys.
        query: frame, row and column of the position on the same grid.
        top: how many arrows.

    Raises:
        ValueError: not one of the axes for each frame, weights that are not finite, or a query outside the map.
    """
    from matplotlib.patches import ConnectionPatch

    frames, weights = np.clip(np.asarray(clip), 0, 1), np.asarray(weights, np.float32)
    if not len(axes) == len(frames) == len(weights):
        raise ValueError(f"axes, clip and weights must be of as many frames; got {len(axes)}, {len(frames)}, {len(weights)}.")
    if not np.isfinite(weights).all():
        raise ValueError("weights must be finite; got NaN or infinity.")
    if not all(0 <= index < size for index, size in zip(query, weights.shape, strict=True)):
        raise ValueError(f"query must lie inside the map {weights.shape}; got {query}.")

    for t, (ax, frame) in enumerate(zip(axes, frames, strict=True)):
        ax.imshow(frame.squeeze(-1) if frame.shape[-1] == 1 else frame, cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[], xlabel=f"frame {t}")

    cell = np.array(frames.shape[1:3]) / np.array(weights.shape[1:])  # pixels of a position

    def pixel(position: tuple[int, ...]) -> tuple[float, float]:
        row, column = (np.array(position[1:]) + 0.5) * cell - 0.5
        return float(column), float(row)

    order = np.argsort(weights, axis=None)[::-1][:top]
    largest = max(float(weights.max()), np.finfo(np.float32).tiny)
    for rank, flat in enumerate(order.tolist()):
        position = tuple(int(index) for index in np.unravel_index(flat, weights.shape))
        strength = float(np.clip(weights[position] / largest, 0.05, 1)) ** 0.5
        arrow = ConnectionPatch(
            pixel(query), pixel(position), "data", "data", axesA=axes[query[0]], axesB=axes[position[0]],
            arrowstyle="-|>", color=ARROW, alpha=strength, linewidth=0.5 + 1.5 * strength, zorder=3 - rank / top,
        )  # fmt: skip
        axes[query[0]].figure.add_artist(arrow)
    axes[query[0]].plot(*pixel(query), "o", color=QUERY, markersize=8, zorder=4)
