"""Which frames of a video, and which part of each, become a clip: pure functions of sizes and of random numbers."""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax.data.convert import Window

Clips = Int[np.ndarray, "clips t"]
Crops = Literal["three", "centre", "full"]
Rule = Literal["consecutive", "slowfast"]
Short = Literal["loop", "hold"]
CROPS: dict[Crops, int] = {"three": 3, "centre": 1, "full": 1}


@dataclasses.dataclass(frozen=True)
class InTime:
    """How the frames of a clip are chosen.

    Attributes:
        frames: T.
        stride: frames from each to the next; 2 keeps every other one of 2T consecutive frames.
        fps: frames a second that the stride counts in; None counts those of the file, whatever their rate, as the paper.
        rule: "consecutive" takes start + i · stride, as the paper. "slowfast" spreads T frames over T · stride consecutive
            ones, first and last included, as PySlowFast's decoder for Kinetics, so that a stride of 8 is one of 9.
        short: of a video shorter than a clip, "loop" starts again at its first frame, "hold" repeats the last one, as
            PySlowFast.

    Source: section 4.1; PySlowFast's `temporal_sampling`, with fps 30.
    """

    frames: int = 32
    stride: int = 2
    fps: float | None = None
    rule: Rule = "consecutive"
    short: Short = "loop"

    def __post_init__(self) -> None:
        for name in ("frames", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be positive and finite, or None; got {self.fps}.")

    def clip(self, count: int, rate: float, share: float) -> Int[np.ndarray, " t"]:
        """The frames of one clip.

        Args:
            count: frames of the video.
            rate: of the video, frames a second.
            share: where the clip starts, from 0 (with the video) to 1 (so that it ends with it).

        Returns:
            (T,), each from 0 to count - 1.

        >>> InTime(frames=4, stride=2).clip(10, 30.0, 1.0)
        array([3, 5, 7, 9])
        >>> InTime(frames=4, stride=2).clip(5, 30.0, 0.5)  # too short
        array([0, 2, 4, 1])
        """
        step = self.stride * (rate / self.fps if self.fps else 1.0)
        frames: np.ndarray
        if self.rule == "slowfast":
            room = max(count - self.frames * step, 0.0)
            start = share * room
            frames = np.linspace(start, start + self.frames * step - 1, self.frames)
        else:
            last = count - 1 - math.floor((self.frames - 1) * step)  # the latest start
            start = min(math.floor(share * (last + 1)), last) if last > 0 else 0
            frames = start + np.arange(self.frames) * step
        indices = frames.astype(np.int64)
        return indices % count if self.short == "loop" else np.clip(indices, 0, count - 1)

    def clips(self, count: int, rate: float, clips: int) -> Clips:
        """The frames of clips evenly spaced in time, the first one at the start, the last one at the end; one is in the middle.

        >>> InTime(frames=2, stride=1).clips(10, 30.0, 3)
        array([[0, 1],
               [4, 5],
               [8, 9]])
        """
        if clips < 1:
            raise ValueError(f"clips must be at least 1; got {clips}.")
        return np.stack(
            [self.clip(count, rate, 0.5 if clips == 1 else i / (clips - 1)) for i in range(clips)]
        )


@dataclasses.dataclass(frozen=True)
class InSpace:
    """How frames are scaled and cropped, in training at random.

    Attributes:
        size: rows and columns of the crop.
        shorter: least and greatest length of the shorter side that a frame is scaled to.
        inverse: whether 1 / length is uniform, as in PySlowFast's Kinetics recipes, in place of the length.

    Source: section 4.1: a shorter side uniform in [256, 320], crops of 224×224.
    """

    size: int = 224
    shorter: tuple[int, int] = (256, 320)
    inverse: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.shorter[0] <= self.shorter[1]:
            raise ValueError(
                f"size and shorter must be 1 ≤ size ≤ least ≤ greatest; got {self.size} of {self.shorter}."
            )

    def window(self, height: int, width: int, shares: Float[np.ndarray, "3"]) -> Window:
        """The part of a frame (height, width) that is scaled to the crop.

        It is the part that scaling the frame and then cropping it would show, up to a pixel of the file.

        Args:
            height: of the frame, pixels.
            width: of the frame, pixels.
            shares: uniform numbers from [0, 1): of the scale, and of the place from the top and from the left.

        >>> InSpace().window(256, 340, np.array([0.0, 0.5, 0.0]))
        Window(top=16, left=0, height=224, width=224, size=(224, 224))
        """
        least, greatest = self.shorter
        if self.inverse:
            shorter = round(1 / (1 / greatest + shares[0] * (1 / least - 1 / greatest)))
        else:
            shorter = least + math.floor(shares[0] * (greatest - least + 1))
        side = max(round(min(height, width) * self.size / shorter), 1)
        top, left = (
            math.floor(share * (room - side + 1))
            for share, room in zip(shares[1:], (height, width), strict=True)
        )
        return Window(top, left, side, side, (self.size, self.size))


def whole(height: int, width: int, shorter: int) -> Window:
    """All of a frame, its shorter side scaled to a length.

    >>> whole(240, 320, 256).size
    (256, 341)
    """
    scale = shorter / min(height, width)
    return Window(
        0,
        0,
        height,
        width,
        (max(math.floor(height * scale), shorter), max(math.floor(width * scale), shorter)),
    )


def crops(frames: np.ndarray, size: int, kind: Crops) -> list[np.ndarray]:
    """Parts of frames whose shorter side is `size` or more, along the longer side evenly spaced.

    Args:
        frames: (..., H, W, C).
        size: rows and columns of a crop.
        kind: "three" is left, middle and right, or top, middle and bottom; "centre" the middle; "full" the whole frame.

    Returns:
        Views (..., size, size, C); for "full" one of (..., H, W, C).

    >>> [int(part[0, 0, 0]) for part in crops(np.arange(10).reshape(1, 2, 5, 1)[0], 2, "three")]
    [0, 2, 3]
    """
    if kind == "full":
        return [frames]
    rows, columns = frames.shape[-3] - size, frames.shape[-2] - size
    parts = []
    for share in (0.0, 0.5, 1.0) if kind == "three" else (0.5,):
        down, across = (
            math.ceil((share if room == max(rows, columns) else 0.5) * room)
            for room in (rows, columns)
        )
        parts.append(frames[..., down : down + size, across : across + size, :])
    return parts
