"""Copies of videos that are small and quick to read clips from.

By default the shorter side of a copy is 256 pixels, and every 32nd frame is a keyframe.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path
from typing import Any

from nonlocal_jax import files
from nonlocal_jax.data import VideoError
from nonlocal_jax.data.decode.conversion import read_orientation
from nonlocal_jax.data.video import Video
from nonlocal_jax.lazy import extra

if sys.platform != "win32":
    import fcntl

# Frames a second that the encoder is told. Frames keep their times, whatever their rate.
MIN_RATE, MAX_RATE = Fraction(1, 1001), Fraction(1000)


def transcode(
    source: files.AnyPath, target: Path, *, shorter: int = 256, keyframes: int = 32, crf: int = 18
) -> None:
    """Copies a video as H.264 in MP4, without sound.

    Frames are flipped and rotated as they are shown, and keep their times. The copy is written
    atomically, so several processes may write it at the same time. Partial copies that killed
    processes left behind are removed.

    Args:
        source: The file.
        target: The copy, .mp4.
        shorter: Length of its shorter side in pixels. The longer side is rounded to an even number.
        keyframes: Largest distance of keyframes, in frames.
        crf: Quality of x264. Less is better, and 18 is hard to tell from the original.

    Raises:
        VideoError: The file cannot be read to its end.
        OSError: The copy cannot be written.
    """
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; remove it, or choose another name.")
    _remove_partial_copies([target])
    _write_copy(source, target, shorter=shorter, keyframes=keyframes, crf=crf)


def _write_copy(
    source: files.AnyPath, target: Path, *, shorter: int, keyframes: int, crf: int
) -> None:
    with extra("experiments"):
        import av

    target.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": str(crf), "g": str(keyframes)}
    try:
        # The lock is released last, after the partial copy was renamed.
        with (
            contextlib.ExitStack() as lock,
            Video(source) as video,
            files.atomic_write(target) as partial,
        ):
            lock.enter_context(_create_locked(partial))
            copy = functools.partial(_copy, video, partial, shorter, options)
            video.retry_on_wrong_times(copy)
    except av.FFmpegError as error:
        reason = error.strerror or error
        raise VideoError(f"{source}: cannot be copied to {target} ({reason}).") from error


def _create_locked(partial: Path) -> contextlib.AbstractContextManager[Any]:
    """Creates a partial copy and locks it until it is closed, so that no other process removes it.

    Where files cannot be locked, other processes cannot lock it either, and leave it alone.
    """
    while sys.platform != "win32":
        file = partial.open("wb")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():
            return file
        file.close()  # another process removed it before it was locked
    return contextlib.nullcontext()


def _remove_partial_copies(targets: Iterable[Path]) -> None:
    """Removes what killed processes left: its names are random, so later copies do not replace it.

    A folder of many copies takes long to scan, so this is done once for all of them.
    """
    for partial in files.partial_files(targets):
        _remove_if_unused(partial)


def _remove_if_unused(partial: Path) -> None:
    # An error means that another process is writing it, or has just finished or removed it.
    with contextlib.suppress(OSError), partial.open("rb+") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def _copy(video: Video, file: Path, shorter: int, options: dict[str, str]) -> None:
    import av
    from av.codec.context import Flags

    rate = min(max(Fraction(video.rate).limit_denominator(1001), MIN_RATE), MAX_RATE)
    # Without times in the file, frames are spaced evenly.
    has_times = video.timeline.times is not None
    time_base = video.time_base if has_times else 1 / rate
    # The prefix keeps FFmpeg from taking a folder name with a colon for a protocol.
    url = f"file:{file}"
    with av.open(url, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=rate, options=options)
        stream.codec_context.thread_count = 1  # several videos are copied side by side
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        start = 0
        for number, frame in enumerate(_scaled_frames(video, shorter)):
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
                stream.pix_fmt = frame.format.name
                stream.codec_context.time_base = time_base
                if frame.interlaced_frame:
                    stream.codec_context.flags |= int(Flags.interlaced_dct | Flags.interlaced_me)
                start = frame.pts if has_times else 0
            frame.pts = (frame.pts if has_times else number) - start
            frame.time_base = time_base
            # A frame keeps the type that it had in the source (I, P or B), and the encoder would
            # follow it; 0 lets the encoder choose.
            frame.pict_type = 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def transcode_all(
    pairs: Sequence[tuple[files.AnyPath, Path]],
    threads: int,
    *,
    shorter: int = 256,
    keyframes: int = 32,
    crf: int = 18,
) -> Iterator[tuple[files.AnyPath, VideoError | OSError | None]]:
    """Copies many videos in parallel. Copies that exist are kept.

    Partial copies that killed processes left behind are removed first. Anything else that has the
    name of a copy, such as a folder or an empty file, is an error.

    Args:
        pairs: Each file and its copy.
        threads: Videos to copy at a time.
        shorter: As in `transcode`.
        keyframes: As in `transcode`.
        crf: As in `transcode`.

    Yields:
        Each file when it is done, and the error if it could not be copied.
    """
    options = {"shorter": shorter, "keyframes": keyframes, "crf": crf}
    _remove_partial_copies(target for _, target in pairs)
    with ThreadPoolExecutor(threads) as pool:
        jobs = {
            pool.submit(_transcode_if_missing, source, target, options): source
            for source, target in pairs
        }
        try:
            for job in as_completed(jobs):
                error = job.exception()
                if error is not None and not isinstance(error, VideoError | OSError):
                    raise error
                yield jobs[job], error
        finally:
            pool.shutdown(cancel_futures=True)


def _transcode_if_missing(source: files.AnyPath, target: Path, options: dict[str, int]) -> None:
    try:
        target.lstat()
    except FileNotFoundError:
        _write_copy(source, target, **options)
        return
    if not target.is_file() or not target.stat().st_size:
        raise FileExistsError(f"{target} exists, but is not a copy of {source}; remove it.")


def _scaled_frames(video: Video, shorter: int) -> Iterator[Any]:
    """Yields all frames as they are shown, scaled, in yuv420p."""
    graph = None
    for _, frame in video.decode(range(len(video))):
        if graph is None:
            graph = _scaling_graph(frame, shorter, video.time_base)
        graph.push(frame)
        yield graph.pull()


def _scaling_graph(frame: Any, shorter: int, time_base: Fraction) -> Any:
    import av

    scale = shorter / min(frame.width, frame.height)
    # yuv420p has half the resolution for colours, so both sides must be even.
    width, height = (
        2 * max(math.floor(length * scale / 2), (shorter + 1) // 2)
        for length in (frame.width, frame.height)
    )
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=time_base
    )
    # interl=-1 scales the two fields of an interlaced frame separately.
    scaling = graph.add("scale", f"{width}:{height}:flags=bicubic:out_range=tv:interl=-1")
    orientation = read_orientation(frame)
    flips = [graph.add("vflip")] if orientation.is_flipped else []
    turns = [graph.add("transpose", "cclock") for _ in range(orientation.turns)]
    target = graph.add("format", "yuv420p"), graph.add("buffersink")
    graph.link_nodes(source, scaling, *flips, *turns, *target).configure()
    return graph
