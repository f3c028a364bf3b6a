"""Batches of examples, by grain. Their order depends on the seed alone.

The batch of a step is the same for any number of worker processes and hosts, and however often a
run was stopped and resumed. The batch of any step can be read without reading those before it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nonlocal_jax import checks
from nonlocal_jax.lazy import extra

Rows = range
THREADS = 2  # that read ahead in each process; NumPy and decoders release Python's global lock
PREFETCHED_BATCHES = 4


@runtime_checkable
class ExampleReader(Protocol):
    """Reads examples by number."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Reads examples and stacks them.

        Args:
            indices: (B,) numbers of the examples.
            epochs: (B,) epoch in which each example is read, for readers that augment at random;
                None in evaluation.

        Returns:
            Arrays by name: "inputs" (B, ...) and "labels" (B,). In evaluation also "mask" (B,) if
            some examples are not real.
        """
        ...


def training_batches(
    source: ExampleReader,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    rows: Rows | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches without end. Each epoch has every example once, in a new order.

    A batch may reach into the next epoch.

    Args:
        source: Reads the examples.
        batch_size: Examples of a batch, of all hosts together.
        seed: Seed of the order.
        start: Step to start at.
        rows: Rows of each batch to read; None reads all.
        workers: Number of processes that read. 0 reads in threads of this process.

    Yields:
        What `source` reads, and "position" (B,), uint32. It counts examples over all epochs, and
        random numbers of an example can be derived from it.

    Raises:
        ValueError: There are no examples, or a number is out of range.
        ImportError: grain is not installed.

    >>> from nonlocal_jax.data.images import Images
    >>> source = Images(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), np.arange(5))
    >>> steps = [next(training_batches(source, 2, seed=0, start=step)) for step in range(3)]
    >>> labels = np.concatenate([batch["labels"] for batch in steps])
    >>> np.sort(labels[:5])  # an epoch
    array([0, 1, 2, 3, 4])
    >>> steps[2]["position"]
    array([4, 5], dtype=uint32)
    """
    with extra("experiments"):
        import grain

    checks.at_least("the number of examples", len(source), 1)
    checks.at_least("batch_size", batch_size, 1)
    checks.at_least("start", start, 0)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    read = _ReadShuffled(source, batch_size, rows or range(batch_size))
    batches = order.batch(batch_size).map_with_index(read)
    return iter(_prefetched(batches.slice(slice(start, None)), workers))


def evaluation_batches(
    source: ExampleReader, batch_size: int, *, rows: Rows | None = None, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every example once, in order.

    The last batch is padded with examples whose "mask" (B,) is False.

    Args:
        source: Reads the examples.
        batch_size: Examples of a batch, of all hosts together.
        rows: Rows of each batch to read; None reads all.
        workers: Number of processes that read. 0 reads in threads of this process.

    Yields:
        What `source` reads, "position" (B,) and "mask" (B,).

    Raises:
        ValueError: A number is out of range.
        ImportError: grain is not installed.

    >>> from nonlocal_jax.data.images import Images
    >>> source = Images(np.zeros((5, 1, 1, 1), np.uint8), np.arange(5))
    >>> [batch["mask"].sum().item() for batch in evaluation_batches(source, 2)]
    [2, 2, 1]
    """
    with extra("experiments"):
        import grain

    checks.at_least("batch_size", batch_size, 1)
    batch_count = -(-len(source) // batch_size)
    read = _ReadInOrder(source, batch_size, rows or range(batch_size))
    return iter(_prefetched(grain.MapDataset.range(batch_count).map(read), workers))


def read_ahead(
    read: Callable[[int], Any], indices: Sequence[int], threads: int = THREADS
) -> Iterator[tuple[int, Any]]:
    """Reads items in order, in threads that work ahead of the consumer.

    Args:
        read: Reads one item.
        indices: Numbers of the items.
        threads: Number of threads. Each is ahead by at most one item.

    Yields:
        The number of an item and the item.

    >>> list(read_ahead(lambda index: index**2, [3, 1, 2]))
    [(3, 9), (1, 1), (2, 4)]
    """
    with extra("experiments"):
        import grain

    if not len(indices):
        return iter(())
    pairs = grain.MapDataset.source(list(indices)).map(lambda index: (index, read(index)))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(pairs.to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _ReadShuffled:
    source: ExampleReader
    batch_size: int
    rows: Rows

    def __call__(self, step: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(self.rows)
        position = (step * self.batch_size + rows).astype(np.uint32)
        examples = self.source.read(np.asarray(indices)[rows], position // len(self.source))
        return {**examples, "position": position}


@dataclasses.dataclass(frozen=True)
class _ReadInOrder:
    source: ExampleReader
    batch_size: int
    rows: Rows

    def __call__(self, batch: int) -> dict[str, np.ndarray]:
        position = batch * self.batch_size + np.asarray(self.rows)
        mask = position < len(self.source)
        examples = self.source.read(np.where(mask, position, 0))
        mask = mask & examples.get("mask", True)
        return {**examples, "position": position.astype(np.uint32), "mask": mask}


def _prefetched(batches: Any, workers: int) -> Any:
    import absl.flags
    import grain

    checks.at_least("workers", workers, 0)
    if not workers:
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCHED_BATCHES)
        return batches.to_iter_dataset(options)
    # grain's workers read absl's flags, which are parsed only in programs started by absl.
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()
    processes = grain.multiprocessing.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=PREFETCHED_BATCHES
    )
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return batches.to_iter_dataset(options).mp_prefetch(processes)
