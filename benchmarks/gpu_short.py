"""Tests and measures the essential rows on one NVIDIA GPU, beside torch, in a few minutes.

    python3 -m venv .venv-short
    .venv-short/bin/pip install -r requirements.txt -r requirements-parity.txt "jax[cuda13]"
    .venv-short/bin/python -m benchmarks --gpu-short

First come the tests marked `gpu`, then the rows, the most important ones first: operations and
blocks, and I3D R50 with five blocks. All have 8 samples and are computed in bfloat16; torch's
networks by automatic mixed precision in channels_last_3d: with explicit pairs, with
scaled_dot_product_attention, and with that and torch.compile. Times are medians over rounds in
which the competitors take turns, as `measure.py` describes.

Everything goes to results/gpu-short.json after each row. No row starts once the seconds of
`--budget` are spent; the rows left out are listed. A second run measures them: `--only block 512`
measures rows with such names, without the tests, and keeps the results of the others, which must
be of the same commit, versions and GPU.

jax[cuda13] needs a driver of version 580 or later; jax[cuda12] works with older ones.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks import machine
from benchmarks.cases import LIBRARY, POSITIONS, Case, Competitor, Direction, Job
from benchmarks.formats import number, table, target_cells
from benchmarks.measure import JobError, Workers, time_jobs
from benchmarks.records import Record
from benchmarks.targets import DIRECTIONS, Target
from nonlocal_jax import files
from nonlocal_jax.types import Instantiation

ROOT = Path(__file__).parent.parent
PATH = Path(__file__).parent / "results" / "gpu-short.json"
BATCH = 8
SIZES = ((3136, 784, 256), (12544, 3136, 256), (3136, 784, 512), (12544, 3136, 512))
SUBJECTS: tuple[Instantiation, ...] = ("embedded_gaussian", "dot_product", "concatenation")
CUDNN_WIDTH = 256  # the widest heads of cuDNN's attention on an H100
NETWORK_COMPETITORS: tuple[Competitor, ...] = (
    "auto",
    "torch channels_last",
    "torch sdpa",
    "torch compiled",
)
TESTS = ("tests/ops", "tests/layers")  # the folders of the tests marked `gpu`
TEST_SECONDS = 100  # after which the tests are stopped
TRAINING = "I3D R50 32×2, training"
_OUTCOME = re.compile(r"^(tests/.*?::.*?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)


class Row(NamedTuple):
    """What is measured side by side.

    Attributes:
        name: Its name in the results.
        jobs: All competitors and directions.
        seconds: Seconds of timing.
    """

    name: str
    jobs: tuple[Job, ...]
    seconds: float


def list_rows() -> list[Row]:
    """Returns all rows, the most important ones first."""
    first = [_operation(name, *SIZES[0]) for name in SUBJECTS]
    other = [_operation(name, *size) for size in SIZES[1:] for name in SUBJECTS]
    blocks = [_block(name, n, m, d) for n, m, d in (SIZES[0], (784, 196, 512)) for name in SUBJECTS]
    i3d_32x2, i3d_8x8 = (
        [_network(clip, frames, direction) for direction in ("both", "forward")]
        for clip, frames in (("32×2", 32), ("8×8", 8))
    )
    return [*first, *i3d_32x2, *other, *blocks, *i3d_8x8]


def _operation(name: Instantiation, n: int, m: int, d: int) -> Row:
    competitors: list[Competitor] = ["auto", "dense", "torch pairs"]
    if name == "embedded_gaussian":
        competitors.append("torch sdpa")
        if d <= CUDNN_WIDTH:
            competitors += ["cudnn", "torch cudnn"]
    case = Case("operation", name, n, m, d, "", batch=BATCH)
    return Row(case.name, jobs(case, competitors, get_args(Direction)), 1.0)


def _block(name: Instantiation, n: int, m: int, d: int) -> Row:
    competitors: list[Competitor] = ["auto", "torch pairs"]
    if name == "embedded_gaussian":
        competitors.append("torch sdpa")
    case = Case("block", name, n, m, d, "", POSITIONS[n], BATCH)
    return Row(case.name, jobs(case, competitors, get_args(Direction)), 1.0)


def _network(clip: str, frames: int, direction: Direction) -> Row:
    n, m, d = SIZES[0]
    case = Case("network", "embedded_gaussian", n, m, d, "", (frames, 224, 224), BATCH)
    name = f"I3D R50 {clip}, {'inference' if direction == 'forward' else 'training'}"
    return Row(name, jobs(case, NETWORK_COMPETITORS, (direction,)), 5.0)


def jobs(
    case: Case, competitors: Sequence[Competitor], directions: Sequence[Direction]
) -> tuple[Job, ...]:
    """Returns the jobs of a case, in bfloat16."""
    return tuple(
        Job(case, competitor, direction, "bfloat16")
        for direction in directions
        for competitor in competitors
    )


def run(
    rows: Sequence[Row],
    path: Path,
    budget: float,
    *,
    backend: str = "gpu",
    tests: Sequence[str] = TESTS,
    keep: bool = False,
) -> dict[str, Any]:
    """Tests, measures and writes the results after each row.

    Args:
        rows: What to measure.
        path: The file of the results.
        budget: Seconds after which no row starts.
        backend: Backend that JAX and torch must have. Without torch, its competitors are left out.
        tests: Files and folders of tests marked `gpu`.
        keep: Whether to keep the tests and the other rows of an earlier run, and run no tests.

    Raises:
        ValueError: If JAX or torch has another backend, or an earlier run had another environment.
    """
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as cache,
        contextlib.closing(Workers(_compilation_cache(cache))) as workers,
    ):
        environment = describe(workers, backend)
        if keep:
            kept = read(path)
            check_same(kept["environment"], environment)
        else:
            kept = {"tests": run_tests(tests), "rows": {}, "left_out": []}
        left_out = list(dict.fromkeys([*kept["left_out"], *(row.name for row in rows)]))
        results = kept | {"environment": environment, "left_out": left_out}
        for row in rows:
            write(results, path)
            if time.perf_counter() - start > budget:
                break
            results["rows"][row.name] = measure(row, workers, "torch" in environment["versions"])
            left_out.remove(row.name)
            print(line(row.name, results["rows"][row.name]), flush=True)
    environment["seconds"] = round(time.perf_counter() - start)
    write(results, path)
    return results


def _compilation_cache(folder: str) -> dict[str, str]:
    """Returns variables with which JAX compiles a program once, to run it and for its memory."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def describe(workers: Workers, backend: str) -> dict[str, Any]:
    """Returns versions and hardware.

    Raises:
        ValueError: If JAX or torch has another backend.
    """
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    has_torch = importlib.util.find_spec("torch") is not None
    environment = machine.describe(workers, command, ("jax", "torch") if has_torch else ("jax",))
    for key, library in {"backend": "JAX", "torch backend": "torch"}.items():
        if environment.get(key, backend) != backend:
            raise ValueError(
                f"--gpu-short needs an NVIDIA GPU that {library} can use; its backend is "
                f"{environment[key]!r}. The docstring of benchmarks/gpu_short.py says what to "
                "install, and nvidia-smi whether there is a GPU."
            )
    if shutil.which("nvidia-smi"):
        fields = "--query-gpu=name,driver_version,memory.total,power.limit"
        query = ["nvidia-smi", fields, "--format=csv"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        environment["nvidia-smi"] = found.stdout.splitlines()
    return environment


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ValueError if two runs differ in what their results depend on."""
    for key in ("commit", "versions", "nvidia-smi"):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"rows are kept only from a run with the same {key}, {now.get(key)}; that of the "
                f"results is {before.get(key)}. Without --only, everything is measured again."
            )


def run_tests(tests: Sequence[str]) -> dict[str, Any]:
    """Runs the tests marked `gpu`. Returns what passed and failed until the time limit."""
    options = ["-m", "gpu", "--numprocesses=0", "--verbose", "-p", "no:cacheprovider"]
    start, code = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as log:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *tests],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=TEST_SECONDS,
                check=False,
            ).returncode
        log.seek(0)
        output = log.read()
    return {
        "seconds": round(time.perf_counter() - start),
        "exit_code": code,  # None if the tests were stopped
        **count_outcomes(output),
        "output": "" if code == 0 else output[-5000:],
    }


def count_outcomes(output: str) -> dict[str, Any]:
    r"""Counts the outcomes in the output of pytest, however early it ends, and lists failures.

    >>> count_outcomes("tests/a.py::test_b[1] PASSED [50%]\ntests/a.py::test_c FAILED [99%]")
    {'passed': 1, 'failed': 1, 'failures': ['tests/a.py::test_c']}
    """
    outcomes = _OUTCOME.findall(output)
    counts = collections.Counter(outcome.lower() for _, outcome in outcomes)
    failures = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    return {**counts, "failures": failures}


def measure(row: Row, workers: Workers, has_torch: bool) -> list[Record]:
    """Measures times and temporary memory of a row."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    records = {
        job: Record.empty(job.case, job.competitor, job.direction, date)
        for job in row.jobs
        if has_torch or LIBRARY[job.competitor] == "jax"
    }
    time_jobs(records, workers, row.seconds)
    for job, record in records.items():
        if record.failure:
            continue
        try:
            answer = workers.ask("peak", job)
        except JobError as failed:
            record.failure = f"memory: {failed}"
            continue
        for name, value in answer.items():
            setattr(record, name, value)
        record.compile_seconds = None  # compiled before, and read from the cache
    workers.forget()
    return list(records.values())


def aims(rows: Mapping[str, Sequence[Record]]) -> list[Target]:
    """Returns the aims, and whether they are met."""
    found = []
    for (n, m, d), (direction, words) in itertools.product(SIZES, DIRECTIONS.items()):
        if d <= CUDNN_WIDTH:
            name = f"operation/embedded_gaussian/{n}/{m}/{d}"
            measured = speedup(rows, name, direction, ("cudnn", "torch cudnn"))
            claim = f"embedded gaussian, {n}/{m}/{d}, {words}: cuDNN's time over ours"
            found.append(Target(claim, measured, 0.95, is_minimum=True))
    measured = speedup(rows, TRAINING, "both", NETWORK_COMPETITORS[1:])
    claim = f"{TRAINING}: the fastest torch's time over ours"
    found.append(Target(claim, measured, 1.5, is_minimum=True))
    n, m, d = SIZES[0]
    for direction, words in DIRECTIONS.items():
        name = f"operation/dot_product/{n}/{m}/{d}"
        measured = speedup(rows, name, direction, ("torch pairs",))
        claim = f"dot product, {n}/{m}/{d}, {words}: torch's time, with all pairs, over ours"
        found.append(Target(claim, measured, 4, is_minimum=True))
    return found


def speedup(
    rows: Mapping[str, Sequence[Record]], name: str, direction: str, peers: Sequence[str]
) -> float | None:
    """Returns the time of the fastest peer over ours."""
    times = {
        record.competitor: record.seconds
        for record in rows.get(name, ())
        if record.direction == direction and record.seconds is not None
    }
    fastest = min((seconds for peer, seconds in times.items() if peer in peers), default=None)
    return None if fastest is None or "auto" not in times else fastest / times["auto"]


def line(name: str, records: Sequence[Record]) -> str:
    """Describes a row: milliseconds of all competitors."""
    cells = (
        f"{record.competitor}, {record.direction}: "
        + (record.failure or f"{number(record.seconds, 1e3)} ms")
        for record in records
    )
    return f"{name}: {'; '.join(cells)}"


def read(path: Path) -> dict[str, Any]:
    """Reads the results of an earlier run."""
    content = json.loads(path.read_text())
    rows = {
        name: [Record(**record) for record in records] for name, records in content["rows"].items()
    }
    return content | {"rows": rows}


def write(results: dict[str, Any], path: Path) -> None:
    """Writes the results with the aims as JSON."""
    rows = {
        name: [dataclasses.asdict(record) for record in records]
        for name, records in results["rows"].items()
    }
    targets = [dataclasses.asdict(aim) | {"met": aim.met} for aim in aims(results["rows"])]
    content = results | {"aims": targets, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(content, indent=1) + "\n")


def main(budget: float, only: Sequence[str] = ()) -> None:
    """Tests and measures within a budget of seconds, and prints the aims."""
    chosen = [row for row in list_rows() if not only or any(part in row.name for part in only)]
    if not chosen:
        raise SystemExit(f"error: only must name parts of {[row.name for row in list_rows()]}.")
    try:
        results = run(chosen, PATH, budget, keep=bool(only) and PATH.exists())
    except (ValueError, JobError) as error:
        raise SystemExit(f"error: {error}") from error
    counts = {name: results["tests"].get(name, 0) for name in ("passed", "failed", "error")}
    print(f"tests: {counts}; left out: {', '.join(results['left_out']) or 'nothing'}")
    print(table(("", "measured", "aim", "met"), [*map(target_cells, aims(results["rows"]))], 1))
    print(f"wrote {PATH}")
