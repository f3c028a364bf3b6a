"""Inflation of the 2-D kernels of image networks to the 3-D kernels of video networks."""

import jax.numpy as jnp

from nonlocal_jax import checks
from nonlocal_jax.types import Array


def inflate(kernel_2d: Array, frames: int) -> Array:
    """Repeats a 2-D kernel over t frames and divides it by t.

    On a clip of t equal frames, the result responds as the 2-D kernel does to the image.

    Args:
        kernel_2d: (H, W, C, features).
        frames: t, the size of the kernel in time, at least 1.

    Returns:
        (t, H, W, C, features).

    Raises:
        ValueError: `kernel_2d` has another rank, or `frames` is less than 1.

    Source: section 4.1 of the paper, after Carreira and Zisserman's I3D.

    >>> import jax.numpy as jnp
    >>> print(inflate(jnp.full((1, 1, 1, 1), 6.0), 3).ravel())
    [2. 2. 2.]
    """
    if kernel_2d.ndim != 4:
        raise ValueError(f"kernel_2d must have shape (H, W, C, features); got {kernel_2d.shape}.")
    checks.at_least("frames", frames, 1)
    return jnp.repeat(kernel_2d[None] / frames, frames, axis=0)
