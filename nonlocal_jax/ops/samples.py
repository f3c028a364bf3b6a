"""A function of one sample over a batch."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax

T = TypeVar("T")


def over_samples(function: Callable[..., T], at_once: int, *xs: Any) -> T:
    """`function` of each sample of arrays, or trees of arrays, with a batch axis; `at_once` of the batch together.

    Products of matrices without a batch are faster on CPU, and so are sorts and gathers.
    """
    batch = jax.tree.leaves(xs)[0].shape[0]
    if batch == 1:
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], xs)))
    if at_once == batch:
        return jax.vmap(function)(*xs)
    return lax.map(
        lambda sample: function(*sample), xs, batch_size=at_once if at_once > 1 else None
    )
