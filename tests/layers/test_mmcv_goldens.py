"""Equal to mmcv-lite's blocks as recorded by tests/parity/mmcv_peer.py (versions in the file);
needs no torch.
"""

from pathlib import Path

import numpy as np
import pytest
from parity.mmcv_cases import CASES, compare

GOLDENS = np.load(Path(__file__).parent.parent / "goldens" / "mmcv.npz", allow_pickle=False)


def recorded(case, key):
    """One array, or a dict of those below."""
    prefix = f"{case.name}/{key}/"
    found = {
        name.removeprefix(prefix): GOLDENS[name]
        for name in GOLDENS.files
        if name.startswith(prefix)
    }
    return found.get("", found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_equals_mmcv_as_recorded(case):
    compare(
        case, **{key: recorded(case, key) for key in ("state", "x", "z", "cotangent", "gradients")}
    )


def test_goldens_tell_their_versions():
    assert "mmcv-lite 2." in str(GOLDENS["versions"])
