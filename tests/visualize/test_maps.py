"""Rows, largest weights and summaries equal those of the map that the block itself sows."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from visualize.networks import OneBlock, TwoBlocks, clips, column_mask, random_variables

import nonlocal_jax as nl
from nonlocal_jax.visualize import NoBlocksError, affinities, measures

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
LAYOUTS = {
    "spacetime": {},
    "space": {"axes": "space"},
    "time": {"axes": "time"},
    "groups": {"group_size": 2},
    "masked": {"subsample": (2, 1, 3)},
}
SHAPE = (2, 4, 5, 9, 6)
QUERIES = 4 * 5 * 9


class AllBlocks(nn.Module):
    """Blocks of every pairwise function and layout on one input, so that they are compiled once."""

    @nn.compact
    def __call__(self, x):
        for instantiation in INSTANTIATIONS:
            for layout, options in LAYOUTS.items():
                name = f"{instantiation}_{layout}"
                block = nl.layers.nonlocal_block(instantiation, name=name, **options)
                block(x, mask=column_mask(x) if layout == "masked" else None)


@pytest.fixture(scope="module")
def all_maps():
    """The maps of all blocks, and what each block sows as its affinity."""
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    model = AllBlocks()
    variables = random_variables(model, x)
    maps = affinities(model, variables, x)

    @jax.jit
    def sown(variables, x):
        intermediates = model.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]
        return {name: block["operation"]["affinity"][0] for name, block in intermediates.items()}

    return maps, jax.tree.map(np.asarray, sown(variables, x))


def dense_map(sown, options, keys):
    """Returns (B, queries, keys): what the block sowed where keys are summed, 0 elsewhere."""
    batch, t, h, w, _ = SHAPE
    dense = np.zeros((batch, t, h, w, *keys))
    if options.get("axes") == "space":
        for i in range(t):
            dense[:, i, :, :, i] = sown[:, i].reshape(-1, h, w, *keys[1:])
    elif options.get("axes") == "time":
        for n in range(h * w):
            dense[:, :, n // w, n % w, :, n // w, n % w] = sown[:, n]
    elif size := options.get("group_size"):
        for i in range(t // size):
            group = slice(i * size, (i + 1) * size)
            dense[:, group, :, :, group] = sown[:, i].reshape(-1, size, h, w, size, *keys[1:])
    else:
        dense[:] = sown.reshape(dense.shape)
    return dense.reshape(batch, QUERIES, -1)


def dense_dependence(shares, sum_ids):
    """Returns cosine distance and divergence of one clip by definition, from all pairs of rows."""
    cosines, divergences = [], []
    for index in np.unique(sum_ids):
        rows = shares[(sum_ids == index) & (shares.sum(axis=-1) > 0)]
        n = len(rows)
        unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        cosines.append((1 - unit @ unit.T).sum() / (n * (n - 1)) if n > 1 else 0)
        mean = rows.sum(axis=0) / max(n, 1)
        informations = [(r[r > 0] * np.log(r[r > 0] / mean[r > 0])).sum() for r in rows]
        divergences.append(np.mean(informations) if n else 0)
    return np.mean(cosines), np.mean(divergences)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_numbers_are_those_of_the_dense_map(all_maps, instantiation, layout):
    maps, sown = all_maps
    name, options = f"{instantiation}_{layout}", LAYOUTS[layout]
    keys = {"time": (4, 5, 9), "masked": (2, 5, 3)}.get(layout, (4, 2, 4))
    expected = dense_map(sown[name], options, keys)
    # Several chunks, the last one smaller.
    affinity = dataclasses.replace(maps[name], chunk_entries=2 * 50 * maps[name].summed)
    assert (affinity.queries, affinity.keys, affinity.batch) == ((4, 5, 9), keys, 2)

    close = {"rtol": 1e-4, "atol": 2e-6}
    positions = np.stack(np.unravel_index(np.arange(QUERIES), affinity.queries), axis=-1)
    chosen = [171, 3, 88, 3]
    rows = affinity.rows(positions[chosen]).reshape(2, 4, -1)
    np.testing.assert_allclose(rows, expected[:, chosen], **close)
    rows = affinity[1].rows(positions)[0].reshape(QUERIES, -1)
    np.testing.assert_allclose(rows, expected[1], **close)

    k = min(3, affinity.summed)
    for queries, rows in ((None, expected), (positions[chosen], expected[:, chosen])):
        weights, key_positions = affinity.top(k, queries)
        largest = np.sort(np.abs(rows), axis=-1)[..., ::-1][..., :k]
        np.testing.assert_allclose(np.abs(weights), largest, **close)
        flat = np.ravel_multi_index(tuple(np.moveaxis(key_positions, -1, 0)), keys)
        np.testing.assert_allclose(np.take_along_axis(rows, flat, axis=-1), weights, **close)

    total = np.abs(expected).sum(axis=-1, keepdims=True)
    shares = np.abs(expected) / np.where(total == 0, 1, total)
    entropies = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=-1)
    np.testing.assert_allclose(
        measures.entropy(affinity).reshape(2, QUERIES), entropies, rtol=1e-4, atol=1e-5
    )
    frame_shares = shares.reshape(2, 4, 45, keys[0], -1).sum(axis=-1).mean(axis=2)
    np.testing.assert_allclose(measures.time_by_time(affinity), frame_shares, **close)
    flat = np.arange(QUERIES)
    sum_ids = {"space": flat // 45, "time": flat % 45, "groups": flat // 90}.get(layout, 0 * flat)
    dependence = np.stack(measures.query_dependence(affinity), axis=-1)
    np.testing.assert_allclose(
        dependence, [dense_dependence(clip_shares, sum_ids) for clip_shares in shares], **close
    )
    received = measures.received(affinity)
    assert received.shape == (2, *keys)
    if layout == "spacetime":
        mean_shares = shares.mean(axis=1) * shares.shape[-1]
        np.testing.assert_allclose(received.reshape(2, -1), mean_shares, **close)


def test_rows_of_zeros_stay_zeros():
    """The ReLU of the concatenation may leave nothing."""
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 5, 4)).astype(np.float32)
    model = OneBlock(nl.layers.nonlocal_block("concatenation"))
    variables = jax.tree.map(np.zeros_like, random_variables(model, x))
    (affinity,) = affinities(model, variables, x).values()
    assert not affinity.rows((0, 0, 0)).any()
    assert not measures.entropy(affinity).any()
    assert measures.query_dependence(affinity).cosine.tolist() == [0]
    assert not measures.time_by_time(affinity).any()


class MaskedBlocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for axes in ("spacetime", "space", "time"):
            block = nl.layers.nonlocal_block(
                "embedded_gaussian", axes=axes, subsample=False, name=axes
            )
            block(x, mask=column_mask(x))


def test_a_uniform_map_does_not_depend_on_the_query():
    """With weights of 0, each query attends equally to all keys that are not masked."""
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    variables = jax.tree.map(np.zeros_like, random_variables(MaskedBlocks(), x))
    maps = affinities(MaskedBlocks(), variables, x)
    mask = np.asarray(column_mask(x))
    for axes, sum_axes in {"spacetime": (1, 2, 3), "space": (2, 3), "time": (1,)}.items():
        affinity = maps[axes]
        np.testing.assert_allclose(measures.received(affinity), mask, rtol=1e-5)
        counted = affinity.counted()
        key_counts = mask.sum(axis=sum_axes, keepdims=True)
        np.testing.assert_array_equal(counted, np.broadcast_to(key_counts, counted.shape))
        real = counted > 0
        np.testing.assert_allclose(
            np.exp(measures.entropy(affinity))[real], counted[real], rtol=1e-5
        )
        dependence = measures.query_dependence(affinity)
        np.testing.assert_allclose([*dependence.cosine, *dependence.jensen_shannon], 0, atol=1e-6)


def test_only_the_requested_rows_of_a_large_map_are_stored():
    """12,544 × 12,544 float32 numbers would take 629 MB; the live arrays take less than 12 MB."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 56, 56, 4))
    model = OneBlock(nl.layers.nonlocal_block("embedded_gaussian", subsample=False))
    variables = random_variables(model, x)
    bytes_before = sum(array.nbytes for array in jax.live_arrays())
    (affinity,) = affinities(model, variables, x).values()
    rows = affinity.rows([(0, 0, 0), (3, 55, 55)])
    weights, positions = affinity.top(20, [(i, i, i) for i in range(4)])
    assert rows.shape == (1, 2, 4, 56, 56)
    assert weights.shape == (1, 4, 20)
    assert positions.shape == (1, 4, 20, 3)
    assert sum(array.nbytes for array in jax.live_arrays()) - bytes_before < 12e6
    with pytest.raises(
        ValueError,
        match=r"queries must be at most 4,096 in one call; got 10,000\. Pass them in parts, or use "
        "`top`",
    ):
        affinity.rows(np.zeros((10_000, 3), int))


@pytest.mark.usefixtures("as_users_see_it")
def test_models_and_clips_that_do_not_fit_are_errors():
    x = clips()
    model = TwoBlocks()
    variables = random_variables(model, x)
    dense = nn.Dense(3)
    with pytest.raises(NoBlocksError, match="the model must have non-local blocks; Dense has none"):
        affinities(dense, random_variables(dense, x), x)
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
    network_variables = random_variables(network, jnp.zeros((1, 32, 32, 32, 3)))
    with pytest.raises(
        ValueError, match=r"clip must have at least \d+ frames of \d+×\d+ pixels .* got 8 of 2×32"
    ):
        affinities(network, network_variables, np.zeros((1, 8, 2, 32, 3), np.float32))
    split = OneBlock(nl.layers.nonlocal_block("dot_product", axis_name="i"))
    with pytest.raises(ValueError, match="block must not be split over devices; got axis_name='i'"):
        affinities(split, random_variables(split, x), x)


@pytest.mark.usefixtures("as_users_see_it")
def test_queries_that_do_not_fit_are_errors():
    x = clips()
    variables = random_variables(TwoBlocks(), x)
    affinity = affinities(TwoBlocks(), variables, x)["first"]
    assert len(repr(affinity)) < 200
    large = dataclasses.replace(affinity, keys=(64, 128, 128))
    with pytest.raises(
        ValueError,
        match=r"rows must take at most 1,024 MiB; 200 queries of 2 clips take 1,600 MiB",
    ):
        large.rows(np.zeros((200, 3), int))
    with pytest.raises(TypeError, match="float"):
        affinity.top(2.5)
    with pytest.raises(
        IndexError, match=r"a query must lie inside the map \(4, 6, 10\) of first; got \(0, 6, 0\)"
    ):
        affinity.rows([(0, 0, 0), (0, 6, 0)])
    with pytest.raises(
        ValueError,
        match=r"queries must be integers of shape \(Q, 3\), positions of the map \(4, 6, 10\); got "
        "float64",
    ):
        affinity.rows((0.5, 0, 0))
    with pytest.raises(
        ValueError,
        match=r"k must be between 1 and 60, the number of keys that each position of first sums "
        "over; got 61",
    ):
        affinity.top(61)
    with pytest.raises(IndexError, match="clip must be an index of the batch of 2 clips; got 2"):
        affinity[2]


def test_affinities_that_are_not_finite_are_errors():
    x = np.ones((2, 3, 4), np.float32)
    x[1, 2] = np.nan
    model = OneBlock(nl.layers.nonlocal_block("dot_product", subsample=False))
    affinity = affinities(model, random_variables(model, x), x)["block"]
    assert np.isfinite(affinity[0].rows((2,))).all()
    with pytest.raises(
        ValueError, match=r"affinities must be finite; block has NaN or infinity at \(2,\)"
    ):
        affinity[1].rows((2,))
