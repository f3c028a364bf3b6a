"""libtpu describes each chip, and compiles for slices of it."""

import pytest

from nonlocal_jax.compiler import topologies


@pytest.mark.parametrize(
    ("topology", "count"),
    [("v5e:1x1", 1), ("v5e:4x4", 16), ("v4:2x2x1", 4), ("v5p:2x2x2", 8), ("v6e:16x16", 256)],
)
def test_devices(topology, count):
    devices = topologies.devices(topology)
    assert len(devices) == count
    assert topologies.chip_of(devices[0]) == topologies.CHIPS[topology.split(":")[0]]


@pytest.mark.parametrize("name", topologies.CHIPS)
def test_every_slice_is_known_to_libtpu(name):
    for sizes in topologies.CHIPS[name].slices:
        assert topologies.devices(f"{name}:{sizes}")
