"""Metrics equal scikit-learn's, and an independent reading of their rules."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, confusion_matrix, top_k_accuracy_score

from nonlocal_jax import evaluation

RNG = np.random.default_rng(0)


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
