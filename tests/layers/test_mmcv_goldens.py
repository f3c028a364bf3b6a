"""Blocks equal mmcv-lite's, as recorded by tests/parity/mmcv_peer.py; torch is not needed."""

from pathlib import Path

import numpy as np
import pytest
from parity.mmcv_cases import CASES, compare

GOLDENS = np.load(Path(__file__).parent.parent / "goldens" / "mmcv.npz", allow_pickle=False)


def recorded(case, key):
    """One recorded array, or a dict of those whose names start with the key."""
    prefix = f"{case.name}/{key}/"
    names = [name for name in GOLDENS.files if name.startswith(prefix)]
    arrays = {name.removeprefix(prefix): GOLDENS[name] for name in names}
    return arrays.get("", arrays)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_equals_mmcv_as_recorded(case):
    keys = ("state", "x", "z", "cotangent", "gradients")
    compare(case, **{key: recorded(case, key) for key in keys})


def test_goldens_record_their_versions():
    assert "mmcv-lite 2." in str(GOLDENS["versions"])
