"""The part of the report about what is compiled only: aims, tables and a picture."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast, get_args

import matplotlib
from matplotlib.figure import Figure

from benchmarks.cases import SIZES
from benchmarks.compiled import records as record_files
from benchmarks.compiled.cases import (
    ATTENTION,
    H100,
    NETWORKS,
    OURS,
    PLAIN,
    SINGLE,
    Platform,
    explanation,
)
from benchmarks.compiled.records import Record
from benchmarks.formats import number, table, target_cells
from benchmarks.targets import DIRECTIONS, OPERATIONS, Target
from nonlocal_jax.compiler.topologies import CHIPS
from nonlocal_jax.types import Instantiation

Records = Mapping[str, Record]
PICTURE = Path("results") / "compiled" / "roofline.png"
CHIP = SINGLE[0]  # the chip of the aims
KINDS = ("products", "elementwise", "reductions", "copies")
HEAD = """\
## On TPUs and an H100, by their compilers

`make tpu` creates an environment with libtpu, and `python -m benchmarks.tpu` compiles everything
for TPUs on a machine that has none. **These are the compiler's estimates and not measurements**: no
TPU was at hand. XLA:TPU writes the cycles that it expects of each instruction into its program; a
time here is their sum at the clock at which the matrix units reach the published peak
({clocks}).
Collectives, sorts, gathers and Pallas kernels have no estimate, so a time is a lower bound; + marks
programs with sorts, gathers or Pallas kernels. The **roofline** is the least time that the chip's
peak rate of products and its memory's bandwidth allow: that of the FLOPs, or of reading the
arguments and writing the results once. "flash" has none, because XLA does not count the FLOPs of
Pallas kernels. Memory is what a program needs besides arguments and results. All is bfloat16.

`python -m benchmarks.gpu` compiles for an NVIDIA H100 on a machine that has no GPU. XLA estimates
no times for GPUs, so these programs have memory only. It counts convolutions without a workspace,
because it chooses their algorithms by running them. cuDNN's attention, which "auto" takes on an
H100 for Gaussians of up to 256 channels in half precision, cannot be compiled without one; networks
are compiled with what "auto" takes instead."""
OPERATION_NOTE = """\
8 samples on a v5e, and the memory that they need on an H100. The implementation that "auto" takes
is bold, and so is its memory on an H100. *attention* is `jax.nn.dot_product_attention`. Two numbers
are those of the response, and of the response with every gradient."""
BLOCK_NOTE = (
    "The same for a whole block with the default conventions, in evaluation and in training."
)
CHIP_NOTE = 'Milliseconds of what "auto" takes, on one chip of each kind.'
NETWORK_NOTE = """\
Networks with five non-local blocks; inference of 8 clips on one chip, and training steps by
`nonlocal_jax.training` with `batch_norm="device"`. *plain* is Flax: `nn.Conv`, `nn.max_pool`, all
pairs. CIFAR's ResNet has one block. A training step sums the gradients, statistics and metrics of
all chips at once, 305 arrays of I3D. XLA:TPU joins at most 256 arrays and 120 MiB in one all-reduce
(`xla_jf_crs_combiner_threshold_count`, `xla_jf_crs_combiner_threshold_in_bytes`), so they are two;
with larger limits they are one."""


def write(folder: Path) -> None:
    """Writes the picture, and the report of all benchmarks with this part in it."""
    from benchmarks import report

    draw(record_files.read_all(folder / "results" / "compiled"), folder / PICTURE)
    report.write(folder / "results", folder / "README.md", folder.parent / "README.md")


def markdown(records: Records) -> str:
    """Returns this part of the report."""
    clocks = ", ".join(f"{name} {chip.clock / 1e9:g} GHz" for name, chip in CHIPS.items())
    parts = [
        HEAD.format(clocks=clocks),
        _origin(records),
        "### Aims by the compilers",
        table(("", "by the compiler", "aim", "met"), [*map(target_cells, targets(records))], 1),
        "### Networks by the compilers",
        NETWORK_NOTE,
        _networks(records),
        f"![Estimated time against the roofline]({PICTURE.as_posix()})",
        "### Operations by the compilers",
        OPERATION_NOTE,
        _implementations(records, "operation"),
        "### Blocks by the compilers",
        BLOCK_NOTE,
        _implementations(records, "block"),
        "### Chips",
        CHIP_NOTE,
        _chips(records),
        _failures(records),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def excerpt(records: Records) -> str:
    """Returns a table of the networks on v5e, ours beside plain Flax, for the project's README."""
    rows = []
    for text, topology, section in (
        ("inference of 8 clips", CHIP, "inference"),
        ("training, 64 clips on 16 chips", "v5e:4x4", "training"),
    ):
        pair = [
            _find(records, topology, section, "i3d_32x2", competitor)
            for competitor in (OURS, PLAIN)
        ]
        if pair[0] is not None:
            figures: tuple[Callable[[Record], str], ...] = (
                _time,
                lambda record: number(record.traffic, 1e-9),
                lambda record: number(record.temporary, 1e-9),
            )
            cells = [
                " · ".join("–" if record is None else figure(record) for record in pair)
                for figure in figures
            ]
            rows.append([f"I3D R50 32×2, {text}", number(pair[0].roofline, 1e3), *cells])
    return table(["", "roofline, ms", "ms", "traffic, GB", "memory, GB"], rows, 1)


def line(record: Record) -> str:
    """Describes one program in a line."""
    if not record.cycles_by_kind:
        return f"{record.name}: {record.temporary / 1e6:,.1f} MB"
    mark = "+" if record.unestimated else ""
    return (
        f"{record.name}: {1e3 * record.seconds:,.3f}{mark} ms, roofline "
        f"{1e3 * record.roofline:,.3f} ms, {record.temporary / 1e6:,.1f} MB, "
        f"traffic {record.traffic / 1e9:,.3f} GB"
    )


def targets(records: Records) -> list[Target]:
    """Returns the aims, and whether they are met: those of a v5e, then those of an H100."""
    inference = _find(records, CHIP, "inference", "i3d_32x2", OURS)
    training = _find(records, "v5e:4x4", "training", "i3d_32x2", OURS)
    found = [
        _at_most("I3D R50 32×2, inference of 8 clips", inference, _milliseconds, 12, " ms"),
        _at_most("its training step, 64 clips on 16 chips", training, _milliseconds, 30, " ms"),
        _at_most("its training step: traffic", training, lambda r: r.traffic / 1e9, 24, " GB"),
        _at_most("its training step: collectives", training, _collectives, 1, ""),
        _at_most(
            "inference: share of copies", inference, lambda r: 100 * r.share("copies"), 5, "%"
        ),
        _at_most("training: share of copies", training, lambda r: 100 * r.share("copies"), 5, "%"),
    ]
    for section, name in itertools.product(("operation", "block"), OPERATIONS):
        worst = max(
            (
                auto.seconds / min(record.seconds for record in others)
                for auto, others in _choices(records, section, name)
            ),
            default=None,
        )
        claim = f"{OPERATIONS[name]}, every {section}: auto's time over the best estimated one's"
        bound = 1.05 if name == "concatenation" else 1.1
        found.append(Target(claim, worst, bound, is_minimum=False))
    block, operation = (3136, 784, 256), (12544, 12544, 256)
    for direction, words in DIRECTIONS.items():
        softmax = "embedded_gaussian", direction
        measured = _streaming_over_dense(records, CHIP, "block", *softmax, block, _seconds)
        claim = f"embedded gaussian block, 3136/784, {words}: streaming's time over dense's"
        found.append(Target(claim, measured, 1.0, is_minimum=False))
        measured = _streaming_over_dense(records, CHIP, "operation", *softmax, operation)
        claim = f"embedded gaussian 12544/12544, {words}: streaming's memory over dense's"
        found.append(Target(claim, measured, 0.25, is_minimum=False))
    for direction, words in DIRECTIONS.items():
        softmax = "embedded_gaussian", direction
        measured = _streaming_over_dense(records, H100, "operation", *softmax, operation)
        claim = f"H100: embedded gaussian 12544/12544, {words}: streaming's memory over dense's"
        found.append(Target(claim, measured, 0.25, is_minimum=False))
    ratios = [
        _streaming_over_dense(records, H100, "operation", name, direction, size)
        for name, direction, size in itertools.product(OPERATIONS, DIRECTIONS, SIZES)
    ]
    worst = max((ratio for ratio in ratios if ratio is not None), default=None)
    claim = "H100: every operation, size and direction: streaming's memory over dense's"
    found.append(Target(claim, worst, 1.0, is_minimum=False))
    return found


def _temporary(record: Record) -> float:
    return float(record.temporary)


def _streaming_over_dense(
    records: Records,
    topology: str,
    section: str,
    subject: str,
    direction: str,
    size: tuple[int, ...],
    value: Callable[[Record], float] = _temporary,
) -> float | None:
    streaming, dense = (
        _find(records, topology, section, subject, name, direction, size)
        for name in ("streaming", "dense")
    )
    if streaming is None or dense is None or not value(dense):
        return None
    return value(streaming) / value(dense)


def _at_most(
    claim: str, record: Record | None, value: Callable[[Record], float], bound: float, unit: str
) -> Target:
    measured = None if record is None or record.failure else value(record)
    return Target(claim, measured, bound, is_minimum=False, unit=unit)


def _milliseconds(record: Record) -> float:
    return 1e3 * record.seconds


def _seconds(record: Record) -> float:
    return record.seconds


def _collectives(record: Record) -> float:
    return float(sum(count for count, _ in record.collectives.values()))


def _roofline(record: Record) -> str:
    return "–" if record.competitor == "flash" else number(record.roofline, 1e3)


def _find(
    records: Records,
    topology: str,
    section: str,
    subject: str,
    competitor: str,
    direction: str | None = None,
    size: tuple[int, ...] | None = None,
) -> Record | None:
    for record in records.values():
        found = record.topology, record.section, record.subject, record.competitor
        if (
            found == (topology, section, subject, competitor)
            and direction in (None, record.direction)
            and (size is None or record.size == list(size))
        ):
            return record
    return None


def _choices(records: Records, section: str, name: str) -> Iterator[tuple[Record, list[Record]]]:
    """Yields what "auto" takes, and all implementations, of every size, direction and chip.

    Programs without an estimate, or with instructions that have none, are left out.
    """
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records.values():
        is_estimated = record.cycles_by_kind and not (record.failure or record.unestimated)
        is_choice = is_estimated and record.competitor != ATTENTION
        if is_choice and (record.section, record.subject) == (section, name):
            key = record.topology, str(record.size), record.direction
            groups.setdefault(key, []).append(record)
    for group in groups.values():
        for record in group:
            if record.competitor == _auto(record):
                yield record, group


def _auto(record: Record) -> str:
    assert record.size is not None
    n, m, d = record.size
    name = cast(Instantiation, record.subject)
    return explanation(name, (n, m, d), record.case.platform).implementation


def _origin(records: Records) -> str:
    commits: dict[str, set[str]] = {}
    for record in records.values():
        versions, _, commit = record.compiled_by.partition(", commit ")
        commits.setdefault(versions, set()).add(commit.partition(",")[0])
    return "Compiled by " + "; ".join(
        f"{versions}, at {', '.join(sorted(found))}" for versions, found in sorted(commits.items())
    )


def _networks(records: Records) -> str:
    rows = []
    for record in sorted(records.values(), key=lambda record: (record.subject, record.section)):
        if record.section not in ("inference", "training") or record.failure:
            continue
        rows.append(
            [
                f"{NETWORKS[record.subject]}, {record.section}",
                f"{record.batch:,} on {record.topology}",
                record.competitor,
                *(_estimates(record) if record.cycles_by_kind else ["–"] * 5),
                number(record.temporary, 1e-6),
                _collective_words(record),
            ]
        )
    head = [
        "",
        "batch",
        "",
        "ms",
        "roofline, ms",
        "of the peak",
        f"%: {' · '.join(KINDS)}",
        "traffic, GB",
        "memory, MB",
        "collectives",
    ]
    return table(head, rows, 3) if rows else ""


def _estimates(record: Record) -> list[str]:
    return [
        number(record.seconds, 1e3),
        number(record.roofline, 1e3),
        f"{record.flops / record.chip.flops / record.seconds:.0%}",
        " · ".join(number(record.share(kind), 100) for kind in KINDS),
        number(record.traffic, 1e-9),
    ]


def _collective_words(record: Record) -> str:
    words = (
        f"{count} {kind}, {number(size, 1e-6)} MB"
        for kind, (count, size) in record.collectives.items()
    )
    return ", ".join(words) or "none"


def _implementations(records: Records, section: str) -> str:
    rows = []
    for name, size in itertools.product(OPERATIONS, SIZES):
        on_chip, on_gpu = (_pairs(records, t, section, name, size) for t in (CHIP, H100))
        auto_on_chip, auto_on_gpu = (
            explanation(name, size, platform).implementation for platform in get_args(Platform)
        )
        for competitor in sorted(on_chip | on_gpu):
            pair, gpu_pair = on_chip.get(competitor, []), on_gpu.get(competitor, [])
            gpu_memory = _cell(gpu_pair, lambda record: number(record.temporary, 1e-6))
            rows.append(
                [
                    OPERATIONS[name],
                    " / ".join(map(str, size)),
                    f"**{competitor}**" if competitor == auto_on_chip else competitor,
                    _cell(pair, _time),
                    _cell(pair, _roofline),
                    _cell(pair, lambda record: number(record.temporary, 1e-6)),
                    f"**{gpu_memory}**" if competitor == auto_on_gpu else gpu_memory,
                    _cell(pair, lambda record: number(record.traffic, 1e-6)),
                ]
            )
    head = [
        "",
        "N / M / d",
        "",
        "ms",
        "roofline, ms",
        "memory, MB",
        "on an H100, MB",
        "traffic, MB",
    ]
    return table(head, rows, 3) if rows else ""


def _pairs(
    records: Records, topology: str, section: str, name: str, size: tuple[int, ...]
) -> dict[str, list[Record]]:
    """Returns the records of each competitor, the response before the gradients."""
    found: dict[str, list[Record]] = {}
    for record in records.values():
        what = record.topology, record.section, record.subject, record.size
        if what == (topology, section, name, list(size)):
            found.setdefault(record.competitor, []).append(record)
    for pair in found.values():
        pair.sort(key=lambda record: record.direction != "forward")
    return found


def _cell(pair: list[Record], show: Callable[[Record], str]) -> str:
    return " · ".join("–" if record.failure else show(record) for record in pair) or "–"


def _time(record: Record) -> str:
    if record.failure:
        return "–"
    return number(record.seconds, 1e3) + ("+" if record.unestimated else "")


def _chips(records: Records) -> str:
    rows = []
    for name, size in itertools.product(OPERATIONS, SIZES):
        auto = explanation(name, size, "tpu").implementation
        cells = []
        for topology in SINGLE:
            pair = [
                _find(records, topology, "operation", name, auto, direction, size)
                for direction in DIRECTIONS
            ]
            cells.append(" · ".join("–" if record is None else _time(record) for record in pair))
        rows.append([OPERATIONS[name], " / ".join(map(str, size)), *cells])
    return table(["", "N / M / d", *(topology.split(":")[0] for topology in SINGLE)], rows, 2)


def _failures(records: Records) -> str:
    failed = [f"- {record.name}: {record.failure}" for record in records.values() if record.failure]
    return "\n".join(["### What does not compile", "", *failed]) if failed else ""


def draw(records: Records, path: Path) -> None:
    """Draws the estimated time of each program on a v5e against its roofline."""
    matplotlib.use("agg")
    figure = Figure(figsize=(7, 5.4), layout="constrained")
    axes = figure.subplots()
    # Okabe and Ito's colours, which are distinguishable with colour blindness.
    groups: dict[str, tuple[str, str, Callable[[Record], bool]]] = {
        "operations: auto": ("#0072B2", "o", lambda r: r.competitor == _auto(r)),
        "operations: other implementations": ("0.7", "o", lambda r: r.competitor != _auto(r)),
        "networks: ours": ("#D55E00", "s", lambda r: r.competitor == OURS),
        "networks: plain Flax": ("#009E73", "^", lambda r: r.competitor == PLAIN),
    }
    shown: list[float] = []
    for label, (colour, marker, belongs) in groups.items():
        sections = ("inference", "training") if "networks" in label else ("operation",)
        points = [
            (1e3 * record.roofline, 1e3 * record.seconds)
            for record in records.values()
            if record.section in sections
            and record.topology.startswith("v5e")
            and not record.failure
            and record.competitor != "flash"  # whose FLOPs are not counted
            and belongs(record)
        ]
        if points:
            axes.loglog(*zip(*points, strict=True), marker, color=colour, label=label)
            shown += itertools.chain(*points)
    if shown:
        ends = [min(shown), max(shown)]
        axes.loglog(ends, ends, "--", color="0.5", label="as fast as the roofline")
        axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("roofline of a v5e, ms")
    axes.set_ylabel("the compiler's estimate, ms")
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
