"""Faster forms of convolutions on CPUs. They are not used on other platforms.

The entry points are `choose`, for convolutions without groups that `layer.py` computes on CPUs, and
`dot_over_rows`, for dense layers.
"""

from nonlocal_jax.layers.convolution.cpu.choice import choose
from nonlocal_jax.layers.convolution.cpu.products import dot_over_rows

__all__ = ["choose", "dot_over_rows"]
