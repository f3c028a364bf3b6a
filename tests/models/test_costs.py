"""Parameters and multiply-adds: the paper's Table 2e, and sums by hand."""

import flax.linen as nn
import pytest

from nonlocal_jax.layers import nonlocal_block
from nonlocal_jax.models import cost, non_local_pytorch_mnist, video_resnet

CLIP = (1, 32, 224, 224, 3)


def network(*args, **options):
    return cost(video_resnet(101, *args, clip="32x2", preset="caffe2", **options), CLIP)


def test_table_2e():
    """43.2 M parameters and 34.2 B FLOPs of C2D R101; I3D 3×3×3 1.5× and 1.8×, I3D 3×1×1 1.2× and 1.5×, five blocks 1.2× and 1.2×.

    The paper does not count norms. Its 34.2 B are those of strides in the 1×1; as the released code has them, it is 35.1 B.
    """
    base = network("c2d", 0)
    parameters = base.parameters - base.norm_parameters
    assert round(parameters / 1e6, 1) == 43.2
    assert round(base.multiply_adds / 1e9, 1) == 35.1
    assert round(network("c2d", 0, stride_at="conv_a").multiply_adds / 1e9, 1) == 34.2
    for args, ratios in (
        (("i3d_3x3x3", 0), (1.5, 1.8)),
        (("i3d_3x1x1", 0), (1.2, 1.5)),
        (("c2d", 5), (1.2, 1.2)),
    ):
        found = network(*args)
        ratio = (
            (found.parameters - found.norm_parameters) / parameters,
            found.multiply_adds / base.multiply_adds,
        )
        assert tuple(round(value, 1) for value in ratio) == ratios


def test_parameters_of_pyslowfasts_i3d_with_blocks():
    assert cost(video_resnet(50, preset="slowfast"), (1, 8, 224, 224, 3)).parameters == 35_401_936


@pytest.mark.parametrize(
    ("instantiation", "pairs"),
    [
        ("gaussian", 20 * 4 * (6 + 3)), ("embedded_gaussian", 20 * 4 * (3 + 3)), ("dot_product", 20 * 4 * (3 + 3)),
        ("concatenation", 20 * 3 + 4 * 3 + 20 * 4 * 3),
    ],
)  # fmt: skip
def test_a_block_by_hand(instantiation, pairs):
    """20 positions of 6 channels, 3 inside; 4 keys."""
    found = cost(nonlocal_block(instantiation, norm=nn.LayerNorm), (1, 4, 5, 6))
    embeddings = (1 if instantiation == "gaussian" else 3) * 20 * 6 * 3
    assert found.multiply_adds == embeddings + pairs + 20 * 3 * 6
    assert found.norm_parameters == 12
    assert found.layers[-1].place == "out_norm"


def test_convolutions_by_hand():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), strides=2, feature_group_count=2)(x)
            return nn.Dense(5)(x.mean((1, 2)))

    found = cost(Two(), (2, 6, 8, 4))
    assert found.multiply_adds == 2 * 3 * 4 * 8 * 9 * 2 + 2 * 8 * 5
    assert found.parameters == 9 * 2 * 8 + 8 + 8 * 5 + 5
    assert str(found).endswith("197 parameters, 0.00 G multiply-adds")


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
    model, shape = (
        video_resnet(101, "c2d", 0, clip="32x2"),
        (128, 1024, 1024, 3),
    )  # 64 of them would be terabytes
    assert cost(model, (64, *shape)).multiply_adds == 64 * cost(model, (1, *shape)).multiply_adds
