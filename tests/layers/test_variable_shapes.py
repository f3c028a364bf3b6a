"""Shapes of variables that are found without a trace of the whole network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import nonlocal_jax as nl
from nonlocal_jax.layers import BatchNorm, VideoConv, nonlocal_block
from nonlocal_jax.layers.variable_shapes import variable_shapes
from tests.variables import normal

VIDEO = jax.ShapeDtypeStruct((1, 8, 64, 64, 3), jnp.float32)


class Tower(nn.Module):
    """Layers whose variables depend on dtypes, options and keyword arguments."""

    @nn.compact
    def __call__(self, x):
        x = VideoConv(8, (3, 3, 3), (1, 2, 2), paired=True, param_dtype=jnp.bfloat16)(x=x)
        x = BatchNorm(use_running_average=True, paired=True, use_scale=False)(x)
        x = VideoConv(6, groups=2, dtype=jnp.float16)(x)
        # The parameters have the shapes and the dtypes of the outputs.
        x = self.param("convolved", lambda _: jnp.zeros_like(x))
        x = BatchNorm(use_running_average=True, use_bias=False, dtype=jnp.float32)(x)
        x = self.param("normalized", lambda _: jnp.zeros_like(x))
        x = nonlocal_block("concatenation", subsample=(1, 2, 2))(x)
        return self.param("responded", lambda _: jnp.zeros_like(x))


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nl.models.video_resnet(50, "c2d", 5, clip="8x8"), VIDEO),
        (nl.models.video_resnet(50, "i3d_3x3x3", 10, clip="8x8", preset="slowfast"), VIDEO),
        (nl.models.video_resnet(101, "i3d_3x1x1", 5, clip="8x8", frozen_bn=True), VIDEO),
        (nl.models.video_resnet(50, "i3d_3x1x1", 0, clip="8x8", dtype=jnp.bfloat16), VIDEO),
        (nl.models.non_local_pytorch_mnist(), None),
        (Tower(), VIDEO),
    ],
    ids=["c2d", "i3d_3x3x3", "frozen_bn", "bfloat16", "mnist", "tower"],
)
def test_shapes_are_those_of_init(model, example):
    example = example or model.example
    expected = jax.eval_shape(model.init, jax.random.key(0), example)
    assert variable_shapes(model, example) == expected


def test_values_are_drawn_after_the_shapes_were_found():
    """No trace without values stays in the caches of JAX, also inside a jitted module."""
    layer = nn.jit(VideoConv)(4, (1, 3, 3))
    x = jnp.asarray(normal((1, 2, 4, 4, 3)))
    variable_shapes(layer, jax.ShapeDtypeStruct(x.shape, x.dtype))
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert jnp.abs(variables["params"]["kernel"]).max() > 0
    assert jnp.abs(y).max() > 0
