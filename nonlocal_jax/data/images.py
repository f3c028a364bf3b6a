"""Images in memory, and scikit-learn's scanned digits in that form."""

import dataclasses

import numpy as np

from nonlocal_jax.data.toy_video import CLASSES, Split, load_scans


@dataclasses.dataclass(frozen=True)
class Images:
    """Images and their labels, a `nonlocal_jax.data.pipeline.ExampleReader`.

    Attributes:
        images: (n, H, W, channels), uint8.
        labels: (n,) class numbers.
        num_classes: Number of classes.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int = 10

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                "images must be uint8 (n, H, W, channels); "
                f"got {self.images.dtype} {self.images.shape}."
            )
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must have shape ({len(self.images)},), one per image; "
                f"got {self.labels.shape}."
            )
        if wrong := [label for label in self.labels if not 0 <= label < self.num_classes]:
            raise ValueError(f"labels must be from 0 to {self.num_classes - 1}; got {wrong[0]}.")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Reads the images with these numbers, as "inputs" and "labels"."""
        return {"inputs": self.images[indices], "labels": self.labels[indices]}


def load_digits(split: Split) -> Images:
    """Loads the 1,797 scanned digits of 8×8 pixels, split as in `load_scans`.

    Pixels are from 0 (paper) to 16 (ink). The task is much easier than CIFAR, and needs no
    download.

    >>> [load_digits(split).images.shape for split in ("train", "test")]
    [(1347, 8, 8, 1), (450, 8, 8, 1)]
    """
    scans = load_scans(split)
    images = [np.asarray(scans.images[digit, : scans.counts[digit]]) for digit in range(CLASSES)]
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), np.asarray(scans.counts))
    pixels = np.rint(16 * np.concatenate(images)).astype(np.uint8)
    return Images(pixels[..., None], labels)
