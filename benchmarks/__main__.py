"""Measure this library beside PyTorch and mmcv-lite, and write the report.

    python -m benchmarks                      # everything: results/<backend>.json, results/growth.png, README.md
    python -m benchmarks --quick              # the smallest sizes, into runs/benchmarks
    python -m benchmarks --only block/dot     # the cases whose name contains this; the others keep their results
    python -m benchmarks --report-only        # the report anew, from the JSON

Wants torch and mmcv-lite beside the library: `make bench` makes an environment that has them. On 2 CPU cores about 40
minutes; leave the machine alone meanwhile. mmcv's concatenation takes 15 GB.
"""

import dataclasses
import functools
import shlex
import sys
from pathlib import Path

import tyro
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks import machine, report
from benchmarks.cases import Case, all_cases, is_quick
from benchmarks.measure import Workers, measure
from benchmarks.records import Results

BUSY = 0.3  # load for each core


@dataclasses.dataclass(frozen=True)
class Config:
    """Speed, memory and precision of the non-local operations and blocks, beside PyTorch and mmcv-lite."""

    only: tuple[
        str, ...
    ] = ()  # parts of the names (section/instantiation/N/M/d) of the cases to measure; none is all
    quick: bool = False  # the smallest sizes alone, into runs/benchmarks
    report_only: bool = False  # no measuring: write the report from the results that are there
    readme: Path = Path(
        "README.md"
    )  # three lines of the report go here, where it has marks for them
    seconds: float = 8.0  # of timing for each case, before the slowest competitors' fewest rounds

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive; got {self.seconds}.")

    @property
    def folder(self) -> Path:
        """Where results/ and README.md go."""
        return Path("runs/benchmarks") if self.quick else Path(__file__).parent

    def cases(self) -> list[Case]:
        """Those that are asked for."""
        chosen = [case for case in all_cases() if not self.quick or is_quick(case)]
        if self.only:
            chosen = [case for case in chosen if any(part in case.name for part in self.only)]
        if not chosen:
            raise ValueError(
                f"only must name parts of cases such as {all_cases()[0].name!r}; got {self.only}."
            )
        return chosen


def main(config: Config) -> None:
    """Measure, then report."""
    results = config.folder / "results"
    if not config.report_only:
        run(config, results)
    report.write(results, config.folder / "README.md", Path() if config.quick else config.readme)
    print(
        f"{config.folder / 'README.md'}, from {', '.join(str(path) for path in sorted(results.glob('*.json')))}"
    )


def run(config: Config, folder: Path) -> None:
    """Measure the cases one after the other; each is on disk before the next one starts."""
    chosen, workers = config.cases(), Workers()
    columns = (
        TextColumn("{task.description:<44}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        environment = machine.describe(
            workers, shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
        )
        if environment["load"] > BUSY * environment["cores"]:
            print(
                f"The machine is busy (load {environment['load']:.1f}): the numbers will be of little use.",
                file=sys.stderr,
            )
        path = folder / f"{environment['backend']}.json"
        kept = Results.read(path).records if config.only and path.exists() else []
        results = Results(environment, kept)
        with Progress(*columns, speed_estimate_period=3600) as progress:
            bar = progress.add_task("", total=sum(case.weight for case in chosen))
            for number, case in enumerate(chosen, 1):
                progress.update(bar, description=f"{number}/{len(chosen)} {case.name}")
                advance = functools.partial(_advance, progress, bar, case.weight)
                results.put(measure(case, workers, config.seconds, advance))
                results.write(path)
    finally:
        workers.close()


def _advance(progress: Progress, bar: TaskID, weight: float, part: float) -> None:
    progress.advance(bar, weight * part)


if __name__ == "__main__":
    main(tyro.cli(Config))
