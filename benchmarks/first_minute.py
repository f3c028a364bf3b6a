"""Measures what the first minute with the library costs: imports, compilations, files.

    python -m benchmarks.first_minute    # results/first_minute/cpu.json, 10 minutes on one CPU core

Each measure is taken in fresh processes on one core, without a cache of compiled programs, and in
turns with that of its peer: plain Flax, torch, or Orbax alone. Numbers are CPU seconds unless
stated otherwise, and medians over the rounds.
"""

import collections
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track

from benchmarks.first_minute_worker import MEASURES
from benchmarks.machine import describe_run
from nonlocal_jax import files

FOLDER = Path(__file__).parent / "results" / "first_minute"
PACKAGES = ("jax", "flax", "orbax-checkpoint", "torch")
PEERS = {name: f"{name}_peer" for name in MEASURES if f"{name}_peer" in MEASURES}
PEERS["load torch"] = "load_peer"
OURS = [name for name in MEASURES if name != "files" and not name.endswith("_peer")]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure imports, eager calls, first compilations, loading and saving."""

    # Processes of each measure.
    rounds: int = 3
    # Measures to take, such as "cifar" or "load torch"; the others keep their results.
    only: tuple[str, ...] = ()
    # Directory of the JSON.
    output: Path = FOLDER

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1; got {self.rounds}.")
        if unknown := set(self.only) - set(OURS):
            raise ValueError(
                f"only must be of {', '.join(OURS)}; got {', '.join(sorted(unknown))}."
            )


def measure(name: str, folder: Path) -> dict[str, float]:
    """Returns the results of a measure, taken in a fresh process.

    Raises:
        RuntimeError: The process failed.
    """
    command = [sys.executable, "-m", "benchmarks.first_minute_worker", name, str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"{name} failed: {last}. `make bench` creates an environment with torch."
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def turns(names: Sequence[str], rounds: int) -> list[str]:
    """Returns the measures in the order in which they are taken, each beside its peer."""
    order = []
    for name in names:
        pair = [name, PEERS[name]] if name in PEERS else [name]
        for turn in range(rounds):
            order += pair[:: -1 if turn % 2 else 1]
    return order


def main(config: Config) -> None:
    """Measures, writes the JSON after each process, and prints it."""
    file = config.output / "cpu.json"
    found: dict[str, dict[str, float]] = {}
    environment = describe_run("first_minute", "cpu", PACKAGES)
    if config.only and file.exists():
        earlier = json.loads(file.read_text())
        found = earlier["measures"]
        environment["command"] = f"{earlier['environment']['command']}; {environment['command']}"
    names = [name for name in OURS if name in config.only or not config.only]
    values: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if any(name.startswith("load") for name in names):
            measure("files", folder)
        order = turns(names, config.rounds)
        for name in track(order, "measuring", console=Console(stderr=True)):
            values[name].append(measure(name, folder))
            rounds = values[name]
            found[name] = {
                figure: statistics.median(one[figure] for one in rounds) for figure in rounds[0]
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            record = {"environment": environment, "measures": found}
            files.write_text(file, json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
