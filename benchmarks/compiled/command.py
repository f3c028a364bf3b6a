"""Compiles the cases of one platform, and writes the report."""

import dataclasses
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import track

from benchmarks.compiled import records, report
from benchmarks.compiled.cases import Case, Platform, is_small, list_cases
from benchmarks.compiled.programs import compile_case
from benchmarks.compiled.records import Record
from nonlocal_jax.compiler import programs
from nonlocal_jax.training.capacity import TooLargeError

FOLDER = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile operations, blocks and networks for devices that need not exist."""

    # Parts of the names (topology/section/subject/...) of the cases to compile. Default: all.
    only: tuple[str, ...] = ()
    # Compile cases again whose results are there.
    again: bool = False
    # Compile only a few cases, again, into runs/benchmarks. Fails if an aim is missed.
    small: bool = False
    # Compile nothing, and write the report from existing results.
    report_only: bool = False

    def results(self, platform: Platform) -> Path:
        """Returns the file of the results."""
        folder = Path("runs/benchmarks") if self.small else FOLDER
        return folder / "results" / "compiled" / f"{platform}.json"

    def cases(self, platform: Platform) -> list[Case]:
        """Returns the cases to compile.

        Raises:
            ValueError: No case has such a name.
        """
        every = list_cases(platform)
        chosen = [case for case in every if is_small(case) or not self.small]
        if self.only:
            chosen = [case for case in chosen if any(part in case.name for part in self.only)]
        if not chosen:
            raise ValueError(
                f"only must name parts of cases such as {every[0].name!r}; got {self.only}."
            )
        return chosen


def main(config: Config, platform: Platform) -> None:
    """Compiles, then writes the report."""
    path = config.results(platform)
    found = {} if config.small else records.read(path)
    if not config.report_only:
        cases = [case for case in config.cases(platform) if config.again or case.name not in found]
        for case in track(cases, "compiling", console=Console(stderr=True)):
            record = found[case.name] = compiled(case)
            records.write(found.values(), path)
            print(record.failure or report.line(record), flush=True)
    if config.small:
        missed = [target.claim for target in report.targets(found) if target.met is False]
        if missed:
            raise SystemExit(f"error: {'; '.join(missed)} must be within the aim.")
        return
    report.write(FOLDER)


def compiled(case: Case) -> Record:
    """Compiles a case and reads its cost."""
    record, start = Record.of(case), time.perf_counter()
    try:
        record.fill(programs.cost(compile_case(case)))
    except (TooLargeError, jax.errors.JaxRuntimeError) as error:
        record.failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    record.compile_seconds = round(time.perf_counter() - start, 1)
    return record
