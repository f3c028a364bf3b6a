"""The non-local blocks of PySlowFast and pytorchvideo, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import peers
from parity.compare import assert_close, channels_last, named, numbers
from torch import nn

from nonlocal_jax.layers import nonlocal_block

CHANNELS, INNER = 14, 6


def slowfast_block(**options):
    return peers.load("slowfast.models.nonlocal_helper").Nonlocal(CHANNELS, INNER, **options)


def pytorchvideo_block(**options):
    return peers.load("pytorchvideo.layers.nonlocal_net").create_nonlocal(
        dim_in=CHANNELS, dim_inner=INNER, **options
    )


def variables_of(tensors, norm):
    """Converts a state dict, or gradients, to variables of the block here."""
    array = {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in tensors.items()}
    dense = {
        name: {
            "kernel": array[f"conv_{name}.weight"][:, :, 0, 0, 0].T,
            "bias": array[f"conv_{name}.bias"],
        }
        for name in ("theta", "phi", "g", "out")
    }
    out_norm = {"scale": array[f"{norm}.weight"], "bias": array[f"{norm}.bias"]}
    params = {"out": dense.pop("out"), "out_norm": out_norm, "operation": dense}
    if f"{norm}.running_var" not in array:
        return {"params": params}
    statistics = {"mean": array[f"{norm}.running_mean"], "var": array[f"{norm}.running_var"]}
    return {"params": params, "batch_stats": {"out_norm": statistics}}


@pytest.mark.parametrize("pool", [None, (1, 2, 2), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("instantiation", ["softmax", "dot_product"])
@pytest.mark.parametrize(
    ("make", "norm"),
    [(slowfast_block, "bn"), (pytorchvideo_block, "norm")],
    ids=["slowfast", "pytorchvideo"],
)
def test_block(make, norm, instantiation, pool):
    torch.manual_seed(0)
    peer = make(instantiation=instantiation, pool_size=pool).eval()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm3d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    shape = (2, CHANNELS, 5, 7, 9)
    x, cotangent = numbers(*shape).requires_grad_(), numbers(*shape, seed=2)
    z = peer(x)
    z.backward(cotangent)
    variables = variables_of(peer.state_dict(), norm)
    expected = variables_of({name: p.grad for name, p in peer.named_parameters()}, norm)["params"]

    pairwise = {"softmax": "embedded_gaussian"}.get(instantiation, instantiation)
    options = {"inner_features": INNER, "subsample": pool or False}
    block = nonlocal_block(pairwise, preset="slowfast", **options)

    def apply(params, x):
        return block.apply({**variables, "params": params}, x)

    @jax.jit
    def value_and_gradients(params, x, cotangent):
        output, pullback = jax.vjp(apply, params, x)
        return output, *pullback(cotangent)

    arrays = (jnp.asarray(channels_last(a)) for a in (x.detach(), cotangent))
    output, weight_gradients, x_gradient = value_and_gradients(variables["params"], *arrays)
    assert_close(output, channels_last(z.detach()), 1e-5, "z")
    assert_close(x_gradient, channels_last(x.grad), 1e-4, "gradient of x")
    weight_gradients, expected = named(weight_gradients), named(expected)
    assert weight_gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        # Relative to the kernel's too, because under a softmax the gradient of the bias of φ is
        # nothing but rounding.
        kernel = expected.get(name.replace("/bias", "/kernel"), 0)
        scale = np.abs(kernel).max()
        assert_close(weight_gradients[name], gradient, 1e-4, f"gradient of {name}", scale)
