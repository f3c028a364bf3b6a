"""Runs one competitor of `benchmarks.video`, which answers with the seconds its batches took."""

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.clips import TrainingClips, cores
from nonlocal_jax.data.pipeline import training_batches
from nonlocal_jax.data.sampling import InSpace, InTime
from nonlocal_jax.data.video import Video, Window
from nonlocal_jax.files import AnyPath

BATCH = 8
TIME_SAMPLING, SPACE_SAMPLING, SEED = InTime(32, 2), InSpace(), 0
FRAMES, RATE, HEIGHT, WIDTH = 300, 30.0, 256, 340


class ClipRequest(NamedTuple):
    """Which frames and which window of a file to read."""

    file: AnyPath
    frames: np.ndarray
    window: Window


def clips(videos: Annotations) -> Iterator[ClipRequest]:
    """Yields the clips of `TrainingClips`, in the order of the list, epoch by epoch."""
    for epoch in itertools.count():
        for index, record in enumerate(videos.records):
            shares = np.random.default_rng([SEED, epoch, index]).random(4)
            window = SPACE_SAMPLING.window(HEIGHT, WIDTH, shares[1:])
            yield ClipRequest(record.path, TIME_SAMPLING.clip(FRAMES, RATE, shares[0]), window)


def pipeline(videos: Annotations) -> Iterator[Any]:
    """Yields batches of this library's pipeline, including grain."""
    return training_batches(
        TrainingClips(videos, TIME_SAMPLING, SPACE_SAMPLING, seed=SEED), BATCH, seed=SEED
    )


def side_by_side(
    read: Callable[[ClipRequest], Any], stack: Callable[[list[Any]], Any], videos: Annotations
) -> Iterator[Any]:
    """Yields batches of what `read` returns, with one thread per core."""
    order = clips(videos)
    with ThreadPoolExecutor(cores()) as pool:
        while True:
            yield stack(list(pool.map(read, itertools.islice(order, BATCH))))


def decoder(colours: bool, clip: ClipRequest) -> None:
    """Decodes with PyAV from the keyframe before the clip to its last frame, optionally to RGB."""
    import av

    with av.open(str(clip.file)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.time_base
        unit = round(1 / (RATE * float(stream.time_base)))
        missing = set((clip.frames * unit).tolist())
        container.seek(int(clip.frames[0]) * unit, stream=stream)
        for frame in container.decode(stream):
            if frame.pts in missing:
                missing.remove(frame.pts)
                if colours:
                    frame.to_ndarray(format="rgb24")
                if not missing:
                    return
    raise RuntimeError(f"{clip.file}: {len(missing)} frames were not found.")


def opencv(clip: ClipRequest) -> np.ndarray:
    """Decodes every frame with OpenCV, and converts only those of the clip."""
    import cv2  # type: ignore[import-not-found]

    capture = cv2.VideoCapture(str(clip.file), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    capture.set(cv2.CAP_PROP_POS_FRAMES, int(clip.frames[0]))
    top, left, height, width, size = clip.window
    result = np.empty((len(clip.frames), *size, 3), np.uint8)
    for i in range(len(clip.frames)):
        found, frame = capture.read()
        if not found:
            raise RuntimeError(f"{clip.file}: frame {clip.frames[i]} was not found.")
        part = cv2.resize(
            frame[top : top + height, left : left + width], size, interpolation=cv2.INTER_LINEAR
        )
        cv2.cvtColor(part, cv2.COLOR_BGR2RGB, dst=result[i])
        if i + 1 < len(clip.frames):
            capture.grab()
    return result


def torchcodec(seek_mode: str, clip: ClipRequest) -> Any:
    """Reads the frames of the clip by number, with torchcodec."""
    import torch
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    decoder = VideoDecoder(str(clip.file), num_ffmpeg_threads=1, seek_mode=seek_mode)
    top, left, height, width, size = clip.window
    frames = decoder.get_frames_at(clip.frames.tolist()).data[
        :, :, top : top + height, left : left + width
    ]
    return torch.nn.functional.interpolate(frames, size=size, mode="bilinear")


def batches(name: str, videos: Annotations) -> Iterator[Any]:
    """Yields batches of one competitor, without end."""
    if name == "pipeline":
        return pipeline(videos)
    if name.startswith("decoder"):
        return side_by_side(functools.partial(decoder, name.endswith("colours")), len, videos)
    if name == "opencv":
        import cv2

        cv2.setNumThreads(1)
        return side_by_side(opencv, np.stack, videos)
    import torch

    torch.set_num_threads(1)
    return side_by_side(
        functools.partial(torchcodec, name.removeprefix("torchcodec, ")), torch.stack, videos
    )


def memory(file: Path) -> float:
    """Returns the peak megabytes for reading the last clip, beyond what the process had before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which the imports raised
    resident = _kilobytes("VmRSS")
    with Video(file) as video:
        video.read(
            len(video) - 63 + 2 * np.arange(32),
            functools.partial(SPACE_SAMPLING.window, shares=np.array([0.5, 0.5, 0.5])),
        )
    return (_kilobytes("VmHWM") - resident) / 1024


def _kilobytes(name: str) -> int:
    """Returns a figure about this process, as Linux reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    """Runs one competitor."""
    name, path = sys.argv[1], Path(sys.argv[2])
    if name == "memory":
        print(memory(path))
        return
    videos = Annotations(tuple(Record(file, (0,)) for file in sorted(path.glob("*.mp4"))), 1)
    try:
        source = batches(name, videos)
        next(source)
    except (ImportError, OSError, RuntimeError) as error:
        print("ready", type(error).__name__, str(error).strip().splitlines()[0], flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        for _ in range(int(line)):
            next(source)
        print(time.perf_counter() - begun, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
