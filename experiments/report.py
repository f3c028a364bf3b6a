"""Compares runs in a table and a picture of their learning curves.

    python -m experiments.report runs/cifar runs/baseline --output runs/report

Writes `results.md`, with one row per recipe, and `curves.png`. Runs that differ only in the seed
share a row, with mean and standard deviation. Runs that are not finished are listed below the
table, with the step that they have reached, and are drawn as well.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.shared import results
from experiments.shared.command_line import PlainConsole, exit_on, parse
from nonlocal_jax.files import AnyPath
from nonlocal_jax.path_options import AnyPathOption


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares runs in a table and a picture of their learning curves."""

    # Folders of the runs, finished or not.
    runs: Annotated[
        tuple[AnyPathOption, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")
    ]
    output: AnyPathOption = Path("runs/report")  # Folder for results.md and curves.png.

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one folder; got none.")


GROUPS: dict[str, type] = {"": Config}


def is_unfinished(folder: AnyPath) -> bool:
    """Returns whether a folder has a run that was started and has no results yet."""
    return (folder / "config.json").exists() and not (folder / "results.json").exists()


def progress(folder: AnyPath, rows: Sequence[dict[str, Any]]) -> str:
    """Returns the line of an unfinished run, whose training has logged some rows."""
    reached = f"at step {rows[-1]['step']:,}" if rows else "before its first logged step"
    return f"- {folder.name}: unfinished, {reached}; run its command again to continue"


def main(config: Config) -> None:
    with exit_on(OSError, ValueError, KeyError):
        unfinished = [folder for folder in config.runs if is_unfinished(folder)]
        finished = [folder for folder in config.runs if folder not in unfinished]
        lines = [results.table([results.read(folder) for folder in finished])] if finished else []
        drawn = list(finished)
        for folder in unfinished:
            has_log = (folder / "metrics.jsonl").exists()
            rows = results.read_log(folder, "train") if has_log else []
            lines.append(progress(folder, rows))
            if rows:
                drawn.append(folder)
        config.output.mkdir(parents=True, exist_ok=True)
        if drawn:
            results.draw_curves(drawn, config.output / "curves.png")
        text = "\n".join(lines)
        (config.output / "results.md").write_text(text + "\n")
    PlainConsole().print(text)


if __name__ == "__main__":
    main(parse(Config, GROUPS, "report"))
