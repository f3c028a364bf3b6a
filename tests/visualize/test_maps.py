"""Rows, largest weights and summaries are those of the map that the block itself gives, whichever positions it sums."""

import dataclasses
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from visualize.networks import OneBlock, TwoBlocks, clips, with_weights

import nonlocal_jax as nl
from nonlocal_jax.visualize import NoBlocksError, affinities, measures

MODULE = importlib.import_module("nonlocal_jax.visualize.maps")
INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def by_itself(block, model, variables, x):
    """(B, queries, keys) of zeros and, where keys are summed, what the block gives as its map."""
    sown = model.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]["block"][
        "operation"
    ]["affinity"][0]
    sown, operation, (t, h, w) = np.asarray(sown), block.operation, x.shape[1:-1]
    window = operation.subsampling((t, h, w))
    keys = (t // window[0], h // window[1], w // window[2])
    out = np.zeros((x.shape[0], t, h, w, *keys))
    if operation.axes == "space":
        for i in range(t):
            out[:, i, :, :, i] = sown[:, i].reshape(-1, h, w, *keys[1:])
    elif operation.axes == "time":
        for n in range(h * w):
            out[:, :, n // w, n % w, :, n // w, n % w] = sown[:, n]
    elif operation.group_size:
        size, of_keys = operation.group_size, operation.group_size // window[0]
        for i in range(t // size):
            part = sown[:, i].reshape(-1, size, h, w, of_keys, *keys[1:])
            out[:, i * size : (i + 1) * size, :, :, i * of_keys : (i + 1) * of_keys] = part
    else:
        out[:] = sown.reshape(out.shape)
    return out.reshape(x.shape[0], t * h * w, -1), keys


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, False),
        ({"axes": "space"}, False),
        ({"axes": "time"}, False),
        ({"group_size": 2}, False),
        ({"subsample": (2, 1, 3)}, True),
    ],
    ids=["spacetime", "space", "time", "groups", "masked"],
)
def test_all_of_it_is_the_blocks_own_map(instantiation, options, masked, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 9, 6))
    block = nl.layers.nonlocal_block(instantiation, **options)
    model = OneBlock(block, masked)
    variables = model.init(jax.random.key(1), x)
    monkeypatch.setattr(MODULE, "CHUNK", 2 * 50 * 7)  # several chunks, the last one smaller
    (one,) = affinities(model, variables, x).values()
    expected, keys = by_itself(block, model, variables, x)
    assert (one.queries, one.keys, one.batch) == ((4, 5, 9), keys, 2)

    close = {"rtol": 1e-4, "atol": 2e-6}
    every = np.stack(np.unravel_index(np.arange(180), one.queries), axis=-1)
    chosen = [171, 3, 88, 3]
    some = every[chosen]
    np.testing.assert_allclose(one.rows(some).reshape(2, 4, -1), expected[:, chosen], **close)
    np.testing.assert_allclose(one[1].rows(every)[0].reshape(180, -1), expected[1], **close)

    k = min(3, one.summed)
    for queries, rows in ((None, expected), (some, expected[:, chosen])):
        weights, positions = one.top(k, queries)
        np.testing.assert_allclose(
            np.abs(weights), np.sort(np.abs(rows), axis=-1)[..., ::-1][..., :k], **close
        )
        flat = np.ravel_multi_index(tuple(np.moveaxis(positions, -1, 0)), keys)
        np.testing.assert_allclose(np.take_along_axis(rows, flat, axis=-1), weights, **close)

    # The summaries, from the whole map at once.
    total = np.abs(expected).sum(-1, keepdims=True)
    s = np.abs(expected) / np.where(total == 0, 1, total)
    np.testing.assert_allclose(
        measures.entropy(one).reshape(2, 180),
        -(s * np.log(np.where(s > 0, s, 1))).sum(-1),
        rtol=1e-4,
        atol=1e-5,
    )
    by_time = s.reshape(2, 4, 45, keys[0], -1).sum(-1).mean(2)
    np.testing.assert_allclose(measures.time_by_time(one), by_time, **close)
    dependence = measures.query_dependence(one)
    flat = np.arange(180)
    of_sum = {"space": flat // 45, "time": flat % 45}.get(
        options.get("axes"), flat // 90 if "group_size" in options else 0 * flat
    )
    for clip in range(2):
        cosine, divergence = [], []
        for queries in (of_sum == i for i in np.unique(of_sum)):
            rows = s[clip][queries & (total[clip, :, 0] > 0)]
            unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
            n, mean = len(rows), rows.sum(0) / max(len(rows), 1)
            cosine.append((1 - unit @ unit.T).sum() / (n * (n - 1)) if n > 1 else 0)
            divergence.append(
                np.mean([(r[r > 0] * np.log(r[r > 0] / mean[r > 0])).sum() for r in rows])
                if n
                else 0
            )
        np.testing.assert_allclose(dependence.cosine[clip], np.mean(cosine), **close)
        np.testing.assert_allclose(dependence.jensen_shannon[clip], np.mean(divergence), **close)
    received = measures.received(one)
    assert received.shape == (2, *keys)
    if not options:
        np.testing.assert_allclose(received.reshape(2, -1), s.mean(1) * s.shape[-1], **close)


def test_rows_of_zeros_stay_zeros():
    """The concatenation's ReLU may leave nothing."""
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 5, 4))
    model = OneBlock(nl.layers.nonlocal_block("concatenation"))
    variables = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(1), x))
    (one,) = affinities(model, variables, x).values()
    assert not one.rows((0, 0, 0)).any()
    assert not measures.entropy(one).any()
    assert measures.query_dependence(one).cosine.tolist() == [0]
    assert not measures.time_by_time(one).any()


@pytest.mark.parametrize("axes", ["spacetime", "space", "time"])
def test_maps_that_are_uniform_are_of_no_query(axes):
    """All weights 0: each query looks at all keys alike that are not masked."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 9, 6))
    model = OneBlock(
        nl.layers.nonlocal_block("embedded_gaussian", axes=axes, subsample=False), masked=True
    )
    variables = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(1), x))
    (one,) = affinities(model, variables, x).values()
    mask = np.asarray(model.mask(x))
    np.testing.assert_allclose(measures.received(one), mask, rtol=1e-5)
    real = {"spacetime": (1, 2, 3), "space": (2, 3), "time": (1,)}[axes]
    np.testing.assert_array_equal(
        one.counted(), np.broadcast_to(mask.sum(axis=real, keepdims=True), one.counted().shape)
    )
    there = one.counted() > 0
    np.testing.assert_allclose(
        np.exp(measures.entropy(one))[there], one.counted()[there], rtol=1e-5
    )
    dependence = measures.query_dependence(one)
    np.testing.assert_allclose([*dependence.cosine, *dependence.jensen_shannon], 0, atol=1e-6)


def test_of_many_pairs_only_what_is_asked_for_is_kept():
    """12,544 × 12,544 float32 numbers would be 629 MB; the arrays that are alive stay below a fiftieth of that."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 56, 56, 4))
    model = OneBlock(nl.layers.nonlocal_block("embedded_gaussian", subsample=False))
    variables = model.init(jax.random.key(1), x)
    before = sum(array.nbytes for array in jax.live_arrays())
    (one,) = affinities(model, variables, x).values()
    row = one.rows([(0, 0, 0), (3, 55, 55)])
    weights, positions = one.top(20, [(i, i, i) for i in range(4)])
    assert row.shape == (1, 2, 4, 56, 56)
    assert weights.shape == (1, 4, 20)
    assert positions.shape == (1, 4, 20, 3)
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 12e6
    with pytest.raises(
        ValueError,
        match=r"queries must be at most 4,096 at once; got 10,000\. Ask for them in parts, or for `top`",
    ):
        one.rows(np.zeros((10_000, 3), int))


@pytest.mark.usefixtures("as_users_see_it")
def test_bad_input():
    x = clips()
    model = TwoBlocks()
    variables = with_weights(model, x)
    with pytest.raises(NoBlocksError, match="the model must have non-local blocks; Dense has none"):
        affinities(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), x), x)
    with pytest.raises(ValueError, match="blocks must be among first, second; got 'third'"):
        affinities(model, variables, x, blocks=["first", "third"])
    with pytest.raises(
        ValueError,
        match=r"clip must have shape \(B, \*positions, C\), as the model takes it; got \(12, 20\)",
    ):
        affinities(model, variables, x[0, 0, :, :, 0])
    network = nl.models.video_resnet(
        (1, 1, 1, 1), "c2d", {"res3": (0,)}, clip="32x2", preset="caffe2", num_classes=3
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 32, 3)))
    of_network = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    with pytest.raises(
        ValueError, match=r"clip must have at least \d+ frames of \d+×\d+ pixels .* got 8 of 2×32"
    ):
        affinities(network, of_network, jnp.zeros((1, 8, 2, 32, 3)))
    one = affinities(model, variables, x)["first"]
    assert len(repr(one)) < 200
    large = dataclasses.replace(one, keys=(64, 128, 128))
    with pytest.raises(
        ValueError,
        match=r"rows must hold at most 1,024 MiB; those of 200 queries of 2 clips hold 1,600",
    ):
        large.rows(np.zeros((200, 3), int))
    with pytest.raises(TypeError, match="float"):
        one.top(2.5)
    with pytest.raises(
        IndexError, match=r"a query must lie inside the map \(4, 6, 10\) of first; got \(0, 6, 0\)"
    ):
        one.rows([(0, 0, 0), (0, 6, 0)])
    with pytest.raises(
        ValueError,
        match=r"queries must be integers, \(Q, 3\) positions of the map \(4, 6, 10\); got float64",
    ):
        one.rows((0.5, 0, 0))
    with pytest.raises(
        ValueError,
        match=r"k must be from 1 to 60, the keys that each position of first sums; got 61",
    ):
        one.top(61)
    with pytest.raises(IndexError, match="clip must be one of the 2 of the batch; got 2"):
        one[2]
    with pytest.raises(
        ValueError,
        match=r"affinities must be finite; those of first at \(0, 0, 0\) are NaN or infinity",
    ):
        affinities(model, variables, x.at[1].set(jnp.nan))["first"].rows((0, 0, 0))
    split = nl.layers.nonlocal_block("dot_product", axis_name="i")
    with pytest.raises(ValueError, match="block must not be split over devices; got axis_name='i'"):
        affinities(OneBlock(split), OneBlock(split).init(jax.random.key(0), x), x)
