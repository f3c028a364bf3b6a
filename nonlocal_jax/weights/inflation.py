"""From the kernels of an image network to those of a video network."""

import jax.numpy as jnp

from nonlocal_jax.types import Array


def inflate(kernel_2d: Array, frames: int) -> Array:
    """Each of the t planes is the 2-D kernel over t, so that a clip of equal frames gets the image's answer.

    Args:
        kernel_2d: (H, W, C, features).
        frames: t, the taps in time, at least 1.

    Returns:
        (t, H, W, C, features).

    Raises:
        ValueError: a kernel of another rank, or fewer than 1 frame.

    Source: section 4.1 of the paper, after Carreira and Zisserman's I3D.

    >>> import jax.numpy as jnp
    >>> print(inflate(jnp.full((1, 1, 1, 1), 6.0), 3).ravel())
    [2. 2. 2.]
    """
    if kernel_2d.ndim != 4:
        raise ValueError(f"kernel_2d must have shape (H, W, C, features); got {kernel_2d.shape}.")
    if frames < 1:
        raise ValueError(f"frames must be at least 1; got {frames}.")
    return jnp.repeat(kernel_2d[None] / frames, frames, axis=0)
