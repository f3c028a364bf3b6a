"""Small networks with blocks, for the tests of what they look at."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import nonlocal_jax as nl

CLIP = (2, 4, 12, 20, 3)  # (B, T, H, W, C)


class TwoBlocks(nn.Module):
    """Two stages, a block after each: maps of 4×6×10 and 4×3×5 positions."""

    instantiation: str = "embedded_gaussian"
    second: str = "embedded_gaussian"

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nl.layers.VideoConv(6, (1, 3, 3), (1, 2, 2), name="conv1")(x))
        x = nl.layers.nonlocal_block(self.instantiation, name="first")(x)
        x = nn.relu(nl.layers.VideoConv(8, (3, 3, 3), (1, 2, 2), name="conv2")(x))
        x = nl.layers.nonlocal_block(self.second, subsample=False, name="second")(x)
        return x.mean(axis=(1, 2, 3))


class OneBlock(nn.Module):
    """A block alone; with `masked`, columns from 7 on are padding."""

    block: nn.Module
    masked: bool = False

    @nn.compact
    def __call__(self, x):
        return self.block(x, mask=self.mask(x) if self.masked else None)

    def mask(self, x):
        return jnp.broadcast_to(jnp.arange(x.shape[-2]) < 7, x.shape[:-1])


def clips(shape=CLIP, seed=0):
    return jax.random.uniform(jax.random.key(seed), shape)


def with_weights(model, x, seed=1):
    """Variables of some size, so that maps are not uniform."""
    variables = jax.jit(model.init)(jax.random.key(seed), x)
    return jax.tree.map(lambda leaf: 2 * leaf if jnp.ndim(leaf) > 1 else leaf, variables)
