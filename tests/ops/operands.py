"""Random operands, one signature for all four operations, and gradients, for their tests."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax import ops
from nonlocal_jax.ops import kernels
from nonlocal_jax.ops.kernels import dense, sorted_keys, streaming
from nonlocal_jax.ops.kernels.kernel import Forecast, Kernel
from nonlocal_jax.ops.platforms import PLATFORMS

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def make_operands(n, m, d, e, batch, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"theta": (*batch, n, d), "phi": (*batch, m, d), "g": (*batch, m, e), "w_f": (2 * d,)}
    return {
        name: jnp.asarray(generator.standard_normal(shape), dtype) for name, shape in shapes.items()
    }


def call(instantiation, implementation, operands, **options):
    names = ["theta", "phi", "g"]
    if instantiation == "concatenation":
        names.append("w_f")
    function = getattr(ops, instantiation)
    return function(*(operands[name] for name in names), implementation=implementation, **options)


# Compiled once for each implementation and shape, for all tests of a process.
@functools.partial(jax.jit, static_argnames=("instantiation", "implementation"))
def respond(instantiation, implementation, operands, key_mask=None):
    return call(instantiation, implementation, operands, key_mask=key_mask)


def cotangent(y):
    """The gradients below are those of Σ cos(index) · y."""
    return jnp.cos(jnp.arange(y.size)).reshape(y.shape)


@functools.partial(jax.jit, static_argnames=("instantiation", "implementation"))
def value_and_gradients(instantiation, implementation, operands, key_mask=None):
    """Returns the response as "y", and the gradient of each operand."""

    def loss(operands):
        y = call(instantiation, implementation, operands, key_mask=key_mask)
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        return jnp.sum(wide * cotangent(y)), y

    gradients, y = jax.grad(loss, has_aux=True)(operands)
    return {"y": y} | gradients


def assert_equal_to_dense(instantiation, implementation, operands, key_mask=None):
    fast = value_and_gradients(instantiation, implementation, operands, key_mask)
    dense = value_and_gradients(instantiation, "dense", operands, key_mask)
    for name, expected in dense.items():
        scale = max(float(jnp.abs(expected).max()), 1.0)
        np.testing.assert_allclose(fast[name], expected, rtol=2e-5, atol=1e-5 * scale, err_msg=name)


@contextlib.contextmanager
def registered(*rows):
    """Context manager that adds rows to the table of kernels, so that they can be named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "KERNELS", (*kernels.KERNELS, *rows))
        yield


def streaming_row(name, form):
    """Returns a row that streams in one form on every platform."""
    settings = dict.fromkeys(PLATFORMS, form)
    return dataclasses.replace(streaming.KERNEL, name=name, settings=settings)


def sorted_row(name, **settings):
    """Returns a row that sorts with settings unlike the platform's."""
    all_settings = {
        platform: default._replace(**settings) for platform, default in sorted_keys.SETTINGS.items()
    }
    return dataclasses.replace(sorted_keys.KERNEL, name=name, settings=all_settings)


def row_of_platform(kernel, platform):
    """Returns a row that runs everywhere as the kernel runs on one platform."""
    settings = dict.fromkeys(PLATFORMS, kernel.settings[platform])
    return dataclasses.replace(kernel, name=f"{kernel.name}_{platform}", settings=settings)


# A new implementation: three times the dot product, for fewer than 512 channels, in a picosecond.
TOY = Kernel(
    name="toy",
    instantiations=("dot_product",),
    respond=lambda operands, settings: 3 * dense.respond(operands, settings),
    cost=lambda sizes, platform: Forecast((1, 2), (3, 4), 1e-12),
    refusal=lambda sizes, platform: None if sizes.d < 512 else "a toy takes few channels",
)
