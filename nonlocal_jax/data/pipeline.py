"""Batches of examples by grain: their order depends on the seed alone, and any step's batch can be asked for.

The batch of a step is the same whatever the number of worker processes, of hosts, and of starts of a run.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

Rows = range
THREADS = 2  # that read ahead in each process; NumPy and decoders let the interpreter go
AHEAD = 4  # batches


@runtime_checkable
class Source(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The examples, stacked, by name: "inputs" (B, ...) and "labels" (B,), and in evaluation "mask" where not all are real.

        Args:
            indices: (B,), of the examples.
            epochs: (B,), which time it is that each is read in training, for a source with random numbers of its own; None in
                evaluation.
        """
        ...


def training_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    rows: Rows | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, each epoch in a new order, every example once in it; a batch may reach into the next epoch.

    Args:
        source: the examples.
        batch_size: of all hosts together.
        seed: of the order.
        start: the step to begin with.
        rows: of each batch, those to read; None is all.
        workers: processes that read; 0 reads in threads of this one.

    Yields:
        What the source reads, and "position" (B,), uint32, which counts examples over epochs: for random numbers of their own.

    Raises:
        ValueError: an empty source, or a number out of its range.
        ImportError: grain is not installed.

    >>> from nonlocal_jax.data.images import Images
    >>> source = Images(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), np.arange(5))
    >>> first, second, third = (next(training_batches(source, 2, seed=0, start=step)) for step in range(3))
    >>> sorted([*first["labels"], *second["labels"], third["labels"][0]])  # an epoch
    [np.int64(0), np.int64(1), np.int64(2), np.int64(3), np.int64(4)]
    >>> third["position"]
    array([4, 5], dtype=uint32)
    """
    import grain

    for name, value, least in (
        ("the examples", len(source), 1),
        ("batch_size", batch_size, 1),
        ("start", start, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    batches = order.batch(batch_size).map_with_index(
        _Read(source, batch_size, rows or range(batch_size))
    )
    return iter(_ahead(batches.slice(slice(start, None)), workers))


def evaluation_batches(
    source: Source, batch_size: int, *, rows: Rows | None = None, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled up with examples whose "mask" (B,) is False.

    Args, Raises: as `training_batches`.

    >>> from nonlocal_jax.data.images import Images
    >>> source = Images(np.zeros((5, 1, 1, 1), np.uint8), np.arange(5))
    >>> [batch["mask"].sum().item() for batch in evaluation_batches(source, 2)]
    [2, 2, 1]
    """
    import grain

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    batches = grain.MapDataset.range(-(-len(source) // batch_size))
    return iter(
        _ahead(batches.map(_ReadInOrder(source, batch_size, rows or range(batch_size))), workers)
    )


def read_ahead(
    read: Callable[[int], Any], indices: Sequence[int], threads: int = THREADS
) -> Iterator[tuple[int, Any]]:
    """Pairs of an index and what is read, in order, by some threads that are a few ahead.

    Args:
        read: reads one.
        indices: what to read.
        threads: that read, each with one that waits to be taken.

    >>> list(read_ahead(lambda index: index**2, [3, 1, 2]))
    [(3, 9), (1, 1), (2, 4)]
    """
    import grain

    if not len(indices):
        return iter(())
    pairs = grain.MapDataset.source(list(indices)).map(lambda index: (index, read(index)))
    return iter(
        pairs.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    )


@dataclasses.dataclass(frozen=True)
class _Read:
    source: Source
    batch_size: int
    rows: Rows

    def __call__(self, step: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(self.rows)
        position = (step * self.batch_size + rows).astype(np.uint32)
        return {
            **self.source.read(np.asarray(indices)[rows], position // len(self.source)),
            "position": position,
        }


@dataclasses.dataclass(frozen=True)
class _ReadInOrder:
    source: Source
    batch_size: int
    rows: Rows

    def __call__(self, batch: int) -> dict[str, np.ndarray]:
        position = batch * self.batch_size + np.asarray(self.rows)
        mask = position < len(self.source)
        read = self.source.read(np.where(mask, position, 0))
        return {
            **read,
            "position": position.astype(np.uint32),
            "mask": mask & read.get("mask", True),
        }


def _ahead(batches: Any, workers: int) -> Any:
    import absl.flags
    import grain

    if workers < 0:
        raise ValueError(f"workers must be at least 0; got {workers}.")
    if workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # grain's workers read flags, which only absl's own programs parse
        options = grain.multiprocessing.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=AHEAD
        )
        return batches.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        ).mp_prefetch(options)
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    )
