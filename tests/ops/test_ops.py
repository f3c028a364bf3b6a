"""The operations against the double loop of `oracle.py`, and the laws that every instantiation obeys."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from absl.testing import parameterized

from nonlocal_jax import ops
from nonlocal_jax.ops import cost

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
PATHS = tuple(
    (instantiation, implementation)
    for instantiation, implementations in cost.IMPLEMENTATIONS.items()
    for implementation in implementations
    if implementation != "cudnn"  # tests/ops/test_cudnn.py, on a GPU
)
BATCH, N, M, D, E = 2, 7, 5, 3, 11  # all prime and distinct: swapped axes cannot pass

each_instantiation = pytest.mark.parametrize("instantiation", INSTANTIATIONS)
each_path = pytest.mark.parametrize(("instantiation", "implementation"), PATHS)


def make_inputs(dtype=jnp.float32, seed=0, batch=(BATCH,)):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"theta": (*batch, N, D), "phi": (*batch, M, D), "g": (*batch, M, E), "w_f": (2 * D,)}
    return {
        name: jax.random.normal(k, s).astype(dtype)
        for k, (name, s) in zip(keys, shapes.items(), strict=True)
    }


def respond(instantiation, theta, phi, g, w_f, **kwargs):
    """One signature for all four."""
    weights = (w_f,) if instantiation == "concatenation" else ()
    return getattr(ops, instantiation)(theta, phi, g, *weights, **kwargs)


def affinity(instantiation, theta, phi, w_f, **kwargs):
    return ops.affinity(
        instantiation, theta, phi, w_f if instantiation == "concatenation" else None, **kwargs
    )


MASK = jnp.array([[True, False, True, True, False], [False, True, True, False, False]])


class AgainstTheOracle(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    @parameterized.product(path=PATHS, masked=(False, True))
    def test_values(self, path, masked):
        instantiation, implementation = path
        inputs, mask = make_inputs(), MASK if masked else None
        y = self.variant(functools.partial(respond, instantiation, implementation=implementation))(
            **inputs, key_mask=mask
        )
        expected, _ = oracle.nonlocal_operation(instantiation, **inputs, key_mask=mask)
        chex.assert_shape(y, (BATCH, N, E))
        chex.assert_trees_all_close(y, expected.astype(np.float32), rtol=2e-5, atol=2e-6)


@each_instantiation
@pytest.mark.parametrize("masked", [False, True])
def test_affinity_equals_the_oracle_and_gives_y(instantiation, masked):
    inputs, mask = make_inputs(), MASK if masked else None
    g = inputs.pop("g")
    a = affinity(instantiation, **inputs, key_mask=mask)
    _, expected = oracle.nonlocal_operation(instantiation, g=g, **inputs, key_mask=mask)
    chex.assert_trees_all_close(a, expected.astype(np.float32), rtol=2e-5, atol=2e-6)
    y = respond(instantiation, g=g, **inputs, key_mask=mask)
    chex.assert_trees_all_close(jnp.einsum("bnm,bme->bne", a, g), y, rtol=1e-5, atol=1e-6)


@each_path
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_finite_differences_of_the_oracle(instantiation, implementation, masked):
    """Float64 on both sides: the derivative along a random direction, by central differences of the double loop."""
    mask = MASK if masked else None
    with jax.enable_x64(True):
        inputs, direction = make_inputs(jnp.float64), make_inputs(jnp.float64, seed=1)
        cotangent = jax.random.normal(jax.random.key(2), (BATCH, N, E))
        gradient = jax.grad(
            lambda inputs: jnp.vdot(
                cotangent,
                respond(instantiation, implementation=implementation, **inputs, key_mask=mask),
            )
        )(inputs)
    inputs, direction, gradient, cotangent = jax.tree.map(
        np.asarray, (inputs, direction, gradient, cotangent)
    )
    slope = sum(np.vdot(gradient[name], direction[name]) for name in inputs)

    def oracle_loss(t):
        moved = {name: inputs[name] + t * direction[name] for name in inputs}
        return np.vdot(
            cotangent, oracle.nonlocal_operation(instantiation, **moved, key_mask=mask)[0]
        )

    step = 1e-6
    np.testing.assert_allclose(
        slope, (oracle_loss(step) - oracle_loss(-step)) / (2 * step), rtol=1e-6
    )


@each_path
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_half_precision_rounds_only_the_result(instantiation, implementation, dtype, tolerance):
    inputs = make_inputs(dtype)
    y = respond(instantiation, implementation=implementation, **inputs)
    expected, _ = oracle.nonlocal_operation(instantiation, **inputs)
    chex.assert_type(y, dtype)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=1.01 * tolerance, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_sums_many_keys_in_float32(dtype):
    """4,099 equal keys: a float16 or bfloat16 running sum would stop growing at 2,048 or 256."""
    ones = jnp.ones((4099, 1), dtype)
    for y in (
        ops.dot_product(ones, ones, ones),
        ops.embedded_gaussian(ones, ones, ones),
        ops.concatenation(ones, ones, ones, jnp.ones(2, dtype)) / 2,
    ):
        np.testing.assert_allclose(np.asarray(y, np.float32), 1.0, rtol=2**-8)


def test_float16_logits_do_not_overflow():
    """θ·φ = 90,000 is beyond float16's 65,504; the softmax over it is not."""
    theta = jnp.full((1, 1), 300.0, jnp.float16)
    phi = jnp.array([[300.0], [299.0]], jnp.float16)
    y = ops.embedded_gaussian(theta, phi, jnp.array([[1.0], [5.0]], jnp.float16))
    np.testing.assert_array_equal(y, jnp.array([[1.0]], jnp.float16))


@each_path
def test_mask_equals_dropping_the_keys(instantiation, implementation):
    inputs = make_inputs(batch=())
    keep = jnp.array([0, 2, 3])
    dropped = inputs | {"phi": inputs["phi"][keep], "g": inputs["g"][keep]}
    y = respond(instantiation, implementation=implementation, **inputs, key_mask=MASK[0])
    chex.assert_trees_all_close(
        y, respond(instantiation, implementation=implementation, **dropped), rtol=1e-5, atol=1e-6
    )


@each_path
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_masked_keys_reach_neither_values_nor_gradients(instantiation, implementation, garbage):
    inputs = make_inputs()
    spoilt = inputs | {
        name: jnp.where(MASK[..., None], inputs[name], garbage) for name in ("phi", "g")
    }

    def loss(inputs):
        return jnp.sum(
            jnp.sin(respond(instantiation, implementation=implementation, **inputs, key_mask=MASK))
        )

    chex.assert_trees_all_close(loss(spoilt), loss(inputs))
    gradient = jax.grad(loss)(spoilt)
    chex.assert_tree_all_finite(gradient)
    chex.assert_trees_all_close(gradient, jax.grad(loss)(inputs))
    for name in ("phi", "g"):
        assert not gradient[name][~MASK].any()
        assert gradient[name][MASK].any()


@each_path
def test_a_query_without_keys_gets_zero(instantiation, implementation):
    inputs = make_inputs()
    mask = MASK.at[1].set(False)

    def loss(inputs):
        y = respond(instantiation, implementation=implementation, **inputs, key_mask=mask)
        return jnp.sum(y**2), y

    gradient, y = jax.grad(loss, has_aux=True)(inputs)
    chex.assert_tree_all_finite(gradient)
    assert y[0].any()
    assert not y[1].any()
    assert not affinity(
        instantiation, inputs["theta"], inputs["phi"], inputs["w_f"], key_mask=mask
    )[1].any()


@each_path
def test_queries_permute_with_their_responses_and_keys_do_not_matter(instantiation, implementation):
    inputs = make_inputs()
    y = respond(instantiation, implementation=implementation, **inputs)
    order, key_order = (
        np.random.default_rng(0).permutation(N),
        np.random.default_rng(1).permutation(M),
    )
    moved = inputs | {"theta": inputs["theta"][:, order]}
    chex.assert_trees_all_close(
        respond(instantiation, implementation=implementation, **moved),
        y[:, order],
        rtol=1e-5,
        atol=1e-6,
    )
    moved = inputs | {name: inputs[name][:, key_order] for name in ("phi", "g")}
    chex.assert_trees_all_close(
        respond(instantiation, implementation=implementation, **moved), y, rtol=1e-5, atol=1e-6
    )


@each_path
def test_linear_in_g(instantiation, implementation):
    inputs, others = make_inputs(), make_inputs(seed=1)
    both = respond(
        instantiation,
        implementation=implementation,
        **inputs | {"g": 2 * inputs["g"] - others["g"]},
    )
    separate = 2 * respond(instantiation, implementation=implementation, **inputs) - respond(
        instantiation, implementation=implementation, **inputs | {"g": others["g"]}
    )
    chex.assert_trees_all_close(both, separate, rtol=1e-4, atol=1e-5)


@each_path
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_leading_axes_are_a_batch(instantiation, implementation, batch):
    inputs = make_inputs(batch=batch)
    y = respond(instantiation, implementation=implementation, **inputs)
    chex.assert_shape(y, (*batch, N, E))
    for index in np.ndindex(batch):
        one = {name: x if name == "w_f" else x[index] for name, x in inputs.items()}
        chex.assert_trees_all_close(
            y[index],
            respond(instantiation, implementation=implementation, **one),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("instantiation", ["gaussian", "embedded_gaussian"])
def test_gaussian_rows_are_distributions_whatever_is_added_to_the_logits(instantiation):
    inputs = make_inputs()
    a = affinity(instantiation, inputs["theta"], inputs["phi"], None, key_mask=MASK)
    assert (a >= 0).all()
    assert not a[:, :, 0][1].any()
    np.testing.assert_allclose(a.sum(-1), 1.0, rtol=1e-6)
    # One more channel, 1 in θ and c in φ, adds c to every logit.
    theta = jnp.concatenate([inputs["theta"], jnp.ones((BATCH, N, 1))], -1)
    phi = jnp.concatenate([inputs["phi"], jnp.full((BATCH, M, 1), 50.0)], -1)
    chex.assert_trees_all_close(
        affinity(instantiation, theta, phi, None, key_mask=MASK), a, rtol=1e-4
    )


def test_scale_multiplies_the_logits():
    inputs = make_inputs()
    theta, phi, g = inputs["theta"], inputs["phi"], inputs["g"]
    expected, _ = oracle.nonlocal_operation("embedded_gaussian", theta, phi, g, scale=0.3)
    np.testing.assert_allclose(
        ops.embedded_gaussian(theta, phi, g, scale=0.3), expected, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        ops.affinity("embedded_gaussian", theta, phi, scale=0.3) @ g, expected, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        ops.embedded_gaussian(theta, phi, g, scale=0.3),
        ops.embedded_gaussian(0.3 * theta, phi, g),
        rtol=1e-5,
    )


theta, phi, g, w_f = (jnp.ones(s) for s in ((2, 7, 3), (2, 5, 3), (2, 5, 11), (6,)))
mask = jnp.ones((2, 5), bool)
BAD_INPUT = {
    "rank": (
        lambda: ops.dot_product(theta[0, 0], phi, g),
        ValueError,
        r"theta must have shape \(\.\.\., N, d\).*got \(3,\)",
    ),
    "ranks": (
        lambda: ops.gaussian(theta, phi[0], g),
        ValueError,
        r"same rank; got \(2, 7, 3\) and \(5, 3\)",
    ),
    "channels": (
        lambda: ops.dot_product(theta, phi[..., :2], g),
        ValueError,
        r"phi must have shape \(2, M, 3\).*got \(2, 5, 2\)",
    ),
    "gaussian's channels": (
        lambda: ops.gaussian(theta, phi[..., :2], g),
        ValueError,
        r"keys must have shape",
    ),
    "batch": (
        lambda: ops.dot_product(theta, phi[:1], g[:1]),
        ValueError,
        r"phi must have shape \(2, M, 3\).*got \(1, 5, 3\)",
    ),
    "keys": (
        lambda: ops.dot_product(theta, phi, g[:, :4]),
        ValueError,
        r"g must have shape \(2, 5, e\).*5 keys; got \(2, 4, 11\)",
    ),
    "no keys": (
        lambda: ops.dot_product(theta, phi[:, :0], g[:, :0]),
        ValueError,
        r"at least one key",
    ),
    "mask's shape": (
        lambda: ops.gaussian(theta, phi, g, key_mask=mask[:, :4]),
        ValueError,
        r"key_mask must have shape \(2, 5\).*got \(2, 4\).*pool the mask",
    ),
    "mask's dtype": (
        lambda: ops.gaussian(theta, phi, g, key_mask=mask.astype(float)),
        TypeError,
        r"key_mask must be bool.*got float",
    ),
    "dtype": (
        lambda: ops.gaussian(theta.astype(int), phi, g),
        TypeError,
        r"x must be floating point; got int",
    ),
    "w_f": (
        lambda: ops.concatenation(theta, phi, g, w_f[:3]),
        ValueError,
        r"w_f must have shape \(6,\).*got \(3,\)",
    ),
    "no w_f": (
        lambda: ops.affinity("concatenation", theta, phi),
        ValueError,
        r"needs w_f of shape \(6,\)",
    ),
    "w_f elsewhere": (
        lambda: ops.affinity("gaussian", theta, phi, w_f),
        ValueError,
        r"w_f belongs to the concatenation",
    ),
    "scale elsewhere": (
        lambda: ops.affinity("gaussian", theta, phi, scale=2.0),
        ValueError,
        r"scale belongs to the embedded",
    ),
    "scale": (
        lambda: ops.embedded_gaussian(theta, phi, g, scale=jnp.ones(5)),
        ValueError,
        r"scale must be one number; got shape \(5,\)",
    ),
    "implementation": (
        lambda: ops.dot_product(theta, phi, g, implementation="fast"),
        ValueError,
        r"dot_product must be one of 'auto', 'dense', 'reassociated'; got 'fast'",
    ),
    "instantiation": (
        lambda: ops.affinity("cosine", theta, phi),
        ValueError,
        r"instantiation must be one of 'gaussian', .*got 'cosine'",
    ),
}


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_names_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
