"""Blocks are found in any network, Linen or NNX, in the order in which they run."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from visualize.networks import OneBlock, TwoBlocks, clips, normal, random_variables

import nonlocal_jax as nl
from nonlocal_jax.visualize import GeometryError, NoBlocksError, affinities


def test_blocks_are_found_in_the_order_in_which_they_run():
    x = clips()
    model = TwoBlocks()
    variables = random_variables(model, x)
    maps = affinities(model, variables, x, blocks=["second", "first"])
    assert list(maps) == ["first", "second"]
    assert [affinity.queries for affinity in maps.values()] == [(4, 6, 10), (4, 3, 5)]
    assert [affinity.keys for affinity in maps.values()] == [(4, 3, 5), (4, 3, 5)]
    assert list(affinities(model, variables, x, blocks="second")) == ["second"]


def test_their_order_is_not_that_of_their_names():
    names = ("zeta", "block_10", "block_9", "alpha")

    class FourBlocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in names:
                x = nl.layers.nonlocal_block("dot_product", name=name)(x)
            return x

    x = np.ones((1, 6, 4), np.float32)
    variables = random_variables(FourBlocks(), x)
    assert tuple(affinities(FourBlocks(), variables, x)) == names
    selected = affinities(FourBlocks(), variables, x, blocks=["alpha", "zeta"])
    assert tuple(selected) == ("zeta", "alpha")


def test_arguments_are_passed_to_the_model():
    """A mask of each clip, and a flag."""

    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, *, mask, train):
            x = nn.Conv(4, (3, 3), strides=2)(x * mask[..., None])
            block = nl.layers.nonlocal_block("dot_product", name="block")
            return block(x, train=train, mask=mask[:, ::2, ::2])

    x = normal((2, 12, 16, 3))
    mask = jnp.ones((2, 12, 16), bool).at[1, :, 8:].set(False)
    options = {"mask": mask, "train": False}
    variables = random_variables(Masked(), x, **options)
    affinity = affinities(Masked(), variables, x, **options)["block"]
    assert affinity.counted()[:, 0, 0].tolist() == [12, 6]
    assert not affinity.rows((0, 0))[1, 0, :, 2:].any()
    assert affinity.geometry().fields[0].stride == 2


def test_arguments_that_do_not_belong_to_clips_are_not_cut():
    class Weighted(nn.Module):
        @nn.compact
        def __call__(self, x, *, weights):
            block = nl.layers.nonlocal_block("dot_product", name="block")
            return block(x * weights.reshape(2, 1, 1, 1))

    x = normal((2, 6, 8, 3))
    weights = np.ones((1, 2), np.float32)
    variables = random_variables(Weighted(), x, weights=weights)
    affinity = affinities(Weighted(), variables, x, weights=weights)["block"]
    assert affinity.rows((0, 0)).shape == (2, 1, 3, 4)
    affinity = affinities(Weighted(), variables, x, weights=weights.T)["block"]
    with pytest.raises(
        GeometryError, match="block: the network cannot be traced with a single clip: "
    ):
        affinity.geometry()


def test_prng_keys_are_not_cut():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(x)
            return nl.layers.nonlocal_block("dot_product", name="block")(x)

    x, rngs = np.ones((2, 6, 8, 4), np.float32), {"dropout": jax.random.PRNGKey(0)}
    block = nl.layers.nonlocal_block("dot_product")
    variables = {kind: {"block": tree} for kind, tree in random_variables(block, x).items()}
    assert affinities(Dropped(), variables, x, rngs=rngs)["block"].geometry().grid == (6, 8)


def test_nnx_models():
    """The maps are those of the same network in Linen, and the model is unchanged."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), strides=2, name="conv")(x)
            return nl.layers.nonlocal_block("dot_product", name="block")(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
            block = nnx.bridge.ToNNX(nl.layers.nonlocal_block("dot_product"), rngs=rngs)
            self.blocks = nnx.List([block.lazy_init(jnp.ones((1, 6, 8, 8)))])

        def __call__(self, x):
            return self.blocks[0](self.conv(x))

    def state(model):
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1]))

    x = normal((2, 12, 16, 3))
    model = Nnx(nnx.Rngs(1))
    state_before = state(model)
    maps = affinities(model, None, x)
    assert list(maps) == ["blocks/0"]
    variables = random_variables(Linen(), x)
    block = model.blocks[0]
    norm = {name: block.out_norm[name] for name in variables["params"]["block"]["out_norm"]}
    params = {
        "conv": {"kernel": model.conv.kernel, "bias": model.conv.bias},
        "block": {"operation": block.operation, "out": block.out, "out_norm": norm},
    }
    params = jax.tree.map(
        lambda leaf: leaf[...], params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    expected = affinities(Linen(), {**variables, "params": params}, x)["block"]
    queries = np.stack(np.unravel_index(np.arange(48), (6, 8)), axis=-1)
    np.testing.assert_allclose(
        maps["blocks/0"].rows(queries), expected.rows(queries), rtol=1e-5, atol=1e-7
    )
    assert maps["blocks/0"].geometry().fields[0].stride == 2
    chex.assert_trees_all_equal(state(model), state_before)
    assert model.blocks[0].to_nnx__module.name is None


def test_a_linen_network_inside_nnx():
    x = jnp.asarray(normal((1, 5, 4)))
    model = OneBlock(nl.layers.nonlocal_block("dot_product"))
    bridged = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(x)
    assert list(affinities(bridged, None, x)) == ["block"]


def test_the_model_and_its_variables_must_belong_together():
    x = normal((2, 12, 16, 3))
    linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(
        TypeError,
        match="variables of an NNX module must be None, because the module holds its own; got dict",
    ):
        affinities(linear, {}, x)
    with pytest.raises(
        TypeError, match="variables of a Linen module must be the result of `init`; got None"
    ):
        affinities(TwoBlocks(), None, x)
    with pytest.raises(TypeError, match="model must be a Linen or an NNX module; got function"):
        affinities(lambda x: x, None, x)
    with pytest.raises(
        NoBlocksError, match="the model must have non-local blocks; Linear has none"
    ):
        affinities(linear, None, x)


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nl.layers.nonlocal_block("embedded_gaussian", subsample=False, name="block")(x)


class LinenPyramid(nn.Module):
    @nn.compact
    def __call__(self, x):
        head = nn.jit(Head)(name="head")
        return head(x).mean() + head(x[:, ::2, ::2]).mean() + head(x).mean()


class NnxPyramid(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.bridge.ToNNX(Head(), rngs=rngs).lazy_init(jnp.ones((1, 6, 8, 4)))

    def __call__(self, x):
        return self.head(x).mean() + self.head(x[:, ::2, ::2]).mean() + self.head(x).mean()


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_block_that_runs_at_two_sizes(library):
    """A head over a pyramid: each call has a map, numbered in the order of the calls."""
    x = normal((2, 6, 8, 4))
    if library == "linen":
        model, variables = LinenPyramid(), random_variables(LinenPyramid(), x)
    else:
        model, variables = NnxPyramid(nnx.Rngs(0)), None
    maps = affinities(model, variables, x)
    assert list(maps) == ["head/block", "head/block#2", "head/block#3"]
    assert maps["head/block#2"].block == "head/block#2"
    assert [affinity.queries for affinity in maps.values()] == [(6, 8), (3, 4), (6, 8)]
    assert [affinity.geometry().grid for affinity in maps.values()] == [(6, 8), (3, 4), (6, 8)]
    assert maps["head/block#2"].geometry().fields[0].stride == 2
    first, second, third = (affinity.rows([(0, 0), (2, 3)]) for affinity in maps.values())
    np.testing.assert_array_equal(first, third)
    np.testing.assert_allclose(first.sum(axis=(2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(second.sum(axis=(2, 3)), 1, rtol=1e-5)


def test_a_block_that_is_called_twice_has_two_maps():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nl.layers.nonlocal_block(
                "embedded_gaussian", norm=None, zero_init=False, name="block"
            )
            return block(block(x))

    x = normal((1, 6, 4))
    first, second = affinities(Twice(), random_variables(Twice(), x), x).values()
    assert (first.block, second.block) == ("block", "block#2")
    assert np.abs(first.rows((0,)) - second.rows((0,))).max() > 1e-4
    assert [affinity.geometry().grid for affinity in (first, second)] == [(6,), (6,)]


def test_networks_that_jax_has_traced_before():
    """JAX caches the trace of a jitted function, in which no call is reported."""

    class Jitted(nnx.Module):
        def __init__(self, rngs):
            block = nl.layers.nonlocal_block("dot_product")
            self.block = nnx.bridge.ToNNX(block, rngs=rngs).lazy_init(jnp.ones((1, 6, 8, 4)))

        @nnx.jit
        def __call__(self, x):
            return self.block(x)

    class Rematerialised(Jitted):
        @nnx.remat
        def __call__(self, x):
            return self.block(x)

    x = normal((2, 6, 8, 4))
    model = Jitted(nnx.Rngs(0))
    model(x)
    for _ in range(2):
        assert affinities(model, None, x)["block"].rows((0, 0)).shape == (2, 1, 3, 4)
    model = Rematerialised(nnx.Rngs(0))
    model(x)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"blocks must not be inside nnx\.remat, nnx\.scan or nnx\.vmap; at least one of "
            r"block is",
        ):
            affinities(model, None, x)


def test_rematerialised_blocks_are_found():
    x = clips((1, 2, 4, 6, 3))
    model = nn.Sequential([nn.remat(nl.layers.NonLocalBlock)(nl.layers.DotProduct())])
    (affinity,) = affinities(model, random_variables(model, x), x).values()
    assert affinity.rows((0, 0, 0)).shape == (1, 1, 2, 2, 3)
    assert affinity.geometry().grid == (2, 4, 6)


def test_blocks_inside_vmap_are_refused():
    class Vmapped(nn.Module):
        axes: dict

        @nn.compact
        def __call__(self, x):
            block = nn.vmap(
                nl.layers.NonLocalBlock,
                variable_axes=self.axes,
                split_rngs={"params": True},
                in_axes=0,
            )
            return block(nl.layers.DotProduct(), norm=None, name="block")(x)

    x = np.ones((3, 2, 5, 4), np.float32)
    for axes in ({"params": 0}, {"params": 0, "intermediates": 0}):
        model = Vmapped(axes)
        with pytest.raises(
            ValueError, match=r"blocks must not be inside nn\.scan, nn\.vmap or .*; block.* is"
        ):
            affinities(model, random_variables(model, x), x)


def test_blocks_inside_scan_are_refused():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nl.layers.nonlocal_block("dot_product", norm=None, name="block")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            steps = nn.scan(
                Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return steps()(x, None)[0]

    x = np.ones((1, 5, 4), np.float32)
    with pytest.raises(
        ValueError, match=r"blocks must not be inside nn\.scan, nn\.vmap or .*; .*block is"
    ):
        affinities(Scanned(), random_variables(Scanned(), x), x)
