"""Equal to mmcv-lite's NonLocal1d, 2d and 3d with the same weights, forward and backward, live in torch."""

import pytest
from parity import mmcv_peer
from parity.mmcv_cases import CASES, compare


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_equals_mmcv(case):
    compare(case, **mmcv_peer.run(case))
