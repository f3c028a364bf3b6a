"""Random variables for tests, made without compiling a module's `init`."""

import jax
import numpy as np


def random_variables(module, *inputs, positive=False, seed=0):
    """Variables for which every branch counts: no scale, bias or statistic is 0.

    Args:
        module: A Linen module.
        *inputs: Its inputs, or `jax.ShapeDtypeStruct`s of them.
        positive: Whether kernels and biases are positive, so that no ReLU is off.
        seed: Seed of the numbers.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            values = rng.standard_normal(leaf.shape) * (2 / fan_in) ** 0.5
        else:
            low, high = (0.4, 0.9) if name in ("scale", "var") else (-0.2, 0.2)
            values = rng.uniform(low, high, leaf.shape)
        return jax.numpy.asarray(np.abs(values) if positive else values, leaf.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def normal(shape, seed=0):
    """Standard normal numbers in float32, as a NumPy array."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
