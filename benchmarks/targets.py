"""The performance targets, and whether the results meet them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.cases import INSTANTIATIONS, Direction
from benchmarks.records import Record, Results
from nonlocal_jax.types import Instantiation

RESOLUTION = 65536  # bytes; resident memory is not reported more finely, and less counts as this
DIRECTIONS: dict[Direction, str] = {"forward": "forward", "both": "forward + backward"}
PEERS = ("torch", "mmcv")
OPERATIONS: dict[Instantiation, str] = {name: name.replace("_", " ") for name in INSTANTIATIONS}


@dataclasses.dataclass(frozen=True)
class Target:
    """A target: `measured` should be at least, or at most, `bound`. None means not measured."""

    claim: str
    measured: float | None
    bound: float
    is_minimum: bool
    unit: str = "×"

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.is_minimum else self.measured <= self.bound


def targets(results: Results) -> list[Target]:
    """Returns all targets."""
    return [
        *_concatenation(results),
        *_dot_product(results),
        *_embedded_gaussian(results),
        *_blocks(results),
        *_growth(results),
        *_errors(results),
        *_auto(results),
        *_network(results),
    ]


def seconds(record: Record) -> float | None:
    """Returns the median seconds of one call."""
    return record.seconds


def temporary(record: Record) -> float | None:
    """Returns the bytes at the peak, besides inputs and outputs."""
    return None if record.temporary_bytes is None else max(record.temporary_bytes, RESOLUTION)


def xla_temporary(record: Record) -> float | None:
    """Returns the same as XLA's compiler reports it, however small."""
    return record.xla_temporary_bytes


def ratio(
    results: Results,
    above: str,
    below: str,
    direction: str,
    value: Callable[[Record], float | None],
    **case: Any,
) -> float | None:
    """Returns the ratio of the cost of `above` to that of `below`, in the same case."""
    pair = [results.find(competitor, direction, **case) for competitor in (above, below)]
    top, bottom = (None if record is None else value(record) for record in pair)
    return None if top is None or not bottom else top / bottom


def slope(lengths: Sequence[float], values: Sequence[float]) -> float | None:
    """Fits the exponent p of values ≈ c · lengths^p by least squares of logarithms.

    Returns None for fewer than two values.
    """
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0]) if len(values) > 1 else None


def growth(
    results: Results,
    instantiation: str,
    competitor: str,
    direction: str,
    value: Callable[[Record], float | None],
) -> tuple[list[float], list[float]]:
    """Returns N and the values measured there, in ascending order of N."""
    chosen = [
        (float(record.n), measured)
        for record in results.records
        if (record.section, record.instantiation, record.competitor, record.direction)
        == ("growth", instantiation, competitor, direction)
        and (measured := value(record)) is not None
    ]
    return [n for n, _ in sorted(chosen)], [measured for _, measured in sorted(chosen)]


def _concatenation(results: Results) -> Iterator[Target]:
    operation = {"section": "operation", "instantiation": "concatenation", "n": 12544, "m": 3136}
    for direction, words in DIRECTIONS.items():
        measured = ratio(results, "dense", "auto", direction, seconds, **operation)
        yield Target(
            f"concatenation, 12544/3136, {words}: dense's time over auto's", measured, 20, True
        )
    block = {"section": "block", "instantiation": "concatenation", "n": 3136, "m": 784}
    for value, words in ((seconds, "time"), (temporary, "memory")):
        measured = ratio(results, "mmcv", "auto", "forward", value, **block)
        yield Target(
            f"concatenation block, 3136/784, forward: mmcv's {words} over ours", measured, 100, True
        )


def _dot_product(results: Results) -> Iterator[Target]:
    case = {"instantiation": "dot_product", "n": 12544, "m": 12544}
    for section, peer, words in (
        ("operation", "dense", "dot product, 12544/12544, {}: dense's time over auto's"),
        (
            "operation",
            "torch",
            "dot product, 12544/12544, {}: torch's, with all pairs, over auto's",
        ),
        ("block", "mmcv", "dot product block, 12544/12544, {}: mmcv's time over ours"),
    ):
        for direction, spelt in DIRECTIONS.items():
            measured = ratio(results, peer, "auto", direction, seconds, section=section, **case)
            yield Target(words.format(spelt), measured, 10, True)


def _embedded_gaussian(results: Results) -> Iterator[Target]:
    case = {"section": "operation", "instantiation": "embedded_gaussian", "n": 12544, "m": 12544}
    for direction, words in DIRECTIONS.items():
        name = f"embedded gaussian, 12544/12544, {words}"
        yield Target(
            f"{name}: dense's memory over auto's",
            ratio(results, "dense", "auto", direction, temporary, **case),
            20,
            True,
        )
        yield Target(
            f"{name}: auto's time over dense's",
            ratio(results, "auto", "dense", direction, seconds, **case),
            1,
            False,
        )


def _blocks(results: Results) -> Iterator[Target]:
    for name, spelt in OPERATIONS.items():
        case = {"section": "block", "instantiation": name, "n": 3136, "m": 784}
        for direction, words in DIRECTIONS.items():
            found = [ratio(results, peer, "auto", direction, seconds, **case) for peer in PEERS]
            measured = min((value for value in found if value is not None), default=None)
            yield Target(
                f"{spelt} block, 3136/784, {words}: the fastest torch peer's time over ours",
                measured,
                1,
                True,
            )


def _growth(results: Results) -> Iterator[Target]:
    for name in ("concatenation", "dot_product"):
        for direction, words in DIRECTIONS.items():
            for value, quantity in (
                (seconds, "time"),
                (xla_temporary, "temporary memory, as XLA counts it,"),
            ):
                measured = slope(*growth(results, name, "auto", direction, value))
                yield Target(
                    f"{name.replace('_', ' ')}, {words}: exponent of {quantity} in N",
                    measured,
                    1.15,
                    False,
                    "",
                )


def _errors(results: Results) -> Iterator[Target]:
    for name, spelt in OPERATIONS.items():
        for value, words, bound in (
            (lambda record: record.error, "float32", 2.0),
            (lambda record: record.bfloat16_error, "bfloat16", 1.5),
            (lambda record: record.gradient_error, "float32, gradients at 3136/784", 2.0),
        ):
            directions = ("both",) if "gradients" in words else ("forward",)
            worst = max(_ratios_to_dense(results, name, directions, value), default=None)
            yield Target(
                f"{spelt}, every size, {words}: auto's error over dense's", worst, bound, False
            )


def _auto(results: Results) -> Iterator[Target]:
    for name, spelt in OPERATIONS.items():
        worst = max(
            _ratios_to_dense(results, name, tuple(DIRECTIONS), seconds, include_dense=False),
            default=None,
        )
        yield Target(
            f"{spelt}, every size and direction: auto's time over dense's, where it is not dense",
            worst,
            1.1,
            False,
        )


def _ratios_to_dense(
    results: Results,
    instantiation: Instantiation,
    directions: Sequence[str],
    value: Callable[[Record], float | None],
    include_dense: bool = True,
) -> Iterator[float]:
    """Yields what auto needs, divided by what dense needs, at every size.

    Sizes at which auto is dense are left out unless `include_dense`.
    """
    for record in results.records:
        if (record.section, record.instantiation, record.competitor) != (
            "operation",
            instantiation,
            "auto",
        ):
            continue
        if record.direction in directions and (include_dense or record.implementation != "dense"):
            case = {
                "section": "operation",
                "instantiation": instantiation,
                "n": record.n,
                "m": record.m,
            }
            measured = ratio(results, "auto", "dense", record.direction, value, **case)
            if measured is not None:
                yield measured


def _network(results: Results) -> Iterator[Target]:
    for direction, words, bound in (("forward", "inference", 1.2), ("both", "training step", 1.0)):
        torch, plain = (
            ratio(results, peer, "auto", direction, seconds, section="network")
            for peer in ("torch", "plain")
        )
        yield Target(f"I3D R50 with 5 blocks, {words}: torch's time over ours", torch, bound, True)
        yield Target(f"I3D R50 with 5 blocks, {words}: plain Flax's time over ours", plain, 2, True)
    step = results.find("auto", "both", section="network")
    yield Target(
        "I3D R50 with 5 blocks, training step: compilation",
        step.compile_seconds if step else None,
        20,
        False,
        " s",
    )
