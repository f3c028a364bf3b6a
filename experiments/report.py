"""Compares finished runs in a table and a picture of their learning curves.

    python -m experiments.report runs/cifar runs/baseline --output runs/report

Writes `results.md`, with one row per recipe, and `curves.png`. Runs that differ only in the seed
share a row, with mean and standard deviation.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.shared import results
from experiments.shared.command_line import exit_on
from nonlocal_jax.path_options import AnyPathOption


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares finished runs in a table and a picture of their learning curves."""

    runs: Annotated[tuple[AnyPathOption, ...], tyro.conf.Positional]  # Folders of the runs.
    output: AnyPathOption = Path("runs/report")  # Folder for results.md and curves.png.

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one folder; got none.")


def main(config: Config) -> None:
    with exit_on(OSError, ValueError):
        runs = [results.read(folder) for folder in config.runs]
        config.output.mkdir(parents=True, exist_ok=True)
        results.draw_curves(config.runs, config.output / "curves.png")
    table = results.table(runs)
    (config.output / "results.md").write_text(table + "\n")
    Console().print(table, highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Config))
