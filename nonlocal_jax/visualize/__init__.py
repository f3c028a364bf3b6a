"""Affinity maps as pictures. Matplotlib is loaded when something is drawn."""

from nonlocal_jax.visualize.arrows import arrows

__all__ = ["arrows"]
