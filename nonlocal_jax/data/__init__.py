"""Data loading for the networks. Each submodule is imported when it is first used."""

from typing import TYPE_CHECKING

from nonlocal_jax.lazy import submodules

__all__ = [
    "DataError",
    "VideoError",
    "annotations",
    "augment",
    "cifar",
    "clips",
    "image_frames",
    "images",
    "kinetics_400",
    "pipeline",
    "sampling",
    "stand_in",
    "toy_video",
    "transcode",
    "video",
]

if TYPE_CHECKING:
    from nonlocal_jax.data import (
        annotations,
        augment,
        cifar,
        clips,
        image_frames,
        images,
        kinetics_400,
        pipeline,
        sampling,
        stand_in,
        toy_video,
        transcode,
        video,
    )
else:
    __getattr__, __dir__ = submodules(__name__, *__all__[2:])  # all but the two errors


class DataError(Exception):
    """Raised when data is missing or invalid. The message says what to do."""


class VideoError(DataError):
    """A file cannot be decoded as a video. The message names the file and the reason."""
