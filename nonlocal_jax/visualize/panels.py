"""What the pictures have in common: figures, rows of frames, colours and captions.

Matplotlib is imported by the functions, so importing the package does not load it.
"""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nonlocal_jax.lazy import extra
from nonlocal_jax.terminal import printable
from nonlocal_jax.visualize.scene import Scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, orange and purple of Okabe and Ito's palette, which colour-blind people can tell apart.
QUERY, POSITIVE, NEGATIVE = "#0072B2", "#E69F00", "#CC79A7"
# Names contain characters that Matplotlib would otherwise read as formulas: "$", or "_" in TeX.
AS_WRITTEN: dict[str, Any] = {"parse_math": False, "usetex": False}
MAX_COLUMNS = 8
CHARACTERS_PER_INCH = 13  # of a caption, at font size 9

TITLES = {
    "gaussian": "Gaussian",
    "embedded_gaussian": "embedded Gaussian",
    "dot_product": "dot product",
    "concatenation": "concatenation",
}
WEIGHTS = {
    "gaussian": "softmax weights, which sum to 1",
    "embedded_gaussian": "softmax weights, which sum to 1",
    "dot_product": "signed weights f/N, shown as shares of Σ|f|/N",
    "concatenation": "non-negative weights f/N, shown as shares of their sum",
}


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of this size in inches."""
    with extra("visualize"):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white", dpi=110)


def frame_panels(
    scene: Scene, axes: "Sequence[Axes] | None" = None, rows: int = 1
) -> "tuple[Figure, list[list[Axes]]]":
    """Draws the frames of a scene, one panel for each, once or several times below one another.

    Args:
        scene: The frames.
        axes: Existing axes, one for each frame; None creates a figure.
        rows: Number of times that the frames are drawn.

    Returns:
        The figure, and the axes as `rows` lists with one entry for each frame.
    """
    frames = len(scene.pictures)
    if axes is None:
        panels = _new_panels(scene, rows)
    elif len(axes) != frames:
        raise ValueError(f"axes must be {frames}, one for each frame of the map; got {len(axes)}.")
    else:
        panels = [list(axes)]
    for row in panels:
        for ax, picture, number in zip(row, scene.pictures, scene.numbers, strict=True):
            ax.imshow(picture)
            ax.set(xticks=[], yticks=[], xlabel=f"frame {number}" if frames > 1 else "")
    figure: Any = panels[0][0].figure
    return figure, panels


def _new_panels(scene: Scene, rows: int) -> "list[list[Axes]]":
    frames, height, width = scene.pictures.shape[:3]
    columns = min(frames, MAX_COLUMNS)
    lines = rows * -(-frames // columns)
    # Inches, with room for a colour bar (0.9) and, for each line, the frame numbers (0.3).
    figure_width = min(1.55 * columns + 0.9, 12.5) if columns > 1 else 4.2
    panel_height = (figure_width - 0.9) / columns * height / width
    figure = new_figure(figure_width, lines * (panel_height + 0.3) + 0.45)
    grid = figure.subplots(lines, columns, squeeze=False).reshape(rows, -1)
    for ax in grid[:, frames:].flat:
        ax.axis("off")
    panels: list[list[Axes]] = grid[:, :frames].tolist()
    return panels


def caption(figure: "Figure", *parts: str) -> None:
    """Writes a caption below the figure."""
    figure.supxlabel(wrapped(figure, " · ".join(parts)), fontsize=9, **AS_WRITTEN)


def wrapped(figure: "Figure", text: str) -> str:
    """Returns text in lines that fit the width of a figure; control characters are escaped."""
    inches = figure.bbox.width / figure.dpi
    width = max(int(inches * CHARACTERS_PER_INCH), 1)
    return textwrap.fill(printable(text), width, break_on_hyphens=False)
