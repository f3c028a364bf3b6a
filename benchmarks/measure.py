"""Measures the time, memory and errors of a case, with one process per library.

Time is the median over rounds. In each round every competitor runs once, in alternating order, so
that other load on the machine affects all of them alike. A sample lasts at least 5 ms, with several
calls if necessary, and excludes compilation and the first run. Samples shorter than half a second
are preceded by an untimed run, because the previous competitor left its own data in the caches.

Memory on CPUs is measured in the same way for all libraries: in a fresh process in which every
large array is mapped separately and returned to the system (MALLOC_MMAP_THRESHOLD_), it is the
high-water mark of resident memory during one run, minus the resident memory before it and the
outputs. On GPUs, it is what torch and XLA report.
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

SAMPLE = 0.005  # shortest sample, in seconds
PAUSE = 0.01  # seconds between competitors, in which the threads of the last one go to sleep
SHORT = 0.5  # runs shorter than this, in seconds, depend on the state of the caches
SLOW = 2.0  # runs longer than this, in seconds, are measured in 3 rounds
SLOWEST = 10.0  # of runs longer than this, in seconds, torch does only one
MIN_ROUNDS, MAX_ROUNDS = 9, 31
GRADIENT_ERROR_SIZE = (3136, 784, 256)
SEPARATE_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class JobError(RuntimeError):
    """A job failed in its worker."""


class Worker:
    """A process that runs the jobs of one library on request."""

    def __init__(
        self, library: Literal["jax", "torch"], environment: dict[str, str] | None = None
    ) -> None:
        variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | (environment or {})
        command = [sys.executable, "-m", f"benchmarks.{library}_worker"]
        self.library = library
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, open as long as the process
        self._process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, request: str, job: Job | None = None, **options: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        message = {"do": request, "job": job and dataclasses.asdict(job)} | options
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise JobError(f"the {self.library} process ended with code {code}: {last}") from None
        if "failure" in answer:
            raise JobError(answer["failure"])
        return answer

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Workers:
    """One process per library for timing, started when first needed and restarted after it dies."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._environment = environment
        self._workers: dict[str, Worker] = {}

    def ask(self, request: str, job: Job, **options: Any) -> dict[str, Any]:
        library = LIBRARY[job.competitor]
        try:
            return self.get(library).ask(request, job, **options)
        except JobError as failed:
            if "process ended" in str(failed):
                del self._workers[library]
            raise

    def get(self, library: Literal["jax", "torch"]) -> Worker:
        if library not in self._workers:
            self._workers[library] = Worker(library, self._environment)
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
    """Measures everything about one case. Calls `advance` with the fraction that was completed."""
    jobs = [Job(case, *pair) for pair in cases.competitors(case, _free_bytes())]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    records = {job: Record.empty(case, job.competitor, job.direction, date) for job in jobs}
    first_runs = time_jobs(records, workers, budget)
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


def time_jobs(records: dict[Job, Record], workers: Workers, budget: float) -> dict[Job, float]:
    """Fills in the seconds. Returns those of the first runs, which include compilation."""
    first: dict[Job, float] = {}
    samples: dict[Job, list[float]] = {}

    def attempt(job: Job, request: str, **options: Any) -> float | None:
        time.sleep(PAUSE)
        try:
            seconds: float = workers.ask(request, job, **options)["seconds"]
        except JobError as failed:
            records[job].failure = str(failed)
            samples.pop(job, None)
            return None
        return seconds

    for job in records:
        seconds = attempt(job, "prepare", warm=True)
        if seconds is not None:
            first[job] = seconds
            samples[job] = [seconds] if _first_run_suffices(job, seconds) else []
    estimates = {
        job: attempt(job, "time", calls=1, again=True)
        for job, measured in list(samples.items())
        if not measured
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
                if seconds is not None:
                    samples[job].append(seconds)
    for job, measured in samples.items():
        records[job].seconds = statistics.median(measured)
        records[job].fastest = min(measured)
        records[job].rounds = len(measured)
    return first


def plan(estimates: dict[Job, float], budget: float) -> dict[Job, int]:
    """Returns the rounds of each job: 3 if it is slow, else 9 to 31 within the budget."""
    round_seconds = sum(
        max(seconds, SAMPLE) + PAUSE + (seconds < SHORT) * seconds for seconds in estimates.values()
    )
    usual = min(max(int(budget / round_seconds), MIN_ROUNDS), MAX_ROUNDS) if estimates else 0
    return {job: 3 if seconds > SLOW else usual for job, seconds in estimates.items()}


def _first_run_suffices(job: Job, seconds: float) -> bool:
    """Whether the first run is a valid sample: outside of networks, torch compiles nothing."""
    is_compiled = LIBRARY[job.competitor] == "jax" or job.case.section == "network"
    return seconds > SLOWEST and not is_compiled


def _measure_memory(records: dict[Job, Record], first_runs: dict[Job, float]) -> None:
    """Fills in the temporary bytes of one competitor, measured in a separate process."""
    competitor = next(iter(records)).competitor
    with Worker(LIBRARY[competitor], SEPARATE_MAPPINGS) as worker:
        for job, record in records.items():
            if record.failure:
                continue
            try:
                worker.ask("prepare", job, warm=not _first_run_suffices(job, first_runs[job]))
                answer = worker.ask("peak", job)
            except JobError as failed:
                record.failure = f"memory: {failed}"
                return
            worker.ask("forget")
            for name, value in answer.items():
                setattr(record, name, value)


def _measure_errors(records: dict[Job, Record], workers: Workers, path: Path) -> None:
    """Fills in errors: operations relative to float64, a block's peers relative to ours."""

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
        _compare_peers(forward, outputs)
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
    if case.size == GRADIENT_ERROR_SIZE:
        gradients = reference.gradients(case.instantiation, arrays, cases.cotangent(case))
        for job, record in records.items():
            if job.direction == "both" and not record.failure:
                pairs = zip(outputs(job)[1:], gradients, strict=True)
                record.gradient_error = max(reference.relative_error(*pair) for pair in pairs)


def _compare_peers(records: dict[Job, Record], outputs: Callable[[Job], Sequence[Floats]]) -> None:
    expected = next((outputs(job)[0] for job in records if job.competitor == "auto"), None)
    for job, record in records.items():
        if expected is not None and job.competitor not in ("auto", "mmcv channels_last"):
            output = outputs(job)[0]
            if job.competitor.startswith("mmcv"):
                output = np.moveaxis(output, 1, -1)  # mmcv's channels come second
            record.error = reference.relative_error(output, expected)


def _free_bytes() -> float:
    """Returns the available memory; all memory where the system does not report it."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = meminfo.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
