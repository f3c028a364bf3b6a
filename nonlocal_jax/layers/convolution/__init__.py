"""3-D convolutions for video, implemented with matrix products and 2-D convolutions."""

from nonlocal_jax.layers.convolution.layer import VideoConv, dot_over_positions, video_conv

__all__ = ["VideoConv", "dot_over_positions", "video_conv"]
