"""Networks: stacks of layers."""

from nonlocal_jax.models.toy_video import LocalBlock, ToyVideoNet

__all__ = ["LocalBlock", "ToyVideoNet"]
