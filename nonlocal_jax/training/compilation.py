"""Functions of a trainer compiled for a mesh: the training step, and sums over many batches."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nonlocal_jax.training.losses import Batch, Metrics
from nonlocal_jax.training.mesh import EXAMPLES, EXAMPLES_AND_POSITIONS, put
from nonlocal_jax.training.precise_bn import moments
from nonlocal_jax.training.step import Trainer, TrainState, evaluation_step, train_step

Tree = Any


def sharded_step(trainer: Trainer, mesh: Mesh, shardings: Tree) -> Any:
    """Returns `train_step` jitted for a mesh. Its state argument is donated.

    The result is cached: the same trainer, mesh and shardings do not compile again.

    Args:
        trainer: What a step does.
        mesh: Mesh of `make_mesh`.
        shardings: Shardings of the state, from `state_sharding`.

    Returns:
        A jitted function of a state and a global batch, which returns the next state and the
        metrics.
    """
    leaves, structure = jax.tree.flatten(shardings)
    return _sharded_step(trainer, mesh, structure, tuple(leaves))


@functools.lru_cache(maxsize=8)
def _sharded_step(
    trainer: Trainer, mesh: Mesh, structure: Any, leaves: tuple[NamedSharding, ...]
) -> Any:
    shardings = jax.tree.unflatten(structure, leaves)
    trainer, axes = _adapt_to_mesh(trainer, mesh)
    if trainer.batch_norm == "device":
        step: Any = functools.partial(train_step, trainer, axis_name="data")
    else:
        step = functools.partial(train_step, trainer, shards=mesh.shape["data"])
    return jax.jit(
        _map_over_devices(step, trainer, mesh, axes),
        in_shardings=(shardings, None),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def compiled(function: Any, *arguments: Tree) -> Any:
    """Compiles a jitted function for arguments like these, or returns it from a cache."""
    leaves, structure = jax.tree.flatten(arguments)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type)
        for x in leaves
    ]
    return _compiled(function, structure, tuple(shapes))


@functools.lru_cache(maxsize=8)
def _compiled(function: Any, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    return function.lower(*jax.tree.unflatten(structure, shapes)).compile()


def sum_of_evaluations(
    trainer: Trainer, mesh: Mesh
) -> Callable[[Tree, Iterable[tuple[Batch]]], Metrics]:
    """Returns a function that sums `evaluation_step` over the batches of a mesh.

    The function takes variables and an iterable of tuples (batch,).
    """
    return _sum_of_evaluations(trainer, mesh)


@functools.lru_cache(maxsize=8)
def _sum_of_evaluations(trainer: Trainer, mesh: Mesh) -> Any:
    return _sum(sharded_evaluation(trainer, mesh), _adapt_to_mesh(trainer, mesh)[0], mesh)


def sharded_evaluation(trainer: Trainer, mesh: Mesh) -> Callable[[Tree, Batch], Metrics]:
    """Returns `evaluation_step` for a mesh, a function of variables and a global batch."""
    trainer, axes = _adapt_to_mesh(trainer, mesh)
    step = functools.partial(evaluation_step, trainer)
    return _map_over_devices(step, trainer, mesh, axes - {"data"})


def sum_of_moments(
    trainer: Trainer, mesh: Mesh
) -> Callable[[TrainState, Iterable[tuple[Batch, int]]], Tree]:
    """Returns a function that sums `precise_bn.moments` over the batches of a mesh.

    The function takes a state and an iterable of pairs (batch, step).
    """
    return _sum_of_moments(trainer, mesh)


@functools.lru_cache(maxsize=8)
def _sum_of_moments(trainer: Trainer, mesh: Mesh) -> Any:
    trainer, axes = _adapt_to_mesh(trainer, mesh)
    axis_name = "data" if trainer.batch_norm == "device" else None
    function = functools.partial(moments, trainer, axis_name=axis_name)
    return _sum(_map_over_devices(function, trainer, mesh, axes), trainer, mesh)


def _adapt_to_mesh(trainer: Trainer, mesh: Mesh) -> tuple[Trainer, set[str]]:
    """Adapts a trainer to a mesh, and names the axes that `jax.shard_map` must map.

    Along the other axes XLA splits the work.
    """
    parts, axis_name = mesh.shape["positions"], trainer.axis_name
    if axis_name not in (None, "positions") or (parts > 1 and axis_name is None):
        raise ValueError(
            f"the model must split positions over the mesh's axis 'positions', of {parts} "
            f"device(s), by its attribute axis_name='positions'; got {axis_name!r}."
        )
    if axis_name and parts == 1:
        loss: Any = trainer.loss
        trainer = dataclasses.replace(trainer, loss=loss.without_axis())
    axes = {"data"} if trainer.batch_norm == "device" else set()
    return trainer, axes | ({"positions"} if trainer.axis_name else set())


def _map_over_devices(
    function: Callable[..., Tree], trainer: Trainer, mesh: Mesh, axes: set[str]
) -> Callable[..., Tree]:
    """Maps `function`, whose second argument is a batch, over the devices along some axes."""
    if not axes:
        return function
    axes = axes | {name for name, size in mesh.shape.items() if size == 1}

    def leaf_spec(is_split: bool) -> PartitionSpec:
        spec = EXAMPLES_AND_POSITIONS if is_split else EXAMPLES
        return PartitionSpec(*(axis if axis in axes else None for axis in spec))

    def mapped(first: Any, batch: Batch, *arguments: Any) -> Tree:
        batch_specs = jax.tree.map(leaf_spec, trainer.split_over_positions(batch))
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(PartitionSpec(), batch_specs, *[PartitionSpec()] * len(arguments)),
            out_specs=PartitionSpec(),
            axis_names=axes,
            check_vma=False,
        )(first, batch, *arguments)

    return mapped


def _sum(
    function: Callable[..., Tree], trainer: Trainer, mesh: Mesh
) -> Callable[[Any, Iterable[tuple[Any, ...]]], Tree]:
    """Returns a function that sums `function(fixed, *arguments)` over tuples of arguments."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def add(total: Tree, *arguments: Any) -> Tree:
        return jax.tree.map(jnp.add, total, function(*arguments))

    jitted = jax.jit(add, out_shardings=replicated, donate_argnums=0)

    def sum_over(fixed: Any, batches: Iterable[tuple[Any, ...]]) -> Tree:
        # Each sum depends on the one before, so no two computations with collectives run at once:
        # XLA on CPU has too few threads for that and would deadlock.
        total = None
        for batch, *numbers in batches:
            device_batch = put(batch, mesh, trainer.split_over_positions(batch))
            arguments = (fixed, device_batch, *numbers)
            if total is None:
                shapes = jax.eval_shape(function, *arguments)
                zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
                total = jax.device_put(zeros, replicated)
            total = jitted(total, *arguments)
        return total

    return sum_over
