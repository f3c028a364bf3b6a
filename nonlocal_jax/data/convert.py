"""From decoded frames to pixels: a part of each, turned as it is shown, scaled, in red, green and blue, by FFmpeg's filters."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nonlocal_jax.data import VideoError

LARGEST = 1 << 26  # pixels of a frame, 8192 × 8192
QUARTER = 90  # degrees


class Window(NamedTuple):
    """What of each frame is wanted, and how large.

    Attributes:
        top, left, height, width: of the part, pixels of the frame as it is shown; it begins with a whole chroma sample, so
            where colours have half the resolution, as in most files, up to a pixel above or left of this.
        size: (height, width) that the part is scaled to.
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]


Crop = Callable[[int, int], Window]  # from height and width of a frame as it is shown


class Convert:
    """From frames as they are stored to pixels as they are shown."""

    def __init__(self, path: Path, crop: Crop | None) -> None:
        """Nothing is set up before the first frame of a size comes.

        Args:
            path: of the file, for errors.
            crop: says what part is wanted, and of what size; None is the whole frame as it is.
        """
        self._path, self._crop = path, crop
        self._graphs: dict[tuple[Any, ...], Any] = {}

    def __call__(self, frame: Any) -> np.ndarray:
        """(height, width, 3), uint8, of an `av.VideoFrame`.

        Raises:
            VideoError: it is too large, or cannot be converted.
        """
        import av

        try:
            return self._shown(frame)
        except av.FFmpegError as error:
            raise VideoError(
                f"{self._path}: a frame cannot be converted ({words(error)})."
            ) from error

    def _shown(self, frame: Any) -> np.ndarray:
        check_size(self._path, frame.width, frame.height)
        turns = round(frame.rotation / QUARTER) % 4  # counterclockwise
        kind = (frame.width, frame.height, frame.format.name, turns)
        if kind not in self._graphs:
            self._graphs[kind] = (
                None if self._crop is None else self._graph(frame, self._crop, turns)
            )
        graph = self._graphs[kind]
        if graph is None:
            pixels = frame.to_ndarray(format="rgb24")
        else:
            graph.push(frame)
            pixels = _pixels(graph.pull())
        return np.rot90(pixels, turns)

    def _graph(self, frame: Any, crop: Crop, turns: int) -> Any:
        """FFmpeg's filters: the part is cut out before it is scaled and converted to RGB; None where that is nothing."""
        import av

        height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        window = crop(height, width)
        inside = window.top >= 0 and window.left >= 0 and window.height > 0 and window.width > 0
        if not inside or window.top + window.height > height or window.left + window.width > width:
            raise ValueError(
                f"a window must lie inside the frame of {height}×{width} pixels; got {window}."
            )
        check_size(self._path, *window.size)
        top, left, rows, columns = _as_stored(window, height, width, turns)
        size = window.size[::-1] if turns % 2 else window.size
        whole = (rows, columns) == (frame.height, frame.width)
        if whole and size == (rows, columns):
            return None
        graph = av.filter.Graph()
        graph.threads = (
            1  # threads of its own cost more than they bring, and other clips want the cores
        )
        filters = [
            graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1)
            )
        ]
        if not whole:
            across, down = (
                4 // frame.format.chroma_width(4),
                4 // frame.format.chroma_height(4),
            )  # pixels of a chroma sample
            filters.append(
                graph.add(
                    "crop", f"{columns}:{rows}:{left - left % across}:{top - top % down}:exact=1"
                )
            )
        if size != (rows, columns):
            filters.append(graph.add("scale", f"{size[1]}:{size[0]}:flags=bilinear:interl=-1"))
            if (
                "yuv" in frame.format.name
            ):  # RGB after that is quicker, and nearer to scaled RGB, than in one step
                filters.append(graph.add("format", frame.format.name))
        filters += [
            graph.add("scale", "flags=bilinear:interl=-1:in_chroma_loc=left"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*filters).configure()
        return graph


def _pixels(frame: Any) -> np.ndarray:
    """A view of a frame in rgb24, whose lines may be longer than its pixels."""
    plane = frame.planes[0]
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
        : frame.height, : 3 * frame.width
    ]
    return lines.reshape(frame.height, frame.width, 3)


def _as_stored(window: Window, height: int, width: int, turns: int) -> tuple[int, int, int, int]:
    """The window (top, left, height, width) of a frame before it is turned counterclockwise."""
    top, left, rows, columns = window[:4]
    for _ in range(
        turns
    ):  # undo one turn: what is at (row, column) was at (column, width - row) of the frame before it
        top, left, rows, columns = left, height - top - rows, columns, rows
        height, width = width, height
    return top, left, rows, columns


def check_size(path: Path, width: int, height: int) -> None:
    """Raise a `VideoError` for frames that are too large."""
    if width * height > LARGEST:
        raise VideoError(
            f"{path}: frames must have at most {LARGEST:,} pixels; they have {width}×{height}."
        )


def words(error: BaseException) -> str:
    """What an error of FFmpeg's says, without its number."""
    return getattr(error, "strerror", None) or str(error)
