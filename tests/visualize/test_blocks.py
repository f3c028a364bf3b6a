"""The blocks of any network are found: in Linen and NNX, in the order in which they run, again and at other sizes."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from visualize.networks import TwoBlocks, clips, with_weights

import nonlocal_jax as nl
from nonlocal_jax.visualize import GeometryError, NoBlocksError, affinities


def test_blocks_are_found_in_the_order_in_which_they_run():
    x = clips()
    model = TwoBlocks()
    variables = with_weights(model, x)
    maps = affinities(model, variables, x)
    assert list(maps) == ["first", "second"]
    assert [one.queries for one in maps.values()] == [(4, 6, 10), (4, 3, 5)]
    assert [one.keys for one in maps.values()] == [(4, 3, 5), (4, 3, 5)]
    assert list(affinities(model, variables, x, blocks="second")) == ["second"]
    assert list(affinities(model, variables, x, blocks=["second", "first"])) == ["first", "second"]


def test_their_order_is_not_that_of_their_names():
    names = ("zeta", "block_10", "block_9", "alpha")

    class Many(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in names:
                x = nl.layers.nonlocal_block("dot_product", name=name)(x)
            return x

    x = jnp.ones((1, 6, 4))
    variables = Many().init(jax.random.key(0), x)
    assert tuple(affinities(Many(), variables, x)) == names
    assert tuple(affinities(Many(), variables, x, blocks=["alpha", "zeta"])) == ("zeta", "alpha")


def test_arguments_go_to_the_model():
    """A mask of each clip, and a flag."""

    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, *, mask, train):
            x = nn.Conv(4, (3, 3), strides=2)(x * mask[..., None])
            return nl.layers.nonlocal_block("dot_product", name="block")(
                x, train=train, mask=mask[:, ::2, ::2]
            )

    x = jax.random.normal(jax.random.key(0), (2, 12, 16, 3))
    mask = jnp.ones((2, 12, 16), bool).at[1, :, 8:].set(False)
    variables = Masked().init(jax.random.key(1), x, mask=mask, train=False)
    one = affinities(Masked(), variables, x, mask=mask, train=False)["block"]
    assert one.counted()[:, 0, 0].tolist() == [12, 6]
    assert not one.rows((0, 0))[1, 0, :, 2:].any()
    assert one.geometry().fields[0].stride == 2

    class Weighted(nn.Module):
        @nn.compact
        def __call__(self, x, *, of_batch):
            return nl.layers.nonlocal_block("dot_product", name="block")(
                x * of_batch.reshape(2, 1, 1, 1)
            )

    variables = Weighted().init(jax.random.key(1), x, of_batch=jnp.ones((1, 2)))
    one = affinities(Weighted(), variables, x, of_batch=jnp.ones((1, 2)))["block"]
    assert one.rows((0, 0)).shape == (2, 1, 6, 8)
    one = affinities(Weighted(), variables, x, of_batch=jnp.ones((2, 1)))["block"]
    with pytest.raises(GeometryError, match="block: the network cannot be traced with one clip: "):
        one.geometry()


def test_one_block_at_two_sizes():
    class Pyramid(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nl.layers.nonlocal_block("embedded_gaussian", subsample=False, name="block")
            return block(x).mean() + block(nn.max_pool(x, (2, 2), (2, 2))).mean()

    x = jax.random.normal(jax.random.key(0), (2, 6, 8, 4))
    fine, coarse = affinities(Pyramid(), Pyramid().init(jax.random.key(1), x), x).values()
    assert (fine.queries, coarse.queries, coarse.block) == ((6, 8), (3, 4), "block#2")
    assert [one.geometry().grid for one in (fine, coarse)] == [(6, 8), (3, 4)]
    for one in (fine, coarse):
        np.testing.assert_allclose(one.rows([(0, 0), (2, 3)]).sum(axis=(2, 3)), 1, rtol=1e-5)


def test_nnx_models():
    """The maps are those of the same network in Linen, and the model is as it was before."""

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

    x = jax.random.normal(jax.random.key(0), (2, 12, 16, 3))
    model = Nnx(nnx.Rngs(1))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1]))
    maps = affinities(model, None, x)
    assert list(maps) == ["blocks/0"]
    of_block = model.blocks[0]
    variables = Linen().init(jax.random.key(0), x)
    params = {
        "conv": {"kernel": model.conv.kernel[...], "bias": model.conv.bias[...]},
        "block": jax.tree.map(lambda leaf: leaf[...], {"operation": of_block.operation, "out": of_block.out, "out_norm": {
            name: of_block.out_norm[name] for name in variables["params"]["block"]["out_norm"]
        }}, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)),
    }  # fmt: skip
    expected = affinities(Linen(), {**variables, "params": params}, x)["block"]
    every = np.stack(np.unravel_index(np.arange(48), (6, 8)), axis=-1)
    np.testing.assert_allclose(
        maps["blocks/0"].rows(every), expected.rows(every), rtol=1e-5, atol=1e-7
    )
    assert maps["blocks/0"].geometry().fields[0].stride == 2
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1]))
    chex.assert_trees_all_equal(after, before)
    assert model.blocks[0].to_nnx__module.name is None

    whole = nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)).lazy_init(x)
    assert list(affinities(whole, None, x)) == ["block"]
    with pytest.raises(
        TypeError, match="variables of an NNX module must be None, as it holds its own; got dict"
    ):
        affinities(model, {}, x)
    with pytest.raises(
        TypeError, match="variables of a Linen module must be those that `init` gives; got None"
    ):
        affinities(Linen(), None, x)
    with pytest.raises(TypeError, match="model must be a Linen or an NNX module; got function"):
        affinities(lambda x: x, None, x)
    with pytest.raises(
        NoBlocksError, match="the model must have non-local blocks; Linear has none"
    ):
        affinities(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), None, x)


def test_a_network_that_is_used_at_two_sizes():
    """A head over a pyramid, in Linen and in NNX."""

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nl.layers.nonlocal_block("embedded_gaussian", subsample=False, name="block")(x)

    class Pyramid(nn.Module):
        @nn.compact
        def __call__(self, x):
            head = nn.jit(Head)(name="head")
            return head(x).mean() + head(x[:, ::2, ::2]).mean() + head(x).mean()

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.bridge.ToNNX(Head(), rngs=rngs).lazy_init(jnp.ones((1, 6, 8, 4)))

        def __call__(self, x):
            return self.head(x).mean() + self.head(x[:, ::2, ::2]).mean() + self.head(x).mean()

    x = jax.random.normal(jax.random.key(0), (2, 6, 8, 4))
    for model, variables in (
        (Pyramid(), Pyramid().init(jax.random.key(1), x)),
        (Nnx(nnx.Rngs(0)), None),
    ):
        maps = affinities(model, variables, x)
        assert list(maps) == ["head/block", "head/block#2", "head/block#3"]
        assert [one.queries for one in maps.values()] == [(6, 8), (3, 4), (6, 8)]
        assert [one.geometry().grid for one in maps.values()] == [(6, 8), (3, 4), (6, 8)]
        assert maps["head/block#2"].geometry().fields[0].stride == 2
        first, second, third = (one.rows((0, 0)) for one in maps.values())
        np.testing.assert_array_equal(first, third)
        assert second.shape == (2, 1, 3, 4)


def test_networks_that_jax_has_traced_already():
    """Of what is under `jit` JAX keeps the trace, in which nothing can be seen."""

    class Jitted(nnx.Module):
        def __init__(self, rngs):
            block = nl.layers.nonlocal_block("dot_product")
            self.block = nnx.bridge.ToNNX(block, rngs=rngs).lazy_init(jnp.ones((1, 6, 8, 4)))

        @nnx.jit
        def __call__(self, x):
            return self.block(x)

    class Again(Jitted):
        @nnx.remat
        def __call__(self, x):
            return self.block(x)

    x = jax.random.normal(jax.random.key(0), (2, 6, 8, 4))
    model = Jitted(nnx.Rngs(0))
    model(x)
    for _ in range(2):
        assert affinities(model, None, x)["block"].rows((0, 0)).shape == (2, 1, 3, 4)
    model = Again(nnx.Rngs(0))
    model(x)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"blocks must not be inside nnx\.remat, nnx\.scan or nnx\.vmap; of block one",
        ):
            affinities(model, None, x)


def test_keys_of_the_model_are_not_of_the_clips():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nl.layers.nonlocal_block("dot_product", name="block")(
                nn.Dropout(0.5, deterministic=False)(x)
            )

    x, rngs = jnp.ones((2, 6, 8, 4)), {"dropout": jax.random.PRNGKey(0)}
    variables = Dropped().init({"params": jax.random.key(0), **rngs}, x)
    assert affinities(Dropped(), variables, x, rngs=rngs)["block"].geometry().grid == (6, 8)


def test_a_block_that_is_called_twice_has_two_maps():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nl.layers.nonlocal_block(
                "embedded_gaussian", norm=None, zero_init=False, name="block"
            )
            return block(block(x))

    x = jax.random.normal(jax.random.key(0), (1, 6, 4))
    variables = Twice().init(jax.random.key(1), x)
    first, second = affinities(Twice(), variables, x).values()
    assert (first.block, second.block) == ("block", "block#2")
    assert np.abs(first.rows((0,)) - second.rows((0,))).max() > 1e-4
    assert [one.geometry().grid for one in (first, second)] == [(6,), (6,)]


def test_blocks_that_are_computed_again_are_found():
    x = clips((1, 2, 4, 6, 3))
    model = nn.Sequential([nn.remat(nl.layers.NonLocalBlock)(nl.layers.DotProduct())])
    (one,) = affinities(model, model.init(jax.random.key(0), x), x).values()
    assert one.rows((0, 0, 0)).shape == (1, 1, 2, 2, 3)


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

    x = jnp.ones((3, 2, 5, 4))
    for axes in ({"params": 0}, {"params": 0, "intermediates": 0}):
        with pytest.raises(
            ValueError, match=r"blocks must not be inside nn\.scan, nn\.vmap or .*; block.* is"
        ):
            affinities(Vmapped(axes), Vmapped(axes).init(jax.random.key(0), x), x)


def test_blocks_inside_scan_are_refused():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nl.layers.nonlocal_block("dot_product", norm=None, name="block")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(
                Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )()(x, None)[0]

    x = jnp.ones((1, 5, 4))
    with pytest.raises(
        ValueError, match=r"blocks must not be inside nn\.scan, nn\.vmap or .*; .*block is"
    ):
        affinities(Scanned(), Scanned().init(jax.random.key(0), x), x)
