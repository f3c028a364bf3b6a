"""Pictures of affinity maps, as in Figures 1 and 3 of the paper.

Each function returns a `matplotlib.figure.Figure`, which a notebook displays (after `%matplotlib
inline`) and `figure.savefig("map.png")` writes to a file. Matplotlib is imported when the first
picture is drawn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from nonlocal_jax import checks
from nonlocal_jax.visualize import measures
from nonlocal_jax.visualize.affinity_map import AffinityMap
from nonlocal_jax.visualize.overlay import draw_bands, equal_edges, weight_edges
from nonlocal_jax.visualize.panels import (
    NEGATIVE,
    POSITIVE,
    QUERY,
    TITLES,
    WEIGHTS,
    caption,
    frame_panels,
)
from nonlocal_jax.visualize.scene import select_clip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_HEATMAPS = 16  # rows of frames in one figure
TINY = float(np.finfo(np.float32).tiny)


def arrows(
    affinity: AffinityMap,
    clip: Any,
    query: tuple[int, ...],
    *,
    top: int = 20,
    sample: int = 0,
    axes: "Sequence[Axes] | None" = None,
) -> "Figure":
    """Draws arrows from one position to the keys with the largest weights, across frames.

    The width and opacity of an arrow show the square root of its share, relative to the largest.
    Positions are drawn at the centre of their receptive fields (`to_pixels`).

    Args:
        affinity: A map that `affinities` returned.
        clip: The input of the network, (B, T, H, W, C), or one clip (T, H, W, C); images without T.
        query: Frame, row and column on the map `affinity.queries`.
        top: Number of arrows.
        sample: Index of the clip in the batch.
        axes: Existing axes, one for each frame of the map; None creates a figure.

    Returns:
        The figure.

    Raises:
        IndexError: A query outside the map.
        ValueError: More than one query, less than one arrow, weights that are not finite, another
            clip than the network saw, a map whose axes are not in the order of the input's, or a
            wrong number of axes.
        GeometryError: The receptive fields of the block cannot be followed.

    Source: Figures 1 and 3.
    """
    selected, scene = select_clip(affinity, clip, sample)
    query = selected.single(query)
    checks.at_least("top", top, 1)
    row = selected.rows(query)[0, 0]
    share = _shares(row)
    order = np.argsort(-share, axis=None, kind="stable")[:top]
    figure, (panels,) = frame_panels(scene, axes)
    panel, *start = scene.place(_video_position(query), "queries")
    largest = max(float(share.max()), TINY)
    for rank, flat_key in enumerate(order.tolist()):
        key = tuple(map(int, np.unravel_index(flat_key, row.shape)))
        if share[key] == 0:
            break
        target_panel, *end = scene.place(_video_position(key), "keys")
        strength = float(share[key] / largest) ** 0.5
        ends = (panels[panel], start), (panels[target_panel], end)
        arrow = _arrow(*ends, strength, row[key] > 0, zorder=4 - rank / top)
        panels[panel].figure.add_artist(arrow)
    _dot_above_arrows(panels[panel], start)
    held = float(share.reshape(-1)[order].sum())
    dashed = " (negative ones dashed)" if (row.reshape(-1)[order] < 0).any() else ""
    total = f"the {len(order)} largest weights{dashed} hold {held:.0%} of the total"
    _caption(figure, selected, total, WEIGHTS[selected.instantiation])
    return figure


def _arrow(start: Any, end: Any, strength: float, positive: Any, zorder: float) -> Any:
    """Returns an arrow between two points, each given as axes and (row, column)."""
    from matplotlib.patches import ConnectionPatch
    from matplotlib.patheffects import Stroke, withStroke

    (start_axes, start_pixel), (end_axes, end_pixel) = start, end
    width = 0.5 + 1.1 * strength
    # Black and white casings: one of them contrasts with the photograph, whatever its colours.
    halo = Stroke(linewidth=width + 2.6, foreground="white", alpha=0.5 * strength)
    casing = withStroke(linewidth=width + 1.0, foreground="black", alpha=0.7 * strength)
    return ConnectionPatch(
        tuple(start_pixel[::-1]),
        tuple(end_pixel[::-1]),
        "data",
        "data",
        axesA=start_axes,
        axesB=end_axes,
        arrowstyle="-|>",
        mutation_scale=6 + 5 * strength,
        color=POSITIVE if positive else NEGATIVE,
        linestyle="-" if positive else (0, (4, 2)),
        alpha=0.2 + 0.7 * strength,
        linewidth=width,
        zorder=zorder,
        shrinkA=0,
        shrinkB=0,
        path_effects=[halo, casing],
    )


def _dot_above_arrows(ax: "Axes", pixel: Sequence[float]) -> None:
    """Marks the query. Arrows belong to the figure, so a dot of the axes would lie below them."""
    from matplotlib.lines import Line2D

    row, column = pixel
    style: dict[str, Any] = {"marker": "o", "markeredgecolor": "white", "markersize": 8}
    dot = Line2D([column], [row], color=QUERY, zorder=5, **style)
    dot.set_transform(ax.transData)
    ax.figure.add_artist(dot)


def heatmap(affinity: AffinityMap, clip: Any, queries: Any, *, sample: int = 0) -> "Figure":
    """Draws what some positions attend to: a row of frames for each, with its weights outlined.

    Cells whose weights are in the same band of the colour bar are outlined together, in the colour
    of the band, so the frames remain visible inside. The bar shows shares as multiples of the
    uniform share, with the signs of the weights; negative weights have dashed outlines. Its scale
    is that of all positions, up to the largest of their weights. The larger a weight, the less its
    cell is greyed. Cells of the lowest band have no outline. A circle marks the position.

    Args:
        affinity: A map that `affinities` returned.
        clip: The input of the network.
        queries: (Q, axes), or one position; at most 16.
        sample: Index of the clip in the batch.

    Returns:
        The figure.

    Raises:
        ValueError: No queries or more than 16, or for the reasons that `arrows` lists.
        IndexError, GeometryError: See `arrows`.
    """
    selected, scene = select_clip(affinity, clip, sample)
    queries = np.atleast_2d(np.asarray(queries))
    count = len(queries) if queries.size else 0
    if not 1 <= count <= MAX_HEATMAPS:
        raise ValueError(
            f"queries must be between 1 and {MAX_HEATMAPS}, each a row of the picture; got {count}."
        )
    heat = _relative_weights(selected, queries).reshape(count, *scene.keys.grid)
    figure, panels = frame_panels(scene, None, rows=count)
    signed = draw_bands(figure, panels, scene, "keys", heat, "× uniform", weight_edges(heat))
    for row, query in zip(panels, queries, strict=True):
        panel, *pixel = scene.place(_video_position(query), "queries")
        _circle(row[panel], pixel)
    dashed = " (negative weights dashed)" if signed else ""
    attended = f"what the circled position attends to{dashed}"
    _caption(figure, selected, attended, WEIGHTS[selected.instantiation])
    return figure


def _circle(ax: "Axes", pixel: Sequence[float]) -> None:
    """Marks the query with a circle, which is visible on every photograph and hides little."""
    from matplotlib.patheffects import withStroke

    row, column = pixel
    style: dict[str, Any] = {"markersize": 9, "markeredgewidth": 1.6, "markeredgecolor": "white"}
    casing = withStroke(linewidth=3.6, foreground="black")
    ax.plot(column, row, "o", fillstyle="none", path_effects=[casing], clip_on=False, **style)


def entropy(affinity: AffinityMap, clip: Any, *, sample: int = 0) -> "Figure":
    """Draws the effective number of keys that each position attends to.

    This is exp(H_i), where H_i is the entropy of the shares of position i. Positions are outlined
    in the colours of the bar, as in `heatmap`, but the bands are equal steps from the smallest to
    the largest number.

    Args:
        affinity: A map that `affinities` returned.
        clip: The input of the network.
        sample: Index of the clip in the batch.

    Returns:
        The figure; `measures.entropy` returns H.

    Raises:
        ValueError, IndexError, GeometryError: See `arrows`.
    """
    selected, scene = select_clip(affinity, clip, sample)
    effective_keys = np.exp(measures.entropy(selected)[0]).reshape(scene.queries.grid)
    key_count = int(selected.counted().max())
    figure, panels = frame_panels(scene)
    edges = equal_edges(effective_keys)
    draw_bands(figure, panels, scene, "queries", effective_keys[None], "effective keys", edges)
    _caption(
        figure, selected, f"exp(entropy) of the shares of each position, out of {key_count} keys"
    )
    return figure


def received(
    affinity: AffinityMap, clip: Any, *, sample: int = 0, axes: "Sequence[Axes] | None" = None
) -> "Figure":
    """Draws the attention that each position receives from all positions.

    This is its mean share, as a multiple of the uniform share. Cells are outlined in the colours of
    the bar, as in `heatmap`.

    Args:
        affinity: A map that `affinities` returned.
        clip: The input of the network.
        sample: Index of the clip in the batch.
        axes: Existing axes, one for each frame of the map; None creates a figure.

    Returns:
        The figure; `measures.received` returns the numbers.

    Raises:
        ValueError, IndexError, GeometryError: See `arrows`.
    """
    selected, scene = select_clip(affinity, clip, sample)
    heat = measures.received(selected)[0].reshape(scene.keys.grid)
    figure, panels = frame_panels(scene, axes)
    draw_bands(figure, panels, scene, "keys", heat[None], "× uniform", weight_edges(heat))
    _caption(
        figure, selected, "attention received from all positions", WEIGHTS[selected.instantiation]
    )
    return figure


def _relative_weights(selected: AffinityMap, queries: Any) -> Float[np.ndarray, "q *keys"]:
    """Returns the signed shares of some queries, as multiples of the uniform share."""
    rows = selected.rows(queries)[0]
    counted = selected.counted()[0][tuple(queries.T)]
    relative = [
        np.sign(row) * _shares(row) * count for row, count in zip(rows, counted, strict=True)
    ]
    return np.stack(relative)


def _caption(figure: "Figure", affinity: AffinityMap, *parts: str) -> None:
    caption(figure, affinity.block, TITLES[affinity.instantiation], *parts)


def _video_position(position: Any) -> tuple[int, ...]:
    """Returns frame, row and column of a position; an image is frame 0."""
    return (*(0,) * (3 - len(position)), *map(int, position))


def _shares(row: Float[np.ndarray, "*keys"]) -> Float[np.ndarray, "*keys"]:
    """Returns the shares of one row, in the shape of the map of the keys."""
    return measures.shares(row.reshape(-1)).reshape(row.shape)
