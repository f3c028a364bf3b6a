"""The smallest networks that have what training must keep: convolutions, BatchNorm, a non-local block, dropout by option."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import nonlocal_jax as nl
from nonlocal_jax import training

CLASSES = 3


class Small(nn.Module):
    """Conv 3×3, BatchNorm, ReLU, a non-local block, average, dense."""

    features: int = 8
    norm: bool = True
    block: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(self.features, (3, 3), name="conv")(x)
        if self.norm:
            x = nl.layers.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(x)
        if self.block:
            norm = nl.layers.BatchNorm if self.norm else None
            x = nl.layers.nonlocal_block("dot_product", norm=norm, name="nonlocal")(x, train=train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(CLASSES, name="head")(x)


class SmallVideo(nn.Module):
    """The same of rows as if they were frames, which `axis_name` splits over devices."""

    dropout: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train=False):
        axis_name = None if self.is_initializing() else self.axis_name
        x = nl.layers.VideoConv(8, (3, 1, 3), axis_name=axis_name, name="conv")(x[:, :, None])
        x = nn.relu(
            nl.layers.BatchNorm(use_running_average=not train, axis_name=axis_name, name="norm")(x)
        )
        x = nl.layers.nonlocal_block(
            "embedded_gaussian", subsample=False, axis_name=axis_name, name="nonlocal"
        )(x, train=train)
        x = x.mean((1, 2, 3))
        if axis_name is not None:
            x = jax.lax.pmean(x, axis_name)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(CLASSES, name="head")(x)


def make_batches(count, size=16, seed=0, rows=6):
    """Images rows×5×2 whose mean says their class, as float32."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        labels = rng.integers(0, CLASSES, size).astype(np.int32)
        images = (rng.normal(size=(size, rows, 5, 2)) + 0.5 * labels[:, None, None, None]).astype(
            np.float32
        )
        yield {
            "inputs": images,
            "labels": labels,
            "position": np.arange(step * size, (step + 1) * size, dtype=np.uint32),
        }


@functools.cache
def make_trainer(model=None, **options):
    """SGD with everything on; the same options give the same object, so that what is compiled for it serves again."""
    schedule = training.cosine_schedule(0.1, 100, warmup=5)
    return training.Trainer(
        model or Small(),
        training.sgd(schedule, weight_decay=1e-3, clip_norm=1.0),
        schedule,
        **options,
    )


@functools.cache
def compiled(trainer, mesh, placement):
    """The initial state from a key, and the step."""

    def init(key):
        return trainer.init(key, jax.tree.map(lambda x: jnp.asarray(x[:1]), next(make_batches(1))))

    shardings = training.state_sharding(mesh, jax.eval_shape(init, jax.random.key(0)), placement)
    return jax.jit(init, out_shardings=shardings), training.sharded_step(trainer, mesh, shardings)


def run_steps(trainer, mesh, batches, placement="replicated", key=0, look=lambda state: None):
    """The state after some steps on a mesh, and the metrics of each."""
    init, step = compiled(trainer, mesh, placement)
    state = init(jax.random.key(key))
    rows = []
    for batch in batches:
        state, metrics = step(state, training.put(batch, mesh))
        rows.append(jax.device_get(metrics))
        look(state)
    return state, rows
