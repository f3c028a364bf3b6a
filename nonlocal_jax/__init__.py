"""Non-local neural networks in JAX (Wang, Girshick, Gupta, He, CVPR 2018)."""

from nonlocal_jax import layers, ops
from nonlocal_jax.layers import describe

__version__ = "0.1.0"
__all__ = ["describe", "layers", "ops"]
