"""The report: README.md and growth.png from the JSON of every backend."""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.cases import GROWTH_WIDTH, INSTANTIATIONS, MMCV_CONCATENATION, Competitor, Section
from benchmarks.cases import NETWORK as NETWORK_CASE
from benchmarks.records import Record, Results
from benchmarks.targets import (
    DIRECTIONS,
    OPERATIONS,
    RESOLUTION,
    Target,
    growth,
    seconds,
    slope,
    targets,
    temporary,
)

Format = Callable[[Record], str]
HEAD = """# Benchmarks

`make bench` measures all this and writes this file; `python -m benchmarks --help` says how to measure a part.

Batch 1, float32 unless said. N queries, M keys, d channels of θ, φ and g. **auto** is what users of this library get, **dense**
its definition of Eq. 1 with all N×M pairs, **torch** plain PyTorch as well as one writes it (a softmax as the faster of
scaled_dot_product_attention and all pairs; the dot product with all pairs; the concatenation as ReLU(a_i + b_j)), **mmcv** the
block of mmcv-lite in the faster of its two memory formats. Forward + backward gives the response and every gradient.

Times are medians, the competitors in turn in each round. Memory is what a run needs at its peak beyond inputs and outputs:
on CPUs the high-water mark of resident memory, on GPUs XLA's number and torch's. How: `measure.py`.
"""
BLOCKS = """x (1, T, H, W, 2d), the conventions of mmcv and the same weights for all; they agree to {:.0e}. Forward in
evaluation; forward + backward in training, with the gradients of x and of all parameters."""
GROWTH = """M = N/4, d = {}. **copy** reads arrays as large as the operation takes and writes as large ones as it gives: what
memory costs at least. Above 32 MB (N = 200,704) the C library takes every array anew from the system, page by page: the
exponents of the copy show what that costs."""
NETWORK = """{}, the conventions of PySlowFast, the same weights for all. **plain** is Flax with `nn.Conv` in three dimensions
and all pairs, **torch** the faster of its two memory formats. A training step is forward, backward and SGD with momentum.

What bounds it on two CPU cores: inference has 115 GFLOP in products as we run it, 0.55 to 0.72 s at the 160 to 210 GFLOP/s
of XLA's matrix products of these sizes. JAX takes its temporaries anew on every call, page by page: with the large pages of
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` (Linux) a training step took 2.5 s where it took 2.8 s, in one process without
pauses."""
LIMIT = """Neither the library's convolutions nor XLA's products bring the step to torch's. Take for each convolution the lesser
of the library's own and of one XLA product with as many multiplications, from all that each position sees, made beforehand for
nothing: {} ms. The rest, what the bare step takes beyond its convolutions alone, is {} ms. Both take {} ms, {}× torch's
whole step of {} ms (each the median of {} rounds)."""
MEMORY = "The last clip of a video, at the peak of memory beyond what the process had before:"
PARTS = ("convolutions", "products", "lesser")  # of the bare step
EXCERPT = (
    ("embedded_gaussian", 12544, 12544),
    ("dot_product", 12544, 12544),
    ("concatenation", 12544, 3136),
)
EXCERPT_MARKS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")


def write(folder: Path, readme: Path, project: Path) -> None:
    """Read `folder`/*.json; write `readme`, and a picture beside each JSON that has growth in it.

    Three lines of the first backend go into `project`, the README of the whole, where it has marks for them.

    Raises:
        FileNotFoundError: no results.
    """
    paths = sorted(folder.glob("*.json"))
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
        of_training = folder / "training" / path.name
        if of_training.exists():
            parts.append(training(json.loads(of_training.read_text())))
        of_video = folder / "video" / path.name
        if of_video.exists():
            parts.append(video(json.loads(of_video.read_text())))
    readme.write_text("\n".join(parts))
    begin, end = EXCERPT_MARKS
    text = project.read_text() if project.is_file() else ""
    if begin in text and end in text:
        project.write_text(
            f"{text.split(begin)[0]}{begin}\n{excerpt(found[paths[0]])}\n{end}{text.split(end)[1]}"
        )


def markdown(results: Results, picture: str) -> str:
    """One backend's part of the report."""
    sections = [
        f"## On {results.environment['backend'].upper()}",
        _origin(results),
        "### What was aimed at",
        table(
            ("", "measured", "aim", "met"),
            [_target_cells(target) for target in targets(results)],
            1,
        ),
        "### Operations",
        *(_operations(results, name) for name in INSTANTIATIONS),
        "### Errors",
        "‖y − y64‖ / ‖y64‖ against float64, in units of 1e-7 (bfloat16: 1e-3). The gradients' is the largest among them.",
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


def training(results: dict[str, Any]) -> str:
    """What `benchmarks.training` measured on one backend."""
    seconds, where = results["seconds"], results["environment"]
    found = [
        Target(
            "the loop's step over the bare one",
            results["loop_over_bare_step"],
            1.03,
            at_least=False,
        ),
        Target(
            "what a checkpoint adds, in steps",
            results["stall_in_steps"],
            1,
            at_least=False,
            unit=" steps",
        ),
        Target(
            "batches that the pipeline reads in a step",
            results["pipeline_over_step"],
            3,
            at_least=True,
            unit="",
        ),
        Target("torch's step over the bare one", results["torch_over_step"], 1, at_least=True),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    origin = (
        f"ResNet-20, batches of {results['batch_size']} images of 32×32 pixels; {where['cpu']}, {where['cores']} cores; "
        f"{versions}; commit {where['commit']}; {where['date']}, `{where['command']}`."
    )
    aims = table(("", "measured", "aim", "met"), [_target_cells(target) for target in found], 1)
    times = table(
        ("a step, or batch", "ms"),
        [[name, number(seconds[name], 1e3)] for name in seconds if name not in PARTS],
        1,
    )
    return (
        "\n\n".join(
            ["### Training", origin, aims, times, *_limit(results["rounds"], where["backend"])]
        )
        + "\n"
    )


def video(results: dict[str, Any]) -> str:
    """What `benchmarks.video` measured."""
    where, encodings = results["environment"], results["encodings"]
    found = []
    for encoding, of in encodings.items():
        faster, alone = (
            of["ratios"]["over the faster library"],
            1 + of["ratios"]["beyond the decoder"],
        )
        found += [
            Target(
                f"{encoding}: clips a second over the faster library's", faster, 1.2, at_least=True
            ),
            Target(f"{encoding}: time over the decoder's alone", alone, 1.15, at_least=False),
        ]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    origin = (
        f"32×2 frames, 224×224 of H.264 with a shorter side of 256, batches of 8; {where['cpu']}, {where['cores']} cores; "
        f"{versions}; commit {where['commit']}; {where['date']}, `{where['command']}`."
    )
    aims = table(("", "measured", "aim", "met"), [_target_cells(target) for target in found], 1)
    names = list(next(iter(encodings.values()))["clips_per_second"])
    rows = [
        [name, *(number(of["clips_per_second"][name]) for of in encodings.values())]
        for name in names
    ]
    times = table(("clips a second", *encodings), rows, 1)
    peaks = "; ".join(
        f"{name} {number(value)}" for name, value in results["peak_megabytes"].items()
    )
    memory = f"{MEMORY} {peaks} MB."
    missing = "; ".join(f"{name}: {why}" for name, why in results["missing"].items())
    return (
        "\n\n".join(
            [
                "### Video",
                origin,
                aims,
                times,
                memory,
                *([f"Not there: {missing}."] if missing else []),
            ]
        )
        + "\n"
    )


def _limit(rounds: dict[str, list[float]], backend: str) -> Iterator[str]:
    """What is said on CPU where, in three of four rounds, the lesser of both and the rest of the step exceed torch's step."""
    of_torch = map(min, rounds["torch, contiguous"], rounds["torch, channels_last"])
    together = zip(
        rounds["bare"][::4], rounds["convolutions"], rounds["lesser"], of_torch, strict=True
    )
    found = [
        (lesser, bare - alone, lesser + bare - alone, torch)
        for bare, alone, lesser, torch in together
    ]
    if backend == "cpu" and sum(both > torch for _, _, both, torch in found) >= 0.75 * len(found):
        lesser, rest, both, torch = (
            number(statistics.median(values), 1e3) for values in zip(*found, strict=True)
        )
        ratio = number(statistics.median(both / torch for _, _, both, torch in found))
        yield LIMIT.format(lesser, rest, both, ratio, torch, len(found))


def excerpt(results: Results) -> str:
    """A table of the operations at the largest sizes, where the three ways to do without the affinity show."""
    names = ("auto", "dense", "torch")
    rows = []
    for of in _cases(results, "operation"):
        if (of.instantiation, of.n, of.m) in EXCERPT:
            numbers = (
                _side_by_side(results, of, names, milliseconds)
                + _side_by_side(results, of, names, megabytes)[1:]
            )
            rows.append([OPERATIONS[of.instantiation], f"{of.n:,}", f"{of.m:,}", *numbers])
    heads = _head(("nonlocal_jax", *names[1:]))
    return table(["", "queries", "keys", *heads[:2], heads[3]], rows, 1)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """Markdown, the first columns left-aligned, the others right-aligned."""
    marks = ["---" if column < text_columns else "--:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def number(value: float | None, factor: float = 1.0) -> str:
    """Three digits, without an exponent; – is what there is not."""
    if value is None:
        return "–"
    value = float(f"{value * factor:.3g}")
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(decimals, 0), 3)}f}"


def milliseconds(record: Record) -> str:
    """The median time."""
    return number(seconds(record), 1e3)


def megabytes(record: Record) -> str:
    """The temporary memory, as finely as it is told."""
    measured = temporary(record)
    return "< 0.1" if measured is not None and measured <= RESOLUTION else number(measured, 1e-6)


def _origin(results: Results) -> str:
    where = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    dates = [record.date for record in results.records]
    hardware = f"{where['cpu']}, {where['cores']} cores, {number(where['memory_bytes'], 1e-9)} GB, load {where['load']:.1f}"
    measured = f"measured from {min(dates)} to {max(dates)} with `{where['command']}`"
    return f"{hardware} at the start; {versions}; commit {where['commit']}; {measured}."


def _failures(results: Results) -> str:
    failed = [record for record in results.records if record.failure]
    lines = [
        f"- {record.section} {record.instantiation} {record.n}/{record.m}/{record.d}, {record.competitor}, "
        f"{DIRECTIONS[record.direction]}: {record.failure}"
        for record in failed
    ]
    return "\n".join(["### What failed", "", *lines]) if failed else ""


def _target_cells(target: Target) -> list[str]:
    met = {True: "yes", False: "no", None: "not measured"}[target.met]
    measured = "–" if target.measured is None else f"{number(target.measured)}{target.unit}"
    return [
        target.claim,
        measured,
        f"{'≥' if target.at_least else '≤'} {target.bound:g}{target.unit}",
        met,
    ]


def _cases(results: Results, section: Section) -> list[Record]:
    """A record of each case of a section, the small ones of an instantiation first."""
    found: dict[tuple[str, int, int], Record] = {}
    for record in results.records:
        if record.section == section:
            found.setdefault((record.instantiation, record.n, record.m), record)
    return sorted(
        found.values(), key=lambda of: (INSTANTIATIONS.index(of.instantiation), of.n * of.m)
    )


def _side_by_side(
    results: Results, of: Record, competitors: Sequence[Competitor | str], show: Format
) -> list[str]:
    """A cell for each direction, with the competitors side by side."""
    case = {"section": of.section, "instantiation": of.instantiation, "n": of.n, "m": of.m}
    cells = []
    for direction in DIRECTIONS:
        found = [results.find(competitor, direction, **case) for competitor in competitors]
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
    for of in _cases(results, "operation"):
        if of.instantiation == instantiation:
            auto = results.find(
                "auto", "forward", section="operation", instantiation=instantiation, n=of.n, m=of.m
            )
            took = (auto and auto.implementation) or "–"
            numbers = [
                cell
                for show in (milliseconds, megabytes)
                for cell in _side_by_side(results, of, names, show)
            ]
            rows.append([f"{of.n} / {of.m} / {of.d}", of.where, took, *numbers])
    if not rows:
        return ""
    title = f"**{instantiation.replace('_', ' ')}**"
    return f"{title}\n\n{table(['N / M / d', 'where', 'auto is', *_head(names)], rows, 3)}"


def _errors(results: Results) -> str:
    names = ("auto", "dense", "torch")
    rows = []
    for of in _cases(results, "operation"):
        single = _side_by_side(results, of, names, lambda record: number(record.error, 1e7))[0]
        half = _side_by_side(
            results, of, names[:2], lambda record: number(record.bfloat16_error, 1e3)
        )[0]
        gradient = _side_by_side(
            results, of, names, lambda record: number(record.gradient_error, 1e7)
        )[1]
        rows.append(
            [OPERATIONS[of.instantiation], f"{of.n} / {of.m} / {of.d}", single, gradient, half]
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
    """‖z − z ours‖ / ‖z ours‖ of the peer furthest away."""
    return max(
        (record.error for record in results.records if record.section == "block" and record.error),
        default=0.0,
    )


def _blocks(results: Results) -> str:
    names = ("auto", "torch", "mmcv")
    rows = []
    for of in _cases(results, "block"):
        numbers = [
            cell
            for show in (milliseconds, megabytes)
            for cell in _side_by_side(results, of, names, show)
        ]
        rows.append([OPERATIONS[of.instantiation], f"{of.n} / {of.m} / {of.d}", of.where, *numbers])
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
            f"{what}: ours · plain · torch"
            for what in ("seconds", "MB", "compilation, s", "difference of logits from ours, 1e-7")
        ),
    ]
    return table(head, rows, 1) if rows else ""


def _growth(results: Results) -> str:
    times, memory = ("auto", "copy", "dense"), ("auto", "dense")
    rows = []
    for name, cases in itertools.groupby(
        _cases(results, "growth"), key=lambda of: of.instantiation
    ):
        for of in cases:
            numbers = _side_by_side(results, of, times, milliseconds) + _side_by_side(
                results, of, memory, megabytes
            )
            rows.append([OPERATIONS[name], str(of.n), *numbers])
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
    """A cell for each direction: by which power of N the competitors grow."""
    return [
        " · ".join(
            number(slope(*growth(results, instantiation, name, direction, value)))
            for name in competitors
        )
        for direction in DIRECTIONS
    ]
