"""Equal to mmcv-lite's NonLocal1d, 2d and 3d with the same weights, forward and backward, live in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import mmcv_peer
from parity.mmcv_cases import CASES, compare, from_mmcv

from nonlocal_jax.layers import nonlocal_block


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_equals_mmcv(case):
    compare(case, **mmcv_peer.run(case))


def test_a_new_block_is_initialised_as_mmcv_does():
    block = nonlocal_block("concatenation", preset="mmcv")
    ours = block.init(jax.random.key(0), jnp.ones((1, 2, 2, 512)))["params"]
    theirs = from_mmcv(mmcv_peer.new_block(512))["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.std(), b.std(), rtol=0.15), ours, theirs)
