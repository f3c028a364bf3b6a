"""A network with every kind of layer, which compiles in seconds, and its training step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import nonlocal_jax as nl
from nonlocal_jax import training
from nonlocal_jax.layers.pooling import strided_max_pool


class Thin(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        norm = nl.layers.BatchNorm(use_running_average=not train)
        x = nl.layers.VideoConv(16, (5, 7, 7), (1, 2, 2))(x)
        x = strided_max_pool(nn.relu(norm(x)), (1, 3, 3), (1, 2, 2), (0, 1, 1))
        x = nl.layers.VideoConv(16, (3, 1, 1))(x)
        x = nl.layers.nonlocal_block("embedded_gaussian")(x, train=train)
        return nn.Dense(5)(x.mean((1, 2, 3), jnp.float32))


def trainer(batch_norm="device"):
    return training.Trainer(training.classification(Thin()), optax.sgd(0.1), batch_norm=batch_norm)


def batch(examples, size=32):
    return {
        "inputs": jax.ShapeDtypeStruct((examples, 8, size, size, 3), jnp.bfloat16),
        "labels": jax.ShapeDtypeStruct((examples,), jnp.int32),
    }
