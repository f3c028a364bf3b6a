"""Damaged configurations in a file of weights state nothing, or raise a documented error."""

import pytest
from damage import mutation
from weights.test_configurations import LONG, PLACES, mmaction2, slowfast

from nonlocal_jax.weights.configurations import read_configuration


@pytest.mark.parametrize("names", ["slowfast", "mmaction2"])
def test_damaged_configurations(names, tmp_path, mutated_files):
    text = slowfast() if names == "slowfast" else mmaction2(LONG)

    def read(path):
        damaged = path.read_bytes().decode("latin1")
        try:
            read_configuration(damaged, names, "i3d_3x1x1", PLACES)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error  # as `architecture` does

    path = tmp_path / "weights.pyth"
    found = mutation.outcomes(read, path, text.encode(), mutated_files, (ValueError,))
    assert found.total() == mutated_files
    assert found["read"] > mutated_files / 2
