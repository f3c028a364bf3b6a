"""The table and the picture of `experiments.toy_video`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import nonlocal_jax as nl
from experiments.shared.results import hardware, percent, save_figure
from nonlocal_jax.files import AnyPath

HEADER = ("task", "network", "parameters", "FLOPs per clip", "test accuracy, %")
README_MARKS = ("<!-- toy_video: begin -->", "<!-- toy_video: end -->")
CLASS_NAMES = ("different", "same")

Curve = list[tuple[int, float]]  # Steps, and the accuracy on test clips after each.


class TrainedNetwork(NamedTuple):
    """One network, trained with one seed.

    Attributes:
        accuracy: Accuracy on the test clips.
        curve: Learning curve on the first test clips.
        seconds: Training time.
        variables: Trained variables.
    """

    accuracy: float
    curve: Curve
    seconds: float
    variables: dict[str, Any]


class Example(NamedTuple):
    """One test clip with a network's answer.

    Attributes:
        video: The batch of clips that this one is part of, (B, T, H, W, 1), where 1 is ink.
        block: Affinity map of the batch.
        sample: Number of the clip in the batch.
        label: True class.
        prediction: Predicted class.
        place: Frame, row and column of the centre of the first digit.
    """

    video: np.ndarray
    block: nl.visualize.AffinityMap
    sample: int
    label: int
    prediction: int
    place: np.ndarray


def cells(row: Mapping[str, Any]) -> list[str]:
    """Formats one row of the table."""
    block = "residual block (control)"
    if row["network"] != "control":
        block = f"non-local, {row['network'].replace('_', ' ')}"
    return [
        row["task"],
        f"{row['kind'].upper()}, {block}",
        f"{row['parameters']:,}",
        f"{row['flops'] / 1e6:.1f} M",
        percent(row["accuracies"], 1),
    ]


def markdown(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """Returns the results table of the README, with the command and hardware it was made with."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|--:|--:|--:|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    counts = {row["task"]: len(row["accuracies"]) for row in rows}
    seeds = ", ".join(f"{task}: {count}" for task, count in counts.items())
    lines += [
        "",
        f"Mean ± standard deviation over seeds ({seeds}). Chance is 50%.",
        f"`{command}`, {hardware()}.",
    ]
    return "\n".join(lines)


def write_readme(readme: Path, table: str) -> None:
    """Replaces the table between the two marks of a file. Leaves a file without marks as it is."""
    begin, end = README_MARKS
    text = readme.read_text() if readme.is_file() else ""
    if begin in text and end in text:
        head, tail = text.split(begin)[0], text.split(end)[1]
        readme.write_text(f"{head}{begin}\n{table}\n{end}{tail}")


def draw(
    task: str,
    curves: Mapping[Any, Sequence[Curve]],
    examples: Sequence[Example],
    file: AnyPath,
) -> None:
    """Draws learning curves, and where a position on a digit looks in a few test clips.

    Args:
        task: Name of the task.
        curves: Learning curves of each network, one per seed.
        examples: Test clips to show under the curves.
        file: File of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 3.5 + 2.1 * len(examples)), layout="constrained")
    heights = [3.5] + [2.1] * len(examples)
    panels = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_curves(panels[0].subplots(), task, curves)
    for panel, example in zip(panels[1:], examples, strict=True):
        _draw_arrows(panel, example)
    save_figure(figure, file)
    plt.close(figure)


def _draw_curves(ax: Any, task: str, curves: Mapping[Any, Sequence[Curve]]) -> None:
    for network, runs in curves.items():
        steps = [step for step, _ in runs[0]]
        accuracies = np.array([[accuracy for _, accuracy in curve] for curve in runs])
        style = {"color": "0.45", "linestyle": "--"} if network == "control" else {}
        ax.plot(steps, accuracies.mean(0), marker="o", label=network.replace("_", " "), **style)
    ax.axhline(0.5, color="0.7", linewidth=1, zorder=0)
    title = f"{task}: learning curves"
    ax.set(xlabel="step", ylabel="accuracy on test clips", ylim=(0.4, 1.02), title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _draw_arrows(panel: Any, example: Example) -> None:
    """Draws the largest weights of the position on the first digit."""
    truth, prediction = CLASS_NAMES[example.label], CLASS_NAMES[example.prediction]
    panel.suptitle(f"truth: {truth}, prediction: {prediction}", fontsize=10)
    paper = 1 - example.video.clip(0, 1)  # Ink is black.
    query = nl.visualize.from_pixels(example.block, example.place)
    axes = list(panel.subplots(1, example.block.queries[0]))
    nl.visualize.arrows(example.block, paper, query, sample=example.sample, axes=axes)
