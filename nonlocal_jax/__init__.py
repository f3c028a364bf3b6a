"""Non-local neural networks in JAX (Wang, Girshick, Gupta, He, CVPR 2018)."""

from nonlocal_jax import data, layers, models, ops, visualize, weights
from nonlocal_jax.layers import describe, plan

__version__ = "0.1.0"
__all__ = ["data", "describe", "layers", "models", "ops", "plan", "visualize", "weights"]
