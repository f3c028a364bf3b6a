"""Maps functions over a batch that may be split over devices."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
from jax import lax

T = TypeVar("T")


def map_samples(function: Callable[..., T], samples_at_once: int, *batches: Any) -> T:
    """Applies `function` to each sample of a batch, a few samples at a time.

    On CPU, matrix products, sorts and gathers are faster without a batch axis, so there the caller
    passes `samples_at_once=1`.

    Args:
        function: Function of one sample. Its arguments have no batch axis.
        samples_at_once: Number of samples that are computed together, at most the whole batch.
        *batches: Arrays, or trees of arrays, whose first axis is the batch.

    Returns:
        The results of `function`, stacked along a new first axis.

    >>> import jax.numpy as jnp
    >>> map_samples(jnp.dot, 1, jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 2)))
    Array([3., 7.], dtype=float32)
    """
    batch = jax.tree.leaves(batches)[0].shape[0]
    # A symbolic batch cannot be looped over. A single sample loses its batch axis below.
    if not isinstance(batch, int) or samples_at_once == batch > 1:
        return jax.vmap(function)(*batches)
    return map_shards(partial(_map_samples_of_shard, function, samples_at_once), *batches)


def map_shards(function: Callable[..., T], *batches: Any) -> T:
    """Applies a function of a batch, which loops over samples, to the batch of each CPU device.

    A batch may be split over devices, and XLA cannot split a loop over it: each device would
    compute every sample. So as many samples as there are devices are taken in each step, in the
    order in which a sharding splits them.

    Args:
        function: Function of batches; its results are batches as well.
        *batches: Arrays, or trees of arrays, whose first axis is the batch.

    Returns:
        The results of `function` for the whole batch.
    """
    batch = jax.tree.leaves(batches)[0].shape[0]
    shards = math.gcd(batch, _cpu_devices())
    if shards == 1:
        return function(*batches)
    split = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), batches)
    results = jax.vmap(function)(*split)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def _map_samples_of_shard(function: Callable[..., T], samples_at_once: int, *batches: Any) -> T:
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        sample = jax.tree.map(lambda x: x[0], batches)
        return jax.tree.map(lambda x: x[None], function(*sample))
    batch_size = samples_at_once if samples_at_once > 1 else None
    return lax.map(lambda sample: function(*sample), batches, batch_size=batch_size)


def _cpu_devices() -> int:
    """Returns the number of CPU devices, or 1 if JAX has none.

    It is a fact of this host, but only programs for CPUs loop over samples, and one for several
    CPU devices is compiled on the host that has them.
    """
    try:
        return jax.device_count("cpu")
    except RuntimeError:
        return 1
