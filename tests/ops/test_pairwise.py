"""The operations against the double loop of `oracle.py`, and laws for every implementation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from absl.testing import parameterized
from ops.operands import (
    INSTANTIATIONS,
    call,
    cotangent,
    make_operands,
    respond,
    value_and_gradients,
)

from nonlocal_jax import ops
from nonlocal_jax.ops.kernels import KERNELS

PATHS = tuple(
    (instantiation, kernel.name)
    for instantiation in INSTANTIATIONS
    for kernel in KERNELS
    if instantiation in kernel.instantiations
    and kernel.name not in ("cudnn", "flash")  # not on CPUs: tests/ops/kernels
)
BATCH, N, M, D, E = 2, 7, 5, 3, 11  # distinct primes, so that swapped axes cannot pass
MASK = np.array([[True, False, True, True, False], [False, True, True, False, False]])
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

parametrize_instantiation = pytest.mark.parametrize("instantiation", INSTANTIATIONS)
parametrize_path = pytest.mark.parametrize(("instantiation", "implementation"), PATHS)

operands_of = functools.partial(make_operands, N, M, D, E)


@pytest.fixture(scope="module")
def operands():
    return operands_of((BATCH,))


@pytest.fixture(scope="module")
def mask():
    return jnp.asarray(MASK)


@functools.partial(jax.jit, static_argnames="instantiation")
def affinity(instantiation, theta, phi, w_f, key_mask=None):
    w_f = w_f if instantiation == "concatenation" else None
    return ops.affinity(instantiation, theta, phi, w_f, key_mask=key_mask)


class AgainstTheOracle(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    @parameterized.product(path=PATHS, masked=(False, True))
    def test_values(self, path, masked):
        instantiation, implementation = path
        operands, mask = operands_of((BATCH,)), jnp.asarray(MASK) if masked else None
        function = self.variant(functools.partial(call, instantiation, implementation))
        y = function(operands, key_mask=mask)
        expected, _ = oracle.nonlocal_operation(instantiation, **operands, key_mask=mask)
        chex.assert_shape(y, (BATCH, N, E))
        chex.assert_trees_all_close(y, expected.astype(np.float32), rtol=2e-5, atol=2e-6)


@parametrize_instantiation
@pytest.mark.parametrize("masked", [False, True])
def test_affinity_equals_the_oracle_and_gives_the_response(instantiation, masked, operands, mask):
    mask = mask if masked else None
    theta, phi, g, w_f = operands.values()
    f_over_c = affinity(instantiation, theta, phi, w_f, mask)
    _, expected = oracle.nonlocal_operation(instantiation, **operands, key_mask=mask)
    chex.assert_trees_all_close(f_over_c, expected.astype(np.float32), rtol=2e-5, atol=2e-6)
    y = value_and_gradients(instantiation, "auto", operands, mask)["y"]
    chex.assert_trees_all_close(jnp.einsum("bnm,bme->bne", f_over_c, g), y, **CLOSE)


@parametrize_path
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_finite_differences_of_the_oracle(instantiation, implementation, masked):
    """In float64: the derivative along a random direction, by central differences of the oracle."""
    mask = MASK if masked else None
    with jax.enable_x64(True):
        operands = operands_of((BATCH,), np.float64)
        results = value_and_gradients(
            instantiation, implementation, operands, None if mask is None else jnp.asarray(mask)
        )
        weights = np.asarray(cotangent(results["y"]))
        direction = jax.tree.map(np.asarray, operands_of((BATCH,), np.float64, seed=1))
    operands, results = jax.tree.map(np.asarray, (operands, results))
    slope = sum(np.vdot(results[name], direction[name]) for name in operands)

    def oracle_loss(step):
        moved = {name: operands[name] + step * direction[name] for name in operands}
        y, _ = oracle.nonlocal_operation(instantiation, **moved, key_mask=mask)
        return np.vdot(weights, y)

    step = 1e-6
    expected = (oracle_loss(step) - oracle_loss(-step)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.gpu
@parametrize_path
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_half_precision_rounds_only_the_result(instantiation, implementation, dtype, tolerance):
    operands = operands_of((BATCH,), dtype)
    y = respond(instantiation, implementation, operands)
    expected, _ = oracle.nonlocal_operation(instantiation, **operands)
    chex.assert_type(y, dtype)
    y = np.asarray(y, np.float64)
    if (implementation, dtype) == ("reassociated", jnp.bfloat16) and jax.default_backend() != "cpu":
        # φᵀ g / n is rounded as well.
        assert np.linalg.norm(y - expected) <= 1.5 * tolerance * np.linalg.norm(expected)
        return
    np.testing.assert_allclose(y, expected, rtol=1.01 * tolerance, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_sums_many_keys_in_float32(dtype):
    """Of 4,099 equal keys, a running sum in float16 stops growing at 2,048, in bfloat16 at 256."""
    operands = {name: jnp.ones((4099, 1), dtype) for name in ("theta", "phi", "g")}
    operands["w_f"] = jnp.ones(2, dtype)
    responses = (
        respond("dot_product", "auto", operands),
        respond("embedded_gaussian", "auto", operands),
        respond("concatenation", "auto", operands) / 2,
    )
    for y in responses:
        np.testing.assert_allclose(np.asarray(y, np.float32), 1.0, rtol=2**-8)


@pytest.mark.gpu
def test_float16_logits_do_not_overflow():
    """The logit θ·φ = 90,000 exceeds float16's largest number, 65,504; its softmax does not."""
    theta = jnp.full((1, 1), 300.0, jnp.float16)
    phi = jnp.array([[300.0], [299.0]], jnp.float16)
    y = ops.embedded_gaussian(theta, phi, jnp.array([[1.0], [5.0]], jnp.float16))
    np.testing.assert_array_equal(y, jnp.array([[1.0]], jnp.float16))


@parametrize_path
def test_masking_keys_equals_dropping_them(instantiation, implementation, mask):
    operands = operands_of(())
    kept = np.flatnonzero(MASK[0])
    dropped = operands | {"phi": operands["phi"][kept], "g": operands["g"][kept]}
    y = respond(instantiation, implementation, operands, mask[0])
    expected = respond(instantiation, implementation, dropped)
    chex.assert_trees_all_close(y, expected, **CLOSE)


@parametrize_path
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_masked_keys_affect_neither_values_nor_gradients(
    instantiation, implementation, garbage, operands, mask
):
    spoilt = operands | {
        name: jnp.where(MASK[..., None], operands[name], garbage) for name in ("phi", "g")
    }
    results = value_and_gradients(instantiation, implementation, spoilt, mask)
    expected = value_and_gradients(instantiation, implementation, operands, mask)
    chex.assert_tree_all_finite(results)
    chex.assert_trees_all_close(results, expected)
    for name in ("phi", "g"):
        assert not results[name][~MASK].any()
        assert results[name][MASK].any()


@parametrize_path
def test_a_query_without_keys_gets_zero(instantiation, implementation, operands, mask):
    mask = mask.at[1].set(False)
    results = value_and_gradients(instantiation, implementation, operands, mask)
    chex.assert_tree_all_finite(results)
    assert results["y"][0].any()
    assert not results["y"][1].any()
    theta, phi, _, w_f = operands.values()
    assert not affinity(instantiation, theta, phi, w_f, mask)[1].any()


@parametrize_path
def test_responses_permute_with_queries_and_ignore_the_order_of_keys(
    instantiation, implementation, operands
):
    def compute(operands):
        return value_and_gradients(instantiation, implementation, operands)["y"]

    y = compute(operands)
    order = np.random.default_rng(0).permutation(N)
    key_order = np.random.default_rng(1).permutation(M)
    permuted_queries = operands | {"theta": operands["theta"][:, order]}
    chex.assert_trees_all_close(compute(permuted_queries), y[:, order], **CLOSE)
    permuted_keys = operands | {name: operands[name][:, key_order] for name in ("phi", "g")}
    chex.assert_trees_all_close(compute(permuted_keys), y, **CLOSE)


@parametrize_path
def test_linear_in_g(instantiation, implementation, operands):
    def compute(g):
        return value_and_gradients(instantiation, implementation, operands | {"g": g})["y"]

    g, second_g = operands["g"], operands_of((BATCH,), seed=1)["g"]
    combined = 2 * compute(g) - compute(second_g)
    chex.assert_trees_all_close(compute(2 * g - second_g), combined, rtol=1e-4, atol=1e-5)


@parametrize_path
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_leading_axes_are_a_batch(instantiation, implementation, batch):
    operands = operands_of(batch)
    y = respond(instantiation, implementation, operands)
    chex.assert_shape(y, (*batch, N, E))
    for index in np.ndindex(batch):
        sample = {name: x if name == "w_f" else x[index] for name, x in operands.items()}
        expected = respond(instantiation, implementation, sample)
        chex.assert_trees_all_close(y[index], expected, **CLOSE)


@pytest.mark.parametrize("instantiation", ["gaussian", "embedded_gaussian"])
def test_gaussian_rows_are_distributions_that_ignore_an_offset_of_the_logits(
    instantiation, operands, mask
):
    theta, phi, _, _ = operands.values()
    rows = ops.affinity(instantiation, theta, phi, key_mask=mask)
    assert (rows >= 0).all()
    assert not rows[:, :, 0][1].any()
    np.testing.assert_allclose(rows.sum(-1), 1.0, rtol=1e-6)
    # One more channel, 1 in θ and 50 in φ, adds 50 to every logit.
    theta = jnp.concatenate([theta, jnp.ones((BATCH, N, 1))], -1)
    phi = jnp.concatenate([phi, jnp.full((BATCH, M, 1), 50.0)], -1)
    moved = ops.affinity(instantiation, theta, phi, key_mask=mask)
    chex.assert_trees_all_close(moved, rows, rtol=1e-4)


def test_scale_multiplies_the_logits(operands):
    theta, phi, g, _ = operands.values()
    expected, _ = oracle.nonlocal_operation("embedded_gaussian", theta, phi, g, scale=0.3)
    y = ops.embedded_gaussian(theta, phi, g, scale=0.3)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
    affinity_times_g = ops.affinity("embedded_gaussian", theta, phi, scale=0.3) @ g
    np.testing.assert_allclose(affinity_times_g, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(y, ops.embedded_gaussian(0.3 * theta, phi, g), rtol=1e-5)


@parametrize_instantiation
def test_docstrings_describe_every_argument(instantiation):
    documentation = getattr(ops, instantiation).__doc__
    assert "{shared}" not in documentation
    assert "\nReturns:\n" in documentation
    assert "\n    key_mask: Mask (..., M) of bool" in documentation
    assert max(map(len, documentation.splitlines())) <= 100
