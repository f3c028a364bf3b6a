"""A preview of a run: devices, memory and sharding, without running a step."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nonlocal_jax.training.compilation import sharded_step
from nonlocal_jax.training.loop import Options
from nonlocal_jax.training.losses import Batch
from nonlocal_jax.training.mesh import put, state_sharding
from nonlocal_jax.training.step import Trainer

Tree = Any
LARGEST = 8  # parameters whose sharding is listed


def dry_run(trainer: Trainer, options: Options, mesh: Mesh, batch: Batch) -> str:
    """Describes devices, the sharding of the state and the needs of a step.

    The step is compiled, and nothing is run.

    Args:
        trainer: What a step does.
        options: Options of the run.
        mesh: Devices.
        batch: This process's rows of one batch.

    Returns:
        Lines to print.
    """
    example = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch)
    state = jax.eval_shape(trainer.init, jax.random.key(0), example)
    shardings = state_sharding(mesh, state, options.placement)
    device_batch = put(batch, mesh, trainer.split_over_positions(batch))
    step = sharded_step(trainer, mesh, shardings).lower(state, device_batch).compile()
    lines = [
        *_run_lines(options, mesh, device_batch),
        *_state_lines(state, shardings),
        *_step_lines(step),
        "the largest parameters:",
        *_parameter_lines(state.params, shardings.params),
    ]
    return "\n".join(lines)


def _run_lines(options: Options, mesh: Mesh, batch: Batch) -> Iterator[str]:
    device = mesh.devices.flat[0]
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    yield (
        f"devices: {mesh.size} ({device.platform}, {device.device_kind}) as {shape}, "
        f"{jax.process_count()} process(es)"
    )
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    yield f"batch: {', '.join(f'{_name(path)} {x.dtype} {x.shape}' for path, x in leaves)}"
    yield (
        f"steps: {options.steps:,}, evaluated every {options.evaluate_every:,}, "
        f"saved every {options.save_every:,}"
    )


def _state_lines(state: Tree, shardings: Tree) -> Iterator[str]:
    yield f"parameters: {sum(leaf.size for leaf in jax.tree.leaves(state.params)):,}"
    device_megabytes = _bytes(state, shardings) / 1e6
    yield f"state: {_bytes(state) / 1e6:,.1f} MB, {device_megabytes:,.1f} MB of it on each device"


def _step_lines(step: Any) -> Iterator[str]:
    memory, cost = step.memory_analysis(), step.cost_analysis() or {}
    operations = cost.get("flops", math.nan) / 1e9
    yield f"operations of a step on each device, as XLA counts them: {operations:,.2f} GFLOP"
    yield (
        "memory of a step on each device, as XLA plans it: "
        f"{memory.temp_size_in_bytes / 1e6:,.1f} MB in addition to state and batch"
    )


def _parameter_lines(params: Tree, shardings: Tree) -> Iterator[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    placed = list(zip(leaves, jax.tree.leaves(shardings), strict=True))
    placed.sort(key=lambda item: -item[0][1].size)
    for (path, leaf), sharding in placed[:LARGEST]:
        split = ", ".join(
            f"axis {axis} over {mesh_axis}"
            for axis, mesh_axis in enumerate(sharding.spec)
            if mesh_axis
        )
        placement = split or "replicated"
        yield f"  {_name(path):<40} {leaf.dtype} {leaf.shape!s:<22} {placement}"


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _bytes(tree: Tree, shardings: Tree | None = None) -> int:
    """Counts the bytes of a tree, or with `shardings` those of its part on one device."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.shape for leaf in leaves]
    if shardings is not None:
        placed = zip(jax.tree.leaves(shardings), shapes, strict=True)
        shapes = [sharding.shard_shape(shape) for sharding, shape in placed]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True)
    )
