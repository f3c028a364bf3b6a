"""The block equals NonLocal1d, 2d and 3d of mmcv-lite, forward and backward."""

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
    params = jax.jit(block.init)(jax.random.key(0), jnp.ones((1, 2, 2, 512)))["params"]
    expected = from_mmcv(mmcv_peer.new_block(512))["params"]

    def assert_same_std(array, expected):
        np.testing.assert_allclose(array.std(), expected.std(), rtol=0.15)

    jax.tree.map(assert_same_std, params, expected)
