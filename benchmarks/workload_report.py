"""The parts of the report about the first minute, training and video."""

from typing import Any

from benchmarks.first_minute_worker import FORMATS
from benchmarks.formats import number, table, target_cells
from benchmarks.targets import Target

FIRST_MINUTE = """\
CPU seconds on one core, in fresh processes and without a cache of compiled programs. The peers are
plain Flax, torch, and Orbax alone, which keeps no digests; that of the concatenation is the block
with the embedded Gaussian, and torch's attention is scaled_dot_product_attention. Files hold I3D
R101; only that of Orbax is compressed."""
# Measure, figure, claim, aim, unit.
FIRST_MINUTE_ROWS = (
    ("imports", "seconds", "import, beyond jax and flax", 0.3, " s"),
    ("operations", "worst", "operations: second call without jit over the jitted call", 3, "×"),
    ("blocks", "worst", "blocks: second call without jit over the jitted call", 3, "×"),
    ("affinities", "seconds", "affinity maps of I3D R50: second call", 0.5, " s"),
    ("cifar", "seconds", "CIFAR's ResNet-20: from the start to the first step", 15, " s"),
    ("initial_values", "ratio", "I3D R50: compiling `init` over compiling `apply`", 0.5, "×"),
    ("concatenation", "seconds", "concatenation block: trace and compilation", 2, " s"),
    ("save", "seconds", "first checkpoint of I3D R50", 2, " s"),
    ("restore", "seconds", "first checkpoint restored", 3, " s"),
    ("load torch", "seconds", "I3D R101 from a file of torch.save", 1.2, " s"),
    *(
        (
            f"load {name}",
            "peak over file",
            f"peak of loading over the file, {name}",
            1.3,
            "×",
        )
        for name in FORMATS
    ),
)
MEMORY = "Peak memory for reading the last clip of a video, beyond what the process had before:"


def training(results: dict[str, Any]) -> str:
    """Returns the part of the report about `benchmarks.training` on one backend."""
    seconds = results["seconds"]
    found = [
        Target(
            "the loop's step over the bare one",
            results["loop_over_bare_step"],
            1.03,
            is_minimum=False,
        ),
        Target(
            "cost of a checkpoint, in steps",
            results["stall_in_steps"],
            1,
            is_minimum=False,
            unit=" steps",
        ),
        Target(
            "batches that the pipeline reads per step",
            results["pipeline_over_step"],
            3,
            is_minimum=True,
            unit="",
        ),
    ]
    subject = f"ResNet-20, batches of {results['batch_size']} images of 32×32 pixels"
    origin = _origin(subject, results["environment"])
    aims = table(("", "measured", "aim", "met"), [target_cells(target) for target in found], 1)
    times = table(
        ("a step, or batch", "ms"),
        [[name, number(value, 1e3)] for name, value in seconds.items()],
        1,
    )
    return "\n\n".join(["### Training", origin, aims, times]) + "\n"


def video(results: dict[str, Any]) -> str:
    """Returns the part of the report about `benchmarks.video`."""
    encodings = results["encodings"]
    found = []
    for encoding, measured in encodings.items():
        faster, alone = (
            measured["ratios"]["over the faster library"],
            1 + measured["ratios"]["beyond the decoder"],
        )
        found += [
            Target(
                f"{encoding}: clips a second over the faster library's",
                faster,
                1.2,
                is_minimum=True,
            ),
            Target(f"{encoding}: time over the decoder's alone", alone, 1.15, is_minimum=False),
        ]
    subject = "32×2 frames of 224×224 from H.264 with a shorter side of 256, batches of 8"
    origin = _origin(subject, results["environment"])
    aims = table(("", "measured", "aim", "met"), [target_cells(target) for target in found], 1)
    names = list(next(iter(encodings.values()))["clips_per_second"])
    rows = [
        [name, *(number(measured["clips_per_second"][name]) for measured in encodings.values())]
        for name in names
    ]
    times = table(("clips a second", *encodings), rows, 1)
    peaks = "; ".join(
        f"{name} {number(value)}" for name, value in results["peak_megabytes"].items()
    )
    memory = f"{MEMORY} {peaks} MB."
    missing = "; ".join(f"{name}: {reason}" for name, reason in results["missing"].items())
    return (
        "\n\n".join(
            [
                "### Video",
                origin,
                aims,
                times,
                memory,
                *([f"Not measured: {missing}."] if missing else []),
            ]
        )
        + "\n"
    )


def first_minute(results: dict[str, Any]) -> str:
    """Returns the part of the report about `benchmarks.first_minute`."""
    measures = results["measures"]
    rows = [
        _first_minute_row(measures, measure, figure, claim, bound, unit)
        for measure, figure, claim, bound, unit in FIRST_MINUTE_ROWS
    ]
    peers = measures.get("attention_peer", {})
    for case, seconds in measures.get("attention", {}).items():
        claim = f"embedded gaussian and gradients, {case}: torch's time over ours"
        peer = peers.get(case)
        ratio = Target(claim, peer and peer / seconds, 0.8, is_minimum=True)
        rows.append([*target_cells(ratio), f"{number(peer, 1e3)} ms"])
    origin = _origin("Medians over the rounds", results["environment"])
    return (
        "\n\n".join(
            [
                "### The first minute",
                FIRST_MINUTE,
                origin,
                table(("", "measured", "aim", "met", "peer"), rows, 1),
            ]
        )
        + "\n"
    )


def _origin(subject: str, environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{subject}; {environment['cpu']}, {environment['cores']} cores; {versions}; "
        f"commit {environment['commit']}; {environment['date']}, `{environment['command']}`."
    )


def _first_minute_row(
    measures: dict[str, Any], measure: str, figure: str, claim: str, bound: float, unit: str
) -> list[str]:
    """Returns a row with what was measured, the aim, and the same figure of the peer.

    A `figure` of "worst" is the largest of the measure.
    """

    def find(name: str) -> float | None:
        found = measures.get(name, {})
        return max(found.values(), default=None) if figure == "worst" else found.get(figure)

    target = Target(claim, find(measure), bound, is_minimum=False, unit=unit)
    peer = find("load_peer" if measure == "load torch" else f"{measure}_peer")
    return [*target_cells(target), "–" if peer is None else f"{number(peer)}{unit}"]
