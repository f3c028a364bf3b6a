"""The concatenation by sorted keys: ties, offsets, and projections that are not finite."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.operands import (
    assert_equal_to_dense,
    make_operands,
    registered,
    respond,
    sorted_row,
    value_and_gradients,
)

BATCH, N, M, E = 3, 41, 29, 34

VARIANTS = (
    sorted_row("sorted_tiny", leaf=2, block=3, lookup_numbers=7 * E),
    sorted_row("sorted_batched", leaf=2, block=3, sort_bits=32, sequential=False),
)

compute = functools.partial(respond, "concatenation")


@pytest.fixture(scope="module", autouse=True)
def variants():
    with registered(*VARIANTS):
        yield


@pytest.fixture
def operands():
    """Operands of one channel with weights 1, so that a is θ and b is φ."""
    return make_operands(N, M, 1, E, (BATCH,)) | {"w_f": jnp.ones(2)}


@pytest.mark.parametrize(
    "values", ["ties", "all_equal", "all_kept", "none_kept", "integers_at_the_kink"]
)
def test_equal_to_dense_with_ties(values, operands):
    """The derivative of the ReLU at 0 is 0 in both."""
    theta, phi = operands["theta"], operands["phi"]
    theta, phi = {
        "ties": (jnp.round(theta), jnp.round(phi)),
        "all_equal": (0 * theta - 1, 0 * phi + 1),
        "all_kept": (theta + 9, phi),
        "none_kept": (theta - 9, phi),
        "integers_at_the_kink": (-jnp.round(5 * theta), jnp.round(5 * phi)),
    }[values]
    operands |= {"theta": theta, "phi": phi}
    assert_equal_to_dense("concatenation", "sorted_tiny", operands)


@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_dense_with_the_settings_of_a_tpu(masked, operands):
    """All samples at once, and sorts of 32-bit integers."""
    mask = jnp.ones((BATCH, M), bool).at[0, 3:].set(False).at[1].set(False) if masked else None
    assert_equal_to_dense("concatenation", "sorted_batched", operands, mask)


def test_an_offset_costs_no_precision():
    """With 1,000 added to all b and subtracted from all a, prefix sums of b·g lose 3 digits."""
    operands = make_operands(300, 200, 1, E, (BATCH,)) | {"w_f": jnp.ones(2)}
    theta, phi = (jnp.round(operands[name] * 1024) / 1024 for name in ("theta", "phi"))
    y = compute("sorted", operands | {"theta": theta, "phi": phi})
    for offset in (1e3, -1e3):
        moved = operands | {"theta": theta - offset, "phi": phi + offset}
        np.testing.assert_allclose(compute("sorted", moved), y, atol=1e-5)


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_a_key_without_a_finite_projection_shows(spoil, operands):
    """A NaN that is sorted to one end might not reach the output.

    The definition's response is not finite either.
    """
    operands["phi"] = operands["phi"].at[1, 3].set(spoil)
    y, dense = compute("sorted", operands), compute("dense", operands)
    assert not jnp.isfinite(dense[1]).any()
    assert jnp.isnan(y[1]).all()
    chex.assert_trees_all_close(y[::2], dense[::2], rtol=1e-5, atol=1e-6)


def test_projections_of_minus_infinity_are_left_out_as_by_the_definition(operands):
    operands["phi"] = operands["phi"].at[1, 3].set(-np.inf)
    operands["theta"] = operands["theta"].at[0, 2].set(-np.inf)
    y = compute("sorted", operands)
    chex.assert_trees_all_close(y, compute("dense", operands), rtol=1e-5, atol=1e-6)
    assert not y[0, 2].any()


def test_nothing_is_scattered(operands):
    lowered = value_and_gradients.lower("concatenation", "sorted", operands).as_text()
    assert not re.search(r"stablehlo\.scatter", lowered)
    duplicates = jax.jit(jax.grad(lambda x: jnp.sum(x[jnp.array([0, 0])])))
    assert "stablehlo.scatter" in duplicates.lower(jnp.ones(3)).as_text()  # the search can find one
