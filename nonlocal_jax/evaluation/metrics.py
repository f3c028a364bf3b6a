"""Top-k accuracy, and average precision as the official script of Charades computes it.

Scores may be bool, integers or floating-point numbers of any precision, also bfloat16. They are
only compared, in their own type, so that no two different scores become equal.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Real

from nonlocal_jax import checks

Scores = Real[np.ndarray, "videos classes"] | Bool[np.ndarray, "videos classes"]
Truth = Real[np.ndarray, "videos classes"] | Bool[np.ndarray, "videos classes"]
Labels = Integer[np.ndarray, " videos"]
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

    Raises:
        ValueError: Scores are NaN or no numbers, labels are no classes, or k is less than 1.

    >>> top_k(np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]), np.array([2, 1]), 2)
    array([ True, False])
    """
    scores = checked_scores(scores, len(labels))
    labels = checked_labels(labels, scores.shape[1])
    checks.at_least("k", k, 1)
    order = _descending(scores, axis=1)
    return (order[:, :k] == labels[:, None]).any(axis=1)


def confusion(scores: Scores, labels: Labels) -> Int[np.ndarray, "truth answer"]:
    """Counts how many videos of each class (rows) are classified as each class (columns).

    Raises:
        ValueError: Scores are NaN or no numbers, or labels are no classes.

    >>> confusion(np.array([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]]), np.array([1, 1, 0]))
    array([[1, 0],
           [1, 1]])
    """
    scores = checked_scores(scores, len(labels))
    labels = checked_labels(labels, scores.shape[1])
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
        truth: (videos, classes), which classes each video has, as bool or 0 and 1.

    Returns:
        (classes,); NaN for a class that no video has.

    Raises:
        ValueError: Scores are NaN or no numbers, or `truth` has other values or another shape.

    Source: `Charades_v1_classify.m`, which comes with Charades.

    >>> scores = np.array([[0.9], [0.8], [0.7]])
    >>> # It would be (1/1 + 2/3) / 2, but the second video has no label and is ranked last.
    >>> average_precision(scores, np.array([[True], [False], [True]])).round(4)
    array([1.])
    >>> truth = np.array([[True, False], [False, True], [True, False]])
    >>> average_precision(np.repeat(scores, 2, axis=1), truth).round(4)
    array([0.8333, 0.5   ])
    """
    scores = checked_scores(scores, len(truth))
    truth = checked_truth(truth, scores.shape)
    # Positives are never ranked after videos without a label, so leaving those out is the same.
    labelled = truth.any(axis=1)
    scores, truth = scores[labelled], truth[labelled]
    ranked_truth = np.take_along_axis(truth, _descending(scores, axis=0), axis=0)
    positives_so_far = np.cumsum(ranked_truth, axis=0)
    precision = positives_so_far / np.arange(1, len(truth) + 1)[:, None]
    positives = truth.sum(axis=0)
    sums = np.where(ranked_truth, precision, 0).sum(axis=0)
    return np.divide(sums, positives, out=np.full(len(positives), np.nan), where=positives > 0)


def mean_average_precision(scores: Scores, truth: Truth) -> float:
    """Computes the mean of `average_precision` over the classes that at least one video has.

    The official script differs for classes without videos: there the mean is NaN.

    Raises:
        ValueError: As `average_precision` does, or no video has a label.

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

    checks.at_least("count", count, 1)
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

    Raises:
        ValueError: There is no video or no sample, or the statistic is NaN for all samples.

    >>> values = np.arange(100.0)
    >>> [round(bound) for bound in bootstrap_interval(lambda chosen: values[chosen].mean(), 100)]
    [44, 55]
    """
    checks.at_least("count", count, 1)
    checks.at_least("samples", samples, 1)
    rng = np.random.default_rng(seed)
    values = np.array([float(statistic(rng.integers(0, count, count))) for _ in range(samples)])
    if np.isnan(values).all():
        raise ValueError("the statistic must be a number for at least one sample; got only NaN.")
    tail = 50 * (1 - confidence)  # percent of the samples below, and above
    low, high = np.nanpercentile(values, (tail, 100 - tail))
    return float(low), float(high)


def check_numbers(scores: np.ndarray) -> None:
    """Checks that scores are bool, integers or floating-point numbers.

    Raises:
        ValueError: They are complex, objects, text or the like.
    """
    # NumPy does not know that bfloat16 is a floating-point type; JAX does.
    kinds = (np.bool_, np.integer, np.floating)
    if not any(jnp.issubdtype(scores.dtype, kind) for kind in kinds):
        raise ValueError(f"scores must be real numbers; got an array of {scores.dtype}.")


def checked_scores(scores: Any, videos: int) -> np.ndarray:
    """Returns scores as a NumPy array (videos, classes).

    Raises:
        ValueError: They have another shape, are no numbers, or are NaN.
    """
    scores = np.asarray(scores)
    check_numbers(scores)
    if len(scores.shape) != 2 or not scores.shape[1]:
        raise ValueError(f"scores must have shape (videos, classes); got {scores.shape}.")
    if len(scores) != videos or not videos:
        raise ValueError(
            "there must be scores for each video, and at least one video; "
            f"got scores for {len(scores)} of {videos} videos."
        )
    if (undefined := np.isnan(scores).any(axis=1)).any():
        raise ValueError(f"scores must be numbers; got NaN for video {undefined.argmax()}.")
    return scores


def checked_labels(labels: Any, classes: int) -> np.ndarray:
    """Returns labels as a NumPy array (videos,) of classes from 0 to `classes` - 1.

    Raises:
        ValueError: They have another shape or type, or are out of range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            "labels must be integers, one class per video; "
            f"got {labels.dtype} of shape {labels.shape}."
        )
    if (wrong := (labels < 0) | (labels >= classes)).any():
        video = int(wrong.argmax())
        raise ValueError(
            f"labels must be between 0 and {classes - 1}, the last class; got {labels[video]} for "
            f"video {video}. Leave out videos without a class."
        )
    return labels.astype(np.intp)


def checked_truth(truth: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns which classes each video has, as an array of bool.

    Raises:
        ValueError: It has another shape, or values other than bool, 0 and 1.
    """
    truth = np.asarray(truth)
    if truth.shape != shape:
        raise ValueError(f"truth must have the shape of the scores, {shape}; got {truth.shape}.")
    classes = truth == 1
    if not (classes | (truth == 0)).all():
        raise ValueError("truth must be True or 1 where a video has a class, else False or 0.")
    return classes


def _descending(scores: np.ndarray, axis: int) -> np.ndarray:
    """Returns the order from the highest score to the lowest. Ties keep their order."""
    # Negating scores is wrong for unsigned integers, bool, and the smallest integer of each type.
    ascending = np.argsort(np.flip(scores, axis), axis=axis, kind="stable")
    return scores.shape[axis] - 1 - np.flip(ascending, axis)
