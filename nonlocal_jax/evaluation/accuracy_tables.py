"""Accuracy with confidence intervals, by class, and as a Markdown table. Results fit into JSON."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nonlocal_jax.evaluation.metrics import (
    Labels,
    Scores,
    Truth,
    accuracy_interval,
    average_precision,
    bootstrap_interval,
    checked_scores,
    checked_truth,
    confusion,
    mean_average_precision,
    top_k,
)

METRICS = ("top1", "top5", "mAP")


def single_label_report(
    scores: Scores, labels: Labels, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Reports on videos with one class each.

    Args:
        scores: (videos, classes).
        labels: (videos,) class of each video.
        names: Names of the classes; by default their numbers.

    Returns:
        Top-1 and top-5 accuracy with intervals, accuracy by class, and the confusion matrix.

    Raises:
        ValueError: As `top_k` does, or `names` are not one per class.

    >>> scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    >>> report = single_label_report(scores, np.array([0, 1, 1]), ["up", "down"])
    >>> report["top1"]["value"], report["classes"]["down"], report["confusion"]
    (0.6666666666666666, {'videos': 2, 'accuracy': 0.5}, [[1, 0], [1, 1]])
    """
    names = _class_names(names, np.shape(scores)[-1])
    report: dict[str, Any] = {"videos": len(labels)}
    for k in (1, 5):
        correct = int(top_k(scores, labels, k).sum())
        interval = accuracy_interval(correct, len(labels))
        report[f"top{k}"] = {"value": correct / len(labels), "interval": interval}
    matrix = confusion(scores, labels)
    counts = matrix.sum(axis=1)
    report["classes"] = {
        name: {
            "videos": int(counts[i]),
            "accuracy": float(matrix[i, i] / counts[i]) if counts[i] else None,
        }
        for i, name in enumerate(names)
    }
    report["confusion"] = matrix.tolist()
    return report


def multi_label_report(scores: Scores, truth: Truth, names: Sequence[str] = ()) -> dict[str, Any]:
    """Reports on videos with any number of classes.

    Args:
        scores: (videos, classes).
        truth: (videos, classes), which classes each video has, as bool or 0 and 1.
        names: Names of the classes; by default their numbers.

    Returns:
        Mean average precision (mAP) with its interval, mAP weighted by the videos of each class,
        and AP by class.

    Raises:
        ValueError: As `mean_average_precision` does, or `names` are not one per class.

    >>> truth = np.array([[True, False], [False, True], [True, False]])
    >>> report = multi_label_report(np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), truth)
    >>> report["mAP"]["value"], report["classes"]["1"]
    (1.0, {'videos': 1, 'AP': 1.0})
    """
    scores = checked_scores(scores, len(truth))
    truth = checked_truth(truth, scores.shape)
    names = _class_names(names, scores.shape[1])
    value = mean_average_precision(scores, truth)
    precisions, counts = average_precision(scores, truth), truth.sum(axis=0)

    def sample_map(chosen: np.ndarray) -> float:
        sampled = average_precision(scores[chosen], truth[chosen])
        # A sample may have no label at all; numpy.nanmean would warn about it.
        return float("nan") if np.isnan(sampled).all() else float(np.nanmean(sampled))

    interval = bootstrap_interval(sample_map, len(truth), samples=200)
    return {
        "videos": len(truth),
        "mAP": {"value": value, "interval": interval},
        "weighted_mAP": float(np.nansum(precisions * counts) / counts.sum()),
        "classes": {
            name: {
                "videos": int(counts[i]),
                "AP": None if np.isnan(precisions[i]) else float(precisions[i]),
            }
            for i, name in enumerate(names)
        },
    }


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Formats reports as a Markdown table, in percent, with 95% intervals.

    Args:
        reports: Reports by the way of testing. Each becomes a row.

    >>> print(table({"1 view": {"videos": 4, "top1": {"value": 0.75, "interval": (0.3, 0.95)}}}))
    | tested with | videos | top1, % |
    |---|--:|--:|
    | 1 view | 4 | 75.00 (30.0 to 95.0) |
    """
    first_report = next(iter(reports.values()))
    metrics = [name for name in METRICS if name in first_report]
    header = ["tested with", "videos", *(f"{name}, %" for name in metrics)]
    lines = [_row(header), "|---|" + "--:|" * (1 + len(metrics))]
    for label, report in reports.items():
        cells = [label, f"{report['videos']:,}"]
        for name in metrics:
            low, high = report[name]["interval"]
            cells.append(f"{100 * report[name]['value']:.2f} ({100 * low:.1f} to {100 * high:.1f})")
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _class_names(names: Sequence[str], count: int) -> Sequence[str]:
    if len(names) not in (0, count):
        raise ValueError(f"names must have one name for each of {count} classes; got {len(names)}.")
    return names or [str(i) for i in range(count)]
