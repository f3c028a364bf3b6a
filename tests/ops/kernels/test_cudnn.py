"""NVIDIA's attention kernel against the definition, where there is such a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_equal_to_dense(masked, scale):
    keys = jax.random.split(jax.random.key(0), 3)
    theta, phi, g = (
        jax.random.normal(key, (2, size, 64)).astype(jnp.bfloat16)
        for key, size in zip(keys, (256, 128, 128), strict=True)
    )
    mask = jnp.arange(128) < jnp.array([[100], [0]]) if masked else None

    def value_and_gradients(implementation):
        def loss(operands):
            y = ops.embedded_gaussian(
                *operands, scale=scale, key_mask=mask, implementation=implementation
            )
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        gradients, y = jax.grad(loss, has_aux=True)((theta / 4, phi, g))
        return [np.asarray(x, np.float32) for x in (y, *gradients)]

    results, expected = value_and_gradients("cudnn"), value_and_gradients("dense")
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, reference, rtol=0.05, atol=0.02)
