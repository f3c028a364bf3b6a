"""Trained variables in a network with new blocks: nothing trained is lost, nothing is left over."""

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from variables import random_variables

import nonlocal_jax as nl

X = jax.random.normal(jax.random.key(0), (3, 7, 5, 3))
KINDS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


class Stage(nn.Module):
    instantiation: str | None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        if self.instantiation is not None:
            x = nl.layers.nonlocal_block(self.instantiation, name="nonlocal")(x, train=train)
        return nn.relu(x)


class Network(nn.Module):
    instantiation: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = Stage(None, name="stage1")(x, train)
        x = Stage(self.instantiation, name="stage2")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


TRUNK = Network()


def trained_variables():
    return random_variables(TRUNK, X)


def fresh_variables(instantiation="embedded_gaussian"):
    return Network(instantiation).init(jax.random.key(3), X)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_stays_the_same(kind):
    trained = trained_variables()
    variables = nl.layers.insert(trained, fresh_variables(kind))
    nl.describe(Network(kind), variables, X, expected=1)
    expected = TRUNK.apply(trained, X)
    np.testing.assert_array_equal(Network(kind).apply(variables, X), expected)
    fresh_answer = TRUNK.apply(TRUNK.init(jax.random.key(3), X), X)
    assert jnp.abs(fresh_answer - expected).max() > 0.1


def test_every_collection_keeps_what_was_trained():
    trained, fresh = trained_variables(), fresh_variables()
    variables = nl.layers.insert(trained, fresh)
    chex.assert_trees_all_equal_structs(variables, fresh)
    for collection in ("params", "batch_stats"):
        block = variables[collection]["stage2"].pop("nonlocal")
        chex.assert_trees_all_equal(variables[collection], trained[collection])
        chex.assert_trees_all_equal(block, fresh[collection]["stage2"]["nonlocal"])


def test_the_arguments_are_not_changed():
    trained, fresh = trained_variables(), fresh_variables()
    copies = jax.tree.map(jnp.copy, (trained, fresh))
    nl.layers.insert(trained, fresh)
    chex.assert_trees_all_equal((trained, fresh), copies)


def test_frozen_dicts():
    variables = nl.layers.insert(flax.core.freeze(trained_variables()), fresh_variables())
    assert isinstance(variables, dict)
    frozen = nl.layers.insert(trained_variables(), flax.core.freeze(fresh_variables()))
    assert isinstance(frozen, flax.core.FrozenDict)
    chex.assert_trees_all_equal(flax.core.unfreeze(frozen), variables)


def test_variables_with_metadata():
    def partitioned(variables):
        return jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), variables)

    variables = nl.layers.insert(trained_variables(), partitioned(fresh_variables()))
    expected = nl.layers.insert(trained_variables(), fresh_variables())
    chex.assert_trees_all_equal(variables, partitioned(expected))
    network = Network("embedded_gaussian")
    np.testing.assert_array_equal(network.apply(variables, X), network.apply(expected, X))


def test_under_jit_and_as_shapes():
    shapes = jax.eval_shape(nl.layers.insert, trained_variables(), fresh_variables())
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, fresh_variables())


def test_trained_dtypes_are_kept():
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trained_variables())
    variables = nl.layers.insert(trained, fresh_variables())
    assert variables["params"]["head"]["kernel"].dtype == jnp.bfloat16


def test_published_networks():
    options = {"num_classes": 7, "clip": "8x8"}
    trunk = nl.models.video_resnet(50, "c2d", 0, **options)
    network = nl.models.video_resnet(50, "c2d", 5, **options)
    trained, fresh = (
        jax.eval_shape(model.init, jax.random.key(0), model.example) for model in (trunk, network)
    )
    trained = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), trained)  # to be found
    variables = nl.layers.insert(trained, fresh)
    chex.assert_trees_all_equal_shapes(variables, fresh)
    blocks = set()
    for collection, modules in variables.items():
        for name, module in modules.items():
            if name in trained[collection]:
                assert module == trained[collection][name]
            else:
                assert module == fresh[collection][name]
                blocks.add(name)
    assert len(blocks) == 5
    assert all(name.startswith("nonlocal_res") for name in blocks)


class TestNnx:
    class Network(nnx.Module):
        def __init__(self, rngs, has_block):
            self.layers = nnx.List([nnx.Conv(3, 6, (3, 3), rngs=rngs), nnx.BatchNorm(6, rngs=rngs)])
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            if has_block:
                block = nnx.bridge.ToNNX(nl.layers.nonlocal_block("dot_product"), rngs=rngs)
                self.block = block.lazy_init(jnp.zeros((1, 7, 5, 6)))
            self.head = nnx.Linear(6, 10, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            x = self.block(x) if hasattr(self, "block") else x
            return self.head(self.dropout(x).mean((1, 2)))

    def pair(self):
        trunk, network = self.Network(nnx.Rngs(0), False), self.Network(nnx.Rngs(1), True)
        for model in (trunk, network):
            model.eval()
        mean = trunk.layers[1].mean
        mean[...] = mean[...] + 0.7
        return trunk, network

    def test_the_answer_stays_the_same(self):
        trunk, network = self.pair()
        assert jnp.abs(network(X) - trunk(X)).max() > 0.1
        state = nl.layers.insert(nnx.state(trunk), nnx.state(network))
        assert isinstance(state, nnx.State)
        nnx.update(network, state)
        np.testing.assert_array_equal(network(X), trunk(X))

    def test_parameters_alone_are_not_enough(self):
        trunk, network = self.pair()
        with pytest.raises(ValueError, match="got none for layers/1/mean, layers/1/var"):
            nl.layers.insert(nnx.state(trunk, nnx.Param), nnx.state(network))

    def test_without_the_state_of_random_numbers(self):
        """It is not trained."""
        trunk, network = self.pair()
        trained = nnx.state(trunk, nnx.Param, nnx.BatchStat)
        nnx.update(network, nl.layers.insert(nnx.merge_state(*trained), nnx.state(network)))
        np.testing.assert_array_equal(network(X), trunk(X))

    def test_pure_dicts(self):
        trunk, network = self.pair()
        pure = nnx.to_pure_dict(nnx.state(trunk))
        nnx.update(network, nl.layers.insert(pure, nnx.state(network)))
        np.testing.assert_array_equal(network(X), trunk(X))


@pytest.mark.parametrize("collections", [("params",), ()], ids=["Linen", "NNX"])
def test_new_modules_with_the_names_of_trained_ones(collections):
    """Modules are told apart by their whole path, below the collections of Linen."""

    def nested(**stages):
        tree = {name: {"conv": {"kernel": np.full(2, value)}} for name, value in stages.items()}
        return {"params": tree} if collections else tree

    trained, fresh = nested(stage1=1.0), nested(stage1=0.0, stage2=2.0)
    variables = nl.layers.insert(trained, fresh)
    chex.assert_trees_all_equal(variables, nested(stage1=1.0, stage2=2.0))


class TestErrors:
    def test_a_layer_with_another_name(self):
        trained = trained_variables()
        trained["params"]["dense"] = trained["params"].pop("head")
        expected = r"got params/dense/bias, params/dense/kernel without one\."
        with pytest.raises(ValueError, match=expected):
            nl.layers.insert(trained, fresh_variables())

    def test_a_collection_that_the_network_lacks(self):
        trained = {**trained_variables(), "quant": {"scale": jnp.ones(3)}}
        with pytest.raises(ValueError, match=r"got quant/scale without one"):
            nl.layers.insert(trained, fresh_variables())

    def test_arguments_in_the_wrong_order(self):
        expected = r"got batch_stats/stage2/nonlocal/out_norm/mean, .* and 3 more without one"
        with pytest.raises(ValueError, match=expected):
            nl.layers.insert(fresh_variables(), trained_variables())

    def test_layers_of_a_sequence_that_shift(self):
        layers = [nn.Dense(8), nn.Dense(8)]
        block = nl.layers.nonlocal_block("dot_product")
        trunk, network = nn.Sequential(layers), nn.Sequential([layers[0], block, layers[1]])
        trained, fresh = (model.init(jax.random.key(0), X) for model in (trunk, network))
        with pytest.raises(
            ValueError, match=r"got params/layers_1/bias, .*layers_1/kernel without"
        ):
            nl.layers.insert(trained, fresh)

    def test_another_shape(self):
        trained = trained_variables()
        trained["params"]["head"]["kernel"] = jnp.ones((6, 11))
        expected = r"params/head/kernel must have the same shape .* got \(6, 11\) and \(6, 10\)\."
        with pytest.raises(ValueError, match=expected):
            nl.layers.insert(trained, fresh_variables())

    def test_without_running_statistics(self):
        expected = r"in all collections; got none for batch_stats/stage1/norm/mean, "
        with pytest.raises(ValueError, match=expected):
            nl.layers.insert({"params": trained_variables()["params"]}, fresh_variables())

    def test_without_one_bias(self):
        trained = trained_variables()
        del trained["params"]["head"]["bias"]
        with pytest.raises(ValueError, match=r"got none for params/head/bias\."):
            nl.layers.insert(trained, fresh_variables())

    def test_parameters_without_their_collection(self):
        trained = trained_variables()
        with pytest.raises(ValueError, match=r"got head/bias, .* without one"):
            nl.layers.insert(trained["params"], fresh_variables())
