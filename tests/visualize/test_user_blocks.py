"""Blocks written outside this library are found by everything that looks for blocks."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from visualize.networks import normal, random_variables

import nonlocal_jax as nl
from nonlocal_jax.visualize import GeometryError, affinities


class PairwiseAttention(nn.Module):
    """A block as a user would write it, outside this library."""

    with_layout: bool = True

    @nn.compact
    def __call__(self, x):
        batch, *positions, channels = x.shape
        rows = x.reshape(batch, -1, channels)
        theta = nn.Dense(4, name="theta")(rows)
        phi = nn.Dense(4, name="phi")(rows[:, ::2])
        g = nn.Dense(4, name="g")(rows[:, ::2])
        layout = None
        if self.with_layout:  # every second column is a key
            window = (1,) * (len(positions) - 1) + (2,)
            layout = nl.layers.SumLayout(tuple(positions), window)
        y = nl.layers.nonlocal_response(self, "dot_product", theta, phi, g, layout=layout)
        residual = nn.Dense(channels, name="out")(y).reshape(x.shape)
        ratio = jnp.linalg.norm(residual) / jnp.linalg.norm(x)
        self.sow("intermediates", "residual_ratio", ratio)
        return x + residual


class UserNetwork(nn.Module):
    """A user's block, whose output goes into a block of the library."""

    with_layout: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), strides=2, name="conv1")(x)
        x = PairwiseAttention(self.with_layout, name="own")(x)
        x = nn.Conv(6, (3, 3), strides=2, name="conv2")(x)
        return nl.layers.nonlocal_block("dot_product", name="library")(x)


@pytest.mark.parametrize("with_layout", [True, False])
def test_a_block_written_by_a_user_is_found(with_layout):
    x = normal((2, 12, 16, 3))
    model = UserNetwork(with_layout)
    variables = random_variables(model, x)
    maps = affinities(model, variables, x)
    assert list(maps) == ["own", "library"]
    own = maps["own"]
    if with_layout:
        assert (own.queries, own.keys) == ((6, 8), (6, 4))
        assert own.geometry().fields[0].stride == 2
        assert own.geometry("keys").fields[1].stride == 4
    else:
        assert (own.queries, own.keys) == ((48,), (24,))
        with pytest.raises(
            GeometryError,
            match=r"own: the module does not say which positions its rows are; pass layout="
            r"nl\.layers\.SumLayout\(\.\.\.\) to nl\.layers\.nonlocal_response",
        ):
            own.geometry()
    # The receptive fields of later blocks are followed through the user's block in either case.
    assert maps["library"].geometry().fields[0].stride == 4

    weights = variables["params"]
    features = nn.Conv(6, (3, 3), strides=2).apply({"params": weights["conv1"]}, x)
    rows = np.asarray(features).reshape(2, 48, 6)
    theta = rows @ weights["own"]["theta"]["kernel"]
    phi = rows[:, ::2] @ weights["own"]["phi"]["kernel"]
    queries = np.stack(np.unravel_index(np.arange(48), own.queries), axis=-1)
    np.testing.assert_allclose(
        own.rows(queries).reshape(2, 48, 24), theta @ phi.swapaxes(1, 2) / 24, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("with_layout", [True, False])
def test_describe_and_cost_find_a_block_written_by_a_user(with_layout):
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = PairwiseAttention(with_layout, name="own")
            with nl.layers.enclosing_block(block):
                return block(x)

    x = jnp.asarray(normal((2, 12, 16, 3)))
    (description,) = nl.describe(Wrapped(), random_variables(Wrapped(), x), x, expected=1)
    assert str(description).startswith("own: PairwiseAttention, ")
    assert description.ratio > 0
    rows = {layer.place: layer for layer in nl.models.cost(Wrapped(), x.shape).layers}
    assert rows["own"].multiply_adds == 2 * 192 * 96 * (4 + 4)


def test_a_layout_that_does_not_fit_is_an_error():
    class Cropped(nn.Module):
        """The rows of θ are not the positions of the module's input."""

        rows: int

        @nn.compact
        def __call__(self, x):
            theta = x[:, : self.rows]
            layout = nl.layers.SumLayout((5,), (1,))
            y = nl.layers.nonlocal_response(
                self, "dot_product", theta, x[:, :5], x[:, :5], layout=layout
            )
            return y

    x = normal((1, 6, 4))
    (affinity,) = affinities(Cropped(5), {}, x).values()
    with pytest.raises(
        GeometryError,
        match=r"the layout must have the positions of the module's input, \(6,\); got \(5,\)",
    ):
        affinity.geometry()
    with pytest.raises(
        ValueError, match=r"layout of Cropped must have as many positions as theta has rows, 4; got"
    ):
        affinities(Cropped(4), {}, x)
