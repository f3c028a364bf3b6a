"""What a measurement is, and the file that keeps them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Competitor, Direction, Section
from nonlocal_jax.types import Instantiation


@dataclasses.dataclass
class Record:
    """One case as one competitor computed it; None is what was not measured, or could not be."""

    section: Section
    instantiation: Instantiation
    n: int
    m: int
    d: int
    where: str
    competitor: Competitor
    direction: Direction
    date: str  # when, in UTC
    seconds: float | None = None  # of one call, the median over the rounds
    fastest: float | None = None  # the minimum
    rounds: int = 0
    temporary_bytes: int | None = None  # at the peak, besides inputs and outputs
    xla_temporary_bytes: int | None = None  # as XLA's compiler says
    compile_seconds: float | None = None
    implementation: str | None = None  # what "auto" took
    error: float | None = (
        None  # ‖y − y64‖ / ‖y64‖; of a block's or network's peer, against this library's
    )
    bfloat16_error: float | None = None  # against float64 of the same rounded inputs
    gradient_error: float | None = None  # the largest among the gradients
    failure: str | None = None

    @classmethod
    def of(cls, case: Case, competitor: Competitor, direction: Direction, date: str) -> "Record":
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
    """Everything of one backend: `environment` says where and how, `records` what came out."""

    environment: dict[str, Any]
    records: list[Record]

    def put(self, new: Sequence[Record]) -> None:
        """Add records in place of earlier ones of the same case and competitor."""
        kept = {record.key: record for record in self.records} | {
            record.key: record for record in new
        }
        self.records = list(kept.values())

    def find(self, competitor: str, direction: str, **of_case: Any) -> Record | None:
        """The record whose fields are as said; "torch" and "mmcv" are the fastest of those that start so."""
        found = [
            record
            for record in self.records
            if competitor in (record.competitor, record.competitor.split()[0])
            and record.direction == direction
            and all(getattr(record, name) == value for name, value in of_case.items())
        ]
        return min(found, key=lambda record: record.seconds or float("inf"), default=None)

    def write(self, path: Path) -> None:
        """All of it as JSON, a record a line."""
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
