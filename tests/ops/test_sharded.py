"""Positions split over devices: the same responses and gradients as on one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nonlocal_jax import ops
from nonlocal_jax.ops import sharded
from nonlocal_jax.types import Instantiation

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="four devices are absent")
DEVICES = 4
N, M, D, E = 4 * 5, 4 * 3, 7, 2
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
INSTANTIATIONS = Instantiation.__args__
# What each takes by itself, what is asked for, and whether the ring is forced.
CASES = [
    ("gaussian", "dense", False),
    ("gaussian", "streaming", True),
    ("embedded_gaussian", "auto", False),
    ("embedded_gaussian", "streaming", False),
    ("embedded_gaussian", "streaming", True),
    ("dot_product", "auto", False),
    ("dot_product", "dense", False),
    ("concatenation", "sorted", False),
    ("concatenation", "dense", False),
]


def inputs(batch=(2,)):
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = ((*batch, N, D), (*batch, M, D), (*batch, M, E), (2 * D,))
    return [jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]


def call(name, implementation, theta, phi, g, w_f, mask, axis_name=None):
    extra = (w_f,) if name == "concatenation" else ()
    options = {"scale": 0.7} if name == "embedded_gaussian" else {}
    y = getattr(ops, name)(
        theta,
        phi,
        g,
        *extra,
        key_mask=mask,
        implementation=implementation,
        axis_name=axis_name,
        **options,
    )
    return y


def split(name, implementation, masked):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("positions",))
    rows, mask = P(None, "positions"), P(None, "positions") if masked else P()
    return jax.shard_map(
        lambda *arrays: call(name, implementation, *arrays, axis_name="positions"),
        mesh=mesh, in_specs=(rows, rows, rows, P(), mask), out_specs=rows, check_vma=False,
    )  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "implementation", "ring"), CASES)
def test_equals_one_device(name, implementation, ring, masked, monkeypatch):
    monkeypatch.setattr(sharded, "GATHERED_BYTES", 0 if ring else 1 << 40)
    *arrays, w_f = inputs()
    # The second device has no real key at all, and the second sample has none on any.
    mask = (
        jnp.ones((2, M), bool).at[0, 3:6].set(False).at[0, 7].set(False).at[1].set(False)
        if masked
        else None
    )
    cotangent = jax.random.normal(jax.random.key(9), (2, N, E))

    def value_and_gradients(function):
        y, pull = jax.vjp(lambda *a: function(*a, mask), *arrays, w_f)
        return y, pull(cotangent)

    def on_one(*a):
        return call(name, "dense", *a)

    got = jax.jit(lambda: value_and_gradients(split(name, implementation, masked)))()
    chex.assert_trees_all_close(got, value_and_gradients(on_one), **CLOSE)
    assert np.isfinite(np.asarray(got[0])).all()


def test_only_what_must_crosses_between_devices():
    """Of the dot product a sum of d×e; of the ring never the keys of all devices."""
    *arrays, w_f = inputs(batch=(1,))
    text = jax.jit(split("dot_product", "auto", False)).lower(*arrays, w_f, None).as_text()
    assert "all_gather" not in text
    assert f"tensor<{D}x{E}xf32>" in text.split("all_reduce", 1)[1]


def test_the_ring_never_holds_all_keys(monkeypatch):
    monkeypatch.setattr(sharded, "GATHERED_BYTES", 0)
    *arrays, w_f = inputs()
    function = split("embedded_gaussian", "streaming", False)
    text = (
        jax.jit(jax.grad(lambda *a: function(*a, w_f, None).sum(), argnums=(0, 1, 2)))
        .lower(*arrays)
        .as_text()
    )
    assert "collective_permute" in text
    assert "all_gather" not in text


@pytest.mark.parametrize("name", INSTANTIATIONS)
def test_the_map_has_the_columns_of_all_devices(name):
    theta, phi, _, w_f = inputs()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("positions",))
    extra = (w_f,) if name == "concatenation" else ()
    rows = P(None, "positions")
    function = jax.shard_map(
        lambda theta, phi: ops.affinity(name, theta, phi, *extra, axis_name="positions"),
        mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False,
    )  # fmt: skip
    chex.assert_trees_all_close(
        jax.jit(function)(theta, phi), ops.affinity(name, theta, phi, *extra), **CLOSE
    )


def test_under_pmap_too():
    *arrays, w_f = inputs()
    expected = call("embedded_gaussian", "dense", *arrays, w_f, None)
    parts = [jnp.stack(jnp.split(x, DEVICES, axis=1)) for x in arrays]
    got = jax.pmap(
        lambda *a: call("embedded_gaussian", "auto", *a, w_f, None, axis_name="positions"),
        "positions",
    )(*parts)
    chex.assert_trees_all_close(jnp.concatenate(list(got), axis=1), expected, **CLOSE)
