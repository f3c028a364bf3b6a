"""Result files of runs, tables that compare them, and pictures."""

import io
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nonlocal_jax import files, training
from nonlocal_jax.files import AnyPath

HEADER = ("run", "data", "parameters", "seeds", "accuracy, %", "steps", "training time, s")


def hardware() -> str:
    """Describes the device and the versions that a result was made with."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{name}, Python {platform.python_version()}, JAX {jax.__version__}"


def record(folder: AnyPath, data: str, command: str, result: training.Result) -> None:
    """Writes `results.json`: everything needed to cite a finished run."""
    row = {
        "command": command,
        "hardware": hardware(),
        "data": data,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(result.state.params)),
        "steps": int(result.state.step),
        "seconds": round(result.seconds, 2),
        "metrics": result.metrics,
    }
    files.write_text(folder / "results.json", json.dumps(row, indent=2) + "\n")


def read(folder: AnyPath) -> dict[str, Any]:
    """Reads the results of a finished run, with its configuration and its folder.

    Raises:
        ValueError: `results.json` or `config.json` is missing or incomplete.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} must be the folder of a finished run, with config.json and results.json: "
            f"{error}."
        ) from error
    return {**results, "config": config, "folder": folder}


def read_log(folder: AnyPath, kind: str) -> list[dict[str, Any]]:
    """Reads the logged rows of one kind, "train" or "evaluation".

    Raises:
        ValueError: The log is missing or has lines that are not JSON.
    """
    file = folder / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} must be the log of a run, one JSON row per line: {error}."
        ) from error
    return [row for row in rows if row["kind"] == kind]


def group_by_recipe(runs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups runs whose configurations differ only in seed and output folder."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        recipe = {k: v for k, v in run["config"].items() if k not in ("seed", "output")}
        groups.setdefault(json.dumps(recipe, sort_keys=True), []).append(run)
    return list(groups.values())


def percent(values: Sequence[float], digits: int) -> str:
    """Formats the mean of shares in percent, with the standard deviation if there are several.

    >>> percent([0.5, 0.52], 1)
    '51.0 ± 1.4'
    """
    mean = f"{100 * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.{digits}f}"


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table with one row per recipe, followed by the command of each run."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|--:|--:|--:|--:|--:|"]
    for group in group_by_recipe(runs):
        first = group[0]
        seconds = statistics.mean(run["seconds"] for run in group)
        cells = (
            first["folder"].name,
            first["data"],
            f"{first['parameters']:,}",
            str(len(group)),
            percent([run["metrics"]["accuracy"] for run in group], 2),
            f"{first['steps']:,}",
            f"{seconds:,.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"- {run['folder'].name}: `{run['command']}`, {run['hardware']}" for run in runs]
    return "\n".join(lines)


def draw_curves(folders: Sequence[AnyPath], file: AnyPath, title: str = "") -> None:
    """Draws loss and accuracy by step, in training (thin lines) and on held-out data (markers)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for i, folder in enumerate(folders):
        train, evaluation = read_log(folder, "train"), read_log(folder, "evaluation")
        for ax, metric in zip(axes, ("loss", "accuracy"), strict=True):
            steps, means = _smoothed(train, metric)
            label = f"{folder.name}, training"
            ax.plot(steps, means, color=f"C{i}", linewidth=1, alpha=0.5, label=label)
            if evaluation:
                steps = [row["step"] for row in evaluation]
                values = [row[metric] for row in evaluation]
                label = f"{folder.name}, held out"
                ax.plot(steps, values, color=f"C{i}", marker="o", markersize=4, label=label)
            ax.set(xlabel="step", ylabel=metric)
    axes[0].set_yscale("log")
    axes[1].legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    save_figure(figure, file)
    plt.close(figure)


def save_figure(figure: Any, file: AnyPath) -> None:
    """Writes a figure of matplotlib in the format that the suffix of the file names."""
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix[1:], dpi=110)
    file.write_bytes(picture.getvalue())


def _smoothed(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Averages a metric over at most about 100 windows of consecutive steps."""
    width = max(len(rows) // 100, 1)
    windows = [rows[start : start + width] for start in range(0, len(rows), width)]
    steps = [window[-1]["step"] for window in windows]
    means = [statistics.mean(row[metric] for row in window) for window in windows]
    return steps, means


def draw_confusion(report: Mapping[str, Any], file: AnyPath) -> None:
    """Draws the confusion matrix of a test, each row as shares of the videos of a class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = np.array(report["confusion"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = list(report["classes"])
    side = min(max(4.0, 0.35 * len(names) + 2), 12.0)
    figure, ax = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = ax.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    top1 = 100 * report["top1"]["value"]
    title = f"{report['videos']:,} videos, top-1 {top1:.1f}%"
    ax.set(xlabel="predicted class", ylabel="true class", title=title)
    if len(names) <= 40:
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_yticks(range(len(names)), names)
    figure.colorbar(image, label="share of the videos of a class")
    save_figure(figure, file)
    plt.close(figure)
