"""A process that runs jobs of one library on request. Requests and answers are JSON, one a line, over stdin and stdout."""

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
    """What a library has to say; its outputs are a flat list of arrays."""

    backend: str  # "cpu", "gpu" or "tpu"

    def prepare(self, job: Job) -> Callable[[], Sequence[Any]]:
        """Everything but the run itself: the run gives the outputs when they are there."""

    def facts(self, job: Job) -> dict[str, Any]:
        """What the library itself knows of a job: the bytes it says it wants, the implementation it takes."""

    def device_peak(self, run: Callable[[], Sequence[Any]]) -> int | None:
        """Temporary bytes on an accelerator; None where the library cannot tell."""

    def to_numpy(self, output: Any) -> Floats:
        """An output as an array of float32, its axes as the library has them."""

    def versions(self) -> dict[str, str]:
        """Of the library and its company."""


def serve(library: Library) -> None:
    """Answer until stdin ends. What else is written to stdout goes to stderr."""
    if OOM_SCORE.exists():
        OOM_SCORE.write_text("1000")  # should memory run out, this process goes, not another one
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runs: dict[Job, Callable[[], Sequence[Any]]] = {}
    for line in sys.stdin:
        try:
            answer = _answer(library, runs, json.loads(line))
        except Exception as error:
            answer = {
                "failure": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            }
        print(json.dumps(answer), file=answers, flush=True)


def _answer(
    library: Library, runs: dict[Job, Callable[[], Sequence[Any]]], request: dict[str, Any]
) -> dict[str, Any]:
    what = request["do"]
    if what == "forget":
        runs.clear()
        gc.collect()
        return {}
    if what == "describe":
        return {"backend": library.backend, "versions": library.versions()}
    job = _job(request["job"])
    if what == "prepare":
        runs[job] = library.prepare(job)
        return {"seconds": _seconds(runs[job], 1) if request["warm"] else None}
    if what == "time":
        if request["again"]:
            runs[job]()
        return {"seconds": _seconds(runs[job], request["calls"])}
    if what == "peak":
        peak = (
            _resident_peak(runs[job])
            if library.backend == "cpu"
            else library.device_peak(runs[job])
        )
        return {"temporary_bytes": peak} | library.facts(job)
    np.savez(request["path"], *(library.to_numpy(output) for output in library.prepare(job)()))
    return {}


def _job(fields: dict[str, Any]) -> Job:
    case = fields["case"]
    return Job(**fields | {"case": Case(**case | {"positions": tuple(case["positions"])})})


def _seconds(run: Callable[[], Sequence[Any]], calls: int) -> float:
    """Of one call, as the mean of several."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _resident_peak(run: Callable[[], Sequence[Any]]) -> int | None:
    """How much more memory than before the process held at most, less the outputs; None where Linux does not tell."""
    if not CLEAR_REFS.exists():
        return None
    gc.collect()
    CLEAR_REFS.write_text("5")  # the high-water mark starts again
    before = _status("VmRSS")
    outputs = run()
    return max(_status("VmHWM") - before - sum(output.nbytes for output in outputs), 0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
