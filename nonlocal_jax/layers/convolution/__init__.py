"""Video convolutions, computed as the matrix products and 2-D convolutions that they are."""

from nonlocal_jax.layers.convolution.layer import VideoConv, dot_over_positions, video_conv

__all__ = ["VideoConv", "dot_over_positions", "video_conv"]
