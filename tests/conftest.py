"""Strict settings for every test, and a compilation cache that is kept between runs.

Rank promotion raises, annotations are checked, warnings are errors, and there are four simulated
CPU devices.
"""

import os
from pathlib import Path

# Set before JAX starts. Without an accelerator, pmap needs simulated devices.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
# With an accelerator, the test processes share its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# In the environment, so that processes started by tests use the same cache.
CACHE = {
    "jax_compilation_cache_dir": str(Path(__file__).parent.parent / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for option, default in CACHE.items():
    os.environ.setdefault(option.upper(), str(default))

import jax  # noqa: E402 - reads the environment
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Products of float32 are exact to float32 on accelerators as well.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def as_users_see_it():
    """Turns off the annotation checker, which would refuse bad input before the library's errors
    can.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
