"""Combines the scores of each video's views, and stores them on disk."""

import io
import itertools
import json
import time
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from nonlocal_jax import checks, files

Combination = Literal["mean", "max"]
Apply = Callable[[np.ndarray], Any]  # (B, T, H, W, C) -> scores (B, classes)


def score_views(
    apply: Apply, views: Iterable[np.ndarray], batch_size: int
) -> Float[np.ndarray, "views classes"]:
    """Computes the scores of views in batches.

    The last batch is padded with copies of its last view, so that all batches have one shape.

    Args:
        apply: Computes scores (batch_size, classes) of a batch (batch_size, T, H, W, C).
        views: Views (T, H, W, C), at least one.
        batch_size: Number of views in a batch.

    >>> views = np.arange(3.0).reshape(3, 1, 1, 1, 1)
    >>> score_views(lambda batch: batch.mean(axis=(2, 3, 4)), views, 2)
    array([[0.],
           [1.],
           [2.]])
    """
    scores, iterator = [], iter(views)
    while batch := list(itertools.islice(iterator, batch_size)):
        padding = batch[-1:] * (batch_size - len(batch))
        batch_scores = np.asarray(apply(np.stack(batch + padding)))
        scores.append(batch_scores[: len(batch)])
    return np.concatenate(scores)


def combine(
    scores: Float[np.ndarray, "views classes"], how: Combination = "mean"
) -> Float[np.ndarray, " classes"]:
    """Combines the scores of the views of one video.

    Args:
        scores: (views, classes).
        how: "mean" over the views, as for Kinetics, or "max" for each class, as for Charades.
    """
    checks.one_of("how", how, ("mean", "max"))
    return scores.mean(axis=0) if how == "mean" else scores.max(axis=0)


class ScoreFolder:
    """Keeps the scores of videos in a folder, so that a killed run can be resumed.

    Scores are written atomically to a new file at most every `every` seconds.

    >>> import tempfile
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> scores = ScoreFolder(folder)
    >>> scores.add(3, {"views": np.array([0.25, 0.75])})
    >>> scores.fail(5, "5.mp4: the file is empty.")
    >>> scores.write()
    >>> resumed = ScoreFolder(folder)
    >>> sorted(resumed.found), resumed.found[3]["views"], resumed.failures
    ([3], array([0.25, 0.75]), {5: '5.mp4: the file is empty.'})
    """

    def __init__(self, folder: files.PathLike, writer: str = "0", every: float = 30.0) -> None:
        """Reads the scores that are in the folder.

        Args:
            folder: The folder, local or remote. It is created if it does not exist.
            writer: Name of this process, if several write to the folder.
            every: Seconds between writes.

        Raises:
            ValueError: A file in the folder has no scores or is damaged.
        """
        folder = files.as_path(folder)
        self.folder, self.writer, self.every = folder, writer, every
        self.found: dict[int, dict[str, np.ndarray]] = {}
        self.failures: dict[int, str] = {}
        self._unwritten: list[int] = []
        self._last_write = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        parts: list[files.AnyPath] = sorted(folder.glob("*.npz"), key=lambda part: part.name)
        for part in parts:
            self._read_part(part)

    def _read_part(self, part: files.AnyPath) -> None:
        try:
            content = io.BytesIO(part.read_bytes())
            with np.load(content, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            videos = arrays.pop("videos").tolist()
            failures = json.loads(str(arrays.pop("failures")))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{part} must be a file of scores: {error}. "
                "Delete it to have its videos tested again."
            ) from error
        for row, video in enumerate(videos):
            self.found[video] = {name: table[row] for name, table in arrays.items()}
        self.failures |= {int(video): reason for video, reason in failures.items()}

    def __contains__(self, video: int) -> bool:
        return video in self.found or video in self.failures

    def add(self, video: int, scores: dict[str, np.ndarray]) -> None:
        """Adds the scores of a video.

        Args:
            video: Number of the video.
            scores: Arrays (classes,) by name. All videos have the same names.
        """
        self.found[video] = scores
        self._register(video)

    def fail(self, video: int, reason: str) -> None:
        """Records that a video cannot be read, and why."""
        self.failures[video] = reason
        self._register(video)

    def _register(self, video: int) -> None:
        self._unwritten.append(video)
        if time.monotonic() - self._last_write >= self.every:
            self.write()

    def write(self) -> None:
        """Writes what was added since the last write."""
        self._last_write = time.monotonic()
        if not self._unwritten:
            return
        videos = [video for video in self._unwritten if video in self.found]
        names = self.found[videos[0]] if videos else {}
        tables: dict[str, Any] = {
            name: np.stack([self.found[video][name] for video in videos]) for name in names
        }
        failed = [video for video in self._unwritten if video in self.failures]
        failures = json.dumps({video: self.failures[video] for video in failed})
        first, last = min(self._unwritten), max(self._unwritten)
        part = self.folder / f"{first:08d}-{last:08d}-by-{self.writer}.npz"
        with files.atomic_write(part) as partial, partial.open("wb") as stream:
            np.savez(
                stream,
                videos=np.array(videos, np.int64),
                failures=np.array(failures),
                **tables,
            )
        self._unwritten = []
