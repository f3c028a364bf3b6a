"""Top-k accuracy, and average precision as the official script of Charades computes it."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from nonlocal_jax import checks

Scores = Float[np.ndarray, "videos classes"]
Truth = Bool[np.ndarray, "videos classes"]
Labels = Int[np.ndarray, " videos"]
Interval = tuple[float, float]


def top_k(scores: Scores, labels: Labels, k: int) -> Bool[np.ndarray, " videos"]:
    """Computes whether the label is among the k classes with the highest scores.

    On ties, classes with smaller numbers count as higher.

    Args:
        scores: (videos, classes).
        labels: (videos,) class of each video.
        k: Number of classes that count.

    Returns:
        (videos,) of bool.

    >>> top_k(np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]), np.array([2, 1]), 2)
    array([ True, False])
    """
    _check(scores, len(labels))
    checks.at_least("k", k, 1)
    # A stable sort keeps the order of the classes on ties.
    order = np.argsort(-scores, axis=1, kind="stable")
    return (order[:, :k] == labels[:, None]).any(axis=1)


def confusion(scores: Scores, labels: Labels) -> Int[np.ndarray, "truth answer"]:
    """Counts how many videos of each class (rows) are classified as each class (columns).

    >>> confusion(np.array([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]]), np.array([1, 1, 0]))
    array([[1, 0],
           [1, 1]])
    """
    _check(scores, len(labels))
    counts = np.zeros((scores.shape[1],) * 2, np.int64)
    # Unlike `counts[labels, answers] += 1`, this counts repeated pairs.
    np.add.at(counts, (labels, scores.argmax(axis=1)), 1)
    return counts


def average_precision(scores: Scores, truth: Truth) -> Float[np.ndarray, " classes"]:
    """Computes the average precision (AP) of each class.

    Videos are ranked by their score. AP is the mean precision over the videos that have the class:

        AP = 1/n Σ_i (number of positives among the first r_i) / r_i

    where r_i is the rank of the i-th of n positives. Ties keep the order of the videos. Videos
    without any label are ranked last, where they cost nothing, as in the Python code that is widely
    used for Charades. If all scores differ and every video has a label, the result is that of
    scikit-learn's `average_precision_score`.

    Args:
        scores: (videos, classes).
        truth: (videos, classes), which classes each video has.

    Returns:
        (classes,); NaN for a class that no video has.

    Source: `Charades_v1_classify.m`, which comes with Charades.

    >>> scores = np.array([[0.9], [0.8], [0.7]])
    >>> # It would be (1/1 + 2/3) / 2, but the second video has no label and is ranked last.
    >>> average_precision(scores, np.array([[True], [False], [True]])).round(4)
    array([1.])
    >>> truth = np.array([[True, False], [False, True], [True, False]])
    >>> average_precision(np.repeat(scores, 2, axis=1), truth).round(4)
    array([0.8333, 0.5   ])
    """
    _check(scores, len(truth))
    ranked_scores = np.where(truth.any(axis=1, keepdims=True), scores, -np.inf)
    order = np.argsort(-ranked_scores, axis=0, kind="stable")
    ranked_truth = np.take_along_axis(truth, order, axis=0)
    positives_so_far = np.cumsum(ranked_truth, axis=0)
    precision = positives_so_far / np.arange(1, len(truth) + 1)[:, None]
    positives = positives_so_far[-1]
    sums = np.where(ranked_truth, precision, 0).sum(axis=0)
    return np.divide(sums, positives, out=np.full(len(positives), np.nan), where=positives > 0)


def mean_average_precision(scores: Scores, truth: Truth) -> float:
    """Computes the mean of `average_precision` over the classes that at least one video has.

    The official script differs for classes without videos: there the mean is NaN.

    >>> scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.2, 0.1]])
    >>> mean_average_precision(scores, np.array([[True, False, False], [False, True, False]]))
    1.0
    """
    precisions = average_precision(scores, truth)
    if np.isnan(precisions).all():
        raise ValueError("at least one video must have a label; got none.")
    return float(np.nanmean(precisions))


def accuracy_interval(correct: int, count: int, confidence: float = 0.95) -> Interval:
    """Computes the Wilson score interval of an accuracy.

    Args:
        correct: Number of correct answers.
        count: Number of answers.
        confidence: Probability that the interval contains the true accuracy.

    >>> [round(bound, 3) for bound in accuracy_interval(90, 100)]
    [0.826, 0.945]
    """
    from scipy.stats import binomtest

    bounds = binomtest(int(correct), int(count)).proportion_ci(confidence, method="wilson")
    return float(bounds.low), float(bounds.high)


def bootstrap_interval(
    statistic: Callable[[Int[np.ndarray, " videos"]], float],
    count: int,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Computes a bootstrap interval: percentiles of a statistic over resampled videos.

    Args:
        statistic: Computes the statistic of the videos with the numbers passed to it. NaN is
            ignored.
        count: Number of videos.
        samples: Number of samples, each drawn with replacement.
        confidence: Share of the samples between the bounds.
        seed: Seed of the samples.

    >>> values = np.arange(100.0)
    >>> [round(bound) for bound in bootstrap_interval(lambda chosen: values[chosen].mean(), 100)]
    [44, 55]
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(samples)]
    tail = 50 * (1 - confidence)  # percent of the samples below, and above
    low, high = np.nanpercentile(values, (tail, 100 - tail))
    return float(low), float(high)


def _check(scores: np.ndarray, count: int) -> None:
    if len(scores) != count or not count:
        raise ValueError(
            "there must be scores for each video, and at least one video; "
            f"got scores for {len(scores)} of {count} videos."
        )
    if np.isnan(scores).any():
        raise ValueError("scores must be numbers; got NaN.")
