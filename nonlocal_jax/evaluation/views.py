"""From the views of each video to one row of scores, kept on disk as they come."""

import itertools
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Combination = Literal["mean", "max"]
Apply = Callable[[np.ndarray], Any]  # (B, T, H, W, C) -> scores (B, classes)


def score_views(
    apply: Apply, views: Iterable[np.ndarray], batch_size: int
) -> Float[np.ndarray, "views classes"]:
    """The scores of each view, a few views at a time; the last batch is filled up, so that all have one shape.

    Args:
        apply: from a batch (batch_size, T, H, W, C) to scores (batch_size, classes).
        views: each (T, H, W, C).
        batch_size: views at a time.

    >>> score_views(lambda batch: batch.mean(axis=(2, 3, 4)), np.arange(3.0).reshape(3, 1, 1, 1, 1), 2)
    array([[0.],
           [1.],
           [2.]])
    """
    rows, views = [], iter(views)
    while part := list(itertools.islice(views, batch_size)):
        batch = np.stack(part + part[-1:] * (batch_size - len(part)))
        rows.append(np.asarray(apply(batch))[: len(part)])
    return np.concatenate(rows)


def combine(
    scores: Float[np.ndarray, "views classes"], how: Combination = "mean"
) -> Float[np.ndarray, " classes"]:
    """One row for the video: the mean of its views, as for Kinetics, or of each class the largest, as for Charades."""
    if how not in ("mean", "max"):
        raise ValueError(f"how must be 'mean' or 'max'; got {how!r}.")
    return scores.mean(axis=0) if how == "mean" else scores.max(axis=0)


class ScoreFolder:
    """Scores by video in a folder, for who is killed and comes again.

    They are written in parts, each whole or not at all, at most `every` seconds after they came.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> scores = ScoreFolder(folder)
    >>> scores.add(3, {"views": np.array([0.25, 0.75])})
    >>> scores.fail(5, "5.mp4: the file is empty.")
    >>> scores.write()
    >>> again = ScoreFolder(folder)
    >>> sorted(again.found), again.found[3]["views"], again.failures
    ([3], array([0.25, 0.75]), {5: '5.mp4: the file is empty.'})
    """

    def __init__(self, folder: Path, writer: str = "0", every: float = 30.0) -> None:
        """Read what is there.

        Args:
            folder: made where it is not there.
            writer: a name for this process, where several write into the folder.
            every: seconds.

        Raises:
            ValueError: a part that is not one of these.
        """
        self.folder, self.writer, self.every = folder, writer, every
        self.found: dict[int, dict[str, np.ndarray]] = {}
        self.failures: dict[int, str] = {}
        self._new: list[int] = []
        self._written = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for part in sorted(folder.glob("*.npz")):
            try:
                with part.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    names = [name for name in arrays.files if name not in ("videos", "failures")]
                    table = {name: arrays[name] for name in names}
                    videos, failures = (
                        arrays["videos"].tolist(),
                        json.loads(str(arrays["failures"])),
                    )
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"{part} must be scores that were written here: {error}. Delete it, to make it anew."
                ) from error
            self.found |= {
                video: {name: table[name][i] for name in names} for i, video in enumerate(videos)
            }
            self.failures |= {int(video): reason for video, reason in failures.items()}

    def __contains__(self, video: int) -> bool:
        return video in self.found or video in self.failures

    def add(self, video: int, scores: dict[str, np.ndarray]) -> None:
        """The scores of a video, by name, each (classes,); all videos have the same names."""
        self.found[video] = scores
        self._come(video)

    def fail(self, video: int, reason: str) -> None:
        """A video that cannot be read."""
        self.failures[video] = reason
        self._come(video)

    def _come(self, video: int) -> None:
        self._new.append(video)
        if time.monotonic() - self._written >= self.every:
            self.write()

    def write(self) -> None:
        """Write what is new."""
        self._written = time.monotonic()
        if not self._new:
            return
        videos = [video for video in self._new if video in self.found]
        names = self.found[videos[0]] if videos else {}
        table: dict[str, Any] = {
            name: np.stack([self.found[video][name] for video in videos]) for name in names
        }
        failures = {video: self.failures[video] for video in self._new if video in self.failures}
        part = self.folder / f"{min(self._new):08d}-{max(self._new):08d}-by-{self.writer}.npz"
        partial = part.with_suffix(".partial")
        with partial.open("wb") as out:
            np.savez(
                out,
                videos=np.array(videos, np.int64),
                failures=np.array(json.dumps(failures)),
                **table,
            )
            out.flush()
            os.fsync(out.fileno())
        partial.replace(part)
        self._new = []
