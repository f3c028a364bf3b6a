"""A preview of a run: devices, memory, sharding and speed, without running a step."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from nonlocal_jax.compiler import programs, topologies
from nonlocal_jax.compiler.programs import Cost
from nonlocal_jax.compiler.topologies import Chip
from nonlocal_jax.training.capacity import (
    TooLargeError,
    batch_unit,
    compile_step,
    forecast_largest_batch,
    largest_batch,
    state_shapes,
)
from nonlocal_jax.training.loop import Options
from nonlocal_jax.training.losses import Batch
from nonlocal_jax.training.mesh import state_sharding
from nonlocal_jax.training.step import Trainer, batch_size

Tree = Any
LARGEST = 8  # parameters whose sharding is listed


def dry_run(trainer: Trainer, options: Options, mesh: Mesh, batch: Batch) -> Iterator[str]:
    """Describes devices, the sharding of the state and the needs of a step.

    The step is compiled, and nothing is run. The devices need not exist:
    `nonlocal_jax.compiler.topologies.devices("v5e:4x4")` are compiled for wherever libtpu is
    installed. For TPUs, the compiler's estimate of the time is described as well, and the largest
    batch that fits, for which the step is compiled again at least once.

    Args:
        trainer: What a step does.
        options: Options of the run.
        mesh: The devices.
        batch: A batch of all processes together, or the shapes and dtypes of its arrays.

    Yields:
        Lines to print.

    Raises:
        ValueError: If the batch cannot be split over the devices, or they are TPUs with too little
            memory for a step.

    >>> import flax.linen as nn, jax.numpy as jnp, optax
    >>> from nonlocal_jax import training
    >>> class Linear(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, *, train=False):
    ...         return nn.Dense(3)(x)
    >>> trainer = training.Trainer(training.classification(Linear()), optax.sgd(0.1))
    >>> batch = {"inputs": jnp.ones((8, 5)), "labels": jnp.zeros(8, jnp.int32)}
    >>> lines = dry_run(trainer, training.Options(100), training.make_mesh(), batch)
    >>> [line for line in lines if line.startswith("parameters")]
    ['parameters: 18']
    """
    state = state_shapes(trainer, batch)
    shardings = state_sharding(mesh, state, options.placement)
    yield from _run_lines(options, mesh, batch)
    yield from _state_lines(state, shardings)
    yield "the largest parameters:"
    yield from _parameter_lines(state.params, shardings.params)
    chip = topologies.chip_of(mesh.devices.flat[0])
    try:
        step = compile_step(trainer, mesh, options.placement, batch)
    except TooLargeError as error:
        raise ValueError(
            _does_not_fit(
                error.needed,
                chip,
                batch_size(batch),
                batch_unit(trainer, mesh),
                fixed=_bytes(state, shardings),
            )
        ) from error
    cost = programs.cost(step)
    yield from _step_lines(step, cost, chip)
    if chip is None:
        return
    yield from _speed_lines(cost, chip, batch_size(batch))
    largest = largest_batch(
        trainer,
        mesh,
        options.placement,
        batch,
        fixed=_bytes(state, shardings),
        used=cost.arguments + cost.temporary,
        memory=chip.memory,
    )
    parts = mesh.shape["data"]
    yield f"largest batch that fits: {largest:,}, {largest // parts:,} on each of {parts:,}"


def _run_lines(options: Options, mesh: Mesh, batch: Batch) -> Iterator[str]:
    devices = mesh.devices.flat
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    processes = len({device.process_index for device in devices})
    yield (
        f"devices: {mesh.size} ({devices[0].platform}, {devices[0].device_kind}) as {shape}, "
        f"{processes} process(es)"
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


def _step_lines(step: Any, cost: Cost, chip: Chip | None) -> Iterator[str]:
    flops = cost.flops if chip else (step.cost_analysis() or {}).get("flops", math.nan)
    yield f"operations of a step on each device, as XLA counts them: {flops / 1e9:,.2f} GFLOP"
    memory = f", of {chip.memory / 1e6:,.0f} MB" if chip else ""
    yield (
        "memory of a step on each device, as XLA plans it: "
        f"{cost.temporary / 1e6:,.1f} MB in addition to state and batch, "
        f"{(cost.arguments + cost.temporary) / 1e6:,.1f} MB with them{memory}"
    )
    collectives = ", ".join(
        f"{collective.count} × {collective.opcode} of {collective.bytes / 1e6:,.1f} MB in all"
        for collective in cost.collectives
    )
    yield f"communication between devices: {collectives or 'none'}"


def _speed_lines(cost: Cost, chip: Chip, examples: int) -> Iterator[str]:
    seconds = cost.cycles / chip.clock
    kinds = sorted(cost.cycles_by_kind.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{kind} {1e3 * cycles / chip.clock:,.1f}" for kind, cycles in kinds)
    yield (
        f"time of a step, by the compiler's estimates: {1e3 * seconds:,.1f} ms ({parts}), "
        f"which is {examples / seconds:,.0f} examples per second on all devices"
    )
    yield (
        f"that is {cost.flops / chip.flops / seconds:.1%} of the peak of the matrix units; the "
        f"traffic of {cost.traffic / 1e9:,.1f} GB takes at least "
        f"{1e3 * cost.traffic / chip.bandwidth:,.1f} ms"
    )
    if cost.unestimated:
        yield f"without an estimate, and not part of the time: {cost.unestimated} instructions"


def _does_not_fit(
    needed: float | None, chip: Chip | None, examples: int, unit: int, fixed: int
) -> str:
    message = f"a step must fit into the memory of each device; got a batch of {examples:,}"
    if needed is not None and chip is not None:
        message += (
            f", which needs {needed / 1e9:,.1f} GB, {(needed - chip.memory) / 1e9:,.1f} GB more "
            "than there are"
        )
        fitting = forecast_largest_batch(examples, fixed=fixed, used=needed, memory=chip.memory)
        if fitting >= unit:
            message += f". About {fitting // unit * unit:,} would fit"
    return (
        f"{message}. What saves memory: a smaller batch, remat, accumulate, more devices, or clips "
        "split over the mesh's axis 'positions'."
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
