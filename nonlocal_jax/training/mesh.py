"""Device placement: a mesh with the axes `data` and `positions`, and what lies where on it."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nonlocal_jax import checks
from nonlocal_jax.training.losses import Batch

Tree = Any
Placement = Literal["replicated", "sharded"]
EXAMPLES = PartitionSpec("data")
EXAMPLES_AND_POSITIONS = PartitionSpec("data", "positions")
MIN_SHARDED_SIZE = 1 << 12  # elements; below, collectives cost more than the memory they save


def make_mesh(positions: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices as a mesh (data, positions).

    Args:
        positions: Number of devices among which the positions of one example are split. More than 1
            requires a model that can do so, such as `video_resnet(axis_name="positions")`.
        devices: Devices of the mesh; None takes all.

    Raises:
        ValueError: If `positions` does not divide the number of devices.

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
    """Returns the sharding that splits examples over `data`."""
    return NamedSharding(mesh, EXAMPLES)


def state_sharding(
    mesh: Mesh,
    state: Tree,
    placement: Placement = "replicated",
    *,
    min_size: int = MIN_SHARDED_SIZE,
) -> Tree:
    """Returns the sharding of every leaf of a state.

    Args:
        mesh: Mesh of `make_mesh`.
        state: Tree of arrays or of their shapes.
        placement: "replicated" puts everything on every device; "sharded" splits each large leaf
            along its longest axis that `data` divides, optimiser state and averages like the
            parameters (ZeRO, FSDP).
        min_size: Number of elements from which a leaf is split.
    """
    checks.one_of("placement", placement, ("replicated", "sharded"))
    replicated = NamedSharding(mesh, PartitionSpec())
    if placement == "replicated":
        return jax.tree.map(lambda _: replicated, state)
    parts = mesh.shape["data"]

    def leaf_sharding(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if leaf.size < min_size or not divisible:
            return replicated
        longest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(leaf_sharding, state)


def fetch(tree: Tree, mesh: Mesh) -> Tree:
    """Returns a tree as complete NumPy arrays on every process, wherever its parts lie.

    Every process must call it.

    >>> mesh = make_mesh()
    >>> fetch({"mean": jax.numpy.arange(3)}, mesh)
    {'mean': array([0, 1, 2], dtype=int32)}
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.device_get(jax.jit(lambda x: x, out_shardings=replicated)(tree))


def put(batch: Batch, mesh: Mesh, split: Tree | None = None) -> Tree:
    """Puts a batch on the devices of a mesh.

    Args:
        batch: Tree of arrays with the rows that `local_rows` assigns to this process.
        mesh: Mesh of `make_mesh`.
        split: Tree of bool like `batch`: True for leaves whose second axis is split over
            `positions` as well, of which every process holds all.
            `Trainer.split_over_positions` returns it. None splits no leaf.

    Returns:
        A tree of global arrays.

    Raises:
        ValueError: If the positions cannot be split evenly over the mesh.
    """
    sharding, parts = batch_sharding(mesh), mesh.shape["positions"]

    def place(x: Any, is_split: bool) -> jax.Array:
        x = np.asarray(x)
        if not is_split or parts == 1:
            return jax.make_array_from_process_local_data(sharding, x)
        _check_positions(x.shape[1], mesh)
        # The local rows alone do not tell how many examples all processes have together.
        examples = jax.make_array_from_process_local_data(sharding, np.arange(len(x))).shape[0]
        split_sharding = NamedSharding(mesh, EXAMPLES_AND_POSITIONS)
        shape = (examples, *x.shape[1:])
        return jax.make_array_from_process_local_data(split_sharding, x, shape)

    if split is None:
        split = jax.tree.map(lambda _: False, batch)
    return jax.tree.map(place, batch, split)


def shapes(batch: Batch, mesh: Mesh, split: Tree | None = None) -> Tree:
    """Returns the shapes and the shardings of the global arrays that `put` makes.

    Args:
        batch: Tree of arrays, or of their shapes and dtypes, of all processes together.
        mesh: Mesh of `make_mesh`. Its devices need not exist on this machine.
        split: As for `put`.

    Raises:
        ValueError: If examples or positions cannot be split evenly over the mesh.
    """

    def shape(x: Any, is_split: bool) -> jax.ShapeDtypeStruct:
        _check_examples(x.shape[0], mesh)
        if is_split:
            _check_positions(x.shape[1], mesh)
        spec = EXAMPLES_AND_POSITIONS if is_split else EXAMPLES
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    if split is None:
        split = jax.tree.map(lambda _: False, batch)
    return jax.tree.map(shape, batch, split)


def local_rows(batch_size: int, mesh: Mesh) -> range:
    """Returns the rows of a global batch that this process holds.

    Raises:
        ValueError: If the batch cannot be split evenly over the mesh.

    >>> local_rows(8, make_mesh())
    range(0, 8)
    """
    _check_examples(batch_size, mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size)[:2] for index in indices if index is not None]
    return range(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def _check_examples(examples: int, mesh: Mesh) -> None:
    parts = mesh.shape["data"]
    if examples < 1 or examples % parts:
        raise ValueError(f"the batch must split over {parts} devices; got {examples} examples.")


def _check_positions(positions: int, mesh: Mesh) -> None:
    parts = mesh.shape["positions"]
    if positions % parts:
        raise ValueError(
            f"the positions of an example must split over {parts} devices; got {positions}."
        )
