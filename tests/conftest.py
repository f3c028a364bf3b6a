"""Strict by default: four simulated CPU devices, rank promotion raises, annotations are checked, warnings are errors."""

import os
import shutil
import tempfile

# Before JAX starts: where there is no accelerator, four devices for pmap.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # where there is one, the test processes share it

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_default_matmul_precision", "highest"
)  # float32 means float32 on accelerators too


def pytest_configure(config):
    """What one test process has compiled, the others load; each run of the tests starts with nothing."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(
            prefix="nonlocal_jax-tests-"
        )
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        jax.config.update("jax_compilation_cache_dir", config.compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture
def as_users_see_it():
    """Without the annotation checker, which would refuse bad input before the library's own errors can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
