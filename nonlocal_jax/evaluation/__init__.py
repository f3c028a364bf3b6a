"""Evaluation: combining many views of a video into one prediction, and measuring accuracy."""

from nonlocal_jax.evaluation.accuracy_tables import (
    multi_label_report,
    single_label_report,
    table,
)
from nonlocal_jax.evaluation.metrics import (
    accuracy_interval,
    average_precision,
    bootstrap_interval,
    confusion,
    mean_average_precision,
    top_k,
)
from nonlocal_jax.evaluation.views import Combination, ScoreFolder, combine, score_views

__all__ = [
    "Combination",
    "ScoreFolder",
    "accuracy_interval",
    "average_precision",
    "bootstrap_interval",
    "combine",
    "confusion",
    "mean_average_precision",
    "multi_label_report",
    "score_views",
    "single_label_report",
    "table",
    "top_k",
]
