"""The parts of the report about training and video."""

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.formats import number, table, target_cells
from benchmarks.targets import Target

LIMIT = """\
Neither the library's convolutions nor XLA's products bring the step to torch's time. For each
convolution, take the faster of the library's own and of one XLA product with as many
multiplications, whose input is prepared beforehand at no cost: {} ms. The remainder, which the
bare step takes beyond its convolutions, is {} ms. Together they take {} ms, {}× torch's whole
step of {} ms (medians of {} rounds)."""
MEMORY = "Peak memory for reading the last clip of a video, beyond what the process had before:"
STEP_PARTS = ("convolutions", "products", "lesser")  # parts of the bare step


def training(results: dict[str, Any]) -> str:
    """Returns the part of the report about `benchmarks.training` on one backend."""
    seconds, environment = results["seconds"], results["environment"]
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
        Target("torch's step over the bare one", results["torch_over_step"], 1, is_minimum=True),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    origin = (
        f"ResNet-20, batches of {results['batch_size']} images of 32×32 pixels; "
        f"{environment['cpu']}, {environment['cores']} cores; {versions}; "
        f"commit {environment['commit']}; {environment['date']}, `{environment['command']}`."
    )
    aims = table(("", "measured", "aim", "met"), [target_cells(target) for target in found], 1)
    times = table(
        ("a step, or batch", "ms"),
        [[name, number(seconds[name], 1e3)] for name in seconds if name not in STEP_PARTS],
        1,
    )
    return (
        "\n\n".join(
            [
                "### Training",
                origin,
                aims,
                times,
                *_limit(results["rounds"], environment["backend"]),
            ]
        )
        + "\n"
    )


def video(results: dict[str, Any]) -> str:
    """Returns the part of the report about `benchmarks.video`."""
    environment, encodings = results["environment"], results["encodings"]
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
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    origin = (
        "32×2 frames of 224×224 from H.264 with a shorter side of 256, batches of 8; "
        f"{environment['cpu']}, {environment['cores']} cores; {versions}; "
        f"commit {environment['commit']}; {environment['date']}, `{environment['command']}`."
    )
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


def _limit(rounds: dict[str, list[float]], backend: str) -> Iterator[str]:
    """Yields the limit on CPU, if it exceeds torch's step in three of four rounds."""
    torch_seconds = map(min, rounds["torch, contiguous"], rounds["torch, channels_last"])
    together = zip(
        rounds["bare"][::4], rounds["convolutions"], rounds["lesser"], torch_seconds, strict=True
    )
    found = [
        (lesser, bare - alone, lesser + bare - alone, torch)
        for bare, alone, lesser, torch in together
    ]
    if backend == "cpu" and sum(total > torch for _, _, total, torch in found) >= 0.75 * len(found):
        lesser, remainder, total, torch = (
            number(statistics.median(values), 1e3) for values in zip(*found, strict=True)
        )
        ratio = number(statistics.median(total / torch for _, _, total, torch in found))
        yield LIMIT.format(lesser, remainder, total, ratio, torch, len(found))
