"""Parameters of trained networks: reading, inflating, writing."""

from nonlocal_jax.weights.inflation import inflate

__all__ = ["inflate"]
