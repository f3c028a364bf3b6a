"""Which devices hold what: a mesh with the axes `data` and `positions`, and the step compiled for it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nonlocal_jax.training.precise_bn import moments
from nonlocal_jax.training.step import (
    Batch,
    Metrics,
    Trainer,
    TrainState,
    evaluation_step,
    train_step,
)

Tree = Any
Placement = Literal["replicated", "sharded"]
INPUTS = PartitionSpec("data", "positions")
SMALLEST_SHARDED = 1 << 12  # numbers of a leaf; a smaller one is replicated


def make_mesh(positions: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices as (data, positions).

    Args:
        positions: devices among which the positions of one example are split, for models that can (`Trainer.model`).
        devices: None is all.

    Raises:
        ValueError: `positions` does not divide their number.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'positions': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if positions < 1 or len(devices) % positions:
        raise ValueError(
            f"positions must divide the number of devices, {len(devices)}; got {positions}."
        )
    return Mesh(np.array(devices).reshape(-1, positions), ("data", "positions"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def state_sharding(mesh: Mesh, state: Tree, placement: Placement = "replicated") -> Tree:
    """Where each leaf of a state lies.

    Args:
        mesh: of `make_mesh`.
        state: arrays or their shapes.
        placement: "replicated" has all of it on every device; "sharded" splits every large leaf along its longest axis that
            `data` divides, optimiser state and averages like the parameters (ZeRO, FSDP).
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    if placement == "replicated":
        return jax.tree.map(lambda _: replicated, state)
    if placement != "sharded":
        raise ValueError(f"placement must be 'replicated' or 'sharded'; got {placement!r}.")
    parts = mesh.shape["data"]

    def of_leaf(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, n in enumerate(leaf.shape) if n % parts == 0]
        if leaf.size < SMALLEST_SHARDED or not divisible:
            return replicated
        longest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(of_leaf, state)


def fetch(tree: Tree, mesh: Mesh) -> Tree:
    """NumPy arrays of a state or a part of it, whole, on every process, wherever their parts lie; every process must ask.

    >>> mesh = make_mesh()
    >>> fetch({"mean": jnp.arange(3)}, mesh)
    {'mean': array([0, 1, 2], dtype=int32)}
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.device_get(jax.jit(lambda x: x, out_shardings=everywhere)(tree))


def put(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch on its devices, of which this process has the rows that `local_rows` says; "inputs" are also split over
    `positions`, along the axis after the examples, of which every process has all.

    Raises:
        ValueError: the positions do not split over the mesh.
    """
    sharding, parts = batch_sharding(mesh), mesh.shape["positions"]
    if parts > 1 and batch["inputs"].shape[1] % parts:
        raise ValueError(
            f"the positions of an example must split over {parts} devices; got {batch['inputs'].shape[1]} of them."
        )

    def place(name: str, x: Any) -> jax.Array:
        x = np.asarray(x)
        if name != "inputs" or parts == 1:
            return jax.make_array_from_process_local_data(sharding, x)
        examples = jax.make_array_from_process_local_data(sharding, np.arange(len(x))).shape[0]
        return jax.make_array_from_process_local_data(
            NamedSharding(mesh, INPUTS), x, (examples, *x.shape[1:])
        )

    return {name: place(name, x) for name, x in batch.items()}


def local_rows(batch_size: int, mesh: Mesh) -> range:
    """The rows of a batch of all processes that this one holds.

    Raises:
        ValueError: the batch does not split over the mesh.

    >>> local_rows(8, make_mesh())
    range(0, 8)
    """
    parts = mesh.shape["data"]
    if batch_size < 1 or batch_size % parts:
        raise ValueError(f"the batch must split over {parts} devices; got {batch_size} examples.")
    of_devices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    bounds = [
        index[0].indices(batch_size)[:2] for index in of_devices.values() if index is not None
    ]
    return range(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def sharded_step(trainer: Trainer, mesh: Mesh, shardings: Tree) -> Any:
    """The step of `train_step`, to be compiled for a mesh; the state that it is given is consumed.

    Args:
        trainer: what to do.
        mesh: of `make_mesh`.
        shardings: of the state, by `state_sharding`.

    Returns:
        A jitted function of a state and of a batch of all devices, which gives the state after and the metrics.
    """
    trainer, axes = _of_mesh(trainer, mesh)
    if trainer.batch_norm == "device":
        step: Any = functools.partial(train_step, trainer, axis_name="data")
    else:
        step = functools.partial(train_step, trainer, shards=mesh.shape["data"])
    step, replicated = _on_each_device(step, mesh, axes), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step,
        in_shardings=(shardings, None),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )


def sum_of_evaluations(
    trainer: Trainer, mesh: Mesh
) -> Callable[[Tree, Iterable[tuple[Batch]]], Metrics]:
    """`evaluation_step` summed over the batches of a mesh: a function of variables and of tuples (batch,)."""
    trainer, axes = _of_mesh(trainer, mesh)
    return _sum(
        _on_each_device(functools.partial(evaluation_step, trainer), mesh, axes - {"data"}), mesh
    )


def sum_of_moments(
    trainer: Trainer, mesh: Mesh
) -> Callable[[TrainState, Iterable[tuple[Batch, int]]], Tree]:
    """`precise_bn.moments` summed over the batches of a mesh: a function of the state and of pairs (batch, step)."""
    trainer, axes = _of_mesh(trainer, mesh)
    axis_name = "data" if trainer.batch_norm == "device" else None
    return _sum(
        _on_each_device(functools.partial(moments, trainer, axis_name=axis_name), mesh, axes), mesh
    )


def _of_mesh(trainer: Trainer, mesh: Mesh) -> tuple[Trainer, set[str]]:
    """The trainer, its model as it runs on this mesh, and the axes along which each device works by itself.

    Along the others XLA splits the work.
    """
    parts = mesh.shape["positions"]
    if trainer.positions not in (None, "positions") or (parts > 1 and trainer.positions is None):
        raise ValueError(
            f"the model must split positions over the mesh's axis 'positions', of {parts} device(s), by its attribute "
            f"axis_name='positions'; got {trainer.positions!r}."
        )
    if trainer.positions and parts == 1:
        model: Any = trainer.model
        trainer = dataclasses.replace(trainer, model=model.clone(axis_name=None))
    of_norms = {"data"} if trainer.batch_norm == "device" else set()
    return trainer, of_norms | ({"positions"} if trainer.positions else set())


def _on_each_device(
    function: Callable[..., Tree], mesh: Mesh, axes: set[str]
) -> Callable[..., Tree]:
    """`function`, whose second argument is a batch, on each device by itself along some axes."""
    if not axes:
        return function
    axes = axes | {name for name, size in mesh.shape.items() if size == 1}

    def kept(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(axis if axis in axes else None for axis in spec))

    def on_each(first: Any, batch: Batch, *rest: Any) -> Tree:
        of_batch = {
            name: kept(INPUTS if name == "inputs" else PartitionSpec("data")) for name in batch
        }
        specs = (PartitionSpec(), of_batch, *[PartitionSpec()] * len(rest))
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(),
            axis_names=axes,
            check_vma=False,
        )
        return mapped(first, batch, *rest)

    return on_each


def _sum(
    function: Callable[..., Tree], mesh: Mesh
) -> Callable[[Any, Iterable[tuple[Any, ...]]], Tree]:
    replicated = NamedSharding(mesh, PartitionSpec())

    def add(total: Tree, *arguments: Any) -> Tree:
        return jax.tree.map(jnp.add, total, function(*arguments))

    jitted = jax.jit(add, out_shardings=replicated, donate_argnums=0)

    def over(fixed: Any, batches: Iterable[tuple[Any, ...]]) -> Tree:
        """The sum hangs on the one before, so no two computations between devices run at once, for which XLA on CPU has
        too few threads.
        """
        total = None
        for batch, *rest in batches:
            arguments = (fixed, put(batch, mesh), *rest)
            if total is None:
                shapes = jax.eval_shape(function, *arguments)
                total = jax.device_put(
                    jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), replicated
                )
            total = jitted(total, *arguments)
        return total

    return over
