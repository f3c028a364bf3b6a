"""Decoding the requested frames of a file, and as few others as possible.

Decoding starts at the last keyframe before a requested frame. Frames that are not requested and
that no other frame is predicted from are skipped. On the way, the times of packets and frames are
compared with the timeline, and `WrongTimesError` is raised where they differ. `data/video.py`
catches it, and decodes again with times that are read from the packets or the frames.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nonlocal_jax.data.decode.container import Container
from nonlocal_jax.data.decode.timeline import Timeline, WrongTimesError

# Decoders that can skip frames that no other is predicted from, and that can be drained in the
# middle of a stream. HEVC's decoder skips by temporal layer only; MPEG-4's repeats a frame when it
# is drained.
SKIPPING_DECODERS = ("h264",)

IndexedFrame = tuple[int, Any]  # number of the frame, av.VideoFrame


def decode_near_keyframes(
    container: Container, timeline: Timeline, indices: Sequence[int]
) -> Iterator[IndexedFrame]:
    """Decodes the requested frames, starting from the keyframe before each group of them."""
    times, keyframes = timeline.times, timeline.keyframes
    assert times is not None
    index_of_time = {times[index]: index for index in indices}
    groups: dict[int, set[int]] = {}  # the requested times by the number of the keyframe before
    for time in index_of_time:
        keyframe = max(bisect.bisect_right(keyframes, time) - 1, 0)
        groups.setdefault(keyframe, set()).add(time)
    for keyframe, group in groups.items():
        for frame in decode_from_keyframe(container, timeline, keyframe, group):
            if frame.pts in index_of_time:
                yield index_of_time[frame.pts], frame


def decode_in_order(
    container: Container, timeline: Timeline, indices: Sequence[int]
) -> Iterator[IndexedFrame]:
    """Decodes every frame from the start to the last requested one, as any player does."""
    index_of_time = None
    if timeline.times is not None:
        index_of_time = {time: index for index, time in enumerate(timeline.times)}
    for count, frame in enumerate(container.frames()):
        index = count if index_of_time is None else index_of_time.get(frame.pts, -1)
        if index != count and not timeline.exact:
            raise WrongTimesError
        yield index, frame
        if index >= indices[-1]:
            return


def decode_from_keyframe(
    container: Container, timeline: Timeline, keyframe: int, requested: set[int]
) -> Iterator[Any]:
    """Decodes from a keyframe on until all requested frames were produced.

    Args:
        container: The open file.
        timeline: When its frames are shown.
        keyframe: Number of the keyframe.
        requested: Times of the requested frames.
    """
    start, packets = _packets_before(container, timeline, keyframe, min(requested))
    checks = _TimeChecks(timeline, start, max(requested))
    # Only now: seeking may have opened the file again, with another decoder.
    codec = container.codec
    if codec.name in SKIPPING_DECODERS:
        yield from _decode_needed_frames(codec, packets, requested, checks)
    else:
        yield from _decode_every_frame(packets, max(requested), checks)


def _packets_before(
    container: Container, timeline: Timeline, keyframe: int, first_requested: int
) -> tuple[int, Iterator[Any]]:
    """Seeks to a keyframe that is shown no later than the first requested frame.

    Seeking goes by the container's index, which may point past the keyframe asked for. In that case
    the keyframes before it are tried in turn, and finally the start of the file.

    Returns:
        The time of the first frame to expect, and the packets from there on.
    """
    for time in reversed(timeline.keyframes[: keyframe + 1]):
        packets = container.packets_from(time)
        first = next(packets, None)
        if first is not None and first.pts is not None and first.pts <= first_requested:
            return time, itertools.chain([first], packets)
    assert timeline.times is not None
    return timeline.times[0], container.packets()


def _decode_every_frame(packets: Iterator[Any], last: int, checks: "_TimeChecks") -> Iterator[Any]:
    for packet in packets:
        checks.packet(packet.pts)
        for frame in checks.frames(packet.decode()):
            yield frame
            if frame.pts is not None and frame.pts >= last:
                return


def _decode_needed_frames(
    codec: Any, packets: Iterator[Any], requested: set[int], checks: "_TimeChecks"
) -> Iterator[Any]:
    pending = set(requested)
    for packet in packets:
        checks.packet(packet.pts)
        # NONREF makes the decoder skip this frame unless another one is predicted from it.
        is_needed = packet.pts is None or packet.pts in pending
        codec.skip_frame = "DEFAULT" if is_needed else "NONREF"
        # With nothing pending, packets are read for their times alone. The empty packet at the end
        # of the file has no time, and makes the decoder hand out what it still holds.
        if pending or packet.dts is None:
            yield from checks.frames(packet.decode())
        pending.discard(packet.pts)
        if not pending and packet.dts is not None and checks.is_settled(packet.dts):
            # All requested packets were sent, and no later packet changes their frames: draining
            # the decoder yields those that it holds back for reordering.
            yield from checks.frames(codec.decode(None))
            return


class _TimeChecks:
    """Compares the times of packets and frames with the timeline.

    Decoded frames must come in ascending order. A timeline that was read from an index assumes a
    constant frame rate, which is checked as well: there must be a packet for every time that has
    passed, and no packet may be shown before the keyframe that decoding started from.
    """

    def __init__(self, timeline: Timeline, start: int, last: int) -> None:
        """Starts the checks.

        Args:
            timeline: The timeline to compare with.
            start: Time of the first frame to expect.
            last: Time of the last requested frame. Later times are not checked.
        """
        self._step, self._exact = timeline.step, timeline.exact
        self._start, self._last = start, last
        self._expected = start  # the earliest time for which no packet was accounted yet
        self._packet_times: set[int] = set()
        self._newest: float = -math.inf

    def packet(self, time: int | None) -> None:
        """Checks the display time of a packet that was read."""
        if not self._step or time is None:
            return
        self._packet_times.add(time)
        if time < self._start:
            raise WrongTimesError

    def frames(self, frames: Iterable[Any]) -> Iterator[Any]:
        """Passes decoded frames on after checking their times."""
        for frame in frames:
            if not self._exact and (frame.pts is None or frame.pts <= self._newest):
                raise WrongTimesError
            self._newest = frame.pts
            if self._step:
                self._check_packets_until(min(self._newest, self._last))
            yield frame

    def _check_packets_until(self, time: int | float) -> None:
        while self._expected <= time:
            if self._expected not in self._packet_times:
                raise WrongTimesError
            self._packet_times.remove(self._expected)
            self._expected += self._step

    def is_settled(self, decoding_time: int) -> bool:
        """Whether packets from here on cannot change what was checked.

        For times from an index, reading goes on until packets are decoded after the last requested
        frame is shown, so that a packet for each time before it must have come.
        """
        return not self._step or decoding_time >= self._last
