"""The record of a compiled program, and the file that keeps the records."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from benchmarks.compiled.cases import Case, Platform
from benchmarks.machine import git_commit
from nonlocal_jax.compiler.programs import Cost
from nonlocal_jax.compiler.topologies import CHIPS, Chip

# The package that has the compiler of a platform.
COMPILERS: dict[Platform, str] = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin"}


@dataclasses.dataclass
class Record:
    """One compiled program. Bytes, FLOPs and times are those of one device.

    Programs for GPUs have memory only: XLA estimates no cycles for them, and their products are
    calls of libraries, whose FLOPs and traffic are not in the program.

    Attributes:
        topology, section, subject, size, batch, competitor, direction: As in `Case`.
        compiled_by: Versions of JAX and of libtpu or the CUDA plugin, commit and date.
        compile_seconds: How long compilation took.
        cycles_by_kind: Estimated cycles; see `nonlocal_jax.compiler.programs.Cost`.
        unestimated: Instructions without an estimate that run.
        flops: FLOPs of its products.
        traffic: Bytes read from and written to the main memory.
        temporary: Peak bytes besides arguments and results.
        arguments: Bytes of arguments and results.
        collectives: For each kind, the number that run and the bytes of their results.
        failure: Why it does not compile; None if it does.
    """

    topology: str
    section: str
    subject: str
    size: list[int] | None
    batch: int
    competitor: str
    direction: str
    compiled_by: str
    compile_seconds: float = 0.0
    cycles_by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    unestimated: int = 0
    flops: int = 0
    traffic: int = 0
    temporary: int = 0
    arguments: int = 0
    collectives: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    failure: str | None = None

    @classmethod
    def of(cls, case: Case) -> "Record":
        """Returns a record without figures."""
        return cls(
            **{field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
            | {"size": None if case.size is None else list(case.size)},
            compiled_by=_compiled_by(COMPILERS[case.platform]),
        )

    def fill(self, cost: Cost) -> None:
        """Adds the figures of the compiled program."""
        names = ["temporary", "arguments"]
        if cost.cycles:
            names += ["cycles_by_kind", "unestimated", "flops", "traffic"]
        for name in names:
            setattr(self, name, getattr(cost, name))
        self.collectives = {kind.opcode: [kind.count, kind.bytes] for kind in cost.collectives}

    @property
    def case(self) -> Case:
        size = None if self.size is None else tuple(self.size)
        fields = [field.name for field in dataclasses.fields(Case)]
        return Case(**{name: getattr(self, name) for name in fields} | {"size": size})

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def chip(self) -> Chip:
        return CHIPS[self.topology.partition(":")[0]]

    @property
    def seconds(self) -> float:
        """Estimated time: the sum of all cycles."""
        return sum(self.cycles_by_kind.values()) / self.chip.clock

    @property
    def roofline(self) -> float:
        """The least time: its FLOPs at the peak rate, or its arguments and results once."""
        return max(self.flops / self.chip.flops, self.arguments / self.chip.bandwidth)

    def share(self, kind: str) -> float:
        """The share of one kind of instructions in all cycles."""
        return self.cycles_by_kind.get(kind, 0) / sum(self.cycles_by_kind.values())


def _compiled_by(compiler: str) -> str:
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", compiler))
    date = datetime.now(UTC).date().isoformat()
    return f"{', '.join(versions)}, commit {git_commit()}, {date}"


def write(records: Iterable[Record], path: Path) -> None:
    """Writes records as JSON, one per line, sorted by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(records, key=lambda record: record.name)
    lines = ",\n  ".join(json.dumps(dataclasses.asdict(record)) for record in rows)
    path.write_text(f"[\n  {lines}\n]\n")


def read(path: Path) -> dict[str, Record]:
    """Reads records by name; there are none without a file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return {record.name: record for record in (Record(**row) for row in rows)}


def read_all(folder: Path) -> dict[str, Record]:
    """Reads the records of all platforms by name."""
    found: dict[str, Record] = {}
    for platform in get_args(Platform):
        found |= read(folder / f"{platform}.json")
    return found
