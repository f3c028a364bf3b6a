"""Random crops and flips on the device, each of its example's own random numbers."""

import jax
import jax.numpy as jnp
from jaxtyping import Key, Shaped, UInt32

from nonlocal_jax.types import Array, Image, PRNGKeyArray

ExampleKeys = Key[Array, " b"]
Pixels = Shaped[Array, "b *t h w c"]  # of images or videos, floating point or as they come


def example_keys(key: PRNGKeyArray, position: UInt32[Array, " b"]) -> ExampleKeys:
    """(B,) keys that depend on the key and on the example's place in the order of all epochs, and on nothing else."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, position)


def random_crop(images: Image, keys: ExampleKeys, padding: int) -> Image:
    """Zeros around each image (B, H, W, C), and of that a part of the old size.

    >>> image = jnp.arange(9.0).reshape(1, 3, 3, 1)
    >>> random_crop(image, example_keys(jax.random.key(1), jnp.zeros(1, jnp.uint32)), 1)[0, :, :, 0]
    Array([[0., 0., 0.],
           [1., 2., 0.],
           [4., 5., 0.]], dtype=float32)
    """
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * padding + 1))(keys)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def random_flip(images: Pixels, keys: ExampleKeys) -> Pixels:
    """Each image (B, H, W, C), or video (B, T, H, W, C), or its mirror image, with equal chances."""
    flips = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(
        jnp.expand_dims(flips, tuple(range(1, images.ndim))), images[..., ::-1, :], images
    )
