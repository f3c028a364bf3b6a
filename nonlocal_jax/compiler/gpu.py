"""An NVIDIA H100 that XLA compiles for on a host that has none.

Needs JAX_PLATFORMS=cpu before JAX is imported, and JAX's plugin for CUDA, of JAX's own version:

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12

The compiled program has its text and its memory, but no estimate of time, and it cannot run. XLA
chooses algorithms by running them, which it cannot do here either: convolutions count without a
workspace, and products in cuBLAS share one of 4 MiB.
"""

from typing import Any

import jax
from jax.experimental import topologies

# Figures that CUDA reports on an H100 SXM with 80 GB, as a `GpuTargetConfigProto` of XLA.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Products go to cuBLAS. Without a GPU to try them on, XLA takes the first tiling of its own kernels
# for products, which fails to compile for some shapes of I3D (JAX 0.10).
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def h100() -> list[Any]:
    """Returns an H100 as the only device of a list, for shardings to compile with.

    Raises:
        ImportError: If JAX's plugin for CUDA is not installed, or JAX_PLATFORMS keeps it out.

    Example:
        device, = h100()
        x = jax.ShapeDtypeStruct((8, 784, 256), "bfloat16", sharding=SingleDeviceSharding(device))
        compiled = jax.jit(f).lower(x).compile(compiler_options=COMPILER_OPTIONS)
        compiled.memory_analysis().temp_size_in_bytes
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=_H100
        )
    except NotImplementedError as error:
        raise ImportError(
            "compiling for an H100 needs JAX's plugin for CUDA, and JAX_PLATFORMS=cpu on a host "
            f"without a GPU: pip install jax-cuda12-plugin=={jax.__version__} "
            f"jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12"
        ) from error
    return list(topology.devices)
