"""What a run would do, before it does it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nonlocal_jax.training.loop import Options
from nonlocal_jax.training.mesh import put, sharded_step, state_sharding
from nonlocal_jax.training.step import Batch, Trainer

LARGEST = 8  # leaves whose place is shown


def dry_run(trainer: Trainer, options: Options, mesh: Mesh, batch: Batch) -> str:
    """Devices, where the state lies, and what a step needs; the step is compiled, and nothing is run.

    Args:
        trainer: what a step does.
        options: of the run.
        mesh: the devices.
        batch: this process's rows of one.

    Returns:
        Lines to print.
    """
    example = {name: jnp.zeros((1, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    shapes = jax.eval_shape(trainer.init, jax.random.key(0), example)
    shardings = state_sharding(mesh, shapes, options.placement)
    on_devices = put(batch, mesh)
    compiled = sharded_step(trainer, mesh, shardings).lower(shapes, on_devices).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    device = mesh.devices.flat[0]
    split = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"devices: {mesh.size} ({device.platform}, {device.device_kind}) as {split}, {jax.process_count()} process(es)",
        f"batch: {', '.join(f'{name} {x.dtype} {x.shape}' for name, x in on_devices.items())}",
        f"steps: {options.steps:,}, evaluated every {options.evaluate_every:,}, saved every {options.save_every:,}",
        f"parameters: {sum(leaf.size for leaf in jax.tree.leaves(shapes.params)):,}",
        f"state: {_bytes(shapes) / 1e6:,.1f} MB, {_bytes(shapes, shardings) / 1e6:,.1f} MB of it on each device",
        f"a step, by XLA's count: {cost.get('flops', math.nan) / 1e9:,.2f} G floating-point operations on each device",
        f"memory of a step on each device, as XLA plans it: {memory.temp_size_in_bytes / 1e6:,.1f} MB beside state and batch",
        "the largest parameters:",
    ]
    placed = zip(
        jax.tree_util.tree_leaves_with_path(shapes.params),
        jax.tree.leaves(shardings.params),
        strict=True,
    )
    for (path, leaf), sharding in sorted(placed, key=lambda item: -item[0][1].size)[:LARGEST]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        where = ", ".join(
            f"axis {axis} over {mesh_axis}"
            for axis, mesh_axis in enumerate(sharding.spec)
            if mesh_axis
        )
        lines.append(
            f"  {name:<40} {leaf.dtype} {leaf.shape!s:<22} {where or 'whole on each device'}"
        )
    return "\n".join(lines)


def _bytes(shapes: Any, shardings: Any = None) -> int:
    """Of a tree in all, or with `shardings` of its part on one device."""
    leaves = jax.tree.leaves(shapes)
    parts = [leaf.shape for leaf in leaves]
    if shardings is not None:
        parts = [
            sharding.shard_shape(shape)
            for sharding, shape in zip(jax.tree.leaves(shardings), parts, strict=True)
        ]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(parts, leaves, strict=True)
    )
