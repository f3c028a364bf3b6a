"""Positions split over devices: the same responses and gradients as on one device."""

import dataclasses
import functools

import chex
import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ops.operands import INSTANTIATIONS, TOY, call, make_operands, registered

from nonlocal_jax import ops
from nonlocal_jax.ops.kernels import streaming

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
DEVICES = 4
N, M, D, E = 4 * 5, 4 * 3, 7, 2
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
ROWS = P(None, "positions")
CASES = [
    ("gaussian", "dense"),
    ("gaussian", "ring"),
    ("embedded_gaussian", "auto"),
    ("embedded_gaussian", "streaming"),
    ("embedded_gaussian", "ring"),
    ("dot_product", "auto"),
    ("dot_product", "dense"),
    ("concatenation", "sorted"),
    ("concatenation", "dense"),
]
# Gathers nothing, however small.
RING = dataclasses.replace(
    streaming.KERNEL,
    name="ring",
    respond_split=functools.partial(streaming.respond_split, gathered_bytes=0),
)


@pytest.fixture(scope="module", autouse=True)
def variants():
    with registered(RING, TOY):
        yield


@pytest.fixture(scope="module")
def operands():
    return make_operands(N, M, D, E, (2,))


def respond(instantiation, implementation, operands, mask, axis_name=None):
    options = {"scale": 0.7} if instantiation == "embedded_gaussian" else {}
    options |= {"key_mask": mask, "axis_name": axis_name}
    return call(instantiation, implementation, operands, **options)


def split(function, masked=False):
    """Maps a function of operands and a mask over four devices, which split the positions."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("positions",))
    operand_specs = {"theta": ROWS, "phi": ROWS, "g": ROWS, "w_f": P()}
    specs = (operand_specs, ROWS if masked else P())
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False)


def split_respond(instantiation, implementation, masked=False):
    function = functools.partial(respond, instantiation, implementation, axis_name="positions")
    return split(function, masked)


def value_and_gradients(function, operands, mask):
    y, pull_back = jax.vjp(lambda operands: function(operands, mask), operands)
    cotangent = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
    return y, pull_back(cotangent)[0]


@functools.partial(jax.jit, static_argnums=0)
def expected_values(instantiation, operands, mask):
    function = functools.partial(respond, instantiation, "dense")
    return value_and_gradients(function, operands, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("instantiation", "implementation"), CASES)
def test_equals_one_device(instantiation, implementation, masked, operands):
    mask = None
    if masked:
        # The second device has no real key at all, and the second sample has none on any device.
        mask = jnp.ones((2, M), bool).at[0, 3:6].set(False).at[0, 7].set(False).at[1].set(False)
    function = split_respond(instantiation, implementation, masked)
    results = jax.jit(functools.partial(value_and_gradients, function))(operands, mask)
    expected = expected_values(instantiation, operands, mask)
    chex.assert_trees_all_close(results, expected, **CLOSE)
    chex.assert_tree_all_finite(results[0])


def test_a_kernel_without_a_way_to_split_gets_the_keys_of_all_devices(operands):
    y = jax.jit(split_respond("dot_product", "toy"))(operands, None)
    expected, _ = expected_values("dot_product", operands, None)
    chex.assert_trees_all_close(y, 3 * expected, **CLOSE)


def needed_collectives(instantiation, implementation, with_gradients):
    """Returns the numbers that each kind of collective must return on a device."""
    samples = 2
    part = samples * (M // DEVICES) * (D + E)  # a device's keys and values
    if implementation == "ring":
        # Each part visits the other devices; for the gradient once more, and the sums of its
        # gradients come home at last.
        hops = DEVICES - 1
        return {"collective-permute": (2 * hops + DEVICES if with_gradients else hops) * part}
    if (instantiation, implementation) == ("dot_product", "auto"):
        matrix = samples * D * E  # Σ_j φ_j g_jᵀ, and Σ_i θ_i ȳ_iᵀ for the gradients
        return {"all-reduce": 2 * matrix if with_gradients else matrix}
    if instantiation == "concatenation":
        part = samples * (M // DEVICES) * (1 + E)  # b_j and values
    needed = {"all-gather": DEVICES * part}
    if with_gradients:
        needed["reduce-scatter"] = part
        if instantiation == "concatenation":
            needed["all-reduce"] = 2 * D  # the gradient of w_f, of which each device has all
    return needed


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize(("instantiation", "implementation"), CASES)
def test_only_what_is_needed_is_communicated(
    instantiation, implementation, with_gradients, operands
):
    respond = split_respond(instantiation, implementation)

    def gradients(operands, cotangent):
        y, pull_back = jax.vjp(lambda operands: respond(operands, None), operands)
        return y, pull_back(cotangent)

    if with_gradients:
        lowered = jax.jit(gradients).lower(operands, jnp.ones((2, N, E)))
    else:
        lowered = jax.jit(respond).lower(operands, None)
    collectives = compiled.program(lowered).collectives()
    numbers = {collective.opcode: collective.bytes / 4 for collective in collectives}
    assert numbers == needed_collectives(instantiation, implementation, with_gradients)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_the_affinity_has_columns_for_the_keys_of_all_devices(instantiation, operands):
    def affinity(operands, mask, axis_name=None):
        w_f = operands["w_f"] if instantiation == "concatenation" else None
        theta, phi = operands["theta"], operands["phi"]
        return ops.affinity(instantiation, theta, phi, w_f, axis_name=axis_name)

    function = split(functools.partial(affinity, axis_name="positions"))
    expected = jax.jit(affinity)(operands, None)
    chex.assert_trees_all_close(jax.jit(function)(operands, None), expected, **CLOSE)


def test_under_pmap(operands):
    def respond_on_device(theta, phi, g):
        parts = {"theta": theta, "phi": phi, "g": g}
        return respond("embedded_gaussian", "auto", parts, None, axis_name="positions")

    rows = (operands[name] for name in ("theta", "phi", "g"))
    parts = [jnp.stack(jnp.split(x, DEVICES, axis=1)) for x in rows]
    y = jax.pmap(respond_on_device, "positions")(*parts)
    expected, _ = expected_values("embedded_gaussian", operands, None)
    chex.assert_trees_all_close(jnp.concatenate(list(y), axis=1), expected, **CLOSE)
