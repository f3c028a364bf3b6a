"""The record of a measurement, and the file that keeps the records."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Competitor, Direction, Section
from nonlocal_jax.types import Instantiation


@dataclasses.dataclass
class Record:
    """One case as one competitor computed it. None means not measured, or not measurable."""

    section: Section
    instantiation: Instantiation
    n: int
    m: int
    d: int
    where: str
    competitor: Competitor
    direction: Direction
    date: str  # in UTC
    seconds: float | None = None  # of one call, the median over rounds
    fastest: float | None = None  # of one call, the minimum over rounds
    rounds: int = 0
    temporary_bytes: int | None = None  # at the peak, besides inputs and outputs
    xla_temporary_bytes: int | None = None  # the same, as XLA's compiler reports it
    compile_seconds: float | None = None
    implementation: str | None = None  # what "auto" took
    # ‖y − y64‖ / ‖y64‖. For a peer of a block or network, relative to this library's output.
    error: float | None = None
    bfloat16_error: float | None = None  # relative to float64 of the same rounded inputs
    gradient_error: float | None = None  # the largest among the gradients
    failure: str | None = None

    @classmethod
    def empty(cls, case: Case, competitor: Competitor, direction: Direction, date: str) -> "Record":
        return cls(
            case.section, case.instantiation, *case.size, case.where, competitor, direction, date
        )

    @property
    def key(self) -> tuple[Any, ...]:
        return (
            self.section,
            self.instantiation,
            self.n,
            self.m,
            self.d,
            self.competitor,
            self.direction,
        )


@dataclasses.dataclass
class Results:
    """All results of one backend: `environment` says where and how, `records` what was measured."""

    environment: dict[str, Any]
    records: list[Record]

    def put(self, new: Sequence[Record]) -> None:
        """Adds records, replacing earlier ones of the same case and competitor."""
        kept = {record.key: record for record in self.records} | {
            record.key: record for record in new
        }
        self.records = list(kept.values())

    def find(self, competitor: str, direction: str, **fields: Any) -> Record | None:
        """Returns the record with these fields.

        "torch" and "mmcv" stand for the fastest such competitor.
        """
        found = [
            record
            for record in self.records
            if competitor in (record.competitor, record.competitor.split()[0])
            and record.direction == direction
            and all(getattr(record, name) == value for name, value in fields.items())
        ]
        return min(found, key=lambda record: record.seconds or float("inf"), default=None)

    def write(self, path: Path) -> None:
        """Writes everything as JSON, one record per line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n    ".join(json.dumps(dataclasses.asdict(record)) for record in self.records)
        environment = json.dumps(self.environment, indent=2).replace("\n", "\n  ")
        path.write_text(
            f'{{\n  "environment": {environment},\n  "records": [\n    {lines}\n  ]\n}}\n'
        )

    @classmethod
    def read(cls, path: Path) -> "Results":
        content = json.loads(path.read_text())
        return cls(content["environment"], [Record(**record) for record in content["records"]])
