"""Result files of runs, tables that compare them, and pictures."""

import io
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nonlocal_jax import files, training
from nonlocal_jax.files import AnyPath
from nonlocal_jax.terminal import printable

HEADER = ("run", "data", "parameters", "seeds", "accuracy, %", "steps", "training time, s")
FIELDS = {
    "command": str,
    "hardware": str,
    "data": str,
    "parameters": int,
    "steps": int,
    "seconds": int | float,
    "metrics": dict,
}
LARGEST_INTEGER = 1 << 53  # up to which floats hold every integer
SHOWN_CHARACTERS = 200  # of a value in an error


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
        ValueError: `results.json` or `config.json` is missing, incomplete or damaged, or the run
            does not measure accuracy.
    """
    results, config = _read_object(folder, "results.json"), _read_object(folder, "config.json")
    file = folder / "results.json"
    for name, kind in FIELDS.items():
        if not isinstance(results.get(name), kind):
            raise ValueError(
                f"{name} in {file} must be there and of the type that a run writes; "
                f"got {_shown(results.get(name))}. Run the experiment again."
            )
    metrics = results["metrics"]
    if "accuracy" not in metrics:
        raise ValueError(
            f"{file} must be the results of a run that measures accuracy; "
            f"got {', '.join(metrics) or 'no metrics'}."
        )
    numbers = {"accuracy": metrics["accuracy"], "seconds": results["seconds"]}
    for name, value in numbers.items():
        if not _is_number(value) or not math.isfinite(value):
            raise ValueError(f"{name} in {file} must be a finite number; got {_shown(value)}.")
    return {**results, "config": config, "folder": folder}


def _read_object(folder: AnyPath, name: str) -> dict[str, Any]:
    file = folder / name
    start = f"{folder} must be the folder of a finished run, with config.json and results.json: "
    try:
        content = json.loads(file.read_text())
        json.dumps(content)  # fails if the content is nested too deeply
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{start}{file}: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{start}{file} must be a JSON object; got {_shown(content)}.")
    return content


def read_log(folder: AnyPath, kind: str, metrics: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Reads the logged rows of one kind.

    A last line that is not finished is ignored: a running process is writing it, or was killed.

    Args:
        folder: Folder of a run.
        kind: "train" or "evaluation".
        metrics: Metrics that each of these rows must have.

    Returns:
        Rows with "step", "kind" and numbers.

    Raises:
        ValueError: The log is missing or has lines that are not such rows.
    """
    file = folder / "metrics.jsonl"
    try:
        lines = file.read_text().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} must be the log of a run, one JSON row per line: {error}."
        ) from error
    if lines and not lines[-1].endswith("\n") and not _is_json(lines[-1]):
        lines.pop()
    rows = []
    for number, line in enumerate(map(str.rstrip, lines), 1):
        row = _row(line)
        if row is None or (row["kind"] == kind and not row.keys() >= set(metrics)):
            names = ", ".join(("step", "kind", *metrics))
            raise ValueError(
                f"{file} must be the log of a run, one JSON row per line with {names}; got "
                f"{_shown(line)} in line {number}. Delete the line."
            )
        rows.append(row)
    return [row for row in rows if row["kind"] == kind]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _row(line: str) -> dict[str, Any] | None:
    """Returns a row of a log, or None if the line is not one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return None
    numbers = [value for name, value in row.items() if name != "kind"]
    is_row = isinstance(row.get("step"), int) and all(_is_number(value) for value in numbers)
    return row if is_row else None


def _is_number(value: Any) -> bool:
    """Whether a value of JSON can be a float. Integers of JSON can be too large."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST_INTEGER)


def _shown(value: Any) -> str:
    text = printable(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


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
            printable(first["folder"].name),
            printable(first["data"]),
            f"{first['parameters']:,}",
            str(len(group)),
            percent([run["metrics"]["accuracy"] for run in group], 2),
            f"{first['steps']:,}",
            f"{seconds:,.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for run in runs:
        line = f"- {run['folder'].name}: `{run['command']}`, {run['hardware']}"
        lines.append(printable(line))
    return "\n".join(lines)


def draw_curves(folders: Sequence[AnyPath], file: AnyPath, title: str = "") -> None:
    """Draws loss and accuracy by step, in training (thin lines) and on held-out data (markers).

    Runs that do not log accuracy, as with several classes per video, have the loss only.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for i, folder in enumerate(folders):
        metrics = ("loss", "accuracy") if _has_accuracy(folder) else ("loss",)
        train, evaluation = (read_log(folder, kind, metrics) for kind in ("train", "evaluation"))
        name = printable(folder.name).replace("$", r"\$")  # matplotlib would set it as mathematics
        for ax, metric in zip(axes, metrics, strict=False):
            steps, means = _smoothed(train, metric)
            label = f"{name}, training"
            ax.plot(steps, means, color=f"C{i}", linewidth=1, alpha=0.5, label=label)
            if evaluation:
                steps = [row["step"] for row in evaluation]
                values = [row[metric] for row in evaluation]
                label = f"{name}, held out"
                ax.plot(steps, values, color=f"C{i}", marker="o", markersize=4, label=label)
    for ax, metric in zip(axes, ("loss", "accuracy"), strict=True):
        ax.set(xlabel="step", ylabel=metric)
    axes[0].set_yscale("log")
    lines, labels = axes[0].get_legend_handles_labels()  # of all runs
    axes[1].legend(lines, labels, loc="lower right", frameon=False)
    figure.suptitle(title)
    save_figure(figure, file)
    plt.close(figure)


def _has_accuracy(folder: AnyPath) -> bool:
    return any("accuracy" in row for row in read_log(folder, "train"))


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
