"""Training on any number of devices that loses nothing: a step, a loop, checkpoints; it knows no model and no data set.

Wants `pip install nonlocal_jax[experiments]`: optax, filelock and tensorboard beside what the library itself needs.
"""

from nonlocal_jax.training.checkpoints import CheckpointError, Checkpoints, MismatchError
from nonlocal_jax.training.distributed import initialize
from nonlocal_jax.training.loop import NonFiniteError, Options, Result, fit
from nonlocal_jax.training.mesh import (
    batch_sharding,
    fetch,
    local_rows,
    make_mesh,
    put,
    sharded_step,
    state_sharding,
    sum_of_evaluations,
    sum_of_moments,
)
from nonlocal_jax.training.optimiser import cosine_schedule, sgd, step_schedule
from nonlocal_jax.training.preview import dry_run
from nonlocal_jax.training.run import Run, RunError, write_whole
from nonlocal_jax.training.step import (
    Trainer,
    TrainState,
    accuracy,
    cross_entropy,
    mixup,
    pmap_step,
    smoothed_cross_entropy,
    train_step,
)
from nonlocal_jax.training.stop import Stopped

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "MismatchError",
    "NonFiniteError",
    "Options",
    "Result",
    "Run",
    "RunError",
    "Stopped",
    "TrainState",
    "Trainer",
    "accuracy",
    "batch_sharding",
    "cosine_schedule",
    "cross_entropy",
    "dry_run",
    "fetch",
    "fit",
    "initialize",
    "local_rows",
    "make_mesh",
    "mixup",
    "pmap_step",
    "put",
    "sgd",
    "sharded_step",
    "smoothed_cross_entropy",
    "state_sharding",
    "step_schedule",
    "sum_of_evaluations",
    "sum_of_moments",
    "train_step",
    "write_whole",
]
