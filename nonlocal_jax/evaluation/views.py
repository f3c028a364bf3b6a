"""Combines the scores of each video's views, and stores them on disk."""

import io
import itertools
import json
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Real

from nonlocal_jax import checks, files
from nonlocal_jax.evaluation.metrics import check_numbers

Combination = Literal["mean", "max"]
STORED_KINDS = "biuf"  # Kinds of NumPy types that scores are stored in.
Apply = Callable[[np.ndarray], Any]  # (B, T, H, W, C) -> scores (B, classes)


def score_views(
    apply: Apply, views: Iterable[np.ndarray], batch_size: int
) -> Real[np.ndarray, "views classes"] | Bool[np.ndarray, "views classes"]:
    """Computes the scores of views in batches.

    The last batch is padded with copies of its last view, so that all batches have one shape.

    Args:
        apply: Computes scores (batch_size, classes) of a batch (batch_size, T, H, W, C).
        views: Views (T, H, W, C), at least one.
        batch_size: Number of views in a batch.

    Raises:
        ValueError: There is no view, or `batch_size` is less than 1.

    >>> views = np.arange(3.0).reshape(3, 1, 1, 1, 1)
    >>> score_views(lambda batch: batch.mean(axis=(2, 3, 4)), views, 2)
    array([[0.],
           [1.],
           [2.]])
    """
    checks.at_least("batch_size", batch_size, 1)
    scores, iterator = [], iter(views)
    while batch := list(itertools.islice(iterator, batch_size)):
        padding = batch[-1:] * (batch_size - len(batch))
        batch_scores = np.asarray(apply(np.stack(batch + padding)))
        scores.append(batch_scores[: len(batch)])
    if not scores:
        raise ValueError("views must have at least one view; got none.")
    return np.concatenate(scores)


def combine(
    scores: Real[np.ndarray, "views classes"] | Bool[np.ndarray, "views classes"],
    how: Combination = "mean",
) -> Real[np.ndarray, " classes"] | Bool[np.ndarray, " classes"]:
    """Combines the scores of the views of one video.

    Args:
        scores: (views, classes), at least one view. NaN makes the score of its class NaN.
        how: "mean" over the views, as for Kinetics, or "max" for each class, as for Charades.

    Returns:
        (classes,). A mean is float32 for float32 and for types of up to 16 bits, else float64. A
        maximum has the type of the scores.

    Raises:
        ValueError: There is no view, or scores are no numbers.

    >>> combine(np.array([[0, 5], [3, 4]], np.uint8)), combine(np.eye(2, dtype=bool), "max")
    (array([1.5, 4.5], dtype=float32), array([ True,  True]))
    """
    checks.one_of("how", how, ("mean", "max"))
    scores = np.asarray(scores)
    check_numbers(scores)
    if len(scores.shape) != 2 or not len(scores):
        raise ValueError(
            f"scores must have shape (views, classes), with at least one view; got {scores.shape}."
        )
    if how == "max":
        with np.errstate(invalid="ignore"):  # bfloat16 warns of NaN
            return scores.max(axis=0)
    # Summed in the type of the scores, small addends would vanish, and integers overflow.
    mean = scores.astype(np.float64).mean(axis=0)
    is_wide = scores.dtype.itemsize >= 4 and scores.dtype != np.float32
    return mean if is_wide else mean.astype(np.float32)


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
            ValueError: A file in the folder has no scores or is damaged, or the files do not match.
                The message names the file.
            OSError: A file cannot be read.
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
        content = part.read_bytes()
        try:
            videos, failures, tables = _decode(content)
            for row, video in enumerate(videos):
                scores = {name: table[row] for name, table in tables.items()}
                self._check_names(scores)
                self.found[video] = scores
        except MemoryError:
            raise
        # Damaged files raise many kinds of errors in zipfile and NumPy, also undocumented ones.
        except Exception as error:
            raise ValueError(
                f"{part} must be a file of scores: {error}. "
                "Delete it to have its videos tested again."
            ) from error
        self.failures |= failures

    def _check_names(self, scores: dict[str, np.ndarray]) -> None:
        """Checks that scores have the names and the classes of those that are there already."""
        if not self.found:
            return
        expected, got = (
            {name: row.shape for name, row in some.items()}
            for some in (next(iter(self.found.values())), scores)
        )
        if got != expected:
            raise ValueError(
                f"all videos must have the same scores, by name and shape {expected}; got {got}"
            )

    def __contains__(self, video: int) -> bool:
        return video in self.found or video in self.failures

    def add(self, video: int, scores: dict[str, np.ndarray]) -> None:
        """Adds the scores of a video.

        Args:
            video: Number of the video.
            scores: Arrays (classes,) by name. All videos have the same names and classes. Types
                that NumPy cannot store, such as bfloat16, are converted to float32.

        Raises:
            ValueError: The names or classes are not those of the other videos, or scores are no
                numbers.
        """
        scores = {name: _storable(row) for name, row in scores.items()}
        self._check_names(scores)
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


def _storable(scores: np.ndarray) -> np.ndarray:
    """Converts scores to a type that .npy files have."""
    scores = np.asarray(scores)
    check_numbers(scores)
    return scores if scores.dtype.kind in STORED_KINDS else scores.astype(np.float32)


def _decode(content: bytes) -> tuple[list[int], dict[int, str], dict[str, np.ndarray]]:
    """Returns the numbers of the videos, the failures, and the tables (videos, classes) by name."""
    tables = _read_arrays(content)
    videos, text = tables.pop("videos"), tables.pop("failures")
    if videos.ndim != 1 or videos.dtype.kind not in "iu" or (videos < 0).any():
        raise ValueError("'videos' must be a list of numbers of videos")
    if text.shape != () or text.dtype.kind != "U":
        raise ValueError("'failures' must be text")
    failures = json.loads(str(text))
    if not isinstance(failures, dict) or not all(
        number.isdecimal() and isinstance(reason, str) for number, reason in failures.items()
    ):
        raise ValueError("'failures' must be an object of reasons by number of the video")
    for name, table in tables.items():
        if table.dtype.kind not in STORED_KINDS or table.ndim != 2 or len(table) != len(videos):
            raise ValueError(
                f"{name!r} must be numbers of shape ({len(videos)} videos, classes); "
                f"got {table.dtype} of shape {table.shape}"
            )
    if len(videos) and not tables:
        raise ValueError("it must have scores of its videos; got none")
    return videos.tolist(), {int(number): failures[number] for number in failures}, tables


def _read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """Reads the arrays that `numpy.savez` wrote, in no more memory than the file has bytes."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its arrays must not be compressed")
        if sum(member.file_size for member in members) > len(content):
            raise ValueError("its arrays must not be larger than the file")
        return {
            member.filename.removesuffix(".npy"): _read_array(archive.read(member))
            for member in members
        }


def _read_array(content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"its arrays must be in version 1.0 of the .npy format; got {version}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a header that NumPy can only guess is damaged
        shape, is_transposed, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("its arrays must not hold Python objects")
    # Unlike `numpy.load`, this does not allocate what a damaged header claims.
    values = np.frombuffer(content, dtype, offset=stream.tell()).copy()
    return values.reshape(shape, order="F" if is_transposed else "C")
