"""Affinity maps as pictures, as in Figures 1 and 3 of the paper. Matplotlib is loaded when something is drawn.

Each function returns a `matplotlib.figure.Figure`: the value of a notebook's cell (after `%matplotlib inline`), or
`figure.savefig("map.png")`. The colours are of palettes that colour-blind people can tell apart.
"""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from nonlocal_jax.visualize import measures
from nonlocal_jax.visualize.frames import Scene, of_sample
from nonlocal_jax.visualize.maps import AffinityMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUERY, POSITIVE, NEGATIVE = (
    "#0072B2",
    "#E69F00",
    "#CC79A7",
)  # blue, orange and pink of Okabe and Ito
COLUMNS = 8  # panels of a row
WEIGHTS = {
    "gaussian": "weights of a softmax, sum 1",
    "embedded_gaussian": "weights of a softmax, sum 1",
    "dot_product": "signed weights f/N, shown as shares of Σ|f|/N",
    "concatenation": "weights f/N ≥ 0 of any size, shown as shares of their sum",
}


def arrows(
    affinity: AffinityMap,
    clip: Any,
    query: tuple[int, ...],
    *,
    top: int = 20,
    sample: int = 0,
    axes: "Sequence[Axes] | None" = None,
) -> "Figure":
    """From one position, arrows to those with the largest weights, across frames.

    Width and opacity of an arrow tell the square root of its share, relative to the largest. Positions are drawn in the middle
    of what they see (`to_pixels`).

    Args:
        affinity: of `affinities`.
        clip: what the network saw, (B, T, H, W, C) or one clip (T, H, W, C); images likewise without T.
        query: frame, row and column on the map `affinity.queries`.
        top: how many arrows.
        sample: which clip of the batch.
        axes: where to draw, one for each frame of the map; None makes a figure.

    Returns:
        The figure.

    Raises:
        IndexError: a query outside the map.
        ValueError: more than one query, less than one arrow, weights that are not finite, another clip than the network saw, a
            map whose axes are not in the order of the input's, or not one of the axes for each frame.
        GeometryError: a network whose receptive fields cannot be followed.

    Source: Figures 1 and 3.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import ConnectionPatch
    from matplotlib.patheffects import withStroke

    one, at = of_sample(affinity, clip, sample)
    query = one.single(query)
    if top < 1:
        raise ValueError(f"top must be at least 1; got {top}.")
    row = one.rows(query)[0, 0]
    figure, (axes,) = _panels(at, axes)
    share = _shares(row)
    order = np.argsort(-share, axis=None, kind="stable")[:top]
    largest = max(float(share.max()), np.finfo(np.float32).tiny)
    panel, *pixel = at.place(_of_clip(query), "queries")
    for rank, flat in enumerate(order.tolist()):
        position = tuple(int(index) for index in np.unravel_index(flat, row.shape))
        if share[position] == 0:
            break
        strength = float(share[position] / largest) ** 0.5
        to, *end = at.place(_of_clip(position), "keys")
        width = 0.5 + 1.1 * strength
        axes[panel].figure.add_artist(
            ConnectionPatch(
                (pixel[1], pixel[0]), (end[1], end[0]), "data", "data", axesA=axes[panel], axesB=axes[to], arrowstyle="-|>",
                mutation_scale=6 + 5 * strength, color=POSITIVE if row[position] > 0 else NEGATIVE,
                linestyle="-" if row[position] > 0 else (0, (4, 2)), alpha=0.2 + 0.7 * strength,
                linewidth=width, zorder=4 - rank / top,
                shrinkA=0, shrinkB=0,
                path_effects=[withStroke(linewidth=width + 1.2, foreground="white", alpha=0.5 * strength)],
            )
        )  # fmt: skip
    dot = Line2D(
        [pixel[1]],
        [pixel[0]],
        marker="o",
        color=QUERY,
        markeredgecolor="white",
        markersize=8,
        zorder=5,
    )
    dot.set_transform(axes[panel].transData)
    axes[panel].figure.add_artist(dot)  # above the arrows, which belong to the figure as well
    held = float(share.reshape(-1)[order].sum())
    dashed = " (negative ones dashed)" if (row.reshape(-1)[order] < 0).any() else ""
    largest_hold = f"the {len(order)} largest{dashed} hold {held:.0%}"
    _caption(
        figure, f"{one.block} · {_called(one)} · {largest_hold} · {WEIGHTS[one.instantiation]}"
    )
    return figure


def heatmap(affinity: AffinityMap, clip: Any, queries: Any, *, sample: int = 0) -> "Figure":
    """Where positions look: for each of them a row of frames, with its weights laid over.

    Colours tell shares as multiples of the uniform share; of the dot product, whose weights are signed, with their sign.

    Args:
        affinity: of `affinities`.
        clip: what the network saw.
        queries: (Q, axes), or one position.
        sample: which clip of the batch.

    Returns:
        The figure.

    Raises:
        As `arrows`; ValueError too for no queries, and for more than 16, which no one could look at.
    """
    from matplotlib.colors import CenteredNorm, Normalize

    one, at = of_sample(affinity, clip, sample)
    queries = np.atleast_2d(np.asarray(queries))
    if not 1 <= len(queries) <= 16 or not queries.size:
        raise ValueError(
            f"queries must be from 1 to 16, each a row of the picture; got {len(queries) if queries.size else 0}."
        )
    rows = one.rows(queries)[0]
    signed = one.instantiation == "dot_product"
    counted = one.counted()[0][tuple(queries.T)]
    relative = np.stack(
        [np.sign(row) * _shares(row) * count for row, count in zip(rows, counted, strict=True)]
    )
    largest = max(float(np.abs(relative).max()), 1e-12)
    norm = CenteredNorm(0, largest) if signed else Normalize(0, largest)
    figure, axes = _panels(at, None, rows=len(queries))
    for line, query, row in zip(axes, queries, relative, strict=True):
        row = row.reshape(at.keys.grid)
        for panel, ax in enumerate(line):
            over = row[at.key_frame(panel)]
            cells = ax.pcolormesh(
                *at.edges("keys"), over, cmap="PuOr_r" if signed else "inferno", norm=norm,
                alpha=0.1 + 0.8 * np.sqrt(np.abs(over) / largest),
            )  # fmt: skip
        panel, *pixel = at.place(_of_clip(query), "queries")
        line[panel].plot(
            pixel[1], pixel[0], "o", color="#56B4E9", markeredgecolor="black", markersize=7
        )
    _bar(figure, cells, axes, "× uniform")
    _caption(figure, f"{one.block} · {_called(one)} · from the dot · {WEIGHTS[one.instantiation]}")
    return figure


def time_by_time(affinity: AffinityMap, *, sample: int = 0) -> "Figure":
    """How much each frame attends to each: the mean share of its positions that goes there.

    Args:
        affinity: of `affinities`, of a video.
        sample: which clip of the batch.

    Returns:
        The figure; `measures.time_by_time` gives the numbers.

    Raises:
        ValueError: a map without frames, or weights that are not finite.
    """
    table = measures.time_by_time(affinity[sample])[0]
    frames, of_keys = table.shape
    figure = _new(1.6 + 0.5 * of_keys, 1.3 + 0.42 * frames)
    ax = figure.subplots()
    image = ax.imshow(table, cmap="cividis", vmin=0)
    if table.size <= 100:
        for (t, to), value in np.ndenumerate(table):
            dark = value < 0.6 * table.max()
            ax.text(
                to,
                t,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontsize=9,
            )
    ax.set(
        xlabel="to frame of the map",
        ylabel="from frame",
        xticks=range(of_keys),
        yticks=range(frames),
    )
    ax.set_title(f"{affinity.block}: share of the weight, %", fontsize=10)
    figure.colorbar(image, ax=ax, format=lambda value, _: f"{100 * value:.0f}%")
    return figure


def entropy(affinity: AffinityMap, clip: Any, *, sample: int = 0) -> "Figure":
    """To how many keys each position looks, in effect: exp(H_i), H_i the entropy of its shares.

    Args:
        affinity: of `affinities`.
        clip: what the network saw.
        sample: which clip of the batch.

    Returns:
        The figure; `measures.entropy` gives H.

    Raises:
        As `arrows`.
    """
    one, at = of_sample(affinity, clip, sample)
    effective = np.exp(measures.entropy(one)[0]).reshape(at.queries.grid)
    figure, axes = _panels(at, None)
    most = int(one.counted().max())
    for values, ax in zip(effective, axes[0], strict=True):
        cells = ax.pcolormesh(
            *at.edges("queries"), values, cmap="cividis", vmin=1, vmax=most, alpha=0.75
        )
    _bar(figure, cells, axes, "keys, in effect")
    _caption(
        figure,
        f"{one.block} · {_called(one)} · exp(entropy) of each position's shares, of {most} keys",
    )
    return figure


def received(
    affinity: AffinityMap, clip: Any, *, sample: int = 0, axes: "Sequence[Axes] | None" = None
) -> "Figure":
    """How much each position is looked at, by all: its mean share, as a multiple of the uniform share.

    Args:
        affinity: of `affinities`.
        clip: what the network saw.
        sample: which clip of the batch.
        axes: where to draw, one for each frame of the map; None makes a figure.

    Returns:
        The figure; `measures.received` gives the numbers.

    Raises:
        As `arrows`.
    """
    one, at = of_sample(affinity, clip, sample)
    heat = measures.received(one)[0].reshape(at.keys.grid)
    figure, (axes,) = _panels(at, axes)
    largest = max(float(heat.max()), 1e-12)
    for panel, ax in enumerate(axes):
        over = heat[at.key_frame(panel)]
        alpha = 0.1 + 0.8 * np.sqrt(over / largest)
        cells = ax.pcolormesh(
            *at.edges("keys"), over, cmap="inferno", vmin=0, vmax=largest, alpha=alpha
        )
    _bar(figure, cells, [axes], "× uniform")
    _caption(
        figure,
        f"{one.block} · {_called(one)} · how much each position is looked at by all · {WEIGHTS[one.instantiation]}",
    )
    return figure


def query_dependence(maps: Mapping[str, AffinityMap], *, sample: int = 0) -> "Figure":
    """How much the maps of different queries differ, block by block: the question of GCNet.

    Args:
        maps: of `affinities`.
        sample: which clip of the batch.

    Returns:
        The figure; `measures.query_dependence` gives the numbers.

    Raises:
        ValueError: no maps, or weights that are not finite.
    """
    if not maps:
        raise ValueError("maps must have at least one block; got none.")
    found = {name: measures.query_dependence(one[sample]) for name, one in maps.items()}
    figure = _new(8.0, 1.2 + 0.45 * len(found))
    labels = ("cosine distance of two queries' maps", "what the query tells of the key, nats")
    for ax, label, values in zip(
        figure.subplots(1, 2, sharey=True), labels, zip(*found.values(), strict=True), strict=True
    ):
        numbers = [float(value[0]) for value in values]
        bars = ax.barh(list(found), numbers, height=0.5, color=QUERY)
        ax.bar_label(bars, [f"{number:.3g}" for number in numbers], padding=3)
        ax.set(xlabel=label, xlim=(0, 1.2 * max(*numbers, 1e-3)))
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    return figure


def _called(affinity: AffinityMap) -> str:
    return affinity.instantiation.replace("_", " ")


def _of_clip(position: Any) -> tuple[int, ...]:
    """Frame, row and column; an image is frame 0."""
    return (*(0,) * (3 - len(position)), *map(int, position))


def _new(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white", dpi=110)


def _panels(
    at: Scene, axes: "Sequence[Axes] | None", rows: int = 1
) -> "tuple[Figure, list[list[Axes]]]":
    """For each row, one of the axes for each frame of the map, with the frame on it."""
    frames, height, width = at.pictures.shape[:3]
    if axes is None:
        columns = min(frames, COLUMNS)
        lines = rows * -(-frames // columns)
        across = min(1.55 * columns + 0.9, 12.5) if columns > 1 else 4.2  # inches
        figure = _new(across, lines * ((across - 0.9) / columns * height / width + 0.3) + 0.45)
        every = figure.subplots(lines, columns, squeeze=False).reshape(rows, -1)
        for ax in every[:, frames:].flat:
            ax.axis("off")
        panels = every[:, :frames].tolist()
    elif len(axes) != frames:
        raise ValueError(f"axes must be {frames}, one for each frame of the map; got {len(axes)}.")
    else:
        panels = [list(axes)]
    for line in panels:
        for ax, picture, number in zip(line, at.pictures, at.numbers, strict=True):
            ax.imshow(picture)
            ax.set(xticks=[], yticks=[], xlabel=f"frame {number}" if frames > 1 else "")
    return panels[0][0].figure, panels


def _bar(figure: "Figure", cells: Any, axes: "list[list[Axes]]", label: str) -> None:
    bar: Any = figure.colorbar(cells, ax=list(itertools.chain(*axes)), label=label, shrink=0.9)
    bar.solids.set_alpha(1)


def _caption(figure: "Figure", text: str) -> None:
    """What the picture shows, below it."""
    width = figure.bbox.width / figure.dpi  # inches
    figure.supxlabel("\n".join(textwrap.wrap(text, int(width * 13))), fontsize=9)


def _shares(row: Float[np.ndarray, "*keys"]) -> Float[np.ndarray, "*keys"]:
    """The shares of one row, of the same shape."""
    return measures.shares(row.reshape(-1)).reshape(row.shape)
