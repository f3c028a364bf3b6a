"""Non-local neural networks in JAX (Wang, Girshick, Gupta, He, CVPR 2018)."""

import importlib
from typing import TYPE_CHECKING, Any

from nonlocal_jax import data, layers, models, ops, visualize, weights
from nonlocal_jax.layers import describe, plan

if TYPE_CHECKING:
    from nonlocal_jax import training

__version__ = "0.1.0"
__all__ = [
    "data",
    "describe",
    "layers",
    "models",
    "ops",
    "plan",
    "training",
    "visualize",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name == "training":  # brings optax and orbax, which who only wants a block need not load
        return importlib.import_module("nonlocal_jax.training")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
