"""The MNIST network of Non-local_pytorch, a widely used introduction to the block."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax import checks
from nonlocal_jax.layers.block import nonlocal_block
from nonlocal_jax.layers.norm import BatchNorm
from nonlocal_jax.layers.pooling import max_pool
from nonlocal_jax.types import Affinity, Image, Instantiation, Logits


class NonLocalMnist(nn.Module):
    """Three convolutions with a non-local block after each of the first two, and two dense layers.

    | layer | output |
    |---|---|
    | conv1 3×3, BN, ReLU, max pooling 2×2 | 14×14×32 |
    | nonlocal1 | 14×14×32 |
    | conv2 3×3, BN, ReLU, max pooling 2×2 | 7×7×64 |
    | nonlocal2 | 7×7×64 |
    | conv3 3×3, BN, ReLU, max pooling 2×2 | 3×3×128 |
    | fc1, ReLU, dropout 0.5 | 256 |
    | fc2 | 10 |

    Attributes:
        instantiation: The pairwise function of both blocks.
    """

    instantiation: Instantiation = "embedded_gaussian"

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Example input for shape inference."""
        return jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)

    @nn.compact
    def __call__(
        self, image: Image, *, train: bool = False, return_maps: bool = False
    ) -> Logits | tuple[Logits, list[Affinity]]:
        """Computes the logits of the ten digits.

        Args:
            image: (B, 28, 28, 1), with values from 0 to 1.
            train: Whether BatchNorm uses the statistics of this batch and dropout is active.
            return_maps: Whether the affinities of both blocks are returned as well.

        Returns:
            The logits (B, 10). With `return_maps` also the affinities f / C of each query (row) to
            each pooled key, [(B, 196, 49), (B, 49, 9)].

        Raises:
            ValueError: If `image` has another shape.
        """
        if image.ndim != 4 or image.shape[1:] != (28, 28, 1):
            raise ValueError(
                f"image must have shape (B, 28, 28, 1); got {image.shape}."
                f"{checks.channels_hint('image', image.shape, 1)}"
            )
        x: Any = image
        maps = []
        for i, features in enumerate((32, 64, 128), start=1):
            x = nn.Conv(features, (3, 3), padding=1, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(use_running_average=not train, name=f"conv{i}_norm")(x))
            x = max_pool(x, (2, 2))
            if i < 3:
                block = nonlocal_block(self.instantiation, "non_local_pytorch", name=f"nonlocal{i}")
                x, affinity = block(x, train=train, return_map=True)
                maps.append(affinity)
        x = nn.relu(nn.Dense(256, name="fc1")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        logits = nn.Dense(10, name="fc2")(x.astype(jnp.float32))
        return (logits, maps) if return_maps else logits


def non_local_pytorch_mnist(instantiation: Instantiation = "embedded_gaussian") -> NonLocalMnist:
    """Builds the MNIST network of Non-local_pytorch.

    Args:
        instantiation: "gaussian", "embedded_gaussian", "dot_product" or "concatenation".

    Returns:
        The network. `model.apply(variables, images, return_maps=True)` returns the logits and the
        two affinity maps.

    Source: `lib/network.py` of AlexHex7/Non-local_pytorch.

    >>> import jax, jax.numpy as jnp
    >>> model = non_local_pytorch_mnist("dot_product")
    >>> images = jnp.ones((2, 28, 28, 1))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
    >>> logits, maps = jax.eval_shape(
    ...     lambda variables: model.apply(variables, images, return_maps=True), variables
    ... )
    >>> logits.shape, [affinity.shape for affinity in maps]
    ((2, 10), [(2, 196, 49), (2, 49, 9)])
    """
    return NonLocalMnist(instantiation)
