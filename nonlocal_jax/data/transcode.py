"""Copies of videos with a shorter side of 256 pixels and many keyframes: small, and quick to read a clip from."""

import functools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path
from typing import Any

from nonlocal_jax.data import VideoError
from nonlocal_jax.data.convert import QUARTER
from nonlocal_jax.data.video import Video

PARTIAL = ".partial"


def transcode(
    source: Path, target: Path, *, shorter: int = 256, keyframes: int = 32, crf: int = 18
) -> None:
    """One file as H.264 in MP4, without sound, turned as it is shown, every frame at its time; whole or not at all.

    Args:
        source: the file.
        target: the copy, .mp4.
        shorter: length of its shorter side, pixels; the longer one is rounded to an even number.
        keyframes: a frame in so many is a keyframe.
        crf: x264's quality; 18 is hardly told from the original.

    Raises:
        VideoError: the file cannot be read to its end.
        OSError: the copy cannot be written.
    """
    import av

    partial = target.with_name(target.name + PARTIAL)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Video(source) as video:
            video.surely(
                functools.partial(
                    _copy, video, partial, shorter, {"crf": str(crf), "g": str(keyframes)}
                )
            )
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(target)
    except av.FFmpegError as error:
        raise VideoError(
            f"{source}: cannot be copied to {target} ({error.strerror or error})."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _copy(video: Video, file: Path, shorter: int, options: dict[str, str]) -> None:
    import av
    from av.codec.context import Flags

    rate = Fraction(video.rate).limit_denominator(1001)
    with av.open(str(file), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=rate, options=options)
        stream.codec_context.thread_count = 1
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        timed = video.timeline.times is not None
        base = video.time_base if timed else 1 / rate
        first = 0
        for number, frame in enumerate(_scaled(video, shorter)):
            if not number:
                stream.width, stream.height, stream.pix_fmt = (
                    frame.width,
                    frame.height,
                    frame.format.name,
                )
                stream.codec_context.time_base = base
                if frame.interlaced_frame:
                    stream.codec_context.flags |= int(Flags.interlaced_dct | Flags.interlaced_me)
                first = frame.pts if timed else 0
            frame.pts, frame.time_base = (frame.pts if timed else number) - first, base
            frame.pict_type = 0  # whatever kind it was
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def transcode_all(
    pairs: Sequence[tuple[Path, Path]], threads: int, **options: int
) -> Iterator[tuple[Path, VideoError | OSError | None]]:
    """Copies of many, side by side; those that are there already are left as they are.

    Yields:
        Each source when it is done, and what went wrong with it, if anything.
    """
    with ThreadPoolExecutor(threads) as pool:
        jobs = {
            pool.submit(_unless_there, source, target, options): source for source, target in pairs
        }
        try:
            for job in as_completed(jobs):
                error = job.exception()
                if error is not None and not isinstance(error, VideoError | OSError):
                    raise error
                yield jobs[job], error
        finally:
            pool.shutdown(cancel_futures=True)


def _unless_there(source: Path, target: Path, options: dict[str, int]) -> None:
    if not target.exists():
        transcode(source, target, **options)


def _scaled(video: Video, shorter: int) -> Iterator[Any]:
    """All frames, as they are shown, scaled, as yuv420p."""
    import av

    graph = None
    for _, frame in video.decode(range(len(video))):
        if graph is None:
            turns = round(frame.rotation / QUARTER) % 4
            scale = shorter / min(frame.width, frame.height)
            width, height = (
                2 * max(math.floor(n * scale / 2), (shorter + 1) // 2)
                for n in (frame.width, frame.height)
            )
            graph = av.filter.Graph()
            filters = [
                graph.add_buffer(
                    width=frame.width,
                    height=frame.height,
                    format=frame.format,
                    time_base=video.time_base,
                )
            ]
            filters.append(
                graph.add("scale", f"{width}:{height}:flags=bicubic:out_range=tv:interl=-1")
            )
            filters += [graph.add("transpose", "cclock") for _ in range(turns)]
            filters += [graph.add("format", "yuv420p"), graph.add("buffersink")]
            graph.link_nodes(*filters).configure()
        graph.push(frame)
        yield graph.pull()
