"""Training on any number of devices: a step, a loop and checkpoints that resume bit for bit.

A `Trainer` minimises a loss, such as `classification(model)`; nothing here knows a model or a data
set. Requires `pip install nonlocal_jax[experiments]`: optax, orbax, filelock and tensorboard in
addition to what the library itself needs.
"""

from nonlocal_jax.training.checkpoints import CheckpointError, Checkpoints, MismatchError
from nonlocal_jax.training.compilation import (
    sharded_step,
    sum_of_evaluations,
    sum_of_moments,
)
from nonlocal_jax.training.distributed import initialize
from nonlocal_jax.training.loop import Options, Result, fit
from nonlocal_jax.training.losses import (
    Classification,
    Loss,
    accuracy,
    classification,
    cross_entropy,
    mixup,
    smoothed_cross_entropy,
)
from nonlocal_jax.training.mesh import (
    batch_sharding,
    fetch,
    local_rows,
    make_mesh,
    put,
    state_sharding,
)
from nonlocal_jax.training.monitor import NonFiniteError
from nonlocal_jax.training.optimiser import (
    cosine_schedule,
    is_norm_parameter,
    sgd,
    step_schedule,
)
from nonlocal_jax.training.preview import dry_run
from nonlocal_jax.training.rendezvous import DistributedError
from nonlocal_jax.training.run import Run, RunError
from nonlocal_jax.training.step import Trainer, TrainState, pmap_step, train_step
from nonlocal_jax.training.stop import Stopped

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Classification",
    "DistributedError",
    "Loss",
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
    "classification",
    "cosine_schedule",
    "cross_entropy",
    "dry_run",
    "fetch",
    "fit",
    "initialize",
    "is_norm_parameter",
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
]
