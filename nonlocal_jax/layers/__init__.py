"""Linen modules: they own parameters and call `nonlocal_jax.ops`."""

from nonlocal_jax.layers.block import NonLocalBlock, nonlocal_block
from nonlocal_jax.layers.convolution import VideoConv, video_conv
from nonlocal_jax.layers.description import BlockDescription, describe
from nonlocal_jax.layers.insertion import insert
from nonlocal_jax.layers.instantiations import (
    Concatenation,
    DotProduct,
    EmbeddedGaussian,
    Gaussian,
    NonLocalOperation,
)
from nonlocal_jax.layers.norm import Affine, BatchNorm, fold_batch_norm, freeze_batch_norm
from nonlocal_jax.layers.planning import BlockPlan, plan
from nonlocal_jax.layers.pooling import max_pool, pool_mask, strided_max_pool
from nonlocal_jax.layers.residual_ratio import residual_ratios, sow_residual_ratio
from nonlocal_jax.layers.response import (
    PairwiseCall,
    SumLayout,
    enclosing_block,
    nonlocal_response,
    tap,
)

__all__ = [
    "Affine",
    "BatchNorm",
    "BlockDescription",
    "BlockPlan",
    "Concatenation",
    "DotProduct",
    "EmbeddedGaussian",
    "Gaussian",
    "NonLocalBlock",
    "NonLocalOperation",
    "PairwiseCall",
    "SumLayout",
    "VideoConv",
    "describe",
    "enclosing_block",
    "fold_batch_norm",
    "freeze_batch_norm",
    "insert",
    "max_pool",
    "nonlocal_block",
    "nonlocal_response",
    "plan",
    "pool_mask",
    "residual_ratios",
    "sow_residual_ratio",
    "strided_max_pool",
    "tap",
    "video_conv",
]
