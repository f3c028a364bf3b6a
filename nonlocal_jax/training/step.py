"""One step of training, a pure function of the state and a batch, and the ways to run it on many devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from nonlocal_jax.ops.platforms import host_platform
from nonlocal_jax.types import Array, PRNGKeyArray

Tree = Any
Batch = Mapping[
    str, Any
]  # "inputs" and "labels", what else `prepare` reads, and in evaluation "mask"
Metrics = dict[str, Array]
RATIO = "residual_ratio"


@flax.struct.dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds.

    Attributes:
        step: updates made so far.
        params: of the model.
        batch_stats: running statistics of its norms; empty where it has none.
        opt_state: of the optimiser.
        key_data: the numbers of the random key; those of a step come from `state.key_at(step)`.
        average: exponential moving average of the parameters, or None.
    """

    step: Tree  # of arrays, or of their shapes
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    key_data: Tree
    average: Tree

    def key_at(self, step: Array | int) -> PRNGKeyArray:
        """Of the random numbers of one step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key_data), step)

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is evaluated with: the averaged parameters, where there are such."""
        params = self.params if self.average is None else self.average
        return (
            {"params": params, "batch_stats": self.batch_stats}
            if self.batch_stats
            else {"params": params}
        )


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Of each example: -log softmax(logits) at the label; labels (B,) are classes, (B, classes) are probabilities."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def smoothed_cross_entropy(smoothing: float) -> Callable[[Array, Array], Array]:
    """The cross-entropy with labels of which each class has a share of `smoothing`.

    Source: Szegedy et al., Rethinking the Inception Architecture (CVPR 2016), section 7.

    >>> float(smoothed_cross_entropy(0.5)(jnp.array([[0.0, 0.0]]), jnp.array([1]))[0])
    0.6931471824645996
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be at least 0 and below 1; got {smoothing}.")

    def loss(logits: Array, labels: Array) -> Array:
        return cross_entropy(
            logits, optax.smooth_labels(one_hot(labels, logits.shape[-1]), smoothing)
        )

    return loss


def accuracy(logits: Array, labels: Array) -> Metrics:
    """Of each example, whether the largest logit is that of the (most probable) label."""
    target = labels if labels.ndim == 1 else labels.argmax(-1)
    return {"accuracy": (logits.argmax(-1) == target).astype(jnp.float32)}


def mixup(batch: Batch, key: PRNGKeyArray, alpha: float, num_classes: int) -> Batch:
    """Each example mixed with another, λ x + (1 − λ) x', and so their labels; λ ~ Beta(α, α), one for the batch.

    Source: Zhang et al., mixup (ICLR 2018), with the partner taken from the reversed batch.

    >>> batch = {"inputs": jnp.array([[0.0], [1.0]]), "labels": jnp.array([0, 1])}
    >>> mixed = mixup(batch, jax.random.key(0), 1.0, 2)
    >>> bool((mixed["inputs"][:, 0] == mixed["labels"][:, 1]).all())
    True
    """
    share = jax.random.beta(key, alpha, alpha)

    def mix(x: Array) -> Array:
        return share * x + (1 - share) * jnp.flip(x, 0)

    return {
        **batch,
        "inputs": mix(batch["inputs"]),
        "labels": mix(one_hot(batch["labels"], num_classes)),
    }


def one_hot(labels: Array, num_classes: int) -> Array:
    """Probabilities (B, classes), which labels may already be."""
    return jax.nn.one_hot(labels, num_classes) if labels.ndim == 1 else labels


def _unprepared(batch: Batch, key: PRNGKeyArray | None) -> Batch:
    return batch


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What a step needs to know; nothing of it is changed by training.

    Attributes:
        model: `model.apply(variables, inputs, train=...)` gives logits. One that can split the positions of each example over
            devices has an attribute `axis_name`, which is "positions" if it shall, as `video_resnet(axis_name="positions")`.
        optimiser: of optax.
        schedule: the optimiser's learning rate by step, for the log alone; None does not log it.
        loss: of each example, from logits and labels.
        metrics: more numbers of each example, by name.
        prepare: what is done to a batch on the device before the model sees it: normalisation, and in training, where the
            key is not None, augmentation.
        accumulate: parts into which each batch is split; their gradients are averaged, their memory is that of one. BatchNorm
            sees one part at a time, as on so many devices with statistics of their own.
        batch_norm: of a step on many devices: "global" takes statistics over the whole batch, "device" on each device, as the
            paper's do; the running ones are the mean over devices and parts.
        average: what the exponential moving average of the parameters keeps of itself at each step; None has none.
    """

    model: nn.Module
    optimiser: optax.GradientTransformation
    schedule: optax.Schedule | None = None
    loss: Callable[[Array, Array], Array] = cross_entropy
    metrics: Callable[[Array, Array], Metrics] = accuracy
    prepare: Callable[[Batch, PRNGKeyArray | None], Batch] = _unprepared
    accumulate: int = 1
    batch_norm: Literal["global", "device"] = "global"
    average: float | None = None

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1; got {self.accumulate}.")
        if self.batch_norm not in ("global", "device"):
            raise ValueError(f"batch_norm must be 'global' or 'device'; got {self.batch_norm!r}.")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average must be between 0 and 1, or None; got {self.average}.")

    @property
    def positions(self) -> str | None:
        """The mapped axis over which the model splits the positions of each example."""
        return getattr(self.model, "axis_name", None)

    def init(
        self, key: PRNGKeyArray, batch: Batch, variables: Mapping[str, Any] | None = None
    ) -> TrainState:
        """The state before the first step.

        Args:
            key: of the initial values, and of all random numbers of training.
            batch: an example of what `prepare` takes.
            variables: initial values to take instead, such as those of `nonlocal_jax.weights.load`.
        """
        if variables is None:
            inputs = self.prepare(batch, None)["inputs"]
            variables = self.model.init({"params": key, "dropout": key}, inputs)
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
    """One update.

    Args:
        trainer: what to do.
        state: before.
        batch: of this device where `axis_name` is given, else of all.
        axis_name: the mapped axis over which gradients, statistics and metrics are averaged (`jax.pmap`, `jax.shard_map`);
            where the model splits positions, they are averaged over that axis too, since each device's gradient is of
            its own positions, times the devices.
        shards: into how many parts the batch is split over devices, which the parts of `accumulate` then respect.

    Returns:
        The state after, and the metrics of the batch: means over it of the loss and of `trainer.metrics`, the norm of the
        gradient, the learning rate, and of each non-local block ‖W_z y‖ / ‖x‖ as "residual_ratio/<place>".
    """
    key = state.key_at(state.step)
    batch = trainer.prepare(batch, key)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def loss_of(
        params: Tree, part: tuple[Array, Array], dropout: PRNGKeyArray
    ) -> tuple[Array, tuple[Tree, Metrics]]:
        inputs, labels = part
        logits: Any
        logits, changed = trainer.model.apply(
            {"params": params, "batch_stats": state.batch_stats}, inputs, train=True,
            mutable=["batch_stats", "intermediates"], rngs={"dropout": dropout},
        )  # fmt: skip
        loss = trainer.loss(logits, labels).mean()
        metrics = {name: value.mean() for name, value in trainer.metrics(logits, labels).items()}
        ratios = residual_ratios(changed.get("intermediates", {}))
        return loss, (changed.get("batch_stats", {}), {"loss": loss, **metrics, **ratios})

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    examples = (batch["inputs"], batch["labels"])
    if trainer.accumulate == 1:
        (_, (batch_stats, metrics)), gradient = differentiate(state.params, examples, key)
    else:
        k = trainer.accumulate
        parts = jax.tree.map(functools.partial(_split, parts=k, shards=shards), examples)
        keys = jax.random.split(key, k)

        def add(total: Tree, part: Tree) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, total, differentiate(state.params, *part)), None

        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (parts, keys))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(differentiate, state.params, *first),
        )
        # XLA on CPU runs a loop's body on one core.
        unroll = k if host_platform() == "cpu" else 1
        total, _ = jax.lax.scan(add, zeros, (parts, keys), unroll=unroll)
        (_, (batch_stats, metrics)), gradient = jax.tree.map(lambda x: x / k, total)
    if axes := [name for name in (axis_name, trainer.positions) if name]:
        gradient, batch_stats, metrics = jax.lax.pmean((gradient, batch_stats, metrics), axes)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    if trainer.schedule is not None:
        metrics["learning_rate"] = jnp.asarray(trainer.schedule(state.step), jnp.float32)
    updates, opt_state = trainer.optimiser.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if trainer.average is not None:
        average = optax.incremental_update(params, average, 1 - trainer.average)
    return TrainState(
        state.step + 1, params, batch_stats, opt_state, state.key_data, average
    ), metrics


def _split(x: Array, parts: int, shards: int) -> Array:
    """(B, ...) -> (parts, B / parts, ...), each part with as much of each shard, so that nothing moves between devices."""
    if x.shape[0] % (parts * shards):
        raise ValueError(
            f"the batch must split into {parts} parts on {shards} devices; got {x.shape[0]} examples."
        )
    x = x.reshape(shards, parts, -1, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0).reshape(parts, -1, *x.shape[3:])


def residual_ratios(intermediates: Mapping[str, Any], place: tuple[str, ...] = ()) -> Metrics:
    """What the non-local blocks have sown: {"residual_ratio/<place>": ‖W_z y‖ / ‖x‖}."""
    ratios = {}
    for name, value in intermediates.items():
        if name == RATIO:
            ratios["/".join((RATIO, *place))] = jnp.mean(
                jnp.stack([jnp.mean(one) for one in value])
            )
        elif isinstance(value, Mapping):
            ratios |= residual_ratios(value, (*place, name))
    return ratios


def evaluation_step(trainer: Trainer, variables: Mapping[str, Any], batch: Batch) -> Metrics:
    """Sums over the examples of a batch which its "mask" (B,) says are real: "count", "loss" and `trainer.metrics`."""
    mask = batch["mask"]
    batch = trainer.prepare(batch, None)
    logits: Any = trainer.model.apply(variables, batch["inputs"], train=False)
    values = {
        "loss": trainer.loss(logits, batch["labels"]),
        **trainer.metrics(logits, batch["labels"]),
    }
    sums = {name: jnp.sum(jnp.where(mask, value, 0)) for name, value in values.items()}
    return {"count": jnp.sum(mask), **sums}


def pmap_step(
    trainer: Trainer, axis_name: str = "data"
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step under `jax.pmap`, for who uses it: equal to that of a mesh with `batch_norm="device"`.

    Args:
        trainer: what to do; its `batch_norm` is "device" whatever it says, unless the model's norms average over `axis_name`.
        axis_name: of the mapped axis.

    Returns:
        A function of a state replicated by `flax.jax_utils.replicate`, which it consumes, and of a batch whose arrays are
        (devices, B / devices, ...); it gives the state and the metrics, one of each for every device.

    >>> from flax.jax_utils import replicate
    >>> from nonlocal_jax.models import cifar_resnet
    >>> trainer = Trainer(cifar_resnet(8), optax.sgd(0.1))
    >>> batch = {"inputs": jnp.ones((2, 8, 8, 3)), "labels": jnp.array([0, 1])}
    >>> state, devices = trainer.init(jax.random.key(0), batch), jax.local_device_count()
    >>> state, metrics = pmap_step(trainer)(replicate(state), jax.tree.map(lambda x: jnp.stack(devices * [x]), batch))
    >>> metrics["loss"].shape == (devices,)
    True
    """
    step = functools.partial(train_step, trainer, axis_name=axis_name)
    return jax.pmap(step, axis_name, donate_argnums=0)
