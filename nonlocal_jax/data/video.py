"""Exact random access to the frames of video files, by PyAV (FFmpeg).

Frame i is the i-th frame that decoding the whole file produces, at any frame rate, constant or
variable, and it is equal to that frame bit for bit. (In a damaged file a decoder fills gaps with
what it decoded before, so there a frame may look different.)

Access is fast because few frames are decoded. The index of the file, or else its packets, tells
when each frame is shown. Decoding starts at the last keyframe before a requested frame, and skips
frames that are neither requested nor needed to predict others. Times are checked while decoding. If
they are wrong or look wrong, the next slower method is used; the slowest decodes everything. Memory
does not grow with the length of the video, apart from a few numbers per frame.

Files are not trusted: only the formats in `nonlocal_jax.data.decode.container.FORMATS` are opened,
only with the protocol `file`, and only if a frame has at most `MAX_FRAME_PIXELS` pixels. Remote
files, such as gs://bucket/video.mp4, are fetched as a whole before they are decoded.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from nonlocal_jax.data import VideoError
from nonlocal_jax.data.decode import seeking, timeline
from nonlocal_jax.data.decode.container import Container
from nonlocal_jax.data.decode.conversion import (
    MAX_FRAME_PIXELS,
    Converter,
    Crop,
    Window,
    ffmpeg_message,
)
from nonlocal_jax.data.decode.timeline import TIME_ROUNDING, Timeline, WrongTimesError
from nonlocal_jax.files import PathLike, as_path

MAX_READ_BYTES = 1 << 32  # an hour of 112×112 pixels at 30 frames a second
# Frames to decode before converting them. Interleaving the two frame by frame thrashes the cache.
FRAMES_PER_BLOCK = 8
DEFAULT_RATE = 25.0  # frames a second; FFmpeg assumes it for files that do not say

Result = TypeVar("Result")

__all__ = ["MAX_FRAME_PIXELS", "MAX_READ_BYTES", "Crop", "Timeline", "Video", "Window"]


class Video:
    """A video file, opened by `with`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from nonlocal_jax.data import stand_in
    >>> file = Path(tempfile.mkdtemp()) / "up.mp4"
    >>> stand_in.write(file, np.zeros((7, 48, 64, 3), np.uint8), rate=25)
    >>> with Video(file) as video:
    ...     len(video), float(video.rate), video.read([6, 0]).shape
    (7, 25.0, (2, 48, 64, 3))
    """

    def __init__(
        self,
        path: PathLike,
        *,
        threads: int = 1,
        max_frame_pixels: int = MAX_FRAME_PIXELS,
        max_read_bytes: int = MAX_READ_BYTES,
    ) -> None:
        """Stores the arguments; `with` opens the file.

        Args:
            path: The file.
            threads: Threads of the decoder. 1 is best if many files are decoded side by side; 0
                uses all cores.
            max_frame_pixels: Frames with more pixels raise an error, before and after scaling.
            max_read_bytes: `read` raises an error if its result would be larger.
        """
        self.path = as_path(path)
        self._threads = threads
        self._max_frame_pixels, self._max_read_bytes = max_frame_pixels, max_read_bytes
        self._timeline: Timeline | None = None

    def __enter__(self) -> "Video":
        """Opens the file.

        Raises:
            VideoError: The file is missing or empty, its format is not supported, or it has no
                video stream.
        """
        self._container = Container(self.path, self._threads, self._max_frame_pixels)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._container.close()

    def __len__(self) -> int:
        """Returns the number of frames."""
        return self.timeline.count

    @property
    def rate(self) -> float:
        """Average number of frames a second, from the times of the first and the last frame.

        If the rate that the file states agrees with them up to rounding, it is the stated one. It
        is also used for a single frame, and for a file without times.

        Raises:
            VideoError: The file has no frame or cannot be read.
        """
        stream = self._container.stream
        stated = [float(rate) for rate in (stream.guessed_rate, stream.average_rate) if rate]
        intervals = len(self) - 1
        duration = self.timeline.span * self.time_base
        if not intervals or not duration:
            return stated[0] if stated else DEFAULT_RATE
        for rate in stated:
            if abs(intervals / rate - duration) <= TIME_ROUNDING:
                return rate
        return float(intervals / duration)

    @property
    def time_base(self) -> Fraction:
        """Length in seconds of one unit of the frames' times, `pts`."""
        base = self._container.stream.time_base
        return Fraction(base.numerator, base.denominator) if base else Fraction(1, 1000)

    def seconds(self, indices: np.ndarray) -> np.ndarray:
        """Returns when frames are shown, in seconds after the first frame."""
        times = self.timeline.times
        if times is None:
            return np.asarray(indices) / self.rate
        return (np.asarray(times)[indices] - times[0]) * float(self.time_base)

    @property
    def timeline(self) -> Timeline:
        """When each frame is shown.

        Raises:
            VideoError: The file has no frame or cannot be read.
        """
        if self._timeline is None:
            self._timeline = self._first_timeline(
                timeline.index_timeline, timeline.packet_timeline, timeline.decoded_timeline
            )
        return self._timeline

    def _first_timeline(self, *readers: Callable[[Container], Timeline | None]) -> Timeline:
        """Returns the result of the first reader that has one."""
        import av

        try:
            results = (reader(self._container) for reader in readers)
            result = next(filter(None, results))
        except av.FFmpegError as error:
            message = ffmpeg_message(error)
            raise VideoError(f"{self.path}: cannot be read ({message}).") from error
        if not result.count:
            raise VideoError(f"{self.path}: its video stream has no frame.")
        return result

    def _use_slower_timeline(self) -> None:
        """Replaces a timeline that proved wrong by that of the next slower method."""
        readers = [timeline.packet_timeline, timeline.decoded_timeline]
        if not self.timeline.step:  # it was read from the packets already
            readers = [timeline.decoded_timeline]
        self._timeline = self._first_timeline(*readers)

    def retry_on_wrong_times(self, work: Callable[[], Result]) -> Result:
        """Calls `work`, and calls it again whenever the timeline that it used proves wrong.

        Args:
            work: Decodes frames with `decode`. It must be able to start over.

        Returns:
            The result of `work`.

        Raises:
            VideoError: The file has fewer frames than its timeline claimed, and `work` asked for a
                missing one.
        """
        claimed = len(self)
        while True:
            try:
                return work()
            except WrongTimesError:
                self._use_slower_timeline()
            except IndexError as error:
                if len(self) >= claimed:
                    raise
                raise VideoError(
                    f"{self.path}: it has {len(self)} frames that can be decoded, not {claimed}."
                ) from error

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        crop: Crop | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads frames, or a part of each, by their number.

        Args:
            indices: Numbers of the frames, in any order. Repeated ones are decoded once.
            crop: Chooses the part of each frame and the size to scale it to. It is called with
                height and width of the frame as it is shown, after the flip and the rotation that
                the file asks for. None reads the whole frame as it is.
            out: Array to write to. None allocates one.

        Returns:
            (n, height, width, 3), uint8, RGB.

        Raises:
            IndexError: There is no frame with that number.
            VideoError: A frame cannot be decoded or differs in size from the others, or the result
                would take more than `max_read_bytes`.
        """
        work = functools.partial(self._read, np.asarray(indices), crop, out)
        return self.retry_on_wrong_times(work)

    def _read(self, indices: np.ndarray, crop: Crop | None, out: np.ndarray | None) -> np.ndarray:
        convert = Converter(self.path, crop, self._max_frame_pixels)
        places: dict[int, list[int]] = {}  # rows of the result by the number of the frame
        for place, index in enumerate(indices.tolist()):
            places.setdefault(index, []).append(place)
        frames = self.decode(places)
        while block := list(itertools.islice(frames, FRAMES_PER_BLOCK)):
            for index, frame in block:
                pixels = convert(frame)
                if out is None:
                    out = self._allocate(len(indices), pixels)
                if pixels.shape != out.shape[1:]:
                    raise VideoError(
                        f"{self.path}: frame {index} is {pixels.shape[:2]}, "
                        f"others are {out.shape[1:3]}."
                    )
                out[places[index]] = pixels
        if out is None or not len(indices):
            raise IndexError("indices must name at least one frame; got none.")
        return out

    def _allocate(self, count: int, pixels: np.ndarray) -> np.ndarray:
        if count * pixels.size > self._max_read_bytes:
            raise VideoError(
                f"{self.path}: {count} frames of {pixels.shape[:2]} take over "
                f"{self._max_read_bytes:,} bytes."
            )
        return np.empty((count, *pixels.shape), np.uint8)

    def decode(self, indices: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Decodes frames, each once, mostly in ascending order.

        Call it within `retry_on_wrong_times`.

        Yields:
            The number of a frame and the frame as it is stored, an `av.VideoFrame`.

        Raises:
            IndexError: There is no frame with that number.
            VideoError: A frame cannot be decoded.
        """
        import av

        requested = sorted(set(indices))
        if requested and not 0 <= requested[0] <= requested[-1] < len(self):
            raise IndexError(
                f"{self.path} has frames 0 to {len(self) - 1}; "
                f"got {requested[0]} to {requested[-1]}."
            )
        missing = set(requested)
        # A stream that breaks the rules of its format may not yield all frames when decoding starts
        # at keyframes. What is missing then is decoded from the start.
        methods = [seeking.decode_in_order]
        if self.timeline.keyframes:
            methods.insert(0, seeking.decode_near_keyframes)
        reason = ""
        for method in methods:
            reason = ""
            try:
                for index, frame in method(self._container, self.timeline, sorted(missing)):
                    if index in missing:
                        missing.remove(index)
                        yield index, frame
            except av.FFmpegError as error:
                reason = ffmpeg_message(error)
            if not missing:
                return
        if not reason and not self.timeline.exact:
            raise WrongTimesError  # everything was decoded, but no frame has some of the times
        reason = reason or "its packets end before"
        raise VideoError(
            f"{self.path}: frame {min(missing)} of {len(self)} cannot be decoded ({reason})."
        )
