"""Time, memory and errors of a case: one process for each library, the competitors in turn.

Time: the median over rounds. In each round every competitor runs once, in alternating order, so that what else the machine
does meets all of them; a sample lasts 5 ms or longer, with several calls if need be; compilation and the first run come before.
Before a sample shorter than half a second comes an untimed run, since the competitor before left its own data in the caches.

Memory, on CPUs: the same for all libraries, in a fresh process in which every large array is mapped by itself and given back
(MALLOC_MMAP_THRESHOLD_): the high-water mark of resident memory during one run, less the resident memory before it and the
outputs. On GPUs: torch's own count, and XLA's.
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from benchmarks import cases, reference
from benchmarks.cases import LIBRARY, Case, Floats, Job
from benchmarks.records import Record

SAMPLE = 0.005  # seconds that a sample lasts at least
PAUSE = 0.01  # seconds between competitors, until the threads of the last one sleep
SHORT = 0.5  # seconds of a run up to which the state of the caches may matter
SLOW, VERY_SLOW = (
    2.0,
    10.0,
)  # seconds of a run from which 3 rounds do, and from which torch's first run is the only one
ROUNDS = (9, 31)
GRADIENT_ERRORS = (3136, 784, 256)
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class JobError(RuntimeError):
    """A job that its worker could not do."""


class Worker:
    """A process of one library, which does jobs on request."""

    def __init__(
        self, library: Literal["jax", "torch"], environment: dict[str, str] | None = None
    ) -> None:
        variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (environment or {})
        command = [sys.executable, "-m", f"benchmarks.{library}_worker"]
        self.library = library
        self._process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, do: str, job: Job | None = None, **options: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        request = {"do": do, "job": job and dataclasses.asdict(job)} | options
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise JobError(
                f"the {self.library} process ended with {self._process.wait()}"
            ) from None
        if "failure" in answer:
            raise JobError(answer["failure"])
        return answer

    def close(self) -> None:
        self._process.communicate()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Workers:
    """The process of each library that is timed, started when it is first needed and again after it died."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    def ask(self, do: str, job: Job, **options: Any) -> dict[str, Any]:
        library = LIBRARY[job.competitor]
        try:
            return self.of(library).ask(do, job, **options)
        except JobError as failed:
            if "process ended" in str(failed):
                del self._workers[library]
            raise

    def of(self, library: Literal["jax", "torch"]) -> Worker:
        if library not in self._workers:
            self._workers[library] = Worker(library)
        return self._workers[library]

    def forget(self) -> None:
        for worker in self._workers.values():
            worker.ask("forget")

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def measure(
    case: Case, workers: Workers, budget: float, advance: Callable[[float], None]
) -> list[Record]:
    """Everything about one case. `advance` is told which part of it was done."""
    jobs = [Job(case, *pair) for pair in cases.competitors(case, _free_bytes())]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    records = {job: Record.of(case, job.competitor, job.direction, now) for job in jobs}
    first_runs = _time(records, workers, budget)
    workers.forget()
    advance(0.4)
    for competitor in dict.fromkeys(job.competitor for job in jobs):
        _measure_memory(
            {job: record for job, record in records.items() if job.competitor == competitor},
            first_runs,
        )
        advance(0.4 / len({job.competitor for job in jobs}))
    with tempfile.TemporaryDirectory() as folder:
        _measure_errors(records, workers, Path(folder) / "outputs.npz")
    workers.forget()
    advance(0.2)
    return list(records.values())


def _time(records: dict[Job, Record], workers: Workers, budget: float) -> dict[Job, float]:
    """Fill in the seconds; return those of the first runs, compilation included."""
    first: dict[Job, float] = {}
    samples: dict[Job, list[float]] = {}

    def attempt(job: Job, do: str, **options: Any) -> float | None:
        time.sleep(PAUSE)
        try:
            seconds: float = workers.ask(do, job, **options)["seconds"]
        except JobError as failed:
            records[job].failure = str(failed)
            samples.pop(job, None)
            return None
        return seconds

    for job in records:
        seconds = attempt(job, "prepare", warm=True)
        if seconds is not None:
            first[job] = seconds
            samples[job] = [seconds] if _once(job, seconds) else []
    estimates = {
        job: attempt(job, "time", calls=1, again=True)
        for job, done in list(samples.items())
        if not done
    }
    running = {job: seconds for job, seconds in estimates.items() if seconds is not None}
    for job, seconds in running.items():
        samples[job] += [seconds] if seconds >= SAMPLE else []
    rounds = plan(running, budget)
    for turn in range(max(rounds.values(), default=0)):
        for job in list(running)[:: 1 if turn % 2 else -1]:
            if len(samples.get(job, ())) < rounds[job] and not records[job].failure:
                calls = math.ceil(SAMPLE / running[job])
                seconds = attempt(job, "time", calls=calls, again=running[job] < SHORT)
                samples[job] += [] if seconds is None else [seconds]
    for job, done in samples.items():
        records[job].seconds, records[job].fastest, records[job].rounds = (
            statistics.median(done),
            min(done),
            len(done),
        )
    return first


def plan(estimates: dict[Job, float], budget: float) -> dict[Job, int]:
    """Rounds of each job: 3 of a slow one, else as many as the budget of seconds allows, 9 to 31."""
    in_turn = sum(
        max(seconds, SAMPLE) + PAUSE + (seconds < SHORT) * seconds for seconds in estimates.values()
    )
    usual = min(max(int(budget / in_turn), ROUNDS[0]), ROUNDS[1]) if estimates else 0
    return {job: 3 if seconds > SLOW else usual for job, seconds in estimates.items()}


def _once(job: Job, seconds: float) -> bool:
    """Whether the first run is enough: torch compiles nothing."""
    return LIBRARY[job.competitor] == "torch" and seconds > VERY_SLOW


def _measure_memory(records: dict[Job, Record], first_runs: dict[Job, float]) -> None:
    """Fill in the temporary bytes of one competitor, from a process of its own."""
    competitor = next(iter(records)).competitor
    with Worker(LIBRARY[competitor], MAPPED) as worker:
        for job, record in records.items():
            if record.failure:
                continue
            try:
                worker.ask("prepare", job, warm=not _once(job, first_runs[job]))
                answer = worker.ask("peak", job)
            except JobError as failed:
                record.failure = f"memory: {failed}"
                return
            worker.ask("forget")
            for name, value in answer.items():
                setattr(record, name, value)


def _measure_errors(records: dict[Job, Record], workers: Workers, path: Path) -> None:
    """Fill in the errors: of operations against float64, of a block's peers against this library's block."""

    def outputs(job: Job) -> list[Floats]:
        workers.ask("outputs", job, path=str(path))
        with np.load(path) as arrays:
            return list(arrays.values())

    forward = {
        job: record
        for job, record in records.items()
        if job.direction == "forward" and not record.failure
    }
    case = next(iter(records)).case
    if case.section in ("block", "network"):
        _compare_with_ours(forward, outputs)
    if case.section != "operation":
        return
    arrays = cases.inputs(case)
    rounded = [array.astype(ml_dtypes.bfloat16) for array in arrays]
    exact, exact_rounded = (
        reference.response(case.instantiation, inputs) for inputs in (arrays, rounded)
    )
    for job, record in forward.items():
        record.error = reference.relative_error(outputs(job)[0], exact)
        if LIBRARY[job.competitor] == "jax":
            half = outputs(dataclasses.replace(job, dtype="bfloat16"))[0]
            record.bfloat16_error = reference.relative_error(half, exact_rounded)
    if case.size == GRADIENT_ERRORS:
        gradients = reference.gradients(case.instantiation, arrays, cases.cotangent(case))
        for job, record in records.items():
            if job.direction == "both" and not record.failure:
                pairs = zip(outputs(job)[1:], gradients, strict=True)
                record.gradient_error = max(reference.relative_error(*pair) for pair in pairs)


def _compare_with_ours(
    records: dict[Job, Record], outputs: Callable[[Job], Sequence[Floats]]
) -> None:
    ours = next((outputs(job)[0] for job in records if job.competitor == "auto"), None)
    for job, record in records.items():
        if ours is not None and job.competitor not in ("auto", "mmcv channels_last"):
            theirs = outputs(job)[0]
            channels_last = (
                np.moveaxis(theirs, 1, -1) if job.competitor.startswith("mmcv") else theirs
            )
            record.error = reference.relative_error(channels_last, ours)


def _free_bytes() -> float:
    """Memory that is free for use; without a word of it, all that there is."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = meminfo.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
