"""Compiles for TPUs without having one, and reports what their compiler estimates.

    make tpu                                         # creates .venv-tpu, then compiles a small part
    .venv-tpu/bin/python -m benchmarks.tpu           # everything that is not in the results yet
    .venv-tpu/bin/python -m benchmarks.tpu --again --only v5e:1x1/operation
    .venv-tpu/bin/python -m benchmarks.tpu --report-only

libtpu compiles on any Linux machine, and gives the same figures each time. They say what the
compiler expects, and not what was measured on a chip. Results go to results/compiled/tpu.json and
README.md in benchmarks/. A network takes up to ten minutes to compile on one core, and everything
about four hours.
"""

import dataclasses
import time
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.progress import track

from benchmarks.tpu import records, report
from benchmarks.tpu.cases import Case, is_small, list_cases
from benchmarks.tpu.programs import compile_case
from benchmarks.tpu.records import Record
from nonlocal_jax.compiler import programs
from nonlocal_jax.training.capacity import TooLargeError

FOLDER = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile operations, blocks and networks for TPUs, without one."""

    # Parts of the names (topology/section/subject/...) of the cases to compile. Default: all.
    only: tuple[str, ...] = ()
    # Compile cases again whose results are there.
    again: bool = False
    # Compile only a few cases, again, into runs/benchmarks. Fails if an aim is missed.
    small: bool = False
    # Compile nothing, and write the report from existing results.
    report_only: bool = False

    @property
    def results(self) -> Path:
        """The file of the results."""
        folder = Path("runs/benchmarks") if self.small else FOLDER
        return folder / "results" / "compiled" / "tpu.json"

    def cases(self) -> list[Case]:
        """The cases to compile.

        Raises:
            ValueError: No case has such a name.
        """
        chosen = [case for case in list_cases() if is_small(case) or not self.small]
        if self.only:
            chosen = [case for case in chosen if any(part in case.name for part in self.only)]
        if not chosen:
            raise ValueError(
                f"only must name parts of cases such as {list_cases()[0].name!r}; got {self.only}."
            )
        return chosen


def main(config: Config) -> None:
    """Compiles, then writes the report."""
    found = {} if config.small else records.read(config.results)
    if not config.report_only:
        cases = [case for case in config.cases() if config.again or case.name not in found]
        for case in track(cases, "compiling", console=Console(stderr=True)):
            record = found[case.name] = compiled(case)
            records.write(found.values(), config.results)
            print(record.failure or report.line(record), flush=True)
    if config.small:
        missed = [target.claim for target in report.targets(found) if target.met is False]
        if missed:
            raise SystemExit(f"error: {'; '.join(missed)} must be within the aim.")
        return
    report.write(found, FOLDER)


def compiled(case: Case) -> Record:
    """Compiles a case and reads its cost."""
    record, start = Record.of(case), time.perf_counter()
    try:
        record.fill(programs.cost(compile_case(case)))
    except (TooLargeError, jax.errors.JaxRuntimeError) as error:
        record.failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    record.compile_seconds = round(time.perf_counter() - start, 1)
    return record


if __name__ == "__main__":
    main(tyro.cli(Config))
