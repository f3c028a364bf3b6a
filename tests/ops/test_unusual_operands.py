"""Symbolic sizes, sizes of 0, and operands in half precision without implicit promotion."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.operands import INSTANTIATIONS, call, make_operands

from nonlocal_jax import ops
from nonlocal_jax.ops.choose import kernels_of

BATCH, N, M, D, E = 3, 96, 64, 7, 5
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def gradients(instantiation, implementation, operands):
    def loss(operands):
        return call(instantiation, implementation, operands).astype(jnp.float32).sum()

    return jax.grad(loss)(operands)


def symbolic_shapes(instantiation, batch, n, m):
    shapes = {"theta": (batch, n, D), "phi": (batch, m, D), "g": (batch, m, E), "w_f": (2 * D,)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


SYMBOLIC = {"N": "2, n, 5", "M": "2, 7, m", "N = M": "2, n, n", "all": "b, n, m"}


@pytest.mark.usefixtures("as_users_see_it")  # a symbolic number is no int
@pytest.mark.parametrize("sizes", SYMBOLIC.values(), ids=SYMBOLIC.keys())
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_exported_with_symbolic_positions(instantiation, sizes):
    batch, n, m = jax.export.symbolic_shape(sizes)
    function = jax.jit(functools.partial(gradients, instantiation, "auto"))
    shapes = symbolic_shapes(instantiation, batch, n, m)
    exported = jax.export.export(function, platforms=PLATFORMS)(shapes)
    numbers = {"b": 3, "n": 11, "m": 11 if n is m else 13}
    batch, n, m = (numbers.get(name.strip(), name) for name in sizes.split(","))
    operands = make_operands(int(n), int(m), D, E, (int(batch),))
    results = jax.export.deserialize(exported.serialize()).call(operands)
    expected = gradients(instantiation, "dense", operands)
    chex.assert_trees_all_close(results, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "streaming"])
def test_gradients_are_exported_with_a_symbolic_batch(implementation):
    (batch,) = jax.export.symbolic_shape("b")
    function = jax.jit(functools.partial(gradients, "embedded_gaussian", implementation))
    exported = jax.export.export(function, platforms=PLATFORMS)(
        symbolic_shapes("embedded_gaussian", batch, N, M)
    )
    operands = make_operands(N, M, D, E, (BATCH,))
    results = jax.export.deserialize(exported.serialize()).call(operands)
    chex.assert_trees_all_close(results, function(operands), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("instantiation", "implementation", "available"),
    [
        ("gaussian", "streaming", "'auto', 'dense'"),
        ("concatenation", "sorted", "'auto', 'dense'"),
    ],
)
def test_implementations_that_need_static_sizes(instantiation, implementation, available):
    batch, n, m = jax.export.symbolic_shape("b, n, m")
    shapes = symbolic_shapes(instantiation, batch, n, m)
    message = f"'{implementation}' is not available here: N, M, d and e must not be symbolic.*"
    with pytest.raises(ValueError, match=message + available):
        jax.eval_shape(functools.partial(call, instantiation, implementation), shapes)
    explanation = ops.explain(instantiation, shapes["theta"], shapes["phi"], shapes["g"])
    assert str(explanation).startswith("dense: it takes symbolic sizes")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_strict_promotion_in_half_precision(instantiation, dtype):
    """Neither the choice nor any implementation relies on implicit promotion."""
    operands = jax.eval_shape(lambda: make_operands(1400, 300, D, E, (BATCH,), dtype))
    mask = jax.ShapeDtypeStruct((BATCH, 300), jnp.bool_)

    def loss(implementation, operands, mask):
        y = call(instantiation, implementation, operands, key_mask=mask)
        return y.astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("strict"):
        for kernel in kernels_of(instantiation):
            if kernel.name not in ("cudnn", "flash"):  # not available on every platform
                function = functools.partial(jax.grad(loss, argnums=1), kernel.name)
                traced = jax.jit(function).trace(operands, mask)
                for platform in PLATFORMS:
                    traced.lower(lowering_platforms=(platform,))
        str(ops.explain(instantiation, operands["theta"], operands["phi"], operands["g"]))


@pytest.mark.parametrize(
    "operands",
    [
        make_operands(3, 4, 0, 5, (BATCH,)),
        make_operands(3, 4, 2, 0, (BATCH,)),
        make_operands(3, 4, 2, 5, (0,)),
    ],
    ids=["no channels of the keys", "no channels of the values", "an empty batch"],
)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_sizes_of_0(instantiation, operands):
    """The response is that of the definition, and gradients are finite."""
    theta, phi, g = (operands[name] for name in ("theta", "phi", "g"))
    mean = jnp.broadcast_to(g.mean(-2, keepdims=True), (*theta.shape[:-1], g.shape[-1]))
    expected = mean if "gaussian" in instantiation else jnp.zeros_like(mean)
    for kernel in kernels_of(instantiation):
        for implementation in ("auto", kernel.name):
            y = call(instantiation, implementation, operands)
            assert y.shape == expected.shape
            if theta.shape[-1] == 0:
                np.testing.assert_allclose(y, expected, rtol=1e-5)
            results = gradients(instantiation, implementation, operands)
            chex.assert_trees_all_equal_shapes(results, operands)
            chex.assert_tree_all_finite(results)
            explanation = ops.explain(instantiation, theta, phi, g, implementation=implementation)
            assert str(explanation).startswith("dense: a size is 0")
