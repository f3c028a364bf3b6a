"""Measures what the training loop costs beyond its step, and compares the step with torch's.

    python -m benchmarks.training        # results/training/<backend>.json, 12 minutes on 2 CPU
    cores

ResNet-20 trains on random images of CIFAR's shape, in batches of 128, through the whole loop:
pipeline, log, TensorBoard, progress bar, checkpoints. Every few steps the loop pauses and the
competitors take their turn: the bare jitted step on a batch that is already on the device and, in
every fourth round, the pipeline alone, and torch in a separate process. So all of them see the same
machine. Numbers are medians over the rounds.
"""

import collections
import dataclasses
import functools
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from rich.console import Console

import nonlocal_jax as nl
from benchmarks.machine import describe_run
from experiments.shared.results import read_log
from nonlocal_jax import files, training
from nonlocal_jax.data.images import Images
from nonlocal_jax.data.pipeline import training_batches

STEPS = 6  # steps of each competitor in a round
WARM = (
    2  # untimed steps at the start of a turn, which find the caches as the previous one left them
)
SAVE_EVERY = 12
BATCHES = 400  # batches of the pipeline in a round, many more than it reads ahead
FOLDER = Path(__file__).parent / "results" / "training"


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare the training loop with its bare step, its pipeline, and torch."""

    # Rounds of the loop and the bare step; every fourth one includes everything else.
    rounds: int = 48
    # Checkpoints whose cost is measured.
    saves: int = 8
    # Images per step.
    batch_size: int = 128
    # Directory of the JSON.
    output: Path = FOLDER

    def __post_init__(self) -> None:
        for name in ("rounds", "saves", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


class Torch:
    """The process that trains the same network in torch."""

    def __init__(self, batch_size: int) -> None:
        command = [sys.executable, "-m", "benchmarks.torch_cifar", str(batch_size)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def seconds(self, memory_format: str, steps: int) -> float:
        assert self._process.stdin
        print(memory_format, WARM, steps - WARM, file=self._process.stdin, flush=True)
        return float(self._read()) / (steps - WARM)

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                "the torch process ended. `make bench` creates an environment that has torch."
            )
        return line

    def close(self) -> None:
        self._process.communicate()


def make_trainer() -> training.Trainer:
    """Returns the trainer of ResNet-20, by its recipe."""
    schedule = optax.constant_schedule(0.01)
    return training.Trainer(
        training.classification(nl.models.cifar_resnet(20)),
        training.sgd(schedule, weight_decay=1e-4),
        schedule,
        prepare=_scaled,
    )


def _scaled(batch: Any, key: Any) -> Any:
    return {**batch, "inputs": batch["inputs"].astype(np.float32) / 128 - 1}


def make_images(count: int = 10_000) -> Images:
    """Returns noise of CIFAR's shape. What is learned does not matter here."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Images(images, rng.integers(0, 10, count).astype(np.int32), 10)


def fit(folder: Path, options: training.Options, data: Any, evaluation: Any) -> None:
    """Runs the real loop and discards what it prints."""
    with training.Run(folder, {}) as run:
        console = Console(file=io.StringIO())
        mesh = training.make_mesh(devices=jax.devices()[:1])
        training.fit(
            make_trainer(),
            options,
            run,
            mesh,
            data,
            evaluation,
            key=jax.random.key(0),
            console=console,
        )


class Bare:
    """The compiled step alone, on a batch that is already on the device."""

    def __init__(self, batch: Any) -> None:
        trainer, mesh = make_trainer(), training.make_mesh(devices=jax.devices()[:1])
        self._batch = training.put(batch, mesh)
        self._state = jax.jit(trainer.init)(jax.random.key(0), self._batch)
        shardings = training.state_sharding(mesh, self._state)
        self._state = jax.device_put(self._state, shardings)
        self._step = (
            training.sharded_step(trainer, mesh, shardings)
            .lower(self._state, self._batch)
            .compile()
        )
        self.seconds(WARM + 1)

    def seconds(self, steps: int) -> float:
        """Returns the seconds of one step, excluding the first ones."""
        for i in range(steps):
            if i == WARM:
                jax.block_until_ready(self._state)
                begun = time.perf_counter()
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - begun) / (steps - WARM)


def side_by_side(config: Config, folder: Path) -> dict[str, list[float]]:
    """Returns the seconds of one step, or batch, by competitor and round."""
    images = make_images()
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    read = functools.partial(training_batches, images, config.batch_size, seed=0)
    bare, torch, pipeline = Bare(next(read(start=0))), Torch(config.batch_size), read(start=0)

    def competitors() -> Iterator[Any]:
        """Takes the place of an evaluation, during which the loop waits and stops its clock."""
        measures: dict[str, Callable[[], float]] = {
            "bare": lambda: bare.seconds(STEPS),
            "pipeline": lambda: _batches(pipeline, BATCHES) / BATCHES,
            "torch, contiguous": lambda: torch.seconds("contiguous", STEPS),
            "torch, channels_last": lambda: torch.seconds("channels_last", STEPS),
        }
        # Turns 1, 5, 9, ... measure everything; turns 5, 13, ... in reverse order.
        turn = len(seconds["bare"])
        names = list(measures) if turn % 4 == 1 else ["bare"]
        for name in names[:: -1 if turn % 8 > 3 else 1]:
            seconds[name].append(measures[name]())
        batch = next(read(start=0))
        yield {**batch, "mask": np.ones(config.batch_size, bool)}

    steps = STEPS * (config.rounds + 1)
    options = training.Options(steps, evaluate_every=STEPS, save_every=steps, best=None)
    try:
        fit(folder, options, lambda step: read(start=step), competitors)
    finally:
        torch.close()
    clock = [row["seconds"] for row in read_log(folder, "train")]
    spans = zip(clock[STEPS + WARM - 1 :: STEPS], clock[2 * STEPS - 1 :: STEPS], strict=True)
    seconds["loop"] = [(stop - start) / (STEPS - WARM) for start, stop in spans]
    return {**seconds, "bare": seconds["bare"][1:]}  # the first round warms up


def _batches(pipeline: Iterator[Any], count: int) -> float:
    begun = time.perf_counter()
    for _ in range(count):
        next(pipeline)
    return time.perf_counter() - begun


def stalls(config: Config, folder: Path) -> tuple[float, list[float]]:
    """Measures the cost of checkpoints.

    Returns:
        The seconds of a step without a checkpoint, and what the six steps after each checkpoint
        take in addition.
    """
    images, times = make_images(), []

    def data(step: int) -> Iterator[Any]:
        for batch in training_batches(images, config.batch_size, seed=0, start=step):
            times.append(time.perf_counter())  # the loop takes a batch after it has started a step
            yield batch

    options = training.Options(SAVE_EVERY * (config.saves + 1), save_every=SAVE_EVERY, best=None)
    fit(folder, options, data, None)
    # Batch 0 is taken twice: for the shapes and for the first step. The batch of step i, from 1, is
    # taken while step i - 1 is computed.
    step_seconds = np.diff(times[2:])
    quiet = [x for i, x in enumerate(step_seconds, start=1) if i % SAVE_EVERY >= SAVE_EVERY // 2]
    step = statistics.median(quiet)
    extra = [
        float(sum(step_seconds[save - 1 : save + SAVE_EVERY // 2 - 1]) - SAVE_EVERY // 2 * step)
        for save in range(SAVE_EVERY, len(step_seconds) - SAVE_EVERY // 2, SAVE_EVERY)
    ]
    return step, extra


def main(config: Config) -> None:
    """Measures, writes the JSON, and prints it."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = side_by_side(config, Path(folder) / "rounds")
        step, extra = stalls(config, Path(folder) / "saves")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    torch = min(value for name, value in median.items() if name.startswith("torch"))
    results = {
        "environment": describe_run("training", jax.default_backend(), ("jax", "torch", "grain")),
        "batch_size": config.batch_size,
        "seconds": median,
        "rounds": seconds,
        "loop_over_bare_step": statistics.median(
            a / b for a, b in zip(seconds["loop"], seconds["bare"], strict=True)
        ),
        "pipeline_over_step": median["bare"] / median["pipeline"],
        "torch_over_step": torch / median["bare"],
        "save": {"step_seconds": step, "stalls_in_steps": [value / step for value in extra]},
        "stall_in_steps": statistics.median(extra) / step,
    }
    config.output.mkdir(parents=True, exist_ok=True)
    file = config.output / f"{jax.default_backend()}.json"
    files.write_text(file, json.dumps(results, indent=1) + "\n")
    print(
        json.dumps(
            {
                name: value
                for name, value in results.items()
                if name not in ("rounds", "environment")
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
