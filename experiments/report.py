"""Tables and curves from the folders of runs.

    python -m experiments.report runs/cifar runs/baseline --output runs/report

writes `results.md`, a row for each run, and `curves.png`. Runs of one configuration but for the seed are one row, with mean and
standard deviation.
"""

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from nonlocal_jax import files, training

HEADER = ("run", "data", "parameters", "seeds", "accuracy, %", "steps", "training time, s")


@dataclasses.dataclass(frozen=True)
class Config:
    """A table and curves of runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders of runs
    output: Path = Path("runs/report")  # folder of results.md and curves.png

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one folder; got none.")


def hardware() -> str:
    """What this runs on."""
    device = jax.devices()[0]
    place = (
        f"{os.cpu_count()} CPU cores ({platform.machine()})"
        if device.platform == "cpu"
        else device.device_kind
    )
    return f"{place}, Python {platform.python_version()}, JAX {jax.__version__}"


def record(folder: Path, data: str, command: str, result: training.Result) -> None:
    """Write `results.json`: what a finished run is cited with."""
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


def read(folder: Path) -> dict[str, Any]:
    """The results of a finished run, with its configuration.

    Raises:
        ValueError: the folder has none, or not whole.
    """
    try:
        results, config = (
            json.loads((folder / name).read_text()) for name in ("results.json", "config.json")
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} must be the folder of a finished run, with config.json and results.json: {error}."
        ) from error
    return {**results, "config": config, "folder": folder}


def read_log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind, "train" or "evaluation"."""
    file = folder / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} must be the log of a run, one JSON row a line: {error}."
        ) from error
    return [row for row in rows if row["kind"] == kind]


def grouped(runs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The runs that differ in nothing but seed and folder, together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        recipe = {
            name: value for name, value in run["config"].items() if name not in ("seed", "output")
        }
        groups.setdefault(json.dumps(recipe, sort_keys=True), []).append(run)
    return list(groups.values())


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each recipe, and under it how to get each."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|--:|--:|--:|--:|--:|"]
    for group in grouped(runs):
        accuracies = [100 * run["metrics"]["accuracy"] for run in group]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        first = group[0]
        seconds = statistics.mean(run["seconds"] for run in group)
        cells = (
            first["folder"].name, first["data"], f"{first['parameters']:,}", str(len(group)),
            f"{statistics.mean(accuracies):.2f}{spread}", f"{first['steps']:,}", f"{seconds:,.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [""] + [
        f"- {run['folder'].name}: `{run['command']}`, {run['hardware']}" for run in runs
    ]
    return "\n".join(lines)


def draw_curves(folders: Sequence[Path], file: Path, title: str = "") -> None:
    """Loss and accuracy by step, of training (thin) and evaluation (with marks)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for i, folder in enumerate(folders):
        train, evaluation = read_log(folder, "train"), read_log(folder, "evaluation")
        for ax, name in zip(axes, ("loss", "accuracy"), strict=True):
            width = max(len(train) // 100, 1)
            means = [
                (chunk[-1]["step"], statistics.mean(row[name] for row in chunk))
                for chunk in (train[at : at + width] for at in range(0, len(train), width))
            ]
            ax.plot(
                *zip(*means, strict=True),
                color=f"C{i}",
                linewidth=1,
                alpha=0.5,
                label=f"{folder.name}, training",
            )
            if evaluation:
                held_out = [(row["step"], row[name]) for row in evaluation]
                ax.plot(
                    *zip(*held_out, strict=True),
                    color=f"C{i}",
                    marker="o",
                    markersize=4,
                    label=f"{folder.name}, held out",
                )
            ax.set(xlabel="step", ylabel=name)
    axes[0].set_yscale("log")
    axes[1].legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(config: Config) -> None:
    """Write the table and the curves."""
    try:
        runs = [read(folder) for folder in config.runs]
        config.output.mkdir(parents=True, exist_ok=True)
        draw_curves(config.runs, config.output / "curves.png")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    text = table(runs)
    (config.output / "results.md").write_text(text + "\n")
    Console().print(text, highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Config))
