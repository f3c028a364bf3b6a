"""The blocks that are compared with mmcv-lite, and the translation of their weights.

The cases are every mode, dimension, subsampling and norm.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.layers import nonlocal_block

POSITIONS = {1: (11,), 2: (5, 7), 3: (3, 5, 7)}  # odd, so that pooling drops a row
CHANNELS = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """One block of mmcv-lite."""

    mode: str
    dimensions: int
    sub_sample: bool
    norm: bool

    @property
    def name(self) -> str:
        pooled, norm = "pooled" if self.sub_sample else "full", "norm" if self.norm else "plain"
        return f"{self.mode}-{self.dimensions}d-{pooled}-{norm}"

    @property
    def positions(self):
        return POSITIONS[self.dimensions]


CASES = [
    Case(*options)
    for options in itertools.product(
        ("gaussian", "embedded_gaussian", "dot_product", "concatenation"),
        (1, 2, 3),
        (False, True),
        (False, True),
    )
]


def from_mmcv(state):
    """Converts a state dict of mmcv (NumPy arrays) to variables of `NonLocalBlock`."""

    def dense(prefix):
        kernel = state[f"{prefix}.weight"]
        leaf = {"kernel": jnp.asarray(kernel.reshape(kernel.shape[:2]).T)}
        return leaf | (
            {"bias": jnp.asarray(state[f"{prefix}.bias"])} if f"{prefix}.bias" in state else {}
        )

    operation = {}
    for name in ("theta", "phi", "g"):
        for prefix in (f"{name}.conv", f"{name}.0.conv"):  # the second where a pooling follows
            if f"{prefix}.weight" in state:
                operation[name] = dense(prefix)
    if "concat_project.conv.weight" in state:
        operation["w_f"] = jnp.asarray(state["concat_project.conv.weight"].ravel())
    params = {"operation": operation, "out": dense("conv_out.conv")}
    if "conv_out.bn.weight" not in state:
        return {"params": params}
    params["out_norm"] = {
        "scale": jnp.asarray(state["conv_out.bn.weight"]),
        "bias": jnp.asarray(state["conv_out.bn.bias"]),
    }
    statistics = {
        "mean": state["conv_out.bn.running_mean"],
        "var": state["conv_out.bn.running_var"],
    }
    return {"params": params, "batch_stats": {"out_norm": jax.tree.map(jnp.asarray, statistics)}}


def compare(case, state, x, z, cotangent, gradients):
    """Compares z, and the gradients of Σ cotangent · z for x and every weight.

    Args:
        case: The block.
        state: The weights of mmcv's block by name.
        x: The input. Like all arrays here, it has its channels first.
        z: The output of mmcv's block.
        cotangent: The cotangent of z.
        gradients: Gradients of mmcv's block for "x" and for the names of `state`.
    """
    overrides = {} if case.norm else {"norm": None}
    block = nonlocal_block(case.mode, preset="mmcv", subsample=case.sub_sample, **overrides)
    variables = from_mmcv(state)

    def apply(params, x):
        output = block.apply({**variables, "params": params}, jnp.moveaxis(x, 1, -1))
        return jnp.moveaxis(output, -1, 1)

    @jax.jit
    def value_and_gradients(params, x, cotangent):
        output, pullback = jax.vjp(apply, params, x)
        return output, *pullback(cotangent)

    output, weight_gradients, x_gradient = value_and_gradients(
        variables["params"], jnp.asarray(x), jnp.asarray(cotangent)
    )
    np.testing.assert_allclose(output, z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_gradient, gradients["x"], rtol=1e-4, atol=1e-5)
    expected = from_mmcv({**state, **gradients})["params"]
    assert jax.tree.structure(weight_gradients) == jax.tree.structure(expected)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(assert_close, weight_gradients, expected)
