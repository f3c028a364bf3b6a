"""On slices of TPUs, each chip computes its own examples only, and sums alone are exchanged."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tpu import thin

import nonlocal_jax as nl
from nonlocal_jax import training
from nonlocal_jax.compiler import programs, topologies
from nonlocal_jax.training.capacity import compile_step, state_shapes
from nonlocal_jax.training.mesh import shapes

EXAMPLES = 2  # on each chip


def mesh_of(topology):
    return training.make_mesh(devices=topologies.devices(topology))


@functools.cache
def training_cost(topology, batch_norm):
    mesh, trainer = mesh_of(topology), thin.trainer(batch_norm)
    return programs.cost(
        compile_step(trainer, mesh, "replicated", thin.batch(EXAMPLES * mesh.size))
    )


@functools.cache
def inference_cost(topology):
    mesh, batch = mesh_of(topology), thin.batch(EXAMPLES)
    variables = state_shapes(thin.trainer(), batch).variables
    replicated = NamedSharding(mesh, PartitionSpec())
    inputs = shapes(thin.batch(EXAMPLES * mesh.size), mesh)["inputs"]
    function = jax.jit(thin.Thin().apply, in_shardings=(replicated, inputs.sharding))
    return programs.cost(function.lower(variables, inputs).compile())


def check_share(split, alone):
    assert split.flops == pytest.approx(alone.flops, rel=0.05)
    assert split.traffic == pytest.approx(alone.traffic, rel=0.05)


@pytest.mark.parametrize(
    ("topology", "batch_norm"), [("v5e:4x4", "device"), ("v5e:16x16", "global")]
)
def test_training_step(topology, batch_norm):
    split = training_cost(topology, batch_norm)
    check_share(split, training_cost("v5e:1x1", batch_norm))
    assert {collective.opcode for collective in split.collectives} == {"all-reduce"}
    if batch_norm == "device":  # gradients, statistics and metrics are summed at once
        assert [collective.count for collective in split.collectives] == [1]


def test_inference():
    split = inference_cost("v5e:16x16")
    check_share(split, inference_cost("v5e:1x1"))
    assert not split.collectives


def test_positions_of_an_operation():
    """Keys and values are gathered, and their gradients summed for the devices they belong to."""
    samples, n, m, d, e = 2, 4096, 1024, 256, 128
    positions = PartitionSpec(None, "positions")
    mesh = training.make_mesh(positions=4, devices=topologies.devices("v5e:2x2"))
    respond = jax.shard_map(
        functools.partial(nl.ops.embedded_gaussian, axis_name="positions"),
        mesh=mesh,
        in_specs=(positions, positions, positions),
        out_specs=positions,
        check_vma=False,
    )

    def gradients(cotangent, *operands):
        y, pull_back = jax.vjp(respond, *operands)
        return y, pull_back(cotangent)

    sharding = NamedSharding(mesh, positions)
    shapes = ((samples, n, e), (samples, n, d), (samples, m, d), (samples, m, e))
    operands = (jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=sharding) for x in shapes)
    cost = programs.cost(jax.jit(gradients).lower(*operands).compile())
    keys_and_values = 2 * samples * m * (d + e)  # bytes
    assert cost.collectives == (
        programs.Collective("all-gather", 2, keys_and_values),
        programs.Collective("reduce-scatter", 2, keys_and_values // 4),
    )


def test_pmap():
    devices = topologies.devices("v5e:2x2")
    trainer, batch = thin.trainer(), thin.batch(EXAMPLES)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype),
        (state_shapes(trainer, batch), batch),
    )
    step = training.pmap_step(trainer, devices=devices)
    cost = programs.cost(step.lower(*arguments).compile())
    assert cost.flops == pytest.approx(training_cost("v5e:1x1", "device").flops, rel=0.05)
