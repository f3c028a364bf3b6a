"""Layers compute what is the fastest on the platform that they are lowered for."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.layers import max_pool, nonlocal_block, strided_max_pool, video_conv
from nonlocal_jax.layers.paired_columns import max_pool_of_paired
from nonlocal_jax.layers.residual import relu_of_sum

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def lowered_text(function, platform, *operands):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def gradients(function, *operands):
    return jax.grad(lambda *operands: jnp.sum(jnp.sin(function(*operands))), (0, 1))(*operands)


def convolution_ranks(text):
    """Returns the numbers of spatial axes of the convolutions in a program."""
    labels = [
        line.split("dim_numbers = ")[1] for line in text.splitlines() if "dim_numbers" in line
    ]
    return {label.split("]")[0].count(",") - 1 for label in labels}


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_convolution(platform, differentiated):
    """CPUs take products instead, GPUs 2-D convolutions, TPUs their own 3-D ones for inference."""
    function = functools.partial(gradients, video_conv) if differentiated else video_conv
    text = lowered_text(function, platform, shaped(8, 4, 8, 8, 5), shaped(1, 3, 3, 5, 4))
    expected = {"cpu": set(), "tpu": {2 if differentiated else 3}}
    assert convolution_ranks(text) == expected.get(platform, {2})


def test_a_tpu_infers_few_clips_with_folded_convolutions():
    text = lowered_text(video_conv, "tpu", shaped(7, 4, 8, 8, 5), shaped(1, 3, 3, 5, 4))
    assert convolution_ranks(text) == {2}


@pytest.mark.parametrize("taps", [1, 5])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_first_convolution_has_its_frames_in_the_lanes_of_a_tpu(platform, taps):
    text = lowered_text(video_conv, platform, shaped(8, 4, 16, 16, 3), shaped(taps, 7, 7, 3, 4))
    assert ("dim_numbers = [0, 1, f, b]" in text) == (platform == "tpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_end_of_a_residual_block(platform):
    text = lowered_text(relu_of_sum, platform, shaped(2, 3), shaped(2, 3))
    assert ("stablehlo.negate" in text) == (platform == "cpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradient_of_max_pooling(platform):
    """TPUs take it along one axis after the other."""

    def gradient(x):
        return jax.grad(lambda x: max_pool(x, (1, 2, 2)).sum())(x)

    text = lowered_text(gradient, platform, shaped(2, 4, 6, 6, 5))
    assert text.count("optimization_barrier") == (2 if platform == "tpu" else 0)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradient_of_strided_max_pooling(platform):
    """TPUs keep the index of the maximum, others compare again."""

    def pool(x):
        return strided_max_pool(x, (3, 3, 3), (2, 2, 2), (1, 1, 1)).sum()

    x, is_tpu = shaped(2, 4, 6, 6, 5), platform == "tpu"
    text = lowered_text(jax.grad(pool), platform, x)
    assert text.count("optimization_barrier") == (3 if is_tpu else 0)
    assert ("xui8>" in text) == is_tpu
    assert "optimization_barrier" not in lowered_text(pool, platform, x)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradient_of_max_pooling_of_paired_columns(platform):
    """TPUs take frames apart by phase where they compare them for a gradient."""

    def pool(x):
        return max_pool_of_paired(x, (3, 3, 3), (2, 2, 2), (1, 1, 1)).sum()

    x = shaped(2, 4, 6, 3, 10)
    shifted_phase = "low = [0, 1, 0, 0, 0], high = [0, -1, 0, 0, 0]"
    assert (shifted_phase in lowered_text(jax.grad(pool), platform, x)) == (platform == "tpu")
    assert shifted_phase not in lowered_text(pool, platform, x)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_dense_layers_keep_their_position_axes_where_these_may_be_split(platform):
    block = nonlocal_block("embedded_gaussian", subsample=False)
    x = shaped(2, 4, 6, 6, 10)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    text = lowered_text(block.apply, platform, variables, x)
    assert ("tensor<288x10xf32>, tensor<10x5xf32>" in text) == (platform == "cpu")


def test_a_block_is_exported_for_all_platforms_with_a_symbolic_batch():
    block = nonlocal_block("concatenation", zero_init=False)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 6, 10)), jnp.float32)
    variables = jax.jit(block.init)(jax.random.key(0), x)
    (batch,) = jax.export.symbolic_shape("b")
    symbolic = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    function = jax.jit(block.apply)
    exported = jax.export.export(function, platforms=PLATFORMS)(variables, symbolic)
    y = jax.export.deserialize(exported.serialize()).call(variables, x)
    np.testing.assert_allclose(y, function(variables, x), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("as_users_see_it")  # a symbolic number is no int
@pytest.mark.parametrize("axes", ["spacetime", "space", "time"])
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "dot_product"])
def test_a_block_is_exported_with_a_symbolic_number_of_frames(instantiation, axes):
    block = nonlocal_block(instantiation, axes=axes, zero_init=False)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6, 6, 10)), jnp.float32)
    variables = jax.jit(block.init)(jax.random.key(0), x)

    def gradient(variables, x):
        def loss(params, x):
            variables_and_params = {**variables, "params": params}
            z, _ = block.apply(variables_and_params, x, train=True, mutable=["batch_stats"])
            return jnp.sum(z**2)

        return jax.grad(loss, argnums=(0, 1))(variables["params"], x)

    batch, frames = jax.export.symbolic_shape("b, t")
    symbolic = jax.ShapeDtypeStruct((batch, frames, *x.shape[2:]), x.dtype)
    function = jax.jit(gradient)
    exported = jax.export.export(function, platforms=PLATFORMS)(variables, symbolic)
    results = jax.export.deserialize(exported.serialize()).call(variables, x)
    chex.assert_trees_all_close(results, function(variables, x), rtol=1e-4, atol=1e-4)
