"""The MNIST network of Non-local_pytorch: logits, maps and gradients, with both its namings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import mnist_peer, peers
from parity.compare import (
    ask,
    assert_close,
    channels_last,
    compare_export,
    compare_gradients,
    load,
    numbers,
    randomise,
)

import nonlocal_jax as nl

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_mnist(instantiation, tmp_path):
    network = mnist_peer.Mnist(instantiation)
    peer = peers.Peer(network, {}, network)
    images, cotangent = numbers(3, 1, 28, 28).sigmoid(), numbers(3, 10, seed=2)
    state = randomise(peer, images.shape)
    model = nl.models.non_local_pytorch_mnist(instantiation)
    variables = load(
        tmp_path / "net.pth", {f"module.{name}": tensor for name, tensor in state.items()}, model
    )
    compare_export(variables, state, "non_local_pytorch")
    answer = ask(peer, images, cotangent)
    logits, maps = jax.jit(functools.partial(model.apply, return_maps=True))(
        variables, jnp.asarray(channels_last(images))
    )
    assert_close(logits, answer.logits, 5e-5, "logits")
    for affinity, block in zip(maps, network.blocks, strict=True):
        assert_close(affinity, block.map.detach().numpy(), 5e-5, "map")
    compare_gradients(model, variables, images, cotangent, answer, "non_local_pytorch")


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_names_of_the_first_version(instantiation, tmp_path):
    """The same layers in one sequence, so the same weights."""
    states = []
    for first in (False, True):
        network = mnist_peer.Mnist(instantiation, first)
        states.append(randomise(peers.Peer(network, {}, network), (3, 1, 28, 28)))
    assert [tensor.shape for tensor in states[0].values()] == [
        tensor.shape for tensor in states[1].values()
    ]
    model = nl.models.non_local_pytorch_mnist(instantiation)
    present, first = (load(tmp_path / "net.pth", state, model) for state in states)
    jax.tree.map(np.testing.assert_array_equal, first, present)
    compare_export(first, states[1], "non_local_pytorch (first version)")
