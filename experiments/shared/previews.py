"""What --dry-run prints."""

from typing import Any

import jax
from jax.sharding import Mesh

import nonlocal_jax as nl
from nonlocal_jax import training
from nonlocal_jax.compiler import topologies


def check(dry_run: bool, topology: str | None) -> None:
    """Checks the options of a preview.

    Raises:
        ValueError: A topology is given without a dry run.
    """
    if topology is not None and not dry_run:
        raise ValueError(f"--topology must come with --dry-run; got {topology} alone.")


def make_mesh(topology: str | None) -> Mesh:
    """Returns the devices of a slice of TPUs, or with None those of this machine.

    Raises:
        ImportError: libtpu is required and not installed.
        ValueError: There is no such slice.
    """
    return training.make_mesh(devices=None if topology is None else topologies.devices(topology))


def preview(
    trainer: training.Trainer,
    options: training.Options,
    mesh: Mesh,
    model: Any,
    batch: dict[str, jax.ShapeDtypeStruct],
) -> None:
    """Prints what would be trained, and what a step needs on the devices of a mesh.

    Args:
        trainer: What a step does.
        options: Options of the run.
        mesh: The devices. If they are those of this machine, the memory of each block is printed.
        model: The network.
        batch: Shapes of a batch of all processes together, with "inputs".

    Raises:
        ValueError: The batch cannot be split over the devices, or a step does not fit.
    """
    shape = batch["inputs"].shape
    print(nl.models.cost(model, shape))
    if mesh.devices.flat[0] in jax.devices():
        print(*nl.plan(shape, model), sep="\n")
    for line in training.dry_run(trainer, options, mesh, batch):
        print(line, flush=True)
