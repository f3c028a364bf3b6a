"""Non-local neural networks in JAX (Wang, Girshick, Gupta, He, CVPR 2018).

`nl.data.video`, `nl.evaluation`, `nl.training` and the like are imported when they are first used,
so `import nonlocal_jax` loads neither optax and orbax nor the libraries that read data.
"""

from typing import TYPE_CHECKING

from nonlocal_jax import data, layers, models, ops, visualize, weights
from nonlocal_jax.layers import describe, plan
from nonlocal_jax.lazy import submodules

if TYPE_CHECKING:
    from nonlocal_jax import evaluation, training
else:
    __getattr__, __dir__ = submodules(__name__, "evaluation", "training")

__version__ = "0.1.0"
__all__ = [
    "data",
    "describe",
    "evaluation",
    "layers",
    "models",
    "ops",
    "plan",
    "training",
    "visualize",
    "weights",
]
