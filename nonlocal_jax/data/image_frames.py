"""Videos stored as one image file per frame, as in PySlowFast's version of Charades."""

import contextlib
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from nonlocal_jax.data import VideoError
from nonlocal_jax.data.annotations import Record
from nonlocal_jax.data.video import Crop, Video
from nonlocal_jax.files import AnyPath

RATE = 24.0  # frames a second of the images that are published with Charades


class ImageFrames:
    """Image files, one per frame, with the interface of `Video`."""

    rate = RATE

    def __init__(self, files: Sequence[AnyPath]) -> None:
        """Stores the file names; files are opened when they are read."""
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
        """Returns when frames are shown, in seconds after the first frame."""
        return np.asarray(indices) / self.rate

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        crop: Crop | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads frames by their number. Arguments and result are those of `Video.read`."""
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
    """Returns a context manager for the frames of a record, whichever way they are stored."""
    return ImageFrames(record.frames) if record.frames else Video(record.path)
