"""Names of slices are checked before anything is compiled; tests/tpu compiles."""

import jax
import pytest

from nonlocal_jax.compiler import topologies


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v5e:4x4x4", "v4:2x2", "h100:1x1", "4x4", ""])
def test_unknown_slices(name):
    with pytest.raises(ValueError, match=r"topology must be .*; got .* v5e:1x1, 2x2, 2x4, 4x4"):
        topologies.devices(name)


def test_other_devices_are_no_known_chip():
    assert topologies.chip_of(jax.devices()[0]) is None
