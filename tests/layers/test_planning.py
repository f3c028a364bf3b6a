"""Predictions of memory against what XLA's buffer assignment says."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import nonlocal_jax as nl
from nonlocal_jax.ops.kernels import KERNELS


def step(block, variables, x, cotangent):
    """Answer and gradients of a block in training."""

    def apply(params, x):
        return block.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])

    z, pullback, state = jax.vjp(apply, variables["params"], x, has_aux=True)
    return z, pullback(cotangent), state


def temporary_bytes(block, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    compiled = (
        jax.jit(block.apply).lower(variables, x).compile(),
        jax.jit(lambda *args: step(block, *args)).lower(variables, x, x).compile(),
    )
    return tuple(c.memory_analysis().temp_size_in_bytes for c in compiled)


CASES = [  # none of the shapes that the table was read off
    (instantiation, kernel.name, shape, options)
    for kernel in KERNELS
    for instantiation in kernel.instantiations
    if kernel.name != "cudnn"
    for shape, options in (
        ((1, 8, 24, 24, 256), {}),
        ((1, 48, 44, 384), {"subsample": False}),
        ((3, 4, 20, 20, 512), {}),
        ((1, 8, 20, 28, 384), {"pool_order": "before"}),
    )
]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the table is of XLA's CPU buffers")
@pytest.mark.parametrize(("instantiation", "implementation", "shape", "options"), CASES)
def test_predictions_are_within_a_fifth_of_what_xla_says(
    instantiation, implementation, shape, options
):
    block = nl.layers.nonlocal_block(instantiation, implementation=implementation, **options)
    (predicted,) = nl.plan(shape, block)
    assert predicted.chosen == implementation
    forward, backward = temporary_bytes(block, shape)
    assert predicted.forward[implementation] == pytest.approx(forward, rel=0.2)
    assert predicted.backward[implementation] == pytest.approx(backward, rel=0.2)


def test_every_block_of_a_network_is_planned_where_it_stands():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nl.layers.nonlocal_block("dot_product", name="early")(x, train=train)
            x = nn.Conv(12, (3, 3), strides=2)(x)
            return nl.layers.nonlocal_block("concatenation", subsample=False, name="late")(
                x, train=train
            )

    early, late = nl.plan((2, 8, 10, 6), Network(), train=True)
    assert (early.place, early.instantiation, early.queries, early.keys) == (
        "early",
        "dot_product",
        80,
        20,
    )
    assert (late.place, late.instantiation, late.queries, late.keys) == (
        "late",
        "concatenation",
        20,
        20,
    )
    assert set(late.forward) == set(late.backward) == {"dense", "sorted"}
    assert "late: concatenation, 20 queries × 20 keys" in str(late)
    assert nl.plan((1, 3), nn.Dense(2)) == ()
    with pytest.raises(ValueError, match="one, two or three position axes"):
        nl.plan((2, 8), nl.layers.nonlocal_block("gaussian"))
