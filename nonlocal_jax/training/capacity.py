"""Compiles the training step for devices that need not exist, and finds what fits into them."""

import re
from typing import Any

import jax
from jax.sharding import Mesh

from nonlocal_jax.training.compilation import sharded_step
from nonlocal_jax.training.losses import Batch
from nonlocal_jax.training.mesh import Placement, shapes, state_sharding
from nonlocal_jax.training.step import Trainer, TrainState, batch_size

Tree = Any
# What a program needs, in the two sentences of XLA:TPU that say that it is too much.
_NEEDED = re.compile(r"(?:temporaries \(|Used )([\d.]+)([KMG])")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class TooLargeError(Exception):
    """A step needs more memory than a device has.

    Attributes:
        needed: Bytes that it needs, or None if the compiler does not say.
    """

    def __init__(self, needed: float | None) -> None:
        super().__init__(needed)
        self.needed = needed


def state_shapes(trainer: Trainer, batch: Batch) -> TrainState:
    """Returns the shapes of the state before the first step."""
    example = resize(batch, 1)
    state: TrainState = jax.eval_shape(trainer.init, jax.random.key(0), example)
    return state


def resize(batch: Batch, examples: int) -> Tree:
    """Returns the shapes of a batch with another number of examples."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype), batch)


def compile_step(
    trainer: Trainer,
    mesh: Mesh,
    placement: Placement,
    batch: Batch,
    *,
    compiler_options: dict[str, Any] | None = None,
) -> Any:
    """Compiles the training step for the devices of a mesh.

    Args:
        trainer: What a step does.
        mesh: The devices.
        placement: Where the state lies.
        batch: A batch of all processes together, or the shapes and dtypes of its arrays.
        compiler_options: Options of XLA, such as `compiler.gpu.COMPILER_OPTIONS`.

    Returns:
        The `jax.stages.Compiled`.

    Raises:
        TooLargeError: If the devices are TPUs with too little memory. Other compilers do not say.
        ValueError: If the batch cannot be split over the devices.
    """
    state = state_shapes(trainer, batch)
    step = sharded_step(trainer, mesh, state_sharding(mesh, state, placement))
    lowered = step.lower(state, shapes(batch, mesh, trainer.split_over_positions(batch)))
    try:
        return lowered.compile(compiler_options=compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = _NEEDED.search(str(error))
        needed = float(match[1]) * _UNITS[match[2]] if match else None
        raise TooLargeError(needed) from error


def batch_unit(trainer: Trainer, mesh: Mesh) -> int:
    """Returns the number that a batch size must be a multiple of, on all devices together."""
    return int(mesh.shape["data"] * trainer.accumulate)


def forecast_largest_batch(
    examples: int, *, fixed: int, used: int | float, memory: int | float
) -> int:
    """Forecasts how many examples fit, given that some need `used` bytes on a device.

    Memory is assumed to grow in proportion to the batch, beyond the `fixed` bytes of the state.

    >>> forecast_largest_batch(64, fixed=10, used=90, memory=50)
    32
    """
    return int(examples * (memory - fixed) / (used - fixed))


def largest_batch(
    trainer: Trainer,
    mesh: Mesh,
    placement: Placement,
    batch: Batch,
    *,
    fixed: int,
    used: int,
    memory: float,
) -> int:
    """Finds the largest batch whose step fits, given that the step of `batch` does.

    The largest batch that fits by `forecast_largest_batch` is compiled, and smaller ones until one
    fits. The number of examples on a device is rounded down to three significant bits, such as 7,
    14 or 448.

    Args:
        trainer: What a step does.
        mesh: The devices.
        placement: Where the state lies.
        batch: A batch that fits, or the shapes and dtypes of its arrays.
        fixed: Bytes on a device that do not depend on the batch, those of the state.
        used: Bytes on a device that the step of `batch` needs.
        memory: Bytes that a device has.

    Returns:
        The number of examples on all devices together.
    """
    unit = batch_unit(trainer, mesh)
    fitting = batch_size(batch)
    units = forecast_largest_batch(fitting, fixed=fixed, used=used, memory=memory) // unit
    while (units := _round_down(units)) * unit > fitting:
        try:
            compile_step(trainer, mesh, placement, resize(batch, units * unit))
        except TooLargeError:
            units -= 1
        else:
            return units * unit
    return fitting


def _round_down(number: int) -> int:
    """Rounds a number down to one with at most three significant bits.

    >>> [_round_down(number) for number in (3, 7, 9, 31, 32203)]
    [3, 7, 8, 28, 28672]
    """
    unit = 1 << max(number.bit_length() - 3, 0)
    return number // unit * unit
