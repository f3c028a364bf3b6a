"""Clips of videos, for training, for a look at the accuracy meanwhile, and for testing with many views.

What is read depends on the list, the seed, the epoch and the number of the record alone, whatever reads it. Decoding takes a
thread for each core, each with a decoder of one thread, which together get more done than one decoder with many.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nonlocal_jax import checks
from nonlocal_jax.data import DataError, VideoError
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.convert import Window
from nonlocal_jax.data.frames import open_frames
from nonlocal_jax.data.sampling import CROPS, Clips, Crops, InSpace, InTime, crops, whole
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.types import Array

ATTEMPTS = 10  # records, one after the other, that may fail before an example is given up
RECORD, FAILURE = (
    "record",
    "failure",
)  # of a batch: which was asked for, and why it could not be read, or nothing


def normalise(clips: Any, preset: Preset = "caffe2") -> Array:
    """(clips − mean) / standard deviation, on the device.

    Args:
        clips: (..., 3), uint8, red, green, blue.
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
    """A clip at a random time and place of each video: a `nonlocal_jax.data.pipeline.Source`.

    A video that cannot be read gives its place in the batch to another, chosen from its own random numbers; `Watch` counts.

    Attributes:
        annotations: the videos.
        in_time: which frames.
        in_space: which part of them.
        seed: of all that is random.
        threads: that decode; None is one for each core.
    """

    annotations: Annotations
    in_time: InTime
    in_space: InSpace
    seed: int = 0
    threads: int | None = None

    def __len__(self) -> int:
        return len(self.annotations)

    def read(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Clips (B, T, size, size, 3), uint8, their labels (B,) or (B, classes), and where records failed, why.

        Raises:
            DataError: as many records as are tried for one example cannot be read.
        """
        epochs = np.zeros(len(indices), int) if epochs is None else epochs
        size = self.in_space.size
        inputs = np.empty((len(indices), self.in_time.frames, size, size, 3), np.uint8)
        each = functools.partial(self._one, inputs)
        found = list(
            _pool(self.threads).map(each, range(len(indices)), indices.tolist(), epochs.tolist())
        )
        labels, failures = zip(*found, strict=True)
        return {
            "inputs": inputs,
            "labels": np.stack(labels),
            RECORD: indices,
            FAILURE: np.array(failures, dtype=np.str_),
        }

    def _one(
        self, inputs: np.ndarray, place: int, index: int, epoch: int
    ) -> tuple[np.ndarray, str]:
        rng = np.random.default_rng([self.seed, epoch, index])
        failures: list[str] = []
        for _ in range(ATTEMPTS):
            shares = rng.random(4)
            record = self.annotations.records[index]
            try:
                with open_frames(record) as video:
                    frames = self.in_time.clip(len(video), video.rate, shares[0])
                    video.read(
                        frames,
                        functools.partial(self.in_space.window, shares=shares[1:]),
                        inputs[place],
                    )
                    return _labels(self.annotations, record, video, frames), (failures or [""])[0]
            except VideoError as error:
                failures.append(str(error))
            index = int(rng.integers(len(self)))
        raise DataError("too many videos cannot be read; in a row:\n  " + "\n  ".join(failures))


@dataclasses.dataclass(frozen=True)
class CentreClips:
    """The middle clip of each video, and the middle of its frames: a `nonlocal_jax.data.pipeline.Source`.

    Attributes:
        annotations: the videos.
        in_time: which frames.
        size: rows and columns of the part.
        shorter: length that the shorter side is scaled to.
        threads: that decode; None is one for each core.
    """

    annotations: Annotations
    in_time: InTime
    size: int = 224
    shorter: int = 256
    threads: int | None = None

    def __len__(self) -> int:
        return len(self.annotations)

    def read(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Clips (B, T, size, size, 3), uint8, the labels of their videos, and "mask", which of them could be read."""
        inputs = np.empty((len(indices), self.in_time.frames, self.size, self.size, 3), np.uint8)
        failures = list(
            _pool(self.threads).map(
                functools.partial(self._one, inputs), range(len(indices)), indices.tolist()
            )
        )
        labels = np.stack(
            [video_labels(self.annotations, self.annotations.records[index]) for index in indices]
        )
        mask = np.array([not failure for failure in failures])
        failed = np.array(failures, dtype=np.str_)
        return {"inputs": inputs, "labels": labels, RECORD: indices, FAILURE: failed, "mask": mask}

    def _one(self, inputs: np.ndarray, place: int, index: int) -> str:
        try:
            with open_frames(self.annotations.records[index]) as video:
                video.read(
                    self.in_time.clips(len(video), video.rate, 1)[0], self._window, inputs[place]
                )
        except VideoError as error:
            inputs[place] = 0
            return str(error)
        return ""

    def _window(self, height: int, width: int) -> Window:
        side = max(round(min(height, width) * self.size / self.shorter), 1)
        return Window((height - side) // 2, (width - side) // 2, side, side, (self.size, self.size))


@dataclasses.dataclass(frozen=True)
class Views:
    """What a video is tested with.

    Attributes:
        frames: (n, H, W, 3), uint8: those of all clips, each once.
        clips: (clips, T), places in `frames`; the last clip is the middle one, for the single view.
        crops: of each clip; the single view is the centre, or the full frame.
        size: rows and columns of a crop.
    """

    frames: np.ndarray
    clips: Clips
    crops: Crops
    size: int

    def __len__(self) -> int:
        return (len(self.clips) - 1) * CROPS[self.crops] + 1

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each (T, rows, columns, 3): clip by clip, and last the single view."""
        for clip in self.clips[:-1]:
            yield from crops(self.frames[clip], self.size, self.crops)
        yield from crops(
            self.frames[self.clips[-1]], self.size, "full" if self.crops == "full" else "centre"
        )


@dataclasses.dataclass(frozen=True)
class TestingClips:
    """The views of each video: clips evenly spaced in time, crops along the longer side; and the single view.

    Attributes:
        annotations: the videos.
        in_time: which frames of a clip.
        clips: of a video.
        crops: of a clip: "three" as the released code, or "full" as the paper, whose networks are then convolutional.
        size: rows and columns of a crop, and the length that the shorter side is scaled to.
    """

    annotations: Annotations
    in_time: InTime
    clips: int = 10
    crops: Crops = "three"
    size: int = 256

    __test__ = False  # not a test of pytest's

    def read(self, index: int) -> Views:
        """The views of one video, of which each frame is decoded once.

        Raises:
            VideoError: it cannot be read.
        """
        with open_frames(self.annotations.records[index]) as video:
            clips = [self.in_time.clips(len(video), video.rate, count) for count in (self.clips, 1)]
            frames, places = np.unique(np.concatenate(clips), return_inverse=True)
            pixels = video.read(frames, functools.partial(whole, shorter=self.size))
        return Views(pixels, places.reshape(-1, self.in_time.frames), self.crops, self.size)


def video_labels(annotations: Annotations, record: Record) -> np.ndarray:
    """Of the whole video: its class, or of several classes which it has, as zeros and ones."""
    return _as_array(annotations, record.labels)


class Watch:
    """Counts the videos of a list that cannot be read, each once, and stops when they are too many.

    >>> watch = Watch(records=10, share=0.2, say=print)
    >>> batch = {"record": np.array([3, 7]), "failure": np.array(["", "a.mp4: the file is empty."]), "inputs": np.zeros((2, 1))}
    >>> [list(seen) for seen in watch([dict(batch), dict(batch)])]
    1 of 10 videos cannot be read: a.mp4: the file is empty.
    [['inputs'], ['inputs']]
    """

    def __init__(
        self, records: int, share: float, say: Callable[[str], None], file: Path | None = None
    ) -> None:
        """What is in the file was seen already.

        Args:
            records: in the list.
            share: of them, how many may fail.
            say: told of each video that fails, once.
            file: keeps them, a JSON object a line, for when the run goes on; one for each process.
        """
        self.records, self.share, self.say, self.file = records, share, say, file
        self.failed: dict[int, str] = {}
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line, where a kill came in between
                    found = json.loads(line)
                    self.failed[found[RECORD]] = found[FAILURE]

    def __call__(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """The batches of `TrainingClips` or `CentreClips`, without "record" and "failure".

        Raises:
            DataError: more videos failed than may; it names all.
        """
        for batch in batches:
            for record, failure in zip(
                batch.pop(RECORD).tolist(), batch.pop(FAILURE).tolist(), strict=True
            ):
                if failure and record not in self.failed:
                    self._count(record, failure)
            if len(self.failed) > self.share * self.records:
                shown = "\n  ".join(self.failed.values())
                raise DataError(
                    f"{len(self.failed):,} of {self.records:,} videos cannot be read, more than {self.share:.1%}:\n  {shown}"
                )
            yield batch

    def _count(self, record: int, failure: str) -> None:
        self.failed[record] = failure
        self.say(f"{len(self.failed):,} of {self.records:,} videos cannot be read: {failure}")
        if self.file is not None:
            with self.file.open("a") as out:
                out.write(json.dumps({RECORD: record, FAILURE: failure}) + "\n")


def _labels(annotations: Annotations, record: Record, video: Any, frames: np.ndarray) -> np.ndarray:
    """Of a clip: of several classes, those that are seen between its first and its last frame."""
    if not annotations.multi_label:
        return video_labels(annotations, record)
    first, last = int(frames.min()), int(frames.max())
    if record.frames:
        return _as_array(annotations, set(itertools.chain(*record.frame_labels[first : last + 1])))
    start, end = video.seconds(np.array([first, last]))
    return _as_array(
        annotations, {a.label for a in record.actions if a.start <= end and a.end >= start}
    )


def _as_array(annotations: Annotations, labels: Iterable[int]) -> np.ndarray:
    if not annotations.multi_label:
        (label,) = labels
        return np.asarray(label, np.int32)
    array = np.zeros(annotations.num_classes, np.float32)
    array[list(labels)] = 1
    return array


@functools.cache
def _pool(threads: int | None) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads or cores(), thread_name_prefix="decode")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
