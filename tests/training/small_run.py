"""A run of the smallest network, for tests that start processes: python -m training.small_run ...

At the batch of `--hold-at` it waits until the file of `--hold-until` exists, so that a test decides
what happens while it trains, however fast or slow the machine is.
"""

import argparse
import itertools
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from training.networks import Small, make_batches, make_trainer

from nonlocal_jax import training

BATCH_SIZE = 16
CHANNELS = 64  # 64×64 weights are enough for them to be split by placement "sharded"


def parser():
    options = argparse.ArgumentParser()
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--save-every", type=int, default=3)
    options.add_argument("--evaluate-every", type=int, default=20)
    options.add_argument("--placement", default="replicated")
    options.add_argument("--pause", type=float, default=0.0, help="seconds before each batch")
    options.add_argument("--hold-at", type=int, default=0, help="batch that waits; 0 is none")
    options.add_argument("--hold-until", type=Path, help="file that ends the wait")
    options.add_argument("--distributed", action="store_true")
    options.add_argument("--coordinator")
    options.add_argument("--processes", type=int)
    options.add_argument("--process-id", type=int)
    options.add_argument("--timeout", type=int, default=600)
    return options


def small_trainer():
    model = Small(features=CHANNELS, dropout=0.2)
    return make_trainer(model=model, average=0.9)


def train(options):
    """Trains as the options say."""
    mesh = training.make_mesh()
    rows = training.local_rows(BATCH_SIZE, mesh)

    def local(batch):
        return {name: x[rows.start : rows.stop] for name, x in batch.items()}

    def data(step):
        batches = itertools.islice(make_batches(options.steps + 10, channels=CHANNELS), step, None)
        for number, batch in enumerate(batches, step):
            if options.hold_at and number == options.hold_at:
                (options.output / "held").touch()
                while not options.hold_until.exists():
                    time.sleep(0.005)
            time.sleep(options.pause)
            yield local(batch)

    def evaluation():
        for count, batch in zip((16, 11), make_batches(2, seed=1, channels=CHANNELS), strict=True):
            yield local({**batch, "mask": np.arange(BATCH_SIZE) < count})

    with training.Run(options.output, {"steps": options.steps}) as run:
        return training.fit(
            small_trainer(),
            training.Options(
                options.steps,
                evaluate_every=options.evaluate_every,
                save_every=options.save_every,
                precise_bn=2,
                placement=options.placement,
            ),
            run,
            mesh,
            data,
            evaluation,
            key=jax.random.key(1),
            console=Console(width=200),
        )


def meet(options):
    """Waits until the other processes have imported what they need: `--timeout` is for the rest."""
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"ready-{options.process_id}").touch()
    while len(list(options.output.glob("ready-*"))) < options.processes:
        time.sleep(0.01)


if __name__ == "__main__":
    options = parser().parse_args()
    if options.coordinator:
        meet(options)
    if options.distributed:
        training.initialize(
            options.coordinator, options.processes, options.process_id, timeout=options.timeout
        )
    train(options)
