"""Writes the report: README.md and growth.png, from the JSON of every backend."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import gpu_short, plot, workload_report
from benchmarks.cases import GROWTH_WIDTH, INSTANTIATIONS, MMCV_CONCATENATION, Competitor, Section
from benchmarks.cases import NETWORK as NETWORK_CASE
from benchmarks.compiled import records as compiled_records
from benchmarks.compiled import report as compiled_report
from benchmarks.formats import megabytes, milliseconds, number, table, target_cells
from benchmarks.records import Record, Results
from benchmarks.targets import (
    DIRECTIONS,
    OPERATIONS,
    growth,
    seconds,
    slope,
    targets,
    temporary,
)

Format = Callable[[Record], str]
HEAD = """\
# Benchmarks

`make bench` measures everything and writes this file. `python -m benchmarks --help` shows how to
measure a part.

The batch size is 1 and the precision float32 unless stated otherwise, for N queries, M keys and d
channels of θ, φ and g. **auto** is what users of this library get by default. **dense** is its
definition of Eq. 1, with all N×M pairs. **torch** is well-written PyTorch: a softmax as the
faster of scaled_dot_product_attention and all pairs, the dot product with all pairs, and the
concatenation as ReLU(a_i + b_j). **mmcv** is the block of mmcv-lite in the faster of its two
memory formats. Forward + backward computes the response and every gradient.

Times are medians over rounds in which the competitors take turns. Memory is what a run needs at
its peak beyond inputs and outputs: on CPUs the high-water mark of resident memory, on GPUs what
XLA and torch report. `measure.py` has the details.
"""
BLOCKS = """\
The input is x (1, T, H, W, 2d), with the conventions of mmcv and the same weights for all, which
agree to {:.0e}. Forward is evaluation. Forward + backward is training, with the gradients of x
and of all parameters. Torch multiplies matrices by MKL, which is faster on Intel's processors: on 2
cores of a Xeon, torch's time over ours was 1.00 to 1.18 for the Gaussian blocks, and 0.97 to 1.03
for those with the embedded Gaussian."""
GROWTH = """\
M = N/4, d = {}. **copy** reads arrays as large as the operation's inputs and writes arrays as
large as its outputs, which is the least that memory costs. Above 32 MB (N = 200,704), the C
library requests every array from the system again, page by page. The exponents of the copy show
what that costs."""
NETWORK = """\
{}, with the conventions of PySlowFast and the same weights for all. **plain** is Flax with 3-D
`nn.Conv` and all pairs. **torch** is the faster of its two memory formats. A training step is
forward, backward and SGD with momentum.

The limits on two CPU cores: inference has 115 GFLOP in products as we run it, which take 0.55 to
0.72 s at the 160 to 210 GFLOP/s of XLA's matrix products of these sizes. JAX allocates its
temporaries on every call, page by page: with the large pages of
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` (Linux), a training step took 2.5 s instead of 2.8 s, in
one process without pauses."""
# Parts of the report by the folder of their results.
WORKLOADS = {
    "first_minute": workload_report.first_minute,
    "training": workload_report.training,
    "video": workload_report.video,
}
EXCERPT = (
    ("embedded_gaussian", 12544, 12544),
    ("dot_product", 12544, 12544),
    ("concatenation", 12544, 3136),
)


def write(folder: Path, readme: Path, project: Path) -> None:
    """Reads `folder`/*.json and writes `readme`, with a picture of growth for each backend.

    A few lines about the first backend, and about TPUs, go into `project`, the README of the
    repository, between marks such as <!-- benchmarks: begin --> and <!-- benchmarks: end -->.

    Raises:
        FileNotFoundError: If there are no results.
    """
    paths = sorted(path for path in folder.glob("*.json") if path.name != gpu_short.PATH.name)
    if not paths:
        raise FileNotFoundError(
            f"{folder} must hold results such as cpu.json; run `python -m benchmarks` first."
        )
    found = {path: Results.read(path) for path in paths}
    parts = [HEAD]
    for path, results in found.items():
        picture = folder / ("growth.png" if path.stem == "cpu" else f"growth_{path.stem}.png")
        plot.draw(results, picture)
        parts.append(markdown(results, picture.relative_to(readme.parent).as_posix()))
        for name, part in WORKLOADS.items():
            workload = folder / name / path.name
            if workload.exists():
                parts.append(part(json.loads(workload.read_text())))
    excerpts = {"benchmarks": excerpt(found[paths[0]])}
    if compiled := compiled_records.read_all(folder / "compiled"):
        parts.append(compiled_report.markdown(compiled))
        excerpts["tpu"] = compiled_report.excerpt(compiled)
    readme.write_text("\n".join(parts))
    if project.is_file():
        project.write_text(_replace_between_marks(project.read_text(), excerpts))


def _replace_between_marks(text: str, excerpts: Mapping[str, str]) -> str:
    for name, replacement in excerpts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text and end in text:
            head, tail = text.split(begin)[0], text.split(end)[1]
            text = f"{head}{begin}\n{replacement}\n{end}{tail}"
    return text


def markdown(results: Results, picture: str) -> str:
    """Returns the part of the report about one backend."""
    sections = [
        f"## On {results.environment['backend'].upper()}",
        _origin(results),
        "### Targets",
        table(
            ("", "measured", "aim", "met"),
            [target_cells(target) for target in targets(results)],
            1,
        ),
        "### Operations",
        *(_operations(results, name) for name in INSTANTIATIONS),
        "### Errors",
        "‖y − y64‖ / ‖y64‖ relative to float64, in units of 1e-7 (bfloat16: 1e-3). For gradients, "
        "the largest among them.",
        _errors(results),
        "### Blocks",
        f"{BLOCKS.format(_disagreement(results))} {MMCV_CONCATENATION}",
        _blocks(results),
        "### Network",
        NETWORK.format(NETWORK_CASE.where),
        _network(results),
        "### Growth",
        GROWTH.format(GROWTH_WIDTH),
        f"![Time and memory against N]({picture})",
        _growth(results),
        _failures(results),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def excerpt(results: Results) -> str:
    """Returns a table of the operations at the largest sizes, where avoiding the affinity pays
    most.
    """
    names = ("auto", "dense", "torch")
    rows = []
    for case in _cases(results, "operation"):
        if (case.instantiation, case.n, case.m) in EXCERPT:
            numbers = (
                _side_by_side(results, case, names, milliseconds)
                + _side_by_side(results, case, names, megabytes)[1:]
            )
            name = OPERATIONS[case.instantiation]
            # Rows must fit a README of 100 columns, hence no thousands separators.
            numbers = [text.replace(",", "") for text in numbers]
            rows.append([name, str(case.n), str(case.m), *numbers])
    # The text of the README names the competitors.
    heads = ["forward, ms", "forward + backward, ms", "forward + backward, MB"]
    return table(["", "queries", "keys", *heads], rows, 1)


def _origin(results: Results) -> str:
    environment = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    dates = [record.date for record in results.records]
    memory = number(environment["memory_bytes"], 1e-9)
    hardware = (
        f"{environment['cpu']}, {environment['cores']} cores, {memory} GB, "
        f"load {environment['load']:.1f}"
    )
    measured = f"measured from {min(dates)} to {max(dates)} with `{environment['command']}`"
    return f"{hardware} at the start; {versions}; commit {environment['commit']}; {measured}."


def _failures(results: Results) -> str:
    failed = [record for record in results.records if record.failure]
    lines = [
        f"- {record.section} {record.instantiation} {record.n}/{record.m}/{record.d}, "
        f"{record.competitor}, {DIRECTIONS[record.direction]}: {record.failure}"
        for record in failed
    ]
    return "\n".join(["### What failed", "", *lines]) if failed else ""


def _cases(results: Results, section: Section) -> list[Record]:
    """Returns one record per case of a section, sorted by instantiation and size."""
    found: dict[tuple[str, int, int], Record] = {}
    for record in results.records:
        if record.section == section:
            found.setdefault((record.instantiation, record.n, record.m), record)
    return sorted(
        found.values(), key=lambda case: (INSTANTIATIONS.index(case.instantiation), case.n * case.m)
    )


def _side_by_side(
    results: Results, case: Record, competitors: Sequence[Competitor | str], show: Format
) -> list[str]:
    """Returns a cell per direction, which lists the competitors."""
    fields = {
        "section": case.section,
        "instantiation": case.instantiation,
        "n": case.n,
        "m": case.m,
    }
    cells = []
    for direction in DIRECTIONS:
        found = [results.find(competitor, direction, **fields) for competitor in competitors]
        cells.append(" · ".join("–" if record is None else show(record) for record in found))
    return cells


def _head(competitors: Sequence[str]) -> list[str]:
    return [
        f"{words}, {unit}: {' · '.join(competitors)}"
        for unit in ("ms", "MB")
        for words in DIRECTIONS.values()
    ]


def _operations(results: Results, instantiation: str) -> str:
    names = ("auto", "dense", "torch")
    rows = []
    for case in _cases(results, "operation"):
        if case.instantiation == instantiation:
            auto = results.find(
                "auto",
                "forward",
                section="operation",
                instantiation=instantiation,
                n=case.n,
                m=case.m,
            )
            took = (auto and auto.implementation) or "–"
            numbers = [
                cell
                for show in (milliseconds, megabytes)
                for cell in _side_by_side(results, case, names, show)
            ]
            rows.append([f"{case.n} / {case.m} / {case.d}", case.where, took, *numbers])
    if not rows:
        return ""
    title = f"**{instantiation.replace('_', ' ')}**"
    return f"{title}\n\n{table(['N / M / d', 'where', 'auto is', *_head(names)], rows, 3)}"


def _errors(results: Results) -> str:
    names = ("auto", "dense", "torch")
    rows = []
    for case in _cases(results, "operation"):
        single = _side_by_side(results, case, names, lambda record: number(record.error, 1e7))[0]
        half = _side_by_side(
            results, case, names[:2], lambda record: number(record.bfloat16_error, 1e3)
        )[0]
        gradient = _side_by_side(
            results, case, names, lambda record: number(record.gradient_error, 1e7)
        )[1]
        rows.append(
            [
                OPERATIONS[case.instantiation],
                f"{case.n} / {case.m} / {case.d}",
                single,
                gradient,
                half,
            ]
        )
    return table(
        [
            "",
            "N / M / d",
            "auto · dense · torch",
            "gradients: auto · dense · torch",
            "bfloat16: auto · dense",
        ],
        rows,
        2,
    )


def _disagreement(results: Results) -> float:
    """Returns the largest relative difference between a peer's block and ours."""
    return max(
        (record.error for record in results.records if record.section == "block" and record.error),
        default=0.0,
    )


def _blocks(results: Results) -> str:
    names = ("auto", "torch", "mmcv")
    rows = []
    for case in _cases(results, "block"):
        numbers = [
            cell
            for show in (milliseconds, megabytes)
            for cell in _side_by_side(results, case, names, show)
        ]
        rows.append(
            [
                OPERATIONS[case.instantiation],
                f"{case.n} / {case.m} / {case.d}",
                case.where,
                *numbers,
            ]
        )
    return table(["", "N / M / d", "where", *_head(("ours", "torch", "mmcv"))], rows, 3)


def _network(results: Results) -> str:
    names = ("auto", "plain", "torch")
    rows = []
    for direction, words in (("forward", "inference"), ("both", "training step")):
        found = [results.find(name, direction, section="network") for name in names]
        if any(found):
            shows: tuple[Format, ...] = (
                lambda record: number(record.seconds),
                lambda record: number(record.temporary_bytes, 1e-6),
                lambda record: number(record.compile_seconds),
                lambda record: number(record.error, 1e7),
            )
            rows.append(
                [
                    words,
                    *(" · ".join("–" if r is None else show(r) for r in found) for show in shows),
                ]
            )
    head = [
        "",
        *(
            f"{quantity}: ours · plain · torch"
            for quantity in (
                "seconds",
                "MB",
                "compilation, s",
                "difference of logits from ours, 1e-7",
            )
        ),
    ]
    return table(head, rows, 1) if rows else ""


def _growth(results: Results) -> str:
    times, memory = ("auto", "copy", "dense"), ("auto", "dense")
    rows = []
    for name, cases in itertools.groupby(
        _cases(results, "growth"), key=lambda case: case.instantiation
    ):
        for case in cases:
            numbers = _side_by_side(results, case, times, milliseconds) + _side_by_side(
                results, case, memory, megabytes
            )
            rows.append([OPERATIONS[name], str(case.n), *numbers])
        exponents = _exponents(results, name, times, seconds) + _exponents(
            results, name, memory, temporary
        )
        rows.append([OPERATIONS[name], "exponent", *exponents])
    return table(["", "N", *_head(times)[:2], *_head(memory)[2:]], rows, 1)


def _exponents(
    results: Results,
    instantiation: str,
    competitors: Sequence[str],
    value: Callable[[Record], float | None],
) -> list[str]:
    """Returns a cell per direction, with the exponents of N of the competitors."""
    return [
        " · ".join(
            number(slope(*growth(results, instantiation, name, direction, value)))
            for name in competitors
        )
        for direction in DIRECTIONS
    ]
