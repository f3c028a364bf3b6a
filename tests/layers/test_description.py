"""`describe`: finds the blocks of a network, wherever they are, and shows whether they do anything."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_jax as nl

X = jax.random.normal(jax.random.key(0), (2, 4, 6, 6))


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


def test_each_block_has_its_place_its_parameters_and_its_ratio():
    model = Network()
    variables = model.init(jax.random.key(1), X)
    first, second = nl.describe(model, variables, X, expected=2)
    assert (first.place, second.place) == ("nonlocal_0", "nonlocal_1")
    assert first.operation == "EmbeddedGaussian"
    assert first.parameters == 4 * 6 * 3 + 2 * 6
    assert first.ratio == second.ratio == 0.0

    variables["params"]["nonlocal_1"]["out_norm"]["scale"] = jnp.ones(6)
    first, second = nl.describe(model, variables, X)
    assert first.ratio == 0.0
    before = nn.Dense(6).apply(
        {"params": variables["params"]["dense_1"]},
        nn.Dense(6).apply({"params": variables["params"]["dense_0"]}, X),
    )
    after = model.apply(variables, X)
    np.testing.assert_allclose(
        second.ratio, np.linalg.norm(after - before) / np.linalg.norm(before), rtol=1e-4
    )
    assert (
        str(second)
        == f"nonlocal_1: EmbeddedGaussian, 84 parameters, ‖block output‖/‖input‖ {second.ratio:.3g}"
    )


def test_blocks_under_remat_are_found():
    model = Network(remat=True)
    described = nl.describe(model, model.init(jax.random.key(1), X), X, expected=2)
    assert [block.place for block in described] == ["nonlocal_0", "nonlocal_1"]


@pytest.mark.parametrize("axes", [{}, {"intermediates": 0}])
def test_scanned_blocks_are_an_error_that_says_so(axes):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nl.layers.nonlocal_block("dot_product", name="block")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes_of = {"params": 0, "batch_stats": 0, **axes}
            return nn.scan(Step, variable_axes=axes_of, split_rngs={"params": True}, length=3)(
                name="steps"
            )(x, None)[0]

    with pytest.raises(ValueError, match=r"must not be inside nn.scan; got steps/block"):
        nl.describe(Scanned(), Scanned().init(jax.random.key(1), X), X)


def test_a_block_alone_describes_itself():
    block = nl.layers.nonlocal_block("gaussian")
    (described,) = nl.describe(block, block.init(jax.random.key(1), X), X)
    assert described.place == ""
    assert described.operation == "Gaussian"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [(0, "expected 5 .* Network has 0: none"), (2, "has 2: nonlocal_0, nonlocal_1")],
)
def test_missing_blocks_are_an_error(blocks, message):
    model = Network(blocks=blocks)
    variables = model.init(jax.random.key(1), X)
    assert len(nl.describe(model, variables, X)) == blocks
    with pytest.raises(ValueError, match=message):
        nl.describe(model, variables, X, expected=5)
