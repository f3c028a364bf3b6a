"""Faster forms of convolutions on CPUs. No other platform computes anything here.

`choose` is the only way in for convolutions, `dot_over_rows` for products over channels.
"""

from nonlocal_jax.layers.convolution.cpu.choice import choose
from nonlocal_jax.layers.convolution.cpu.products import dot_over_rows

__all__ = ["choose", "dot_over_rows"]
