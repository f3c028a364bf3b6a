"""Random crops and flips on the device, with random numbers of each example's own."""

import jax
import jax.numpy as jnp
from jaxtyping import Key, Shaped, UInt32

from nonlocal_jax.types import Array, Image, PRNGKeyArray

ExampleKeys = Key[Array, " b"]
Pixels = Shaped[Array, "b *t h w c"]  # images or videos, of any type


def example_keys(key: PRNGKeyArray, position: UInt32[Array, " b"]) -> ExampleKeys:
    """Derives a key for each example.

    Args:
        key: Key of the run.
        position: (B,) position of each example in the order of all epochs, as
            `nonlocal_jax.data.pipeline.training_batches` counts it.

    Returns:
        (B,) keys, which depend on nothing else, so neither on the batch size nor on the devices.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, position)


def random_crop(images: Image, keys: ExampleKeys, padding: int) -> Image:
    """Pads images with zeros and crops them to their original size at a random place.

    Args:
        images: (B, H, W, C).
        keys: (B,), from `example_keys`.
        padding: Width of the border of zeros in pixels.

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
    """Mirrors each image or video left to right with probability 1/2.

    Args:
        images: (B, H, W, C) or (B, T, H, W, C). All frames of a video are flipped alike.
        keys: (B,), from `example_keys`.
    """
    flips = jax.vmap(jax.random.bernoulli)(keys)
    flips = jnp.expand_dims(flips, tuple(range(1, images.ndim)))
    return jnp.where(flips, images[..., ::-1, :], images)
