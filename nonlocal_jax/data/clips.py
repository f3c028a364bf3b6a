"""Clips of videos for training, for quick evaluation, and for testing with many views.

What is read depends only on the list, the seed, the epoch and the number of the record, whichever
process reads it. Each core decodes with one thread: several decoders of one thread each finish
sooner than one decoder with several threads.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

from nonlocal_jax import checks, files
from nonlocal_jax.data import DataError, VideoError
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.image_frames import open_frames
from nonlocal_jax.data.sampling import (
    CROPS,
    ClipIndices,
    Crops,
    FrameTimes,
    InSpace,
    InTime,
    crops,
    whole,
)
from nonlocal_jax.data.video import Window
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.remote_paths import RemotePath
from nonlocal_jax.types import Array

# Threads per core for remote videos, since a thread that waits for a file decodes nothing. Measured
# on 2 cores with files that were delayed by 100 ms: 38 clips a second with 4 threads, 13 with 1.
REMOTE_THREADS = 4
ATTEMPTS = 10  # records to try for one example, one after the other, before giving up
# Entries of a batch: the number of the requested record, and why it could not be read ("" if it
# could).
RECORD, FAILURE = "record", "failure"


def normalise(clips: Any, preset: Preset = "caffe2") -> Array:
    """Computes (clips - mean) / standard deviation of the colours, on the device.

    Args:
        clips: (..., 3), uint8, RGB.
        preset: The source whose mean and standard deviation are used.

    Returns:
        (..., 3), float32.

    >>> [round(x, 3) for x in normalise(np.array([0, 114, 255], np.uint8)).tolist()]
    [-2.0, -0.013, 2.444]
    """
    checks.one_of("preset", preset, PRESETS)
    conventions = PRESETS[preset].input
    mean, std = (np.asarray(rgb, np.float32) for rgb in (conventions.mean, conventions.std))
    x = jnp.asarray(clips).astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    return (x - np.expand_dims(mean, axes)) / np.expand_dims(std, axes)


@dataclasses.dataclass(frozen=True)
class TrainingClips:
    """A clip of each video, at a random time and place.

    This is a `nonlocal_jax.data.pipeline.ExampleReader`. If a video cannot be read, another one
    takes its place in the batch, chosen by random numbers of that example; `Watch` counts them.

    Attributes:
        annotations: The videos.
        in_time: Chooses the frames.
        in_space: Chooses the part of the frames.
        seed: Seed of all random numbers.
        threads: Threads that decode; Defaults to one per core. Remote videos are read by
            `REMOTE_THREADS` times as many.
    """

    annotations: Annotations
    in_time: InTime
    in_space: InSpace
    seed: int = 0
    threads: int | None = None

    def __len__(self) -> int:
        return len(self.annotations)

    def read(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Reads clips.

        Args:
            indices: (B,) numbers of the videos.
            epochs: (B,) epochs, which the random numbers depend on; Defaults to epoch 0.

        Returns:
            "inputs" (B, T, size, size, 3), uint8; "labels" (B,) or (B, classes); "record" (B,) and
            "failure" (B,), why the requested video could not be read.

        Raises:
            DataError: None of the `ATTEMPTS` videos tried for one example could be read.
        """
        epochs = np.zeros(len(indices), int) if epochs is None else epochs
        inputs = _empty_clips(len(indices), self.in_time, self.in_space.size)
        read_clip = functools.partial(self._read_clip, inputs)
        results = _pool(self.threads, self.annotations).map(
            read_clip, range(len(indices)), indices.tolist(), epochs.tolist()
        )
        labels, failures = zip(*results, strict=True)
        return _batch(inputs, np.stack(labels), indices, failures)

    def _read_clip(
        self, inputs: np.ndarray, place: int, index: int, epoch: int
    ) -> tuple[np.ndarray, str]:
        """Writes a clip to `inputs[place]`; returns its labels and the reason if it is another."""
        rng = np.random.default_rng([self.seed, epoch, index])
        failures: list[str] = []
        for _ in range(ATTEMPTS):
            shares = rng.random(4)
            record = self.annotations.records[index]
            crop = functools.partial(self.in_space.window, shares=shares[1:])
            try:
                with open_frames(record) as video:
                    times = _times(self.in_time, video)
                    frames = self.in_time.clip(len(video), video.rate, shares[0], times)
                    video.read(frames, crop, inputs[place])
                    labels = _clip_labels(self.annotations, record, video, frames)
                    return labels, failures[0] if failures else ""
            except VideoError as error:
                failures.append(str(error))
            # From the same generator, so that the replacement does not depend on the batch.
            index = int(rng.integers(len(self)))
        reasons = "\n  ".join(failures)
        raise DataError(f"too many videos cannot be read; in a row:\n  {reasons}")


@dataclasses.dataclass(frozen=True)
class CentreClips:
    """The middle clip of each video, cropped to the centre, for quick evaluation.

    This is a `nonlocal_jax.data.pipeline.ExampleReader`.

    Attributes:
        annotations: The videos.
        in_time: Chooses the frames.
        size: Rows and columns of the crop.
        shorter: Length that the shorter side of a frame is scaled to before cropping.
        threads: Threads that decode; Defaults to one per core. Remote videos are read by
            `REMOTE_THREADS` times as many.
    """

    annotations: Annotations
    in_time: InTime
    size: int = 224
    shorter: int = 256
    threads: int | None = None

    def __len__(self) -> int:
        return len(self.annotations)

    def read(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Reads clips.

        Args:
            indices: (B,) numbers of the videos.
            epochs: Not used.

        Returns:
            "inputs" (B, T, size, size, 3), uint8; "labels" (B,) or (B, classes) of whole videos;
            "mask" (B,), which videos could be read; "record" and "failure" as in `TrainingClips`.
        """
        inputs = _empty_clips(len(indices), self.in_time, self.size)
        read_clip = functools.partial(self._read_clip, inputs)
        failures = list(
            _pool(self.threads, self.annotations).map(
                read_clip, range(len(indices)), indices.tolist()
            )
        )
        records = [self.annotations.records[index] for index in indices]
        labels = np.stack([video_labels(self.annotations, record) for record in records])
        mask = np.array([not failure for failure in failures])
        return {**_batch(inputs, labels, indices, failures), "mask": mask}

    def _read_clip(self, inputs: np.ndarray, place: int, index: int) -> str:
        """Writes a clip to `inputs[place]`; returns why it cannot be read, or ""."""
        try:
            with open_frames(self.annotations.records[index]) as video:
                times = _times(self.in_time, video)
                frames = self.in_time.clips(len(video), video.rate, 1, times)[0]
                video.read(frames, self._window, inputs[place])
        except VideoError as error:
            inputs[place] = 0  # the array is not initialised
            return str(error)
        return ""

    def _window(self, height: int, width: int) -> Window:
        side = max(round(min(height, width) * self.size / self.shorter), 1)
        return Window((height - side) // 2, (width - side) // 2, side, side, (self.size, self.size))


@dataclasses.dataclass(frozen=True)
class Views:
    """The views of one video, for testing.

    Attributes:
        frames: (n, H, W, 3), uint8, the frames of all clips, each once.
        clips: (clips, T), positions in `frames`. The last clip is the middle one, which gives the
            single view.
        crops: Crops of each clip. The single view is the centre or the full frame.
        size: Rows and columns of a crop.
    """

    frames: np.ndarray
    clips: ClipIndices
    crops: Crops
    size: int

    def __len__(self) -> int:
        return (len(self.clips) - 1) * CROPS[self.crops] + 1

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields views (T, rows, columns, 3), clip by clip, and finally the single view."""
        for clip in self.clips[:-1]:
            yield from crops(self.frames[clip], self.size, self.crops)
        single: Crops = "full" if self.crops == "full" else "centre"
        yield from crops(self.frames[self.clips[-1]], self.size, single)


@dataclasses.dataclass(frozen=True)
class TestingClips:
    """The views of each video: clips evenly spaced in time, crops along the longer side.

    A single view of the middle clip is added to them.

    Attributes:
        annotations: The videos.
        in_time: Chooses the frames of a clip.
        clips: Clips of each video.
        crops: Crops of each clip: "three" as in the released code, or "full" as in the paper, whose
            networks are then fully convolutional.
        size: Rows and columns of a crop, and length that the shorter side is scaled to.
    """

    annotations: Annotations
    in_time: InTime
    clips: int = 10
    crops: Crops = "three"
    size: int = 256

    __test__ = False  # pytest would collect the class, because of its name

    def read(self, index: int) -> Views:
        """Reads the views of one video. Each frame is decoded once.

        Raises:
            VideoError: The video cannot be read.
        """
        with open_frames(self.annotations.records[index]) as video:
            sample = functools.partial(self.in_time.clips, len(video), video.rate)
            times = _times(self.in_time, video)
            clips = [sample(self.clips, times), sample(1, times)]
            # Clips of short videos overlap; each frame is decoded once.
            frames, places = np.unique(np.concatenate(clips), return_inverse=True)
            pixels = video.read(frames, functools.partial(whole, shorter=self.size))
        return Views(pixels, places.reshape(-1, self.in_time.frames), self.crops, self.size)


def video_labels(annotations: Annotations, record: Record) -> np.ndarray:
    """Returns the class of a video, or zeros and ones (classes,) in a list with several classes."""
    return _label_array(annotations, record.labels)


class Watch:
    """Counts the videos of a list that cannot be read, each once, and stops if there are too many.

    >>> watch = Watch(records=10, share=0.2, say=print)
    >>> failures = np.array(["", "a.mp4: the file is empty."])
    >>> batch = {"record": np.array([3, 7]), "failure": failures, "inputs": np.zeros((2, 1))}
    >>> [list(checked) for checked in watch([dict(batch), dict(batch)])]
    1 of 10 videos cannot be read: a.mp4: the file is empty.
    [['inputs'], ['inputs']]
    """

    def __init__(
        self,
        records: int,
        share: float,
        say: Callable[[str], None],
        file: files.AnyPath | None = None,
    ) -> None:
        """Reads the failures that an earlier start of the run recorded.

        Args:
            records: Number of videos in the list.
            share: Share of them that may fail.
            say: Called with a message when a video fails for the first time.
            file: Records failures as one JSON object per line, for when the run is resumed. Each
                process needs its own file. Lines that are damaged are ignored, since a video that
                cannot be read is found and recorded again.
        """
        self.records, self.share, self.say, self.file = records, share, say, file
        self.failed: dict[int, str] = {}
        if file is None or not file.exists():
            return
        text = file.read_bytes().decode("utf-8", "replace")
        for line in text.split("\n"):
            self.failed |= _recorded_failure(line, records)
        # If the run was killed while it wrote, the last line is incomplete.
        if text and not text.endswith("\n"):
            files.append_line(file, "")

    def __call__(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """Passes batches of `TrainingClips` or `CentreClips` on, without "record" and "failure".

        Raises:
            DataError: More videos failed than may. The message names all of them.
        """
        for batch in batches:
            records, failures = batch.pop(RECORD).tolist(), batch.pop(FAILURE).tolist()
            for record, failure in zip(records, failures, strict=True):
                if failure and record not in self.failed:
                    self._count(record, failure)
            if len(self.failed) > self.share * self.records:
                reasons = "\n  ".join(self.failed.values())
                raise DataError(
                    f"{len(self.failed):,} of {self.records:,} videos cannot be read, "
                    f"more than {self.share:.1%}:\n  {reasons}"
                )
            yield batch

    def _count(self, record: int, failure: str) -> None:
        self.failed[record] = failure
        self.say(f"{len(self.failed):,} of {self.records:,} videos cannot be read: {failure}")
        if self.file is not None:
            files.append_line(self.file, json.dumps({RECORD: record, FAILURE: failure}))


def _recorded_failure(line: str, records: int) -> dict[int, str]:
    """Returns the record and the failure of a line, or nothing if the line is damaged."""
    try:
        row = json.loads(line)
        record, failure = row[RECORD], row[FAILURE]
    # The nesting of a damaged line may be too deep for the parser.
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    is_valid = type(record) is int and 0 <= record < records and isinstance(failure, str)
    return {record: failure} if is_valid else {}


def _empty_clips(count: int, in_time: InTime, size: int) -> np.ndarray:
    return np.empty((count, in_time.frames, size, size, 3), np.uint8)


def _times(in_time: InTime, video: Any) -> FrameTimes | None:
    """Returns when each frame is shown, in seconds, if the choice of frames depends on it."""
    return video.seconds(np.arange(len(video))) if in_time.fps else None


def _batch(
    inputs: np.ndarray, labels: np.ndarray, indices: np.ndarray, failures: Iterable[str]
) -> dict[str, np.ndarray]:
    messages = np.array(list(failures), dtype=np.str_)
    return {"inputs": inputs, "labels": labels, RECORD: indices, FAILURE: messages}


def _clip_labels(
    annotations: Annotations, record: Record, video: Any, frames: np.ndarray
) -> np.ndarray:
    """Returns the labels of a clip; of several classes, those between its first and last frame."""
    if not annotations.multi_label:
        return video_labels(annotations, record)
    first, last = int(frames.min()), int(frames.max())
    if record.frames:
        labels = set(itertools.chain(*record.frame_labels[first : last + 1]))
    else:
        start, end = video.seconds(np.array([first, last]))
        actions = [action for action in record.actions if action.start <= end]
        labels = {action.label for action in actions if action.end >= start}
    return _label_array(annotations, labels)


def _label_array(annotations: Annotations, labels: Iterable[int]) -> np.ndarray:
    if not annotations.multi_label:
        (label,) = labels
        return np.asarray(label, np.int32)
    array = np.zeros(annotations.num_classes, np.float32)
    array[list(labels)] = 1
    return array


def _pool(threads: int | None, annotations: Annotations) -> ThreadPoolExecutor:
    is_remote = isinstance(annotations.records[0].path, RemotePath)
    return _threads((threads or cores()) * (REMOTE_THREADS if is_remote else 1))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="decode")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
