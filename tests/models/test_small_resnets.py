"""The networks for CIFAR and MNIST."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_jax as nl
from nonlocal_jax.models import cifar_resnet, cost, non_local_pytorch_mnist

IMAGES = jax.random.normal(jax.random.key(0), (2, 16, 20, 3))


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_parameters_of_the_cifar_networks(depth, parameters):
    """The table of the residual networks' paper has 0.27, 0.46 and 0.85 M."""
    assert cost(cifar_resnet(depth), (1, 32, 32, 3)).parameters == parameters


def test_a_cifar_network_with_blocks_starts_as_the_one_without():
    plain, blocks = (
        cifar_resnet(8),
        cifar_resnet(8, {"res2": (0,), "res3": (0,)}, instantiation="dot_product"),
    )
    variables, more = (
        jax.jit(plain.init)(jax.random.key(1), IMAGES),
        jax.jit(blocks.init)(jax.random.key(1), IMAGES),
    )
    merged = {name: {**more[name], **variables[name]} for name in ("params", "batch_stats")}
    np.testing.assert_array_equal(blocks.apply(merged, IMAGES), plain.apply(variables, IMAGES))
    places = [block.place for block in nl.describe(blocks, merged, IMAGES, expected=2)]
    assert places == ["nonlocal_res2_0", "nonlocal_res3_0"]


def test_a_cifar_network_trains():
    model = cifar_resnet(8, {"res3": (0,)}, num_classes=4, preset="caffe2")
    variables = jax.jit(model.init)(jax.random.key(1), IMAGES)

    def loss(params):
        logits, updated = model.apply(
            {**variables, "params": params}, IMAGES, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(logits)), updated

    gradients, updated = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert not np.array_equal(
        updated["batch_stats"]["conv1_norm"]["mean"], variables["batch_stats"]["conv1_norm"]["mean"]
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((21,), "depth must be 6n \\+ 2, such as 20, 32 or 56; got 21"),
        (
            (20, {"res5": (0,)}),
            "a stage of nonlocal_blocks must be one of 'res1', 'res2', 'res3'; got 'res5'",
        ),
        ((20, {"res1": (3,)}), "res1 has residual blocks 0 to 2; got 3"),
    ],
)
def test_bad_cifar_networks(args, message):
    with pytest.raises(ValueError, match=message):
        cifar_resnet(*args)


@pytest.mark.parametrize(
    "instantiation", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
)
def test_the_maps_of_the_mnist_network(instantiation):
    """They are those that the blocks sow, and those of a softmax sum to 1."""
    model = non_local_pytorch_mnist(instantiation)
    images = jax.random.uniform(jax.random.key(0), (2, 28, 28, 1))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    run = jax.jit(lambda v, x: model.apply(v, x, return_maps=True, mutable=["intermediates"]))
    (logits, maps), state = run(variables, images)
    assert logits.shape == (2, 10)
    for i, (affinity, shape) in enumerate(
        zip(maps, ((2, 196, 49), (2, 49, 9)), strict=True), start=1
    ):
        assert affinity.shape == shape
        np.testing.assert_array_equal(
            affinity, state["intermediates"][f"nonlocal{i}"]["operation"]["affinity"][0]
        )
        if "gaussian" in instantiation:
            np.testing.assert_allclose(affinity.sum(-1), 1, rtol=1e-5)


@pytest.mark.usefixtures("as_users_see_it")
def test_images_of_another_size():
    with pytest.raises(
        ValueError, match=r"image must have shape \(B, 28, 28, 1\); got \(2, 16, 20, 3\)"
    ):
        non_local_pytorch_mnist().init(jax.random.key(0), IMAGES)
