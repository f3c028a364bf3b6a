"""The networks for CIFAR and MNIST."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.models import cifar_resnet, cost, non_local_pytorch_mnist

IMAGES = np.random.default_rng(0).standard_normal((2, 16, 20, 3)).astype(np.float32)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_parameters_of_the_cifar_networks(depth, parameters):
    """The paper of the residual networks has 0.27, 0.46 and 0.85 M in its table."""
    assert cost(cifar_resnet(depth), (1, 32, 32, 3)).parameters == parameters


def test_a_cifar_network_with_blocks_starts_as_the_one_without():
    plain = cifar_resnet(8)
    network = cifar_resnet(8, {"res2": (0,), "res3": (0,)}, instantiation="dot_product")
    variables = jax.jit(network.init)(jax.random.key(1), IMAGES)
    plain_variables = {
        collection: {place: v for place, v in tree.items() if "nonlocal" not in place}
        for collection, tree in variables.items()
    }
    logits = jax.jit(network.apply)(variables, IMAGES)
    plain_logits = jax.jit(plain.apply)(plain_variables, IMAGES)
    np.testing.assert_array_equal(logits, plain_logits)
    described = nl.describe(network, variables, jnp.asarray(IMAGES), expected=2)
    places = [block.place for block in described]
    assert places == ["nonlocal_res2_0", "nonlocal_res3_0"]


def test_a_cifar_network_trains():
    model = cifar_resnet(8, {"res3": (0,)}, num_classes=4, preset="caffe2")
    variables = samples.weights(model)

    def loss(params, images):
        logits, updated = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(logits)), updated

    gradients, updated = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], IMAGES)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    mean = updated["batch_stats"]["conv1_norm"]["mean"]
    assert not np.array_equal(mean, variables["batch_stats"]["conv1_norm"]["mean"])


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
    images = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)

    @jax.jit
    def run(variables, images):
        return model.apply(variables, images, return_maps=True, mutable=["intermediates"])

    (logits, maps), state = run(samples.weights(model), images)
    assert logits.shape == (2, 10)
    assert [affinity.shape for affinity in maps] == [(2, 196, 49), (2, 49, 9)]
    for i, affinity in enumerate(maps, start=1):
        sown = state["intermediates"][f"nonlocal{i}"]["operation"]["affinity"][0]
        np.testing.assert_array_equal(affinity, sown)
        if "gaussian" in instantiation:
            np.testing.assert_allclose(affinity.sum(-1), 1, rtol=1e-5)


@pytest.mark.usefixtures("as_users_see_it")
def test_images_of_another_size():
    message = r"image must have shape \(B, 28, 28, 1\); got \(2, 16, 20, 3\)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(non_local_pytorch_mnist().init, jax.random.key(0), IMAGES)


@pytest.mark.usefixtures("as_users_see_it")
def test_images_with_channels_first():
    images = jnp.ones((2, 1, 28, 28))
    expected = r"got \(2, 1, 28, 28\)\. Axis 1 has 1, as in PyTorch"
    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(non_local_pytorch_mnist().init, jax.random.key(0), images)
