"""What a test is cited with: one number and its interval, and the tables behind it, as JSON can hold them."""

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
    confusion,
    mean_average_precision,
    top_k,
)


def single_label_report(
    scores: Scores, labels: Labels, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Of videos with one class each: top-1 and top-5 with intervals, accuracy by class, confusion.

    Args:
        scores: of each video.
        labels: its class.
        names: of the classes; else their numbers.

    >>> report = single_label_report(np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), np.array([0, 1, 1]), ["up", "down"])
    >>> report["top1"]["value"], report["classes"]["down"], report["confusion"]
    (0.6666666666666666, {'videos': 2, 'accuracy': 0.5}, [[1, 0], [1, 1]])
    """
    table = confusion(scores, labels)
    report: dict[str, Any] = {"videos": len(labels)}
    for k in (1, 5):
        right = int(top_k(scores, labels, k).sum())
        report[f"top{k}"] = {
            "value": right / len(labels),
            "interval": accuracy_interval(right, len(labels)),
        }
    counts = table.sum(axis=1)
    report["classes"] = {
        name: {
            "videos": int(counts[i]),
            "accuracy": float(table[i, i] / counts[i]) if counts[i] else None,
        }
        for i, name in enumerate(_names(names, len(counts)))
    }
    report["confusion"] = table.tolist()
    return report


def multi_label_report(scores: Scores, truth: Truth, names: Sequence[str] = ()) -> dict[str, Any]:
    """Of videos with any number of classes: mAP with its interval, AP by class.

    Args:
        scores: of each video.
        truth: which classes it has.
        names: of the classes; else their numbers.

    >>> truth = np.array([[True, False], [False, True], [True, False]])
    >>> report = multi_label_report(np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), truth)
    >>> report["mAP"]["value"], report["classes"]["1"]
    (1.0, {'videos': 1, 'AP': 1.0})
    """
    each, counts = average_precision(scores, truth), truth.sum(axis=0)

    def of(chosen: np.ndarray) -> float:
        some = average_precision(scores[chosen], truth[chosen])
        return float("nan") if np.isnan(some).all() else float(np.nanmean(some))

    return {
        "videos": len(truth),
        "mAP": {
            "value": mean_average_precision(scores, truth),
            "interval": bootstrap_interval(of, len(truth), samples=200),
        },
        "weighted_mAP": float(np.nansum(each * counts) / counts.sum()),
        "classes": {
            name: {"videos": int(counts[i]), "AP": None if np.isnan(each[i]) else float(each[i])}
            for i, name in enumerate(_names(names, len(counts)))
        },
    }


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each way of testing, in percent, with 95% intervals.

    >>> print(table({"1 view": {"videos": 4, "top1": {"value": 0.75, "interval": (0.3, 0.95)}}}))
    | tested with | videos | top1, % |
    |---|--:|--:|
    | 1 view | 4 | 75.00 (30.0 to 95.0) |
    """
    metrics = [name for name in ("top1", "top5", "mAP") if name in next(iter(reports.values()))]
    lines = [
        "| " + " | ".join(["tested with", "videos", *(f"{name}, %" for name in metrics)]) + " |"
    ]
    lines.append("|---|" + "--:|" * (1 + len(metrics)))
    for label, report in reports.items():
        cells = [label, f"{report['videos']:,}"]
        for name in metrics:
            low, high = report[name]["interval"]
            cells.append(f"{100 * report[name]['value']:.2f} ({100 * low:.1f} to {100 * high:.1f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _names(names: Sequence[str], count: int) -> Sequence[str]:
    return names or [str(i) for i in range(count)]
