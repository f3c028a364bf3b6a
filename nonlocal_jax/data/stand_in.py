"""Small data sets of real video files, which stand in for Kinetics and Charades offline.

Scanned digits move up or down over coloured noise. 3 digits × 2 directions are 6 classes, and no
single frame shows the direction. The files are H.264 in MP4 with various lengths, frame rates,
sizes and shapes. One of them is stored on its side. Among the training files, one is damaged and
one has only sound.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nonlocal_jax import files
from nonlocal_jax.data.annotations import Action
from nonlocal_jax.data.toy_video import Split, load_scans
from nonlocal_jax.lazy import extra

DataSet = Literal["kinetics", "charades"]
DIGITS = (0, 1, 4)
CLASSES = tuple(f"{digit} moves {direction}" for digit in DIGITS for direction in ("up", "down"))
RATES = (12, 15, 24, 25, 30)  # frames a second
# (height, width); the last two are odd
SHAPES = ((64, 64), (64, 86), (96, 72), (72, 128), (84, 63), (75, 101))
SECONDS = {"kinetics": (1.6, 2.6), "charades": (3.0, 5.0)}  # shortest and longest video
# x264's assembly does not always write the same bytes.
OPTIONS = {"crf": "20", "preset": "veryfast", "x264-params": "asm=0"}
NUMBERS: dict[Split, int] = {"train": 240, "test": 60}


def write(
    file: Path,
    frames: Iterable[np.ndarray],
    *,
    rate: float | int | Fraction = 25,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> None:
    """Encodes frames as H.264.

    Args:
        file: .mp4, .mkv, or another format that FFmpeg can store H.264 in.
        frames: Frames (H, W, 3), uint8, RGB. If H or W is odd, colours are stored in full
            resolution, because H.264 requires it.
        rate: Frames a second.
        times: Time of each frame in seconds, for a variable frame rate; Defaults to a constant one.
        rotation: Degrees counterclockwise by which a player rotates the frames; a multiple of 90.
        options: Options of libx264.
    """
    with extra("experiments"):
        import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(
            "libx264", rate=Fraction(rate).limit_denominator(1001), options=options or {}
        )
        # Several videos are encoded side by side.
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:  # they are stored in milliseconds
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if number == 0:
                stream.height, stream.width = pixels.shape[:2]
                is_odd = stream.height % 2 or stream.width % 2
                stream.pix_fmt = "yuv444p" if is_odd else "yuv420p"
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(file: Path, seconds: float = 1.0, rate: int = 8000) -> None:
    """Writes a file that has sound but no video.

    Args:
        file: .mp4 or another format that FFmpeg can store AAC in.
        seconds: Duration.
        rate: Samples a second.
    """
    with extra("experiments"):
        import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("aac", rate=rate, layout="mono")
        phase = 2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate
        wave = np.sin(phase, dtype=np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@dataclasses.dataclass(frozen=True)
class SyntheticVideo:
    """A video to be made. Everything in it is determined by these three values.

    Attributes:
        data_set: "kinetics" has one action from start to end, "charades" one to three, one after
            the other.
        split: Split of the scans.
        number: Number of the video.
    """

    data_set: DataSet
    split: Split
    number: int

    @property
    def name(self) -> str:
        """Name of the file, without its suffix."""
        return f"{self.split}{self.number:04d}"

    def make(self) -> tuple[np.ndarray, int, tuple[Action, ...]]:
        """Returns frames (T, H, W, 3), frames a second, and the actions."""
        seed = [self.data_set == "charades", self.split == "test", self.number]
        rng = np.random.default_rng(seed)
        rate = int(rng.choice(RATES))
        height, width = SHAPES[rng.integers(len(SHAPES))]
        count = round(rate * rng.uniform(*SECONDS[self.data_set]))
        video = _background(rng, count, height, width)
        actions = []
        for label, first, last in self._plan(rng, count):
            _draw_moving_digit(video, rng, self.split, label, first, last)
            actions.append(Action(label, first / rate, last / rate))
        noisy = video + rng.normal(0, 4, video.shape)
        return np.clip(noisy, 0, 255).astype(np.uint8), rate, tuple(actions)

    def _plan(self, rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
        """Returns (label, first frame, last frame) of each action."""
        if self.data_set == "kinetics":
            return [(self.number % len(CLASSES), 0, count - 1)]
        labels = rng.choice(len(CLASSES), rng.integers(1, 4), replace=False).tolist()
        bounds = np.linspace(0, count, len(labels) + 1).astype(int).tolist()
        spans = zip(labels, itertools.pairwise(bounds), strict=True)
        return [(label, first, end - 1) for label, (first, end) in spans]


def make(
    folder: Path,
    data_set: DataSet,
    *,
    numbers: Mapping[Split, int] | None = None,
    threads: int = 2,
) -> dict[Split, Path]:
    """Writes a data set. If it exists already, it is kept; a part of one is replaced.

    Args:
        folder: Folder for the videos and the lists.
        data_set: Format of the lists: `path label` for "kinetics", Charades' CSV for "charades".
        numbers: Number of videos of each split; Defaults to 240 for training and 60 for testing.
        threads: Threads that encode.

    Returns:
        The list of each split. `classes.txt` in the same folder has the names of the classes.

    Raises:
        FileExistsError: The folder has a file of the same name that this function did not write.
    """
    numbers = numbers or NUMBERS
    suffix = "txt" if data_set == "kinetics" else "csv"
    lists: dict[Split, Path] = {
        "train": folder / f"train.{suffix}",
        "test": folder / f"test.{suffix}",
    }
    marker = folder / "stand_in.json"
    counts = {split: numbers[split] for split in lists}
    contents = json.dumps({"data_set": data_set, "numbers": counts})
    if _has(marker, contents):
        return lists
    with extra("experiments"):
        from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".stand_in.lock"
    with FileLock(lock):  # the other processes of a run wait for the first
        try:
            if not _has(marker, contents):
                _write_data_set(folder, data_set, lists, numbers, threads)
                files.write_text(marker, contents)  # last: it tells that everything was written
        finally:
            # A process that still waits at the removed file finds everything written.
            with contextlib.suppress(OSError):  # where open files cannot be removed
                lock.unlink()
    return lists


def _has(marker: Path, contents: str) -> bool:
    return marker.exists() and marker.read_bytes() == contents.encode()


def _write_data_set(
    folder: Path,
    data_set: DataSet,
    lists: Mapping[Split, Path],
    numbers: Mapping[Split, int],
    threads: int,
) -> None:
    marker = folder / "stand_in.json"
    videos_of_split = {
        split: [SyntheticVideo(data_set, split, number) for number in range(numbers[split])]
        for split in lists
    }
    if not marker.exists():
        names = ["classes.txt", "damaged.mp4", "sound.mp4"]
        names += [f"{video.name}.mp4" for video in itertools.chain(*videos_of_split.values())]
        _check_missing([*lists.values(), *(folder / name for name in names)])
        files.write_text(marker, "{}")  # if this is interrupted, it tells whose files these are
    for split, file in lists.items():
        videos = videos_of_split[split]
        with ThreadPoolExecutor(threads) as pool:
            results = pool.map(functools.partial(_write_video, folder), videos)
            actions = {video.name: found for video, found in zip(videos, results, strict=True)}
        names = [video.name for video in videos]
        if split == "train":
            names += _write_unreadable(folder)
        file.write_text(_list_text(data_set, names, actions))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def _check_missing(outputs: Iterable[Path]) -> None:
    for output in outputs:
        if os.path.lexists(output):
            raise FileExistsError(f"{output} exists already; choose another folder.")


def _write_video(folder: Path, video: SyntheticVideo) -> tuple[Action, ...]:
    frames, rate, actions = video.make()
    rotation = 90 if video.number == 0 else 0
    if rotation:
        frames = np.rot90(frames, -1, (1, 2))  # like a camera held on its side
    file = folder / f"{video.name}.mp4"
    write(file, frames, rate=rate, rotation=rotation, options=OPTIONS)
    return actions


def _write_unreadable(folder: Path) -> list[str]:
    """Writes a damaged file and one with only sound; returns their names."""
    content = (folder / "train0001.mp4").read_bytes()
    (folder / "damaged.mp4").write_bytes(content[: len(content) // 2])
    write_sound(folder / "sound.mp4")
    return ["damaged", "sound"]


def _list_text(
    data_set: DataSet, names: Sequence[str], actions: dict[str, tuple[Action, ...]]
) -> str:
    if data_set == "kinetics":
        labels = [actions[name][0].label if name in actions else 0 for name in names]
        pairs = zip(names, labels, strict=True)
        return "".join(f"{name}.mp4 {label}\n" for name, label in pairs)
    rows = ["id,actions,length"]
    for name in names:
        video_actions = actions.get(name, ())
        texts = [f"c{label:03d} {start:.2f} {end:.2f}" for label, start, end in video_actions]
        length = max((action.end for action in video_actions), default=0)
        rows.append(f"{name},{';'.join(texts)},{length:.2f}")
    return "\n".join(rows) + "\n"


def _background(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Makes dark coloured patches that drift sideways."""
    colours = rng.uniform(0, 90, (height // 8 + 2, (width + count) // 8 + 2, 3))
    patches = colours.repeat(8, 0).repeat(8, 1)
    frames = [patches[:height, t // 2 : t // 2 + width] for t in range(count)]
    return np.stack(frames).astype(np.float32)


def _draw_moving_digit(
    video: np.ndarray, rng: np.random.Generator, split: Split, label: int, first: int, last: int
) -> None:
    """Draws a digit that moves up or down through the frames from `first` to `last`."""
    scans, counts = _scans(split)
    digit = DIGITS[label // 2]
    height, width = video.shape[1:3]
    size = round(0.4 * min(height, width) / 8) * 8
    scan = scans[digit, rng.integers(counts[digit])]
    ink = np.kron(scan, np.ones((size // 8, size // 8)))[..., None]
    colour = rng.uniform(150, 255, 3)
    left = round(rng.uniform(0.25, 0.75) * (width - size))
    tops = np.linspace(0.9, 0.1, last - first + 1) * (height - size)
    if label % 2 == 1:
        tops = tops[::-1]
    for frame, top in zip(range(first, last + 1), tops, strict=True):
        part = video[frame, round(top) : round(top) + size, left : left + size]
        part[:] = (1 - ink) * part + ink * colour


@functools.cache
def _scans(split: Split) -> tuple[np.ndarray, np.ndarray]:
    scans = load_scans(split)
    return np.asarray(scans.images), np.asarray(scans.counts)
