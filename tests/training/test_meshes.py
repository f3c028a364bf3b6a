"""Training steps and evaluations on several devices: each computes its own examples only."""

import compiled
import jax
import jax.numpy as jnp
import optax
import pytest

from nonlocal_jax.models import cifar_resnet, video_resnet
from nonlocal_jax.training import Trainer, classification, make_mesh
from nonlocal_jax.training.compilation import sharded_evaluation, sharded_step
from nonlocal_jax.training.mesh import batch_sharding, state_sharding

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
BATCH = 8
VIDEO = video_resnet(
    (1, 1, 1, 1), "i3d_3x1x1", nonlocal_blocks={"res3": (0,)}, num_classes=5, width_per_group=8
)
MODELS = {
    "video": (VIDEO, (8, 32, 32, 3)),
    "images": (cifar_resnet(8, {"res2": (0,)}), (32, 32, 3)),
}


def prepare(name, batch_norm, devices):
    """Returns a mesh, a trainer, and the shapes of its state and of a batch split over devices."""
    model, shape = MODELS[name]
    mesh = make_mesh(devices=jax.devices()[:devices])
    trainer = Trainer(classification(model), optax.sgd(0.1), batch_norm=batch_norm)
    batch = {
        "inputs": jax.ShapeDtypeStruct((BATCH, *shape), jnp.float32, sharding=batch_sharding(mesh)),
        "labels": jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=batch_sharding(mesh)),
    }
    return mesh, trainer, jax.eval_shape(trainer.init, jax.random.key(0), batch), batch


def compile_step(name, batch_norm, devices):
    mesh, trainer, state, batch = prepare(name, batch_norm, devices)
    step = sharded_step(trainer, mesh, state_sharding(mesh, state))
    return compiled.program(step.lower(state, batch))


def compile_evaluation(name, devices):
    mesh, trainer, state, batch = prepare(name, "device", devices)
    evaluate = jax.jit(
        sharded_evaluation(trainer, mesh),
        in_shardings=(state_sharding(mesh, state.variables), None),
    )
    return compiled.program(evaluate.lower(state.variables, batch))


@pytest.mark.networks
@pytest.mark.parametrize("batch_norm", ["global", "device"])
@pytest.mark.parametrize("name", MODELS)
def test_step(name, batch_norm):
    alone, split = (compile_step(name, batch_norm, devices) for devices in (1, 4))
    assert split.flops() == pytest.approx(alone.flops() / 4, rel=0.05)
    assert {collective.opcode for collective in split.collectives()} == {"all-reduce"}


@pytest.mark.networks
@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name):
    alone, split = (compile_evaluation(name, devices) for devices in (1, 4))
    assert split.flops() == pytest.approx(alone.flops() / 4, rel=0.05)
    assert {collective.opcode for collective in split.collectives()} == {"all-reduce"}
    assert sum(collective.bytes for collective in split.collectives()) < 100  # the metrics
