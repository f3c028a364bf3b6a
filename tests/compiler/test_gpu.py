"""An H100 is compiled for without one, where JAX's plugin for CUDA is installed."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from nonlocal_jax.compiler import gpu

PLUGIN = importlib.util.find_spec("jax_cuda12_plugin")


@pytest.mark.skipif(PLUGIN is not None, reason="the plugin is installed")
def test_the_error_names_the_packages_to_install():
    packages = rf"pip install jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=="
    with pytest.raises(ImportError, match=packages):
        gpu.h100()


@pytest.mark.skipif(PLUGIN is None, reason="JAX's plugin for CUDA is not installed")
def test_compiles_for_an_h100():
    (device,) = gpu.h100()
    sharding = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((8, 512, 256), jnp.bfloat16, sharding=sharding)
    lowered = jax.jit(lambda x: x @ x.mT).lower(x)
    compiled = lowered.compile(compiler_options=gpu.COMPILER_OPTIONS)
    assert "cublas" in compiled.as_text()
    assert compiled.memory_analysis().output_size_in_bytes == 8 * 512 * 512 * 2
