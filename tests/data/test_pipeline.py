"""The order of examples depends on the seed alone, and any step's batch can be read."""

import collections
import itertools
import os
import signal
import time

import numpy as np
import psutil
import pytest

from nonlocal_jax.data.images import Images, load_digits
from nonlocal_jax.data.pipeline import evaluation_batches, training_batches

N = 23
SOURCE = Images(np.arange(N, dtype=np.uint8).reshape(N, 1, 1, 1), np.arange(N), num_classes=N)


def first_labels(batches, count):
    return np.stack([batch["labels"] for batch in itertools.islice(batches, count)])


def masked_labels(batches):
    return np.concatenate([batch["labels"][batch["mask"]] for batch in batches])


def test_each_epoch_has_every_example_once_in_a_new_order():
    # Five epochs, in batches of 5 that do not divide an epoch of 23.
    order = first_labels(training_batches(SOURCE, 5, seed=3), N).reshape(5, N)
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
    assert len({tuple(epoch) for epoch in order}) == 5
    other_seed = first_labels(training_batches(SOURCE, 5, seed=4), N).reshape(5, N)
    assert not np.array_equal(order[0], other_seed[0])


def test_training_can_start_at_any_step():
    batches = list(itertools.islice(training_batches(SOURCE, 5, seed=0), 12))
    for start in (1, 4, 11):
        batch = next(training_batches(SOURCE, 5, seed=0, start=start))
        for name, value in batch.items():
            np.testing.assert_array_equal(value, batches[start][name])
    positions = np.concatenate([batch["position"] for batch in batches])
    np.testing.assert_array_equal(positions, np.arange(60))


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_read_disjoint_rows_of_the_same_batch(hosts):
    batches = first_labels(training_batches(SOURCE, 6, seed=0), 7)
    rows = [range(i * 6 // hosts, (i + 1) * 6 // hosts) for i in range(hosts)]
    parts = [first_labels(training_batches(SOURCE, 6, seed=0, rows=part), 7) for part in rows]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), batches)


@pytest.mark.processes
def test_a_killed_worker_process_raises_an_error_instead_of_hanging():
    batches = training_batches(SOURCE, 5, seed=0, workers=2)
    next(batches)
    workers = [
        child
        for child in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(child.cmdline())
    ]
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(Exception, match=r"(?i)exit|terminat|died|kill|worker"):
        collections.deque(itertools.islice(batches, 1000), maxlen=0)
    assert time.monotonic() - start < 30


def test_evaluation_has_every_example_once_for_any_batch_size():
    for batch_size in (1, 4, 23, 64):
        batches = list(evaluation_batches(SOURCE, batch_size))
        assert {batch["labels"].shape for batch in batches} == {(batch_size,)}
        np.testing.assert_array_equal(masked_labels(batches), np.arange(N))
    halves = [evaluation_batches(SOURCE, 4, rows=rows) for rows in (range(2), range(2, 4))]
    labels = np.concatenate([masked_labels(half) for half in halves])
    np.testing.assert_array_equal(np.sort(labels), np.arange(N))


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"start": -1}, "start must be at least 0; got -1"),
        ({"workers": -2}, "workers must be at least 0; got -2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        training_batches(SOURCE, **{"batch_size": 5, "seed": 0, **options})


def test_no_examples():
    empty = Images(SOURCE.images[:0], SOURCE.labels[:0])
    with pytest.raises(ValueError, match="the number of examples must be at least 1; got 0"):
        training_batches(empty, 5, seed=0)


def test_digits_are_the_scans():
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1347, 450)
    assert train.images.max() == 16
    train_images, test_images = ({i.tobytes() for i in split.images} for split in (train, test))
    assert not train_images & test_images


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            np.zeros((2, 3, 3)),
            np.zeros(2, int),
            r"images must be uint8 \(n, H, W, channels\); got float64 \(2, 3, 3\)",
        ),
        (
            np.zeros((2, 3, 3, 1), np.uint8),
            np.zeros(3, int),
            r"labels must have shape \(2,\), one per image; got \(3,\)",
        ),
        (np.zeros((2, 3, 3, 1), np.uint8), np.array([1, 10]), "labels must be from 0 to 9; got 10"),
    ],
)
def test_bad_images(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Images(images, labels)
