"""From decoded frames to RGB pixels: cropped, scaled and oriented as a player shows them.

FFmpeg's filters do the work, on the part of the frame that is asked for.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from nonlocal_jax.data import VideoError
from nonlocal_jax.files import AnyPath

MAX_FRAME_PIXELS = 1 << 26  # 8192 × 8192; a small file can claim frames that fill the memory
# Kinds of side data of a frame have smaller numbers than this. FFmpeg 8 has 32 kinds.
MAX_SIDE_DATA_TYPES = 64


class Window(NamedTuple):
    """A part of each frame, and the size to scale it to.

    The part starts at a whole chroma sample. Where colours have half the resolution, as in most
    files, that is up to one pixel above or left of what was asked for.

    Attributes:
        top: First row of the part, in pixels of the frame as it is shown.
        left: First column.
        height: Rows of the part.
        width: Columns of the part.
        size: (height, width) after scaling.
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]


Crop = Callable[[int, int], Window]  # from height and width of a frame as it is shown


class Orientation(NamedTuple):
    """How a player flips and rotates the frames of a file, in this order.

    Attributes:
        is_flipped: Whether a frame is turned upside down, so that its first row becomes its last.
        turns: Quarter turns counterclockwise, from 0 to 3.
    """

    is_flipped: bool
    turns: int

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Converts (height, width) of a stored frame to that of the frame as it is shown."""
        return (width, height) if self.turns % 2 else (height, width)


class Converter:
    """Converts decoded frames to RGB pixels. Filters are built once for each kind of frame."""

    def __init__(
        self, path: AnyPath, crop: Crop | None, max_pixels: int = MAX_FRAME_PIXELS
    ) -> None:
        """Sets up nothing until the first frame is converted.

        Args:
            path: The file, for error messages.
            crop: Chooses the part of each frame and its size; None takes the whole frame as it is.
            max_pixels: Largest number of pixels of a frame, before and after scaling.
        """
        self._path, self._crop, self._max_pixels = path, crop, max_pixels
        self._graphs: dict[tuple[Any, ...], Any] = {}

    def __call__(self, frame: Any) -> np.ndarray:
        """Converts one frame.

        Args:
            frame: An `av.VideoFrame`.

        Returns:
            (height, width, 3), uint8.

        Raises:
            VideoError: The frame is too large or cannot be converted.
        """
        import av

        try:
            return self._convert(frame)
        except av.FFmpegError as error:
            reason = ffmpeg_message(error)
            raise VideoError(f"{self._path}: a frame cannot be converted ({reason}).") from error

    def _convert(self, frame: Any) -> np.ndarray:
        check_size(self._path, frame.width, frame.height, self._max_pixels)
        orientation = read_orientation(frame)
        key = (frame.width, frame.height, frame.format.name, orientation)
        if key not in self._graphs:
            self._graphs[key] = self._make_graph(frame, orientation)
        graph = self._graphs[key]
        if graph is None:
            pixels = frame.to_ndarray(format="rgb24")
        else:
            graph.push(frame)
            pixels = _pixel_view(graph.pull())
        if orientation.is_flipped:
            pixels = pixels[::-1]
        return np.rot90(pixels, orientation.turns)

    def _make_graph(self, frame: Any, orientation: Orientation) -> Any:
        """Builds the filters for frames of one kind; None if the whole frame is kept as it is."""
        if self._crop is None:
            return None
        height, width = orientation.shape(frame.height, frame.width)
        window = self._crop(height, width)
        _check_window(window, height, width)
        check_size(self._path, *window.size, self._max_pixels)
        rectangle = _stored_rectangle(window, height, width, orientation)
        size = orientation.shape(*window.size)
        is_whole = rectangle[2:] == (frame.height, frame.width)
        if is_whole and size == rectangle[2:]:
            return None
        return _filter_graph(frame, rectangle, size)


def _check_window(window: Window, height: int, width: int) -> None:
    is_positive = min(window.top, window.left) >= 0 and min(window.height, window.width) > 0
    bottom, right = window.top + window.height, window.left + window.width
    if not is_positive or bottom > height or right > width:
        raise ValueError(
            f"a window must lie inside the frame of {height}×{width} pixels; got {window}."
        )


Rectangle = tuple[int, int, int, int]  # top, left, rows, columns


def _stored_rectangle(
    window: Window, height: int, width: int, orientation: Orientation
) -> Rectangle:
    """Finds a window of the frame as it is shown in the frame as it is stored.

    Args:
        window: The window.
        height: Rows of the frame as it is shown.
        width: Columns, likewise.
        orientation: What turns the stored frame into the shown one.
    """
    top, left, rows, columns = window[:4]
    for _ in range(orientation.turns):
        # Undo one turn: (row, column) comes from (column, height - row) of the frame before it.
        top, left, rows, columns = left, height - top - rows, columns, rows
        height, width = width, height
    if orientation.is_flipped:
        top = height - top - rows
    return top, left, rows, columns


def _filter_graph(frame: Any, rectangle: Rectangle, size: tuple[int, int]) -> Any:
    """Builds FFmpeg filters that crop, scale and convert, in this order."""
    import av

    top, left, rows, columns = rectangle
    graph = av.filter.Graph()
    # Clips are decoded side by side, so more threads here only compete with their decoders.
    graph.threads = 1
    filters = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1)
        )
    ]
    if (rows, columns) != (frame.height, frame.width):
        # Cutting inside a chroma sample would shift the colours against the brightness.
        chroma_width = 4 // frame.format.chroma_width(4)  # in pixels
        chroma_height = 4 // frame.format.chroma_height(4)
        left, top = left - left % chroma_width, top - top % chroma_height
        filters.append(graph.add("crop", f"{columns}:{rows}:{left}:{top}:exact=1"))
    if (rows, columns) != size:
        filters.append(graph.add("scale", f"{size[1]}:{size[0]}:flags=bilinear:interl=-1"))
        if "yuv" in frame.format.name:
            # Scaling in YUV and converting afterwards is faster than doing both in one step, and
            # closer to scaling the RGB image.
            filters.append(graph.add("format", frame.format.name))
    filters += [
        graph.add("scale", "flags=bilinear:interl=-1:in_chroma_loc=left"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*filters).configure()
    return graph


def _pixel_view(frame: Any) -> np.ndarray:
    """Returns a view of an rgb24 frame, whose lines may be padded."""
    plane = frame.planes[0]
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    pixels = lines[: frame.height, : 3 * frame.width]
    return pixels.reshape(frame.height, frame.width, 3)


def read_orientation(frame: Any) -> Orientation:
    """Reads the orientation of a decoded frame from its display matrix.

    The matrix maps stored coordinates (x, y) to (a x + c y, b x + d y), where y points down. The
    result is that of FFmpeg's `autorotate`, except that other angles are rounded to quarter turns.
    """
    matrix = _display_matrix(frame)
    if matrix is None:
        return Orientation(is_flipped=False, turns=0)
    a, b, _, c, d = map(int, matrix[:5])
    # Each column is scaled to length 1. A matrix with an empty column, of a damaged file, rotates
    # by nothing.
    lengths = math.hypot(a, c), math.hypot(b, d)
    clockwise = math.atan2(b / lengths[1], a / lengths[0]) if all(lengths) else 0.0
    return Orientation(is_flipped=a * d < b * c, turns=round(-clockwise / (math.pi / 2)) % 4)


def _display_matrix(frame: Any) -> np.ndarray | None:
    """Returns the nine numbers of the display matrix; None if the frame has none."""
    try:
        side_data = frame.side_data
    except ValueError:
        # PyAV 18 and 19 fail if any side data is of a kind that FFmpeg added later, such as EXIF.
        side_data = _without_unknown_side_data(frame).side_data
    matrix = side_data.get("DISPLAYMATRIX")
    return None if matrix is None else np.frombuffer(matrix, np.int32)


def _without_unknown_side_data(frame: Any) -> Any:
    """Returns the frame without side data of kinds that PyAV does not know."""
    import av
    from av.sidedata.sidedata import Type

    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1)
    )
    known: set[Any] = {kind.value for kind in Type}
    deletions = [
        graph.add("sidedata", f"mode=delete:type={kind}")
        for kind in range(MAX_SIDE_DATA_TYPES)
        if kind not in known
    ]
    graph.link_nodes(source, *deletions, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def check_size(path: AnyPath, width: int, height: int, max_pixels: int = MAX_FRAME_PIXELS) -> None:
    """Raises a `VideoError` if frames are too large."""
    if width * height > max_pixels:
        raise VideoError(
            f"{path}: frames must have at most {max_pixels:,} pixels; they have {width}×{height}."
        )


def ffmpeg_message(error: BaseException) -> str:
    """Returns the message of an FFmpeg error without its number."""
    return getattr(error, "strerror", None) or str(error)
