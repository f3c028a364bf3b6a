"""Which frames of a video, and which part of each frame, become a clip.

Everything here is a pure function of sizes and random numbers.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax import checks
from nonlocal_jax.data.decode.conversion import Window
from nonlocal_jax.data.decode.timeline import TIME_ROUNDING
from nonlocal_jax.layers.presets import PRESETS, Preset

ClipIndices = Int[np.ndarray, "clips t"]  # numbers of the frames of each clip
FrameTimes = Float[np.ndarray, " count"]  # when each frame of a video is shown, in seconds
Crops = Literal["three", "centre", "full"]
SamplingRule = Literal["consecutive", "slowfast"]
ShortVideoRule = Literal["loop", "hold"]
CROPS: dict[Crops, int] = {"three": 3, "centre": 1, "full": 1}


@dataclasses.dataclass(frozen=True)
class InTime:
    """Chooses the frames of a clip.

    Attributes:
        frames: Frames of a clip, T.
        stride: Distance from each frame to the next. 2 keeps every other one of 2T frames.
        fps: Frames a second in which the stride is counted. None counts the frames of the file,
            whatever their rate, as the paper does.
        rule: "consecutive" takes the frames start + i · stride, as the paper does. "slowfast"
            spreads T frames evenly over T · stride consecutive ones, first and last included, as
            PySlowFast's decoder does for Kinetics; a stride of 8 then is one of 9.
        short: For a video shorter than a clip, "loop" starts again at its first frame, and "hold"
            repeats its last frame, as PySlowFast does.

    Source: section 4.1 of the paper; PySlowFast's `temporal_sampling`, with fps 30.
    """

    frames: int = 32
    stride: int = 2
    fps: float | None = None
    rule: SamplingRule = "consecutive"
    short: ShortVideoRule = "loop"

    def __post_init__(self) -> None:
        checks.at_least("frames", self.frames, 1)
        checks.at_least("stride", self.stride, 1)
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be positive and finite, or None; got {self.fps}.")

    @classmethod
    def from_preset(
        cls, frames: int, stride: int, preset: Preset, fps: float | None = None
    ) -> "InTime":
        """Makes the sampling that a published source uses.

        Args:
            frames: Frames of a clip.
            stride: Distance from each frame to the next.
            preset: The source whose `rule` and `short` are taken from `PRESETS`.
            fps: Frames a second in which the stride is counted; None counts those of the file.

        >>> sampling = InTime.from_preset(8, 8, "slowfast", fps=30.0)
        >>> sampling.rule, sampling.short
        ('slowfast', 'hold')
        """
        checks.one_of("preset", preset, PRESETS)
        conventions = PRESETS[preset].input
        return cls(frames, stride, fps, conventions.sampling, conventions.short_video)

    def clip(
        self, count: int, rate: float, share: float, times: FrameTimes | None = None
    ) -> Int[np.ndarray, " t"]:
        """Computes the frames of one clip.

        Args:
            count: Number of frames of the video.
            rate: Average frame rate of the video, frames a second.
            share: Where the clip starts, from 0 (with the video) to 1 (so that both end together).
            times: When each frame is shown, in seconds after the first one. Used with `fps` if the
                frame rate varies. None means that it is constant.

        Returns:
            (T,), each from 0 to count - 1.

        >>> InTime(frames=4, stride=2).clip(10, 30.0, 1.0)
        array([3, 5, 7, 9])
        >>> InTime(frames=4, stride=2).clip(5, 30.0, 0.5)  # too short
        array([0, 2, 4, 1])
        >>> times = np.array([0.0, 0.1, 0.2, 0.3, 1.0])  # the rate is 4 on average
        >>> InTime(frames=3, stride=1, fps=10.0).clip(5, 4.0, 0.0, times)
        array([0, 1, 2])
        """
        step = self.stride * (rate / self.fps if self.fps else 1.0)
        positions: np.ndarray
        if self.rule == "slowfast":
            start = share * max(count - self.frames * step, 0.0)
            positions = np.linspace(start, start + self.frames * step - 1, self.frames)
        else:
            latest_start = count - 1 - math.floor((self.frames - 1) * step)
            first = 0
            if latest_start > 0:
                first = min(math.floor(share * (latest_start + 1)), latest_start)
            positions = first + np.arange(self.frames) * step
        indices = positions.astype(np.int64)
        indices = indices % count if self.short == "loop" else np.clip(indices, 0, count - 1)
        if self.fps is None or times is None or _are_evenly_spaced(times, rate):
            return indices
        seconds = (indices + positions % 1) / rate
        return np.searchsorted(times, seconds + TIME_ROUNDING, side="right") - 1

    def clips(
        self, count: int, rate: float, clips: int, times: FrameTimes | None = None
    ) -> ClipIndices:
        """Computes the frames of clips evenly spaced in time.

        The first clip starts with the video and the last one ends with it. A single clip is in the
        middle.

        Args:
            count: Number of frames of the video.
            rate: Average frame rate of the video, frames a second.
            clips: Number of clips.
            times: When each frame is shown, as in `clip`.

        >>> InTime(frames=2, stride=1).clips(10, 30.0, 3)
        array([[0, 1],
               [4, 5],
               [8, 9]])
        """
        checks.at_least("clips", clips, 1)
        shares = [0.5] if clips == 1 else [i / (clips - 1) for i in range(clips)]
        return np.stack([self.clip(count, rate, share, times) for share in shares])


def _are_evenly_spaced(times: FrameTimes, rate: float) -> bool:
    """Whether times are those of a constant frame rate, up to rounding."""
    return bool(np.abs(times - np.arange(len(times)) / rate).max() <= TIME_ROUNDING)


@dataclasses.dataclass(frozen=True)
class InSpace:
    """Scales and crops the frames of a clip at random, for training.

    Attributes:
        size: Rows and columns of the crop.
        shorter: Smallest and largest length that the shorter side of a frame is scaled to.
        inverse: Whether 1 / length is uniform, as in PySlowFast's Kinetics recipes, instead of the
            length.

    Source: section 4.1 of the paper: a shorter side uniform in [256, 320], crops of 224×224.
    """

    size: int = 224
    shorter: tuple[int, int] = (256, 320)
    inverse: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.shorter[0] <= self.shorter[1]:
            raise ValueError(
                f"size and shorter must satisfy 1 ≤ size ≤ shorter[0] ≤ shorter[1]; "
                f"got size {self.size} and shorter {self.shorter}."
            )

    def window(self, height: int, width: int, shares: Float[np.ndarray, "3"]) -> Window:
        """Chooses the part of a frame that is scaled to the crop.

        It shows what scaling the whole frame and then cropping it would show, up to one pixel of
        the file.

        Args:
            height: Height of the frame in pixels.
            width: Width of the frame in pixels.
            shares: Uniform random numbers from [0, 1) for the scale, the distance from the top, and
                the distance from the left.

        >>> InSpace().window(256, 340, np.array([0.0, 0.5, 0.0]))
        Window(top=16, left=0, height=224, width=224, size=(224, 224))
        """
        smallest, largest = self.shorter
        if self.inverse:
            shorter = round(1 / (1 / largest + shares[0] * (1 / smallest - 1 / largest)))
        else:
            shorter = smallest + math.floor(shares[0] * (largest - smallest + 1))
        side = max(round(min(height, width) * self.size / shorter), 1)
        top = math.floor(shares[1] * (height - side + 1))
        left = math.floor(shares[2] * (width - side + 1))
        return Window(top, left, side, side, (self.size, self.size))


def whole(height: int, width: int, shorter: int) -> Window:
    """Returns the window of a whole frame, with its shorter side scaled to a given length.

    >>> whole(240, 320, 256).size
    (256, 341)
    """
    scale = shorter / min(height, width)
    # Rounding down must not make the shorter side shorter than asked for.
    rows, columns = (max(math.floor(length * scale), shorter) for length in (height, width))
    return Window(0, 0, height, width, (rows, columns))


def crops(frames: np.ndarray, size: int, kind: Crops) -> list[np.ndarray]:
    """Crops frames along their longer side, evenly spaced.

    Args:
        frames: (..., H, W, C), whose shorter side is at least `size`.
        size: Rows and columns of a crop.
        kind: "three" is left, middle and right, or top, middle and bottom. "centre" is the middle
            alone, "full" the whole frame.

    Returns:
        Views (..., size, size, C); for "full" a single one of (..., H, W, C).

    >>> [int(part[0, 0, 0]) for part in crops(np.arange(10).reshape(2, 5, 1), 2, "three")]
    [0, 2, 3]
    """
    if kind == "full":
        return [frames]
    room_down, room_right = frames.shape[-3] - size, frames.shape[-2] - size
    longer = max(room_down, room_right)
    parts = []
    for share in (0.0, 0.5, 1.0) if kind == "three" else (0.5,):
        top = math.ceil((share if room_down == longer else 0.5) * room_down)
        left = math.ceil((share if room_right == longer else 0.5) * room_right)
        parts.append(frames[..., top : top + size, left : left + size, :])
    return parts
