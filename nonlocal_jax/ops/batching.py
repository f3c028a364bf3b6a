"""Maps a per-sample function over a batch."""

from collections.abc import Callable
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
    if batch == 1:
        sample = jax.tree.map(lambda x: x[0], batches)
        return jax.tree.map(lambda x: x[None], function(*sample))
    if samples_at_once == batch:
        return jax.vmap(function)(*batches)
    batch_size = samples_at_once if samples_at_once > 1 else None
    return lax.map(lambda sample: function(*sample), batches, batch_size=batch_size)
