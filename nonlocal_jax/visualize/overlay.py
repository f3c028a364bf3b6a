"""Values of cells over frames: outlines in the colours of a bar, which leave the frames visible.

A colour that is blended with a photograph is a colour that no bar shows, and an opaque cell hides
what the network attends to. Neighbouring cells of the same band are therefore outlined together, in
the opaque colour of the band, and frames are greyed where values are small.

Matplotlib is imported by the functions, so importing the package does not load it.
"""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax.visualize.scene import Scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Float[np.ndarray, "h w"]
Bands = Int[np.ndarray, "h w"]
Edges = Float[np.ndarray, " edges"]

BANDS = 5  # the lowest has no outline
FLAT = 0.01  # of the largest value; a map that varies less is drawn in one band
# Brighter is larger. Colour-blind people can tell the colours apart (the tests measure it), and
# negative outlines are dashed.
POSITIVE_BANDS = ("#a8327d", "#e8553a", "#fda50f", "#f7f78f")
NEGATIVE_BANDS = ("#3b5bd0", "#3f93dd", "#74c7f2", "#d2f1ff")
GREY, GREY_OPACITY = "#808080", 0.6  # over the lowest band; the highest band has none

# Thickness of an outline: a share of the cell, between two shares of the frame, so that outlines
# are neither invisible on maps of many cells nor bulky on maps of few.
CELL_SHARE, FRAME_SHARES, MAX_CELL_SHARE = 0.14, (1 / 150, 1 / 75), 0.22
BORDER = 0.25  # half the thickness of the black line between two bands, in thicknesses
LOW_FIGURE = 2.5  # inches; a lower bar has no room for the ten edges of signed bands
DASH_GAP = (0.35, 0.65)  # of the side of a cell, where a negative outline is interrupted


def weight_edges(values: Any) -> Edges:
    """Returns the edges of bands for weights: equal steps of the square root of |value| from 0.

    A few weights are much larger than the others, which equal steps would not tell apart.

    >>> weight_edges(np.array([[0.2, -1.0]]))
    array([0.  , 0.04, 0.16, 0.36, 0.64, 1.  ])
    """
    largest = float(np.abs(values).max()) or 1.0
    return largest * (np.arange(BANDS + 1) / BANDS) ** 2


def equal_edges(values: Any) -> Edges:
    """Returns the edges of bands for positive values: equal steps from the smallest to the largest.

    If the values hardly differ, the steps start at 0, so that rounding is not shown.

    >>> equal_edges(np.array([[70.0, 80.0]]))
    array([70., 72., 74., 76., 78., 80.])
    """
    smallest, largest = float(np.min(values)), float(np.max(values))
    if largest - smallest < FLAT * largest:
        smallest = 0.0
    return np.linspace(smallest, largest, BANDS + 1)


def bands(values: Any, edges: Edges) -> Any:
    """Returns the bands of values: 0 to 4 by |value| between the edges, with the sign of value.

    >>> bands(np.array([0.03, 0.05, 0.17, 0.9, 1.0, -0.5]), weight_edges(np.array([1.0])))
    array([ 0,  1,  2,  4,  4, -3])
    """
    levels = np.searchsorted(edges[1:-1], np.abs(values), side="right")
    return np.sign(values).astype(int) * levels


def draw_bands(
    figure: "Figure",
    panels: "list[list[Axes]]",
    scene: Scene,
    side: str,
    values: Any,
    label: str,
    edges: Edges,
) -> bool:
    """Draws values over frames, with one colour bar for all of them.

    Args:
        figure: The figure of the panels.
        panels: Rows of axes, one for each frame.
        scene: The frames.
        side: "queries" or "keys": the cells that have the values.
        values: (rows, T, H, W), one map for each row of panels.
        label: Label of the colour bar.
        edges: Edges of the bands of |value|, ascending.

    Returns:
        Whether there are negative values, whose outlines are dashed.
    """
    values = np.asarray(values, float)
    signed = bool((values < 0).any())
    colours = _colours(edges, signed)
    columns, rows = scene.edges(side)
    for panel_row, maps in zip(panels, values, strict=True):
        for panel, ax in enumerate(panel_row):
            frame = panel if side == "queries" else scene.key_frame(panel)
            outlines = _draw_frame(ax, columns, rows, maps[frame], edges, colours)
    axes = list(itertools.chain(*panels))
    ticks = colours["norm"].boundaries
    height = figure.bbox.height / figure.dpi
    ticks = ticks[::3] if signed and height < LOW_FIGURE else ticks
    digits = _tick_digits(ticks)
    style: dict[str, Any] = {"spacing": "uniform", "shrink": 0.9, "ticks": ticks}
    figure.colorbar(
        outlines, ax=axes, label=label, format=lambda value, _: _tick(value, digits), **style
    )
    return signed


def _colours(edges: Edges, signed: bool) -> dict[str, Any]:
    """Returns the colour map and the norm of the outlines and of their bar."""
    from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgba

    negative = NEGATIVE_BANDS[::-1] if signed else ()
    boundaries = np.concatenate([-edges[:0:-1], edges[1:]]) if signed else edges
    colours = [*negative, to_rgba(GREY, GREY_OPACITY), *POSITIVE_BANDS]
    norm = BoundaryNorm(boundaries.tolist(), len(colours), clip=True)
    return {"cmap": ListedColormap(colours), "norm": norm}


def _draw_frame(
    ax: "Axes", columns: Any, rows: Any, values: Values, edges: Edges, colours: dict[str, Any]
) -> Any:
    """Draws one map on one frame; returns the outlines, whose colours the bar shows."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import ListedColormap

    levels = bands(values, edges)
    opacity = GREY_OPACITY * (1 - np.abs(levels) / (BANDS - 1))
    ax.pcolormesh(columns, rows, values, cmap=ListedColormap([GREY]), alpha=opacity)
    cell = min(np.diff(columns).max(), np.diff(rows).max())
    frame = max(np.ptp(columns), np.ptp(rows))
    thickest = MAX_CELL_SHARE * cell
    thickness = min(np.clip(CELL_SHARE * cell, *np.multiply(FRAME_SHARES, frame)), thickest)
    outlined = np.repeat(np.repeat(values, 5, axis=0), 5, axis=1)
    outlined = np.ma.masked_array(outlined, ~_outline(levels))
    inner_columns, inner_rows = _subdivided(columns, thickness), _subdivided(rows, thickness)
    outlines = ax.pcolormesh(inner_columns, inner_rows, outlined, **colours)
    borders = _borders(levels, columns, rows, BORDER * thickness)
    ax.add_collection(PolyCollection(borders, facecolors="black", linewidths=0), autolim=False)
    return outlines


def _subdivided(edges: Float[np.ndarray, " n"], thickness: float) -> Float[np.ndarray, " m"]:
    """Divides each cell into five: an outline at both ends, and between them the gap of a dash."""
    starts, sizes = edges[:-1], np.diff(edges)
    rim = np.minimum(thickness, 0.3 * sizes)  # cells at the border can be narrow
    inner = [starts, starts + rim, *(starts + share * sizes for share in DASH_GAP)]
    parts = np.stack([*inner, starts + sizes - rim], axis=-1)
    return np.append(parts.reshape(-1), edges[-1])


def _outline(levels: Bands) -> Any:
    """Returns which parts of the cells (5H, 5W) are drawn: the rims next to another band."""
    height, width = levels.shape
    padded = np.pad(levels, 1)
    parts = np.zeros((height, 5, width, 5), bool)
    for row, column in itertools.product((-1, 0, 1), repeat=2):
        neighbour = padded[1 + row : 1 + row + height, 1 + column : 1 + column + width]
        rows = {-1: slice(0, 1), 0: slice(0, 5), 1: slice(4, 5)}[row]
        columns = {-1: slice(0, 1), 0: slice(0, 5), 1: slice(4, 5)}[column]
        parts[:, rows, :, columns] |= (neighbour != levels)[:, None, :, None]
    positive = levels > 0
    parts[:, 2] &= positive[:, :, None]
    parts[:, :, :, 2] &= positive[:, None, :]
    parts &= (levels != 0)[:, None, :, None]
    return parts.reshape(5 * height, 5 * width)


def _borders(levels: Bands, columns: Any, rows: Any, half: float) -> Any:
    """Returns rectangles (N, 4, 2) along the edges between cells of different bands."""
    padded = np.pad(levels, 1)
    boxes = [np.empty((0, 4))]
    i, j = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    boxes.append(np.stack([columns[j], rows[i], columns[j], rows[i + 1]], axis=-1))
    i, j = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    boxes.append(np.stack([columns[j], rows[i], columns[j + 1], rows[i]], axis=-1))
    left, top, right, bottom = (np.concatenate(boxes) + half * np.array([-1, -1, 1, 1])).T
    corners = [left, top, right, top, right, bottom, left, bottom]
    return np.stack(corners, axis=-1).reshape(-1, 4, 2)


def _tick_digits(ticks: Any) -> int:
    """Returns the number of digits, at least 2, that tells ticks apart."""
    choices = range(2, 7)
    for digits in choices:
        if len({_tick(value, digits) for value in ticks}) == len(ticks):
            return digits
    return choices[-1]


def _tick(value: Any, digits: int) -> str:
    is_whole = abs(value) >= 10**digits - 0.5
    return f"{value:,.0f}" if is_whole else f"{value:.{digits}g}"
