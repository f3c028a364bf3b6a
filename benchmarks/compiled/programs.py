"""Compiles a case for devices that need not exist."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

import nonlocal_jax as nl
from benchmarks.cases import POSITIONS
from benchmarks.compiled.cases import ATTENTION, CLIPS, OURS, Case
from benchmarks.plain_flax import PlainI3D
from nonlocal_jax import training
from nonlocal_jax.compiler import gpu, topologies
from nonlocal_jax.training.capacity import compile_step
from nonlocal_jax.types import Instantiation

Tree = Any
DTYPE = jnp.bfloat16


def compile_case(case: Case) -> Any:
    """Returns the `jax.stages.Compiled` of a case."""
    options: dict[str, Any] | None = None
    if case.platform == "gpu":
        devices, options = gpu.h100(), gpu.COMPILER_OPTIONS
    else:
        devices = topologies.devices(case.topology)
    if case.section == "training":
        return _training_step(case, devices, options)
    function, arguments = {"operation": _operation, "block": _block, "inference": _inference}[
        case.section
    ](case)
    sharding = SingleDeviceSharding(devices[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    return jax.jit(function).lower(*placed).compile(compiler_options=options)


def _operation(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    assert case.size is not None
    n, m, d = case.size
    theta, phi, g = (_array(case.batch, rows, d) for rows in (n, m, m))
    arguments = [theta, phi, g]
    if case.subject == "concatenation":
        arguments.append(_array(2 * d))
    if case.competitor == ATTENTION:
        operation: Callable[..., Any] = _attention
    else:
        operation = functools.partial(getattr(nl.ops, case.subject), implementation=case.competitor)
    if case.direction == "forward":
        return operation, tuple(arguments)
    return _with_gradients(operation), (theta, *arguments)  # ȳ has the shape of θ


def _attention(theta: jax.Array, phi: jax.Array, g: jax.Array) -> jax.Array:
    heads = (x[:, :, None] for x in (theta, phi, g))
    return jax.nn.dot_product_attention(*heads, scale=1.0)[:, :, 0]


def _block(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    assert case.size is not None
    n, m, d = case.size
    block = nl.layers.nonlocal_block(
        cast(Instantiation, case.subject),
        subsample=m < n,
        implementation=case.competitor,
        dtype=DTYPE,
    )
    x = _array(case.batch, *POSITIONS[n], 2 * d)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    if case.direction == "forward":
        return block.apply, (variables, x)

    def step(z_bar: jax.Array, statistics: Tree, params: Tree, x: jax.Array) -> Any:
        def train(params: Tree, x: jax.Array) -> Any:
            variables = {"params": params, "batch_stats": statistics}
            return block.apply(variables, x, train=True, mutable=["batch_stats"])

        z, pull, updated = jax.vjp(train, params, x, has_aux=True)
        return z, pull(z_bar), updated

    return step, (x, variables["batch_stats"], variables["params"], x)


def _with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    def value_and_gradients(cotangent: jax.Array, *inputs: jax.Array) -> Any:
        y, pull = jax.vjp(function, *inputs)
        return y, pull(cotangent)

    return value_and_gradients


def _inference(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    model, shape = _network(case)
    clips = _array(case.batch, *shape)
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return model.apply, (jax.eval_shape(model.init, jax.random.key(0), example), clips)


def _training_step(
    case: Case, devices: list[jax.Device], compiler_options: dict[str, Any] | None
) -> Any:
    model, shape = _network(case)
    trainer = training.Trainer(
        training.classification(model),
        optax.sgd(0.01, momentum=0.9, nesterov=True),
        batch_norm="device",
    )
    batch = {
        "inputs": _array(case.batch, *shape),
        "labels": jax.ShapeDtypeStruct((case.batch,), jnp.int32),
    }
    mesh = training.make_mesh(devices=devices)
    return compile_step(trainer, mesh, "replicated", batch, compiler_options=compiler_options)


def _network(case: Case) -> tuple[Any, tuple[int, ...]]:
    """Returns a network, and the shape of one of its inputs."""
    if case.subject == "cifar":
        return nl.models.cifar_resnet(20, {"res2": (1,)}, dtype=DTYPE), (32, 32, 3)
    clip, frames = CLIPS[case.subject]
    shape = frames, 224, 224, 3
    if case.competitor == OURS:
        model = nl.models.video_resnet(50, "i3d_3x1x1", 5, clip, dropout=0.0, dtype=DTYPE)
        return model, shape
    return PlainI3D(clip, "paper", dtype=DTYPE), shape


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, DTYPE)
