"""`describe` finds the blocks of a network, wherever they are, and reports whether they act."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from variables import normal, random_variables

import nonlocal_jax as nl


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(normal((2, 4, 6, 6)))


class Network(nn.Module):
    remat: bool = False
    blocks: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(self.blocks):
            x = nn.Dense(6, name=f"dense_{i}")(x)
            block = nl.layers.NonLocalBlock
            block = nn.remat(block) if self.remat else block
            x = block(nl.layers.EmbeddedGaussian(), name=f"nonlocal_{i}")(x)
        return x


def test_each_block_has_its_place_its_parameters_and_its_ratio(x):
    model = Network()
    variables = random_variables(model, x)
    for name in ("nonlocal_0", "nonlocal_1"):
        variables["params"][name]["out_norm"] = {"scale": jnp.zeros(6), "bias": jnp.zeros(6)}
    first, second = nl.describe(model, variables, x, expected=2)
    assert (first.place, second.place) == ("nonlocal_0", "nonlocal_1")
    assert first.operation == "EmbeddedGaussian"
    assert first.parameters == 4 * 6 * 3 + 2 * 6
    assert first.ratio == second.ratio == 0.0

    params = variables["params"]
    params["nonlocal_1"]["out_norm"]["scale"] = jnp.ones(6)
    first, second = nl.describe(model, variables, x)
    assert first.ratio == 0.0
    block_input = x
    for name in ("dense_0", "dense_1"):
        block_input = block_input @ params[name]["kernel"] + params[name]["bias"][None, None, None]
    residual = jax.jit(model.apply)(variables, x) - block_input
    expected = np.linalg.norm(residual) / np.linalg.norm(block_input)
    np.testing.assert_allclose(second.ratio, expected, rtol=1e-4)
    assert str(second) == (
        f"nonlocal_1: EmbeddedGaussian, 84 parameters, ‖block output‖/‖input‖ {second.ratio:.3g}"
    )


def test_blocks_under_remat_are_found(x):
    model = Network(remat=True)
    described = nl.describe(model, random_variables(model, x), x, expected=2)
    assert [block.place for block in described] == ["nonlocal_0", "nonlocal_1"]


class RelationBlock(nn.Module):
    """A residual block of another library."""

    offers_ratio: bool = True

    @nn.compact
    def __call__(self, x):
        theta, phi, g = (nn.Dense(3, name=name)(x) for name in ("theta", "phi", "g"))
        rows = (a.reshape(a.shape[0], -1, 3) for a in (theta, phi, g))
        with nl.layers.enclosing_block(self):
            y = nl.layers.nonlocal_response(self, "dot_product", *rows)
        residual = nn.Dense(x.shape[-1], name="out")(y).reshape(x.shape)
        if self.offers_ratio:
            nl.layers.sow_residual_ratio(self, residual, x)
        return x + residual


def test_operations_without_a_block_and_blocks_of_other_libraries_are_listed(x):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nl.layers.DotProduct(name="standalone")(x)
            x = nn.remat(RelationBlock)(name="relation")(x)
            return RelationBlock(offers_ratio=False, name="silent")(x)

    model = Mixed()
    variables = random_variables(model, x)
    standalone, relation, silent = nl.describe(model, variables, x, expected=3)
    assert (standalone.place, standalone.operation) == ("standalone", "DotProduct")
    assert (standalone.parameters, standalone.ratio) == (3 * 6 * 3, None)
    assert str(standalone).endswith("‖block output‖/‖input‖ None")
    assert (relation.place, relation.operation) == ("relation", "RelationBlock")
    params = variables["params"]

    @jax.jit
    def relation_ends(x):
        block_input = nl.layers.DotProduct().apply({"params": params["standalone"]}, x)
        return block_input, RelationBlock().apply({"params": params["relation"]}, block_input)

    block_input, block_output = relation_ends(x)
    expected = np.linalg.norm(block_output - block_input) / np.linalg.norm(block_input)
    np.testing.assert_allclose(relation.ratio, expected, rtol=1e-4)
    assert (silent.place, silent.ratio) == ("silent", None)
    with pytest.raises(ValueError, match="got 2, but it has 3: standalone, relation, silent"):
        nl.describe(model, variables, x, expected=2)


@pytest.mark.parametrize("axes", [{}, {"intermediates": 0}])
def test_scanned_blocks_are_an_error_that_says_so(x, axes):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nl.layers.nonlocal_block("dot_product", name="block")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            variable_axes = {"params": 0, "batch_stats": 0, **axes}
            scan = nn.scan(Step, variable_axes=variable_axes, split_rngs={"params": True}, length=3)
            return scan(name="steps")(x, None)[0]

    with pytest.raises(ValueError, match=r"must not be inside nn.scan; got steps/block"):
        nl.describe(Scanned(), random_variables(Scanned(), x), x)


def test_a_block_alone_describes_itself(x):
    block = nl.layers.nonlocal_block("gaussian")
    (described,) = nl.describe(block, random_variables(block, x), x)
    assert described.place == ""
    assert described.operation == "Gaussian"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [(0, "blocks of Network; got 5, but it has 0: none"), (2, "has 2: nonlocal_0, nonlocal_1")],
)
def test_missing_blocks_are_an_error(x, blocks, message):
    model = Network(blocks=blocks)
    variables = random_variables(model, x)
    with pytest.raises(ValueError, match=message):
        nl.describe(model, variables, x, expected=5)


class NnxStage(nnx.Module):
    def __init__(self, rngs, kind):
        self.dense = nnx.Linear(6, 6, rngs=rngs)
        block = nnx.bridge.ToNNX(nl.layers.nonlocal_block(kind), rngs=rngs)
        self.block = block.lazy_init(jnp.zeros((2, 4, 6, 6)))

    def __call__(self, x, train=False):
        mutable = ["batch_stats"] if train else False
        return self.block(self.dense(x), train=train, mutable=mutable)


class NnxNetwork(nnx.Module):
    def __init__(self, rngs, transform=lambda call: call):
        kinds = ("embedded_gaussian", "concatenation")
        self.stages = nnx.List([NnxStage(rngs, kind) for kind in kinds])
        self.transform = transform

    def __call__(self, x, **kwargs):
        for stage in self.stages:
            x = self.transform(lambda stage, x: stage(x, **kwargs))(stage, x)
        return x


def nnx_network(**options):
    network = NnxNetwork(nnx.Rngs(0), **options)
    scale = network.stages[1].block.out_norm["scale"]
    scale[...] = jnp.linspace(0.5, 1.5, 6)
    return network


class TestNnx:
    @pytest.mark.parametrize("train", [False, True])
    def test_each_block_has_its_place_its_parameters_and_its_ratio(self, x, train):
        network = nnx_network()
        first, second = nl.describe(network, None, x, expected=2, train=train)
        assert (first.place, second.place) == ("stages/0/block", "stages/1/block")
        assert (first.operation, second.operation) == ("EmbeddedGaussian", "Concatenation")
        assert (first.parameters, second.parameters) == (4 * 6 * 3 + 2 * 6, 4 * 6 * 3 + 2 * 6 + 6)
        assert first.ratio == 0.0
        stage = network.stages[1]
        block_input = stage.dense(network.stages[0](x))
        residual = stage.block(block_input, train=train, mutable=["batch_stats"]) - block_input
        expected = np.linalg.norm(residual) / np.linalg.norm(block_input)
        np.testing.assert_allclose(second.ratio, expected, rtol=1e-4)

    def test_the_model_is_not_changed(self, x):
        network = nnx_network()
        before = jax.tree.map(jnp.copy, nnx.state(network))
        nl.describe(network, None, x, train=True)
        same = jax.tree.map(lambda new, old: bool((new == old).all()), nnx.state(network), before)
        assert all(jax.tree.leaves(same))

    def test_jitted_methods_that_were_traced_before(self, x):
        network = nnx_network(transform=nnx.jit)
        expected = nl.describe(nnx_network(), None, x)
        for _ in range(2):
            network(x)
            assert [str(block) for block in nl.describe(network, None, x)] == list(
                map(str, expected)
            )

    def test_a_linen_network_inside(self, x):
        bridged = nnx.bridge.ToNNX(Network(), rngs=nnx.Rngs(0)).lazy_init(x)
        described = nl.describe(bridged, None, x, expected=2)
        variables = Network().init(jax.random.key(0), x)
        assert described == nl.describe(Network(), variables, x)

    def test_the_number_of_blocks(self, x):
        with pytest.raises(
            ValueError, match=r"got 1, but it has 2: stages/0/block, stages/1/block"
        ):
            nl.describe(nnx_network(), None, x, expected=1)
        assert nl.describe(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), None, x) == ()

    def test_transformed_blocks_are_an_error(self, x):
        with pytest.raises(ValueError, match=r"must not be inside nnx.scan.*stages/0/block"):
            nl.describe(nnx_network(transform=nnx.remat), None, x)

    def test_variables_of_the_other_api(self, x):
        network = nnx_network()
        with pytest.raises(TypeError, match=r"must be None.*got State"):
            nl.describe(network, nnx.state(network), x)
        with pytest.raises(TypeError, match="must be the result of `init`; got None"):
            nl.describe(Network(), None, x)
        with pytest.raises(TypeError, match="must be a Linen or an NNX module; got function"):
            nl.describe(lambda x: x, None, x)
