"""JAX's flash attention for TPUs: its numbers, interpreted on CPU, and its programs for a TPU."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ops.operands import (
    assert_equal_to_dense,
    call,
    make_operands,
    registered,
    respond,
    value_and_gradients,
)

from nonlocal_jax.ops.kernels import flash
from nonlocal_jax.ops.kernels.kernel import Sizes, available_everywhere, traceable_everywhere

# 2 blocks of queries and of keys, both padded; keys wider than values, as in a Gaussian block.
BATCH, N, M, D, E = 2, 200, 150, 11, 7
INTERPRETED = dataclasses.replace(
    flash.KERNEL,
    name="flash_interpreted",
    refusal=available_everywhere,
    untraceable=traceable_everywhere,
)

operands_of = functools.partial(make_operands, N, M, D, E)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash, "MAX_QUERIES", flash.LANES)
    monkeypatch.setattr(flash, "MAX_KEYS", flash.LANES)


@pytest.fixture
def interpreted():
    # `InterpretParams()`, which simulate a TPU's memory, fail under `vmap` (JAX 0.10 to 0.12).
    with registered(INTERPRETED), pltpu.force_tpu_interpret_mode(True):
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("m", "masked"), [(M, True), (flash.LANES, False)])
def test_equal_to_dense(m, masked):
    operands = make_operands(N, m, D, E, (BATCH,))
    operands["theta"] /= 2
    mask = jnp.ones((BATCH, m), bool).at[0, 3:].set(False).at[1].set(False) if masked else None
    assert_equal_to_dense("gaussian", "flash_interpreted", operands, mask)


@pytest.mark.usefixtures("interpreted")
def test_errors_in_bfloat16_against_float32():
    """The kernel rounds y and s before it computes θ̄, whose terms nearly cancel."""
    operands = operands_of((), dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), operands)
    expected = value_and_gradients("embedded_gaussian", "dense", wide)
    results = value_and_gradients("embedded_gaussian", "flash_interpreted", operands)
    dense = value_and_gradients("embedded_gaussian", "dense", operands)
    for name, factor in {"y": 1.5, "theta": 2.5, "phi": 2.0, "g": 1.5}.items():
        errors = [jnp.linalg.norm(x[name] - expected[name]) for x in (results, dense)]
        assert errors[0] <= factor * errors[1], name


@pytest.mark.usefixtures("interpreted")
def test_scale_has_a_gradient():
    operands = make_operands(5, 3, D, E, (2,))

    @functools.partial(jax.jit, static_argnums=1)
    def response_and_gradient(scale, implementation):
        def loss(scale):
            y = call("embedded_gaussian", implementation, operands, scale=scale)
            return jnp.sum(jnp.sin(y))

        constant = call("embedded_gaussian", implementation, operands, scale=0.3)
        return constant, jax.grad(loss)(scale)

    results = response_and_gradient(jnp.float32(0.3), "flash_interpreted")
    expected = response_and_gradient(jnp.float32(0.3), "dense")
    chex.assert_trees_all_close(results, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("interpreted")
def test_any_batch():
    operands = make_operands(5, 3, D, E, (2, 3))
    function = functools.partial(respond, "embedded_gaussian", "flash_interpreted")
    axes = {name: None if name == "w_f" else 0 for name in operands}
    y = jax.jit(jax.vmap(function, in_axes=(axes,)))(operands)
    expected = respond("embedded_gaussian", "dense", operands)
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)
    empty_batch = jax.eval_shape(lambda: make_operands(5, 3, D, E, (0,)))
    chex.assert_shape(jax.eval_shape(function, empty_batch), (0, 5, E))


def gradients(operands):
    return jax.grad(lambda operands: call("embedded_gaussian", "flash", operands).sum())(operands)


def test_exported_for_tpus_with_a_symbolic_batch():
    (batch,) = jax.export.symbolic_shape("b")
    shapes = jax.eval_shape(lambda: operands_of((BATCH,)))
    symbolic = {
        name: jax.ShapeDtypeStruct((batch, *x.shape[1:]) if x.ndim == 3 else x.shape, x.dtype)
        for name, x in shapes.items()
    }
    exported = jax.export.export(jax.jit(gradients), platforms=["tpu"])(symbolic)
    assert exported.mlir_module().count("tpu_custom_call") == 3


def test_precisions_of_products():
    sizes = Sizes("gaussian", 1, N, M, D, E, jnp.dtype(jnp.bfloat16), masked=False)
    with jax.default_matmul_precision("highest"):
        assert "no products of bfloat16 with the precision 'highest'" in flash.untraceable(sizes)
        assert flash.untraceable(sizes._replace(dtype=jnp.dtype(jnp.float32))) is None
    with jax.default_matmul_precision("default"):
        assert flash.untraceable(sizes) is None


def test_runs_on_tpus_only():
    with pytest.raises(ValueError, match=r"'flash' is not available here: JAX's Pallas kernel nee"):
        call("embedded_gaussian", "flash", operands_of(()))


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
def test_a_batch_that_is_split_over_devices_needs_shard_map():
    mesh, batch = Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data")

    def place(x):
        spec = batch if x.ndim == 3 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    operands = jax.tree.map(place, jax.eval_shape(lambda: operands_of((8,))))
    specs = {name: x.sharding.spec for name, x in operands.items()}
    mapped = jax.shard_map(
        gradients, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False
    )

    def lowered_text(function):
        traced = jax.jit(function).trace(operands)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    with pytest.raises(NotImplementedError, match="wrap the call in a shard_map"):
        lowered_text(gradients)
    kernels = [line for line in lowered_text(mapped).splitlines() if "tpu_custom_call" in line]
    assert len(kernels) == 3
    assert all("tensor<2x1x1x256x128xf32>" in line for line in kernels)


@pytest.mark.parametrize(
    ("n", "m", "channels", "dtype", "query_block", "key_block"),
    [
        (1, 129, 256, jnp.bfloat16, 128, 256),
        (3136, 784, 256, jnp.bfloat16, 640, 896),  # 5 blocks of queries, 1 of keys
        (12544, 12544, 256, jnp.bfloat16, 256, 896),  # without padding
        (1024, 1024, 256, jnp.bfloat16, 512, 512),
        (784, 196, 512, jnp.bfloat16, 512, 256),
        (12544, 784, 128, jnp.float32, 256, 512),
        (784, 196, 2048, jnp.bfloat16, 128, 128),
    ],
)
def test_blocks_need_little_padding(n, m, channels, dtype, query_block, key_block, monkeypatch):
    monkeypatch.undo()
    assert flash.blocks(n, m, channels, 3, dtype) == (query_block, key_block, channels)
