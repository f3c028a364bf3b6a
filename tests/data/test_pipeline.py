"""The order depends on the seed alone; every example once in an epoch; any step can be asked for."""

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


def labels(batches, count):
    return np.stack([batch["labels"] for batch in itertools.islice(batches, count)])


def test_each_epoch_has_every_example_once_in_an_order_of_its_own():
    order = labels(training_batches(SOURCE, 5, seed=3), N).reshape(
        5, N
    )  # five epochs in batches that do not divide them
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
    assert len({tuple(epoch) for epoch in order}) == 5
    assert not np.array_equal(
        order[0], labels(training_batches(SOURCE, 5, seed=4), N).reshape(5, N)[0]
    )


def test_any_step_can_be_the_first():
    whole = list(itertools.islice(training_batches(SOURCE, 5, seed=0), 12))
    for start in (1, 4, 11):
        batch = next(training_batches(SOURCE, 5, seed=0, start=start))
        for name, value in batch.items():
            np.testing.assert_array_equal(value, whole[start][name])
    np.testing.assert_array_equal(
        np.concatenate([batch["position"] for batch in whole]), np.arange(60)
    )


@pytest.mark.parametrize("parts", [2, 3])
def test_hosts_read_the_parts_of_one_batch(parts):
    whole = labels(training_batches(SOURCE, 6, seed=0), 7)
    rows = [range(i * 6 // parts, (i + 1) * 6 // parts) for i in range(parts)]
    shares = [labels(training_batches(SOURCE, 6, seed=0, rows=share), 7) for share in rows]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)


def test_worker_processes_change_nothing():
    here, there = (
        labels(training_batches(SOURCE, 5, seed=0, start=2, workers=workers), 9)
        for workers in (0, 2)
    )
    np.testing.assert_array_equal(there, here)


def test_a_worker_that_is_killed_is_an_error_and_no_hang():
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
    begun = time.monotonic()
    with pytest.raises(Exception, match=r"(?i)exit|terminat|died|kill|worker"):
        collections.deque(itertools.islice(batches, 1000), maxlen=0)
    assert time.monotonic() - begun < 30


def test_evaluation_has_every_example_once_whatever_the_batch():
    for batch_size in (1, 4, 23, 64):
        batches = list(evaluation_batches(SOURCE, batch_size))
        assert {batch["labels"].shape for batch in batches} == {(batch_size,)}
        seen = np.concatenate([batch["labels"][batch["mask"]] for batch in batches])
        np.testing.assert_array_equal(seen, np.arange(N))
    halves = [list(evaluation_batches(SOURCE, 4, rows=rows)) for rows in (range(2), range(2, 4))]
    seen = np.concatenate([batch["labels"][batch["mask"]] for half in halves for batch in half])
    np.testing.assert_array_equal(np.sort(seen), np.arange(N))


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
    with pytest.raises(ValueError, match="the examples must be at least 1; got 0"):
        training_batches(Images(SOURCE.images[:0], SOURCE.labels[:0]), 5, seed=0)


def test_digits_are_the_scans():
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1347, 450)
    assert train.images.max() == 16
    assert not {image.tobytes() for image in train.images} & {
        image.tobytes() for image in test.images
    }


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
            r"labels must be \(2,\), one an image; got \(3,\)",
        ),
        (np.zeros((2, 3, 3, 1), np.uint8), np.array([1, 10]), "labels must be from 0 to 9; got 10"),
    ],
)
def test_bad_images(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Images(images, labels)
