"""The non-local blocks of PySlowFast and pytorchvideo alone, in float32."""

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


def of_slowfast(**options):
    return peers.load("slowfast.models.nonlocal_helper").Nonlocal(CHANNELS, INNER, **options)


def of_pytorchvideo(**options):
    return peers.load("pytorchvideo.layers.nonlocal_net").create_nonlocal(
        dim_in=CHANNELS, dim_inner=INNER, **options
    )


def variables_of(tensors, norm):
    """A state dict, or gradients, as variables of our block."""
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
    [(of_slowfast, "bn"), (of_pytorchvideo, "norm")],
    ids=["slowfast", "pytorchvideo"],
)
def test_block(make, norm, instantiation, pool):
    torch.manual_seed(0)
    theirs = make(instantiation=instantiation, pool_size=pool).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm3d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    x, cotangent = (
        numbers(2, CHANNELS, 5, 7, 9).requires_grad_(),
        numbers(2, CHANNELS, 5, 7, 9, seed=2),
    )
    z = theirs(x)
    z.backward(cotangent)
    variables = variables_of(theirs.state_dict(), norm)
    expected = variables_of({name: p.grad for name, p in theirs.named_parameters()}, norm)["params"]

    kind = {"softmax": "embedded_gaussian"}.get(instantiation, instantiation)
    block = nonlocal_block(kind, preset="slowfast", inner_features=INNER, subsample=pool or False)
    apply = jax.jit(lambda params, x: block.apply({**variables, "params": params}, x))
    ours, pullback = jax.vjp(apply, variables["params"], jnp.asarray(channels_last(x.detach())))
    assert_close(ours, channels_last(z.detach()), 1e-5, "z")
    of_params, of_x = pullback(jnp.asarray(channels_last(cotangent)))
    assert_close(of_x, channels_last(x.grad), 1e-4, "gradient of x")
    of_params, expected = named(of_params), named(expected)
    assert of_params.keys() == expected.keys()
    for name, gradient in expected.items():
        # Relative to the kernel's too: the bias of φ has no gradient under a softmax, but rounding.
        kernel = expected.get(name.replace("/bias", "/kernel"), 0)
        assert_close(of_params[name], gradient, 1e-4, f"gradient of {name}", np.abs(kernel).max())
