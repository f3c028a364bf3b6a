"""Compares this library with PyTorch and mmcv-lite, and writes the report.

    python -m benchmarks                   # everything
    python -m benchmarks --quick           # only the smallest sizes, into runs/benchmarks
    python -m benchmarks --only block/dot  # cases whose name contains this
    python -m benchmarks --report-only     # rewrites the report from the JSON
    python -m benchmarks --gpu-short       # tests, and the essential rows on a GPU in bfloat16

Results go to results/<backend>.json, results/growth.png and README.md in this directory. `--only`
keeps the results of other cases. `--gpu-short` writes results/gpu-short.json; see `gpu_short.py`.

Requires torch and mmcv-lite: `make bench` creates an environment that has them. On 2 CPU cores this
takes about 40 minutes, during which the machine should be idle. mmcv's concatenation takes 15 GB.
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

from benchmarks import gpu_short, machine, report
from benchmarks.cases import Case, has_smallest_size, list_cases
from benchmarks.measure import Workers, measure
from benchmarks.records import Results

MAX_LOAD = 0.3  # load average per core above which a warning is printed


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare the speed, memory and precision of the non-local operations with PyTorch and mmcv-
    lite.
    """

    # Parts of the names (section/instantiation/N/M/d) of the cases to measure. Default: all.
    only: tuple[str, ...] = ()
    # Measure only the smallest sizes, into runs/benchmarks.
    quick: bool = False
    # Measure nothing, and write the report from existing results.
    report_only: bool = False
    # Measure the essential rows on one NVIDIA GPU, and nothing else.
    gpu_short: bool = False
    # Seconds after which `gpu_short` starts no row.
    budget: float = 400.0
    # File that receives three lines of the report, between its marks.
    readme: Path = Path("README.md")
    # Seconds of timing per case; slow competitors may take longer.
    seconds: float = 8.0

    def __post_init__(self) -> None:
        for name in ("seconds", "budget"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")

    @property
    def folder(self) -> Path:
        """The directory of results/ and README.md."""
        return Path("runs/benchmarks") if self.quick else Path(__file__).parent

    def cases(self) -> list[Case]:
        """The cases to measure."""
        chosen = [case for case in list_cases() if not self.quick or has_smallest_size(case)]
        if self.only:
            chosen = [case for case in chosen if any(part in case.name for part in self.only)]
        if not chosen:
            raise ValueError(
                f"only must name parts of cases such as {list_cases()[0].name!r}; got {self.only}."
            )
        return chosen


def main(config: Config) -> None:
    """Measures, then writes the report."""
    if config.gpu_short:
        gpu_short.main(config.budget, config.only)
        return
    results = config.folder / "results"
    if not config.report_only:
        run(config, results)
    report.write(results, config.folder / "README.md", Path() if config.quick else config.readme)
    print(
        f"wrote {config.folder / 'README.md'} from "
        + ", ".join(str(path) for path in sorted(results.glob("*.json")))
    )


def run(config: Config, folder: Path) -> None:
    """Measures one case after another, and saves each before the next one starts."""
    chosen, workers = config.cases(), Workers()
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    try:
        environment = machine.describe(
            workers, shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
        )
        if environment["load"] > MAX_LOAD * environment["cores"]:
            print(
                f"warning: the machine is busy (load {environment['load']:.1f}), so the results "
                "will not be reliable.",
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
