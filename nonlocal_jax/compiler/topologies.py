"""Slices of TPUs, as devices to compile for without having them.

libtpu, which is on PyPI for Linux, compiles for every TPU on a machine that has none.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """Published figures of one chip.

    Attributes:
        device_kind: Its name in JAX.
        clock: Cycles per second at which its matrix units reach `flops`.
        flops: Peak FLOPs per second of bfloat16 products.
        bandwidth: Bytes per second of its main memory.
        memory: Bytes of its main memory that a program may use, as libtpu says when one needs
            more.
        slices: Sizes of the slices that can be compiled for.
    """

    device_kind: str
    clock: float
    flops: float
    bandwidth: float
    memory: float
    slices: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
# Google Cloud's documentation of each version.
CHIPS = {
    "v4": Chip("TPU v4", 1.05e9, 275e12, 1228e9, 30.75 * 2**30, _DEEP),
    "v5e": Chip("TPU v5 lite", 1.5e9, 197e12, 819e9, 15.75 * 2**30, _FLAT),
    "v5p": Chip("TPU v5", 1.75e9, 459e12, 2765e9, 95.74 * 2**30, _DEEP),
    "v6e": Chip("TPU v6 lite", 1.75e9, 918e12, 1640e9, 31.25 * 2**30, _FLAT),
}


def devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a slice of TPUs: to compile for, but not to run on.

    Args:
        topology: A chip and the sizes of its slice, such as "v5e:4x4".

    Raises:
        ValueError: If there is no such slice.
        ImportError: If libtpu is not installed.
    """
    name, _, sizes = topology.partition(":")
    if name not in CHIPS or sizes not in CHIPS[name].slices:
        slices = "; ".join(f"{name}:{', '.join(chip.slices)}" for name, chip in CHIPS.items())
        raise ValueError(
            f"topology must be a chip and the sizes of a slice, such as v5e:4x4; got {topology!r}. "
            f"The chips and their slices are {slices}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"compiling for {topology} requires libtpu, which is not installed: "
            f"pip install 'jax[tpu]=={jax.__version__}'."
        )
    _set_environment()
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if set(sizes) <= set("1x"):  # one chip of a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    if name == "v4":  # each device is a chip with both of its cores, as on a machine that has one
        options["chip_config_name"] = "megacore"
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return list(description.devices)


def chip_of(device: jax.Device) -> Chip | None:
    """Returns the chip of a device, or None if it is not a TPU of `CHIPS`."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device.device_kind), None)


def _set_environment() -> None:
    """Tells libtpu not to look for a TPU, on a machine that has none."""
    if list(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists():
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile
