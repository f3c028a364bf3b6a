"""Frames of video files by their number, by PyAV (FFmpeg): exact, and without decoding what no wanted frame needs.

Frame i is the i-th that a decoder of the whole file puts out, whatever the frame rate does, and equals it bit for bit. (In a
damaged file decoders make up what is missing from what they had before, so that there a frame may look otherwise.) To get
there quickly: the index of the file, or its packets undecoded, tells when each frame is shown; decoding starts at the last
keyframe before a wanted frame; frames that are not wanted, and that no other is predicted from, are not decoded. Times are
checked on the way; where they prove wrong, or look it, the next slower way is taken, and at last all is decoded. Memory does
not grow with the length of the video, but for a few numbers for each frame.

A file is hostile until it is read: only containers of `FORMATS` are opened, only by the protocol `file`, only frames of at most
`convert.LARGEST` pixels.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from nonlocal_jax.data import VideoError
from nonlocal_jax.data.convert import Convert, Crop, check_size, words

FORMATS = (
    "mov",
    "matroska",
    "avi",
    "mpegts",
    "mpeg",
    "flv",
    "asf",
    "ogg",
    "gif",
    "ivf",
    "jpeg_pipe",
    "png_pipe",
)
# Decoders that can leave out frames from which no other is predicted (HEVC's tell for their layer alone), and that can be asked
# for what they hold back before the end (MPEG-4's would repeat a frame).
SKIPPING = ("h264",)
HIDING, SHOWN = (
    ("vp8", "libvpx"),
    0x10,
)  # decoders with packets that are not shown; the bit of the first byte that says so
STARTS = 64  # packets that tell whether a file's B-frames are timed as such
UNTIMELY = (
    "mpeg4",
)  # decoders whose files often time B-frames by the order of decoding, as AVI has it
MOST = 1 << 32  # bytes of frames that are read at once, an hour of 112×112
AT_ONCE = 8  # frames that are decoded before they are converted: by turns, the two drive each other out of the caches


class _TimesError(Exception):
    """The timeline was wrong; a better one is in its place, and what was decoded by it counts for nothing."""


Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When the frames of a file are shown.

    Attributes:
        times: of each frame, ascending, in the units of the stream; None where the file does not say, and frames are counted.
        keyframes: times of those that decoding can start at, ascending.
        count: of the frames.
        sure: whether all frames were decoded for it; else it is checked on the way.
        step: from each time to the next, where the index says that they are regular; 0 where every packet was seen.
    """

    times: Sequence[int] | None
    keyframes: Sequence[int]
    count: int
    sure: bool = False
    step: int = 0


class Video:
    """A video file, from `with` to the end of it.

    >>> import tempfile
    >>> from nonlocal_jax.data import stand_in
    >>> file = Path(tempfile.mkdtemp()) / "up.mp4"
    >>> stand_in.write(file, np.zeros((7, 48, 64, 3), np.uint8), rate=25)
    >>> with Video(file) as video:
    ...     len(video), float(video.rate), video.read([6, 0]).shape
    (7, 25.0, (2, 48, 64, 3))
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Nothing is opened yet.

        Args:
            path: of the file.
            threads: of the decoder; 1 where many files are decoded side by side, 0 to let it take all cores.
        """
        self.path = path
        self._threads = threads
        self._timeline: Timeline | None = None

    def __enter__(self) -> "Video":
        """Open the file.

        Raises:
            VideoError: there is no such file, or it is none of the containers that are read, or has no video in it.
        """
        try:
            if not self.path.is_file():
                raise VideoError(f"{self.path}: there is no such file.")
            if not self.path.stat().st_size:
                raise VideoError(f"{self.path}: the file is empty.")
        except OSError as error:
            raise VideoError(f"{self.path}: cannot be opened ({words(error)}).") from error
        self._open()
        return self

    def _open(self) -> None:
        import av

        options = {"protocol_whitelist": "file", "format_whitelist": ",".join(FORMATS)}
        # A title that is not UTF-8 is no reason to stop, as it would be for PyAV before 19.
        lenient: dict[str, Any] = (
            {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        )
        try:
            self._container = av.open(f"file:{self.path}", options=options, **lenient)
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"{self.path}: no video that can be read ({words(error)}).") from error
        try:
            covers = av.stream.Disposition.attached_pic
            videos = [
                stream
                for stream in self._container.streams.video
                if not stream.disposition & covers
            ]
            if not videos:
                others = {
                    "a cover" if stream.type == "video" else stream.type
                    for stream in self._container.streams
                }
                raise VideoError(
                    f"{self.path}: no video stream, only {', '.join(sorted(others)) or 'nothing'}."
                )
            self._stream = videos[0]
            codec = self._stream.codec_context
            if codec is None:
                raise VideoError(f"{self.path}: its video is of no codec that can be decoded.")
            check_size(self.path, codec.width, codec.height)
            codec.thread_count = self._threads
            if self._threads != 1:
                codec.thread_type = "AUTO"
        except BaseException:
            self._container.close()
            raise
        self._at_start = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._container.close()

    def __len__(self) -> int:
        """How many frames there are."""
        return self.timeline.count

    @property
    def rate(self) -> float:
        """Frames a second, on average."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        if rate:
            return float(rate)
        times = self.timeline.times
        if times is None or len(times) < 2:
            return 25.0  # as FFmpeg takes for what does not say
        return float((len(times) - 1) / ((times[-1] - times[0]) * self.time_base))

    @property
    def time_base(self) -> Fraction:
        """Seconds of a unit of the times of frames, `pts`."""
        base = self._stream.time_base
        return Fraction(base.numerator, base.denominator) if base else Fraction(1, 1000)

    def seconds(self, indices: np.ndarray) -> np.ndarray:
        """When frames are shown, from that of the first one on."""
        times = self.timeline.times
        if times is None:
            return np.asarray(indices) / self.rate
        return (np.asarray(times)[indices] - times[0]) * float(self.time_base)

    @property
    def timeline(self) -> Timeline:
        """When each frame is shown.

        Raises:
            VideoError: no frame.
        """
        if self._timeline is None:
            self._timeline = self._first_of(self._from_index, self._from_packets, self._from_frames)
        return self._timeline

    def _first_of(self, *ways: Callable[[], Timeline | None]) -> Timeline:
        import av

        try:
            timeline = next(filter(None, (way() for way in ways)))
        except av.FFmpegError as error:
            raise VideoError(f"{self.path}: cannot be read ({words(error)}).") from error
        if not timeline.count:
            raise VideoError(f"{self.path}: its video stream has no frame.")
        return timeline

    def _wrong_times(self) -> _TimesError:
        """Take the next slower way to a timeline."""
        ways = (
            (self._from_packets, self._from_frames) if self.timeline.step else (self._from_frames,)
        )
        self._timeline = self._first_of(*ways)
        return _TimesError()

    def surely(self, work: Callable[[], Result]) -> Result:
        """What `work` gives; it is begun again where the times that it went by turn out to be wrong.

        Raises:
            VideoError: there are fewer frames than there seemed to be, and one of those that lack is asked for.
        """
        before = len(self)
        while True:
            try:
                return work()
            except _TimesError:
                continue
            except IndexError as error:
                if len(self) < before:
                    raise VideoError(
                        f"{self.path}: it has {len(self)} frames that can be decoded, not {before}."
                    ) from error
                raise

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        crop: Crop | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Frames, or a part of each, by their number.

        Args:
            indices: of the frames, in any order, repeated or not; each is decoded once.
            crop: says what part is wanted, and of what size; it is given height and width of the frame as it is shown, that is
                after the rotation that the file asks for. None is the whole frame as it is.
            out: an array to write to; None makes one.

        Returns:
            (n, height, width, 3), uint8, red, green, blue.

        Raises:
            IndexError: a frame that there is not.
            VideoError: a frame that cannot be decoded, or is of another size than the others; more than `MOST` bytes.
        """
        return self.surely(functools.partial(self._read, np.asarray(indices), crop, out))

    def _read(self, indices: np.ndarray, crop: Crop | None, out: np.ndarray | None) -> np.ndarray:
        convert = Convert(self.path, crop)
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices.tolist()):
            places.setdefault(index, []).append(place)
        frames = self.decode(places)
        while some := list(itertools.islice(frames, AT_ONCE)):
            for index, frame in some:
                pixels = convert(frame)
                if out is None:
                    if len(indices) * pixels.size > MOST:
                        raise VideoError(
                            f"{self.path}: {len(indices)} frames of {pixels.shape[:2]} take over {MOST:,} bytes."
                        )
                    out = np.empty((len(indices), *pixels.shape), np.uint8)
                if pixels.shape != out.shape[1:]:
                    raise VideoError(
                        f"{self.path}: frame {index} is {pixels.shape[:2]}, others are {out.shape[1:3]}."
                    )
                for place in places[index]:
                    out[place] = pixels
        if out is None or not len(indices):
            raise IndexError("indices must name at least one frame; got none.")
        return out

    def decode(self, indices: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Pairs of a number and its frame, `av.VideoFrame`, as it is stored; each of `indices` once, mostly ascending.

        To be called within `surely`.

        Raises:
            IndexError, VideoError: as `read`.
        """
        import av

        wanted = sorted(set(indices))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(self):
            raise IndexError(
                f"{self.path} has frames 0 to {len(self) - 1}; got {wanted[0]} to {wanted[-1]}."
            )
        left = set(wanted)
        # A stream that does not keep to the rules is decoded again, as a whole.
        ways = (self._seeking, self._in_order) if self.timeline.keyframes else (self._in_order,)
        reason = ""
        for way in ways:
            try:
                reason = ""
                for index, frame in way(sorted(left)):
                    if index in left:
                        left.remove(index)
                        yield index, frame
            except av.FFmpegError as error:
                reason = words(error)
            if not left:
                return
        if not reason and not self.timeline.sure:
            raise self._wrong_times()  # all was decoded, and some of the times were of no frame
        reason = reason or "its packets end before"
        raise VideoError(
            f"{self.path}: frame {min(left)} of {len(self)} cannot be decoded ({reason})."
        )

    def _seeking(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """From keyframe to keyframe; what is neither wanted nor needed is skipped."""
        times, keyframes = self.timeline.times, self.timeline.keyframes
        assert times is not None
        numbers = {times[index]: index for index in wanted}
        groups: dict[int, set[int]] = {}  # the wanted times by the keyframe before them
        for time in numbers:
            groups.setdefault(max(bisect.bisect_right(keyframes, time) - 1, 0), set()).add(time)
        for keyframe, group in groups.items():
            for frame in self._decode_from(keyframe, group):
                if frame.pts in numbers:
                    yield numbers[frame.pts], frame

    def _decode_from(self, keyframe: int, wanted: set[int]) -> Iterator[Any]:
        """Frames from a keyframe on, until the wanted ones have come."""
        last, step, sure = max(wanted), self.timeline.step, self.timeline.sure
        start, packets = self._packets_from(keyframe, min(wanted))
        codec = self._stream.codec_context  # another, where the file was opened again
        seen: set[int] = set()
        due, newest = start, -math.inf

        def checked(frames: Iterable[Any]) -> Iterator[Any]:
            nonlocal due, newest
            for frame in frames:
                if not sure and (frame.pts is None or frame.pts <= newest):
                    raise self._wrong_times()
                newest = frame.pts
                while step and due <= min(newest, last):
                    if due not in seen:
                        raise self._wrong_times()
                    seen.remove(due)
                    due += step
                yield frame

        for packet in packets:
            if step and packet.pts is not None:
                seen.add(packet.pts)
                if packet.pts < start:
                    raise self._wrong_times()
            if codec.name not in SKIPPING:
                for frame in checked(packet.decode()):
                    yield frame
                    if frame.pts is not None and frame.pts >= last:
                        return
                continue
            codec.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
            if wanted or packet.dts is None:  # else it is read for its time alone
                yield from checked(packet.decode())
            wanted.discard(packet.pts)
            if not wanted and packet.dts is not None and (not step or packet.dts >= last):
                yield from checked(
                    codec.decode(None)
                )  # what it holds back; no later packet changes it
                return

    def _packets_from(self, keyframe: int, time: int) -> tuple[int, Iterator[Any]]:
        """From a keyframe on, or from one before it where that one turns out to be shown after `time`; and what is due then."""
        for seek_to in reversed(self.timeline.keyframes[: keyframe + 1]):
            self._container.seek(seek_to, stream=self._stream, backward=True)
            self._stream.codec_context.flush_buffers()
            self._at_start = False
            packets = itertools.dropwhile(
                lambda packet: not packet.is_keyframe, self._container.demux(self._stream)
            )
            first = next(packets, None)
            if first is not None and first.pts is not None and first.pts <= time:
                return seek_to, itertools.chain([first], packets)
        assert self.timeline.times is not None
        self._rewind()
        return self.timeline.times[0], self._container.demux(self._stream)

    def _in_order(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """From the start, all of it, as anyone's decoder does."""
        times = self.timeline.times
        numbers = None if times is None else {time: i for i, time in enumerate(times)}
        for count, frame in enumerate(self._all()):
            index = count if numbers is None else numbers.get(frame.pts, -1)
            if index != count and not self.timeline.sure:
                raise self._wrong_times()
            yield index, frame
            if index >= wanted[-1]:
                return

    def _all(self) -> Iterator[Any]:
        self._rewind()
        for packet in self._container.demux(self._stream):
            yield from packet.decode()

    def _rewind(self) -> None:
        """To the first packet, which not every file can be asked for: so it is opened again."""
        if not self._at_start:
            self._container.close()
            self._open()
        self._at_start = False

    def _from_index(self) -> Timeline | None:
        """From the sample table of an MP4 file, whose times are those of decoding: a constant frame rate tells the rest."""
        stream = self._stream
        if (
            "mp4" not in self._container.format.name
            or not stream.frames
            or stream.start_time is None
        ):
            return None
        entries = [
            (entry.timestamp, entry.is_keyframe, entry.is_discard) for entry in stream.index_entries
        ]
        decoded = [time for time, _, _ in entries]
        steps = set(np.diff(decoded).tolist())
        if (
            len(entries) != stream.frames
            or len(steps) != 1
            or any(discard for _, _, discard in entries)
        ):
            return None
        (step,) = steps
        if step <= 0 or not self._starts_well():
            return None
        times = range(stream.start_time, stream.start_time + step * len(entries), step)
        delay = (
            stream.start_time - decoded[0]
        )  # a keyframe is shown as much later than it is decoded as the first one is
        keyframes = [time + delay for time, is_keyframe, _ in entries if is_keyframe]
        return Timeline(times, keyframes, len(times), step=step)

    def _starts_well(self) -> bool:
        """Whether the first packet is a keyframe, nothing is shown before it, and B-frames are timed as such."""
        self._rewind()
        packets, codec = self._container.demux(self._stream), self._stream.codec_context
        first = next(packets)
        if not first.is_keyframe or first.pts is None or first.pts != self._stream.start_time:
            return False
        latest, reordered, whole = first.pts, False, False
        for packet in itertools.islice(packets, STARTS):
            if packet.size == 0:
                whole = True
                break
            if packet.pts is None or packet.pts < first.pts:
                return False
            reordered, latest = reordered or packet.pts < latest, max(packet.pts, latest)
            whole = packet.dts is not None and packet.dts >= first.pts
            if whole and (reordered or not codec.has_b_frames):
                break
        return whole and (not codec.has_b_frames or (reordered and codec.name not in UNTIMELY))

    def _from_packets(self) -> Timeline | None:
        """From all packets, undecoded, where the times of frames that are not shown as they are decoded look right."""
        times, keyframes, starts = [], [], None
        codec = self._stream.codec_context
        hidden, reordered, untimely = (
            codec.name in HIDING,
            codec.has_b_frames,
            codec.name in UNTIMELY,
        )
        self._rewind()
        for packet in self._container.demux(self._stream):
            if (
                packet.size == 0
                or packet.is_discard
                or (hidden and not memoryview(packet)[0] & SHOWN)
            ):
                continue
            if packet.pts is None:
                return None
            times.append(packet.pts)
            if packet.is_keyframe:
                keyframes.append(packet.pts)
            if starts is None:
                starts = packet.is_keyframe
        ascending = sorted(times)
        if len(set(times)) < len(times) or (
            reordered and (untimely or (times == ascending and len(times) > 1))
        ):
            return None
        if times and not (starts and min(times) == keyframes[0]):
            return self._without_lost_frames(times, sorted(keyframes))
        return Timeline(ascending, sorted(keyframes), len(times))

    def _without_lost_frames(
        self, times: Sequence[int], keyframes: Sequence[int]
    ) -> Timeline | None:
        """Of a file that was cut at no keyframe: decoding up to the second keyframe shows what is lost at the start."""
        second = keyframes[1] if len(keyframes) > 1 else math.inf
        shown: list[int] = []
        for frame in self._all():
            if frame.pts is None or (shown and frame.pts <= shown[-1]):
                return None
            if frame.pts >= second:
                break
            shown.append(frame.pts)
        shown += sorted(time for time in times if time >= second)
        return Timeline(shown, keyframes, len(shown))

    def _from_frames(self) -> Timeline:
        """By decoding all of it; times in another order than the frames' are none."""
        times, keyframes = [], []
        for frame in self._all():
            times.append(frame.pts)
            if frame.key_frame:
                keyframes.append(frame.pts)
        if None in times or any(after <= before for before, after in itertools.pairwise(times)):
            return Timeline(None, (), len(times), sure=True)
        return Timeline(times, keyframes, len(times), sure=True)
