"""Summaries of affinity maps as charts: attention between frames, and dependence on the query."""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nonlocal_jax.terminal import printable
from nonlocal_jax.visualize import measures
from nonlocal_jax.visualize.affinity_map import AffinityMap
from nonlocal_jax.visualize.panels import AS_WRITTEN, QUERY, new_figure, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME_WIDTH = 32  # characters in a line of the name of a block


def time_by_time(affinity: AffinityMap, *, sample: int = 0) -> "Figure":
    """Draws a table of how much each frame attends to each.

    Args:
        affinity: A map that `affinities` returned for a video.
        sample: Index of the clip in the batch.

    Returns:
        The figure; `measures.time_by_time` returns the numbers.

    Raises:
        ValueError: A map without frames, or weights that are not finite.
    """
    table = measures.time_by_time(affinity[sample])[0]
    frames, key_frames = table.shape
    figure = new_figure(1.6 + 0.5 * key_frames, 1.3 + 0.42 * frames)
    ax = figure.subplots()
    image = ax.imshow(table, cmap="cividis", vmin=0)
    if table.size <= 100:
        for (source, target), value in np.ndenumerate(table):
            colour = "white" if value < 0.6 * table.max() else "black"
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9}
            ax.text(target, source, f"{100 * value:.0f}", color=colour, **style)
    ax.set(xlabel="to frame of the map", ylabel="from frame of the map")
    ax.set(xticks=range(key_frames), yticks=range(frames))
    title = wrapped(figure, f"{affinity.block}: share of the weight, %")
    figure.suptitle(title, fontsize=9, **AS_WRITTEN)
    figure.colorbar(image, ax=ax, format=lambda value, _: f"{100 * value:.0f}%")
    return figure


def query_dependence(maps: Mapping[str, AffinityMap], *, sample: int = 0) -> "Figure":
    """Draws how much the maps of different queries differ in each block, as GCNet asked.

    Args:
        maps: The maps that `affinities` returned.
        sample: Index of the clip in the batch.

    Returns:
        The figure; `measures.query_dependence` returns the numbers.

    Raises:
        ValueError: No maps, or weights that are not finite.
    """
    if not maps:
        raise ValueError("maps must have at least one block; got none.")
    found = [measures.query_dependence(affinity[sample]) for affinity in maps.values()]
    names = [textwrap.fill(printable(name), NAME_WIDTH) for name in maps]
    lines = max(name.count("\n") + 1 for name in names)
    figure = new_figure(8.0, 1.4 + max(0.45, 0.2 * lines) * len(found))
    axes = figure.subplots(1, 2, sharey=True)
    labels = (
        "cosine distance between\nthe maps of two queries",
        "information of the query\nabout the key, nats",
    )
    for ax, label, values in zip(axes, labels, zip(*found, strict=True), strict=True):
        numbers = [float(value[0]) for value in values]  # of the only clip
        bars = ax.barh(range(len(maps)), numbers, height=0.5, color=QUERY)
        ax.bar_label(bars, [f"{number:.3g}" for number in numbers], padding=3)
        ax.set(xlabel=label, xlim=(0, 1.2 * max(*numbers, 1e-3)))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(maps)), names, **AS_WRITTEN)
    axes[0].invert_yaxis()
    return figure
