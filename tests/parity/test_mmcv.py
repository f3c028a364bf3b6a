"""Equal to mmcv-lite's NonLocal1d, 2d and 3d with the same weights, forward and backward, live in torch."""

from parity import mmcv_peer
import pytest
from parity.mmcv_cases import CASES, compare


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_equals_mmcv(case):
    compare(case, **mmcv_peer.run(case))
