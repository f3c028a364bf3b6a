"""One training step: a pure function of the state and a batch, for one device or many."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import optax

from nonlocal_jax import checks
from nonlocal_jax.ops.platforms import by_platform
from nonlocal_jax.training.losses import Batch, Loss, Metrics
from nonlocal_jax.types import Array, PRNGKeyArray

Tree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that training changes, and therefore everything that a checkpoint holds.

    Attributes:
        step: Number of updates made so far.
        params: Parameters of the model.
        batch_stats: Running statistics of its norms; empty if it has none.
        opt_state: State of the optimiser.
        key_data: Raw data of the random key; `state.key_at(step)` derives the key of a step.
        average: Exponential moving average of the parameters, or None.
    """

    step: Tree  # the fields are trees of arrays, or of their shapes
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    key_data: Tree
    average: Tree

    def key_at(self, step: Array | int) -> PRNGKeyArray:
        """Returns the key of the random numbers of one step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key_data), step)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for evaluation: the averaged parameters if there are any."""
        params = self.params if self.average is None else self.average
        variables = {"params": params}
        return {**variables, "batch_stats": self.batch_stats} if self.batch_stats else variables


def _identity(batch: Batch, key: PRNGKeyArray | None) -> Batch:
    return batch


# Compared by identity: compiled steps are cached by trainer, and a model need not be hashable.
@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """Immutable configuration of a training step.

    Attributes:
        loss: Function that is minimised, such as `classification(model)`; see `Loss`.
        optimiser: An optax optimiser.
        schedule: Learning rate as a function of the step, which is only logged; None logs none.
        prepare: Function of a batch and a key that runs on the device before the loss:
            normalisation and, in training, augmentation. In evaluation the key is None.
        accumulate: Number of parts into which each batch is split. Their gradients are averaged,
            and memory is needed for one part at a time. BatchNorm sees one part at a time, as it
            does on that many devices with separate statistics.
        batch_norm: Statistics of BatchNorm on several devices: "global" computes them over the
            whole batch; "device" computes them on each device, as the papers do. The running
            statistics are then the mean over devices and parts.
        average: Decay of the exponential moving average of the parameters; None keeps no average.
    """

    loss: Loss
    optimiser: optax.GradientTransformation
    schedule: optax.Schedule | None = None
    prepare: Callable[[Batch, PRNGKeyArray | None], Batch] = _identity
    accumulate: int = 1
    batch_norm: Literal["global", "device"] = "global"
    average: float | None = None

    def __post_init__(self) -> None:
        checks.at_least("accumulate", self.accumulate, 1)
        checks.one_of("batch_norm", self.batch_norm, ("global", "device"))
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average must be between 0 and 1, or None; got {self.average}.")

    @property
    def axis_name(self) -> str | None:
        """The mapped axis over which the loss splits the positions of each example, or None."""
        return getattr(self.loss, "axis_name", None)

    def split_over_positions(self, batch: Batch) -> Tree:
        """Marks the leaves of a batch whose second axis is split over the mesh axis "positions"."""
        if self.axis_name is None:
            return jax.tree.map(lambda _: False, batch)
        loss: Any = self.loss
        return loss.split_over_positions(batch)

    def init(
        self, key: PRNGKeyArray, batch: Batch, variables: Mapping[str, Any] | None = None
    ) -> TrainState:
        """Returns the state before the first step.

        Args:
            key: Key of the initial values and of all random numbers of training.
            batch: Example of the batches that `prepare` takes.
            variables: Initial variables to use instead, such as those that
                `nonlocal_jax.weights.load` returns.

        Raises:
            ValueError: If the loss cannot make variables and none are passed.
        """
        if variables is None:
            initialise = getattr(self.loss, "init", None)
            if initialise is None:
                raise ValueError(
                    f"variables must be passed if the loss has no `init`; got {self.loss!r}."
                )
            variables = initialise(key, self.prepare(batch, None))
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=self.optimiser.init(params),
            key_data=jax.random.key_data(jax.random.fold_in(key, 1)),
            average=None if self.average is None else jax.tree.map(jnp.copy, params),
        )


def train_step(
    trainer: Trainer,
    state: TrainState,
    batch: Batch,
    *,
    axis_name: str | None = None,
    shards: int = 1,
) -> tuple[TrainState, Metrics]:
    """Makes one update.

    Args:
        trainer: What to do.
        state: State before the update.
        batch: Batch of this device if `axis_name` is given, otherwise of all devices.
        axis_name: Mapped axis (`jax.pmap`, `jax.shard_map`) over which gradients, statistics and
            metrics are averaged. If the loss splits positions, they are averaged over its axis as
            well, because each device's gradient is that of its own positions, times the number of
            devices.
        shards: Number of parts into which the batch is split over devices; the parts of
            `accumulate` then stay within them.

    Returns:
        The state after the update, and scalar metrics: the loss, the metrics of `trainer.loss`, the
        norm of the gradient and, with a schedule, the learning rate.
    """
    key = state.key_at(state.step)
    batch = trainer.prepare(batch, key)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    gradient, batch_stats, metrics = _gradient(trainer, state, batch, key, shards)
    if axes := [name for name in (axis_name, trainer.axis_name) if name]:
        gradient, batch_stats, metrics = jax.lax.pmean((gradient, batch_stats, metrics), axes)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    if trainer.schedule is not None:
        metrics["learning_rate"] = jnp.asarray(trainer.schedule(state.step), jnp.float32)
    updates, opt_state = trainer.optimiser.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if trainer.average is not None:
        average = optax.incremental_update(params, average, 1 - trainer.average)
    new_state = TrainState(state.step + 1, params, batch_stats, opt_state, state.key_data, average)
    return new_state, metrics


def _gradient(
    trainer: Trainer, state: TrainState, batch: Batch, key: PRNGKeyArray, shards: int
) -> tuple[Tree, Tree, Metrics]:
    """Computes the gradient, the new running statistics and the metrics of a prepared batch."""

    def loss(params: Tree, part: Batch, rng: PRNGKeyArray) -> tuple[Array, tuple[Tree, Metrics]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        scalar, metrics, updates = trainer.loss(variables, part, rng, True)
        if unknown := updates.keys() - {"batch_stats"}:
            raise ValueError(
                f"updates of a loss must be of 'batch_stats'; got {', '.join(sorted(unknown))}."
            )
        batch_stats = updates.get("batch_stats", state.batch_stats)
        return scalar, (batch_stats, {"loss": scalar, **metrics})

    differentiate = jax.value_and_grad(loss, has_aux=True)
    if trainer.accumulate == 1:
        (_, (batch_stats, metrics)), gradient = differentiate(state.params, batch, key)
        return gradient, batch_stats, metrics

    count = trainer.accumulate
    parts = jax.tree.map(functools.partial(_split, parts=count, shards=shards), batch)
    keys = jax.random.split(key, count)

    def add(total: Tree, part: Tree) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, differentiate(state.params, *part)), None

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (parts, keys))
    shapes = jax.eval_shape(differentiate, state.params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def sum_of_parts(unroll: int, zeros: Tree, parts_and_keys: Tree) -> Tree:
        return jax.lax.scan(add, zeros, parts_and_keys, unroll=unroll)[0]

    # XLA on CPU runs the body of a loop on one core (jaxlib 0.10), so there the loop is unrolled.
    total = by_platform(
        lambda platform: count if platform == "cpu" else 1, sum_of_parts, zeros, (parts, keys)
    )
    (_, (batch_stats, metrics)), gradient = jax.tree.map(lambda x: x / count, total)
    return gradient, batch_stats, metrics


def _split(x: Array, parts: int, shards: int) -> Array:
    """Reshapes (B, ...) to (parts, B / parts, ...) so that no data moves between devices.

    Each part takes an equal share of every shard.
    """
    if x.shape[0] % (parts * shards):
        raise ValueError(
            f"the batch must split into {parts} parts on {shards} devices; got {x.shape[0]} "
            "examples."
        )
    x = x.reshape(shards, parts, -1, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0).reshape(parts, -1, *x.shape[3:])


def batch_size(batch: Batch) -> int:
    """Returns the number of examples of a batch: the leading axis of its first leaf."""
    return int(jax.tree.leaves(batch)[0].shape[0])


def evaluation_step(trainer: Trainer, variables: Mapping[str, Any], batch: Batch) -> Metrics:
    """Sums the loss and the metrics over the real examples of a batch.

    Returns:
        "count", the number of examples that "mask" (B,) marks as real (all without a mask); "loss"
        and the metrics of `trainer.loss`, each times the count.
    """
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    batch = trainer.prepare(batch, None)
    if mask is None:
        count = jnp.asarray(batch_size(batch), jnp.int32)
    else:
        batch, count = {**batch, "mask": mask}, jnp.sum(mask)
    loss, metrics, _ = trainer.loss(variables, batch, None, False)
    means = {"loss": loss, **metrics}
    # A batch without a real example has no mean: 0 · NaN would spoil the sum.
    sums = {name: jnp.where(count > 0, mean * count, 0) for name, mean in means.items()}
    return {"count": count, **sums}


def pmap_step(
    trainer: Trainer, axis_name: str = "data", devices: Sequence[jax.Device] | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the training step under `jax.pmap`.

    It equals the step on a mesh with `batch_norm="device"`.

    Args:
        trainer: What to do. Its `batch_norm` counts as "device" unless the model's norms average
            over `axis_name` themselves.
        axis_name: Name of the mapped axis.
        devices: Devices to run on, or those of `nonlocal_jax.compiler.topologies.devices`, for
            which it can be lowered and compiled without having them. None takes all.

    Returns:
        A function of a state replicated by `flax.jax_utils.replicate`, which is donated, and of a
        batch of arrays (devices, B / devices, ...). It returns the state and the metrics of every
        device.

    >>> import flax.linen as nn
    >>> from flax.jax_utils import replicate
    >>> from nonlocal_jax.training import classification
    >>> class Linear(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, *, train=False):
    ...         return nn.Dense(3)(x)
    >>> trainer = Trainer(classification(Linear()), optax.sgd(0.1))
    >>> batch = {"inputs": jnp.ones((2, 5)), "labels": jnp.array([0, 1])}
    >>> devices = jax.local_device_count()
    >>> batches = jax.tree.map(lambda x: jnp.stack(devices * [x]), batch)
    >>> state = replicate(trainer.init(jax.random.key(0), batch))
    >>> state, metrics = pmap_step(trainer)(state, batches)
    >>> metrics["loss"].shape == (devices,)
    True
    """
    step = functools.partial(train_step, trainer, axis_name=axis_name)
    return jax.pmap(step, axis_name, devices=devices, donate_argnums=0)
