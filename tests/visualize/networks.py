"""Small networks with blocks, and random clips and weights, for the tests of affinity maps."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import nonlocal_jax as nl

CLIP = (2, 4, 12, 20, 3)  # (B, T, H, W, C)


class TwoBlocks(nn.Module):
    """Two stages with a block after each: maps of 4×6×10 and 4×3×5 positions."""

    instantiation: str = "embedded_gaussian"
    second: str = "embedded_gaussian"

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nl.layers.VideoConv(6, (1, 3, 3), (1, 2, 2), name="conv1")(x))
        x = nl.layers.nonlocal_block(self.instantiation, name="first")(x)
        x = nn.tanh(nl.layers.VideoConv(8, (3, 3, 3), (1, 2, 2), name="conv2")(x))
        x = nl.layers.nonlocal_block(self.second, subsample=False, name="second")(x)
        return x.mean(axis=(1, 2, 3))


class OneBlock(nn.Module):
    """A single block; with `masked`, columns from 7 on are padding."""

    block: nn.Module
    masked: bool = False

    @nn.compact
    def __call__(self, x):
        return self.block(x, mask=column_mask(x) if self.masked else None)


def column_mask(x):
    return jnp.broadcast_to(jnp.arange(x.shape[-2]) < 7, x.shape[:-1])


def clips(shape=CLIP, seed=0):
    """Returns random clips with values from 0 to 1."""
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def normal(shape, seed=0):
    """Returns normally distributed numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(model, *args, seed=1, **kwargs):
    """Returns variables with large weights, so that maps are not uniform; compiles nothing."""
    flags = {name: value for name, value in kwargs.items() if isinstance(value, bool)}
    arrays = {name: value for name, value in kwargs.items() if name not in flags}
    init = functools.partial(model.init, **flags)
    shapes = jax.eval_shape(init, jax.random.key(0), *args, **arrays)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if name not in ("kernel", "w_f"):
            return np.full(leaf.shape, name == "var", np.float32)
        fan_in = math.prod(leaf.shape[:-1] or leaf.shape)
        return rng.normal(0, 2 * (2 / fan_in) ** 0.5, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)
