"""What runs is chosen for the platform that is lowered for, not for the one that traces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.operands import INSTANTIATIONS, call, make_operands

from nonlocal_jax.ops.platforms import by_platform, fail_if_lowered

BATCH, N, M, D, E = 3, 96, 64, 7, 5
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def lowered_text(function, platform, *operands):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def gradients(instantiation, implementation, operands):
    def loss(operands):
        return call(instantiation, implementation, operands).astype(jnp.float32).sum()

    return jax.grad(loss)(operands)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_softmax_loops_over_samples_on_cpu_only(platform):
    """CPUs take one sample after the other; a loop elsewhere would run over a sharded axis."""
    operands = jax.eval_shape(lambda: make_operands(3000, 2000, D, E, (BATCH,)))
    function = functools.partial(gradients, "embedded_gaussian", "streaming")
    text = lowered_text(function, platform, operands)
    one_sample = "tensor<3000x7xf32>" in text
    assert one_sample == (platform == "cpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_concatenation_sorts_where_sorting_is_fast(platform):
    operands = jax.eval_shape(lambda: make_operands(12544, 3136, 256, 256, (BATCH,)))
    text = lowered_text(functools.partial(gradients, "concatenation", "auto"), platform, operands)
    assert ("stablehlo.sort" in text) == (platform != "tpu")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_dot_product_multiplies_in_half_precision(platform):
    operands = jax.eval_shape(lambda: make_operands(N, M, D, E, (BATCH,), jnp.bfloat16))
    function = functools.partial(call, "dot_product", "reassociated")
    text = lowered_text(function, platform, operands)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 2
    assert not any("f32" in line.rsplit(" : ", 1)[1].split("->")[0] for line in products)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_of_half_precision_are_not_widened_but_one(platform):
    operands = jax.eval_shape(lambda: make_operands(3000, 2000, D, E, (BATCH,), jnp.bfloat16))
    function = functools.partial(gradients, "embedded_gaussian", "streaming")
    text = lowered_text(function, platform, operands)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 5  # logits, ȳ g, and three gradients; the response itself is not needed
    inputs = [line.rsplit(" : ", 1)[1].split("->")[0] for line in products]
    # One product is wide, that for θ̄, whose terms nearly cancel.
    assert ["f32" in types for types in inputs].count(True) == 1


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_exported_for_all_platforms_with_a_symbolic_batch(instantiation):
    (batch,) = jax.export.symbolic_shape("b")
    operands = make_operands(N, M, D, E, (BATCH,))
    shapes = {
        name: jax.ShapeDtypeStruct((batch, *x.shape[1:]) if x.ndim == 3 else x.shape, x.dtype)
        for name, x in operands.items()
    }
    function = jax.jit(functools.partial(call, instantiation, "auto"))
    exported = jax.export.export(function, platforms=PLATFORMS)(shapes)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(loaded.call(operands), function(operands), rtol=1e-5, atol=1e-6)


def test_an_implementation_is_missing_where_it_is_lowered():
    operands = {"x": jnp.ones((2, 3))}

    def function(x):
        return by_platform(
            lambda platform: platform == "cpu",
            lambda is_cpu, x: x if is_cpu else fail_if_lowered("not here.", x.shape, x.dtype),
            x,
        )

    assert "func" in lowered_text(function, "cpu", operands["x"])
    with pytest.raises(ValueError, match=r"not here\."):
        lowered_text(function, "tpu", operands["x"])
    # Gradients of the other branch are not affected.
    gradient = jax.jit(jax.grad(lambda x: function(x).sum()))(operands["x"])
    np.testing.assert_array_equal(gradient, jnp.ones((2, 3)))


def test_platforms_with_equal_choices_need_no_branch():
    jaxpr = jax.make_jaxpr(lambda x: by_platform(lambda platform: 2, lambda y, x: y * x, x))(1.0)
    assert "platform_index" not in str(jaxpr)
