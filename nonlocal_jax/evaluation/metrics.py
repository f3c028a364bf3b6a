"""How good scores are: top-k accuracy, and average precision as the official script of Charades counts it."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

Scores = Float[np.ndarray, "videos classes"]
Truth = Bool[np.ndarray, "videos classes"]
Labels = Int[np.ndarray, " videos"]
Interval = tuple[float, float]


def top_k(scores: Scores, labels: Labels, k: int) -> Bool[np.ndarray, " videos"]:
    """Whether the label is among the k classes with the highest scores; of equal scores the first classes count as higher.

    >>> top_k(np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]), np.array([2, 1]), 2)
    array([ True, False])
    """
    _check(scores, len(labels))
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}.")
    order = np.argsort(-scores, axis=1, kind="stable")
    return (order[:, :k] == labels[:, None]).any(axis=1)


def confusion(scores: Scores, labels: Labels) -> Int[np.ndarray, "truth answer"]:
    """How many videos of each class (rows) are taken for each class (columns).

    >>> confusion(np.array([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]]), np.array([1, 1, 0]))
    array([[1, 0],
           [1, 1]])
    """
    _check(scores, len(labels))
    table = np.zeros((scores.shape[1],) * 2, np.int64)
    np.add.at(table, (labels, scores.argmax(axis=1)), 1)
    return table


def average_precision(scores: Scores, truth: Truth) -> Float[np.ndarray, " classes"]:
    """Of each class: videos are ranked by its score, and AP is the mean, over the videos that have it, of the precision there.

    AP = 1 / n Σ_i (number of positives among the first r_i) / r_i, where r_i is the rank of the i-th of n positives.

    Equal scores stay in the order of the videos, and a class that no video has is NaN. Videos without any label are ranked
    last (so that they cost nothing), as in the Python that is widely used for Charades. scikit-learn's
    `average_precision_score` is the same where scores are all different and every video has a label.

    Source: the rule is that of `Charades_v1_classify.m`, which comes with Charades.

    >>> scores = np.array([[0.9], [0.8], [0.7]])
    >>> average_precision(scores, np.array([[True], [False], [True]])).round(4)  # (1/1 + 2/3) / 2, but the second is unlabelled
    array([1.])
    >>> two = np.array([[True, False], [False, True], [True, False]])
    >>> average_precision(np.repeat(scores, 2, axis=1), two).round(4)
    array([0.8333, 0.5   ])
    """
    _check(scores, len(truth))
    ranked_scores = np.where(truth.any(axis=1, keepdims=True), scores, -np.inf)
    order = np.argsort(-ranked_scores, axis=0, kind="stable")
    ranked = np.take_along_axis(truth, order, axis=0)
    found = np.cumsum(ranked, axis=0)
    precision = found / np.arange(1, len(truth) + 1)[:, None]
    positives = found[-1]
    sums = np.where(ranked, precision, 0).sum(axis=0)
    return np.divide(sums, positives, out=np.full(len(positives), np.nan), where=positives > 0)


def mean_average_precision(scores: Scores, truth: Truth) -> float:
    """The mean of `average_precision` over the classes that some video has; the script's own mean is NaN if a class has none.

    >>> scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.2, 0.1]])
    >>> mean_average_precision(scores, np.array([[True, False, False], [False, True, False]]))
    1.0
    """
    each = average_precision(scores, truth)
    if np.isnan(each).all():
        raise ValueError("at least one video must have a label; got none.")
    return float(np.nanmean(each))


def accuracy_interval(correct: int, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of an accuracy.

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
    """The percentiles of a statistic over samples of the videos, drawn with replacement.

    Args:
        statistic: of the videos that are chosen, by their numbers; what is not finite is left out.
        count: of the videos.
        samples: how many.
        confidence: share of the samples between the bounds.
        seed: of the samples.

    >>> values = np.arange(100.0)
    >>> [round(bound) for bound in bootstrap_interval(lambda chosen: values[chosen].mean(), 100)]
    [44, 55]
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(samples)]
    outside = 50 * (1 - confidence)
    low, high = np.nanpercentile(values, (outside, 100 - outside))
    return float(low), float(high)


def _check(scores: np.ndarray, count: int) -> None:
    if len(scores) != count or not count:
        raise ValueError(
            f"there must be scores of each video, and at least one; got {len(scores)} of {count} videos."
        )
    if np.isnan(scores).any():
        raise ValueError("scores must be numbers; got NaN.")
