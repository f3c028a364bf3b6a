"""When each frame of a video file is shown: from its index, from its packets, or by decoding it.

The three ways are ordered by cost. The first two are predictions, which `seeking` checks while it
decodes; only decoding every frame settles the matter. Times are integers in the stream's units.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nonlocal_jax.data.decode.container import Container

# Seconds by which times may be wrong. Matroska, WebM and FLV round them to milliseconds.
TIME_ROUNDING = 1e-3
# Packets to look at before the index is trusted: enough to see whether B-frames are reordered.
FIRST_PACKETS = 64
# Decoders whose files often give B-frames their decoding times, as the AVI format has no others.
DECODING_TIMES = ("mpeg4",)
# Decoders with packets that are never shown, and the bit of the first byte that marks shown ones.
HIDDEN_PACKETS, SHOW_BIT = ("vp8", "libvpx"), 0x10


class WrongTimesError(Exception):
    """The times found while decoding differ from the timeline, so the frames cannot be trusted."""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When the frames of a file are shown.

    Attributes:
        times: Time of each frame, ascending. None if the file has no usable times; its frames are
            then found by counting.
        keyframes: Times of the frames at which decoding can start, ascending.
        count: Number of frames.
        exact: Whether every frame was decoded to find out. Otherwise the timeline is a prediction,
            which is checked while decoding.
        step: Time between consecutive frames if the timeline comes from an index of a constant
            frame rate; 0 if every packet was read.
        span: Time from the first frame to the last, also if `times` is None; 0 if it is unknown.
    """

    times: Sequence[int] | None
    keyframes: Sequence[int]
    count: int
    exact: bool = False
    step: int = 0
    span: int = 0


def index_timeline(container: Container) -> Timeline | None:
    """Reads the sample table of an MP4 file.

    The table has decoding times, not display times. If they are evenly spaced, the frame rate is
    assumed to be constant, which tells the display times too.

    Returns:
        The timeline, or None if the table is absent, irregular, or contradicted by the first
        packets.
    """
    stream = container.stream
    if "mp4" not in container.format_name or not stream.frames or stream.start_time is None:
        return None
    entries = list(stream.index_entries)
    if len(entries) != stream.frames or any(entry.is_discard for entry in entries):
        return None
    decoding_times = [entry.timestamp for entry in entries]
    steps = set(np.diff(decoding_times).tolist())
    if len(steps) != 1:
        return None
    (step,) = steps
    start = stream.start_time
    if step <= 0 or not _starts_at_keyframe(container):
        return None
    # A range takes no memory, however long the video is.
    times = range(start, start + step * len(entries), step)
    # Every keyframe is assumed to be shown as long after it is decoded as the first one is.
    delay = start - decoding_times[0]
    keyframes = [entry.timestamp + delay for entry in entries if entry.is_keyframe]
    return Timeline(times, keyframes, len(times), step=step, span=_span(times))


def _starts_at_keyframe(container: Container) -> bool:
    """Checks the first packets: a keyframe comes first, and B-frames have display times.

    If the codec reorders frames, some packet must be shown before an earlier one. If none is, the
    times are those of decoding, and nothing can be told from them.
    """
    packets, codec = container.packets(), container.codec
    first = next(packets)
    if not first.is_keyframe or first.pts is None or first.pts != container.stream.start_time:
        return False
    latest, is_reordered, is_complete = first.pts, False, False
    for packet in itertools.islice(packets, FIRST_PACKETS):
        if packet.size == 0:  # end of the file
            is_complete = True
            break
        if packet.pts is None or packet.pts < first.pts:
            return False
        is_reordered = is_reordered or packet.pts < latest
        latest = max(packet.pts, latest)
        # A packet that is decoded after the first frame is shown can no longer be shown before it.
        is_complete = packet.dts is not None and packet.dts >= first.pts
        if is_complete and (is_reordered or not codec.has_b_frames):
            break
    if not codec.has_b_frames:
        return is_complete
    return is_complete and is_reordered and codec.name not in DECODING_TIMES


def packet_timeline(container: Container) -> Timeline | None:
    """Reads all packets without decoding them.

    Returns:
        The timeline, or None if packets have no display times or those times look wrong.
    """
    codec = container.codec
    has_hidden_packets, has_b_frames = codec.name in HIDDEN_PACKETS, codec.has_b_frames
    has_decoding_times = codec.name in DECODING_TIMES
    times: list[int] = []
    keyframes: list[int] = []
    starts_at_keyframe = False
    for packet in container.packets():
        if packet.size == 0 or packet.is_discard or (has_hidden_packets and _is_hidden(packet)):
            continue
        if packet.pts is None:
            return None
        if not times:
            starts_at_keyframe = packet.is_keyframe
        times.append(packet.pts)
        if packet.is_keyframe:
            keyframes.append(packet.pts)
    ascending = sorted(times)
    if len(set(times)) < len(times):
        return None
    # A codec that reorders frames cannot have packets in display order: such times are decoding's.
    if has_b_frames and (has_decoding_times or (times == ascending and len(times) > 1)):
        return None
    if times and not (starts_at_keyframe and ascending[0] == keyframes[0]):
        return _trimmed_timeline(container, times, sorted(keyframes))
    return Timeline(ascending, sorted(keyframes), len(times), span=_span(ascending))


def _is_hidden(packet: Any) -> bool:
    return not memoryview(packet)[0] & SHOW_BIT


def _trimmed_timeline(
    container: Container, times: Sequence[int], keyframes: Sequence[int]
) -> Timeline | None:
    """Builds the timeline of a file that was cut between keyframes.

    The first frames refer to frames that are gone, and the decoder drops some of them. Decoding up
    to the second keyframe shows which ones remain.
    """
    second_keyframe = keyframes[1] if len(keyframes) > 1 else math.inf
    decoded: list[int] = []
    for frame in container.frames():
        if frame.pts is None or (decoded and frame.pts <= decoded[-1]):
            return None
        if frame.pts >= second_keyframe:
            break
        decoded.append(frame.pts)
    decoded += sorted(time for time in times if time >= second_keyframe)
    return Timeline(decoded, keyframes, len(decoded), span=_span(decoded))


def decoded_timeline(container: Container) -> Timeline:
    """Decodes the whole file. Times that do not ascend with the frames are not used."""
    times: list[Any] = []
    keyframes: list[Any] = []
    for frame in container.frames():
        times.append(frame.pts)
        if frame.key_frame:
            keyframes.append(frame.pts)
    if None in times or any(late <= early for early, late in itertools.pairwise(times)):
        known = sorted(time for time in times if time is not None)
        return Timeline(None, (), len(times), exact=True, span=_span(known))
    return Timeline(times, keyframes, len(times), exact=True, span=_span(times))


def _span(ascending: Sequence[int]) -> int:
    return ascending[-1] - ascending[0] if ascending else 0
