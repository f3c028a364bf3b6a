"""Metrics equal scikit-learn's, and an independent reading of their rules."""

import math

import ml_dtypes
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, confusion_matrix, top_k_accuracy_score

from nonlocal_jax import evaluation

RNG = np.random.default_rng(0)
DTYPES = (
    *(bool, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64),
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2),
)


def official_map(scores, truth):
    """Follows the rules of Charades' script step by step.

    For each class, go down the videos by their score, ties in their order and videos without any
    class last. At each video that has the class, note which share of the videos so far has it.
    The average of these notes is the result.
    """
    precisions = []
    for c in range(scores.shape[1]):
        labelled = [v for v in range(len(scores)) if truth[v].any()]
        unlabelled = [v for v in range(len(scores)) if not truth[v].any()]
        ranking = sorted(labelled, key=lambda v: -scores[v, c]) + unlabelled
        hits, notes = 0, []
        for rank, video in enumerate(ranking, start=1):
            if truth[video, c]:
                hits += 1
                notes.append(hits / rank)
        precisions.append(sum(notes) / len(notes) if notes else math.nan)
    return np.array(precisions)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_the_official_one(ties):
    truth = RNG.random((61, 13)) < 0.15
    truth[:, 4] = False  # a class that no video has
    truth[[5, 40]] = False  # videos without a class
    scores = RNG.random(truth.shape)
    if ties:
        scores = np.round(scores, 1)
    found = evaluation.average_precision(scores, truth)
    np.testing.assert_allclose(found, official_map(scores, truth), rtol=1e-12)
    assert math.isnan(found[4])
    assert evaluation.mean_average_precision(scores, truth) == pytest.approx(np.nanmean(found))


def test_average_precision_equals_scikit_learn():
    truth = RNG.random((80, 9)) < 0.3
    truth[np.arange(80), RNG.integers(0, 9, 80)] = True  # each has a class
    scores = RNG.random(truth.shape)
    expected = average_precision_score(truth, scores, average=None)
    np.testing.assert_allclose(evaluation.average_precision(scores, truth), expected, rtol=1e-12)


def test_unlabelled_videos_cost_nothing():
    truth = RNG.random((30, 5)) < 0.3
    truth[truth.sum(1) == 0, 0] = True
    scores = RNG.random(truth.shape)
    extended_scores = np.concatenate([np.full((4, 5), 2.0), scores])
    extended_truth = np.concatenate([np.zeros((4, 5), bool), truth])
    extended = evaluation.average_precision(extended_scores, extended_truth)
    np.testing.assert_allclose(extended, evaluation.average_precision(scores, truth))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_and_confusion_equal_scikit_learn(k):
    scores, labels = RNG.random((97, 11)), RNG.integers(0, 11, 97)
    expected = top_k_accuracy_score(labels, scores, k=k, labels=range(11))
    assert evaluation.top_k(scores, labels, k).mean() == pytest.approx(expected)
    np.testing.assert_array_equal(
        evaluation.confusion(scores, labels),
        confusion_matrix(labels, scores.argmax(1), labels=range(11)),
    )


def test_intervals():
    low, high = evaluation.accuracy_interval(60, 60)
    assert (round(low, 4), high) == (round(60 / (60 + 1.959964**2), 4), 1.0)  # Wilson's, by hand
    hits = 0
    for seed in range(60):  # 95% of the intervals contain the true value
        values = np.random.default_rng(seed).random(200) < 0.7
        low, high = evaluation.bootstrap_interval(
            lambda chosen, values=values: values[chosen].mean(), 200, samples=200
        )
        hits += low <= 0.7 <= high
    assert 50 <= hits <= 60


def test_reports():
    scores, labels = RNG.random((40, 6)), np.arange(40) % 5  # class 5 has no video
    report = evaluation.single_label_report(scores, labels)
    assert report["top1"]["value"] == (scores.argmax(1) == labels).mean()
    assert report["classes"]["5"] == {"videos": 0, "accuracy": None}
    assert sum(map(sum, report["confusion"])) == 40
    truth = RNG.random((40, 6)) < 0.4
    truth[:, 2] = False
    multi = evaluation.multi_label_report(scores, truth, list("abcdef"))
    precisions, counts = official_map(scores, truth), truth.sum(0)
    assert multi["mAP"]["value"] == pytest.approx(np.nanmean(precisions))
    assert multi["mAP"]["interval"][0] < multi["mAP"]["value"] < multi["mAP"]["interval"][1]
    assert multi["weighted_mAP"] == pytest.approx(np.nansum(precisions * counts) / counts.sum())
    assert multi["classes"]["c"] == {"videos": 0, "AP": None}
    assert "| 30 views | 40 |" in evaluation.table({"30 views": multi})


@pytest.mark.usefixtures("as_users_see_it")
def test_wrong_scores():
    with pytest.raises(ValueError, match=r"scores for each video, .* for 3 of 2 videos"):
        evaluation.top_k(np.zeros((3, 2)), np.zeros(2, int), 1)
    with pytest.raises(ValueError, match="got scores for 0 of 0 videos"):
        evaluation.average_precision(np.zeros((0, 2)), np.zeros((0, 2), bool))
    with pytest.raises(ValueError, match="scores must be numbers; got NaN"):
        evaluation.confusion(np.array([[math.nan, 0.0]]), np.array([0]))
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        evaluation.top_k(np.zeros((3, 2)), np.zeros(3, int), 0)
    with pytest.raises(ValueError, match="at least one video must have a label"):
        evaluation.mean_average_precision(np.zeros((3, 2)), np.zeros((3, 2), bool))


def all_scores(dtype):
    """Scores with ties whose values, the extremes of the type among them, are exact in Python."""
    if dtype is bool:
        values = [False, True]
    elif np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        values = [limits.min, limits.min + 1, 0, 1, 3, limits.max - 1, limits.max]
    else:
        values = [-math.inf, -1.5, -0.0, 0.0, 0.25, 2.0, math.inf]
    return np.array(values, dtype)[RNG.integers(0, len(values), (31, 7))]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_scores_of_any_type_are_compared_exactly(dtype):
    scores, labels = all_scores(dtype), RNG.integers(0, 7, 31)
    values = [[row[c].item() for c in range(7)] for row in scores]
    # Python's sort is stable, also in reverse, and its numbers have no limits.
    ranked = [sorted(range(7), key=row.__getitem__, reverse=True) for row in values]
    for k in (1, 3):
        expected = [label in row[:k] for row, label in zip(ranked, labels.tolist(), strict=True)]
        for label_type in (np.uint8, np.int64, np.uint64):
            found = evaluation.top_k(scores, labels.astype(label_type), k)
            assert found.tolist() == expected
    answers = [row[0] for row in ranked]
    matrix = evaluation.confusion(scores, labels.astype(np.uint8))
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, answers, labels=range(7)))

    truth = RNG.random((31, 7)) < 0.3
    truth[3] = False
    precisions = evaluation.average_precision(scores, truth)
    columns = list(zip(*values, strict=True))
    ranks = np.array([[sorted(set(column)).index(x) for x in column] for column in columns])
    np.testing.assert_allclose(precisions, official_map(ranks.T, truth), rtol=1e-12)
    for truth_type in (np.uint8, np.float32):
        found = evaluation.average_precision(scores, truth.astype(truth_type))
        np.testing.assert_array_equal(found, precisions)


def test_neighbouring_large_integers_differ():
    """In float64 these scores are equal, and the first class would count as higher."""
    scores = np.array([[2**53, 2**53 + 1]])
    assert evaluation.top_k(scores, np.array([1]), 1).tolist() == [True]
    assert evaluation.average_precision(scores.T, np.array([[0], [1]])).tolist() == [1.0]


def test_a_video_without_a_label_is_ranked_after_scores_of_minus_infinity():
    scores, truth = np.array([[0.5], [-math.inf]]), np.array([[False], [True]])
    assert evaluation.average_precision(scores, truth).tolist() == [1.0]


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    "metric", [lambda *given: evaluation.top_k(*given, 1), evaluation.confusion]
)
def test_labels_that_are_no_class(metric):
    scores = np.zeros((2, 3))
    for label in (-1, 3, 2**62):
        with pytest.raises(ValueError, match=f"between 0 and 2, .*got {label} for video 1"):
            metric(scores, np.array([0, label]))
    for labels in (np.array([0.0, 1.0]), np.array([True, False]), np.array([[0], [1]])):
        with pytest.raises(ValueError, match="labels must be integers, one class per video"):
            metric(scores, labels)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_nan_of_any_type_is_refused(dtype):
    scores = np.array([[0, 0], [1, math.nan]], dtype)
    for metric in (
        lambda: evaluation.top_k(scores, np.array([0, 1]), 1),
        lambda: evaluation.confusion(scores, np.array([0, 1])),
        lambda: evaluation.average_precision(scores, np.eye(2, dtype=bool)),
        lambda: evaluation.multi_label_report(scores, np.eye(2, dtype=bool)),
    ):
        with pytest.raises(ValueError, match="scores must be numbers; got NaN for video 1"):
            metric()


@pytest.mark.usefixtures("as_users_see_it")
def test_what_is_no_score_or_no_truth():
    labels = np.array([0, 1])
    for scores in (np.zeros((2, 2), complex), np.full((2, 2), None), np.full((2, 2), "a")):
        with pytest.raises(ValueError, match="scores must be real numbers; got an array of"):
            evaluation.top_k(scores, labels, 1)
    for shape in ((2,), (2, 0), (2, 2, 1)):
        with pytest.raises(ValueError, match="scores must have shape"):
            evaluation.confusion(np.zeros(shape), labels)
    for truth in (np.full((2, 2), 2), np.full((2, 2), -1), np.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="truth must be True or 1 where"):
            evaluation.average_precision(np.zeros((2, 2)), truth)
    with pytest.raises(ValueError, match=r"truth must have the shape of the scores, \(2, 2\)"):
        evaluation.average_precision(np.zeros((2, 2)), np.zeros((2, 3), bool))
    with pytest.raises(ValueError, match="one name for each of 2 classes; got 3"):
        evaluation.single_label_report(np.zeros((2, 2)), labels, "abc")
    with pytest.raises(ValueError, match="one name for each of 2 classes; got 1"):
        evaluation.multi_label_report(np.zeros((2, 2)), np.eye(2), "a")
    with pytest.raises(ValueError, match="at least one video must have a label"):
        evaluation.multi_label_report(np.zeros((2, 2)), np.zeros((2, 2), bool))


@pytest.mark.usefixtures("as_users_see_it")
def test_intervals_of_nothing():
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        evaluation.accuracy_interval(0, 0)
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        evaluation.bootstrap_interval(len, 0)
    with pytest.raises(ValueError, match="samples must be at least 1; got 0"):
        evaluation.bootstrap_interval(len, 3, samples=0)
    with pytest.raises(ValueError, match="got only NaN"):
        evaluation.bootstrap_interval(lambda _: math.nan, 3)
    half = evaluation.bootstrap_interval(lambda chosen: ml_dtypes.bfloat16(len(chosen)), 3)
    assert half == (3.0, 3.0)
