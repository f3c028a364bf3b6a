"""The smallest networks that have what training must keep, and steps that compile once."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import nonlocal_jax as nl
from nonlocal_jax import training

CLASSES = 3
MIN_SHARDED_SIZE = 16  # so that the leaves of these networks are split


class Small(nn.Module):
    """Dense, BatchNorm, ReLU, optionally a non-local block and dropout, average, dense."""

    features: int = 8
    norm: bool = True
    block: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(self.features, name="hidden")(x)
        if self.norm:
            x = nl.layers.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(x)
        self.sow("intermediates", "feature_mean", x.mean())
        if self.block:
            norm = nl.layers.BatchNorm if self.norm else None
            block = nl.layers.nonlocal_block("dot_product", norm=norm, name="nonlocal")
            x = block(x, train=train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean(1))
        return nn.Dense(CLASSES, name="head")(x)


class SmallVideo(nn.Module):
    """A network on (B, T, C) whose positions are frames, which `axis_name` splits over devices.

    With `conv` it needs the neighbouring devices' frames and every device's keys, otherwise only
    sums over devices.
    """

    conv: bool = False
    dropout: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        axis_name = None if self.is_initializing() else self.axis_name
        instantiation = "embedded_gaussian" if self.conv else "dot_product"
        if self.conv:
            x = x[:, :, None, None]
            x = nl.layers.VideoConv(8, (3, 1, 1), axis_name=axis_name, name="hidden")(x)[:, :, 0, 0]
        else:
            x = nn.Dense(8, name="hidden")(x)
        norm = nl.layers.BatchNorm(use_running_average=not train, axis_name=axis_name, name="norm")
        block = nl.layers.nonlocal_block(
            instantiation, subsample=False, axis_name=axis_name, name="nonlocal"
        )
        x = block(nn.relu(norm(x)), train=train).mean(1)
        if axis_name is not None:
            x = jax.lax.pmean(x, axis_name)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(CLASSES, name="head")(x)


def observe(intermediates):
    """The mean of the features that `Small` sows, and the ratios of non-local blocks."""
    ratios = nl.layers.residual_ratios(intermediates)
    if "feature_mean" not in intermediates:
        return ratios
    (feature_mean,) = intermediates["feature_mean"]
    return {"feature_mean": feature_mean, **ratios}


def make_batches(count, size=16, seed=0, positions=8, channels=2):
    """Yields batches whose inputs (size, positions, channels) have a mean that tells the class."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        labels = rng.integers(0, CLASSES, size).astype(np.int32)
        noise = rng.normal(size=(size, positions, channels))
        yield {
            "inputs": (noise + 0.5 * labels[:, None, None]).astype(np.float32),
            "labels": labels,
            "position": np.arange(step * size, (step + 1) * size, dtype=np.uint32),
        }


@functools.cache
def make_trainer(model=None, observe=observe, **options):
    """A trainer with SGD and everything on. Equal options return the same object, whose compiled
    functions the library caches.
    """
    schedule = training.cosine_schedule(0.1, 100, warmup=5)
    model = Small() if model is None else model
    loss = training.classification(model, observe=observe)
    optimiser = training.sgd(schedule, weight_decay=1e-3, clip_norm=1.0)
    return training.Trainer(loss, optimiser, schedule, **options)


@functools.cache
def initial_variables(model):
    """Variables drawn by NumPy: compiling `model.init` takes longer than the steps of a test."""
    example = jnp.zeros((1, 8, 2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        names = [entry.key for entry in path]
        if names[-1] in ("scale", "var"):
            starts_at_zero = "out_norm" in names  # the last norm of a non-local block
            return np.full(leaf.shape, 0.0 if starts_at_zero else 1.0, leaf.dtype)
        if names[-1] in ("bias", "mean"):
            return np.zeros(leaf.shape, leaf.dtype)
        return rng.normal(scale=leaf.shape[-2] ** -0.5, size=leaf.shape).astype(leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return {name: variables[name] for name in ("params", "batch_stats") if name in variables}


def initial_state(trainer, key=0):
    """The state before the first step, as NumPy arrays. `key` changes random numbers alone."""
    loss = trainer.loss if trainer.axis_name is None else trainer.loss.without_axis()
    variables = initial_variables(loss.model)
    state = trainer.init(jax.random.key(key), None, variables)
    # Copies: a step may write into the buffers of the state that it consumes.
    return jax.tree.map(np.array, state)


def run_steps(trainer, mesh, batches, placement="replicated", key=0, look=lambda state: None):
    """Returns the state after some steps on a mesh, and the metrics of each."""
    state = initial_state(trainer, key)
    shardings = training.state_sharding(mesh, state, placement, min_size=MIN_SHARDED_SIZE)
    state = jax.device_put(state, shardings)
    step = training.sharded_step(trainer, mesh, shardings)
    rows = []
    for batch in batches:
        split = trainer.split_over_positions(batch)
        state, metrics = step(state, training.put(batch, mesh, split))
        rows.append(jax.device_get(metrics))
        look(state)
    return state, rows
