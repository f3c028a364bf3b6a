"""A process that runs the jobs of one library on request.

Requests and answers are JSON over stdin and stdout, one per line.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.cases import Case, Floats, Job

CLEAR_REFS, OOM_SCORE = Path("/proc/self/clear_refs"), Path("/proc/self/oom_score_adj")


class Library(Protocol):
    """What each library implements. Outputs are a flat list of arrays."""

    backend: str  # "cpu", "gpu" or "tpu"

    def prepare(self, job: Job) -> Callable[[], Sequence[Any]]:
        """Prepares a job. Returns the run, whose outputs may not be ready yet."""

    def wait(self, outputs: Sequence[Any]) -> None:
        """Blocks until the outputs of a run are ready."""

    def facts(self, job: Job) -> dict[str, Any]:
        """Returns what the library reports about a job, such as temporary bytes."""

    def device_peak(self, run: Callable[[], Sequence[Any]]) -> int | None:
        """Returns temporary bytes on an accelerator; None where the library cannot tell."""

    def as_numpy(self, output: Any) -> Floats:
        """Converts an output to float32, with its axes in the order of the library."""

    def versions(self) -> dict[str, str]:
        """Returns the versions of the library and of what it depends on."""


def serve(library: Library) -> None:
    """Answers requests until stdin ends. Anything else written to stdout goes to stderr."""
    if OOM_SCORE.exists():
        OOM_SCORE.write_text("1000")  # if memory runs out, Linux kills this process first
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runs: dict[Job, Callable[[], Sequence[Any]]] = {}
    for line in sys.stdin:
        try:
            answer = _answer(library, runs, json.loads(line))
        except Exception as error:
            message = str(error).splitlines()[0] if str(error) else ""
            answer = {"failure": f"{type(error).__name__}: {message}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(
    library: Library, runs: dict[Job, Callable[[], Sequence[Any]]], request: dict[str, Any]
) -> dict[str, Any]:
    action = request["do"]
    if action == "forget":
        runs.clear()
        gc.collect()
        return {}
    if action == "describe":
        return {"backend": library.backend, "versions": library.versions()}
    job = _job(request["job"])
    if action == "prepare":
        runs[job] = library.prepare(job)
        return {"seconds": _seconds(library, runs[job], 1) if request["warm"] else None}
    if action == "time":
        if request["again"]:
            library.wait(runs[job]())
        return {"seconds": _seconds(library, runs[job], request["calls"])}
    if action == "peak":
        peak = (
            _resident_peak(library, runs[job])
            if library.backend == "cpu"
            else library.device_peak(runs[job])
        )
        return {"temporary_bytes": peak} | library.facts(job)
    np.savez(request["path"], *(library.as_numpy(output) for output in library.prepare(job)()))
    return {}


def _job(fields: dict[str, Any]) -> Job:
    case = fields["case"]
    return Job(**fields | {"case": Case(**case | {"positions": tuple(case["positions"])})})


def _seconds(library: Library, run: Callable[[], Sequence[Any]], calls: int) -> float:
    """Returns the seconds of one call, as the mean of several.

    An accelerator starts the next call without waiting for the previous one, so that launching it
    costs no time unless that takes longer than the call.
    """
    start = time.perf_counter()
    for call in range(calls):
        outputs = run()
        if library.backend == "cpu" or call == calls - 1:
            library.wait(outputs)
    return (time.perf_counter() - start) / calls


def _resident_peak(library: Library, run: Callable[[], Sequence[Any]]) -> int | None:
    """Returns the rise of resident memory, minus the outputs; None where it is not reported."""
    if not CLEAR_REFS.exists():
        return None
    gc.collect()
    CLEAR_REFS.write_text("5")  # resets the high-water mark
    resident = status("VmRSS")
    outputs = run()
    library.wait(outputs)
    return max(status("VmHWM") - resident - sum(output.nbytes for output in outputs), 0)


def status(name: str) -> int:
    """Returns a size that Linux reports about this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
