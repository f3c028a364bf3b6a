"""Parameters and multiply-adds: the paper's Table 2e, and sums by hand."""

import functools

import flax.linen as nn
import pytest
from flax import nnx

from nonlocal_jax.layers import Affine, BatchNorm, nonlocal_block
from nonlocal_jax.models import cost, non_local_pytorch_mnist, video_resnet


@pytest.mark.networks
def test_table_2e():
    """The table relates I3D and blocks to C2D R101 with 43.2 M parameters and 34.2 B FLOPs.

    I3D 3×3×3 has 1.5× and 1.8× of them, I3D 3×1×1 1.2× and 1.5×, five blocks 1.2× and 1.2×. The
    paper does not count norms. Its 34.2 B, which the doctest of `cost` has, are those of strides in
    the 1×1 convolution. With strides as in the released code it is 35.1 B.
    """

    def totals(*args):
        model = video_resnet(101, *args, clip="32x2", preset="caffe2")
        total = cost(model, (1, 32, 224, 224, 3))
        return total.parameters - total.norm_parameters, total.multiply_adds

    parameters, multiply_adds = totals("c2d", 0)
    assert round(parameters / 1e6, 1) == 43.2
    assert round(multiply_adds / 1e9, 1) == 35.1
    for args, ratios in (
        (("i3d_3x3x3", 0), (1.5, 1.8)),
        (("i3d_3x1x1", 0), (1.2, 1.5)),
        (("c2d", 5), (1.2, 1.2)),
    ):
        larger_parameters, larger_multiply_adds = totals(*args)
        parameter_ratio = larger_parameters / parameters
        multiply_add_ratio = larger_multiply_adds / multiply_adds
        assert (round(parameter_ratio, 1), round(multiply_add_ratio, 1)) == ratios


def test_parameters_of_pyslowfasts_i3d_with_blocks():
    assert cost(video_resnet(50, preset="slowfast"), (1, 8, 224, 224, 3)).parameters == 35_401_936


@pytest.mark.parametrize(
    ("instantiation", "pairwise"),
    [
        ("gaussian", 20 * 4 * (6 + 3)),
        ("embedded_gaussian", 20 * 4 * (3 + 3)),
        ("dot_product", 20 * 4 * (3 + 3)),
        ("concatenation", 20 * 3 + 4 * 3 + 20 * 4 * 3),
    ],
)
def test_a_block_by_hand(instantiation, pairwise):
    """20 positions of 6 channels, 3 inside, and 4 keys."""
    total = cost(nonlocal_block(instantiation, norm=nn.LayerNorm), (1, 4, 5, 6))
    embeddings = (1 if instantiation == "gaussian" else 3) * 20 * 6 * 3
    assert total.multiply_adds == embeddings + pairwise + 20 * 3 * 6
    assert total.norm_parameters == 12
    assert total.layers[-1].place == "out_norm"


@pytest.mark.parametrize("norm", [BatchNorm, Affine, nn.GroupNorm])
def test_parameters_of_norms(norm):
    """A scale and a shift for 6 channels."""
    options = {"num_groups": 2} if norm is nn.GroupNorm else {}
    block = nonlocal_block("dot_product", norm=functools.partial(norm, **options))
    assert cost(block, (1, 4, 5, 6)).norm_parameters == 12


def test_convolutions_by_hand():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), strides=2, feature_group_count=2)(x)
            return nn.Dense(5)(x.mean((1, 2)))

    total = cost(Network(), (2, 6, 8, 4))
    assert total.multiply_adds == 2 * 3 * 4 * 8 * 9 * 2 + 2 * 8 * 5
    assert total.parameters == 9 * 2 * 8 + 8 + 8 * 5 + 5
    assert str(total).endswith("197 parameters, 0.00 G multiply-adds")


@pytest.mark.parametrize(
    ("instantiation", "parameters"),
    [
        ("embedded_gaussian", 401_530),
        ("dot_product", 401_530),
        ("gaussian", 396_314),
        ("concatenation", 401_626),
    ],
)
def test_parameters_of_the_mnist_network(instantiation, parameters):
    assert cost(non_local_pytorch_mnist(instantiation), (1, 28, 28, 1)).parameters == parameters


def test_nothing_is_computed():
    model = non_local_pytorch_mnist()
    batch = 10**9  # of which the first layer alone would need 100 TB
    single = cost(model, (1, 28, 28, 1))
    assert cost(model, (batch, 28, 28, 1)).multiply_adds == batch * single.multiply_adds


@pytest.mark.usefixtures("as_users_see_it")
def test_nnx_models_are_refused():
    with pytest.raises(TypeError, match="model must be a Linen module; got Linear"):
        cost(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), (1, 3))
