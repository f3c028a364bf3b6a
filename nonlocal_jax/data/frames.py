"""A video as a folder of images, one a frame, as PySlowFast has Charades; and what opens either kind."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from nonlocal_jax.data import VideoError
from nonlocal_jax.data.annotations import Record
from nonlocal_jax.data.convert import Crop
from nonlocal_jax.data.video import Video

RATE = 24.0  # frames a second of the frames that come with Charades


class ImageFrames:
    """Image files, one a frame, with the interface of `Video`."""

    rate = RATE

    def __init__(self, files: Sequence[Path]) -> None:
        """Nothing is opened yet."""
        self.files = files

    def __enter__(self) -> "ImageFrames":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def __len__(self) -> int:
        return len(self.files)

    def seconds(self, indices: np.ndarray) -> np.ndarray:
        """When frames are shown, from that of the first one on."""
        return np.asarray(indices) / self.rate

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        crop: Crop | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """As `Video.read`."""
        indices = np.asarray(indices)
        for index in np.unique(indices).tolist():
            with Video(self.files[index]) as image:
                pixels = image.read([0], crop)[0]
            if out is None:
                out = np.empty((len(indices), *pixels.shape), np.uint8)
            if pixels.shape != out.shape[1:]:
                raise VideoError(
                    f"{self.files[index]} is {pixels.shape[:2]}, others are {out.shape[1:3]}."
                )
            out[indices == index] = pixels
        if out is None or not len(indices):
            raise IndexError("indices must name at least one frame; got none.")
        return out


def open_frames(record: Record) -> contextlib.AbstractContextManager[Video | ImageFrames]:
    """The frames of a record, from `with` on."""
    return ImageFrames(record.frames) if record.frames else Video(record.path)
