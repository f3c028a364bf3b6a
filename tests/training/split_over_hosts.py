"""One of some processes that train with positions split over the devices of all: prints its metrics of each step as JSON.

python -m training.split_over_hosts COORDINATOR PROCESSES PROCESS POSITIONS
"""

import json
import sys

import jax
from training.networks import SmallVideo, make_batches, make_trainer, run_steps

from nonlocal_jax import training

STEPS = 3


def rows(positions):
    """Of each step, with this process's examples."""
    mesh = training.make_mesh(positions)
    mine = training.local_rows(16, mesh)
    batches = [
        {name: x[mine.start : mine.stop] for name, x in batch.items()}
        for batch in make_batches(STEPS, rows=8)
    ]
    _, metrics = run_steps(make_trainer(model=SmallVideo(axis_name="positions")), mesh, batches)
    return [{name: float(value) for name, value in row.items()} for row in metrics]


if __name__ == "__main__":
    coordinator, processes, process, positions = sys.argv[1], *map(int, sys.argv[2:])
    training.initialize(coordinator, processes, process)
    print(json.dumps(rows(positions)))
    jax.distributed.shutdown()
