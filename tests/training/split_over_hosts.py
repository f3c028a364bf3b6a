"""One of several processes that train with positions split over the devices of all.

python -m training.split_over_hosts COORDINATOR PROCESSES PROCESS prints, for 2 and 4 devices to
each example, the metrics of each step as JSON.
"""

import json
import sys

import jax
from training.networks import SmallVideo, make_batches, make_trainer, run_steps

from nonlocal_jax import training

STEPS = 3
POSITIONS = (2, 4)


def rows(model, mesh):
    """Returns the metrics of each step, with this process's examples."""
    local = training.local_rows(16, mesh)
    batches = [
        {name: x[local.start : local.stop] for name, x in batch.items()}
        for batch in make_batches(STEPS)
    ]
    _, metrics = run_steps(make_trainer(model=model), mesh, batches)
    return [{name: float(value) for name, value in row.items()} for row in metrics]


if __name__ == "__main__":
    coordinator, processes, process = sys.argv[1], *map(int, sys.argv[2:])
    training.initialize(coordinator, processes, process, timeout=600)
    model = SmallVideo(conv=True, axis_name="positions")
    print(json.dumps([rows(model, training.make_mesh(positions)) for positions in POSITIONS]))
    jax.distributed.shutdown()
