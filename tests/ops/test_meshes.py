"""Under `jit` with the batch split over devices, each device computes its own samples only."""

import functools

import compiled
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ops.operands import (
    make_operands,
    registered,
    row_of_platform,
    streaming_row,
    value_and_gradients,
)

from nonlocal_jax.ops.kernels import dense, reassociated, sorted_keys, streaming
from nonlocal_jax.ops.softmax_rows import Rows
from nonlocal_jax.ops.softmax_tiles import Tiles
from nonlocal_jax.training.mesh import make_mesh

BATCH, N, M, D, E = 8, 96, 64, 16, 24
VARIANTS = (
    row_of_platform(streaming.KERNEL, "tpu"),
    row_of_platform(sorted_keys.KERNEL, "gpu"),
    streaming_row("streaming_in_tiles", Tiles(rows=64, columns=32, numbers=1, stored_bytes=0)),
    streaming_row("streaming_in_rows", Rows(numbers=1, least=16)),
)
PATHS = (
    ("embedded_gaussian", dense.KERNEL),
    ("embedded_gaussian", streaming.KERNEL),
    *(("embedded_gaussian", VARIANTS[i]) for i in (0, 2, 3)),
    ("dot_product", dense.KERNEL),
    ("dot_product", reassociated.KERNEL),
    ("concatenation", dense.KERNEL),
    ("concatenation", sorted_keys.KERNEL),
    ("concatenation", VARIANTS[1]),
)
pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")


@pytest.fixture(scope="module", autouse=True)
def variants():
    with registered(*VARIANTS):
        yield


def compile_on(devices, function):
    """Compiles a function of operands whose batch is split over some devices."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    operands = jax.eval_shape(lambda: make_operands(N, M, D, E, (BATCH,)))

    def place(x):
        spec = PartitionSpec("data") if x.ndim == 3 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return compiled.program(jax.jit(function).lower(jax.tree.map(place, operands)))


@pytest.mark.parametrize(("instantiation", "kernel"), PATHS, ids=lambda x: getattr(x, "name", x))
def test_each_device_computes_its_own_samples(instantiation, kernel):
    function = functools.partial(value_and_gradients, instantiation, kernel.name)
    alone, split = compile_on(1, function), compile_on(4, function)
    assert split.flops() == pytest.approx(alone.flops() / 4, rel=0.05)
    # Gradients of w_f and the loss are summed over all samples. Nothing else is communicated.
    assert {collective.opcode for collective in split.collectives()} <= {"all-reduce"}
    assert sum(collective.bytes for collective in split.collectives()) <= 4 * (2 * D + 1)


def test_flops_count_the_iterations_of_a_loop():
    x = jnp.ones((5, 7, 11))

    def product_of_each(x):
        return jax.lax.map(lambda sample: sample @ sample.T, x)

    program = compiled.program(jax.jit(product_of_each).lower(x))
    assert program.flops() == 2 * 5 * 7 * 11 * 7
