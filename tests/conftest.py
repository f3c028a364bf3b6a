"""Strict by default: four simulated CPU devices, rank promotion raises, annotations are checked, warnings are errors."""

import os

# Before JAX starts: where there is no accelerator, four devices for pmap.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # where there is one, the test processes share it

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32 on accelerators too


@pytest.fixture
def as_users_see_it():
    """Without the annotation checker, which would refuse bad input before the library's own errors can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
