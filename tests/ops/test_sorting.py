"""Sorts of packed integers."""

import chex
import jax
import numpy as np
import pytest

from nonlocal_jax.ops import sorting


@pytest.mark.parametrize("sort_bits", [32, 64])
@pytest.mark.parametrize(("width", "size"), [(3, 5), (16, 70_000), (32, 1), (32, 3000)])
def test_argsort_is_stable_whether_or_not_values_fit_beside_the_index(sort_bits, width, size):
    values = np.random.default_rng(0).integers(0, 1 << width, size, np.uint32)
    values[1::3] = values[0]
    rows = jax.jit(lambda x: sorting.argsort(x, sort_bits, width))(values)
    chex.assert_trees_all_equal(rows, np.argsort(values, kind="stable").astype(np.int32))
