"""Real video files of moving digits, made on the spot: so that the code for Kinetics and Charades runs where neither is.

Scanned digits move up or down over coloured noise: 3 digits × 2 directions are 6 classes, of which no single frame tells the
direction. The files are H.264 in MP4, of varied length, frame rate, size and shape; one is to be turned before it is shown; and
among those to train with, one is damaged and one has sound alone.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nonlocal_jax.data.annotations import Action
from nonlocal_jax.data.toy_video import Split, load_scans

DIGITS = (0, 1, 4)
CLASSES = tuple(f"{digit} moves {way}" for digit in DIGITS for way in ("up", "down"))
RATES = (12, 15, 24, 25, 30)  # frames a second
SHAPES = (
    (64, 64),
    (64, 86),
    (96, 72),
    (72, 128),
    (84, 63),
    (75, 101),
)  # (height, width); the last two are odd
SECONDS = {"kinetics": (1.6, 2.6), "charades": (3.0, 5.0)}  # of a video, least and greatest
Kind = Literal["kinetics", "charades"]
OPTIONS = {
    "crf": "20",
    "preset": "veryfast",
    "x264-params": "asm=0",
}  # its assembly writes other bytes each time
NUMBER: dict[Split, int] = {"train": 240, "test": 60}


def write(
    file: Path,
    frames: Iterable[np.ndarray],
    *,
    rate: float | int | Fraction = 25,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> None:
    """An H.264 file of frames.

    Args:
        file: .mp4, .mkv, or what else FFmpeg can write H.264 into.
        frames: each (H, W, 3), uint8, red, green, blue. Where H or W is odd, colours have the full resolution, as they must.
        rate: frames a second.
        times: of each frame, seconds, for a variable frame rate; None is a constant one.
        rotation: degrees counterclockwise by which a player is to turn the frames; a multiple of 90.
        options: of libx264.
    """
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(
            "libx264", rate=Fraction(rate).limit_denominator(1001), options=options or {}
        )
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if not i:
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(file: Path, seconds: float = 1.0, rate: int = 8000) -> None:
    """A file with a sound and no video."""
    import av

    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("aac", rate=rate, layout="mono")
        wave = np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate, dtype=np.float32)[
            None
        ]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = rate
        for part in (frame, None):
            container.mux(stream.encode(part))


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video to be made: everything in it comes from its split and number.

    Attributes:
        kind: "kinetics" has one action from start to end, "charades" one to three, one after the other.
        split: of the scans.
        number: of the video.
    """

    kind: Kind
    split: Split
    number: int

    @property
    def name(self) -> str:
        """Of the file, without its suffix."""
        return f"{self.split}{self.number:04d}"

    def make(self) -> tuple[np.ndarray, int, tuple[Action, ...]]:
        """Frames (T, H, W, 3), frames a second, and what happens."""
        rng = np.random.default_rng([self.kind == "charades", self.split == "test", self.number])
        rate = int(rng.choice(RATES))
        height, width = SHAPES[rng.integers(len(SHAPES))]
        count = round(rate * rng.uniform(*SECONDS[self.kind]))
        video = _background(rng, count, height, width)
        actions = []
        for label, first, last in self._plan(rng, count):
            _move(video, rng, self.split, label, first, last)
            actions.append(Action(label, first / rate, last / rate))
        noisy = video + rng.normal(0, 4, video.shape)
        return np.clip(noisy, 0, 255).astype(np.uint8), rate, tuple(actions)

    def _plan(self, rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
        """(label, first frame, last frame) of each action."""
        if self.kind == "kinetics":
            return [(self.number % len(CLASSES), 0, count - 1)]
        labels = rng.choice(len(CLASSES), rng.integers(1, 4), replace=False).tolist()
        starts = np.linspace(0, count, len(labels) + 1).astype(int).tolist()
        spans = zip(labels, itertools.pairwise(starts), strict=True)
        return [(label, first, after - 1) for label, (first, after) in spans]


def make(
    folder: Path, kind: Kind, *, numbers: dict[Split, int] | None = None, threads: int = 2
) -> dict[Split, Path]:
    """Write the set, once: what is there whole is left as it is.

    Args:
        folder: of the videos and the lists.
        kind: of the lists, `path label` for "kinetics", the CSV of Charades for "charades".
        numbers: of the videos of each split; None is 240 to train with and 60 to test with.
        threads: that encode.

    Returns:
        The list of each split. `classes.txt` beside them has the names.
    """
    numbers = numbers or NUMBER
    suffix = "txt" if kind == "kinetics" else "csv"
    lists: dict[Split, Path] = {
        "train": folder / f"train.{suffix}",
        "test": folder / f"test.{suffix}",
    }
    done, wanted = folder / "stand_in.json", {"kind": kind, "numbers": numbers}
    if done.exists() and json.loads(done.read_text()) == wanted:
        return lists
    folder.mkdir(parents=True, exist_ok=True)
    for split, file in lists.items():
        clips = [Clip(kind, split, number) for number in range(numbers[split])]
        with ThreadPoolExecutor(threads) as pool:
            actions = dict(
                zip(clips, pool.map(functools.partial(_write, folder), clips), strict=True)
            )
        names = [clip.name for clip in clips]
        if split == "train":
            names += _spoil(folder)
        labels = {clip.name: found for clip, found in actions.items()}
        file.write_text(_list(kind, names, labels))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    done.write_text(json.dumps(wanted))
    return lists


def _write(folder: Path, clip: Clip) -> tuple[Action, ...]:
    frames, rate, actions = clip.make()
    rotation = 90 if clip.number == 0 else 0
    if rotation:
        frames = np.rot90(frames, -1, (1, 2))  # as a camera held on its side
    write(folder / f"{clip.name}.mp4", frames, rate=rate, rotation=rotation, options=OPTIONS)
    return actions


def _spoil(folder: Path) -> list[str]:
    """A damaged file, and one with sound alone."""
    whole = (folder / "train0001.mp4").read_bytes()
    (folder / "damaged.mp4").write_bytes(whole[: len(whole) // 2])
    write_sound(folder / "sound.mp4")
    return ["damaged", "sound"]


def _list(kind: Kind, names: Sequence[str], actions: dict[str, tuple[Action, ...]]) -> str:
    if kind == "kinetics":
        return "".join(
            f"{name}.mp4 {actions[name][0].label if name in actions else 0}\n" for name in names
        )
    rows = ["id,actions,length"]
    for name in names:
        texts = [
            f"c{label:03d} {start:.2f} {end:.2f}" for label, start, end in actions.get(name, ())
        ]
        rows.append(
            f"{name},{';'.join(texts)},{max((a.end for a in actions.get(name, ())), default=0):.2f}"
        )
    return "\n".join(rows) + "\n"


def _background(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Coloured patches, dark, that drift sideways."""
    patches = (
        rng.uniform(0, 90, (height // 8 + 2, (width + count) // 8 + 2, 3)).repeat(8, 0).repeat(8, 1)
    )
    return np.stack([patches[:height, t // 2 : t // 2 + width] for t in range(count)]).astype(
        np.float32
    )


def _move(
    video: np.ndarray, rng: np.random.Generator, split: Split, label: int, first: int, last: int
) -> None:
    """Draw a digit that crosses the middle of the frame, up or down, from one frame to another."""
    scans, counts = _scans(split)
    digit = DIGITS[label // 2]
    height, width = video.shape[1:3]
    size = round(0.4 * min(height, width) / 8) * 8
    ink = np.kron(scans[digit, rng.integers(counts[digit])], np.ones((size // 8, size // 8)))[
        ..., None
    ]
    colour = rng.uniform(150, 255, 3)
    left = round(rng.uniform(0.25, 0.75) * (width - size))
    rows = np.linspace(0.9, 0.1, last - first + 1) * (height - size)
    for frame, row in zip(
        range(first, last + 1), rows if label % 2 == 0 else rows[::-1], strict=True
    ):
        part = video[frame, round(row) : round(row) + size, left : left + size]
        part[:] = (1 - ink) * part + ink * colour


@functools.cache
def _scans(split: Split) -> tuple[np.ndarray, np.ndarray]:
    scans = load_scans(split)
    return np.asarray(scans.images), np.asarray(scans.counts)
